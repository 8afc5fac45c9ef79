"""Writes a trained model as one torch.export file, picture -> feature, for a tracker: python -m extras.export

With the simplified prompt, whose text feature is a constant. Whoever uses the file needs only torch.
"""

import argparse
import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import data
import evaluate
from model import PromptSG
from util import machine
from util.run import writing


class ImageToFeature(nn.Module):
    """PromptSG with the simplified prompt, whose text feature is a constant: a plain function of the picture."""

    def __init__(self, model: PromptSG):
        super().__init__()
        self.visual = model.clip.visual
        self.interaction = model.interaction
        self.bnneck = model.bnneck
        self.register_buffer("text", model.simplified_text)
        for name, values in (("mean", clip.MEAN), ("std", clip.STD)):
            self.register_buffer(name, torch.tensor(values, device=self.text.device).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """RGB uint8 (B, 3, H, W) -> L2-normalised features (B, D). NotImplementedError for floats."""
        images = images.bitwise_and(255)  # changes nothing, and refuses floats
        tokens = self.visual((images / 255 - self.mean) / self.std).tokens
        z = self.interaction(self.text, tokens) if self.interaction else tokens[:, 0]
        return F.normalize(self.bnneck(z), dim=1)


@torch.no_grad()
def export(model: PromptSG, image_size: tuple[int, int], path: Path) -> None:
    """Writes ImageToFeature with torch.export, for batches of up to 65,536, reads it again and compares the two.

    Raises ValueError if they differ by more than 1e-5.
    """
    device = model.simplified_text.device
    few, more = (torch.randint(0, 256, (B, 3, *image_size), dtype=torch.uint8, device=device) for B in (2, 5))
    batch = torch.export.Dim("batch", max=2**16)
    program = torch.export.export(ImageToFeature(model).eval(), (few,), dynamic_shapes=({0: batch},))
    content = io.BytesIO()  # on a full disk, torch's own writer of files takes the whole process down
    torch.export.save(program, content)
    with writing(path) as unfinished:
        unfinished.write_bytes(content.getvalue())
    reloaded = torch.export.load(path).module()
    difference = (reloaded(more) - model.embed(clip.normalize(more), "simplified")).abs().max().item()
    if not difference <= 1e-5:
        path.unlink()
        raise ValueError(f"{path} differs from the model by {difference:.1e}: do not use it, and please report this")
    height, width = image_size
    print(
        f"exported to {path}: RGB uint8 (B, 3, {height}, {width}), no floats -> (B, {len(model.bnneck.weight)}); "
        f"differs from the model by {difference:.0e}; use it: torch.export.load({str(path)!r}).module()"
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning."""
    parser = machine.make_parser("-m extras.export", "Export a trained PromptSG, simplified prompt.")
    add = parser.add_argument
    add("--output", type=machine.path, default=Path("model.pt2"), metavar="FILE.pt2", help="(model.pt2)")
    add("--checkpoint", type=machine.path, metavar="PATH", help="(last.pt of the newest run in runs/)")
    add("--device", default="cpu", help="cpu, cuda or cuda:1, which the file will run on (cpu)")
    parser.set_defaults(prompt="simplified", dataset=None)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    machine.check_output("--output", args.output, ".pt2")
    machine.check_device(args)
    model, _ = evaluate.load_run(args)
    export(model, args.image_size, args.output)


if __name__ == "__main__":
    machine.exit_on_error(main)
