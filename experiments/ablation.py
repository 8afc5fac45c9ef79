"""The contribution of language: the rows of Tables 2 to 5, and further controls: python experiments/ablation.py

Trains each row with three seeds and prints the tables of docs/language.md. Each seed has its own drawings, with 192
test identities. No hyperparameter was chosen on them. The decisive experiment needs a GPU:

python experiments/ablation.py --dataset market1501 --backbone vit --tables parts query knowledge
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Row, Variant, difference, run, spread
from torch import Tensor

import losses
from util.device import run_script

# ------------------------------------------------------------------------------------------------- controls


class ConstantQuery(Variant):
    """The query of the interaction module is always "A photo of a person". SupCon does not change."""

    def interact(self, tokens: Tensor, text: Tensor) -> Tensor:
        return super().interact(tokens, self.query(text))

    def query(self, text: Tensor) -> Tensor:
        return self.simplified_text


class OthersQuery(ConstantQuery):
    """The query is the text of another image: half a batch away, so in training of another identity."""

    def query(self, text: Tensor) -> Tensor:
        return text.roll(len(text) // 2, dims=0)


class LearnedQuery(ConstantQuery):
    """The query is a learned vector with random initial values."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.learned = torch.nn.Parameter(torch.randn_like(self.simplified_text))

    def query(self, text: Tensor) -> Tensor:
        return self.learned


def image_supcon(image: Tensor, text: Tensor, labels: Tensor, temperature: float, directions: list[str]) -> Tensor:
    """Compute SupCon between images (Khosla et al. 2020), times 2 for the two directions that it replaces."""
    same_image = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels[None, :]) & ~same_image
    image = F.normalize(losses.full_precision(image), dim=1)
    log_p = (image @ image.T / temperature).masked_fill(same_image, -torch.inf).log_softmax(dim=1)
    return -2 * log_p.masked_fill(~positive, 0).sum(dim=1).mean()


# ----------------------------------------------------------------------------------------------------- rows

FULL = Row("full", paper="94.6")
BASELINE = Row("baseline", "--baseline", prompt="simplified", paper="86.4")
SIMPLIFIED = Row("trained with the simplified prompt (no SupCon)", "--train-prompt simplified", prompt="simplified")
WITHOUT_MODULE = Row("without the interaction module", "--without-interaction", prompt="simplified", paper="89.4")
UNTRAINED = Row("CLIP before training", "--epochs 1 --lr-visual 1e-12 --lr-new 1e-12", prompt="none")
IMAGES_ONLY = Row("SupCon between images, learned query: no text", model=LearnedQuery, supcon=image_supcon)
MAIN = [FULL, BASELINE, SIMPLIFIED._replace(paper="92.0"), WITHOUT_MODULE]
WITH_TEXT = [row for row in MAIN if row is not BASELINE]  # the baseline does not use the text encoder
LONG = "--epochs 40 --decay-every 30 --lr-visual 2e-4 --lr-new 1e-3"


def varied(rows: list[Row], suffix: str, **changes) -> list[Row]:
    """Return the rows with a suffix to their names and other fields, without results of the paper."""
    return [row._replace(name=f"{row.name}, {suffix}", paper="", **changes) for row in rows]


TABLES = {  # the first row is the reference
    "parts": [
        *MAIN,
        UNTRAINED,
        FULL._replace(name="full, simplified prompt at test time", prompt="simplified", paper="94.1"),
        Row("without i2t", "--without-i2t", paper="92.8"),
        Row("without t2i", "--without-t2i", paper="93.0"),
        Row("0 blocks, simplified prompt at test time", "--blocks 0", prompt="simplified", paper="91.1"),
        Row("1 block, simplified prompt at test time", "--blocks 1", prompt="simplified", paper="93.0"),
        Row("lambda 0.1", "--supcon-weight 0.1"),
        Row("lambda 2", "--supcon-weight 2"),
    ],
    "query": [
        FULL,
        Row('query always "A photo of a person"', model=ConstantQuery),
        Row("query composed for another identity", model=OthersQuery),
        Row("query is a learned vector", model=LearnedQuery),
        IMAGES_ONLY,
    ],
    "knowledge": [
        *MAIN,
        *varied(WITH_TEXT, "text encoder random", pretrained="visual"),
        *varied(MAIN, "visual encoder random", pretrained="text"),
        *varied(WITH_TEXT, "both random", pretrained="none"),
    ],
    "longer": [
        FULL._replace(name="full, 40 epochs", flags=LONG),
        BASELINE._replace(name="baseline, 40 epochs", flags=f"--baseline {LONG}"),
        Row("full, 40 epochs, both random", LONG, pretrained="none"),
        Row("baseline, 40 epochs, both random", f"--baseline {LONG}", prompt="simplified", pretrained="none"),
    ],
}


def print_table(title: str, rows: list[Row], found: Callable) -> None:
    """Print mAP, its difference to the first row, Rank-1, and the mAP of text-to-image retrieval."""
    print(f"\n{title}\n\n| row | paper | mAP | difference to {rows[0].name} | R-1 | text to image |")
    print("|---|---|---|---|---|---|")
    reference = [result[rows[0].prompt]["mAP"] for result in found(rows[0])]
    for row in rows:
        values = [result[row.prompt]["mAP"] for result in found(row)]
        less = "" if row is rows[0] else difference(values, reference)
        rank1 = spread([result[row.prompt]["rank1"] for result in found(row)])
        has_text = "text to image" in found(row)[0]
        text = spread([result["text to image"] for result in found(row)]) if has_text else ""
        print(f"| {row.name} | {row.paper} | {spread(values)} | {less} | {rank1} | {text} |")


if __name__ == "__main__":
    run_script(lambda: run(TABLES, __doc__, print_table))
