"""What makes a training run survive: whole checkpoints, finding and checking a run to resume, the log, signals.

A checkpoint is a dictionary of tensors and plain values, which train.py makes and reads.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import torch

from util.machine import agree, one_line, rank

CHECKPOINT_VERSION = 2
# No weight of an epoch depends on these flags, so that a run may be resumed with others.
FREE_FLAGS = ["data_root", "device", "workers", "eval_batch_size", "output", "resume", "overwrite", "log_every"]
FREE_FLAGS += ["cache", "epochs", "eval_every"]


# -------------------------------------------------------------------------------------------- checkpoints


def write_whole(value: dict, path: Path) -> None:
    """torch.save beside and renamed, so that a file of this name is always whole. OSError if there is no room.

    Only the first of several processes writes.
    """
    if rank() > 0:
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
            f"cannot write {path} ({one_line(error)}): make room and go on with --resume; "
            "what was saved before is whole"
        ) from error


def load_checkpoint(path: Path) -> dict:
    """What train.py saved. FileNotFoundError if there is none, ValueError if it is damaged or something else."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give the path of a run's last.pt or best.pt, or train first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever it stumbles over in a file that is not its own
        raise ValueError(f"{path} is damaged or no checkpoint of train.py ({one_line(error)})") from error
    if not isinstance(checkpoint, dict) or "version" not in checkpoint:
        raise ValueError(f"{path} was not written by train.py: give the path of a run's last.pt or best.pt")
    if checkpoint["version"] != CHECKPOINT_VERSION:
        raise ValueError(
            f"{path} is of version {checkpoint['version']}, this code reads {CHECKPOINT_VERSION}: train anew"
        )
    return checkpoint


def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """The last.pt written last below `runs`; FileNotFoundError if there is none."""
    checkpoints = sorted(runs.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise FileNotFoundError("no run in runs/ yet: train one, or give --checkpoint PATH")
    return checkpoints[-1]


# ---------------------------------------------------------------------------------------- the run's folder


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
    checkpoint = load_checkpoint(last)
    for name, value in settings_of(args).items():
        before = checkpoint["args"].get(name)
        if name not in FREE_FLAGS and before != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{last} was trained with {flag} {before}, not {value}: give the same flags to --resume")
    return checkpoint


def open_folder(args: argparse.Namespace, log: list[dict]) -> None:
    """Makes the run's folder, clears it of another run, and writes args.json and the log up to where the run stands."""
    if rank() > 0:
        return
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.resume:
        for name in ("last.pt", "best.pt"):
            (args.output / name).unlink(missing_ok=True)
    write_log(log, args.output)
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    about = {
        "command": shlex.join(sys.argv),
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: importlib.metadata.version(package) for package in ("torchvision", "numpy", "pillow")},
        "processor": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine(),
    }
    (args.output / "args.json").write_text(json.dumps({**settings_of(args), **about}, indent=2) + "\n")


def write_log(log: list[dict], folder: Path) -> None:
    """log.jsonl, a line for each record."""
    if rank() == 0:
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))


# ------------------------------------------------------------------------------------------------ signals


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
        self.signal = agree(self.signal)
        return self.signal is not None

    def handle(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        print(f"{signal.Signals(number).name}: finishing the step", flush=True)
