"""Similarities of same and different identities, to choose a threshold."""

import torch
from torch import Tensor

SHARES = (0.01, 0.001)  # of different pairs that a threshold accepts
MOST_PAIRS = 10**7


def compare_pairs(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor,
    gallery_cams: Tensor,
) -> dict:
    """Compare query and gallery features of length 1, (Q, D) and (G, D), by cosine similarity.

    Same pairs come from two cameras, as in the evaluation. At most ten million different pairs are compared: those of
    a fixed random choice of queries and gallery images. Junk (identity -1) must not be in the gallery.

    Returns "same" and "different" (mean similarities), and "thresholds": a list of "different_accepted" (share),
    "threshold" and "same_accepted" (share). A pair is accepted if its similarity is above the threshold.
    """
    order = gallery_ids.argsort()  # the images of an identity are contiguous
    starts = torch.searchsorted(gallery_ids[order], query_ids).tolist()
    stops = torch.searchsorted(gallery_ids[order], query_ids, right=True).tolist()
    same = []
    for feature, camera, start, stop in zip(query, query_cams, starts, stops):
        own = order[start:stop]
        same.append(gallery[own[gallery_cams[own] != camera]] @ feature)
    same = torch.cat(same)

    generator = torch.Generator().manual_seed(0)
    q = torch.randperm(len(query), generator=generator)[:1000].to(query.device)
    g = torch.randperm(len(gallery), generator=generator)[: MOST_PAIRS // len(q)].to(query.device)
    different = (query[q] @ gallery[g].T)[query_ids[q, None] != gallery_ids[g]]

    thresholds = []
    for share in SHARES:
        threshold = different.kthvalue(len(different) - int(share * len(different))).values
        accepted = (same > threshold).float().mean().item()
        thresholds.append({"different_accepted": share, "threshold": threshold.item(), "same_accepted": accepted})
    return {"same": same.mean().item(), "different": different.mean().item(), "thresholds": thresholds}


def describe_pairs(pairs: dict) -> str:
    """Return a small table of what `compare_pairs` returns."""
    lines = [f"mean similarity: {pairs['same']:.3f} same identity, {pairs['different']:.3f} different identities"]
    for row in pairs["thresholds"]:
        lines.append(
            f"threshold {row['threshold']:.3f} accepts {row['different_accepted']:.1%} of different pairs "
            f"and {row['same_accepted']:.1%} of same pairs"
        )
    return "\n".join(lines)
