"""What makes a training run survive: files written whole, finding and checking a run to resume, the log, signals.

A checkpoint is a dictionary of tensors and plain values, which train.py makes and reads.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from util.machine import agree, rank, say

try:
    import fcntl  # the lock of a folder
except ImportError:  # Windows has another
    fcntl = None

CHECKPOINT_VERSION = 2
FIELDS = {"args": dict, "model": dict, "model_args": dict, "train_digest": str, "epoch": int}
FIELDS_TO_RESUME = {"optimizer": dict, "scheduler": dict, "scaler": dict, "rows": list, "log": list, "best": float}
# With other values of these flags a run may be resumed: none is of the method.
FREE_FLAGS = ["data_root", "device", "workers", "eval_batch_size", "output", "resume", "overwrite", "log_every"]
FREE_FLAGS += ["cache", "epochs", "eval_every"]
PARTS = ("last.pt", "best.pt", "log.jsonl", "args.json", "curves.png")  # what a run's folder holds


# -------------------------------------------------------------------------------------------- checkpoints


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, renamed to it at the end, so that a file of this name is always whole.

    Whatever happens, the other one does not stay. OSError, with `path`, if there is no room.
    """
    unfinished = path.with_stem(path.stem + ".unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except (OSError, RuntimeError) as error:  # torch.save says the second
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"cannot write {path} ({reason}); what was there before is whole") from error
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(value: dict, path: Path) -> None:
    """torch.save, `writing`."""
    with writing(path) as unfinished, unfinished.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def write_json(value: dict, path: Path) -> None:
    """`writing` a dictionary of plain values, for people and programs."""
    with writing(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=2) + "\n")


def write_arrays(arrays: dict, path: Path) -> None:
    """np.savez, `writing`."""
    with writing(path) as unfinished:
        np.savez(unfinished, **arrays)
    print(f"features written to {path}: arrays {', '.join(arrays)}")


def read_whole(path: Path) -> object:
    """What torch.save wrote, tensors and plain values only, on the CPU. ValueError if it is damaged or anything else.

    torch does not look at a zip file's checksums, so they are looked at here: a flipped byte would go unnoticed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # both raise whatever they stumble over in a file that is not their own
        raise ValueError(f"{path} is damaged, or holds other things than tensors: get it again") from error


def load_checkpoint(path: Path) -> dict:
    """What train.py saved. FileNotFoundError if there is none, ValueError if it is damaged or something else."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give the path of a run's last.pt or best.pt, or train first")
    checkpoint = read_whole(path)
    if not isinstance(checkpoint, dict) or "version" not in checkpoint:
        raise ValueError(f"{path} was not written by train.py: give the path of a run's last.pt or best.pt")
    if checkpoint["version"] != CHECKPOINT_VERSION:
        raise ValueError(
            f"{path} is of version {checkpoint['version']}, this code reads {CHECKPOINT_VERSION}: train anew"
        )
    check_fields(path, checkpoint, FIELDS)
    check_fields(path, checkpoint["args"], {"backbone": str, "dataset": str, "image_size": (list, tuple)})
    return checkpoint


def check_fields(path: Path, fields: dict, kinds: dict) -> None:
    """ValueError if part of a checkpoint lacks one of these fields, or has it of another type."""
    wrong = [name for name, kind in kinds.items() if not isinstance(fields.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} has no {', no '.join(wrong)} as train.py writes them: it can't be used")


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


def digest(lines: Iterable[str]) -> str:
    """One number for lines in any order, by which a resumed run knows its training data."""
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def find_run(args: argparse.Namespace) -> dict | None:
    """The checkpoint to go on from, or None for a new run.

    ValueError if the flags are not those of the run to go on with, or if a new run would overwrite another.
    """
    if not args.resume:
        if any((args.output / name).exists() for name in PARTS) and not args.overwrite:
            raise ValueError(f"{args.output} holds a run: --resume it, --overwrite it, or choose another --output")
        return None
    last = args.output / "last.pt"
    checkpoint = load_checkpoint(last)
    if "optimizer" not in checkpoint:
        raise ValueError(f"{last} has no optimizer, as a best.pt has none: it can be scored, not resumed")
    check_fields(last, checkpoint, FIELDS_TO_RESUME)
    begun = checkpoint["epoch"] + bool(checkpoint["rows"])
    if args.epochs < begun:
        raise ValueError(f"{last} has begun {begun} epochs already: give --epochs at least as many")
    for name, value in settings_of(args).items():
        before = checkpoint["args"].get(name)
        if name not in FREE_FLAGS and before != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{last} was trained with {flag} {before}, not {value}: give the same flags to --resume")
    return checkpoint


class Folder:
    """The folder of a run, while training writes to it. Of several processes only the first one does anything.

    A run that is overwritten is set aside in NAME.old: it is deleted when the new one's first checkpoint is whole, and
    put back if anything fails before.

    Entering it raises ValueError if a NAME.old is in the way.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.path = args.output
        self.old = self.path.resolve().with_name(self.path.resolve().name + ".old")
        self.is_ours = False  # what lies in it is of this run
        self.has_old = False  # another run is set aside
        self.is_saved = args.resume

    def __enter__(self) -> "Folder":
        if rank() == 0:
            try:
                if not self.is_saved:
                    self.set_aside()
                self.is_ours = True
                self.write_args()
            except BaseException as error:
                self.__exit__(type(error))
                raise
        return self

    def set_aside(self) -> None:
        """Moves the parts of another run to NAME.old."""
        parts = [name for name in PARTS if (self.path / name).exists()]
        if not parts:
            return
        if self.old.exists():
            raise ValueError(f"{self.old} is there (set aside by an --overwrite that was cut off?): move it elsewhere")
        self.old.mkdir()
        self.has_old = True
        for name in parts:
            (self.path / name).rename(self.old / name)

    def save(self, value: dict, name: str) -> None:
        """`write_whole`; the first time, the run that was set aside is deleted."""
        if rank() == 0:
            write_whole(value, self.path / name)
            if self.has_old:
                shutil.rmtree(self.old)
            self.has_old = False
            self.is_saved = True

    def write_log(self, log: list[dict]) -> None:
        """log.jsonl, a line for each record."""
        if rank() == 0:
            with writing(self.path / "log.jsonl") as unfinished:
                unfinished.write_text("".join(json.dumps(record) + "\n" for record in log))

    def write_args(self) -> None:
        """args.json: the flags, and what they ran on."""
        write_json({**settings_of(self.args), **provenance(self.args.device)}, self.path / "args.json")

    def __exit__(self, error, *details) -> None:
        if rank() > 0:
            return
        if error and not self.is_saved and self.is_ours:
            for name in PARTS:
                (self.path / name).unlink(missing_ok=True)
        if error and self.has_old:
            for part in self.old.iterdir():
                part.rename(self.path / part.name)
            self.old.rmdir()


def provenance(device: str) -> dict[str, str | None]:
    """What a result was made with: command, commit, versions, processor."""
    commit = None
    if shutil.which("git"):
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    return {
        "command": shlex.join(sys.argv),
        "commit": commit,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{package: importlib.metadata.version(package) for package in ("torchvision", "numpy", "pillow")},
        "processor": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
    }


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """The folder of a run, made if need be, is this training's while it lasts, where the system has such locks.

    It ends with the process and its loader processes, which outlive a killed one by some seconds. Folders that were
    made for nothing do not stay. Of several processes only the first one does anything.
    Raises ValueError if another training has it, OSError if it can't be made.
    """
    if rank() > 0:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder} ({error.strerror}): choose another --output") from error
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try_to_lock(handle, folder)
        yield
    finally:
        if handle is not None:
            os.close(handle)
        with contextlib.suppress(OSError):  # a folder that holds something
            for path in made:
                path.rmdir()


def try_to_lock(handle: int, folder: Path) -> None:
    """ValueError if another training has locked the open folder."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"another training is writing to {folder}: wait for it, or choose another --output") from error
    except OSError:
        pass  # a file system without locks


# ------------------------------------------------------------------------------------------------ signals


class Stop:
    """While it lasts, Ctrl-C, SIGTERM and SIGHUP ask to finish the step, save and end. The same one again ends at once.

    A signal that is ignored stays so: `nohup` goes on when the terminal closes.
    """

    def __enter__(self) -> "Stop":
        self.signal = None
        known = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        heeded = [number for number in known if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self.handle) for number in heeded}
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
        say(f"{signal.Signals(number).name}: finishing the step")
