"""Each loss equals a loop over the equation of the paper, in double precision."""

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

import losses

# Images per identity: equal, unequal, one identity with a single image, single images only.
BATCHES = [[0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 2], [3, 1, 3, 3, 2, 1, 7, 3, 2], [4, 2, 0, 1, 3]]


def features(rows: int, seed: int, width: int = 16) -> torch.Tensor:
    return torch.randn(rows, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sim(a, b) -> float:
    return cosine_similarity(a, b, dim=0).item()


def log_ratio(anchors, candidates, n: int, p: int, tau: float) -> float:
    """Return log( exp(sim(a_n, c_p) / tau) / sum_i exp(sim(a_n, c_i) / tau) ), a term of Eqs. 2, 3, 5 and 6."""
    denominator = sum(math.exp(sim(anchors[n], candidate) / tau) for candidate in candidates)
    return math.log(math.exp(sim(anchors[n], candidates[p]) / tau) / denominator)


@pytest.mark.parametrize("tau", [0.01, 1.0])
def test_contrastive_loss_matches_eqs_2_and_3(tau):
    v, l, N = features(7, 1), features(7, 2), 7
    i2t = -sum(log_ratio(v, l, n, n, tau) for n in range(N)) / N
    t2i = -sum(log_ratio(l, v, n, n, tau) for n in range(N)) / N
    assert losses.contrastive_loss(v, l, tau).item() == pytest.approx(i2t + t2i, abs=1e-6)


@pytest.mark.parametrize("tau", [0.01, 1.0])
@pytest.mark.parametrize("ids", BATCHES)
def test_supcon_loss_matches_eqs_4_to_6(ids, tau):
    N = len(ids)
    v, l = features(N, 1), features(N, 2)

    def direction(anchors, candidates):
        positives = [(n, p) for n in range(N) for p in range(N) if ids[p] == ids[n]]
        return -sum(log_ratio(anchors, candidates, n, p, tau) for n, p in positives) / N

    labels = torch.tensor(ids)
    expected = {"i2t": direction(v, l), "t2i": direction(l, v)}
    assert losses.supcon_loss(v, l, labels, tau).item() == pytest.approx(sum(expected.values()), abs=1e-6)
    for name in expected:
        assert losses.supcon_loss(v, l, labels, tau, [name]).item() == pytest.approx(expected[name], abs=1e-6)
    assert losses.supcon_loss(v, l, labels, tau, []) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_identity_loss_matches_eq_8(smoothing):
    N, K = 5, 9
    logits, labels = features(N, 3, K), torch.tensor([4, 0, 8, 4, 2])
    total = 0.0
    for n in range(N):
        denominator = sum(math.exp(logit) for logit in logits[n])
        for j in range(K):
            y = (1 - smoothing) * (j == labels[n].item()) + smoothing / K
            total -= y * math.log(math.exp(logits[n, j]) / denominator)
    assert losses.identity_loss(logits, labels, smoothing).item() == pytest.approx(total / N, abs=1e-6)


@pytest.mark.parametrize("margin", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("ids", BATCHES)
def test_triplet_loss_matches_eq_9_with_hard_mining(ids, margin):
    N = len(ids)
    f = features(N, 4)
    total = 0.0
    for a in range(N):
        distances = [math.sqrt(sum((x - y) ** 2 for x, y in zip(f[a].tolist(), f[b].tolist()))) for b in range(N)]
        d_p = max(distances[b] for b in range(N) if ids[b] == ids[a])
        d_n = min(distances[b] for b in range(N) if ids[b] != ids[a])
        total += max(d_p - d_n + margin, 0)
    loss = losses.triplet_loss(f, torch.tensor(ids), margin)
    assert loss.item() == pytest.approx(total / N, abs=1e-6)


def test_triplet_gradient_is_finite_for_identical_features():
    f = torch.ones(4, 8, requires_grad=True)
    losses.triplet_loss(f, torch.tensor([0, 0, 1, 1])).backward()
    assert f.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_computed_in_float32(dtype):
    f, l, labels = features(8, 1).to(dtype), features(8, 2).to(dtype), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    found = [losses.supcon_loss(f, l, labels, 0.01), losses.contrastive_loss(f, l, 0.01)]
    for loss in (*found, losses.triplet_loss(f, labels), losses.identity_loss(f, labels)):
        assert loss.dtype == torch.float32 and loss.shape == ()
