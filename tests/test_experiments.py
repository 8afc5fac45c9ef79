"""The rows of experiments/: each variant changes a result and has gradients. Each row is trained once."""

import functools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import clip
import losses
from model import PromptSG

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import ablation  # noqa: E402
import common  # noqa: E402
import readings  # noqa: E402

ROWS = {
    row.training(): row for tables in (ablation.TABLES, readings.TABLES) for rows in tables.values() for row in rows
}
VARIED = {name: row for name, row in ROWS.items() if row.model is not PromptSG or row.supcon is not losses.supcon_loss}
LABELS = torch.arange(8) // 4


@functools.cache
def outputs(row: common.Row) -> tuple[PromptSG, dict[str, torch.Tensor]]:
    """Return a row's model and its losses, logits, v, images and retrieval features."""
    torch.manual_seed(0)
    model = row.model(clip.untrained("tiny", (64, 32)), 10).train()
    images = torch.randn(8, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    output = model(images)
    supcon = row.supcon(output.image, output.text, LABELS, model.temperature, ["i2t", "t2i"])
    triplet = torch.stack([losses.triplet_loss(feature, LABELS) for feature in output.triplet_features])
    found = {"triplet": triplet, "logits": output.logits, "supcon": supcon, "v": output.image, "images": images}
    model.eval()
    return model, {**found, "feature": model.embed(images)}


@pytest.mark.parametrize("name", VARIED)
def test_a_variant_changes_a_result_and_has_gradients(name):
    row = VARIED[name]
    _, ours = outputs(common.Row("ours"))
    model, found = outputs(row)
    same = {k for k in ours if ours[k].shape == found[k].shape and torch.allclose(ours[k], found[k], rtol=1e-4)}
    assert "v" in same
    is_learned = row.model is readings.LearnedTemperature  # equals ours before training
    assert (same == set(ours)) == is_learned
    (found["triplet"].sum() + losses.identity_loss(found["logits"], LABELS) + 0.5 * found["supcon"]).backward()
    unused = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert unused == ({"inversion"} if row.supcon is ablation.image_supcon else set())  # which uses no text
    assert not is_learned or model.log_scale.grad.abs() > 0
    alone = torch.cat([model.embed(found["images"][i : i + 1]) for i in range(8)])
    depends_on_its_batch = row.model in (readings.LineageAcross, ablation.OthersQuery)
    assert torch.allclose(alone, found["feature"], atol=1e-4) != depends_on_its_batch


def test_supcon_between_images_matches_khosla_et_al():
    """A loop over the equation: positives are the identity's other images, candidates all other images."""
    x = torch.nn.functional.normalize(torch.randn(8, 16, dtype=torch.double), dim=1)
    total = 0.0
    for i in range(8):
        weights = {j: torch.exp(x[i] @ x[j] / 0.1) for j in range(8) if j != i}
        total -= sum(torch.log(weights[j] / sum(weights.values())) for j in weights if LABELS[j] == LABELS[i])
    torch.testing.assert_close(ablation.image_supcon(x, x, LABELS, 0.1, []), 2 * total / 8)


def test_partly_pretrained_clip():
    args = SimpleNamespace(backbone="tiny", image_size=(128, 64), seed=0)
    whole, random = common.tiny_clip.load((128, 64)), clip.untrained("tiny", (128, 64))
    for pretrained, visual, text in (("visual", 1, 0), ("text", 0, 1), ("none", 0, 0)):
        mixed = common.partly_pretrained(args, pretrained)
        assert torch.equal(mixed.visual.proj, (whole if visual else random).visual.proj)
        assert torch.equal(mixed.text_projection, (whole if text else random).text_projection)
        assert torch.equal(mixed.logit_scale, whole.logit_scale)


def test_a_row_is_trained_once_and_printed(tmp_path, monkeypatch, capsys):
    """A variant whose features depend on the batch, on few drawn people. The second call trains nothing."""
    monkeypatch.setattr(common, "ROOT", tmp_path)
    monkeypatch.setattr(common, "TRAIN_PEOPLE", 20)
    monkeypatch.setattr(common, "TEST_PEOPLE", 6)
    (tmp_path / "experiments").mkdir()
    runs = str(tmp_path / "runs")
    row = "lineage, blocks across the batch"
    flags = ["--tables", "lineage", "--rows", row, "--seeds", "0", "--runs", runs, "--epochs", "1", "--batch-ids", "8"]
    monkeypatch.setattr(sys, "argv", ["readings.py", *flags])
    common.run(readings.TABLES, "", readings.print_table)
    printed = capsys.readouterr().out
    assert "== 2 trainings left" in printed and f"| {row} |" in printed and "shuffled {" in printed
    results = tmp_path / "experiments" / "results" / "synthetic-tiny.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["alone and among others"] > 0.999 for line in lines] == [True, False]
    assert all(0 < line["composed"]["mAP"] <= 1 and 0 < line["text to image"] <= 1 for line in lines)
    common.run(readings.TABLES, "", readings.print_table)
    assert "trainings left" not in capsys.readouterr().out


CHOICES = " ".join((Path(__file__).parent.parent / "docs" / "choices.md").read_text().split())
CHANGES = re.findall(r"`([^`]+)` becomes `([^`]+)`", CHOICES)


@pytest.mark.parametrize(("old", "new"), CHANGES, ids=[new for _, new in CHANGES])
def test_a_change_in_choices_md_works_as_written(old, new):
    """In a copy of the file, the changed line gives another z, SupCon or S*, and the gradient reaches v."""
    torch.manual_seed(0)
    [path] = [path for path in (common.ROOT / "model.py", common.ROOT / "losses.py") if old in path.read_text()]
    source = path.read_text()
    assert source.count(old) == 1
    found = []
    for text in (source, source.replace(old, new)):
        changed = {"__name__": path.stem}
        exec(compile(text, path.name, "exec"), changed)
        torch.manual_seed(0)
        model = changed.get("PromptSG", PromptSG)(clip.untrained("tiny", (64, 32)), 10).train()
        output = model(torch.randn(8, 3, 64, 32, generator=torch.Generator().manual_seed(0)))
        supcon = changed.get("supcon_loss", losses.supcon_loss)(output.image, output.text, LABELS, 0.07)
        (output.logits.sum() + supcon).backward()
        assert model.clip.visual.proj.grad.abs().sum() > 0
        found.append(torch.cat([output.logits.flatten(), output.text.flatten(), supcon.view(1)]).detach())
    assert not torch.allclose(*found, rtol=1e-4)


def test_classes_and_rows_in_choices_md_exist():
    names = re.findall(r"class `(\w+)`", CHOICES)
    assert len(names) > 5 and all(hasattr(readings, name) for name in names)
    rows = {row.name.replace("*", "\\*") for rows in readings.TABLES.values() for row in rows}
    assert all(f"| {row} " in CHOICES for row in rows - {"ours"})
