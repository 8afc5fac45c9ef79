"""The rows of Tables 2 to 5: losses and trained parameters. Both backbones train from OpenAI's archives."""

import json
from pathlib import Path

import pytest
import torch
from conftest import FLAGS, output_of
from openai_format import SMALL_RESNET, SMALL_VIT, small_weights, write_archive

import clip
import data
import losses
import train
from model import PromptSG
from util.weights import sha256_of

# Each of the 20 identities has one group of 5 images. A batch takes 11 of them, so an epoch is one step.
ONE_STEP = f"{FLAGS} --epochs 1 --eval-every 0 --batch-ids 11 --batch-images 5 --margin 1.3 --label-smoothing 0.2"
ONE_STEP += " --supcon-weight 0.7 --temperature 0.1"

# Flags of each row, components of its model, directions of its SupCon loss.
BOTH = ["i2t", "t2i"]
ROWS = {
    "Table 3 a": ("", {}, BOTH),
    "Table 3 b": ("--without-i2t", {}, ["t2i"]),
    "Table 3 c": ("--without-t2i", {}, ["i2t"]),
    "Table 3 d": ("--without-interaction", {"interaction": False}, BOTH),
    "Table 4, w/o composed": ("--train-prompt simplified", {"inversion": False}, []),
    "Table 5, + 1 cross": ("--blocks 0", {"blocks": 0}, BOTH),
    "Table 5, + 1 self": ("--blocks 1", {"blocks": 1}, BOTH),
    "Table 2, baseline": ("--baseline", {"interaction": False, "inversion": False}, []),
}


def first_step(root: Path, directions: list[str], components: dict) -> tuple[dict, dict, dict]:
    """Compute one step of Adam without train.py. Return the weights before and after it, and the loss terms."""
    samples = data.load_dataset("synthetic", root, ("train",)).train
    sampler = data.PKSampler([sample.pid for sample in samples], 11, 5, seed=0)
    images, labels = next(iter(data.train_loader(samples, sampler, (64, 32), workers=0)))
    torch.manual_seed(0)
    model = PromptSG(clip.untrained("tiny", (64, 32)), 20, **components).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    visual = [p for name, p in model.named_parameters() if name.startswith("clip.visual.")]
    new = [p for name, p in model.named_parameters() if not name.startswith("clip.") and name != "bnneck.bias"]
    groups = [{"params": visual, "lr": 4e-4}, {"params": new, "lr": 8e-4}]
    optimizer = torch.optim.Adam(groups, weight_decay=1e-3)

    output = model(clip.normalize(images))
    triplet = sum(losses.triplet_loss(features, labels, 1.3) for features in output.triplet_features)
    identity = losses.identity_loss(output.logits, labels, 0.2)
    supcon = losses.supcon_loss(output.image, output.text, labels, 0.1, directions)
    loss = triplet + identity + 0.7 * supcon
    loss.backward()
    optimizer.step()
    accuracy = (output.logits.argmax(dim=1) == labels).float().mean()
    terms = dict(loss=loss, loss_triplet=triplet, loss_id=identity, loss_supcon=supcon, accuracy=accuracy)
    return before, model.state_dict(), {name: term.item() for name, term in terms.items()}


@pytest.mark.parametrize("row", ROWS)
def test_first_step_of_every_row(workplace, row):
    """train.py computes the row's losses and one step of Adam. The text encoder does not change."""
    flags, components, directions = ROWS[row]
    output_of("train.py", f"{ONE_STEP} {flags}", workplace)
    before, expected, terms = first_step(workplace / "data", directions, components)

    (record,) = map(json.loads, (workplace / "runs/synthetic-tiny/log.jsonl").read_text().splitlines())
    assert {name: record[name] for name in terms} == pytest.approx(terms, rel=1e-4)
    assert (terms["loss_supcon"] > 0) == bool(directions)
    after = torch.load(workplace / "runs/synthetic-tiny/last.pt", weights_only=True)["model"]
    assert after.keys() == before.keys()
    frozen = {name for name in before if name.startswith("clip.") and not name.startswith("clip.visual.")}
    for name, tensor in after.items():
        if name == "interaction.key.bias":  # softmax cancels it, so its gradient is rounding only
            continue
        is_frozen = name in frozen or name in ("simplified_text", "bnneck.bias")
        assert torch.equal(tensor, before[name]) == is_frozen, name
        # Adam's first step is the learning rate times the sign of the gradient. A few gradients are rounding only.
        assert ((tensor - expected[name]).abs() > 1e-6).float().mean() < 0.01, name


def test_defaults_are_those_of_section_5_1():
    args = train.parse_args([])
    assert (args.lr_visual, args.lr_new, args.supcon_weight) == (5e-6, 5e-5, 0.5)
    assert (args.epochs, args.decay_every, args.decay_factor) == (60, 20, 0.1)
    assert (args.batch_ids, args.batch_images, args.image_size) == (16, 4, (256, 128))


def test_every_epoch_has_its_own_batches(workplace):
    """At learning rate 0, only other images change the loss. An identity's images form other groups of K, too."""
    output_of("train.py", f"{ONE_STEP} --epochs 2 --lr-visual 0 --lr-new 0", workplace)
    first, second = map(json.loads, (workplace / "runs/synthetic-tiny/log.jsonl").read_text().splitlines())
    assert first["loss_triplet"] != pytest.approx(second["loss_triplet"], rel=1e-4)
    sampler, groups = data.PKSampler([0] * 8 + [1] * 8, num_ids=2, num_images=4), set()
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        groups |= {frozenset(index for index, _ in batch if index < 8) for batch in sampler}
    assert len(groups) > 4


@pytest.mark.parametrize("backbone, config", [("vit", SMALL_VIT), ("resnet", SMALL_RESNET)])
def test_both_backbones_train_resume_and_evaluate(workplace, monkeypatch, backbone, config):
    sizes = {name: value for name, value in config.items() if name not in ("image_size", "last_stride")}
    monkeypatch.setitem(clip.ARCHITECTURES, train.CLIP_NAMES[backbone], sizes | {"vocab_size": 49408})
    weights = small_weights(config | {"vocab_size": 49408})
    write_archive(weights, workplace / "CLIP.pt")
    flags = f"{FLAGS} --eval-every 0 --backbone {backbone} --clip-weights CLIP.pt --lr-visual 5e-6 --epochs"
    output_of("train.py", f"{flags} 1", workplace)
    path = workplace / f"runs/synthetic-{backbone}/last.pt"
    trained = torch.load(path, weights_only=True)["model"]
    assert torch.equal(trained["clip.token_embedding.weight"], weights["token_embedding.weight"])
    assert 0 < (trained["clip.visual.conv1.weight"] - weights["visual.conv1.weight"]).abs().max() < 1e-4
    settings = json.loads((path.parent / "args.json").read_text())
    assert settings["clip_file"] == "CLIP.pt" and settings["clip_sha256"] == sha256_of(workplace / "CLIP.pt")
    (workplace / "CLIP.pt").unlink()  # a checkpoint is complete
    assert "epoch 2/2" in output_of("train.py", f"{flags} 2 --resume", workplace)
    assert f"{backbone} trained on synthetic, epoch 2" in output_of("evaluate.py", "--json result.json", workplace)
    assert 0 < json.loads((workplace / "result.json").read_text())["mAP"] < 1
