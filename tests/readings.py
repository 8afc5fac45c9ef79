"""Where the paper can be read two ways, each reading a patch of the model: python tests/readings.py

Prints the tables of docs/choices.md, by the rules and with the flags of tests/ablation.py. The trap, blocks that attend
across the batch, is scored with the test pictures in sorted and in shuffled order; on MSMT17 with OpenAI's weights:
python tests/readings.py --dataset msmt17 --backbone vit --output runs/readings-msmt17 --tables trap
"""

import argparse

import torch
import torch.nn.functional as F
from experiment import Patched, Row, cell, results, run
from torch import Tensor, nn

from clip import ResidualAttentionBlock, num_heads
from model import InteractionModule, Output

# --------------------------------------------------------------------------------- readings of the interaction module


class ReadOtherwise(Patched):
    """PromptSG with another interaction module, which starts with the same weights."""

    module = InteractionModule

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.interaction.__class__ = self.module


class OneRow(ReadOtherwise):
    """Eq. 7's one row goes through the blocks."""

    class module(InteractionModule):
        def aggregate(self, attention: Tensor, tokens: Tensor) -> Tensor:
            return self.run_blocks(attention.unsqueeze(1) @ self.value(tokens)).squeeze(1)

        def run_blocks(self, row: Tensor) -> Tensor:
            """(B, 1, D) -> (B, 1, D)"""
            return self.blocks(row)


class OneRowAcross(ReadOtherwise):
    """The same, but the blocks attend across the batch."""

    sees_its_batch = True

    class module(OneRow.module):
        def run_blocks(self, row: Tensor) -> Tensor:
            return self.blocks(row.transpose(0, 1)).transpose(0, 1)


class WeightedBehind(ReadOtherwise):
    """The tokens are weighted behind the blocks, not before."""

    class module(InteractionModule):
        def aggregate(self, attention: Tensor, tokens: Tensor) -> Tensor:
            return (attention.unsqueeze(2) * self.blocks(self.value(tokens))).sum(dim=1)


class PatchesAlone(ReadOtherwise):
    """Keys and values are the patches, without the global token."""

    class module(InteractionModule):
        def attention_map(self, text: Tensor, tokens: Tensor) -> Tensor:
            return F.pad(super().attention_map(text, tokens[:, 1:]), (1, 0))

        def aggregate(self, attention: Tensor, tokens: Tensor) -> Tensor:
            return super().aggregate(attention[:, 1:], tokens[:, 1:])


class ClassToken(ReadOtherwise):
    """Read out at the class token, which stands unweighted beside the re-weighted patches."""

    class module(InteractionModule):
        def aggregate(self, attention: Tensor, tokens: Tensor) -> Tensor:
            V = self.value(tokens)
            Z = tokens.shape[1] * attention.unsqueeze(2) * V
            return self.blocks(torch.cat([V[:, :1], Z[:, 1:]], dim=1))[:, 0]


class PostNorm(Patched):
    """The two blocks normalise behind attention and feed-forward, as METER's do."""

    class block(ResidualAttentionBlock):
        def forward(self, x: Tensor, causal: bool = False) -> Tensor:
            x = self.ln_1(x + self.attn(x, causal))
            return self.ln_2(x + self.mlp(x))

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.interaction.blocks:
            block.__class__ = self.block


class InTheWild(Patched):
    """IADT's module, mended: one row, layer norms, many heads, blocks, layer norm."""

    class module(InteractionModule):
        def __init__(self, dim: int):
            super().__init__(dim)
            del self.query, self.key, self.value
            self.attention = nn.MultiheadAttention(dim, num_heads(dim), batch_first=True)
            self.ln_text, self.ln_tokens, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

        def attend(self, text: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            """One row (B, 1, D) and the mean map of its heads (B, 1, 1 + M)."""
            query = self.ln_text(text).expand(len(tokens), -1).unsqueeze(1)
            keys = self.ln_tokens(tokens)
            return self.attention(query, keys, keys)

        def attention_map(self, text: Tensor, tokens: Tensor) -> Tensor:
            return self.attend(text, tokens)[1].squeeze(1)

        def run_blocks(self, row: Tensor) -> Tensor:
            return self.blocks(row)

        def forward(self, text: Tensor, tokens: Tensor) -> Tensor:
            return self.ln_post(self.run_blocks(self.attend(text, tokens)[0])).squeeze(1)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.interaction = self.module(self.classifier.in_features)


class InTheWildAcross(InTheWild):
    """As it is: the blocks attend across the batch."""

    sees_its_batch = True

    class module(InTheWild.module):
        def run_blocks(self, row: Tensor) -> Tensor:
            return self.blocks(row.transpose(0, 1)).transpose(0, 1)


# -------------------------------------------------------------------------------------------------- other readings


class BlockStates(Patched):
    """Triplet loss on the class token behind the last three blocks (of a ViT), by the paper's words alone."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.states = []
        for block in self.clip.visual.transformer.resblocks[-3:]:
            block.register_forward_hook(lambda block, inputs, output: self.states.append(output[:, 0]))

    def forward(self, images: Tensor) -> Output:
        self.states.clear()
        output = super().forward(images)
        return output._replace(triplet_features=[output.triplet_features[0], *self.states])


class TwoLayers(Patched):
    """An inversion network of two linear layers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        first, relu, _, _, *rest = self.inversion
        self.inversion = nn.Sequential(first, relu, *rest)


class FourLayers(Patched):
    """An inversion network of four linear layers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        first, relu, *rest = self.inversion
        more = nn.Linear(first.out_features, first.out_features)
        self.inversion = nn.Sequential(first, relu, more, nn.ReLU(), *rest)


class HiddenNorm(Patched):
    """Batch normalisation behind the last hidden state, not behind S*; S* starts out as large as ours."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        *hidden, last, norm = self.inversion
        nn.init.normal_(last.weight, std=norm.weight[0].item() * (2 / last.in_features) ** 0.5)
        self.inversion = nn.Sequential(*hidden, nn.BatchNorm1d(last.in_features), last)


OURS = Row("ours")
TRAP = "--eval-batch-size 64"
TABLES = {
    "module": [
        OURS,
        Row("read out at the class token, unweighted beside the re-weighted patches", patch=ClassToken),
        Row("post-norm blocks", patch=PostNorm),
        Row("tokens weighted behind the blocks", patch=WeightedBehind),
        Row("Eq. 7's one row through the blocks", patch=OneRow),
        Row("keys and values over the patches alone", patch=PatchesAlone),
        Row("IADT's module, mended: one row, layer norms, many heads", patch=InTheWild),
    ],
    "rest": [
        OURS,
        Row("triplet loss behind blocks 10, 11, 12", patch=BlockStates),
        Row("inversion network of two linear layers", patch=TwoLayers),
        Row("inversion network of four linear layers", patch=FourLayers),
        Row("batch normalisation behind the last hidden state", patch=HiddenNorm),
    ],
    "trap": [
        OURS,
        Row("IADT's module, blocks across the batch", TRAP, patch=InTheWildAcross),
        Row("Eq. 7's one row, blocks across the batch", TRAP, patch=OneRowAcross),
    ],
}
WAYS = ("composed", "simplified", "composed queries, simplified gallery", "composed, shuffled", "simplified, shuffled")


def print_table(title: str, rows: list[Row], args: argparse.Namespace) -> None:
    """mAP of each way to score, and how much less than ours scored in the same way."""
    print(f"\n{title}, seeds {' '.join(map(str, args.seeds))}: mAP, and less ours\n")
    print(f"| reading | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    ours = results(OURS, args)
    for row in rows:
        found, cells = results(row, args), []
        for way in WAYS:
            values = [x[way]["mAP"] for x in found if way in x]
            less = [value - y[way.removesuffix(", shuffled")]["mAP"] for value, y in zip(values, ours)]
            cells.append(f"{cell(values)} ({cell(less, '+')})" if values else "")
        print(f"| {row.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run(TABLES, __doc__, "runs/ablation", print_table)
