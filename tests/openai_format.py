"""CLIP weights computed by a formula, and files with them in the layout of OpenAI's archives.

The features in test_clip.py and test_weights.py were recorded from other implementations with these weights.
"""

import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import clip
from util.weights import sha256_of

SMALL = dict(embed_dim=96, text_width=128, text_layers=2, vocab_size=600)
SMALL_VIT = dict(vision_layers=4, vision_width=128, patch_size=16, image_size=(64, 64), **SMALL)
SMALL_RESNET = dict(vision_layers=(1, 2, 1, 1), vision_width=8, image_size=(64, 64), last_stride=2, **SMALL)


def formula(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return numbers from -1 to 1 that depend only on name and shape. NumPy's RandomState never changes its stream."""
    return torch.as_tensor(np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape))


def formula_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Return weights of plausible scale, each exact in half precision."""
    weights = {}
    for name, shape in shapes.items():
        values = formula(name, shape)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        if name == "logit_scale":
            values = 4.6 + 0 * values
        elif name.endswith("running_var"):
            values = 1 + 0.3 * values.abs()
        elif len(shape) == 1:
            is_scale = name.endswith("weight")
            values = is_scale + 0.2 * values
        elif "embedding" in name:
            values = 0.3 * values
        else:
            fan_in = shape[0] if name.endswith("proj") else torch.Size(shape[1:]).numel()
            values = values * fan_in**-0.5 * (3 if len(shape) == 4 else 1)
        weights[name] = values.half().float()
    return weights


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def small_weights(config: dict) -> dict[str, Tensor]:
    with torch.device("meta"):  # shapes without values
        shapes = shapes_of(clip.CLIP(**config))
    return formula_weights(shapes)


def write_archive(weights: dict[str, Tensor], path: Path) -> Path:
    """Write a TorchScript archive as OpenAI published them: half precision, and three numbers.

    clip.py opens archives of known SHA-256 only, so this one is added to clip.URLS.
    """
    root = nn.Module()
    for name, tensor in {**weights, "input_resolution": 64, "context_length": 77, "vocab_size": 600}.items():
        tensor = torch.as_tensor(tensor)
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, nn.Module())
            module = module._modules[parent]
        module.register_buffer(leaf, tensor.half() if tensor.is_floating_point() else tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(root).save(str(path))
    clip.URLS[f"made by the tests: {path}"] = f"https://nowhere/{sha256_of(path)}/{path.name}"
    return path


def formula_images(height: int, width: int) -> Tensor:
    """Return two images (2, 3, H, W): noise over a ramp, from left to right and from top to bottom."""
    right, down = torch.meshgrid(torch.linspace(-2, 2, width), torch.linspace(-2, 2, height), indexing="xy")
    return torch.stack([right, down])[:, None] + formula("images", (2, 3, height, width)).float()


# The end token has the highest id: 599 in the small vocabulary.
TOKEN_IDS = torch.tensor([[598, 7, 99, 599, 0, 0, 0, 0], [598, 300, 21, 4, 5, 6, 599, 0], [598, 599, 0, 0, 0, 0, 0, 0]])
