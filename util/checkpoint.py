"""Files of a training run. A checkpoint holds tensors and plain values only, so reading one runs no code."""

import contextlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from util.device import rank

VERSION = 3
FIELDS = {
    "args": dict, "model_args": dict, "model": dict, "optimizer": dict, "scheduler": dict, "scaler": dict,
    "epoch": int, "log": list, "train_digest": str,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and is removed on failure. Raises OSError."""
    temporary = path.with_stem(path.stem + ".unfinished")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"cannot write {path} ({reason}); a file written before is unchanged") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(value: dict, path: Path) -> None:
    """Write a dictionary of plain values as JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def write_log(log: list[dict], path: Path) -> None:
    """Write the log of a run, one JSON line per epoch. Only the first of several processes writes."""
    if rank() == 0:
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in log))


def save(state: dict, path: Path) -> None:
    """Write a checkpoint. Only the first of several processes writes."""
    if rank() == 0:
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            torch.save({"version": VERSION, **state}, file)
            file.flush()
            os.fsync(file.fileno())


def start_run(folder: Path, settings: dict, device: torch.device) -> None:
    """Create the directory of a new run, with its args.json. Only the first of several processes writes.

    args.json holds the settings, the command, the commit, the versions of packages and the processor.
    """
    if rank() > 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot create {folder} ({error.strerror}): choose another --output") from error
    if (folder / "args.json").exists() or (folder / "log.jsonl").exists():
        print(f"replacing log.jsonl and args.json of an unfinished run without last.pt in {folder}")
        (folder / "log.jsonl").unlink(missing_ok=True)
    environment = {
        "command": shlex.join(sys.argv),
        "commit": describe_commit(Path(__file__).resolve().parent.parent),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        **{package: importlib.metadata.version(package) for package in ("torchvision", "numpy", "pillow")},
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
    }
    write_json({**settings, **environment}, folder / "args.json")


def describe_commit(root: Path) -> str | None:
    """Return `git describe --always --dirty` of the repository at `root`, or None if there is none."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True).stdout.strip()

    try:
        is_root = Path(git("rev-parse", "--show-toplevel") or "/").resolve() == root  # not an enclosing repository
        return git("describe", "--always", "--dirty") if is_root else None
    except OSError:  # git is not installed
        return None


# -------------------------------------------------------------------------------------------------- reading


def read_tensors(path: Path) -> object:
    """Read a file of torch.save to the CPU, if it holds tensors and plain values only.

    The checksums of the zip file are verified, because torch does not notice a flipped bit.
    Raises FileNotFoundError, or ValueError if the file is damaged or holds other objects.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if archive.testzip():
                    raise ValueError("a checksum is wrong")
        with path.open("rb") as file:  # with a path, torch would look at its suffix
            return torch.load(file, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # zipfile and torch raise errors of many kinds
        raise ValueError(f"{path} is damaged, or holds other objects than tensors") from error


def load(path: str | Path) -> dict:
    """Load a checkpoint of train.py. Raises FileNotFoundError, or ValueError if it is damaged or another file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give the path of a run's last.pt, or train first")
    state = read_tensors(path)
    if not isinstance(state, dict) or "version" not in state:
        raise ValueError(f"{path} is not a checkpoint of train.py: give the path of a run's last.pt")
    if state["version"] != VERSION:
        raise ValueError(f"{path} has version {state['version']}, this code reads version {VERSION}: train again")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(state.get(name), kind)]
    if wrong:
        raise ValueError(f"{path} lacks {', '.join(wrong)}: it is not a complete checkpoint of train.py")
    return state


def newest(runs: str | Path = "runs") -> Path:
    """Return the last.pt below `runs` that was written last. Raises FileNotFoundError if there is none."""
    found = sorted(Path(runs).glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no run in {runs}/: train one, or give --checkpoint PATH")
    return found[-1]


def refuse_taken(folder: Path) -> None:
    """Raise ValueError if the directory holds a run."""
    if (folder / "last.pt").exists():
        raise ValueError(f"{folder} holds a run: continue it with --resume, delete it, or choose another --output")


def find_run(folder: Path, settings: dict, defaults: dict, free: tuple[str, ...], train_digest: str) -> dict | None:
    """Return the checkpoint of the run to resume, or None if the directory holds none.

    Args:
        settings: the flags of this call.
        defaults: default values, for flags that an older checkpoint lacks.
        free: names of flags that may differ from the run's. All others must be equal.
        train_digest: `data.digest` of the training images.

    Raises ValueError if a flag or the training data differs, and what `load` raises.
    """
    path = folder / "last.pt"
    if not path.exists():
        print(f"no {path} to resume: starting at epoch 1")
        return None
    state = load(path)
    saved = {**defaults, **state["args"]}
    for name, value in settings.items():
        if name not in free and saved[name] != value:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{path} was trained with {flag} {saved[name]}, not {value}: resume with the same flags")
    if state["train_digest"] != train_digest:
        raise ValueError(f"{path} was trained on other data (identities or file names differ)")
    return state
