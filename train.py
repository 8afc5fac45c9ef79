"""Trains PromptSG as section 5.1 of the paper says. Every default below is the paper's unless its help says otherwise.

python train.py --dataset synthetic --backbone tiny          the demo: needs no data, no weights and no GPU
python train.py --dataset msmt17 --backbone vit              the paper's run
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader

import clip
import data
import evaluate
import losses
from model import COMPOSED_PROMPT, Output, PromptSG, count_learnable

# The demo starts from random weights: it needs larger steps than fine-tuning CLIP does, and fewer.
TINY_DEFAULTS = {"epochs": 40, "decay_every": 30, "lr_visual": 2e-4, "lr_new": 1e-3, "image_size": [128, 64]}
# No weight of an epoch depends on these flags, so that a run may be resumed with others.
FREE_FLAGS = ["data_root", "device", "workers", "eval_batch_size", "output", "resume", "overwrite", "log_every"]
FREE_FLAGS += ["cache", "epochs", "eval_every"]


# -------------------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning. The defaults are the paper's, but for --backbone tiny, which has its own."""
    parser = argparse.ArgumentParser(
        description="Train PromptSG.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=data.NAMES, default="market1501", help="synthetic is drawn on the spot")
    add("--backbone", choices=evaluate.BACKBONES, default="vit", help="CLIP's ViT-B/16 or RN50; tiny is for the demo")
    add("--clip-weights", metavar="PATH", help="OpenAI's .pt file, or 'random'; None: downloaded on first use")
    add("--output", type=Path, help="folder of the run; None: runs/DATASET-BACKBONE")
    add("--resume", action="store_true", help="go on with the run in the output folder")
    add("--overwrite", action="store_true", help="start anew although the output folder holds a run")
    add("--seed", type=int, default=0, help="of everything random")

    paper = parser.add_argument_group("section 5.1")
    add = paper.add_argument
    add("--epochs", type=int, default=60, help=f"tiny: {TINY_DEFAULTS['epochs']}")
    add("--batch-ids", type=int, default=16, help="identities in a batch")
    add("--batch-images", type=int, default=4, help="images of each of them")
    add("--image-size", type=int, nargs=2, default=[256, 128], metavar=("HEIGHT", "WIDTH"), help="in pixels")
    add("--lr-visual", type=float, default=5e-6, help=f"of the visual encoder; tiny: {TINY_DEFAULTS['lr_visual']}")
    add("--lr-new", type=float, default=5e-5, help=f"of the new modules; tiny: {TINY_DEFAULTS['lr_new']}")
    add("--decay-every", type=int, default=20, help=f"epochs between two decays; tiny: {TINY_DEFAULTS['decay_every']}")
    add("--decay-factor", type=float, default=0.1, help="of both learning rates")
    add("--supcon-weight", type=float, default=0.5, help="lambda of Eq. 10")
    add("--composed-prompt", metavar="TEXT", default=COMPOSED_PROMPT, help="section 4.1; S* is the pseudo-word")

    ours = parser.add_argument_group("not in the paper: chosen as the README says")
    add = ours.add_argument
    add("--temperature", type=float, help="tau of Eqs. 5 and 6; None: CLIP's own, 0.01 in OpenAI's weights")
    add("--margin", type=float, default=0.3, help="m of Eq. 9")
    add("--label-smoothing", type=float, default=0.1, help="of Eq. 8")
    add("--weight-decay", type=float, default=1e-4, help="of Adam")

    tables = parser.add_argument_group("rows of the paper's tables")
    add = tables.add_argument
    add("--baseline", action="store_true", help="Table 2, Baseline: visual encoder, ID and triplet loss only")
    add("--without-i2t", action="store_true", help="Table 3 b): without L_i2t^Sup")
    add("--without-t2i", action="store_true", help="Table 3 c): without L_t2i^Sup")
    add("--without-interaction", action="store_true", help="Table 3 d), Table 5 row 1: without MIM")
    add("--train-prompt", choices=("composed", "simplified"), default="composed", help="Table 4")
    add("--blocks", type=int, choices=(0, 1, 2), default=2, help="Table 5, rows 2 to 4: transformer blocks")

    add = parser.add_argument_group("machine and output").add_argument
    add("--steps", type=int, help="stop each epoch after so many steps, to try things out")
    add("--eval-every", type=int, default=10, help="epochs between two scores; 0: never score")
    add("--log-every", type=int, default=20, help="steps between two lines")
    add("--cache", action="store_true", help="keep decoded training pictures in shared memory (Market-1501: 1.3 GB)")
    add("--compile", action="store_true", help="torch.compile: faster on CUDA after a minute or two")
    add("--deterministic", action="store_true", help="bit for bit the same on CUDA, too, and slower")
    evaluate.add_machine_flags(parser)

    args = parser.parse_args(argv)
    if args.backbone == "tiny":
        parser.set_defaults(**TINY_DEFAULTS)
        args = parser.parse_args(argv)
    return args


def check_args(args: argparse.Namespace) -> None:
    """Fills in the defaults that depend on other flags. ValueError, in one line, for what cannot be."""
    positive = "epochs batch_ids batch_images decay_every decay_factor lr_visual lr_new temperature steps log_every"
    for name in positive.split():
        if getattr(args, name) is not None and not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0")
    for name in ("seed", "margin", "weight_decay", "supcon_weight", "label_smoothing", "eval_every"):
        if not 0 <= getattr(args, name) < 2**32:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0 and less than 2**32")
    if args.batch_ids < 2 or args.batch_images < 2:
        raise ValueError("--batch-ids and --batch-images must be at least 2: a triplet needs both kinds of pairs")
    if min(args.image_size) <= 0:
        raise ValueError("--image-size must be more than 0")
    if args.label_smoothing >= 1:
        raise ValueError("--label-smoothing must be less than 1")
    composes = args.train_prompt == "composed"
    parts = args.without_i2t, args.without_t2i, args.without_interaction, not composes, args.blocks != 2
    if args.baseline and any(parts):
        raise ValueError("--baseline has neither prompts nor interaction module: give it no other row's flag")
    if args.without_interaction and (not composes or args.blocks != 2):
        raise ValueError("--without-interaction goes with the composed prompt and without --blocks; see --baseline")
    if not composes and (args.without_i2t or args.without_t2i):
        raise ValueError("--train-prompt simplified has no SupCon loss: leave --without-i2t and --without-t2i away")
    if args.without_i2t and args.without_t2i:
        raise ValueError("without both directions no SupCon loss is left: use --supcon-weight 0")
    evaluate.check_machine_flags(args)
    args.output = args.output or Path("runs") / f"{args.dataset}-{args.backbone}"


# ------------------------------------------------------------------------------------------- the update


def make_optimizer(model: PromptSG, args: argparse.Namespace) -> torch.optim.Optimizer:
    """Adam (section 5.1), its whole update in one pass over the weights."""
    groups = model.parameter_groups(args.lr_visual, args.lr_new)
    return torch.optim.Adam(groups, weight_decay=args.weight_decay, fused=True)


TERMS = ("loss", "loss_triplet", "loss_id", "loss_supcon", "accuracy")


class Progress:
    """The loss terms of an epoch: kept on the device, read and checked where a line is printed (on a CPU at once)."""

    def __init__(self, run: "Run", steps: int, log_every: int):
        self.run, self.steps, self.log_every = run, steps, log_every
        self.step, self.unread, self.images, self.start = run.step, [], 0, time.perf_counter()
        self.waited = 0.0

    def timed(self, batches: Iterable) -> Iterator:
        """The same batches; how long they let us wait is counted."""
        batches, end = iter(batches), object()
        while True:
            start = time.perf_counter()
            batch = next(batches, end)
            self.waited += time.perf_counter() - start
            if batch is end:
                return
            yield batch

    def update(self, images: int, terms: dict[str, Tensor]) -> None:
        """Takes in a step of so many images; prints a line every `log_every` steps and at the epoch's end."""
        self.step += 1
        self.images += images
        self.unread.append(torch.stack([terms[name].detach() for name in TERMS]))
        is_line = self.step % self.log_every == 0 or self.step == self.steps
        if is_line or self.unread[0].device.type == "cpu":
            self.read()
        if is_line:
            print(self.line(), flush=True)

    def read(self) -> None:
        """Adds the unread steps to the run's sums. FloatingPointError at the first step with a term not finite."""
        for row in torch.stack(self.unread).tolist():
            bad = [name for name, value in zip(TERMS, row) if not math.isfinite(value)]
            if bad:
                raise FloatingPointError(self.run.step + 1, bad)
            self.run.sums = [total + value for total, value in zip(self.run.sums, row)]
            self.run.step += 1
        self.unread.clear()

    def means(self) -> dict[str, float]:
        return {name: total / self.run.step for name, total in zip(TERMS, self.run.sums)}

    def images_per_second(self) -> float:
        return self.images / (time.perf_counter() - self.start)

    def line(self) -> str:
        """How the epoch goes, for people; the loss terms are means over its steps so far."""
        run, means = self.run, self.means()
        epochs_left = run.args.epochs - run.epoch
        images_left = (epochs_left * self.steps - self.step) * run.args.batch_ids * run.args.batch_images
        minutes, seconds = divmod(round(images_left / self.images_per_second()), 60)
        return (
            f"epoch {run.epoch + 1}/{run.args.epochs}  step {self.step}/{self.steps}  loss {means['loss']:.3f}"
            f"  triplet {means['loss_triplet']:.3f}  id {means['loss_id']:.3f}  supcon {means['loss_supcon']:.3f}"
            f"  accuracy {means['accuracy']:.1%}  {self.images_per_second():.0f} images/s"
            f" ({self.waited / (time.perf_counter() - self.start):.0%} waiting for data)"
            f"  lr {'/'.join(f'{lr:.1e}' for lr in run.learning_rates())}  {minutes}:{seconds:02d} left"
        )


def gather_batch(output: Output, labels: Tensor) -> tuple[Output, Tensor]:
    """The whole batch's, from the part of each process: every process computes the same losses."""
    gather = evaluate.gather
    text = None if output.text is None else gather(output.text)
    states = [gather(state) for state in output.states]
    return Output(gather(output.z), gather(output.logits), gather(output.image), text, states), gather(labels)


def train_epoch(run: "Run", loader: DataLoader, progress: Progress, stop: "Stop") -> None:
    """The steps of one epoch that are left, or until a signal says stop."""
    model, args = run.model, run.args
    device, dtype = torch.device(args.device), evaluate.PRECISIONS[args.precision]
    temperature = args.temperature or model.temperature
    directions = {"i2t": not args.without_i2t, "t2i": not args.without_t2i}
    model.train()
    for images, labels in progress.timed(itertools.islice(loader, progress.steps - progress.step)):
        images = data.normalize(images.to(device, non_blocking=True))  # (B, 3, H, W)
        labels = labels.to(device, non_blocking=True)  # (B,)

        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = run.forward(images)
        output, labels = gather_batch(output, labels)  # of all processes, if there are several
        terms = losses.promptsg_loss(
            output, labels, temperature, args.supcon_weight, args.margin, args.label_smoothing, **directions
        )
        run.optimizer.zero_grad()
        run.scaler.scale(terms["loss"]).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()

        terms["accuracy"] = (output.logits.argmax(dim=1) == labels).float().mean()
        progress.update(len(labels), terms)
        if stop.asked():
            break
    if progress.unread:
        progress.read()


# ------------------------------------------------------------------------------------------- what survives


class Run:
    """All that a run must remember to go on as if it had never stopped.

    No state of a random generator is among it: the weights are drawn from the seed, and each epoch's batches and
    augmentations from the seed and the epoch's number.
    """

    def __init__(self, model: PromptSG, args: argparse.Namespace):
        self.model, self.args = model, args
        self.forward = evaluate.distribute(model)
        if args.compile:
            self.forward = torch.compile(self.forward)
        self.optimizer = make_optimizer(model, args)
        self.scheduler = StepLR(self.optimizer, args.decay_every, args.decay_factor)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
        self.epoch = 0  # whole epochs done
        self.step, self.sums = 0, [0.0] * len(TERMS)  # steps done of the next, and their loss terms, summed
        self.best, self.log = 0.0, []

    def learning_rates(self) -> list[float]:
        """Of the visual encoder and of the new modules."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict:
        """Tensors and plain values only, so that it loads with weights_only=True."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler", "scaler")}
        progress = {name: getattr(self, name) for name in ("epoch", "step", "sums", "best", "log")}
        return {"version": evaluate.CHECKPOINT_VERSION, "args": settings_of(self.args), **state, **progress}

    def load_state_dict(self, state: dict) -> None:
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("epoch", "step", "sums", "best", "log"):
            setattr(self, name, state[name])

    def save(self) -> None:
        write_whole(self.state_dict(), self.args.output / "last.pt")

    def record(self, **values: float) -> None:
        """Adds a line to the log."""
        self.log.append(values)
        if evaluate.process_number() > 0:
            return
        with (self.args.output / "log.jsonl").open("a") as log:
            log.write(json.dumps(values) + "\n")


def write_whole(value: dict, path: Path) -> None:
    """torch.save beside and renamed, so that a file of this name is always whole. OSError if there is no room.

    Only the first of several processes writes.
    """
    if evaluate.process_number() > 0:
        return
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path} ({clip.one_line(error)}): make room and go on with --resume; "
            "what was saved before is whole"
        ) from error


class Stop:
    """While it lasts, SIGINT (Ctrl-C) and SIGTERM ask to finish the step, save and end. A second one ends at once."""

    def __enter__(self) -> "Stop":
        self.signal = None
        self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether this process, or another one of the run, has had a signal."""
        self.signal = evaluate.agree(self.signal)
        return self.signal is not None

    def handle(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        print(f"{signal.Signals(number).name}: finishing the step", flush=True)


def settings_of(args: argparse.Namespace) -> dict:
    """The flags as plain values, for args.json and the checkpoints."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


def find_run(args: argparse.Namespace) -> dict | None:
    """The checkpoint to go on from, or None for a new run.

    ValueError if the flags are not those of the run to go on with, or if a new run would overwrite another.
    """
    last = args.output / "last.pt"
    if not args.resume:
        if last.exists() and not args.overwrite:
            raise ValueError(f"{args.output} holds a run: --resume it, --overwrite it, or choose another --output")
        return None
    checkpoint = evaluate.load_checkpoint(last)
    for name, value in settings_of(args).items():
        before = checkpoint["args"].get(name)
        if name not in FREE_FLAGS and before != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{last} was trained with {flag} {before}, not {value}: give the same flags to --resume")
    return checkpoint


def open_folder(run: Run) -> None:
    """Makes the run's folder, clears it of another run, and writes args.json and the log up to where the run stands."""
    if evaluate.process_number() > 0:
        return
    folder = run.args.output
    folder.mkdir(parents=True, exist_ok=True)
    if not run.args.resume:
        for name in ("last.pt", "best.pt"):
            (folder / name).unlink(missing_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run.log))
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    about = {
        "command": shlex.join(sys.argv),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: importlib.metadata.version(package) for package in ("torchvision", "numpy", "pillow")},
        "processor": torch.cuda.get_device_name() if run.args.device.startswith("cuda") else platform.machine(),
    }
    (folder / "args.json").write_text(json.dumps({**settings_of(run.args), **about}, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------- the run


def score(run: Run, dataset: data.Dataset) -> dict:
    """Prints the score on the test split, with the prompt trained with; keeps the best; returns what is logged."""
    prompt = "composed" if run.model.inversion else "simplified"
    result = evaluate.score(run.model, dataset, prompt, run.args)
    name = f"epoch {run.epoch}" if run.epoch else "untrained"
    print(f"{name}, {prompt} prompt: {evaluate.describe(result)}", flush=True)
    if run.epoch and result["mAP"] > run.best:
        run.best = result["mAP"]
        best = {name: value for name, value in run.state_dict().items() if name != "optimizer"}
        write_whole(best, run.args.output / "best.pt")
    return {"mAP": result["mAP"], "rank1": result["rank1"]}


def train(run: Run, dataset: data.Dataset, loader: DataLoader, sampler: data.PKSampler, stop: Stop) -> None:
    """The epochs that are left; returns early, with everything saved, if a signal said stop."""
    args, seconds, first = run.args, 0.0, run.epoch
    while run.epoch < args.epochs and not stop.asked():
        sampler.set_epoch(run.epoch + 1, skip=run.step)
        progress = Progress(run, min(len(sampler), args.steps or len(sampler)), args.log_every)
        try:
            train_epoch(run, loader, progress, stop)
        except FloatingPointError as error:
            step, bad = error.args
            names = " ".join(dataset.train[index].path.name for index, _ in sampler.batches[step - 1])
            raise ValueError(
                f"{' and '.join(bad)} not finite at epoch {run.epoch + 1}, step {step}, learning rates "
                f"{run.learning_rates()}: lower them or use --precision fp32; nothing was saved over. Batch: {names}"
            ) from error
        seconds += time.perf_counter() - progress.start
        if run.step == progress.steps:
            record = {
                **progress.means(),
                "lr": run.learning_rates()[1],
                "images_per_second": progress.images_per_second(),
            }
            run.scheduler.step()
            run.epoch, run.step, run.sums = run.epoch + 1, 0, [0.0] * len(TERMS)
            if args.eval_every and (run.epoch % args.eval_every == 0 or run.epoch == args.epochs):
                record |= score(run, dataset)
            run.record(epoch=run.epoch, **record)
        run.save()
    print(f"training time (Table 6): {seconds:.0f} s for {run.epoch - first} epochs, without scoring")
    if args.device.startswith("cuda"):
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    evaluate.join_processes(args)
    check_args(args)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    checkpoint = find_run(args)
    dataset = data.load_dataset(args.dataset, args.data_root)
    print(data.summary(dataset))
    pids, part = [sample.pid for sample in dataset.train], (evaluate.process_number(), evaluate.processes())
    sampler = data.PKSampler(pids, args.batch_ids, args.batch_images, args.seed, part)
    loader = data.train_loader(dataset.train, sampler, args.image_size, args.workers, args.cache)

    model = evaluate.restore_model(checkpoint) if checkpoint else evaluate.build_model(args, dataset.num_identities)
    run = Run(model.to(args.device, memory_format=torch.channels_last), args)  # the layout that convolutions prefer
    if checkpoint:
        run.load_state_dict(checkpoint)
    millions = count_learnable(model) / 1e6
    print(f"{millions:.1f}M learnable parameters; {args.backbone} on {args.device}, {args.precision}")

    open_folder(run)
    with Stop() as stop:
        if not checkpoint and args.eval_every:
            run.record(epoch=0, **score(run, dataset))
            run.save()
        train(run, dataset, loader, sampler, stop)
    is_first = evaluate.leave_processes()
    if stop.signal:
        print(f"saved in {args.output}; go on with the same command and --resume", flush=True)
        sys.exit(128 + stop.signal)
    if is_first:
        evaluate.draw_curves(run.log, args.output / "curves.png")
    print(f"the run is in {args.output}; score it again: python evaluate.py --checkpoint {args.output / 'last.pt'}")


if __name__ == "__main__":
    evaluate.exit_on_error(main)
