"""Trains PromptSG as section 5.1 of the paper says. Every default below is the paper's unless its help says otherwise.

python train.py --dataset synthetic --backbone tiny          the demo: needs no data, no weights and no GPU
python train.py --dataset msmt17 --backbone vit              the paper's run
"""

import argparse
import itertools
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR

import clip
import data
import evaluate
import losses
from model import PromptSG, count_learnable

BACKBONES = {"vit": "ViT-B/16", "resnet": "RN50", "tiny": "tiny"}
# The demo starts from random weights: it needs larger steps than fine-tuning CLIP does, and fewer.
TINY_DEFAULTS = {"epochs": 40, "decay_every": 30, "lr_visual": 2e-4, "lr_new": 1e-3, "image_size": [128, 64]}
# No weight depends on these flags, so that a run may be resumed with others.
MACHINE_FLAGS = ("data_root", "device", "workers", "eval_batch_size", "output", "resume", "overwrite", "log_every")


# -------------------------------------------------------------------------------------------- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train PromptSG.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", choices=data.NAMES, default="market1501", help="synthetic is drawn on the spot")
    add("--backbone", choices=BACKBONES, default="vit", help="CLIP's ViT-B/16 or RN50; tiny is for the demo")
    add("--clip-weights", metavar="PATH", help="OpenAI's .pt file, or 'random' (default: downloaded on first use)")
    add("--output", type=Path, help="folder of the run (default: runs/DATASET-BACKBONE)")
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

    ours = parser.add_argument_group("not in the paper: chosen as the README says")
    add = ours.add_argument
    add("--temperature", type=float, help="tau of Eqs. 5 and 6 (default: CLIP's own, 0.01 in OpenAI's weights)")
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
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be more than 0")
    for name in ("seed", "margin", "weight_decay", "supcon_weight", "label_smoothing", "eval_every"):
        if not getattr(args, name) >= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 0")
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


# --------------------------------------------------------------------------------------------------- a run


def build_model(args: argparse.Namespace, num_identities: int) -> PromptSG:
    """CLIP with its weights, and PromptSG around it, new modules initialised from the seed."""
    name = BACKBONES[args.backbone]
    if name == "tiny" or args.clip_weights == "random":
        clip_model = clip.untrained(name, tuple(args.image_size), args.seed)
        if name != "tiny":
            print("WARNING: CLIP starts from RANDOM weights (--clip-weights random): the results will mean nothing")
    else:
        clip_model = clip.load(args.clip_weights or name, tuple(args.image_size))
        if isinstance(clip_model.visual, clip.VisionTransformer) != (name == "ViT-B/16"):
            raise ValueError(f"--clip-weights {args.clip_weights} are not those of --backbone {args.backbone}")
    torch.manual_seed(args.seed)
    return PromptSG(clip_model, num_identities, **evaluate.ablations(args))


class Progress:
    """The means of an epoch's loss terms, kept on the device and read only where a line is printed."""

    def __init__(self, epoch: int, epochs: int, steps: int, log_every: int):
        self.epoch, self.epochs, self.steps, self.log_every = epoch, epochs, steps, log_every
        self.start, self.step, self.images, self.sums = time.perf_counter(), 0, 0, {}

    def update(self, images: int, terms: dict[str, Tensor], learning_rates: list[float]) -> None:
        self.step += 1
        self.images += images
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        if self.step % self.log_every == 0 or self.step == self.steps:
            self.print_line(learning_rates)

    def means(self) -> dict[str, float]:
        """Means over the steps so far. ValueError names the terms that are not finite."""
        means = dict(zip(self.sums, (torch.stack(list(self.sums.values())) / self.step).tolist()))
        if not all(map(math.isfinite, means.values())):
            values = ", ".join(f"{name} {value:.3g}" for name, value in means.items())
            raise ValueError(f"not finite by epoch {self.epoch}, step {self.step}: {values}; use a smaller --lr-visual")
        return means

    def images_per_second(self) -> float:
        return self.images / (time.perf_counter() - self.start)

    def print_line(self, learning_rates: list[float]) -> None:
        means, seconds = self.means(), time.perf_counter() - self.start
        steps_left = (self.epochs - self.epoch + 1) * self.steps - self.step
        minutes, rest = divmod(round(seconds / self.step * steps_left), 60)
        print(
            f"epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps}  loss {means['loss']:.3f}"
            f"  triplet {means['loss_triplet']:.3f}  id {means['loss_id']:.3f}  supcon {means['loss_supcon']:.3f}"
            f"  accuracy {means['accuracy']:.1%}  {self.images_per_second():.0f} images/s"
            f"  lr {'/'.join(f'{lr:.1e}' for lr in learning_rates)}  {minutes}:{rest:02d} left",
            flush=True,
        )


def train_epoch(model, loader, optimizer, scaler, progress: Progress, args: argparse.Namespace) -> dict[str, float]:
    """One epoch of at most args.steps steps; the means of the loss terms, by name."""
    device, dtype = torch.device(args.device), evaluate.PRECISIONS[args.precision]
    temperature = args.temperature or model.temperature
    directions = {"i2t": not args.without_i2t, "t2i": not args.without_t2i}
    model.train()
    for images, labels in itertools.islice(loader, args.steps):
        images = data.normalize(images.to(device, non_blocking=True))  # (B, 3, H, W)
        labels = labels.to(device, non_blocking=True)  # (B,)

        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = model(images)
        terms = losses.promptsg_loss(
            output, labels, temperature, args.supcon_weight, args.margin, args.label_smoothing, **directions
        )
        optimizer.zero_grad()
        scaler.scale(terms["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()

        terms["accuracy"] = (output.logits.argmax(dim=1) == labels).float().mean()
        progress.update(len(images), terms, [group["lr"] for group in optimizer.param_groups])
    return progress.means()


def save(value: dict, path: Path) -> None:
    """Writes beside and renames, so that a checkpoint is whole or absent."""
    unfinished = path.with_name(path.name + ".unfinished")
    torch.save(value, unfinished)
    os.replace(unfinished, path)


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
        if name not in MACHINE_FLAGS and before != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{last} was trained with {flag} {before}, not {value}: give the same flags to --resume")
    return checkpoint


def open_run(args: argparse.Namespace, checkpoint: dict | None) -> None:
    """Makes the run's folder, writes args.json, and leaves in log.jsonl only the epochs of the checkpoint."""
    args.output.mkdir(parents=True, exist_ok=True)
    git = subprocess.run(
        ["git", "rev-parse", "--verify", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    about = {
        "command": shlex.join(sys.argv),
        "commit": git.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine(),
    }
    (args.output / "args.json").write_text(json.dumps({**settings_of(args), **about}, indent=2) + "\n")
    log, lines = args.output / "log.jsonl", []
    if checkpoint:
        lines = [line for line in log.read_text().splitlines(True) if json.loads(line)["epoch"] <= checkpoint["epoch"]]
    else:
        for name in ("last.pt", "best.pt"):
            (args.output / name).unlink(missing_ok=True)
    log.write_text("".join(lines))


def write_log(record: dict, args: argparse.Namespace) -> None:
    with (args.output / "log.jsonl").open("a") as log:
        log.write(json.dumps(record) + "\n")


def score(model: PromptSG, dataset: data.Dataset, epoch: int, args: argparse.Namespace) -> dict:
    """Prints the score on the test split, with the prompt trained with; returns what belongs into the log."""
    prompt = "composed" if model.inversion else "simplified"
    result = evaluate.score(model, dataset, prompt, args)
    name = f"epoch {epoch}" if epoch else "untrained"
    print(f"{name}, {prompt} prompt: {evaluate.describe(result)}", flush=True)
    return {"mAP": result["mAP"], "rank1": result["rank1"]}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    checkpoint = find_run(args)
    dataset = data.load_dataset(args.dataset, args.data_root)
    print(data.summary(dataset))
    sampler = data.PKSampler([sample.pid for sample in dataset.train], args.batch_ids, args.batch_images, args.seed)
    loader = data.train_loader(dataset.train, sampler, args.image_size, args.workers)

    model = evaluate.restore_model(checkpoint) if checkpoint else build_model(args, dataset.num_identities)
    model.to(args.device)
    optimizer = torch.optim.Adam(model.parameter_groups(args.lr_visual, args.lr_new), weight_decay=args.weight_decay)
    scheduler = StepLR(optimizer, args.decay_every, args.decay_factor)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    print(
        f"{count_learnable(model) / 1e6:.1f}M learnable parameters; {args.backbone} on {args.device}, {args.precision}"
    )

    open_run(args, checkpoint)
    done, best = 0, 0.0
    if checkpoint:
        done, best = checkpoint["epoch"], checkpoint["best"]
        optimizer.load_state_dict(checkpoint["optimizer"])
        scheduler.load_state_dict(checkpoint["scheduler"])
        scaler.load_state_dict(checkpoint["scaler"])
    elif args.eval_every:
        write_log({"epoch": 0, **score(model, dataset, 0, args)}, args)

    seconds = 0.0
    for epoch in range(done + 1, args.epochs + 1):
        torch.manual_seed(args.seed * 1_000_003 + epoch)  # each epoch has its own seed, so that one can start anywhere
        sampler.set_epoch(epoch)
        learning_rate, start = optimizer.param_groups[1]["lr"], time.perf_counter()
        progress = Progress(epoch, args.epochs, min(len(sampler), args.steps or len(sampler)), args.log_every)
        means = train_epoch(model, loader, optimizer, scaler, progress, args)
        seconds += time.perf_counter() - start
        scheduler.step()
        record = {"epoch": epoch, **means, "lr": learning_rate, "images_per_second": progress.images_per_second()}

        state = {"model": model.state_dict(), "epoch": epoch, "args": settings_of(args)}
        if args.eval_every and (epoch % args.eval_every == 0 or epoch == args.epochs):
            record |= score(model, dataset, epoch, args)
            if record["mAP"] > best:
                best = record["mAP"]
                save(state, args.output / "best.pt")
        for name, part in (("optimizer", optimizer), ("scheduler", scheduler), ("scaler", scaler)):
            state[name] = part.state_dict()
        save({**state, "best": best}, args.output / "last.pt")
        write_log(record, args)
    print(f"training time (Table 6): {seconds:.0f} s for {args.epochs - done} epochs, without scoring")
    print(f"the run is in {args.output}; score it again: python evaluate.py --checkpoint {args.output / 'last.pt'}")


if __name__ == "__main__":
    evaluate.exit_on_error(main)
