"""look.py, search.py and export.py: what they compute and what their commands write. For gate.py see test_gate.py."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, output_of, refused, run
from PIL import Image, ImageFont

import clip
import data
import evaluate
from extras import export, look, search
from model import PromptSG
from util import checkpoint

CHECKPOINT = "runs/synthetic-tiny/last.pt"


@pytest.fixture
def dataset(demo_root) -> data.Dataset:
    return data.load_dataset("synthetic", demo_root)


def all_attention(model: PromptSG) -> list[clip.Attention]:
    """Return the attention layers over image tokens, the encoder's three first."""
    blocks = [*model.clip.visual.transformer.resblocks, *(model.interaction.blocks if model.interaction else ())]
    return [block.attn for block in blocks]


# ------------------------------------------------------------------------------------------------ relevance


@pytest.mark.parametrize("ablations", [{"blocks": 0}, {"interaction": False, "inversion": False}])
def test_relevance_follows_its_definition(make_model, images, ablations):
    """Chefer's rule; the gradient of the cross-attention map is taken by finite differences.

    Attention layers that keep their probabilities compute the same as others.
    """
    model, images = make_model(**ablations).double().eval(), images[:1].double()
    text, layers, expected = model.simplified_text, all_attention(model), model.embed(images)
    for layer in layers:
        layer.keep_probabilities = True
    torch.testing.assert_close(model.embed(images), expected)
    tokens = model.clip.encode_image(images).tokens

    def pool(a):
        return (9 * a[..., None] * model.interaction.value(tokens)).mean(dim=1)

    a = model.interaction.attention_map(text, tokens) if model.interaction else None
    z = pool(a) if model.interaction else tokens[:, 0]
    maps = [layer.probabilities for layer in layers]
    gradients = torch.autograd.grad(look.similarity_to_prompt(tokens[:, 0], z, text).sum(), maps, retain_graph=True)
    R = torch.eye(9, dtype=torch.double)
    for A, gradient in zip(maps, gradients):
        R = R + (A * gradient).clamp(min=0)[0].mean(dim=0) @ R
    if model.interaction:
        steps = 1e-5 * torch.eye(9, dtype=torch.double)
        similarity = [F.cosine_similarity(pool(a + sign * step), text) for step in steps for sign in (-1, 1)]
        gradient = torch.cat(similarity).view(9, 2).diff(dim=1)[:, 0] / 2e-5
        R = R + torch.diag((a[0] * gradient).clamp(min=0)) @ R
    expected = (R - torch.eye(9)).mean(dim=0) if model.interaction else (R - torch.eye(9))[0]
    found = look.relevance(model, images, "simplified", look.similarity_to_prompt)
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-8)


def test_relevance_leaves_the_model_as_it_was(make_model, images):
    model = make_model().eval()
    found = look.relevance(model, images, "composed", look.similarity_to_prompt)
    assert found.shape == (8, 9) and found.isfinite().all() and (found >= 0).all()
    assert not any(layer.keep_probabilities or hasattr(layer, "probabilities") for layer in all_attention(model))
    resnet = PromptSG(clip.untrained("RN50", (64, 32)), 2).eval()
    with pytest.raises(ValueError, match="this model's visual encoder is a ResNet"):
        look.relevance(resnet, images, "simplified", look.similarity_to_prompt)


def test_people_are_recognised_by_their_other_images(make_model, dataset):
    """The target of Figure 4 is the mean over the same person's other images, not the image's own."""
    model, pool = make_model().eval(), dataset.query + dataset.gallery
    samples = pool[3:5]
    found = look.identity_relevance(model, samples, pool)
    assert found.shape == (2, 4, 2)
    for sample, patches in zip(samples, found):
        others = [other.path for other in pool if other.pid == sample.pid and other != sample]
        mean = evaluate.extract(model, others).mean(dim=0)
        image = clip.normalize(data.read_image(sample.path, (64, 32))[None])
        expected = look.relevance(model, image, None, lambda v, z, l, m=mean: F.normalize(model.bnneck(z), dim=1) @ m)
        torch.testing.assert_close(patches.flatten(), expected[0, 1:], rtol=1e-3, atol=1e-6)


def test_attention_on_the_person_is_measured(dataset):
    """An even map is on the person by its area, one of the image's centre nearly always, one of a corner never."""
    even = torch.ones(len(dataset.query), 16, 8)
    centre, corner = torch.zeros_like(even), torch.zeros_like(even)
    centre[:, 7, 4], corner[:, 0, 0] = 1, 1
    found = [re.findall(r"([\d.]+)%", look.describe_inside(maps, dataset)) for maps in (even, centre, corner)]
    (share, _, area), (most, peak, _), nothing = (list(map(float, numbers)) for numbers in found)
    assert share == area and 10 < area < 60 and min(most, peak) > 80 and nothing == [0, 0, area]


# --------------------------------------------------------------------------------------------------- sheets


def test_a_map_is_drawn_where_it_is():
    values = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 1]])
    drawn = look.heat(torch.full((3, *look.TILE), 100, dtype=torch.uint8), values).float().mean(dim=0)
    assert drawn[-30:, -30:].mean() > 2 * drawn[:75].mean()


@pytest.mark.parametrize("text", ["1: id 1234567 c12 0.99", "a" * 200, "3: 0.87 " + "name_" * 30, "W" * 50])
def test_captions_wrap_and_end_with_an_ellipsis_when_too_long(text):
    font = ImageFont.load_default(13)
    lines = look.wrap(text, font, 104, 3).split("\n")
    assert len(lines) <= 3 and all(font.getlength(line) <= 104 for line in lines)
    shown = "".join(lines).replace(" ", "")
    assert shown == text.replace(" ", "") or (shown.endswith("…") and text.replace(" ", "").startswith(shown[:-1]))
    assert lines[-1].endswith("…") == (len(text) > 40)


def test_sheets_are_grids_and_replace_earlier_ones(tmp_path, capsys):
    tile = look.Tile(torch.zeros(3, *look.TILE, dtype=torch.uint8), "caption")
    sizes = []
    for groups in ([[tile]] * 24, [[tile] * 6] * 4, [[tile] * 24], [[tile] * 7] * 4):
        look.draw_sheet(groups, tmp_path / "sheet.jpg", "A title that is long " * 9, look.MATCHES)
        sizes.append(Image.open(tmp_path / "sheet.jpg").size)
    assert sizes[0][1] == sizes[1][1] == sizes[2][1] < sizes[3][1] and sizes[3][0] < sizes[0][0]
    assert len(list(tmp_path.iterdir())) == 1


def test_best_matches_are_framed_and_numbered_without_junk(dataset):
    query = dataset.query[5]
    similarity = torch.tensor([float(sample.pid == query.pid) for sample in dataset.gallery])
    first, *tiles = look.best_matches(dataset, 5, similarity, 10, "before training")
    right = sum(s.pid == query.pid and s.camid != query.camid for s in dataset.gallery)
    assert [tile.frame for tile in tiles] == [look.GREEN] * right + [look.RED] * (10 - right)
    assert first.caption == f"query id {query.pid} c{query.camid} before training"
    assert tiles[0].caption.startswith(f"1: id {query.pid} c")


def test_queries_and_people_are_chosen_by_rule(dataset):
    ap = torch.tensor([0.5, torch.nan, 0.1, 0.9, 0.3])
    assert look.choose_queries(ap, "worst", 3) == [2, 4, 0]
    assert look.choose_queries(ap, "spread", 2) == [4, 3] and look.choose_queries(ap, "spread", 9) == [2, 4, 0, 3]
    assert [sample.pid for sample in look.choose_people(dataset.train, dataset.train, 2)] == [5, 15]
    with pytest.raises(ValueError, match="nobody in this dataset has several images"):
        look.choose_people(dataset.train[:1], dataset.train[:1], 5)


# -------------------------------------------------------------------------------------------------- scripts


def test_look(trained, tmp_path):
    text = output_of("extras/look.py", "--count 3 --device cpu --output", trained, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"matches.jpg", "attention.jpg"}
    assert len(re.findall(r"attention on the person, (?:un)?trained, \w+ prompt: \d+\.\d% of it", text)) == 4
    text = output_of("extras/look.py", "--images data/synthetic/query --count 2 --output", trained, tmp_path)
    assert "24 images, of which the first 2 are drawn" in text and (tmp_path / "attention.jpg").exists()
    arguments = f"--figure-4 runs/synthetic-tiny {CHECKPOINT} --count 4 --output"
    text = output_of("extras/look.py", arguments, trained, tmp_path)
    for name in ("original", "runs/synthetic-tiny", CHECKPOINT):
        assert f"relevance on the person, {name}: " in text and (tmp_path / "figure-4.jpg").exists()


def test_before_after_starts_from_the_clip_before_training(trained, tmp_path, dataset):
    state = checkpoint.load(trained / CHECKPOINT)
    before = evaluate.evaluate(look.before_training(state), dataset, "none")
    assert before["mAP"] == pytest.approx(state["log"][0]["mAP"], abs=1e-6)
    output_of("extras/look.py", "--before-after --count 2 --device cpu --output", trained, tmp_path)
    assert Image.open(tmp_path / "before-after.jpg").width > 1200  # before and after side by side


@pytest.fixture
def folder(demo_root, tmp_path) -> Path:
    """A folder with a subfolder, a file that is no image, and a name that is not UTF-8."""
    paths = sorted((demo_root / "synthetic/query").iterdir())
    (tmp_path / "images/sub").mkdir(parents=True)
    for path in paths[:5]:
        shutil.copy(path, tmp_path / "images/sub")
    shutil.copy(paths[5], tmp_path / "images" / os.fsdecode(b"\xb5\xff.jpg"))
    (tmp_path / "images/broken.jpg").write_text("no image")
    return tmp_path / "images"


@pytest.mark.parametrize("by", ["image", "words", "both"])
def test_search(trained, folder, tmp_path, by):
    """By image: retrieval features. By words: v and T(sentence). By both: v and the mean of both."""
    model, query = PromptSG.load(trained / CHECKPOINT), sorted((folder / "sub").iterdir())[0]
    paths = [path for path in data.find_images([folder]) if path.name != "broken.jpg"]
    features = evaluate.extract(model, [query, *paths], None if by == "image" else "none")
    text = model.encode_text("A photo of a person with red top")[0]
    wanted = {"image": features[0], "words": text, "both": F.normalize(features[0] + text, dim=0)}[by]
    similarity = dict(zip(map(str, paths), (features[1:] @ wanted).tolist()))
    by_image, by_words = ["--query", query], ["--words", "a person with red top"]
    flags = {"image": by_image, "words": by_words, "both": by_image + by_words}[by]
    files = ["--json", tmp_path / "found.json", "--output", tmp_path / "found.jpg"]
    text = output_of("extras/search.py", "--images", trained, folder, folder / "sub", *flags, *files)
    result = json.loads((tmp_path / "found.json").read_text())
    matches = result["results"][0]["matches"]
    expected = sorted(set(similarity) - ({str(query)} if by != "words" else set()), key=similarity.get, reverse=True)
    assert [match["path"] for match in matches] == expected
    assert [match["rank"] for match in matches] == list(range(1, 1 + len(expected)))
    assert [m["similarity"] for m in matches] == pytest.approx([similarity[path] for path in expected], abs=1e-4)
    assert result["prompt"] == ("composed" if by == "image" else "none")
    assert "unreadable: 1 file skipped (first: broken.jpg)" in text and r"\udcb5" in text
    assert re.search(r"^ +1  -?\d\.\d{3}  \S+\.jpg$", text, re.MULTILINE) and (tmp_path / "found.jpg").exists()


def test_search_by_several_images(make_model, folder):
    model, paths = make_model().eval(), sorted((folder / "sub").iterdir())
    results = search.search(model, paths, paths[:2], count=3)
    assert [(result["query"], len(result["matches"])) for result in results] == [(str(path), 3) for path in paths[:2]]
    with pytest.raises(OSError, match="broken.jpg"):  # a query is not skipped
        search.search(model, paths, [folder / "broken.jpg"])


@pytest.mark.parametrize("ablations", [{}, {"interaction": False}])
def test_the_exported_model_is_the_model(make_model, tmp_path, capsys, ablations):
    model = make_model(**ablations).eval()
    model.bnneck.running_mean.normal_()
    export.export(model, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for B in (1, 7):
        images = torch.randint(0, 256, (B, 3, 64, 32), dtype=torch.uint8)
        expected = model.embed(clip.normalize(images), "simplified")
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=0)
    with pytest.raises(NotImplementedError):
        exported(torch.rand(1, 3, 64, 32))
    assert (tmp_path / "model.pt2").stat().st_size < 12e6  # without the text encoder


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("search", "--images data", "give --query IMAGE or --words WORDS"),
        ("search", "--images data --words top --prompt simplified", "--prompt has no effect"),
        ("look", "--figure-4 runs/synthetic-tiny --queries worst", "--queries has no effect here"),
        ("look", "--images data --dataset market1501", "--dataset has no effect here"),
        ("export", "--output model.pt", "ends in .pt2"),
    ],
)
def test_mistakes_are_one_line(trained, script, flags, message):
    refused(run(f"extras/{script}.py", flags, trained), message)


def test_scripts_run_by_their_path(tmp_path):
    """`python extras/search.py` works like `python -m extras.search`, from any folder."""
    command = [sys.executable, ROOT / "extras/search.py", "--help"]
    assert "--query" in subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
