"""Weight files of CLIP: download, recognise their layout, read without running code in them."""

import hashlib
import http.client
import json
import math
import urllib.request
import uuid
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from util.checkpoint import read_tensors
from util.device import one_line, show_progress

CACHE = "~/.cache/clip"  # where OpenAI's own package keeps its weights
TIMEOUT = 15  # seconds without data after which a download fails

# Parts of parameter names: in transformers' CLIPModel, in OpenAI's code.
TRANSFORMERS_NAMES = (
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding", "visual.conv1"),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm", "visual.ln_pre"),
    ("vision_model.encoder.layers", "visual.transformer.resblocks"),
    ("vision_model.post_layernorm", "visual.ln_post"),
    ("visual_projection.weight", "visual.proj"),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
    ("text_model.encoder.layers", "transformer.resblocks"),
    ("text_model.final_layer_norm", "ln_final"),
    ("text_projection.weight", "text_projection"),
    ("self_attn.q_proj.", "attn.in_proj_"),  # q, k and v are one tensor
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm1", "ln_1"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


# ------------------------------------------------------------------------------------------------- download


def fetch(sources: list[tuple[str, str, str]]) -> tuple[Path, str]:
    """Return the path and sha256 of a file in CACHE; download it if necessary, from the first source that works.

    Args:
        sources: (address, sha256, file name in CACHE), best first. The files may be in different formats.

    Raises ConnectionError if no source works, ValueError if the file in CACHE is wrong or there is no home directory.
    """
    try:
        folder = Path(CACHE).expanduser()
    except RuntimeError as error:
        raise ValueError("there is no home directory for CLIP's weights: give --clip-weights PATH") from error
    for _, sha256, name in sources:
        if (folder / name).is_file():
            if sha256_of(folder / name) != sha256:
                raise ValueError(f"{folder / name} is damaged or another file (wrong sha256): delete it and run again")
            return folder / name, sha256
    failures = []
    for url, sha256, name in sources:
        print(f"downloading {url}", flush=True)
        try:
            download(url, folder / name, sha256)
            return folder / name, sha256
        except (OSError, ValueError, http.client.HTTPException) as error:
            failures.append(f"{url} ({one_line(error)})")
            print(f"failed: {one_line(error)}")
    names = " or ".join(name for _, _, name in sources)
    raise ConnectionError(
        f"could not download {' or '.join(failures)}: get one of these files on another machine and put it into "
        f"{folder} as {names}, or give its path with --clip-weights PATH"
    )


def download(url: str, path: Path, sha256: str) -> None:
    """Download a file to a temporary one, which is renamed to `path` if the sha256 is right and removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")  # unique: several processes may download
    request = urllib.request.Request(url, headers={"User-Agent": "PromptSG"})
    digest, done = hashlib.sha256(), 0
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response, partial.open("wb") as file:
            total = int(response.headers["Content-Length"] or 0)
            while chunk := response.read(1 << 20):
                file.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                show_progress(done >> 20, total >> 20, f"MiB of {path.name}")
        if done < total:
            raise OSError(f"cut off after {done} of {total} bytes")
        if digest.hexdigest() != sha256:
            raise OSError("wrong sha256: this is another file")
        partial.replace(path)
    finally:
        show_progress(0, 0, "")  # clears the line
        partial.unlink(missing_ok=True)


def find(source: str | Path) -> tuple[Path, str]:
    """Return the path and sha256 of a weight file, or of the weight file in a folder of transformers."""
    path = Path(source).expanduser()
    names = ("model.safetensors", "pytorch_model.bin") if path.is_dir() else ("",)
    for name in names:
        if (path / name).is_file():
            return path / name, sha256_of(path / name)
    if path.is_dir():
        raise FileNotFoundError(f"no {' or '.join(names)} in {path}: give the path of a weight file")
    raise FileNotFoundError(f"no weight file {path}: give the path of a file or folder, or the name ViT-B/16 or RN50")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------- read


def read_weights(path: Path, is_trusted: bool) -> dict[str, Tensor]:
    """Read a weight file of any layout in docs/data.md. Return float32 tensors on the CPU under OpenAI's names.

    Args:
        is_trusted: whether a TorchScript archive may be opened, which runs its code.

    Raises ValueError, without the path in its message, for any other file; KeyError if part of a layer is missing.
    """
    weights = read_file(path, is_trusted)
    for key in ("state_dict", "model"):  # a checkpoint of open_clip or train.py around a state dict
        if isinstance(weights, dict) and isinstance(weights.get(key), dict):
            weights = weights[key]
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError("it holds no state dict (tensors by name)")
    weights = {str(name): tensor.float() for name, tensor in weights.items()}
    for prefix in ("module.", "clip."):  # from DistributedDataParallel, from model.PromptSG
        inner = {name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)}
        weights = inner or weights

    has_text = any("token_embedding" in name for name in weights)
    has_image = any(tensor.ndim == 4 or name.startswith("visual.") for name, tensor in weights.items())
    if not has_text and not has_image:
        raise ValueError(f"it holds other weights than CLIP's, such as {next(iter(weights), 'none at all')}")
    if not has_text:
        raise ValueError(
            "it holds an image encoder alone: give a file that also has CLIP's text encoder "
            "(in timm's repositories on the Hugging Face hub: open_clip_model.safetensors)"
        )
    if not has_image:
        raise ValueError("it holds a text encoder alone: give a file that also has CLIP's image encoder")
    if any(name.startswith("vision_model.") for name in weights):
        check_config(path.with_name("config.json"))
        weights = from_transformers(weights)
    ignored = ("position_ids", "input_resolution", "context_length", "vocab_size")
    return {name: tensor for name, tensor in weights.items() if name.split(".")[-1] not in ignored}


def read_file(path: Path, is_trusted: bool) -> object:
    """Return the content of a safetensors file, a TorchScript archive or a file of torch.save."""
    with path.open("rb") as file:
        head = file.read(100)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        raise ValueError("it is a web page, not a weight file: use the download button of the page")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError("it is a Git LFS pointer, not the weights: run `git lfs pull` in its repository")
    if head[8:9] == b"{":
        return read_safetensors(path)
    if is_torchscript(path):
        if not is_trusted:
            raise ValueError(
                "it is TorchScript, whose code would run, and not OpenAI's own file (or a damaged one): if you trust "
                "it, torch.save(torch.jit.load(path).state_dict(), new_path) and give the new file"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated, but nothing else opens OpenAI's TorchScript archives
            return torch.jit.load(path, map_location="cpu").state_dict()
    try:
        return read_tensors(path)
    except ValueError as error:
        if "GLOBAL" in str(error.__cause__):  # torch's word for a class or function
            raise ValueError(
                "it holds Python objects, such as a whole model, whose code would run: if you trust it, load it with "
                "torch.load(..., weights_only=False), save the model's state_dict() to a new file and give that file"
            ) from error
        raise ValueError("it is damaged, cut off or not a weight file: compare it with the original") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file: length of the header (8 bytes), header (JSON), then tensors without gap or overlap."""
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}
    size = path.stat().st_size - 8
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(100_000_000, size):
            raise ValueError("it is a safetensors file that is cut off or damaged: compare it with the original")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors, position, size = {}, 0, size - length
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
                if dtype not in dtypes:
                    raise ValueError(f"{name} has dtype {dtype}, not one of {', '.join(dtypes)}")
                is_shape = all(isinstance(side, int) and side >= 0 for side in shape)
                if begin != position or not is_shape or end - begin != math.prod(shape) * dtypes[dtype].itemsize:
                    raise ValueError(f"the offsets or the shape of {name} are wrong")
                if end > size:
                    raise ValueError(f"it is cut off, at least {end - size} bytes are missing: get it again")
                values = torch.empty(math.prod(shape), dtype=dtypes[dtype])
                file.readinto(values.view(torch.uint8).numpy())
                tensors[name], position = values.view(shape), end
            if position != size:
                raise ValueError(f"{size - position} bytes follow the last tensor")
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:  # the header may be anything
            reason = error if type(error) is ValueError else "its header is damaged"
            raise ValueError(f"it is not a whole safetensors file: {reason}") from error
    return tensors


def is_torchscript(path: Path) -> bool:
    """Return True if torch would open the file as a TorchScript archive, which it recognises by a record's name."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[-1] == "constants.pkl" for name in archive.namelist())
    except zipfile.BadZipFile:
        return False  # torch does not open it either


# --------------------------------------------------------------------------------- Hugging Face transformers


def from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert weights of transformers' CLIPModel to OpenAI's. Raises KeyError if k_proj or v_proj is missing."""
    renamed = {}
    for name, tensor in weights.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            tensor = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
        if name in ("visual_projection.weight", "text_projection.weight"):
            tensor = tensor.T
        for theirs, ours in TRANSFORMERS_NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def check_config(path: Path) -> None:
    """Raise ValueError if a config.json of transformers asks for another activation or other heads than OpenAI's."""
    if not path.is_file():
        return
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        found = []
        for part, width, heads in (("text_config", 512, 8), ("vision_config", 768, 12)):  # transformers' defaults
            settings = {**(config.get(part) or {}), **(config.get(f"{part}_dict") or {})}
            channels = settings.get("hidden_size", width) / settings.get("num_attention_heads", heads)
            found.append((settings.get("hidden_act", "quick_gelu"), channels))
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"the {path.name} beside it is damaged or not from transformers") from error
    for activation, channels in found:
        if activation != "quick_gelu":
            raise ValueError(f"its {path.name} asks for the activation {activation}; only quick_gelu is supported")
        if channels != 64:
            raise ValueError(f"its {path.name} asks for heads of {channels:g} channels; only 64 are supported")
