"""Similarities of pairs of the same identity and of different identities, to choose a threshold."""

import torch
from torch import Tensor

SHARES = (0.01, 0.001)  # shares of different pairs that the thresholds accept
MAX_PAIRS = 10**7


def compare_pairs(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor,
    gallery_cams: Tensor,
) -> dict:
    """Compare query and gallery images by the cosine similarity of L2-normalised features, (Q, D) and (G, D).

    A same pair has the same identity and two cameras, as in the evaluation. Different pairs are limited to ten million,
    from a fixed random sample of queries and gallery images. The gallery must not contain junk (identity -1).

    Returns "same" and "different" (mean similarities) and "thresholds", a list of dicts with "threshold" and the shares
    of accepted pairs, "different_accepted" and "same_accepted". A pair above the threshold is accepted.
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
    g = torch.randperm(len(gallery), generator=generator)[: MAX_PAIRS // len(q)].to(query.device)
    different = (query[q] @ gallery[g].T)[query_ids[q, None] != gallery_ids[g]]

    thresholds = []
    for share in SHARES:
        threshold = different.kthvalue(len(different) - int(share * len(different))).values
        accepted = (same > threshold).float().mean().item()
        thresholds.append({"different_accepted": share, "threshold": threshold.item(), "same_accepted": accepted})
    return {"same": same.mean().item(), "different": different.mean().item(), "thresholds": thresholds}


def describe_pairs(pairs: dict) -> str:
    """Return the result of `compare_pairs` as lines of text."""
    lines = [f"mean similarity: {pairs['same']:.3f} same identity, {pairs['different']:.3f} different identities"]
    for row in pairs["thresholds"]:
        lines.append(
            f"threshold {row['threshold']:.3f} accepts {row['different_accepted']:.1%} of different pairs "
            f"and {row['same_accepted']:.1%} of same pairs"
        )
    return "\n".join(lines)
