"""extras/gate.py gives the features of CLIP-ReID's code, github.com/Syliz517/CLIP-ReID at eb1898b.

FEATURES were recorded from that code, in single precision on a CPU: `load_param` of model/make_model.py read the
checkpoints that `checkpoint` makes here, the transform of `make_dataloader` read the image of `draw_image`, NECK_FEAT
was "before", and features were L2-normalised as in `R1_mAP_eval`. model/make_model_clipreid.py gave the same numbers.
"""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from openai_format import formula_images, formula_weights, shapes_of
from PIL import Image

import clip
from extras import gate

# SHA-256 of the sorted lines "image_encoder.NAME SHAPE" of the original state dicts.
LAYOUTS = {
    "ViT": "31b7f46f1a6fa4dd8ecd95d28edbb671c2ed8cf660fcdf7f2a8d0c5af5ad32bb",
    "CNN": "e3194925f6dbe9364746f22037a9d90b02e2217b4e7827d0b29c48fefa8ffba8",
}
# Every sixteenth of 128 + 96 numbers (ViT) or 256 + 96 (CNN).
# fmt: off
FEATURES = {
    "ViT": [0.127467, -0.074276, -0.092032, -0.02683, 0.01462, 0.053412, 0.079415, 0.146013,
            -0.052412, 0.052548, -0.026746, 0.0111, -0.010231, -0.077101],
    "CNN": [0.037374, 0.007483, 0.051718, 0.007599, 0.000182, 0.01602, 0.0, 0.161415, 0.001236, 0.001136, 0.113697,
            0.006942, 0.011523, 0.0, 0.032407, 0.0, 0.041324, -0.005604, -0.020292, 0.001632, 0.001358, -0.000066],
}
# fmt: on


def shapes_of_encoder(backbone: str, full: bool = False, grid: tuple[int, int] = (16, 8)) -> dict:
    """Return names and shapes of a checkpoint. CLIP-ReID's code needs twelve blocks, even in a small ViT."""
    with torch.device("meta"):  # shapes without values
        if backbone == "ViT":
            encoder = clip.VisionTransformer(grid, 16, 768 if full else 128, 12, 512 if full else 96)
        else:
            layers, width, embed_dim = ((3, 4, 6, 3), 64, 1024) if full else ((1, 2, 1, 1), 8, 96)
            encoder = clip.ModifiedResNet(grid, layers, width, embed_dim, last_stride=1)
    return {f"image_encoder.{name}": shape for name, shape in shapes_of(encoder).items()}


def checkpoint(backbone: str, with_prompts: bool = False, grid: tuple[int, int] = (16, 8)) -> dict:
    """Return formula weights in CLIP-ReID's layout: a small encoder, and placeholders for all other modules."""
    shapes = shapes_of_encoder(backbone, grid=grid)
    shapes |= {f"{name}.weight": (4, 4) for name in ("bottleneck", "bottleneck_proj", "classifier", "classifier_proj")}
    if with_prompts:
        shapes |= {"prompt_learner.cls_ctx": (20, 4, 512), "text_encoder.text_projection": (512, 96)}
    return formula_weights(shapes)


def draw_image(path: Path) -> Path:
    pixels = (128 + 32 * formula_images(200, 90)[0]).clamp(0, 255).to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return path


@pytest.fixture
def save(tmp_path):
    """A function that saves a state dict and returns its path."""

    def save(weights: object) -> Path:
        torch.save(weights, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    return save


@pytest.mark.parametrize("backbone", LAYOUTS)
def test_names_and_shapes_match_clip_reid(backbone):
    lines = sorted(f"{name} {tuple(shape)}" for name, shape in shapes_of_encoder(backbone, full=True).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == LAYOUTS[backbone]


@pytest.mark.parametrize("backbone, with_prompts, prefix", [("ViT", False, ""), ("CNN", True, "module.")])
def test_features_match_clip_reid(backbone, with_prompts, prefix, save, tmp_path):
    weights = checkpoint(backbone, with_prompts)
    path = save({prefix + name: tensor for name, tensor in weights.items()})
    encoder, name, others = gate.load_encoder(path)
    assert name == backbone + ("-CLIP-ReID" if with_prompts else "-baseline")
    prompts = ["prompt_learner", "text_encoder"] if with_prompts else []
    assert others == ["bottleneck", "bottleneck_proj", "classifier", "classifier_proj", *prompts]
    features = gate.extract(encoder, [draw_image(tmp_path / "a.png")], *gate.MEAN_STD[backbone])
    assert features.shape == (1, (128 if backbone == "ViT" else 256) + 96)
    torch.testing.assert_close(features[0, ::16], torch.tensor(FEATURES[backbone]), atol=1e-5, rtol=0)


def test_other_checkpoints_are_refused(save):
    incomplete = checkpoint("CNN")
    del incomplete["image_encoder.layer4.0.bn1.bias"]
    for weights, words in (
        ({"version": 1, "model": {}}, "not a checkpoint"),
        (checkpoint("ViT") | {"cv_embed": torch.zeros(6, 128)}, "camera embeddings"),
        (checkpoint("ViT", grid=(21, 10)), "210 tokens"),
        (incomplete, "layer4.0.bn1.bias"),
    ):
        with pytest.raises(ValueError, match=words):
            gate.load_encoder(save(weights))


def test_verdict(save, demo_root, capsys, monkeypatch):
    """Both figures must agree to 0.3. Without published figures there is no verdict."""
    argv = [str(save(checkpoint("CNN"))), "--dataset", "synthetic", "--data-root", str(demo_root), "--device", "cpu"]
    gate.main(argv)
    printed = capsys.readouterr().out
    assert "skipped: bottleneck, bottleneck_proj" in printed and "no verdict" in printed
    mAP, rank1 = (float(re.search(f"{name} ([0-9.]+)%", printed)[1]) for name in ("mAP", "Rank-1"))
    for offsets, verdict in (((0.2, -0.2), "passed"), ((0.4, 0), "FAILED"), ((0, -0.4), "FAILED")):
        monkeypatch.setitem(gate.EXPECTED["CNN-baseline"], "synthetic", (mAP + offsets[0], rank1 + offsets[1]))
        if verdict == "FAILED":
            with pytest.raises(SystemExit, match=verdict):
                gate.main(argv)
        else:
            gate.main(argv)
            assert verdict in capsys.readouterr().out
