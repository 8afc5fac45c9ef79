"""extras/gate.py against CLIP-ReID's own code, github.com/Syliz517/CLIP-ReID at eb1898b.

FEATURES were recorded once from that code, in single precision on a CPU. Its model/make_model.py built the model, with
necks and classifiers made as narrow as the small encoders; its `load_param` read what `checkpoint` makes here; its
`make_dataloader` gave the transform that read what `draw_pictures` makes here; features were taken with NECK_FEAT
"before" and L2-normalised as `R1_mAP_eval` does. With prompts, model/make_model_clipreid.py gave the same numbers.
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from openai_format import formula_images, formula_weights, shapes_of
from PIL import Image
from torchvision import transforms

import clip
import data
import evaluate
from extras import gate

ROOT = Path(__file__).parent.parent
ARGS = argparse.Namespace(device="cpu", precision="fp32", workers=0, eval_batch_size=2)
# sha256 of the sorted lines "image_encoder.NAME SHAPE" of the original models' state dicts.
LAYOUTS = {
    "ViT": "31b7f46f1a6fa4dd8ecd95d28edbb671c2ed8cf660fcdf7f2a8d0c5af5ad32bb",
    "CNN": "e3194925f6dbe9364746f22037a9d90b02e2217b4e7827d0b29c48fefa8ffba8",
}
# Every sixteenth of 128 + 96 numbers (ViT) or 256 + 96 (CNN), of two pictures.
# fmt: off
FEATURES = {
    "ViT": [
        [0.127955, -0.066489, -0.086949, -0.028637, 0.008445, 0.053972, 0.079159, 0.140744,
         -0.050823, 0.052027, -0.031696, 0.012139, -0.01416, -0.075525],
        [0.127467, -0.074276, -0.092032, -0.02683, 0.01462, 0.053412, 0.079415, 0.146013,
         -0.052412, 0.052548, -0.026746, 0.0111, -0.010231, -0.077101],
    ],
    "CNN": [
        [0.037949, 0.006137, 0.057119, 0.007759, 0.000699, 0.012417, 0.0, 0.160187, 0.000735, 0.001072, 0.119964,
         0.005676, 0.009006, 0.0, 0.03445, 0.0, 0.04161, -0.001909, -0.020868, 0.000821, 0.001044, -0.002899],
        [0.037374, 0.007483, 0.051718, 0.007599, 0.000182, 0.01602, 0.0, 0.161415, 0.001236, 0.001136, 0.113697,
         0.006942, 0.011523, 0.0, 0.032407, 0.0, 0.041324, -0.005604, -0.020292, 0.001632, 0.001358, -0.000066],
    ],
}
# fmt: on


def shapes_of_encoder(backbone: str, full: bool = False, grid: tuple[int, int] = (16, 8)) -> dict:
    """Names and shapes in a checkpoint. A small ViT has twelve blocks, too: CLIP-ReID's code counts on them."""
    with torch.device("meta"):  # sizes without numbers
        if backbone == "ViT":
            encoder = clip.VisionTransformer(grid, 16, 768 if full else 128, 12, 512 if full else 96)
        else:
            layers, width, embed_dim = ((3, 4, 6, 3), 64, 1024) if full else ((1, 2, 1, 1), 8, 96)
            encoder = clip.ModifiedResNet(grid, layers, width, embed_dim, last_stride=1)
    return {f"image_encoder.{name}": shape for name, shape in shapes_of(encoder).items()}


def checkpoint(backbone: str, with_prompts: bool = False, grid: tuple[int, int] = (16, 8)) -> dict:
    """A small state dict in CLIP-ReID's layout, by formula: encoder, necks, classifiers; prompt learner and text."""
    shapes = shapes_of_encoder(backbone, grid=grid)
    for suffix, width in (("", 128 if backbone == "ViT" else 256), ("_proj", 96)):
        shapes[f"classifier{suffix}.weight"] = (20, width)
        for name in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"bottleneck{suffix}.{name}"] = (width,)
        shapes[f"bottleneck{suffix}.num_batches_tracked"] = ()
    if with_prompts:
        shapes |= {"prompt_learner.cls_ctx": (20, 4, 512), "prompt_learner.token_prefix": (1, 5, 512)}
        shapes |= {"prompt_learner.token_suffix": (1, 68, 512), "text_encoder.text_projection": (512, 96)}
    return formula_weights(shapes)


def draw_pictures(folder: Path) -> list[data.Sample]:
    """Two pictures, drawn by formula and kept without loss: one of the size that is read, one to be resized."""
    for name, height, width in (("a", 256, 128), ("b", 200, 90)):
        pixels = (128 + 32 * formula_images(height, width)[0]).clamp(0, 255).to(torch.uint8)
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return [data.Sample(folder / f"{name}.png", 1, 1) for name in "ab"]


@pytest.fixture
def save(tmp_path):
    """Saves a state dict as a checkpoint; gives its path."""

    def save(weights: object) -> Path:
        torch.save(weights, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    return save


@pytest.mark.parametrize("backbone", LAYOUTS)
def test_full_sized_layout_is_clip_reids(backbone):
    lines = sorted(f"{name} {tuple(shape)}" for name, shape in shapes_of_encoder(backbone, full=True).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == LAYOUTS[backbone]


@pytest.mark.parametrize("backbone, with_prompts, prefix", [("ViT", False, ""), ("CNN", True, "module.")])
def test_features_are_clip_reids(backbone, with_prompts, prefix, save, tmp_path):
    weights = checkpoint(backbone, with_prompts)
    path = save({prefix + name: tensor for name, tensor in weights.items()})
    encoder, name, others = gate.load_encoder(path)
    assert name == backbone + ("-CLIP-ReID" if with_prompts else "-baseline")
    prompts = ["prompt_learner", "text_encoder"] if with_prompts else []
    assert others == ["bottleneck", "bottleneck_proj", "classifier", "classifier_proj", *prompts]
    features = gate.extract(encoder, draw_pictures(tmp_path), gate.MEAN_STD[backbone], ARGS)
    assert features.shape == (2, (128 if backbone == "ViT" else 256) + 96)
    assert torch.allclose(features.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(features[:, ::16], torch.tensor(FEATURES[backbone]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", LAYOUTS)
def test_pictures_are_read_as_clip_reids_test_transform_reads_them(backbone, tmp_path):
    """Its transform, printed: Resize((256, 128), bilinear, on PIL's picture), ToTensor, Normalize."""
    samples, mean_and_std, seen = draw_pictures(tmp_path), gate.MEAN_STD[backbone], []

    def encoder(images: torch.Tensor) -> argparse.Namespace:
        seen.append(images)
        return argparse.Namespace(states=[torch.ones(len(images), 2)] * 3)

    gate.extract(encoder, samples, mean_and_std, ARGS)
    steps = [transforms.Resize((256, 128)), transforms.ToTensor(), transforms.Normalize(*mean_and_std)]
    expected = [transforms.Compose(steps)(Image.open(sample.path).convert("RGB")) for sample in samples]
    assert torch.equal(seen[0], torch.stack(expected))


def test_what_cannot_be_scored_is_refused_in_one_line(save, tmp_path):
    def refuse(path: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message) as error:
            gate.load_encoder(path)
        assert "\n" not in str(error.value)

    with pytest.raises(FileNotFoundError, match="there is no file .*missing.pth"):
        gate.load_encoder(tmp_path / "missing.pth")
    (tmp_path / "text.pth").write_text("not weights")
    refuse(tmp_path / "text.pth", "text.pth is damaged")
    refuse(save({"version": 1, "model": {}}), "no checkpoint of CLIP-ReID")
    refuse(save([1, 2]), "no checkpoint of CLIP-ReID")
    refuse(save(checkpoint("ViT") | {"cv_embed": torch.zeros(6, 128)}), "camera embeddings")
    refuse(save(checkpoint("ViT", grid=(21, 10))), r"another stride \(OLP\) or picture size \(210 tokens\)")
    refuse(save(checkpoint("CNN", grid=(16, 16))), "256 tokens")
    weights = checkpoint("CNN")
    del weights["image_encoder.layer4.0.bn1.bias"]
    refuse(save(weights), "layer4.0.bn1.bias")


def test_scores_a_dataset_without_a_published_figure(save, demo_root, capsys):
    path = save(checkpoint("ViT", with_prompts=True))
    gate.main([str(path), "--dataset", "synthetic", "--data-root", str(demo_root), "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "passed over: bottleneck, bottleneck_proj, classifier, classifier_proj, prompt_learner, text_enc" in printed
    assert "synthetic, ViT-CLIP-ReID: mAP " in printed and "Rank-1 " in printed and "no verdict" in printed


def test_verdict_both_ways(save, demo_root, capsys, monkeypatch):
    """Within 0.3 of both figures, or not; the features do not depend on the batch that a picture is in."""
    path = save(checkpoint("CNN"))
    dataset = data.load_dataset("synthetic", demo_root)
    features = gate.extract(gate.load_encoder(path)[0], dataset.query + dataset.gallery, gate.MEAN_STD["CNN"], ARGS)
    result = evaluate.metrics_of(*features.split([len(dataset.query), len(dataset.gallery)]), dataset)
    mAP, rank1 = 100 * result["mAP"], 100 * result["rank1"]

    def judge(*figures: float) -> str:
        monkeypatch.setitem(gate.EXPECTED["CNN-baseline"], "synthetic", figures)
        gate.main([str(path), "--dataset", "synthetic", "--data-root", str(demo_root), "--device", "cpu"])
        return capsys.readouterr().out

    assert f"expected: mAP {mAP + 0.29}%  Rank-1 {rank1 - 0.29}%" in (printed := judge(mAP + 0.29, rank1 - 0.29))
    assert evaluate.describe(result) in printed and printed.endswith("passed: encoder, data and scoring are right\n")
    for figures in ((mAP + 0.31, rank1), (mAP - 0.31, rank1), (mAP, rank1 + 0.31), (mAP, rank1 - 0.31)):
        with pytest.raises(SystemExit, match="FAILED: look at the dataset's version"):
            judge(*figures)


def test_command_line(demo_root, tmp_path):
    """Errors are one line and exit status 1."""
    command = [sys.executable, "-m", "extras.gate", tmp_path / "none.pth", "--dataset", "market1501", "--device", "cpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1
