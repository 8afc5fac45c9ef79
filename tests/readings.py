"""Where the paper can be read two ways, each reading a patch of the model: python tests/readings.py

Prints the tables of docs/choices.md, by the rules and with the flags of tests/ablation.py. The trap, blocks that attend
across the batch, is scored with the test pictures in sorted and in shuffled order; on MSMT17 with OpenAI's weights:
python tests/readings.py --dataset msmt17 --backbone vit --tables trap
"""

import torch
from experiment import Patched, Row, print_ways, run
from torch import Tensor, nn

from clip import ResidualAttentionBlock, num_heads
from model import Output


class Aggregate(Patched):
    """Another way from attention map (B, 1 + M) and tokens (B, 1 + M, D) to z (B, D)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.interaction.aggregate = self.aggregate


class OneRow(Aggregate):
    """Eq. 7's one row goes through the blocks."""

    def aggregate(self, attention: Tensor, tokens: Tensor) -> Tensor:
        row = attention.unsqueeze(1) @ self.interaction.value(tokens)  # (B, 1, D)
        return self.interaction.blocks(row).squeeze(1)


class WeightedBehind(Aggregate):
    """The tokens are weighted behind the blocks, not before."""

    def aggregate(self, attention: Tensor, tokens: Tensor) -> Tensor:
        return (attention.unsqueeze(2) * self.interaction.blocks(self.interaction.value(tokens))).sum(dim=1)


class ClassToken(Aggregate):
    """Read out at the class token, which stands unweighted beside the re-weighted patches."""

    def aggregate(self, attention: Tensor, tokens: Tensor) -> Tensor:
        V = self.interaction.value(tokens)
        Z = tokens.shape[1] * attention.unsqueeze(2) * V
        return self.interaction.blocks(torch.cat([V[:, :1], Z[:, 1:]], dim=1))[:, 0]


class PatchesAlone(Patched):
    """Keys and values are the patches, without the global token."""

    def interact(self, tokens: Tensor, text: Tensor) -> Tensor:
        return super().interact(tokens[:, 1:], text)


class PostNormBlock(ResidualAttentionBlock):
    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = self.ln_1(x + self.attn(x, causal))
        return self.ln_2(x + self.mlp(x))


class PostNorm(Patched):
    """The two blocks normalise behind attention and feed-forward, as METER's do; they start with the same weights."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in self.interaction.blocks:
            block.__class__ = PostNormBlock


class CrossFormer(nn.Module):
    """IADT's module: one row, layer norms, many heads, blocks, layer norm."""

    def __init__(self, dim: int, blocks: nn.Module):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, num_heads(dim), batch_first=True)
        self.ln_text, self.ln_tokens, self.ln_post = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.blocks = blocks

    def attend(self, text: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """One row (B, 1, D), and the mean map of its heads (B, 1, 1 + M)."""
        keys = self.ln_tokens(tokens)
        return self.attention(self.ln_text(text).expand(len(tokens), -1).unsqueeze(1), keys, keys)

    def attention_map(self, text: Tensor, tokens: Tensor) -> Tensor:
        return self.attend(text, tokens)[1].squeeze(1)

    def forward(self, text: Tensor, tokens: Tensor) -> Tensor:
        return self.ln_post(self.blocks(self.attend(text, tokens)[0])).squeeze(1)


class InTheWild(Patched):
    """IADT's module, mended: its blocks see one picture at a time."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.interaction = CrossFormer(self.classifier.in_features, self.interaction.blocks)


class AcrossBatch(nn.Module):
    """Blocks that take the batch for the sequence."""

    def __init__(self, blocks: nn.Module):
        super().__init__()
        self.blocks = blocks

    def forward(self, rows: Tensor) -> Tensor:
        return self.blocks(rows.transpose(0, 1)).transpose(0, 1)  # (B, 1, D)


class Trap:
    """The blocks attend across the batch: a picture's feature depends on the pictures beside it."""

    sees_its_batch = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.interaction.blocks = AcrossBatch(self.interaction.blocks)


class OneRowAcross(Trap, OneRow): ...


class InTheWildAcross(Trap, InTheWild): ...


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


class Inversion(Patched):
    """Another inversion network, made of the layers of ours."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inversion = nn.Sequential(*self.layers(*self.inversion))


class TwoLayers(Inversion):
    def layers(self, first, relu, second, relu_again, last, norm):
        return first, relu, last, norm


class FourLayers(Inversion):
    def layers(self, first, relu, *rest):
        return first, relu, nn.Linear(first.out_features, first.out_features), nn.ReLU(), *rest


class HiddenNorm(Inversion):
    """Batch normalisation behind the last hidden state, not behind S*, which starts out as large as ours."""

    def layers(self, *hidden_last_norm):
        *hidden, last, norm = hidden_last_norm
        nn.init.normal_(last.weight, std=norm.weight[0].item() * last.in_features**-0.5)
        return *hidden, nn.BatchNorm1d(last.in_features), last


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
if __name__ == "__main__":
    run(TABLES, __doc__, print_ways)
