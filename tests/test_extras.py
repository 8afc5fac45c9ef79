"""What stands on the six, and re-ranking and curves below them."""

import argparse
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import words
from conftest import output_of, refused, run
from PIL import Image
from test_evaluate import brute_force, random_problem

import clip
import data
import evaluate
from extras import export, look, search
from model import PromptSG
from util import curves, demo
from util.rerank import k_reciprocal


def k_reciprocal_by_definition(features: np.ndarray, Q: int, k1: int, k2: int, weight: float) -> np.ndarray:
    """Zhong et al., 2017, section 3, with sets and loops: final distances of queries to gallery (Q, N - Q)."""
    N = len(features)
    squared = ((features[:, None] - features[None]) ** 2).sum(axis=2)
    d = squared / squared.max(axis=1, keepdims=True)
    ranking = [list(np.argsort(row, kind="stable")) for row in squared]

    def reciprocal(i: int, k: int) -> set[int]:
        return {g for g in ranking[i][: k + 1] if i in ranking[g][: k + 1]}

    V = np.zeros((N, N))
    for i in range(N):
        R = reciprocal(i, k1)
        expanded = set(R)
        for q in R:
            half = reciprocal(q, round(k1 / 2))
            if len(R & half) > 2 / 3 * len(half):
                expanded |= half
        for j in expanded:
            V[i, j] = np.exp(-d[i, j])
    V /= V.sum(axis=1, keepdims=True)
    V = np.stack([np.mean([V[j] for j in ranking[i][:k2]], axis=0) for i in range(N)])
    jaccard = np.array(
        [[1 - np.minimum(V[q], V[g]).sum() / np.maximum(V[q], V[g]).sum() for g in range(Q, N)] for q in range(Q)]
    )
    return (1 - weight) * jaccard + weight * d[:Q, Q:]


@pytest.mark.parametrize("Q, G, identities", [(12, 70, 8), (5, 40, 40), (3, 9, 2), (40, 160, 6)])
def test_re_ranking_follows_the_definition(Q, G, identities):
    generator = torch.Generator().manual_seed(Q)
    centres = torch.randn(identities, 16, generator=generator)
    who = torch.randint(identities, (Q + G,), generator=generator)
    features = F.normalize(centres[who] + 0.8 * torch.randn(Q + G, 16, generator=generator), dim=1)
    expected = k_reciprocal_by_definition(features.double().numpy(), Q, k1=20, k2=6, weight=0.3)
    similarities = k_reciprocal(features[:Q], features[Q:])
    found = torch.cat([similarities(0, Q // 2), similarities(Q // 2, Q)])
    assert found.shape == (Q, G)
    np.testing.assert_allclose(-found.numpy(), expected, atol=1e-5)


def test_ranking_takes_the_re_ranked_similarities():
    """Whatever the order of the gallery: its rows are sorted by identity inside."""
    query, gallery, *tables = random_problem(0)
    similarities = k_reciprocal(query, gallery)
    expected, _ = brute_force(similarities(0, len(query)), *tables)
    assert evaluate.rank_metrics(query, gallery, *tables, similarities)["mAP"] == pytest.approx(expected, abs=1e-6)


# -------------------------------------------------------------------------------------------------- attention


def test_a_kept_attention_map_is_what_is_computed(make_model, images):
    """The open computation gives the same z; its map is a probability for each query, with a gradient."""
    model = make_model().eval()
    expected = model.embed(images)
    layers = [module for module in model.modules() if isinstance(module, clip.Attention)]
    image_layers = [layer for layer in layers if layer not in set(model.clip.transformer.modules())]
    assert len(image_layers) == 5  # three of the encoder, two of the interaction module
    for layer in image_layers:
        layer.keep_probabilities = True
    torch.testing.assert_close(model.embed(images), expected, atol=1e-5, rtol=1e-5)
    for layer in image_layers:
        assert layer.probabilities.shape == (8, 2, 9, 9) and layer.probabilities.requires_grad
        torch.testing.assert_close(layer.probabilities.sum(dim=-1), torch.ones(8, 2, 9))


def test_relevance_follows_its_definition(make_model, images):
    """Chefer's rule with the gradients of the attention taken by finite differences."""
    model = make_model(blocks=0).double().eval()
    images = images[:1].double()
    with torch.no_grad():
        text = model.text_feature(model.clip.encode_image(images).embedding, "simplified")
        tokens = model.clip.encode_image(images).tokens
        a, V = model.interaction.attention_map(text, tokens), model.interaction.value(tokens)

        def similarity(a):
            return F.cosine_similarity((9 * a[..., None] * V).mean(dim=1), text).item()

        steps = 1e-5 * torch.eye(9, dtype=torch.double)
        gradient = torch.tensor([(similarity(a + step) - similarity(a - step)) / 2e-5 for step in steps])
        last = (a[0] * gradient).clamp(min=0)

    # Everything before the cross-attention: its R is the visual encoder's.
    layers = [block.attn for block in model.clip.visual.transformer.resblocks]
    for layer in layers:
        layer.keep_probabilities = True
    tokens = model.clip.encode_image(images).tokens
    z = (9 * model.interaction.attention_map(text, tokens)[..., None] * model.interaction.value(tokens)).mean(dim=1)
    whole = F.cosine_similarity(z, text) + F.cosine_similarity(tokens[:, 0], text)
    maps = [layer.probabilities for layer in layers]
    R = torch.eye(9, dtype=torch.double)
    for A, dA in zip(maps, torch.autograd.grad(whole.sum(), maps)):
        R = R + (A * dA).clamp(min=0)[0].mean(dim=0) @ R
    R = R + torch.diag(last) @ R
    expected = (R - torch.eye(9)).mean(dim=0)
    torch.testing.assert_close(
        look.relevance(model, images, "simplified", look.likeness_to_prompt)[0], expected, rtol=1e-5, atol=1e-8
    )


def test_relevance_leaves_no_gradients_behind(make_model, images):
    model = make_model().eval()
    found = look.relevance(model, images, "composed", look.likeness_to_prompt)
    assert found.shape == (8, 9) and found.isfinite().all() and (found >= 0).all()
    assert all(p.grad is None for p in model.parameters())
    assert not any(
        getattr(module, "keep_probabilities", False) or hasattr(module, "probabilities") for module in model.modules()
    )


@pytest.mark.parametrize("ablations", [{}, {"interaction": False, "inversion": False}])
def test_relevance_for_v_is_the_class_tokens_row_of_the_encoder(make_model, images, ablations):
    """Chefer's rule over the encoder's layers alone; the baseline has no others, and its z is v."""
    model = make_model(**ablations).eval()
    text = F.normalize(torch.randn(8, 128), dim=1)
    layers = [block.attn for block in model.clip.visual.transformer.resblocks]
    for layer in layers:
        layer.keep_probabilities = True
    similarity = F.cosine_similarity(model.clip.encode_image(images).embedding, text).sum()
    maps = [layer.probabilities for layer in layers]
    R = torch.eye(9).expand(8, 9, 9)
    for A, gradient in zip(maps, torch.autograd.grad(similarity, maps)):
        R = R + (A * gradient).detach().clamp(min=0).mean(dim=1) @ R
    expected = (R - torch.eye(9))[:, 0]
    torch.testing.assert_close(look.words_relevance(model, images, text), expected)
    if not model.interaction:
        found = look.relevance(model, images, "simplified", lambda v, z, l: F.cosine_similarity(z, text))
        torch.testing.assert_close(found, expected)


def test_a_person_is_known_by_its_other_pictures(make_model, demo_root, monkeypatch):
    """The target is the mean over the same person's other pictures, not the picture's own."""
    dataset, model, targets = data.load_dataset("synthetic", demo_root), make_model().eval(), []
    model.bnneck = torch.nn.Identity()
    pool = dataset.query + dataset.gallery
    own = [other.pid == pool[3].pid for other in pool]
    monkeypatch.setattr(evaluate, "extract", lambda embed, samples, args: torch.eye(len(samples)))

    def record(model, images, prompt, target):
        targets.append(target(None, torch.eye(sum(own)), None))
        return torch.zeros(1, 9)

    monkeypatch.setattr(look, "relevance", record)
    args = argparse.Namespace(image_size=(64, 32), workers=0, device="cpu", prompt="composed")
    assert look.identity_relevance(model, [pool[3]], pool, args).shape == (1, 8)
    others = torch.tensor([other != pool[3] for other, is_own in zip(pool, own) if is_own])
    torch.testing.assert_close(targets[0], others / 7)


def test_attention_on_the_person_is_measured(demo_root):
    """A map on the person is all inside; one that avoids it is outside; an even one is at the area's share."""
    dataset = data.load_dataset("synthetic", demo_root)
    inside = look.person_shares(dataset, dataset.query, (16, 8))
    assert inside.shape == (len(dataset.query), 128) and 0.1 < inside.mean() < 0.6
    share, peak = look.inside_and_peak((inside >= 0.9).float(), inside)
    assert share > 0.9 and peak == 1
    share, peak = look.inside_and_peak((inside == 0).float(), inside)
    assert share == 0 and peak == 0
    assert look.inside_and_peak(torch.ones_like(inside), inside)[0] == pytest.approx(inside.mean().item())


def test_parts_are_where_their_colours_are():
    """Each inside the person's mask, none on another, none where there is no such thing, all as the picture shows."""
    for pid in range(1, 13):
        person, camera = demo.person_of(pid)._replace(pattern="plain"), pid % 4 + 1
        picture, mask = demo.draw_sample(person, camera, demo.picture_numbers(pid, 0))
        parts = {part: demo.draw_part(person, part, camera, demo.picture_numbers(pid, 0)) for part in demo.PARTS}
        parts = {part: np.asarray(found) >= 200 for part, found in parts.items()}
        assert not (sum(found.astype(int) for found in parts.values()) > (np.asarray(mask) >= 128)).any()
        assert parts["hat"].any() <= bool(person.hat) and parts["bag"].any() <= (person.bag != "none")
        for part, colour in (("top", person.top), ("legs", person.bottom)):
            seen = np.median(np.asarray(picture)[parts[part]], axis=0)
            assert np.abs(seen - np.multiply(colour, np.mean(seen) / np.mean(colour))).max() < 25


# ---------------------------------------------------------------------------------------------------- drawings


def test_a_map_is_drawn_where_it_is(tmp_path):
    picture = torch.full((3, 256, 128), 100, dtype=torch.uint8)
    attention = torch.zeros(4, 2)
    attention[3, 1] = 1.0
    drawn = look.heat(picture, attention).float().mean(dim=0)
    assert drawn.shape == (256, 128)
    assert drawn[230:, 100:].mean() > 2 * drawn[:100].mean()
    assert look.heat(picture, torch.ones(4, 2)).shape == (3, 256, 128)  # an even map does not divide by zero


def test_frames_tell_right_from_wrong_and_junk_is_left_out(demo_root, tmp_path):
    dataset = data.load_dataset("synthetic", demo_root)
    query = dataset.query[5]
    similarity = torch.tensor([float(sample.pid == query.pid) for sample in dataset.gallery])
    look.draw_ranked_lists(dataset, lambda begin, end: similarity[None], [5], tmp_path / "new" / "ranked")
    drawn = np.asarray(Image.open(tmp_path / "new" / "ranked-1.png"))
    frames = [tuple(drawn[8, 6 + 142 * column + 68]) for column in range(11)]
    right = sum(s.pid == query.pid and s.camid != query.camid for s in dataset.gallery)
    assert frames == [look.GREY] + [look.GREEN] * right + [look.RED] * (10 - right)


def test_the_worst_queries_come_first():
    ap = torch.tensor([0.5, torch.nan, 0.1, 0.9, 0.3])
    assert look.choose_queries(ap, "worst", 3) == [2, 4, 0]
    chosen = look.choose_queries(ap, "random", 9)
    assert sorted(chosen) == [0, 2, 3, 4] and chosen == look.choose_queries(ap, "random", 9)


@pytest.mark.parametrize("greatest", [0, 1e-4, 0.03, 1, 7, 40, 60, 99.9, 1234])
def test_ticks_are_few_round_and_reach_the_greatest(greatest):
    ticks = curves.round_ticks(greatest)
    assert 2 <= len(ticks) <= 9 and ticks[0] == 0 and ticks[-1] >= greatest
    assert all(len(f"{tick:g}") <= 6 for tick in ticks)


def test_curves_show_the_log(tmp_path):
    """The curve of a term is where its values are; a run never scored has one panel to fill."""
    log = [{"epoch": 0, "mAP": 0.1, "rank1": 0.2}]
    log += [{"epoch": e, "loss": 10, "loss_triplet": 1, "loss_id": 2, "loss_supcon": 14} for e in range(1, 11)]
    curves.draw_curves(log, tmp_path / "curves.png")
    picture = np.asarray(Image.open(tmp_path / "curves.png"))
    assert picture.shape == (420, 1200, 3)
    blue = (np.abs(picture.astype(int) - curves.COLOURS[0]).sum(axis=2) < 40)[60:, :600]
    rows = blue.sum(axis=1)
    assert rows.max() > 300 and np.argmax(rows) + 60 == pytest.approx(365 - 320 * 10 / 14, abs=6)
    curves.draw_curves(log[1:], tmp_path / "2.png")


# ------------------------------------------------------------------------------------------------ features, export


@pytest.mark.parametrize("ablations", [{}, {"blocks": 0}, {"inversion": False}, {"interaction": False}])
def test_the_exported_model_is_the_model(make_model, tmp_path, capsys, ablations):
    model = make_model(**ablations).eval()
    model.bnneck.running_mean.normal_()
    export.export(model, (64, 32), tmp_path / "model.pt2")
    assert "differs from the model by" in capsys.readouterr().out
    pictures = torch.randint(0, 256, (1, 3, 64, 32), dtype=torch.uint8)
    found = torch.export.load(tmp_path / "model.pt2").module()(pictures)
    torch.testing.assert_close(found, model.embed(clip.normalize(pictures), "simplified"), atol=1e-5, rtol=0)
    assert (tmp_path / "model.pt2").stat().st_size < 12e6  # the text encoder stays behind


# ---------------------------------------------------------------------------------------------------- words

CHECKPOINT = "--checkpoint runs/synthetic-tiny/last.pt"


def test_figure_4_draws_each_run_on_the_same_people(trained):
    """Picture, original and two runs, of a training and of a gallery person a row; and measures them."""
    text = output_of("extras/look.py", "--count 4 --figure-4 runs/synthetic-tiny runs/synthetic-tiny/best.pt", trained)
    for name in ("original", "synthetic-tiny", "synthetic-tiny/best"):
        assert re.search(rf"relevance on the person, {name}: \d+\.\d% of it, its peak in", text)
    assert "2 training people and 2 gallery people, chosen at random (seed 0)" in text
    assert Image.open(trained / "look/figure-4-1.png").size == (6 + 8 * 142, 6 + 2 * 294)


def test_people_are_chosen_one_picture_each(demo_root):
    dataset = data.load_dataset("synthetic", demo_root)
    chosen = look.choose_people(dataset.train, 5)
    assert len({sample.pid for sample in chosen}) == 5 and chosen == look.choose_people(dataset.train, 5)
    assert len(look.choose_people(dataset.train, 99)) == 20
    with pytest.raises(ValueError, match="nobody in this dataset has several pictures"):
        look.choose_people(dataset.train[:1], 5)


def test_look_shows_words_and_says_what_s_star_is(trained):
    output_of("extras/look.py", f"{CHECKPOINT} --count 2 --words top", trained, "blue skirt")
    assert Image.open(trained / "look/words-1.png").size == (6 + 3 * 142, 6 + 2 * 294)
    output_of("extras/look.py", "--backbone tiny --images data/synthetic/query --words top --output start", trained)
    text = output_of("extras/look.py", f"{CHECKPOINT} --count 3 --s-star", trained, "red top", "a hat")
    lines = re.findall(r"^\S+\.jpg: (?:red top|a hat) -?0\.\d\d, (?:red top|a hat) -?0\.\d\d$", text, re.MULTILINE)
    assert len(lines) == 3 and Image.open(trained / "look/s-star-1.png").size == (6 + 2 * 142, 6 + 3 * 294)


@pytest.mark.parametrize("flags", [CHECKPOINT, "--backbone tiny"])
def test_search_by_words_and_by_both(trained, demo_root, flags):
    """What it prints are cosines of v to T(sentence), to v, or to their mean; the best ten, with and without a run."""
    folder, picture = demo_root / "synthetic/bounding_box_test", sorted((demo_root / "synthetic/query").iterdir())[0]
    sentence = "a person with red top"
    args = search.parse_args(["--images", str(folder), "--workers", "0", "--precision", "fp32", *flags.split()])
    args.checkpoint = args.checkpoint and trained / args.checkpoint
    model, _ = look.load_model(args)
    samples = look.find_pictures([picture, folder])
    v = F.normalize(evaluate.extract(lambda images: model.clip.encode_image(images).embedding, samples, args), dim=1)
    text = F.normalize(model.clip.encode_text(clip.tokenize(f"A photo of {sentence}")), dim=1)[0].detach()
    ways = {"words": text, "both": F.normalize(v[0] + text, dim=0), "picture": v[0]}
    for way, query in ways.items():
        chosen = (["--query", picture] if way != "words" else []) + (["--words", sentence] if way != "picture" else [])
        printed = output_of("extras/search.py", f"{flags} --images {folder}", trained, *chosen)
        found = [float(value) for value in re.findall(r"^(-?\d\.\d{3})  \S+\.jpg$", printed, re.MULTILINE)]
        if way == "picture" and flags == CHECKPOINT:
            assert "space: retrieval features, BN(z), composed prompt" in printed
        else:
            assert "space: CLIP's joint space, v" in printed
            assert found == pytest.approx((v[1:] @ query).topk(10).values.tolist(), abs=6e-4)
    drawn = [Image.open(trained / f"search-{name}-1.png").width for name in ("a-person-with-red-top", picture.stem)]
    assert drawn == [6 + 11 * 142] * 2
    assert Image.open(trained / f"search-{picture.stem}-a-person-with-red-top-1.png").width == 6 + 12 * 142


def test_what_tests_words_py_measures(make_model, monkeypatch):
    """A change is of one piece; a feature that is the sentence of a person's own colours names them."""
    for pid in range(1, 9):
        before, after = demo.describe(demo.person_of(pid, 5)), words.change(pid, 5).words
        assert after not in before.values()
        assert after.split()[1] in [word.split()[1] for word in before.values()]
    model = make_model().eval()
    samples = [data.Sample(None, pid, 1) for pid in range(1, 9)]
    tops = look.encode_words(model, [demo.describe(demo.person_of(pid, 5))["top"] for pid in range(1, 9)])
    assert words.own_colours(tops, samples, model, 5)["top"] == (1, 1)
    monkeypatch.setattr(look, "encode_words", lambda model, garments: torch.eye(len(garments)))
    for before, expected in ((1, (0, 1)), (2, (0, 1)), (3, (0, 0))):  # so many colours nearer than the own one
        colours = [list(demo.CLOTHES).index(demo.COLOURS[demo.person_of(pid, 5).top]) for pid in range(1, 9)]
        near = torch.zeros(8, 12)
        for row, own in zip(near, colours):
            row[[(own + step) % 12 for step in range(1, before + 1)]] = 2
            row[own] = 1
        assert words.own_colours(near, samples, model, 5)["top"] == expected


@pytest.mark.parametrize(
    "script, flags, more, message",
    [
        ("search", "--images data", [], "give --query PICTURE, --words WORDS or --features FILE.npz"),
        ("search", "--images data --words", [" "], "--words is empty"),
        ("search", "--images data --words", ["red " * 80], "85 tokens long; CLIP reads 77"),
        ("search", "--images nothing --words top", [], "no pictures in nothing"),
        ("search", "--images data --query notes.jpg", [], "cannot read the picture notes.jpg"),
        ("search", f"--images data --words top --backbone tiny {CHECKPOINT}", [], "give one of them"),
        ("search", "--images data --words top --clip-weights x.pt", [], "--clip-weights are those of --backbone"),
        ("search", "--images data --words top --backbone vit --clip-weights x.pt", [], "no weight file x.pt"),
        ("look", "--words top --s-star", [], "give one of them"),
        ("look", "--words", ["top", ""], "one of them is empty"),
        ("look", "--s-star", ["red " * 80], "tokens long"),
        ("look", "--backbone tiny", [], "has only --words to look for"),
        ("look", "--figure-4 nothing", [], "no checkpoint nothing/last.pt"),
        ("look", "--figure-4 runs/synthetic-tiny --images data", [], "drop --images and --checkpoint"),
    ],
)
def test_words_that_make_no_sense(trained, script, flags, more, message):
    (trained / "nothing").mkdir(exist_ok=True)
    (trained / "notes.jpg").write_text("no picture")
    refused(run(f"extras/{script}.py", flags, trained, *more), message)


def test_a_model_without_what_it_takes_says_so(make_model, images):
    resnet = PromptSG(clip.untrained("RN50", (64, 32)), 2).eval()
    with pytest.raises(ValueError, match="this model's visual encoder is a ResNet"):
        look.words_relevance(resnet, images, resnet.simplified_text)
    with pytest.raises(ValueError, match="--s-star needs the inversion network"):
        look.look_at_words(make_model(inversion=False), look.parse_args(["--s-star"]))
