"""Evaluation: features of image files, metrics and re-ranking against their definitions, the script."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import output_of
from PIL import Image

import clip
import data
from evaluate import extract, rank_metrics
from model import PromptSG
from util.pairs import compare_pairs
from util.rerank import k_reciprocal

# -------------------------------------------------------------------------------------------------- features


@pytest.fixture
def image_files(tmp_path) -> list:
    """Six images of different sizes, modes and formats."""
    noise = np.random.RandomState(0).randint(0, 256, (6, 90, 70, 3), dtype=np.uint8)
    formats = ("jpg", "RGB"), ("png", "RGBA"), ("bmp", "RGB"), ("webp", "RGB"), ("tif", "L"), ("jpeg", "RGB")
    paths = [tmp_path / f"{number}.{suffix}" for number, (suffix, _) in enumerate(formats)]
    for number, (path, (_, mode)) in enumerate(zip(paths, formats)):
        Image.fromarray(noise[number]).resize((20 + 9 * number, 80 - 7 * number)).convert(mode).save(path)
    return paths


@pytest.mark.parametrize("prompt", [None, "simplified", "none"])
def test_features_of_image_files(make_model, image_files, prompt):
    """They are those of `embed`, in the order of the files. The model keeps its mode."""
    model = make_model()
    model.bnneck.running_mean.normal_()
    images = torch.stack([data.read_image(path, (64, 32)) for path in image_files])
    with torch.no_grad():
        expected = model.eval().embed(clip.normalize(images), prompt)
    for is_training, workers in ((True, 0), (False, 2)):
        features = extract(model.train(is_training), image_files, prompt, batch_size=4, workers=workers)
        assert model.training == model.bnneck.training == is_training
        assert features.dtype == torch.float32 and features.device.type == "cpu"
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(6))
    assert extract(model, [], prompt).shape == (0, 128)


def test_unreadable_images_are_all_named(make_model, image_files, tmp_path):
    """After the first one the model does not run any more. It keeps its mode."""
    model, batches = make_model().train(), []
    embed = model.embed
    model.embed = lambda images, prompt: batches.append(len(images)) or embed(images, prompt)
    paths = [*image_files[:2], tmp_path / "broken.jpg", image_files[2], tmp_path / "missing.jpg", image_files[3]]
    paths[2].write_bytes(image_files[0].read_bytes()[:100])
    with pytest.raises(OSError, match=r"broken\.jpg.*missing\.jpg"):
        extract(model, paths, batch_size=2)
    assert batches == [2] and model.training


# -------------------------------------------------------------------------------------------------- metrics


def brute_force(similarities, query_ids, gallery_ids, query_cams, gallery_cams):
    """Compute mAP and CMC by definition: remove ignored images, sort, walk down the list. Ties: wrong images first."""
    average_precisions, first_hits = [], []
    for row, query_id, query_cam in zip(similarities.tolist(), query_ids.tolist(), query_cams.tolist()):
        candidates = zip(row, gallery_ids.tolist(), gallery_cams.tolist())
        counted = [(s, i == query_id) for s, i, cam in candidates if i != -1 and (i, cam) != (query_id, query_cam)]
        counted.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        hits = [rank for rank, (_, is_correct) in enumerate(counted, 1) if is_correct]
        if hits:
            average_precisions.append(sum(number / rank for number, rank in enumerate(hits, 1)) / len(hits))
            first_hits.append(hits[0])
    N, G = len(first_hits), similarities.shape[1]
    return sum(average_precisions) / N, [sum(hit <= k for hit in first_hits) / N for k in range(1, G + 1)]


def random_problem(seed, ties=False):
    generator = torch.Generator().manual_seed(seed)
    Q, G, D = 300, 90, 8

    def integers(low, high, n):
        return torch.randint(low, high, (n,), generator=generator)

    query, gallery = torch.randn(Q, D, generator=generator), torch.randn(G, D, generator=generator)
    if ties:  # few different features, whose products are exact
        query, gallery = query.sign(), gallery[:7].sign()[integers(0, 7, G)]
    # Identity -1 is junk, 0 a distractor without query. Queries 12 and 13 have no image in the gallery.
    return query, gallery, integers(1, 14, Q), integers(-1, 12, G), integers(0, 3, Q), integers(0, 3, G)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_rank_metrics_match_the_definition(seed, ties):
    query, gallery, *tables = random_problem(seed, ties)
    metrics = rank_metrics(query, gallery, *tables)
    mean_average_precision, cmc = brute_force(query @ gallery.T, *tables)
    assert metrics["mAP"] == pytest.approx(mean_average_precision, abs=1e-6)
    assert metrics["cmc"].tolist()[: len(cmc)] == pytest.approx(cmc[: len(metrics["cmc"])], abs=1e-6)
    other = -(query @ gallery.T)  # similarities such as those of re-ranking, in the order of the gallery
    reranked = rank_metrics(query, gallery, *tables, lambda begin, end: other[begin:end])
    assert reranked["mAP"] == pytest.approx(brute_force(other, *tables)[0], abs=1e-6)


def test_queries_are_ranked_in_chunks():
    """600 queries and 72,000 gallery images make two chunks. The last 300 queries equal the first."""
    problem = random_problem(0, ties=True)
    ap = rank_metrics(*(torch.cat([x] * copies) for x, copies in zip(problem, (2, 800) * 3)))["ap"]
    assert torch.equal(ap[:300].nan_to_num(), ap[300:].nan_to_num())


def test_queries_without_a_correct_image_and_infinite_features_are_refused():
    features, ones = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2, dtype=torch.long)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        rank_metrics(features, features, ones, ones, ones, ones)
    features[1, 0] = torch.inf
    with pytest.raises(ValueError, match="diverged"):
        rank_metrics(features, features, ones, ones, ones, 1 + ones)


# ------------------------------------------------------------------------------------------------ re-ranking


def k_reciprocal_by_definition(features: np.ndarray, Q: int, k1: int, k2: int, weight: float) -> np.ndarray:
    """Compute the final distances (Q, N - Q) of Zhong et al., 2017, section 3, with sets and loops."""
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
    minima, maxima = (np.array([f(row, V[Q:]).sum(axis=1) for row in V[:Q]]) for f in (np.minimum, np.maximum))
    return (1 - weight) * (1 - minima / maxima) + weight * d[:Q, Q:]


@pytest.mark.parametrize("Q, G, identities, k1, k2", [(12, 70, 8, 20, 6), (40, 160, 6, 10, 3), (3, 9, 2, 200, 60)])
def test_re_ranking_matches_the_definition(Q, G, identities, k1, k2):
    """Also for k1 and k2 larger than the data."""
    generator = torch.Generator().manual_seed(Q)
    centres = torch.randn(identities, 16, generator=generator)
    ids = torch.randint(identities, (Q + G,), generator=generator)
    features = F.normalize(centres[ids] + 0.8 * torch.randn(Q + G, 16, generator=generator), dim=1)
    expected = k_reciprocal_by_definition(features.double().numpy(), Q, k1, k2, weight=0.3)
    similarities = k_reciprocal(features[:Q], features[Q:], k1, k2)
    found = torch.cat([similarities(0, Q // 2), similarities(Q // 2, Q)])
    np.testing.assert_allclose(-found.numpy(), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture
def checkpoint_flag(trained) -> str:
    return f"--checkpoint {trained / 'runs/synthetic-tiny/last.pt'}"


def test_written_features_give_the_printed_results(trained, workplace, checkpoint_flag):
    flags = "--rerank 10 4 --features all.npz --json result.json"
    printed = output_of("evaluate.py", f"{checkpoint_flag} {flags}", workplace)
    result, arrays = json.loads((workplace / "result.json").read_text()), np.load(workplace / "all.npz")
    assert result["mAP"] == pytest.approx(json.loads(log_of(trained)[-1])["mAP"], abs=1e-6)
    tensors = {name: torch.tensor(arrays[name]) for name in arrays.files if arrays[name].dtype.kind in "if"}
    model = PromptSG.load(trained / "runs/synthetic-tiny/last.pt")
    for subset, folder in (("query", "query"), ("gallery", "bounding_box_test")):
        paths = [workplace / "data/synthetic" / folder / name for name in arrays[f"{subset}_names"][:9]]
        torch.testing.assert_close(tensors[f"{subset}_features"][:9], extract(model, paths), atol=1e-5, rtol=0)
        ids_and_cams = [(int(path.name[:4]), int(path.name[6])) for path in paths]
        assert ids_and_cams == list(zip(arrays[f"{subset}_ids"][:9], arrays[f"{subset}_cams"][:9]))
    pairs = [tensors[f"{subset}_{kind}"] for kind in ("features", "ids", "cams") for subset in ("query", "gallery")]
    metrics = rank_metrics(*pairs)
    assert metrics["mAP"] == pytest.approx(result["mAP"], abs=1e-6)
    assert [result[f"rank{k}"] for k in (1, 5, 10)] == pytest.approx(metrics["cmc"][[0, 4, 9]].tolist())
    reranked = rank_metrics(*pairs, k_reciprocal(*pairs[:2], 10, 4))
    assert reranked["mAP"] == pytest.approx(result["reranked"]["mAP"], abs=1e-6) != result["mAP"]
    for found in (result, result["reranked"]):
        assert f"mAP {found['mAP']:.1%}  Rank-1 {found['rank1']:.1%}" in printed


def log_of(folder) -> list[str]:
    return (folder / "runs/synthetic-tiny/log.jsonl").read_text().splitlines()


def test_evaluation_on_another_dataset(workplace, checkpoint_flag):
    """The same images under another name, and the other prompt. One of six identities has no image in the gallery."""
    for folder in ("query", "bounding_box_test"):  # evaluation does not need the training images
        shutil.copytree(workplace / "data/synthetic" / folder, workplace / "mine" / folder)
    gallery = workplace / "mine/bounding_box_test"
    pid = sorted({path.name[:4] for path in gallery.iterdir()} - {"0000"})[0]
    for path in gallery.glob(f"{pid}_*"):
        path.unlink()
    flags = f"{checkpoint_flag} --prompt simplified --dataset folder --data-root mine --json result.json"
    printed = output_of("evaluate.py", flags, workplace)
    result = json.loads((workplace / "result.json").read_text())
    assert "trained on synthetic, evaluated on folder" in printed
    assert (result["prompt"], result["dataset"], result["trained_on"]) == ("simplified", "folder", "synthetic")
    assert result["queries_skipped"] == 4 and "4 of 24 queries" in printed


def test_thresholds_are_those_of_all_pairs():
    """compare_pairs against numpy over all pairs of query and gallery."""
    generator = torch.Generator().manual_seed(0)
    query, gallery = (F.normalize(torch.randn(n, 8, generator=generator), dim=1) for n in (60, 90))
    tables = [torch.randint(0, high, (n,), generator=generator) for high in (5, 3) for n in (60, 90)]
    found = compare_pairs(query, gallery, *tables)
    query_ids, gallery_ids, query_cams, gallery_cams = (table.numpy() for table in tables)
    similarity, same_id = (query @ gallery.T).numpy(), query_ids[:, None] == gallery_ids
    same, different = similarity[same_id & (query_cams[:, None] != gallery_cams)], similarity[~same_id]
    assert found["same"] == pytest.approx(same.mean(), abs=1e-6)
    assert found["different"] == pytest.approx(different.mean(), abs=1e-6)
    for row in found["thresholds"]:
        assert (different > row["threshold"]).sum() == int(row["different_accepted"] * len(different))
        assert row["same_accepted"] == pytest.approx((same > row["threshold"]).mean(), abs=1e-6)
