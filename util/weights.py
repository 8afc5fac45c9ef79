"""Weight files: fetched, checked, and read without running what is in them."""

import hashlib
import http.client
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from util.device import one_line
from util.checkpoint import read_tensors

CACHE = "~/.cache/clip"  # where OpenAI's own package keeps its weights


def download(url: str, folder: str | Path = CACHE) -> Path:
    """The path of a file, fetched on first use; the last folder of its address is its sha256, checked every time.

    Raises ConnectionError if it can't be fetched, ValueError if the file that is there is another, or if there
    is no home folder.
    """
    sha256, filename = url.split("/")[-2:]
    try:
        path = Path(folder).expanduser() / filename
    except RuntimeError as error:
        raise ValueError(f"there is no home folder to keep {filename} in: give --clip-weights PATH") from error
    if path.is_file():
        if sha256_of(path) != sha256:
            raise ValueError(f"{path} is not OpenAI's file (its sha256 is wrong): delete it and run again")
        return path
    print(f"Downloading {url} to {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)  # to a temporary name, renamed when whole
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"could not download {url} ({one_line(error)}): fetch it elsewhere and put it into {path.parent}, "
            "or give its path with --clip-weights"
        ) from error
    return path


def read_weights(path: Path, trusted: Collection[str]) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive or of a saved state dict, in single precision on the CPU.

    Opening a TorchScript archive runs its code, so only those are opened whose sha256 is among `trusted`.
    Raises FileNotFoundError, or ValueError for an archive not trusted, a damaged file, or one that is no state dict.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}: give --clip-weights the path of OpenAI's .pt file")
    if not is_torchscript(path):
        state_dict = read_tensors(path)
    elif sha256_of(path) in trusted:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but OpenAI published TorchScript, and nothing else opens it
            state_dict = torch.jit.load(path, map_location="cpu").state_dict()
    else:
        raise ValueError(
            f"{path} is TorchScript, whose code would run, and not OpenAI's own file: if you trust it, "
            "torch.save(torch.jit.load(path).state_dict(), new_path) and give the new file"
        )
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds something else than a state dict: give OpenAI's .pt file")
    return {str(name): tensor.float() for name, tensor in state_dict.items()}


def is_torchscript(path: Path) -> bool:
    """Whether torch would take it for a TorchScript archive: it has a record of this name."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())
    except zipfile.BadZipFile:
        return False  # nor would torch take it for anything


def sha256_of(path: Path) -> str:
    """Of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
