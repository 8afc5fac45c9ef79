"""What evaluate.py shows and gives away: re-ranking, attention, drawings, features, export."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate


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
    jaccard = np.array([[1 - np.minimum(V[q], V[g]).sum() / np.maximum(V[q], V[g]).sum() for g in range(Q, N)] for q in range(Q)])
    return (1 - weight) * jaccard + weight * d[:Q, Q:]


@pytest.mark.parametrize("Q, G, identities", [(12, 70, 8), (5, 40, 40), (3, 9, 2), (40, 160, 6)])
def test_re_ranking_follows_the_definition(Q, G, identities):
    generator = torch.Generator().manual_seed(Q)
    centres = torch.randn(identities, 16, generator=generator)
    who = torch.randint(identities, (Q + G,), generator=generator)
    features = F.normalize(centres[who] + 0.8 * torch.randn(Q + G, 16, generator=generator), dim=1)
    expected = k_reciprocal_by_definition(features.double().numpy(), Q, k1=20, k2=6, weight=0.3)
    rows = evaluate.k_reciprocal(features[:Q], features[Q:])
    found = torch.cat([rows(0, Q // 2), rows(Q // 2, Q)])
    assert found.shape == (Q, G)
    np.testing.assert_allclose(-found.numpy(), expected, atol=1e-5)
