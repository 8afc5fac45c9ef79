"""extras/look.py, search.py and export.py: what they compute, and what their commands write."""

import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import output_of, refused, run
from PIL import ImageFont

import clip
import data
import evaluate
from extras import export, look
from model import PromptSG
from util import checkpoint

CHECKPOINT = "runs/synthetic-tiny/last.pt"


@pytest.fixture
def dataset(demo_root) -> data.Dataset:
    return data.load_dataset("synthetic", demo_root)


@pytest.mark.parametrize("components", [{}, {"interaction": False, "inversion": False}])
def test_relevance_matches_its_definition(make_model, images, components):
    """Chefer's rule with matrices, and finite differences for the gradient of the cross-attention map."""
    model, images, eye = make_model(**components).double().eval(), images[:1].double(), torch.eye(9).double()
    expected, encoder = model.embed(images), model.clip.visual.transformer.resblocks
    layers = [block.attn for block in [*encoder, *(model.interaction.blocks if model.interaction else ())]]
    for layer in layers:
        layer.keep_probabilities = True
    torch.testing.assert_close(model.embed(images), expected)
    tokens = model.clip.encode_image(images).tokens
    text = model.text_feature(tokens[:, 0], None).detach()
    S = look.similarity_to_prompt(tokens[:, 0], model.interact(tokens, text), text)
    maps = [layer.probabilities for layer in layers]  # (1, heads, 9, 9)
    gradients = torch.autograd.grad(S.sum(), maps, retain_graph=True)
    positive = [(A * gradient)[0].clamp(min=0).mean(dim=0) for A, gradient in zip(maps, gradients)]
    if model.interaction:
        a = model.interaction.attention_map(text, tokens)
        ends = [model.interaction.aggregate(a + step, tokens) for row in 1e-5 * eye for step in (-row, row)]
        slopes = F.cosine_similarity(torch.cat(ends), text).view(9, 2).diff(dim=1)[:, 0] / 2e-5
        positive.insert(len(encoder), torch.diag((a[0] * slopes).clamp(min=0)))
    R = torch.linalg.multi_dot([eye + matrix for matrix in reversed(positive)])
    expected = (R - eye).mean(dim=0) if model.interaction else (R - eye)[0]
    found = look.relevance(model, images, None, look.similarity_to_prompt)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_maps_over_the_patches(make_model, dataset):
    """Figure 4's target is the mean of the identity's other images; attention is the model's; high values are light."""
    model, pool = make_model().eval(), dataset.query + dataset.gallery
    sample = pool[3]
    mean = evaluate.extract(model, [s.path for s in pool if s.pid == sample.pid and s != sample]).mean(dim=0)
    image = clip.normalize(data.read_image(sample.path, (64, 32))[None])
    expected = look.relevance(model, image, None, lambda v, z, l: F.normalize(model.bnneck(z), dim=1) @ mean)
    found = look.identity_relevance(model, pool[2:4], pool)[1]
    torch.testing.assert_close(found, expected[0, 1:].view(4, 2), rtol=1e-3, atol=1e-6)
    for prompt in ("simplified", "composed"):
        expected = model.attention_map(image, prompt).detach()[0, 1:].view(4, 2)
        torch.testing.assert_close(look.attention(model, [sample.path], prompt)[0], expected)
    values = torch.tensor([[0.0, 0], [0, 0], [0, 0], [0, 1]])
    drawn = look.heat(torch.full((3, *look.TILE), 100, dtype=torch.uint8), values).float().mean(dim=0)
    assert drawn[-30:, -30:].mean() > 2 * drawn[:75].mean()


def test_share_on_the_person_of_a_uniform_map_and_of_the_centre(dataset):
    uniform = torch.ones(len(dataset.query), 16, 8)
    centre = F.pad(uniform[:, :1, :1], (4, 3, 7, 8))
    text = look.describe_inside(uniform, dataset) + look.describe_inside(centre, dataset)
    share, _, area, most, peak, _ = map(float, re.findall(r"([\d.]+)%", text))
    assert 10 < share == area < 60 and min(most, peak) > 80


@pytest.mark.parametrize("text", ["1: id 1234567 c12 0.99", "3: 0.87 " + "name_" * 30, "W" * 50])
def test_long_captions_wrap_and_end_with_an_ellipsis(text):
    font = ImageFont.load_default(13)
    lines = look.wrap(text, font, 104, 3).split("\n")
    assert len(lines) <= 3 and all(font.getlength(line) <= 104 for line in lines)
    shown, whole = "".join(lines).replace(" ", ""), text.replace(" ", "")
    assert shown == whole if len(text) < 40 else shown[-1] == "…" and whole.startswith(shown[:-1])


def test_choice_of_queries_people_and_matches(dataset):
    """Best matches come first and are green or red; images of the query's identity by its camera are ignored."""
    assert look.choose_queries(torch.tensor([0.5, torch.nan, 0.1, 0.9, 0.3]), 9) == [2, 4, 0, 3]
    assert [sample.pid for sample in look.choose_people(dataset.train, dataset.train, 2)] == [5, 15]
    query = dataset.query[5]
    similarity = torch.tensor([float(sample.pid == query.pid) for sample in dataset.gallery])
    first, *tiles = look.best_matches(dataset, 5, similarity, 10, "before training")
    correct = sum(s.pid == query.pid and s.camid != query.camid for s in dataset.gallery)
    assert [tile.frame for tile in tiles] == [look.GREEN] * correct + [look.RED] * (10 - correct)
    assert f"id {query.pid}" in first.caption and tiles[0].caption.startswith(f"1: id {query.pid} c")


def test_look(trained, tmp_path, dataset):
    state = checkpoint.load(trained / CHECKPOINT)
    untrained = look.before_training(state)
    assert evaluate.evaluate(untrained, dataset, "none")["mAP"] == pytest.approx(state["log"][0]["mAP"], abs=1e-6)
    text = output_of("extras/look.py", "--count 3 --device cpu --output", trained, tmp_path / "new")
    maps = look.attention(untrained, [sample.path for sample in dataset.query], "composed")
    assert f"attention on the person, untrained, composed prompt: {look.describe_inside(maps, dataset)}" in text
    output_of("extras/look.py", "--before-after --count 2 --output", trained, tmp_path)
    images = "--images data/synthetic/query data/synthetic/drawing.json"  # no image: --count must stop before it
    assert "25 images" in output_of("extras/look.py", f"{images} --count 2 --output", trained, tmp_path)
    text = output_of("extras/look.py", f"--figure-4 runs/synthetic-tiny {CHECKPOINT} --output", trained, tmp_path)
    assert re.findall("person, (.*?):", text) == ["original", "runs/synthetic-tiny", CHECKPOINT]
    assert len(list(tmp_path.glob("**/*.jpg"))) == 5  # two by the first command, one by each of the others


@pytest.mark.parametrize("by", ["image", "words", "both"])
def test_search(trained, demo_root, tmp_path, by):
    """By images: retrieval features. By words: v and T(sentence). By both: v and the mean of the two."""
    folder = shutil.copytree(demo_root / "synthetic/query", tmp_path / "images/query")
    paths = sorted(folder.iterdir())
    paths[0] = paths[0].rename(folder.parent / "\udcb5.jpg")  # not UTF-8
    (folder / "broken.jpg").write_text("no image")
    model, queries = PromptSG.load(trained / CHECKPOINT), [] if by == "words" else paths[:2]
    features = dict(zip(paths, evaluate.extract(model, paths, None if by == "image" else "none")))
    text = model.encode_text("A photo of a person with red top")[0]
    flags = (["--query", *queries] if queries else []) + (["--words", "a person with red top"] if by != "image" else [])
    files = ["--json", tmp_path / "found.json", "--output", tmp_path / "found.jpg"]
    printed = output_of("extras/search.py", "--count 5 --images", trained, folder.parent, folder, *flags, *files)
    result = json.loads((tmp_path / "found.json").read_text())  # each image once, although the folders overlap
    for query, found in zip(queries or [None], result["results"], strict=True):
        wanted = {"image": features.get(query), "words": text, "both": features.get(query, 0) + text}[by]
        similarity = {str(p): F.cosine_similarity(features[p], wanted, dim=0).item() for p in paths if p != query}
        expected = sorted(similarity, key=similarity.get, reverse=True)[:5]
        matches = {match["path"]: match["similarity"] for match in found["matches"]}
        assert list(matches) == expected and matches == pytest.approx({p: similarity[p] for p in expected}, abs=1e-4)
    assert result["prompt"] == ("composed" if by == "image" else "none")
    assert "1 file skipped (first: broken.jpg)" in printed and (tmp_path / "found.jpg").exists()


def test_the_exported_model_equals_the_model(make_model, tmp_path):
    model = make_model().eval()
    model.bnneck.running_mean.normal_()
    export.export(model, tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for B in (1, 7):
        images = torch.randint(0, 256, (B, 3, 64, 32), dtype=torch.uint8)
        expected = model.embed(clip.normalize(images), "simplified")
        torch.testing.assert_close(exported(images), expected, atol=1e-5, rtol=0)
    assert (tmp_path / "model.pt2").stat().st_size < 12e6  # without the text encoder


def test_mistakes_are_one_line(trained):
    refused(run("extras/search.py", "--images data --words top --prompt simplified", trained), "--prompt")
    refused(run("extras/search.py", "--images data --query data/synthetic/drawing.json", trained), "drawing.json")
    refused(run("extras/look.py", f"--figure-4 runs/synthetic-tiny --checkpoint {CHECKPOINT}", trained), "--checkpoint")
    refused(run("extras/export.py", "--output model.pt", trained), ".pt2")
