"""What stands on the six, and re-ranking and curves below them."""

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_evaluate import brute_force, random_problem

import clip
import data
import evaluate
from extras import export, look
from util import curves
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
    torch.testing.assert_close(look.relevance(model, images, "simplified")[0], expected, rtol=1e-5, atol=1e-8)


def test_relevance_leaves_no_gradients_behind(make_model, images):
    model = make_model().eval()
    found = look.relevance(model, images, "composed")
    assert found.shape == (8, 9) and found.isfinite().all() and (found >= 0).all()
    assert all(p.grad is None for p in model.parameters())
    assert not any(
        getattr(module, "keep_probabilities", False) or hasattr(module, "probabilities") for module in model.modules()
    )


def test_attention_on_the_person_is_measured(make_model, demo_root, monkeypatch):
    """A map on the person is all inside; one that avoids it is outside; an even one is at the area's share."""
    dataset, model = data.load_dataset("synthetic", demo_root), make_model().eval()
    model.clip.grid = (16, 8)
    args = argparse.Namespace(image_size=(64, 32), eval_batch_size=7, workers=0, device="cpu", precision="fp32")
    inside = look.person_shares(dataset, dataset.query, (16, 8))
    assert inside.shape == (len(dataset.query), 128) and 0.1 < inside.mean() < 0.6
    whole = (inside >= 0.9).float()
    maps = {"person": whole, "background": (inside == 0).float() + 1e-9, "even": torch.ones_like(inside)}
    results = {}
    for name, chosen in maps.items():
        answers = iter(torch.cat([torch.zeros(len(chosen), 1), chosen], dim=1).split(7))
        monkeypatch.setattr(model, "attention_map", lambda images, prompt, answers=answers: next(answers))
        results[name] = look.attention_inside(model, dataset, "simplified", args)
    area = inside.mean().item()
    assert results["even"][0] == pytest.approx(area) and results["even"][2] == pytest.approx(area)
    assert results["background"][0] < 0.01 and results["background"][1] == 0
    assert results["person"][0] > 0.9 and results["person"][1] == 1


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
    torch.testing.assert_close(found, model.embed(data.normalize(pictures), "simplified"), atol=1e-5, rtol=0)
    assert (tmp_path / "model.pt2").stat().st_size < 12e6  # the text encoder stays behind
