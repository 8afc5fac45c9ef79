"""extras/look.py, search.py and export.py: what they compute, and what their commands write."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import output_of, refused, run
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
    """Return the attention layers over image tokens: those of the encoder, then those of the interaction module."""
    blocks = [*model.clip.visual.transformer.resblocks, *(model.interaction.blocks if model.interaction else ())]
    return [block.attn for block in blocks]


# ------------------------------------------------------------------------------------------------ relevance


@pytest.mark.parametrize("components", [{"blocks": 0}, {"interaction": False, "inversion": False}])
def test_relevance_matches_its_definition(make_model, images, components):
    """Chefer's rule in loops, with finite differences for the gradient of the cross-attention map.

    Keeping the probabilities of an attention layer does not change its output.
    """
    model, images = make_model(**components).double().eval(), images[:1].double()
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


def test_relevance_does_not_change_the_model(make_model, images):
    model = make_model().eval()
    found = look.relevance(model, images, "composed", look.similarity_to_prompt)
    assert found.shape == (8, 9) and found.isfinite().all() and (found >= 0).all()
    assert not any(layer.keep_probabilities or hasattr(layer, "probabilities") for layer in all_attention(model))
    sizes = dict(embed_dim=64, vision_layers=(1, 1, 1, 1), vision_width=16, text_width=64, text_layers=1)
    resnet = PromptSG(clip.CLIP(**sizes, image_size=(64, 32)), 2).eval()
    with pytest.raises(ValueError, match="ResNet"):
        look.relevance(resnet, images, "simplified", look.similarity_to_prompt)


def test_target_of_figure_4_is_the_mean_of_the_other_images(make_model, dataset):
    """The other images are those of the same identity, without the image itself."""
    model, pool = make_model().eval(), dataset.query + dataset.gallery
    sample = pool[3]
    others = [other.path for other in pool if other.pid == sample.pid and other != sample]
    mean = evaluate.extract(model, others).mean(dim=0)
    image = clip.normalize(data.read_image(sample.path, (64, 32))[None])
    expected = look.relevance(model, image, None, lambda v, z, l: F.normalize(model.bnneck(z), dim=1) @ mean)
    found = look.identity_relevance(model, pool[2:4], pool)[1]
    torch.testing.assert_close(found, expected[0, 1:].view(4, 2), rtol=1e-3, atol=1e-6)


def test_share_of_attention_on_the_person(dataset):
    """A uniform map has the person's area, a map of the centre nearly all, a map of a corner nothing."""
    uniform = torch.ones(len(dataset.query), 16, 8)
    centre, corner = torch.zeros_like(uniform), torch.zeros_like(uniform)
    centre[:, 7, 4], corner[:, 0, 0] = 1, 1
    found = [re.findall(r"([\d.]+)%", look.describe_inside(maps, dataset)) for maps in (uniform, centre, corner)]
    (share, _, area), (most, peak, _), nothing = (list(map(float, numbers)) for numbers in found)
    assert share == area and 10 < area < 60 and min(most, peak) > 80 and nothing == [0, 0, area]


# --------------------------------------------------------------------------------------------------- sheets


def test_a_map_is_drawn_at_its_place():
    values = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 1]])
    drawn = look.heat(torch.full((3, *look.TILE), 100, dtype=torch.uint8), values).float().mean(dim=0)
    assert drawn[-30:, -30:].mean() > 2 * drawn[:75].mean()


@pytest.mark.parametrize("text", ["1: id 1234567 c12 0.99", "3: 0.87 " + "name_" * 30, "W" * 50])
def test_long_captions_wrap_and_end_with_an_ellipsis(text):
    font = ImageFont.load_default(13)
    lines = look.wrap(text, font, 104, 3).split("\n")
    assert len(lines) <= 3 and all(font.getlength(line) <= 104 for line in lines)
    shown, whole = "".join(lines).replace(" ", ""), text.replace(" ", "")
    assert shown == whole if len(text) < 40 else shown[-1] == "…" and whole.startswith(shown[:-1])


def test_best_matches_are_framed_and_numbered_without_junk(dataset):
    query = dataset.query[5]
    similarity = torch.tensor([float(sample.pid == query.pid) for sample in dataset.gallery])
    first, *tiles = look.best_matches(dataset, 5, similarity, 10, "before training")
    correct = sum(s.pid == query.pid and s.camid != query.camid for s in dataset.gallery)
    assert [tile.frame for tile in tiles] == [look.GREEN] * correct + [look.RED] * (10 - correct)
    assert f"id {query.pid}" in first.caption and tiles[0].caption.startswith(f"1: id {query.pid} c")


def test_choice_of_queries_and_people(dataset):
    ap = torch.tensor([0.5, torch.nan, 0.1, 0.9, 0.3])
    assert look.choose_queries(ap, "worst", 3) == [2, 4, 0]
    assert look.choose_queries(ap, "spread", 2) == [4, 3] and look.choose_queries(ap, "spread", 9) == [2, 4, 0, 3]
    assert [sample.pid for sample in look.choose_people(dataset.train, dataset.train, 2)] == [5, 15]
    with pytest.raises(ValueError, match="several images"):
        look.choose_people(dataset.train[:1], dataset.train[:1], 5)


# -------------------------------------------------------------------------------------------------- scripts


def test_look(trained, tmp_path):
    text = output_of("extras/look.py", "--count 3 --device cpu --output", trained, tmp_path / "new")
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"matches.jpg", "attention.jpg"}
    assert len(re.findall(r"attention on the person, (?:un)?trained, \w+ prompt: \d+\.\d%", text)) == 4
    text = output_of("extras/look.py", "--images data/synthetic/query --count 2 --output", trained, tmp_path)
    assert "24 images" in text and (tmp_path / "attention.jpg").exists()
    arguments = f"--figure-4 runs/synthetic-tiny {CHECKPOINT} --count 4 --output"
    text = output_of("extras/look.py", arguments, trained, tmp_path)
    for name in ("original", "runs/synthetic-tiny", CHECKPOINT):
        assert f"relevance on the person, {name}: " in text and (tmp_path / "figure-4.jpg").exists()


def test_before_after_shows_clip_before_training(trained, tmp_path, dataset):
    state = checkpoint.load(trained / CHECKPOINT)
    before = evaluate.evaluate(look.before_training(state), dataset, "none")
    assert before["mAP"] == pytest.approx(state["log"][0]["mAP"], abs=1e-6)
    output_of("extras/look.py", "--before-after --count 2 --device cpu --output", trained, tmp_path)
    assert Image.open(tmp_path / "before-after.jpg").width > 1200  # before and after side by side


@pytest.fixture
def folder(demo_root, tmp_path) -> Path:
    """A folder with a subfolder, a file that is not an image, and a name that is not UTF-8."""
    paths = sorted((demo_root / "synthetic/query").iterdir())
    (tmp_path / "images/sub").mkdir(parents=True)
    for path in paths[:5]:
        shutil.copy(path, tmp_path / "images/sub")
    shutil.copy(paths[5], tmp_path / "images" / os.fsdecode(b"\xb5\xff.jpg"))
    (tmp_path / "images/broken.jpg").write_text("no image")
    return tmp_path / "images"


@pytest.mark.parametrize("by", ["image", "words", "both"])
def test_search(trained, folder, tmp_path, by):
    """By image: retrieval features. By words: v and T(sentence). By both: v and the mean of the two."""
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
    assert [m["similarity"] for m in matches] == pytest.approx([similarity[path] for path in expected], abs=1e-4)
    assert result["prompt"] == ("composed" if by == "image" else "none")
    assert "1 file skipped (first: broken.jpg)" in text and r"\udcb5" in text and (tmp_path / "found.jpg").exists()


def test_search_by_several_images(make_model, folder):
    model, paths = make_model().eval(), sorted((folder / "sub").iterdir())
    results = search.search(model, paths, paths[:2], count=3)
    assert [(result["query"], len(result["matches"])) for result in results] == [(str(path), 3) for path in paths[:2]]
    with pytest.raises(OSError, match="broken.jpg"):  # a query is never skipped
        search.search(model, paths, [folder / "broken.jpg"])


def test_the_exported_model_equals_the_model(make_model, tmp_path):
    model = make_model().eval()
    model.bnneck.running_mean.normal_()
    export.export(model, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for B in (1, 7):
        images = torch.randint(0, 256, (B, 3, 64, 32), dtype=torch.uint8)
        expected = model.embed(clip.normalize(images), "simplified")
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError):
        exported(torch.rand(1, 3, 64, 32))
    assert (tmp_path / "model.pt2").stat().st_size < 12e6  # without the text encoder


MISTAKES = [
    ("search", "--images data", "--query IMAGE or --words WORDS"),
    ("search", "--images data --words top --prompt simplified", "--prompt"),
    ("look", "--figure-4 runs/synthetic-tiny --queries worst", "--queries"),
    ("look", "--images data --dataset market1501", "--dataset"),
    ("export", "--output model.pt", ".pt2"),
]


@pytest.mark.parametrize("script, flags, words", MISTAKES)
def test_mistakes_are_one_line(trained, script, flags, words):
    refused(run(f"extras/{script}.py", flags, trained), words)
