"""CLIP (Radford et al., 2021) in one file. `load` reads OpenAI's weights.

Differences from OpenAI's code: the visual encoder projects all image tokens into the joint space and also returns three
states for the triplet loss; images need not be square (position embeddings are interpolated); the last stride of a
ResNet is 1 by default; texts can be encoded from token embeddings.

Symbols: B images, M patches, N texts, L tokens of a sequence, W width of a transformer or feature map (width of the
image in (B, 3, H, W)), T width of the text encoder, D dimension of the joint space.
"""

import gzip
import html
import itertools
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.weights import fetch, find, read_weights

# OpenAI's addresses. The last folder of an address is the sha256 of the file.
URLS = {
    "ViT-B/16": "https://openaipublic.azureedge.net/clip/models/"
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "RN50": "https://openaipublic.azureedge.net/clip/models/"
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
}
# The same weights on the Hugging Face hub, used if OpenAI's address fails: folder at a fixed revision, sha256.
HUB = {
    "ViT-B/16": (
        "timm/vit_base_patch16_clip_224.openai/resolve/977e3dd0ec55ab8da155f2fbeb6b5f54948b6e3d",
        "4b8699299b1e8997753c64b052ba32031449d5d853f55a039148560ee02b820f",
    ),
    "RN50": (
        "timm/resnet50_clip.openai/resolve/ec3d92cf63a5f9d591f0d611b736895966c73076",
        "da0baa37fb2211eee5729ab69ed587eb10d48f5b7076ceeed01552fc3d4cb4ee",
    ),
}

# Sizes for random weights, and to check weights against --backbone. `load` reads sizes off the weights.
ARCHITECTURES = {
    "ViT-B/16": dict(embed_dim=512, vision_layers=12, vision_width=768, patch_size=16),
    "RN50": dict(embed_dim=1024, vision_layers=(3, 4, 6, 3), vision_width=64),
    "tiny": dict(embed_dim=128, vision_layers=3, vision_width=128, patch_size=16, text_width=128, text_layers=2),
}

# Mean and standard deviation of CLIP's training images (red, green, blue; values from 0 to 1).
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@lru_cache
def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return MEAN and STD as tensors (1, 3, 1, 1). They are cached, because each copy to a GPU blocks the CPU."""
    return tuple(torch.tensor(values).view(1, 3, 1, 1).to(device) for values in (MEAN, STD))


def normalize(images: Tensor) -> Tensor:
    """Normalise uint8 images (B, 3, H, W) with CLIP's mean and standard deviation; return float32 (B, 3, H, W)."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, from 0 to 255, not {images.dtype}")
    mean, std = mean_and_std(images.device)
    return (images / 255 - mean) / std


# ------------------------------------------------------------------------------------------------ tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


class Tokenizer:
    """CLIP's byte-pair encoding of lower-cased text, with a vocabulary of 49,408 tokens."""

    def __init__(self):
        # Each byte has a visible symbol: its own character if that is printable, otherwise one from chr(256) on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        self.symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}

        lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]  # CLIP uses part of the file
        symbols = list(self.symbols.values())
        tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges] + [START, END]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}  # the lowest rank is merged first
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.size = len(tokens)

    def split_word(self, word: str) -> tuple[str, ...]:
        """Return the tokens of a word, given as symbols: merge the pair of the lowest rank until no pair has a rank."""
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            best = min(itertools.pairwise(parts), key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            merged = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = merged
        return tuple(parts)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without the start and end tokens."""
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
        text = regex.sub(r"\s+", " ", text).strip().lower()
        ids = []
        for word in WORD.findall(text):
            if word in (START, END):
                ids.append(self.ids[word])
            else:
                symbols = "".join(self.symbols[byte] for byte in word.encode("utf-8"))
                ids += [self.ids[part] for part in self.split_word(symbols)]
        return ids


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer()


def tokenize(texts: str | list[str], context_length: int = 77) -> Tensor:
    """Return the token ids of texts, int64 (N, context_length): start token, text, end token, zeros.

    The ids are those of OpenAI's `clip.tokenize`. Raises ValueError if a text needs more than `context_length` tokens.
    """
    texts = [texts] if isinstance(texts, str) else texts
    result = torch.zeros(len(texts), context_length, dtype=torch.long)
    start, end = tokenizer().ids[START], tokenizer().ids[END]
    for row, text in zip(result, texts):
        ids = [start, *tokenizer().encode(text), end]
        if len(ids) > context_length:
            raise ValueError(f"{text[:40]!r}... is {len(ids)} tokens long; CLIP reads {context_length}: shorten it")
        row[: len(ids)] = torch.tensor(ids)
    return result


# ---------------------------------------------------------------------------------------------- transformer


class Attention(nn.Module):
    """Multi-head self-attention, with the parameter names of nn.MultiheadAttention, which OpenAI's code uses."""

    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.heads = heads
        self.keep_probabilities = False
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width**-0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.normal_(self.out_proj.weight, std=(2 * depth * width) ** -0.5)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Let each token attend to all tokens, or to itself and those before (causal): (B, L, W) -> (B, L, W)."""
        B, L, W = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, L, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, L, W / heads)
        if self.keep_probabilities:  # explicit softmax, for extras/look.py; visual encoder only: not causal
            self.probabilities = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # (B, heads, L, L)
            x = self.probabilities @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, W))


class QuickGELU(nn.Module):
    """The approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """CLIP's pre-norm transformer block. `depth`, the number of blocks of the model, scales random weights only."""

    def __init__(self, width: int, heads: int, depth: int):
        super().__init__()
        self.attn = Attention(width, heads, depth)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.c_fc = nn.Linear(width, 4 * width)
        self.mlp.gelu = QuickGELU()
        self.mlp.c_proj = nn.Linear(4 * width, width)
        self.ln_2 = nn.LayerNorm(width)
        nn.init.normal_(self.mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.mlp.c_proj.weight, std=(2 * depth * width) ** -0.5)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """Add attention and MLP to the residual stream: (B, L, W) -> (B, L, W)."""
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """CLIP's transformer blocks, of the visual encoder or of the text encoder."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, num_heads(width), layers) for _ in range(layers))

    def forward(self, x: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
        """Return the input and the output of the last block, each (B, L, W), for token embeddings x (B, L, W)."""
        for block in self.resblocks:
            before, x = x, block(x, causal)
        return before, x


def num_heads(width: int) -> int:
    """Return the number of attention heads: one per 64 channels, as in CLIP."""
    return max(1, width // 64)


# ------------------------------------------------------------------------------------------- visual encoders


class ImageFeatures(NamedTuple):
    """Output of a visual encoder."""

    embedding: Tensor  # (B, D) global visual embedding v (v~ in section 4.2), equal to tokens[:, 0]
    tokens: Tensor  # (B, 1 + M, D) all tokens in the joint space: X = {v~, v_1 .. v_M} of section 4.2
    states: list[Tensor]  # for the triplet loss, as in CLIP-ReID: of the last two layers (B, width), and v (B, D)


class VisionTransformer(nn.Module):
    """CLIP's ViT."""

    def __init__(self, grid: tuple[int, int], patch_size: int, width: int, layers: int, embed_dim: int):
        super().__init__()
        scale = width**-0.5
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(1 + math.prod(grid), width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, embed_dim))

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode normalised images (B, 3, H, W)."""
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, M, W)
        B, _, W = patches.shape
        x = torch.cat([self.class_embedding.expand(B, 1, W), patches], dim=1)  # (B, 1 + M, W)
        x = self.ln_pre(x + self.positional_embedding)
        before, x = self.transformer(x)
        x = self.ln_post(x)
        tokens = x @ self.proj  # (B, 1 + M, D)
        # CLIP-ReID's states: the class token before the last block, the class token after ln_post, and v.
        return ImageFeatures(tokens[:, 0], tokens, [before[:, 0], x[:, 0], tokens[:, 0]])


class Bottleneck(nn.Module):
    """Bottleneck block of a ResNet. CLIP downsamples by average pooling instead of strided convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        nn.init.zeros_(self.bn3.weight)  # with random weights, the block starts as its shortcut
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or in_channels != 4 * channels:
            conv = nn.Conv2d(in_channels, 4 * channels, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (B, in_channels, h, w) to (B, 4 * channels, h / stride, w / stride)."""
        shortcut = x if self.downsample is None else self.downsample(self.pool(x))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.pool(x)))
        return F.relu(x + shortcut)


class AttentionPool(nn.Module):
    """Self-attention over the mean of a feature map and its positions. OpenAI's code returns the mean's token only."""

    def __init__(self, grid: tuple[int, int], width: int, embed_dim: int):
        super().__init__()
        self.heads = num_heads(width)
        self.positional_embedding = nn.Parameter(torch.randn(1 + math.prod(grid), width) * width**-0.5)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, embed_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (B, 1 + M, D) of a feature map (B, W, h, w) with M = h * w positions."""
        B, W, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, M, W)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # (B, 1 + M, W)
        qkv = [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in qkv)  # each (B, heads, 1 + M, W / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(x.transpose(1, 2).reshape(B, 1 + h * w, W))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, downsampling by average pooling, attention pooling at the end."""

    def __init__(self, grid: tuple[int, int], layers: tuple[int, ...], width: int, embed_dim: int, last_stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = self.stage(width, width, layers[0], stride=1)
        self.layer2 = self.stage(4 * width, 2 * width, layers[1], stride=2)
        self.layer3 = self.stage(8 * width, 4 * width, layers[2], stride=2)
        self.layer4 = self.stage(16 * width, 8 * width, layers[3], stride=last_stride)
        self.attnpool = AttentionPool(grid, 32 * width, embed_dim)

    @staticmethod
    def stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        rest = [Bottleneck(4 * channels, channels, 1) for _ in range(blocks - 1)]
        return nn.Sequential(Bottleneck(in_channels, channels, stride), *rest)

    def forward(self, images: Tensor) -> ImageFeatures:
        """Encode normalised images (B, 3, H, W)."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.layer2(self.layer1(F.avg_pool2d(x, 2)))
        third = self.layer3(x)
        fourth = self.layer4(third)
        tokens = self.attnpool(fourth)
        # CLIP-ReID's states: the spatial means of the last two stages, and v.
        return ImageFeatures(tokens[:, 0], tokens, [third.mean((2, 3)), fourth.mean((2, 3)), tokens[:, 0]])


# ------------------------------------------------------------------------------------------------------ CLIP


class CLIP(nn.Module):
    """CLIP's visual encoder, a ViT or (without `patch_size`) a ResNet, and its text encoder.

    `vision_layers` is the number of blocks: one number for a ViT, one per stage for a ResNet. `image_size` is height
    and width in pixels. Raises ValueError if they are not multiples of the encoder's stride.
    """

    def __init__(
        self,
        embed_dim: int,
        vision_layers: int | tuple[int, ...],
        vision_width: int,
        patch_size: int | None = None,
        text_width: int = 512,
        text_layers: int = 12,
        context_length: int = 77,
        vocab_size: int = 49408,
        image_size: tuple[int, int] = (256, 128),
        last_stride: int = 1,
    ):
        super().__init__()
        self.source = {}  # for args.json: path and sha256 of the file that `load` read
        stride = patch_size or 16 * last_stride
        if any(side % stride for side in image_size):
            raise ValueError(f"image size {image_size}: use multiples of {stride}, the stride of the visual encoder")
        self.image_size = image_size
        self.grid = (image_size[0] // stride, image_size[1] // stride)
        if patch_size:
            self.visual = VisionTransformer(self.grid, patch_size, vision_width, vision_layers, embed_dim)
        else:
            self.visual = ModifiedResNet(self.grid, vision_layers, vision_width, embed_dim, last_stride)
        self.token_embedding = nn.Embedding(vocab_size, text_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, text_width) * 0.01)
        self.transformer = Transformer(text_width, text_layers)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.randn(text_width, embed_dim) * text_width**-0.5)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """Encode normalised images (B, 3, H, W): embedding v (B, D), tokens (B, 1 + M, D), three states."""
        return self.visual(images)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Return the text features (N, D), not normalised, of token ids (N, L) from `tokenize`.

        Attention is causal, so tokens after a text's end token do not change its feature. The columns after the last
        end token are skipped, which saves most of the computation.
        """
        end = token_ids.argmax(dim=1)  # the end token has the highest id
        token_ids = token_ids[:, : int(end.max()) + 1]
        return self.encode_embeddings(self.token_embedding(token_ids), end)

    def encode_embeddings(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Return text features (N, D), not normalised, of token embeddings (N, L, T) with end tokens at `end` (N,)."""
        N, L, _ = embeddings.shape
        x = embeddings + self.positional_embedding[:L]
        _, x = self.transformer(x, causal=True)
        x = x[torch.arange(N, device=x.device), end]  # (N, T)
        return self.ln_final(x) @ self.text_projection


# --------------------------------------------------------------------------------------------------- weights


def load(
    source: str | Path, image_size: tuple[int, int] = (256, 128), last_stride: int = 1, architecture: str | None = None
) -> CLIP:
    """Load CLIP in float32 and eval mode, with the position embedding interpolated to `image_size`.

    Args:
        source: "ViT-B/16" or "RN50" (downloaded on first use), or the path of a file or folder as in docs/data.md.
        image_size: height and width in pixels.
        last_stride: stride of a ResNet's last stage. Prior ReID work uses 1, OpenAI's code 2.
        architecture: name in ARCHITECTURES whose sizes the weights must have (default: any sizes).

    Raises FileNotFoundError or ConnectionError if the file cannot be found or downloaded, ValueError if it is damaged,
    is not a CLIP or does not fit the arguments.
    """
    path, sha256 = fetch(addresses(source)) if source in URLS else find(source)
    try:
        state_dict = read_weights(path, is_trusted=any(sha256 in url for url in URLS.values()))
        sizes = read_sizes(state_dict)
        if architecture:
            check_architecture(sizes, architecture)
        model = CLIP(**sizes, image_size=image_size, last_stride=last_stride)
        name = "visual.positional_embedding" if sizes["patch_size"] else "visual.attnpool.positional_embedding"
        state_dict[name] = resize_positions(state_dict[name], model.grid)
        check_names_and_shapes(state_dict, model.state_dict())
        model.load_state_dict(state_dict)
    except KeyError as error:
        raise ValueError(f"cannot use {path}: it lacks {error.args[0]}") from error
    except (IndexError, TypeError, ZeroDivisionError, RuntimeError) as error:
        raise ValueError(f"cannot use {path}: its tensors have other shapes than CLIP's") from error
    except ValueError as error:
        raise ValueError(f"cannot use {path}: {error}") from error
    model.source = {"clip_file": str(path), "clip_sha256": sha256}
    print(f"CLIP's weights: {path}, sha256 {sha256}")
    return model.eval()


def addresses(name: str) -> list[tuple[str, str, str]]:
    """Return the sources of OpenAI's weights, best first: (address, sha256, file name in the cache)."""
    *_, sha256, filename = URLS[name].split("/")
    folder, hub_sha256 = HUB[name]
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    hub_file = (f"{hub}/{folder}/open_clip_model.safetensors", hub_sha256, f"{Path(filename).stem}.openai.safetensors")
    return [(URLS[name], sha256, filename), hub_file]


def check_architecture(sizes: dict, name: str) -> None:
    """Raise ValueError if sizes, as returned by `read_sizes`, differ from those of ARCHITECTURES[name]."""
    with torch.device("meta"):  # shapes without values
        expected = read_sizes(CLIP(**ARCHITECTURES[name]).state_dict())
    wrong = [f"{key} {sizes[key]} instead of {expected[key]}" for key in sizes if sizes[key] != expected[key]]
    if wrong:
        raise ValueError(f"it is another CLIP than {name}: {', '.join(wrong)}")


def check_names_and_shapes(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError if names or shapes of weights differ from those of `expected`."""
    missing = [name for name in expected if name not in state_dict and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state_dict if name not in expected]
    for names, verb in ((missing, "lacks"), (unknown, "contains unexpected weights:")):
        if names:
            raise ValueError(f"it {verb} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"the shape of {name} is {list(tensor.shape)} instead of {list(expected[name].shape)}")


def untrained(name: str, image_size: tuple[int, int] = (256, 128), seed: int = 0) -> CLIP:
    """Return a CLIP of ARCHITECTURES with random weights from the seed. The global RNG state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(**ARCHITECTURES[name], image_size=image_size).eval()


def read_sizes(state_dict: dict[str, Tensor]) -> dict:
    """Return the arguments of CLIP, read off its weights. Raises KeyError or IndexError if they are not CLIP's."""

    def count(prefix: str) -> int:
        position = prefix.count(".")
        return len({name.split(".")[position] for name in state_dict if name.startswith(prefix)})

    sizes = dict(
        embed_dim=state_dict["text_projection"].shape[1],
        text_width=state_dict["ln_final.weight"].shape[0],
        text_layers=count("transformer.resblocks."),
        context_length=state_dict["positional_embedding"].shape[0],
        vocab_size=state_dict["token_embedding.weight"].shape[0],
    )
    if "visual.layer1.0.conv1.weight" in state_dict:
        layers = tuple(count(f"visual.layer{stage}.") for stage in (1, 2, 3, 4))
        width, patch_size = state_dict["visual.layer1.0.conv1.weight"].shape[0], None
    else:
        layers = count("visual.transformer.resblocks.")
        width, patch_size = state_dict["visual.conv1.weight"].shape[0], state_dict["visual.conv1.weight"].shape[3]
    return dict(sizes, vision_layers=layers, vision_width=width, patch_size=patch_size)


def resize_positions(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate the position embedding of a square grid to another grid: (1 + n * n, W) -> (1 + h * w, W).

    The class token's row is kept. Raises ValueError if the number of positions is neither a square nor that of `grid`:
    the weights are of a CLIP fine-tuned at another image size.
    """
    # A count that is no square can only be kept. A square count is read as n x n: 64 positions are 8 x 8, not 16 x 4.
    count, (height, width) = len(positions) - 1, grid
    side = math.isqrt(count)
    if grid == (side, side) or side * side < count == height * width:
        return positions
    if side * side < count:
        raise ValueError(f"its {count} positions are not the {height}x{width} of this image size, nor a square grid")
    square = positions[1:].T.reshape(1, -1, side, side)  # (1, W, n, n)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)[0]  # (W, h, w)
    return torch.cat([positions[:1], resized.flatten(1).T])
