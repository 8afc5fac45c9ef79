"""rank_metrics against a scorer that follows the definition, picture by picture."""

import random

import pytest
import torch

from evaluate import rank_metrics


def brute_force(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams):
    """The definition: drop what does not count, sort, walk down the list. Wrong pictures come first among equals."""
    average_precisions, first_hits = [], []
    for q in range(len(query)):
        ranking = []
        for g in range(len(gallery)):
            same_id, same_cam = gallery_ids[g] == query_ids[q], gallery_cams[g] == query_cams[q]
            if gallery_ids[g] == -1 or (same_id and same_cam):
                continue
            ranking.append((-(query[q] @ gallery[g]).item(), bool(same_id)))
        ranking.sort()
        hits = [right for _, right in ranking]
        if not any(hits):
            continue
        found, precisions = 0, []
        for rank, right in enumerate(hits, 1):
            if right:
                found += 1
                precisions.append(found / rank)
        average_precisions.append(sum(precisions) / len(precisions))
        first_hits.append(hits.index(True) + 1)
    N = len(first_hits)
    return sum(average_precisions) / N, [sum(hit <= k for hit in first_hits) / N for k in range(1, len(gallery) + 1)]


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
    problem = random_problem(seed, ties)
    metrics = rank_metrics(*problem)
    mean_average_precision, cmc = brute_force(*problem)
    assert metrics["mAP"] == pytest.approx(mean_average_precision, abs=1e-6)
    assert metrics["cmc"].tolist()[: len(cmc)] == pytest.approx(cmc[: len(metrics["cmc"])], abs=1e-6)


def test_small_tables_at_random_are_scored_by_definition_or_refused():
    """A hundred tables of a few people and cameras, many without any right picture."""
    rng, refused = random.Random(0), 0
    for _ in range(100):
        Q, G, people, cameras = rng.randint(1, 5), rng.randint(1, 9), rng.randint(1, 4), rng.randint(1, 3)
        tables = [[rng.randint(low, people) for _ in range(n)] for low, n in ((1, Q), (-1, G))]
        tables += [[rng.randint(1, cameras) for _ in range(n)] for n in (Q, G)]
        features = [torch.tensor([[rng.choice([-1.0, 0.0, 1.0]) for _ in range(2)] for _ in range(n)]) for n in (Q, G)]
        problem = (*features, *map(torch.tensor, tables))
        try:
            metrics = rank_metrics(*problem)
        except ValueError:
            refused += 1
            with pytest.raises(ZeroDivisionError):  # the definition has nothing to take the mean of
                brute_force(*problem)
        else:
            assert metrics["mAP"] == pytest.approx(brute_force(*problem)[0], abs=1e-6)
    assert 10 < refused < 90


def test_a_small_case_by_hand():
    """Ranking of the query: wrong, right, (same camera: left out), (junk: left out), wrong, right."""
    query = torch.tensor([[1.0]])
    gallery = torch.tensor([[0.9], [0.8], [0.7], [0.6], [0.5], [0.4]])
    ids, cams = torch.tensor([2, 1, 1, -1, 0, 1]), torch.tensor([1, 2, 1, 2, 2, 3])
    metrics = rank_metrics(query, gallery, torch.tensor([1]), ids, torch.tensor([1]), cams)
    assert metrics["mAP"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert metrics["cmc"][:3].tolist() == [0, 1, 1]


def test_the_order_of_the_gallery_does_not_matter():
    query, gallery, query_ids, gallery_ids, query_cams, gallery_cams = random_problem(0, ties=True)
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(1))
    a = rank_metrics(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams)
    b = rank_metrics(query, gallery[order], query_ids, gallery_ids[order], query_cams, gallery_cams[order])
    assert a["mAP"] == b["mAP"] and torch.equal(a["cmc"], b["cmc"])


def test_no_query_with_a_match_is_refused():
    one, two = torch.ones(1), 2 * torch.ones(1)
    with pytest.raises(ValueError, match="nothing to score"):
        rank_metrics(torch.ones(1, 4), torch.ones(1, 4), one, two, one, one)
    with pytest.raises(ValueError, match="nothing to score"):  # the only match is by the same camera
        rank_metrics(torch.ones(1, 4), torch.ones(1, 4), one, one, one, one)
