"""The training losses of PromptSG, Eqs. 2-6, 8 and 9; their sum, Eq. 10, is in train.py.

The paper prints Eqs. 2, 3, 5, 6 and 8 without the minus sign that makes them losses; it is restored here. Where the
paper leaves a choice, docs/choices.md gives the readings. B images, D joint embedding, K identities.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Cast half precision to float32; leave other types unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log_probabilities(anchors: Tensor, candidates: Tensor, temperature: float | Tensor) -> Tensor:
    """Compute the log softmax over the candidates of cosine similarity / tau (Eq. 1): (B, D), (B, D) -> (B, B)."""
    anchors = F.normalize(full_precision(anchors), dim=1)
    candidates = F.normalize(full_precision(candidates), dim=1)
    return (anchors @ candidates.T / temperature).log_softmax(dim=1)


def contrastive_loss(image: Tensor, text: Tensor, temperature: float | Tensor) -> Tensor:
    """Compute L_i2t + L_t2i of Eqs. 2 and 3, where an image's positive is its own text: (B, D), (B, D) -> scalar.

    PromptSG is not trained with it, but with Eqs. 4-6. demo/tiny_clip.py pre-trains the demo's CLIP with it.
    """
    i2t = -log_probabilities(image, text, temperature).diagonal().mean()  # Eq. 2
    t2i = -log_probabilities(text, image, temperature).diagonal().mean()  # Eq. 3
    return i2t + t2i


def supcon_direction(anchors: Tensor, candidates: Tensor, labels: Tensor, temperature: float | Tensor) -> Tensor:
    """Compute Eq. 5 (anchors = images, candidates = texts) or Eq. 6 (exchanged): (B, D), (B, D), (B,) -> scalar.

    As printed, the sum over all positives: the candidates of the anchor's identity, its own pair included. Khosla et
    al. and CLIP-ReID divide by their number, so with 4 images per identity our loss is 4 times theirs.
    """
    positive = labels[:, None] == labels[None, :]  # (B, B)
    log_p = log_probabilities(anchors, candidates, temperature)
    return -(log_p * positive).sum(dim=1).mean()


def supcon_loss(
    image: Tensor,
    text: Tensor,
    labels: Tensor,
    temperature: float | Tensor,
    directions: Sequence[str] = ("i2t", "t2i"),
) -> Tensor:
    """Compute L_SupCon of Eq. 4: image (B, D), text (B, D), labels (B,) -> scalar, 0 without any direction."""
    pairs = {"i2t": (image, text), "t2i": (text, image)}  # Eq. 5, Eq. 6
    zero = torch.zeros((), device=image.device)
    return sum((supcon_direction(*pairs[direction], labels, temperature) for direction in directions), zero)


def identity_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Compute L_ID of Eq. 8, cross-entropy: logits (B, K), labels (B,) -> scalar, the mean over the batch.

    With label smoothing e (our choice), y_j is 1 - e + e / K for the right identity and e / K for the others. The
    paper's factor 1/K is read as the mean over the batch: taken literally, it would make the loss 751 times smaller
    on Market-1501.
    """
    return F.cross_entropy(full_precision(logits), labels, label_smoothing=label_smoothing)


def triplet_loss(features: Tensor, labels: Tensor, margin: float = 0.3) -> Tensor:
    """Compute L_Triplet of Eq. 9, batch-hard (Hermans et al., 2017): features (B, D), labels (B,) -> scalar.

    For every anchor, d_p is the Euclidean distance to the farthest image of its identity in the batch, d_n to the
    nearest image of another identity; the mean over the anchors. The features are not normalised.
    """
    features = full_precision(features)
    # Without matrix products, which lose the digits of small distances.
    distance = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")  # (B, B)
    same = labels[:, None] == labels[None, :]
    d_p = distance.masked_fill(~same, 0).amax(dim=1)
    d_n = distance.masked_fill(same, torch.inf).amin(dim=1)
    return F.relu(d_p - d_n + margin).mean()
