"""The rows of tests/ablation.py and readings.py: that each patch computes something else, learns, and is marked."""

import json

import ablation
import experiment
import pytest
import readings
import torch
from conftest import refused, run

import clip
import losses
import model
from model import PromptSG

TABLES = {**ablation.TABLES, **readings.TABLES}
PATCHES = {row.patch for rows in TABLES.values() for row in rows if row.patch}


def outputs(patch: type[PromptSG], images: torch.Tensor) -> tuple[PromptSG, dict[str, torch.Tensor]]:
    """A model and what can be different in it: what the losses get, and the retrieval feature."""
    torch.manual_seed(0)
    built = patch(clip.untrained("tiny", (64, 32)), 10).train()
    output = built(images)
    found = {
        "z": output.triplet_features[0],
        "states": torch.cat(output.triplet_features[1:], dim=1),
        "v": output.image,
    }
    return built, {**found, "text": output.text, "feature": built.eval().embed(images)}


@pytest.mark.parametrize("patch", sorted(PATCHES, key=lambda patch: patch.__name__), ids=lambda patch: patch.__name__)
def test_a_patch_computes_something_else_and_learns_and_is_refused_unpatched(patch, images, labels):
    _, ours = outputs(PromptSG, images)
    built, found = outputs(patch, images)
    assert built.model_args["patch"] == patch.__name__
    with pytest.raises(TypeError, match="patch"):
        PromptSG(clip.untrained("tiny", (64, 32)), **built.model_args)
    same = {name for name in ours if ours[name].shape == found[name].shape and torch.allclose(ours[name], found[name])}
    assert "v" in same and same != set(ours)
    loss = losses.triplet_loss(found["z"], labels) + patch.supcon(found["v"], found["text"], labels, 0.07, ["i2t"])
    loss.backward()
    learned = [parameter for group in built.parameter_groups(1, 1) for parameter in group["params"]]
    if issubclass(patch, ablation.LearnedQuery):
        assert built.learned.grad.abs().sum() > 0 and any(parameter is built.learned for parameter in learned)
        assert not torch.equal(built.learned, built.simplified_text)  # or the control without text had some
    assert built.clip.visual.proj.grad.abs().sum() > 0
    before = found["feature"].detach()
    alone = torch.cat([built.embed(images[i : i + 1]) for i in range(len(images))])
    sees_others = issubclass(patch, (readings.Trap, ablation.OthersQuery))
    assert torch.allclose(before, alone, atol=1e-4) != sees_others


def test_supcon_between_pictures_is_khoslas(labels):
    """By a loop over its equation: the other pictures of the identity, among all other pictures; two directions."""
    image = torch.randn(8, 16, dtype=torch.double, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.normalize(image)
    total = 0.0
    for i in range(8):
        others = [j for j in range(8) if j != i]
        weights = {j: torch.exp(x[i] @ x[j] / 0.1) for j in others}
        total -= sum(torch.log(weights[j] / sum(weights.values())) for j in others if labels[j] == labels[i])
    found = ablation.PicturesOnly.supcon(image, image, labels, 0.1, ["i2t", "t2i"])
    torch.testing.assert_close(found, 2 * total / 8)


def test_parts_of_clip_are_pretrained_or_random():
    args = experiment.train.parse_args(["--backbone", "tiny"])
    whole, random = model.load_clip(args), clip.untrained("tiny", (128, 64))
    for pretrained, visual, text in (("both", 1, 1), ("visual", 1, 0), ("text", 0, 1), ("none", 0, 0)):
        mixed = experiment.load_parts(args, pretrained)
        assert torch.equal(mixed.visual.proj, (whole if visual else random).visual.proj)
        assert torch.equal(mixed.text_projection, (whole if text else random).text_projection)
        assert torch.equal(mixed.logit_scale, whole.logit_scale)


def test_a_row_is_trained_measured_and_printed(workplace, capsys, monkeypatch):
    """One step of a control; its checkpoint is refused by evaluate.py; what is there is not done again, nor mixed."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which `train_missing` sets
    arguments = experiment.Arguments(
        dataset="synthetic", backbone="tiny", device="cpu", data_root=workplace / "data", output=workplace, seeds=[0]
    )
    row = next(row for row in TABLES["query"] if row.patch is ablation.PicturesOnly)
    flags = ["--epochs", "1", "--steps", "1", "--batch-ids", "8"]
    threads, patched = torch.get_num_threads(), (model.PromptSG, model.load_clip, losses.supcon_loss)
    try:
        experiment.train_and_measure(row, 0, arguments, flags)
        assert losses.supcon_loss is ablation.PicturesOnly.supcon
    finally:
        torch.set_num_threads(threads)
        model.PromptSG, model.load_clip, losses.supcon_loss = patched
    checkpoint = workplace / row.key(0) / "last.pt"
    result = json.loads((workplace / row.key(0) / "result.json").read_text())
    assert 0 < result["composed"]["mAP"] <= 1 and 0 < result["text to picture"] <= 1
    last_written = checkpoint.stat().st_mtime_ns
    experiment.train_missing([row], arguments, flags)
    assert checkpoint.stat().st_mtime_ns == last_written
    with pytest.raises(SystemExit, match="was made with other flags"):
        experiment.train_missing([row], arguments, [*flags, "--margin", "1"])
    experiment.print_table("query", [row], arguments)
    assert f"| {row.name} |  | {100 * result['composed']['mAP']:.1f} |" in capsys.readouterr().out
    refused(run("evaluate.py", "--checkpoint", workplace, checkpoint), "do not fit its settings", "patch")
