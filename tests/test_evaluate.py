"""rank_metrics against a scorer that follows the definition, picture by picture."""

import random

import pytest
import torch

from evaluate import rank_metrics


def brute_force(similarities, query_ids, gallery_ids, query_cams, gallery_cams):
    """The definition: drop what does not count, sort, walk down the list. Wrong pictures come first among equals."""
    average_precisions, first_hits = [], []
    for row, query_id, query_cam in zip(similarities.tolist(), query_ids.tolist(), query_cams.tolist()):
        candidates = zip(row, gallery_ids.tolist(), gallery_cams.tolist())
        counted = [(s, i == query_id) for s, i, cam in candidates if i != -1 and (i, cam) != (query_id, query_cam)]
        counted.sort(key=lambda candidate: (-candidate[0], candidate[1]))
        hits = [rank for rank, (_, is_right) in enumerate(counted, 1) if is_right]
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
    if ties:  # few different features of exactly representable products
        query, gallery = query.sign(), gallery[:7].sign()[integers(0, 7, G)]
    # Identity -1 is junk, 0 a distractor that no query has, and 12 and 13 are missing in the gallery.
    return query, gallery, integers(1, 14, Q), integers(-1, 12, G), integers(0, 3, Q), integers(0, 3, G)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_rank_metrics_follow_the_definition(seed, ties):
    query, gallery, *tables = random_problem(seed, ties)
    metrics = rank_metrics(query, gallery, *tables)
    mean_average_precision, cmc = brute_force(query @ gallery.T, *tables)
    assert metrics["mAP"] == pytest.approx(mean_average_precision, abs=1e-6)
    assert metrics["cmc"].tolist()[: len(cmc)] == pytest.approx(cmc[: len(metrics["cmc"])], abs=1e-6)


def test_small_tables_at_random_are_scored_by_definition_or_refused():
    """A hundred tables of a few people and cameras, many without any right picture."""
    rng, refused = random.Random(0), 0
    for _ in range(100):
        Q, G, people, cameras = rng.randint(1, 5), rng.randint(1, 9), rng.randint(1, 4), rng.randint(1, 3)
        tables = [[rng.randint(low, people) for _ in range(n)] for low, n in ((1, Q), (-1, G))]
        tables += [[rng.randint(1, cameras) for _ in range(n)] for n in (Q, G)]
        tables = [torch.tensor(table) for table in tables]
        query, gallery = (torch.tensor([rng.choices([-1.0, 0.0, 1.0], k=2) for _ in range(n)]) for n in (Q, G))
        try:
            metrics = rank_metrics(query, gallery, *tables)
        except ValueError as error:
            assert "nothing to score" in str(error)
            refused += 1
            with pytest.raises(ZeroDivisionError):  # the definition has nothing to take the mean of
                brute_force(query @ gallery.T, *tables)
        else:
            assert metrics["mAP"] == pytest.approx(brute_force(query @ gallery.T, *tables)[0], abs=1e-6)
    assert 10 < refused < 90


def test_a_small_case_by_hand():
    """Ranking of the query: wrong, right, (same camera: left out), (junk: left out), wrong, right."""
    query = torch.tensor([[1.0]])
    gallery = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5], [0.4]])
    ids, cams = torch.tensor([2, 1, 1, -1, 0, 1]), torch.tensor([1, 2, 1, 2, 2, 3])
    metrics = rank_metrics(query, gallery, torch.tensor([1]), ids, torch.tensor([1]), cams)
    assert metrics["mAP"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert metrics["cmc"][:3].tolist() == [0, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_not_ranked(bad):
    ones = torch.ones(2, dtype=torch.long)
    features = torch.tensor([[1.0, 0.0], [bad, 0.0]])
    with pytest.raises(ValueError, match="diverged"):
        rank_metrics(features[:1], features, ones[:1], ones, ones[:1], 1 + ones)
