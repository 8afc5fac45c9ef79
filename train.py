"""Trains PromptSG as section 5.1 of the paper says. Every default below is the paper's unless its help says otherwise.

python train.py --dataset synthetic --backbone tiny          the demo: needs no download and no GPU
python train.py --dataset msmt17 --backbone vit              the paper's run
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import clip
import data
import evaluate
import losses
from model import BACKBONES, COMPOSED_PROMPT, Output, PromptSG, build_model, count_learnable, restore_model
from util import machine
from util.curves import draw_curves
from util.run import CHECKPOINT_VERSION, Folder, Stop, digest, find_run, lock, settings_of

TRAINING_GFLOP = {"vit": 74.9, "resnet": 62.5}  # for a picture of 256x128, as tests/benchmark.py counts it
# The demo's. As in the paper, the encoder learns at a tenth of the new modules' rate.
TINY_DEFAULTS = {"epochs": 16, "decay_every": 12, "lr_visual": 2e-4, "lr_new": 2e-3, "image_size": [128, 64]}


# -------------------------------------------------------------------------------------------- the update

TERMS = ("loss", "loss_triplet", "loss_id", "loss_supcon", "accuracy")


def update(run: "Run", images: Tensor, labels: Tensor) -> Tensor:
    """One step on a batch, uint8 images (B, 3, H, W) and labels (B,); returns its row of TERMS, on the device."""
    args = run.args
    images = clip.normalize(images.to(args.device, non_blocking=True))  # (B, 3, H, W)
    labels = labels.to(args.device, non_blocking=True)  # (B,)
    with machine.autocast(args):
        output = run.forward(images)
    output, labels = gather_batch(output, labels)  # of all processes, if there are several

    triplet = sum(losses.triplet_loss(x, labels, args.margin) for x in output.triplet_features)  # Eq. 9, section 4.3
    identity = losses.identity_loss(output.logits, labels, args.label_smoothing)  # Eq. 8
    supcon = losses.supcon_loss(output.image, output.text, labels, run.temperature, run.directions)  # Eqs. 4-6
    loss = triplet + identity + args.supcon_weight * supcon  # Eq. 10

    run.optimizer.zero_grad()
    # DistributedDataParallel takes the mean of the processes' gradients; the sum is wanted.
    run.scaler.scale(loss * machine.world_size()).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    accuracy = (output.logits.argmax(dim=1) == labels).float().mean()
    return torch.stack([loss, triplet, identity, supcon, accuracy]).detach()


def gather_batch(output: Output, labels: Tensor) -> tuple[Output, Tensor]:
    """The whole batch's, from the part of each process: every process computes the same losses."""
    gather = machine.gather
    triplet_features = [gather(features) for features in output.triplet_features]
    return Output(triplet_features, gather(output.logits), gather(output.image), gather(output.text)), gather(labels)


def make_optimizer(model: PromptSG, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Adam (section 5.1), its whole update in one pass over the weights."""
    groups = model.parameter_groups(args.lr_visual, args.lr_new)
    return torch.optim.Adam(groups, weight_decay=args.weight_decay, fused=True)


# ------------------------------------------------------------------------------------------------ the run


class Run:
    """All that a run must remember to go on as if it had never stopped.

    No state of a random generator is among it: the weights are drawn from the seed, and each epoch's batches and
    augmentations from the seed and the epoch's number.
    """

    def __init__(self, model: PromptSG, args: argparse.Namespace, train_digest: str = ""):
        self.model = model
        self.args = args
        self.train_digest = train_digest
        self.folder = Folder(args)
        self.forward = machine.distribute(model)
        if args.compile:
            self.forward = torch.compile(self.forward)
        self.optimizer = make_optimizer(model, args)
        self.scheduler = StepLR(self.optimizer, args.decay_every, args.decay_factor)
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.precision == "fp16")
        self.temperature = args.temperature or model.temperature
        dropped = {"i2t": args.without_i2t, "t2i": args.without_t2i}
        # Table 3 b) and c) drop one; without the inversion network (Table 4) there is none.
        self.directions = [name for name in dropped if model.inversion and not dropped[name]]
        self.epoch = 0  # whole epochs done
        self.rows = []  # of the next epoch: the TERMS of each step done
        self.log = []  # a record an epoch
        self.best = 0.0  # mAP
        self.saved_at = time.monotonic()

    def learning_rates(self) -> list[float]:
        """Of the visual encoder and of the new modules."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def means(self) -> dict[str, float]:
        """The TERMS, averaged over the epoch's steps so far."""
        return {term: sum(column) / len(column) for term, column in zip(TERMS, zip(*self.rows))}

    def end_epoch(self, images_per_second: float) -> None:
        """Adds the epoch to the log and turns to the next."""
        self.epoch += 1
        record = {"epoch": self.epoch, **self.means(), "lr": self.learning_rates()[1]}
        self.log.append({**record, "images_per_second": images_per_second})
        self.folder.write_log(self.log)
        self.rows = []
        self.scheduler.step()

    def is_to_be_scored(self) -> bool:
        """Whether it stands between two epochs, with a score due that is not in the log."""
        every = self.args.eval_every
        is_due = every and (self.epoch % every == 0 or self.epoch == self.args.epochs)
        return bool(is_due and not self.rows and not (self.log and "mAP" in self.log[-1]))

    def is_finished(self) -> bool:
        """Whether all epochs are done and scored."""
        return self.epoch == self.args.epochs and not self.is_to_be_scored()

    def state_dict(self) -> dict:
        """Tensors and plain values only, so that it loads with weights_only=True."""
        return {
            "version": CHECKPOINT_VERSION,
            "args": settings_of(self.args),
            "model_args": self.model.model_args,
            "train_digest": self.train_digest,
            **{name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler", "scaler")},
            **{name: getattr(self, name) for name in ("epoch", "rows", "log", "best")},
        }

    def load_state_dict(self, state: dict) -> None:
        """All but the model's weights, which `restore_model` reads. ValueError if the training data has changed."""
        if state["train_digest"] != self.train_digest:
            raise ValueError("the training data is not what this run began with (identities or file names differ)")
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("epoch", "rows", "log", "best"):
            setattr(self, name, state[name])

    def save(self) -> None:
        """Writes last.pt."""
        self.folder.save(self.state_dict(), "last.pt")
        self.saved_at = time.monotonic()


def train(run: Run, dataset: data.Dataset, loader: DataLoader, stop: Stop) -> None:
    """The epochs that are left, scored where they are to be; returns early, with everything saved, at a signal.

    It saves before scoring, at the end, and after an epoch if the last time is a minute ago (ViT-B/16: 1.4 GB).
    """
    first_epoch = run.epoch
    start = time.perf_counter()
    while not stop.asked() and not run.is_finished():
        if run.is_to_be_scored():
            begin = time.perf_counter()
            validate(run, dataset)
            start += time.perf_counter() - begin  # the time of training is without it
        else:
            train_epoch(run, loader, stop)
            if run.is_to_be_scored() or time.monotonic() - run.saved_at > 60:
                run.save()
    run.save()
    seconds = time.perf_counter() - start
    machine.say(f"training time (Table 6): {seconds:.0f} s for {run.epoch - first_epoch} epochs, without scoring")
    if run.args.device.startswith("cuda"):
        machine.say(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def train_epoch(run: Run, loader: DataLoader, stop: Stop) -> None:
    """The steps of one epoch that are left, or until a signal says stop.

    What a step says of itself stays on the device until a line is printed, so that no step waits for the one before.
    Raises ValueError, in `read_rows`, for a loss that is not finite.
    """
    run.model.train()
    steps_before = len(run.rows)
    loader.batch_sampler.set_epoch(run.epoch + 1, skip=steps_before)
    steps = min(len(loader), run.args.steps or len(loader))
    unread = []
    start = time.perf_counter()
    for step, (images, labels) in enumerate(loader, steps_before + 1):
        unread.append(update(run, images, labels))
        is_last = step == steps or stop.asked()
        if is_last or step % run.args.log_every == 0:
            read_rows(run, unread, loader)
            seconds_a_step = (time.perf_counter() - start) / (step - steps_before)
            print_line(run, steps, seconds_a_step)
        if is_last:
            break
    if step == steps:
        run.end_epoch(run.args.batch_ids * run.args.batch_images / seconds_a_step)


def read_rows(run: Run, unread: list[Tensor], loader: DataLoader) -> None:
    """Moves the unread rows of TERMS from the device to the run.

    Raises ValueError, with the step, its terms and its pictures, for the first row that is not finite.
    """
    for row in torch.stack(unread).tolist():
        bad = [term for term, value in zip(TERMS, row) if not math.isfinite(value)]
        if bad:
            step = len(run.rows)
            batch = loader.batch_sampler.batches[step]
            names = " ".join(loader.dataset.samples[index].path.name for index, _ in batch)
            raise ValueError(
                f"{' and '.join(bad)} not finite at epoch {run.epoch + 1}, step {step + 1}, learning rates "
                f"{run.learning_rates()}: lower them or use --precision fp32; nothing was saved over. Batch: {names}"
            )
        run.rows.append(row)
    unread.clear()


def print_line(run: Run, steps: int, seconds_a_step: float) -> None:
    """How the epoch goes, for people; the loss terms are means over its steps so far."""
    args = run.args
    means = run.means()
    steps_left = (args.epochs - run.epoch) * steps - len(run.rows)
    minutes, seconds = divmod(round(steps_left * seconds_a_step), 60)
    machine.say(
        f"epoch {run.epoch + 1}/{args.epochs}  step {len(run.rows)}/{steps}  loss {means['loss']:.3f}"
        f"  triplet {means['loss_triplet']:.3f}  id {means['loss_id']:.3f}  supcon {means['loss_supcon']:.3f}"
        f"  accuracy {means['accuracy']:.1%}  {args.batch_ids * args.batch_images / seconds_a_step:.0f} images/s"
        f"  lr {'/'.join(f'{lr:.1e}' for lr in run.learning_rates())}  {minutes}:{seconds:02d} left"
    )


def validate(run: Run, dataset: data.Dataset) -> None:
    """Scores the test split with the prompt trained with: prints it, adds it to the log, keeps the best model.

    Before training, when the new modules are random, it scores CLIP's own embedding v.
    """
    prompt = "composed" if run.model.inversion else "simplified"
    name = f"epoch {run.epoch}, {prompt} prompt"
    if run.epoch == 0:
        prompt, name = "none", "before training, CLIP alone"
    result = evaluate.score(run.model, dataset, prompt, run.args)
    machine.say(f"{name}: {evaluate.describe(result)}")
    run.log = run.log or [{"epoch": 0}]
    run.log[-1] |= {"mAP": result["mAP"], "rank1": result["rank1"], "dataset_version": dataset.version}
    run.folder.write_log(run.log)
    if run.epoch and result["mAP"] > run.best:
        run.best = result["mAP"]
        best = {name: value for name, value in run.state_dict().items() if name != "optimizer"}
        run.folder.save(best, "best.pt")


# -------------------------------------------------------------------------------------------- the script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning. The defaults are the paper's, but for --backbone tiny, which has its own."""
    parser = machine.make_parser("train.py", "Train PromptSG.")
    add = parser.add_argument
    names = ", ".join(data.FOLDERS)
    add("--dataset", choices=data.FOLDERS, default="market1501", metavar="NAME", help=f"{names} (market1501)")
    add("--backbone", choices=BACKBONES, default="vit", help="CLIP's ViT-B/16 or RN50; tiny is for the demo (vit)")
    add("--clip-weights", metavar="PATH", help="OpenAI's .pt file, or 'random' (downloaded on first use)")
    add("--output", type=machine.path, metavar="DIR", help="folder of the run (runs/DATASET-BACKBONE)")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--overwrite", action="store_true", help="start anew although the output folder holds a run")
    add("--seed", type=int, default=0, metavar="N", help="of everything random (0)")

    add = parser.add_argument_group("section 5.1").add_argument
    add("--epochs", type=int, default=60, metavar="N", help="(60; tiny 16)")
    add("--batch-ids", type=int, default=16, metavar="N", help="identities in a batch (16)")
    add("--batch-images", type=int, default=4, metavar="N", help="images of each of them (4)")
    add("--image-size", type=int, nargs=2, default=[256, 128], metavar=("H", "W"), help="(256 128; tiny 128 64)")
    add("--lr-visual", type=float, default=5e-6, metavar="X", help="of the visual encoder (5e-6; tiny 2e-4)")
    add("--lr-new", type=float, default=5e-5, metavar="X", help="of the new modules (5e-5; tiny 2e-3)")
    add("--decay-every", type=int, default=20, metavar="N", help="epochs between two decays (20; tiny 12)")
    add("--decay-factor", type=float, default=0.1, metavar="X", help="of both learning rates (0.1)")
    add("--supcon-weight", type=float, default=0.5, metavar="X", help="lambda of Eq. 10 (0.5)")
    add("--composed-prompt", metavar="TEXT", default=COMPOSED_PROMPT, help="section 4.1 (%(default)s)")

    add = parser.add_argument_group("chosen by us, where the paper is silent").add_argument
    add("--temperature", type=float, metavar="X", help="tau of Eqs. 5 and 6 (CLIP's own, 0.01 in OpenAI's weights)")
    add("--margin", type=float, default=0.3, metavar="X", help="m of Eq. 9 (0.3)")
    add("--label-smoothing", type=float, default=0.1, metavar="X", help="of Eq. 8 (0.1)")
    add("--weight-decay", type=float, default=1e-4, metavar="X", help="of Adam (1e-4)")

    add = parser.add_argument_group("rows of the paper's tables").add_argument
    add("--baseline", action="store_true", help="Table 2, Baseline: visual encoder, ID and triplet loss only")
    add("--without-i2t", action="store_true", help="Table 3 b): without L_i2t^Sup")
    add("--without-t2i", action="store_true", help="Table 3 c): without L_t2i^Sup")
    add("--without-interaction", action="store_true", help="Table 3 d), Table 5 row 1: without MIM")
    add("--train-prompt", choices=("composed", "simplified"), default="composed", help="Table 4 (composed)")
    add("--blocks", type=int, choices=(0, 1, 2), default=2, help="Table 5, rows 2 to 4: transformer blocks (2)")

    add = parser.add_argument_group("course of the run").add_argument
    add("--steps", type=int, metavar="N", help="stop each epoch after so many steps, to try things out")
    add("--eval-every", type=int, default=10, metavar="N", help="epochs between two scores; 0 never scores (10)")
    add("--log-every", type=int, default=20, metavar="N", help="steps between two lines (20)")
    add("--cache", action="store_true", help="keep decoded training pictures in shared memory (Market-1501: 1.3 GB)")
    add("--compile", action="store_true", help="torch.compile: faster on CUDA after a minute or two")
    add("--deterministic", action="store_true", help="bit for bit the same on CUDA, too, and slower")
    machine.add_machine_flags(parser)

    args = parser.parse_args(argv)
    if args.backbone == "tiny":
        parser.set_defaults(**TINY_DEFAULTS)
        args = parser.parse_args(argv)  # once more: a flag that is given wins over the demo's default
    return args


def check_args(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on other flags. ValueError, in one line, for impossible combinations."""
    positive = "epochs batch_ids batch_images decay_every decay_factor lr_visual lr_new temperature steps log_every"
    for name in positive.split():
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0")
    for name in ("seed", "margin", "weight_decay", "supcon_weight", "label_smoothing", "eval_every"):
        if not 0 <= getattr(args, name) < 2**32:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and less than 2**32")
    if args.label_smoothing >= 1:
        raise ValueError("--label-smoothing must be less than 1")
    if min(args.image_size) <= 0:
        raise ValueError("--image-size must be more than 0")
    if args.batch_ids < 2 or args.batch_images < 2:
        raise ValueError("--batch-ids and --batch-images must be at least 2: a triplet needs both kinds of pairs")
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite starts anew: give one of them")
    own_weights = args.backbone == "tiny" and args.clip_weights != "random"
    if own_weights and (args.clip_weights or args.image_size != TINY_DEFAULTS["image_size"]):
        raise ValueError("--backbone tiny has weights of its own, for 128x64 pixels: or give --clip-weights random")
    composes = args.train_prompt == "composed"
    sets_supcon = args.without_i2t or args.without_t2i or args.temperature or args.supcon_weight != 0.5
    sets_composing = sets_supcon or args.composed_prompt != COMPOSED_PROMPT
    if args.baseline and (sets_composing or args.without_interaction or not composes or args.blocks != 2):
        raise ValueError("--baseline has neither prompts nor interaction module: give it no flag of theirs")
    if args.without_interaction and (not composes or args.blocks != 2):
        raise ValueError("--without-interaction goes with the composed prompt and without --blocks; see --baseline")
    if not composes and sets_composing:
        raise ValueError("--train-prompt simplified has no S* and no SupCon loss: give it no flag of theirs")
    if args.without_i2t and args.without_t2i:
        raise ValueError("without both directions no SupCon loss is left: use --supcon-weight 0")
    if args.compile:
        machine.check_compile()
    machine.check_machine_flags(args)
    args.output = args.output or Path("runs") / f"{args.dataset}-{args.backbone}"


def prepare(args: argparse.Namespace) -> tuple[Run, data.Dataset, DataLoader]:
    """A new run, or the one to go on with, and its data; says what they are."""
    checkpoint = find_run(args)
    dataset = data.load_dataset(args.dataset, args.data_root)
    print(data.summary(dataset))
    pids = [sample.pid for sample in dataset.train]
    sampler = data.PKSampler(pids, args.batch_ids, args.batch_images, args.seed, machine.rank(), machine.world_size())
    loader = data.train_loader(dataset.train, sampler, args.image_size, args.workers, args.cache)

    model = restore_model(checkpoint) if checkpoint else build_model(args, dataset.num_identities)
    model.to(args.device, memory_format=torch.channels_last)  # the layout that convolutions prefer
    run = Run(model, args, digest(f"{sample.pid} {sample.path.name}" for sample in dataset.train))
    if checkpoint:
        run.load_state_dict(checkpoint)
    millions = count_learnable(model) / 1e6
    print(f"{millions:.1f}M learnable parameters; {args.backbone} on {args.device}, {args.precision}")
    if args.device == "cpu" and args.backbone in TRAINING_GFLOP:
        print(machine.cpu_warning(1e9 * TRAINING_GFLOP[args.backbone] * len(dataset.train) * args.epochs))
    return run, dataset, loader


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    machine.require_gpus(args)
    machine.join_processes(args)
    check_args(args)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    too_large = (
        f"a batch of {args.batch_ids * args.batch_images} pictures does not fit: "
        "--precision bf16 needs less than fp32; fewer --batch-ids help, too, and change the method"
    )
    with lock(args.output):
        run, dataset, loader = prepare(args)
        with Stop() as stop, run.folder, machine.out_of_memory(too_large):
            run.folder.write_log(run.log)
            train(run, dataset, loader, stop)
    is_first = machine.leave_processes()
    if stop.signal and not run.is_finished():
        machine.say(f"saved in {args.output}; go on with the same command and --resume")
        sys.exit(128 + stop.signal)
    if is_first:
        draw_curves(run.log, args.output / "curves.png")
    machine.say(
        f"the run is in {args.output}; score it again: python evaluate.py --checkpoint {args.output / 'last.pt'}"
    )


if __name__ == "__main__":
    machine.exit_on_error(main)
