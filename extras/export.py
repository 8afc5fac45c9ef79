"""Export a trained model, from image to feature, with torch.export: python -m extras.export

The exported model uses the simplified prompt, whose text embedding is constant. It needs only torch,
and runs on any device.
"""

import argparse
import io
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python extras/export.py` works too

import clip
from model import PromptSG
from util import checkpoint
from util.device import run_script


class ImageToFeature(nn.Module):
    """PromptSG with the simplified prompt: the image is its only input."""

    def __init__(self, model: PromptSG):
        super().__init__()
        self.visual = model.clip.visual
        self.interaction = model.interaction
        self.bnneck = model.bnneck
        self.register_buffer("text", model.simplified_text)
        for name, values in (("mean", clip.MEAN), ("std", clip.STD)):  # buffers move with the model to another device
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """RGB uint8 (B, 3, H, W) -> features (B, D), L2-normalised. Raises NotImplementedError for floats."""
        images = images.bitwise_and(255)  # does not change the values, and raises an error for floats
        tokens = self.visual((images / 255 - self.mean) / self.std).tokens
        z = self.interaction(self.text, tokens) if self.interaction else tokens[:, 0]
        return F.normalize(self.bnneck(z), dim=1)


@torch.no_grad()
def export(model: PromptSG, path: Path) -> None:
    """Export ImageToFeature of a model on the CPU, for batches of up to 65,536, and compare the file with the model.

    Raises ValueError if they differ by more than 1e-5.
    """
    few, more = (torch.randint(256, (B, 3, *model.image_size), dtype=torch.uint8) for B in (2, 5))
    batch = torch.export.Dim("batch", max=2**16)
    program = torch.export.export(ImageToFeature(model).eval(), (few,), dynamic_shapes=({0: batch},))
    content = io.BytesIO()  # torch's own file writer ends the process if the disk is full
    torch.export.save(program, content)
    with checkpoint.atomic_write(path) as temporary:
        temporary.write_bytes(content.getvalue())
    exported = torch.export.load(io.BytesIO(path.read_bytes())).module()  # torch cannot open a path that is not UTF-8
    difference = (exported(more) - model.embed(clip.normalize(more), "simplified")).abs().max().item()
    if not difference <= 1e-5:
        path.unlink()
        raise ValueError(f"{path} differs from the model by {difference:.1e}: do not use it and report this")
    height, width = model.image_size
    print(f"exported to {path}: RGB uint8 (B, 3, {height}, {width}) -> features (B, {model.bnneck.num_features})")
    print(f"largest difference to the model: {difference:.0e}; load it: torch.export.load({str(path)!r}).module()")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, help="a run's last.pt (default: the newest in runs/)")
    add("--output", type=Path, default=Path("model.pt2"), metavar="FILE.pt2", help="file to write (default: model.pt2)")
    args = parser.parse_args(argv)
    if args.output.suffix != ".pt2" or not args.output.parent.is_dir():
        parser.error(f"cannot write {args.output}: give a name that ends in .pt2, in a directory that exists")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    export(PromptSG.load(args.checkpoint or checkpoint.newest()), args.output)


if __name__ == "__main__":
    run_script(main)
