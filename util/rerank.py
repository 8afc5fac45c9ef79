"""Re-ranking with k-reciprocal encoding (Zhong et al., CVPR 2017), in bounded memory."""

from collections.abc import Callable

import torch
from torch import Tensor

from util.device import show_progress


def k_reciprocal(
    query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> Callable[[int, int], Tensor]:
    """Re-rank with k-reciprocal encoding, in the paper's symbols. Return the `similarities` of `rank_metrics`.

    A similarity is -((1 - weight) * Jaccard distance + weight * d). As in the authors' code, d(i, j) is the squared
    Euclidean distance of images i and j, divided by the largest squared distance of image i.

    Args:
        query, gallery: L2-normalised features, (Q, D) and (G, D).
        k1, k2: numbers of neighbours for the k-reciprocal sets and for local query expansion.
        weight: lambda of the paper.
    """
    features = torch.cat([query, gallery])
    Q, N = len(query), len(features)
    neighbours, farthest = find_neighbours(features, min(k1 + 1, N))
    # V is sparse: images i in ascending order, their neighbours j, and the weights V_ij.
    i, j, V = encode_neighbours(features, neighbours, farthest, half=round(k1 / 2) + 1)

    # Local query expansion: each row of V becomes the mean of the rows of the image's k2 nearest neighbours.
    nearest = neighbours[:, :k2]
    first = torch.searchsorted(i, torch.arange(N + 1, device=i.device))  # first entry of each row
    entries, counts = join_runs(first[nearest.flatten()], first[nearest.flatten() + 1])
    owner = torch.arange(N, device=i.device).repeat_interleave(nearest.shape[1]).repeat_interleave(counts)
    pairs, position = torch.unique(owner * N + j[entries], return_inverse=True)
    V = V.new_zeros(len(pairs)).index_add(0, position, V[entries] / nearest.shape[1])
    i, j = pairs // N, pairs % N

    # Inverted index: the gallery's entries of V, sorted by neighbour.
    first = torch.searchsorted(i, torch.arange(Q + 1, device=i.device)).tolist()
    order = first[Q] + j[first[Q] :].argsort(stable=True)
    first_of_neighbour = torch.searchsorted(j[order], torch.arange(N + 1, device=i.device))

    def similarities(begin: int, end: int) -> Tensor:
        chunk = weight / farthest[begin:end, None] * (2 * query[begin:end] @ gallery.T - 2)
        for q, similarity in enumerate(chunk, begin):
            own = slice(first[q], first[q + 1])
            entries, counts = join_runs(first_of_neighbour[j[own]], first_of_neighbour[j[own] + 1])
            minima = torch.minimum(V[order[entries]], V[own].repeat_interleave(counts))
            overlap = similarity.new_zeros(N - Q).index_add(0, i[order[entries]] - Q, minima)  # sums of min(V_q, V_g)
            # Jaccard distance. Minima and maxima of two rows of V, each of sum 1, add up to 2.
            similarity -= (1 - weight) * (1 - overlap / (2 - overlap))
        return chunk

    return similarities


def join_runs(starts: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """Concatenate the ranges from starts (R,) to stops (R,). Return the concatenation and the counts (R,)."""
    counts = stops - starts
    offsets = (starts - counts.cumsum(0) + counts).repeat_interleave(counts)
    return offsets + torch.arange(len(offsets), device=offsets.device), counts


def find_neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest images of each image, itself first (N, k), and its largest squared distance (N,)."""
    N = len(features)
    neighbours = torch.empty(N, k, dtype=torch.long, device=features.device)
    farthest = features.new_empty(N)
    chunk = 1 + 2**25 // N  # 128 MB of similarities at a time
    for begin in range(0, N, chunk):
        part = slice(begin, begin + chunk)
        similarities = features[part] @ features.T  # (chunk, N)
        neighbours[part] = similarities.topk(k).indices
        farthest[part] = (2 - 2 * similarities.amin(dim=1)).clamp(min=1e-12)  # 0 if all images are the same
        show_progress(min(begin + chunk, N), N, "images compared")
    return neighbours, farthest


def encode_neighbours(
    features: Tensor, neighbours: Tensor, farthest: Tensor, half: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k-reciprocal neighbours of each image, expanded by those of `half` neighbours (R* of the paper).

    Returns images i in ascending order, their neighbours j, and weights proportional to exp(-d(i, j)) with a sum of 1
    for each i: three tensors of equal length.
    """
    N = len(features)

    def mutual(neighbours: Tensor) -> Tensor:
        """Return which of an image's neighbours (N, k) are k-reciprocal: the image is their neighbour, too (N, k)."""
        images = torch.arange(N, device=neighbours.device)
        parts = zip(neighbours.split(1024), images.split(1024))
        return torch.cat([(neighbours[part] == i[:, None, None]).any(dim=2) for part, i in parts])

    near, near_half = mutual(neighbours), mutual(neighbours[:, :half])
    encoded = []
    for begin in range(0, N, 1024):
        part = slice(begin, begin + 1024)
        R = neighbours[part].where(near[part], -1)  # (n, k), -1: not reciprocal
        theirs = neighbours[neighbours[part], :half]  # (n, k, half) neighbours of neighbours
        is_theirs = near_half[neighbours[part]] & near[part].unsqueeze(2)
        shared = is_theirs & (theirs.unsqueeze(3) == R[:, None, None]).any(dim=3)
        added = 3 * shared.sum(dim=2) > 2 * is_theirs.sum(dim=2)  # (n, k) more than two thirds are shared
        expansion = theirs.where(is_theirs & added.unsqueeze(2), -1).flatten(1)
        R = torch.cat([R, expansion], dim=1).sort(dim=1).values  # R*, sorted, with repetitions
        is_first = (R >= 0) & (R.diff(dim=1, prepend=torch.full_like(R[:, :1], -1)) > 0)
        i, j = is_first.nonzero()[:, 0] + begin, R[is_first]
        weights = ((2 * (features[i] * features[j]).sum(dim=1) - 2) / farthest[i]).exp()
        total = features.new_zeros(N).index_add(0, i, weights)
        encoded.append((i, j, weights / total[i]))
        show_progress(min(begin + 1024, N), N, "images encoded")
    return tuple(map(torch.cat, zip(*encoded)))
