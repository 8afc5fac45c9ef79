"""What does language do? Every row of Tables 2 to 5, and the controls that the tables lack: python tests/ablation.py

Trains each row with each seed, a process a core, and prints the tables of docs/miniature.md. On the demo's people every
seed has a drawing of its own, with 192 people to be scored on; no setting was chosen on them. What is done is found in
runs/ablation-synthetic-tiny, a folder a row and seed, and not done again.

With a GPU and OpenAI's weights, the same rows and controls on Market-1501 (flags it does not know go to train.py):
python tests/ablation.py --dataset market1501 --backbone vit --tables parts query "full model"
The run on docs/miniature.md: --dataset market1501 --clip-weights random --epochs 14 --steps 100 --decay-every 10
--lr-visual 1e-4 --lr-new 1e-3 --seeds 0 --tables "both pre-trained" query
"""

import torch
import torch.nn.functional as F
from experiment import Patched, Row, run
from torch import Tensor

import losses

# ------------------------------------------------------------------- controls: patches, and no flags of the product


class ConstantQuery(Patched):
    """SupCon as in the full model, but the interaction module's query is always "A photo of a person"."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        attend = self.interaction.attention_map
        self.interaction.attention_map = lambda text, tokens: attend(self.query(text), tokens)

    def query(self, text: Tensor) -> Tensor:
        return self.simplified_text


class OthersQuery(ConstantQuery):
    """The query composed for another picture: half a batch away, which in training is always somebody else's."""

    def query(self, text: Tensor) -> Tensor:
        return text.roll(len(text) // 2, dims=0)


class LearnedQuery(ConstantQuery):
    """The query is a vector that is learned, starting from random numbers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.learned = torch.nn.Parameter(torch.randn_like(self.simplified_text))

    def query(self, text: Tensor) -> Tensor:
        return self.learned


class PicturesOnly(LearnedQuery):
    """SupCon between the pictures themselves (Khosla et al. 2020), and a learned query: no text encoder anywhere."""

    @staticmethod
    def supcon(image: Tensor, text: Tensor, labels: Tensor, temperature: float, directions: list[str]) -> Tensor:
        itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        positive = (labels[:, None] == labels[None, :]) & ~itself
        image = F.normalize(losses.full_precision(image), dim=1)
        log_p = (image @ image.T / temperature).masked_fill(itself, -torch.inf).log_softmax(dim=1)
        return -2 * log_p.masked_fill(~positive, 0).sum(dim=1).mean()  # two directions in one


# ------------------------------------------------------------------------------------------------------ rows

FULL = Row("full", paper="94.6 / 97.0")
BASELINE = Row("baseline", "--baseline", "simplified", "86.4 / 93.3")
MAIN = [
    BASELINE,
    Row("trained with the simplified prompt", "--train-prompt simplified", "simplified", "92.0 / 96.3"),
    Row("without MIM", "--without-interaction", "composed", "89.4 / 95.3"),
    FULL,
]
UNTRAINED = "--epochs 1 --steps 1 --lr-visual 1e-9 --lr-new 1e-9"
LONG = "--epochs 40 --decay-every 30 --lr-visual 2e-4 --lr-new 1e-3"


def varied(rows: list[Row], more: str = "", **changes) -> list[Row]:
    return [row._replace(flags=f"{more} {row.flags}".strip(), **changes) for row in rows]


# Every table: rows, of which "full" is the one that the others are compared with.
TABLES = {
    "parts": [
        Row("CLIP before any training", f"--baseline {UNTRAINED}", "simplified"),
        Row("full, before any training", UNTRAINED),
        *MAIN,
        Row("full, simplified prompt at test time", "", "simplified", "94.1"),
        Row("without i2t", "--without-i2t", "composed", "92.8 / 96.7"),
        Row("without t2i", "--without-t2i", "composed", "93.0 / 96.7"),
        Row("0 blocks, simplified at test time", "--blocks 0", "simplified", "91.1"),
        Row("1 block, simplified at test time", "--blocks 1", "simplified", "93.0"),
        Row("lambda 0.1", "--supcon-weight 0.1"),
        Row("lambda 2", "--supcon-weight 2"),
    ],
    "query": [
        FULL,
        Row('query: always "A photo of a person"', patch=ConstantQuery),
        Row("query: composed for another identity", patch=OthersQuery),
        Row("query: a learned vector", patch=LearnedQuery),
        Row("SupCon between pictures, learned query: no text", patch=PicturesOnly),
    ],
    "full model": [
        FULL,
        FULL._replace(name="full, text encoder random: language that knows nothing", paper="", pretrained="visual"),
        FULL._replace(name="full, visual encoder random", paper="", pretrained="text"),
        FULL._replace(name="full, both random", paper="", pretrained="none"),
    ],
    "both pre-trained": MAIN,
    "only visual pre-trained": varied(MAIN, pretrained="visual"),
    "only text pre-trained": varied(MAIN, pretrained="text"),
    "nothing pre-trained": varied(MAIN, pretrained="none"),
    "both pre-trained, longer": varied([BASELINE, FULL], LONG),
    "nothing pre-trained, longer": varied([BASELINE, FULL], LONG, pretrained="none"),
}


if __name__ == "__main__":
    run(TABLES, __doc__)
