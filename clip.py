"""CLIP (Radford et al., 2021), small enough to read, loading OpenAI's weights unchanged.

What PromptSG needs and the original does not give: every image token in the joint space, the last three
states of the visual encoder, pictures that are not square, and text that starts from embeddings rather than ids.

Symbols: B images, M patches, W width of the visual encoder, D joint embedding, N texts, L tokens a text,
T width of the text encoder.
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

# OpenAI's addresses. The folder before the file's name is the file's sha256.
URLS = {
    "ViT-B/16": "https://openaipublic.azureedge.net/clip/models/"
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt",
    "RN50": "https://openaipublic.azureedge.net/clip/models/"
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt",
}
# The same weights on the Hugging Face hub, for when OpenAI's addresses fail: folder at a fixed revision, sha256.
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

# For random weights and for --backbone: loaded weights bring their own sizes.
ARCHITECTURES = {
    "ViT-B/16": dict(embed_dim=512, vision_layers=12, vision_width=768, patch_size=16),
    "RN50": dict(embed_dim=1024, vision_layers=(3, 4, 6, 3), vision_width=64),
    "tiny": dict(embed_dim=128, vision_layers=3, vision_width=128, patch_size=16, text_width=128, text_layers=2),
}

# Mean and standard deviation of the images that CLIP was trained on: red, green, blue.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@lru_cache
def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return MEAN and STD as tensors (1, 3, 1, 1); cached, because a copy to the device makes the host wait."""
    return tuple(torch.tensor(values).view(1, 3, 1, 1).to(device) for values in (MEAN, STD))


def normalize(images: Tensor) -> Tensor:
    """Normalise uint8 images (B, 3, H, W) with CLIP's mean and standard deviation; return float32 (B, 3, H, W)."""
    mean, std = mean_and_std(images.device)
    return (images / 255 - mean) / std


# ------------------------------------------------------------------------------------------------ tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
VOCABULARY = Path(__file__).with_name("bpe_simple_vocab_16e6.txt.gz")
WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


class Tokenizer:
    """CLIP's lower-cased byte-pair encoding of 49,408 tokens."""

    def __init__(self):
        # A byte that prints stands for itself, any other for a letter from 256 on, so that no symbol is a space.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in printable]
        self.symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}

        lines = gzip.decompress(VOCABULARY.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]  # the file holds more than CLIP uses
        letters = list(self.symbols.values())
        tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges] + [START, END]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.size = len(tokens)

    def split_word(self, word: str) -> tuple[str, ...]:
        """Merges the symbols of one word, the most frequent pair of CLIP's vocabulary first, until none is left."""
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
        """The ids of a text, without the start and end tokens."""
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


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    return Tokenizer()


def tokenize(texts: str | list[str], context_length: int = 77) -> Tensor:
    """Start token, text, end token, then zeros: LongTensor (N, context_length), as CLIP's own `tokenize`.

    Raises ValueError if a text needs more than `context_length` tokens.
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
    """Multi-head self-attention, its parameters named as in torch's nn.MultiheadAttention, which CLIP used."""

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
        """(B, N, W) -> (B, N, W)"""
        B, N, W = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, N, W / heads)
        if self.keep_probabilities:  # the same in the open, for extras/look.py; never causal
            self.probabilities = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # (B, heads, N, N), with its gradient
            x = self.probabilities @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, N, W))


class QuickGELU(nn.Module):
    """The approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, element by element."""
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """CLIP's pre-norm transformer block; `depth`, the number of blocks in a row, only scales the random weights."""

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
        """(B, N, W) -> (B, N, W)"""
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, num_heads(width), layers) for _ in range(layers))

    def forward(self, x: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
        """(B, N, W) -> what the last block takes and what it gives, each (B, N, W)"""
        for block in self.resblocks:
            before, x = x, block(x, causal)
        return before, x


def num_heads(width: int) -> int:
    """CLIP's rule: 64 channels a head."""
    return max(1, width // 64)


# ------------------------------------------------------------------------------------------- visual encoders


class ImageFeatures(NamedTuple):
    embedding: Tensor  # (B, D) the global visual embedding v, which is tokens[:, 0]
    tokens: Tensor  # (B, 1 + M, D) every token in the joint space: X = {v~, v_1 .. v_M}
    states: list[Tensor]  # for the triplet loss: the encoder's last three, two of its own width and v


class VisionTransformer(nn.Module):
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
        """Normalised images (B, 3, H, W) -> features.

        The states are CLIP-ReID's: the class token before the last block, after it and ln_post, and in the joint space.
        """
        patches = self.conv1(images).flatten(2).transpose(1, 2)  # (B, M, W)
        B, _, W = patches.shape
        x = torch.cat([self.class_embedding.expand(B, 1, W), patches], dim=1)  # (B, 1 + M, W)
        x = self.ln_pre(x + self.positional_embedding)
        before, x = self.transformer(x)
        x = self.ln_post(x)
        tokens = x @ self.proj  # (B, 1 + M, D)
        return ImageFeatures(tokens[:, 0], tokens, [before[:, 0], x[:, 0], tokens[:, 0]])


class Bottleneck(nn.Module):
    """ResNet's bottleneck; CLIP strides by average pooling, never by convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, 4 * channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * channels)
        nn.init.zeros_(self.bn3.weight)  # a block of random weights starts out as the identity
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.downsample = None
        if stride > 1 or in_channels != 4 * channels:
            conv = nn.Conv2d(in_channels, 4 * channels, 1, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(4 * channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, 4 * channels, H / stride, W / stride)"""
        shortcut = x if self.downsample is None else self.downsample(self.pool(x))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(self.pool(x)))
        return F.relu(x + shortcut)


class AttentionPool(nn.Module):
    """Attention over the mean of a feature map and its positions. CLIP asks only for the mean's answer, position 0."""

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
        """Feature map (B, W, h, w) -> tokens (B, 1 + h * w, D)"""
        B, W, h, w = x.shape
        x = x.flatten(2).transpose(1, 2)  # (B, M, W)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding  # (B, 1 + M, W)
        qkv = [projection(x).unflatten(2, (self.heads, -1)) for projection in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (projected.transpose(1, 2) for projected in qkv)  # each (B, heads, 1 + M, W / heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.c_proj(x.transpose(1, 2).reshape(B, 1 + h * w, W))


class ModifiedResNet(nn.Module):
    """CLIP's ResNet: a stem of three convolutions, average-pooled strides, and an attention pool at the end."""

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
        """Normalised images (B, 3, H, W) -> features; the states are layer3 and layer4, averaged, and the embedding."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        x = self.layer2(self.layer1(F.avg_pool2d(x, 2)))
        third = self.layer3(x)
        fourth = self.layer4(third)
        tokens = self.attnpool(fourth)
        return ImageFeatures(tokens[:, 0], tokens, [third.mean((2, 3)), fourth.mean((2, 3)), tokens[:, 0]])


# ------------------------------------------------------------------------------------------------------ CLIP


class CLIP(nn.Module):
    """The two encoders. `vision_layers` is a number for a ViT, four numbers for a ResNet (which has no patch size)."""

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
        self.source = {}  # for args.json: the file that `load` read, and its sha256
        stride = patch_size or 16 * last_stride
        if any(side % stride for side in image_size):
            raise ValueError(f"image size {image_size[0]}x{image_size[1]} does not divide by {stride}, a token's side")
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
        """Normalised images (B, 3, H, W) -> embedding (B, D), tokens (B, 1 + M, D), three states, the last one v."""
        return self.visual(images)

    def encode_text(self, token_ids: Tensor) -> Tensor:
        """Token ids as `tokenize` makes them (N, L) -> text features (N, D), not normalised.

        Attention is causal, so nothing after a text's end token reaches its feature: the columns after the last
        end token are left out, which changes no result and most of the cost.
        """
        end = token_ids.argmax(dim=1)  # the end token has the highest id
        token_ids = token_ids[:, : int(end.max()) + 1]
        return self.encode_embeddings(self.token_embedding(token_ids), end)

    def encode_embeddings(self, embeddings: Tensor, end: Tensor) -> Tensor:
        """Token embeddings (N, L, T), position of the end token (N,) -> text features (N, D), not normalised."""
        N, L, _ = embeddings.shape
        x = embeddings + self.positional_embedding[:L]
        _, x = self.transformer(x, causal=True)
        x = x[torch.arange(N, device=x.device), end]  # (N, T)
        return self.ln_final(x) @ self.text_projection


# --------------------------------------------------------------------------------------------------- weights


def load(
    source: str | Path,
    image_size: tuple[int, int] = (256, 128),
    last_stride: int = 1,
    architecture: str | None = None,
) -> CLIP:
    """Load CLIP in float32, its position embedding interpolated to `image_size`. `CLIP.source` names the file.

    Args:
        source: "ViT-B/16" or "RN50" (downloaded on first use), or the path of a file of any layout in docs/data.md.
        image_size: height and width.
        last_stride: stride of a ResNet's last stage; prior ReID work uses 1, CLIP itself 2.
        architecture: refuse weights of other sizes than this one of ARCHITECTURES; None: accept any.

    Raises FileNotFoundError or ConnectionError if there is no such file, ValueError if it is damaged or not a CLIP.
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
    """Return where to get OpenAI's weights: address, sha256, file name in the cache; the hub comes second."""
    *_, sha256, filename = URLS[name].split("/")
    folder, hub_sha256 = HUB[name]
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    hub_file = (f"{hub}/{folder}/open_clip_model.safetensors", hub_sha256, f"{Path(filename).stem}.openai.safetensors")
    return [(URLS[name], sha256, filename), hub_file]


def check_architecture(sizes: dict, name: str) -> None:
    """Raise ValueError if `sizes`, from `read_sizes`, are not those of ARCHITECTURES[name]."""
    with torch.device("meta"):  # sizes without numbers
        expected = read_sizes(CLIP(**ARCHITECTURES[name]).state_dict())
    wrong = [f"{key} {sizes[key]} instead of {expected[key]}" for key in sizes if sizes[key] != expected[key]]
    if wrong:
        raise ValueError(f"it is another CLIP than {name}: {', '.join(wrong)}")


def check_names_and_shapes(state_dict: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise ValueError, in a sentence, if names or shapes differ from those of `expected`."""
    missing = [name for name in expected if name not in state_dict and not name.endswith("num_batches_tracked")]
    unknown = [name for name in state_dict if name not in expected]
    for names, verb in ((missing, "lacks"), (unknown, "holds, unlike CLIP,")):
        if names:
            raise ValueError(f"it {verb} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    for name, tensor in state_dict.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(f"the shape of {name} is {list(tensor.shape)} instead of {list(expected[name].shape)}")


def untrained(name: str, image_size: tuple[int, int] = (256, 128), seed: int = 0) -> CLIP:
    """Return a CLIP of ARCHITECTURES with random weights from the seed; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(**ARCHITECTURES[name], image_size=image_size).eval()


def read_sizes(state_dict: dict[str, Tensor]) -> dict:
    """Return CLIP's arguments, read off its weights. KeyError or IndexError if they are not CLIP's."""

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
    """Interpolate the position embedding of a square grid, (1 + n * n, W) -> (1 + h * w, W), except the class token's.

    A number that is not square is of a CLIP fine-tuned at another size, which must be that of `grid`, else ValueError.
    """
    count, (height, width) = len(positions) - 1, grid
    side = math.isqrt(count)
    if grid == (side, side) or side * side < count == height * width:
        return positions
    if side * side < count:
        raise ValueError(
            f"its {count} positions are not the {height}x{width} of this image size, nor a square to resize"
        )
    square = positions[1:].T.reshape(1, -1, side, side)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)[0]  # (W, h, w)
    return torch.cat([positions[:1], resized.flatten(1).T])
