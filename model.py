"""PromptSG (Yang et al., CVPR 2024): section 4 of the paper, in the paper's order; and how a script gets a model.

Symbols: B images, M patches, D joint embedding of CLIP, T width of CLIP's word embeddings, K identities.
"""

import argparse
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
from clip import CLIP, ResidualAttentionBlock, num_heads, tokenize, tokenizer
from util import demo
from util.machine import one_line

COMPOSED_PROMPT = "A photo of a S* person"
SIMPLIFIED_PROMPT = "A photo of a person"
S_STAR = -1  # stands for S* among token ids
BACKBONES = {"vit": "ViT-B/16", "resnet": "RN50", "tiny": "tiny"}  # --backbone: CLIP's name for it


class InversionNetwork(nn.Sequential):
    """f_theta(v) = s*, from a global visual embedding (B, D) to a pseudo-word (B, T).

    Section 5.1: "a three-layered MLP of 512-dimensional hidden state", batch normalisation "after the last state".

    word_std: standard deviation of CLIP's word embeddings, with which S* starts out (the paper is silent).
    """

    def __init__(self, embed_dim: int, token_dim: int, word_std: float, hidden: int = 512):
        super().__init__(
            nn.Linear(embed_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, token_dim),
            nn.BatchNorm1d(token_dim),
        )
        nn.init.constant_(self[-1].weight, word_std)


class InteractionModule(nn.Module):
    """Multimodal interaction module (section 4.2, Figure 3): the text decides which image tokens count."""

    def __init__(self, dim: int, blocks: int = 2):
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.blocks = nn.Sequential(*(ResidualAttentionBlock(dim, num_heads(dim), blocks) for _ in range(blocks)))

    def attention_map(self, text: Tensor, tokens: Tensor) -> Tensor:
        """Softmax(Q K^T / sqrt d) of Eq. 7, over the tokens: text (B or 1, D), tokens (B, 1 + M, D) -> (B, 1 + M)."""
        B, _, D = tokens.shape
        Q = self.query(text).expand(B, D)  # one row for each image
        K = self.key(tokens)  # (B, 1 + M, D)
        return (torch.einsum("bd,bnd->bn", Q, K) / D**0.5).softmax(dim=1)

    def aggregate(self, attention: Tensor, tokens: Tensor) -> Tensor:
        """The tokens X (B, 1 + M, D), re-weighted by an attention map (B, 1 + M) -> representation z (B, D)."""
        N = tokens.shape[1]
        V = self.value(tokens)  # (B, 1 + M, D)
        Z = N * attention.unsqueeze(2) * V  # (B, 1 + M, D): Figure 3's shape; its mean over the tokens is Eq. 7
        return self.blocks(Z).mean(dim=1)  # a block divides each token by its size: a_i passes in the residual stream

    def forward(self, text: Tensor, tokens: Tensor) -> Tensor:
        """Text embedding l (B or 1, D), image tokens X (B, 1 + M, D) -> representation z (B, D)."""
        return self.aggregate(self.attention_map(text, tokens), tokens)


class Output(NamedTuple):
    """What the losses need of one training batch."""

    triplet_features: list[Tensor]  # z (B, D) and the encoder's three states; z once, where it is v
    logits: Tensor  # (B, K)
    image: Tensor  # (B, D) the global visual embedding v
    text: Tensor  # (B, D) the text embedding l of each image's prompt


class PromptSG(nn.Module):
    """The paper's full model around a CLIP; the keyword arguments take parts of it away (Tables 3 to 5).

    blocks: transformer blocks behind the cross-attention layer (Table 5: 0, 1 or 2).
    interaction: without the interaction module, z is the visual embedding itself (Table 3 d; Table 5, first row).
    inversion: without the inversion network, only the simplified prompt exists (Table 4, second row).
    Without both, this is the baseline of Table 2: CLIP's visual encoder with ID and triplet loss.
    composed_prompt: the sentence around S*.

    Raises ValueError if S* is not one of the prompt's words, if the prompt is too long for this CLIP, or if this CLIP
    has another vocabulary than OpenAI's.
    """

    def __init__(
        self,
        clip_model: CLIP,
        num_identities: int,
        *,
        blocks: int = 2,
        interaction: bool = True,
        inversion: bool = True,
        composed_prompt: str = COMPOSED_PROMPT,
    ):
        super().__init__()
        self.model_args = dict(
            num_identities=num_identities,
            blocks=blocks,
            interaction=interaction,
            inversion=inversion,
            composed_prompt=composed_prompt,
        )  # with which `restore_model` builds it again
        self.clip = clip_model
        self.clip.requires_grad_(False)  # section 4: "the text encoder is frozen in our entire framework"
        self.clip.visual.requires_grad_(True)
        T, D = self.clip.text_projection.shape

        word_std = self.clip.token_embedding.weight.std().item()
        self.inversion = InversionNetwork(D, T, word_std) if inversion else None
        self.interaction = InteractionModule(D, blocks) if interaction else None
        self.bnneck = nn.BatchNorm1d(D)  # Luo et al. 2019, [24]: triplet loss before, ID loss and retrieval behind
        self.bnneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(D, num_identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

        composed = tokenize_composed(composed_prompt)
        has_clips_words = self.clip.token_embedding.num_embeddings == tokenizer().size
        if not has_clips_words or len(self.clip.positional_embedding) < composed.shape[1]:
            raise ValueError("this CLIP has another vocabulary than OpenAI's, or reads too few tokens for the prompt")
        self.register_buffer("composed_ids", composed, persistent=False)  # (1, 8)
        with torch.no_grad():  # a frozen encoder gives a fixed text one feature for ever
            self.register_buffer("simplified_text", self.clip.encode_text(tokenize(SIMPLIFIED_PROMPT)))  # (1, D)

    def train(self, mode: bool = True) -> "PromptSG":
        """Training mode for everything but the frozen text encoder."""
        super().train(mode)
        self.clip.eval()
        self.clip.visual.train(mode)
        return self

    @property
    def temperature(self) -> float:
        """CLIP's own tau of Eq. 1, frozen with it: 0.01 in OpenAI's weights."""
        return 1 / self.clip.logit_scale.exp().item()

    def compose(self, image: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """l = T("A photo of a S* person"), S* = f(v): visual embeddings (B, D) -> text embeddings (B, D).

        The gradient passes through the frozen text encoder to S* and the inversion network.
        token_ids: of another sentence with S*, (1, L), as `tokenize_composed` makes them.
        """
        ids = self.composed_ids if token_ids is None else token_ids  # (1, L)
        words = self.clip.token_embedding(ids.clamp(min=0))  # (1, L, T)
        pseudo_word = self.inversion(image).unsqueeze(1).to(words.dtype)  # (B, 1, T)
        words = torch.where((ids == S_STAR).unsqueeze(2), pseudo_word, words)  # (B, L, T)
        return self.clip.encode_embeddings(words, ids.argmax(dim=1).expand(len(image)))

    def forward(self, images: Tensor) -> Output:
        """Normalised images (B, 3, H, W) -> what the losses need; prompts are composed if the model has the network."""
        features = self.clip.encode_image(images)
        v = features.embedding
        text = self.compose(v) if self.inversion else self.simplified_text.expand(len(v), -1)
        z = self.interact(features.tokens, text)
        triplet_features = [z, *features.states] if self.interaction else features.states  # without, z is v, the last
        return Output(triplet_features, self.classifier(self.bnneck(z)), v, text)

    def interact(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Image tokens (B, 1 + M, D), text (B or 1, D) -> z (B, D), which is v without the interaction module."""
        return self.interaction(text, tokens) if self.interaction else tokens[:, 0]

    def embed(self, images: Tensor, prompt: str = "composed") -> Tensor:
        """Retrieval features: normalised images (B, 3, H, W) -> (B, D) of length 1. For a model in eval mode.

        prompt: "composed" (accurate), "simplified" (fast: its text feature is a constant), or "none": v, CLIP's own
            embedding, in place of BN(z).
        Raises ValueError if it is another, or "composed" without an inversion network.
        """
        features = self.clip.encode_image(images)
        if prompt == "none":
            return F.normalize(features.embedding, dim=1)
        text = self.text_feature(features.embedding, prompt)
        return F.normalize(self.bnneck(self.interact(features.tokens, text)), dim=1)

    def attention_map(self, images: Tensor, prompt: str = "composed") -> Tensor:
        """Where the prompt looks (Figures 1 and 2): normalised images (B, 3, H, W) -> (B, 1 + M), summing to 1."""
        features = self.clip.encode_image(images)
        return self.interaction.attention_map(self.text_feature(features.embedding, prompt), features.tokens)

    def text_feature(self, image: Tensor, prompt: str) -> Tensor:
        """The text embedding to interact with: (B, D) for visual embeddings (B, D); simplified prompt: (1, D)."""
        if prompt not in ("composed", "simplified"):
            raise ValueError(f"prompt {prompt!r} does not exist: use 'composed', 'simplified' or 'none'")
        if prompt == "composed" and self.inversion is None:
            raise ValueError("this model was trained without an inversion network: use the simplified prompt")
        if prompt == "composed" and self.interaction:  # without the module no text is used
            return self.compose(image)
        return self.simplified_text

    def parameter_groups(self, visual_lr: float, new_lr: float) -> list[dict]:
        """The learnable parameters as an optimizer takes them: CLIP's visual encoder, and all that is new."""
        visual = list(self.clip.visual.parameters())
        new = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("clip.")]
        return [{"params": visual, "lr": visual_lr}, {"params": new, "lr": new_lr}]


def tokenize_composed(prompt: str) -> Tensor:
    """Token ids (1, L) of a sentence, S_STAR in the place of S*. ValueError if S* is not one of its words, once."""
    words = prompt.split()
    if words.count("S*") != 1:
        raise ValueError(f"the composed prompt {prompt!r} must have S* as one of its words, once")
    before = tokenizer().encode(" ".join(words[: words.index("S*")]))
    ids = tokenize(" ".join("x" if word == "S*" else word for word in words))  # S* takes the place of a word
    ids[0, 1 + len(before)] = S_STAR  # behind the start token and the tokens of "A photo of a"
    return ids[:, : ids.argmax() + 1]  # the end token has the highest id


def count_learnable(model: nn.Module) -> int:
    """Number of learnable parameters (Table 6's #Params)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------- from flags, and from a checkpoint


def load_clip(args: argparse.Namespace) -> CLIP:
    """CLIP with the weights that the flags ask for. Raises as `build_model` does."""
    name, image_size = BACKBONES[args.backbone], tuple(args.image_size)
    if args.clip_weights == "random":
        print("WARNING: CLIP starts from RANDOM weights (--clip-weights random): the results will mean nothing")
        return clip.untrained(name, image_size, args.seed)
    if name == "tiny":
        return tiny_clip(args)
    clip_model = clip.load(args.clip_weights or name, image_size)
    if isinstance(clip_model.visual, clip.VisionTransformer) != (name == "ViT-B/16"):
        raise ValueError(f"--clip-weights {args.clip_weights} are not those of --backbone {args.backbone}")
    return clip_model


def tiny_clip(args: argparse.Namespace) -> CLIP:
    """The demo's, which extras/pretrain.py has taught some words; the embeddings of all others are random.

    Its weights are for 128x64 pixels.
    """
    clip_model = clip.untrained("tiny", tuple(args.image_size), args.seed)
    weights, words = demo.read_tiny_clip()
    embeddings = clip_model.token_embedding.weight.detach().clone()
    embeddings[words] = weights["token_embedding.weight"].float()
    clip_model.load_state_dict({**weights, "token_embedding.weight": embeddings})
    return clip_model


def build_model(args: argparse.Namespace, num_identities: int) -> PromptSG:
    """CLIP with its weights, and PromptSG around it, new modules initialised from the seed.

    args: train.py's flags. Raises ValueError if the weights are not those of --backbone, and what `clip.load` raises.
    """
    clip_model = load_clip(args)
    torch.manual_seed(args.seed)
    return PromptSG(
        clip_model,
        num_identities,
        blocks=args.blocks,
        interaction=not (args.baseline or args.without_interaction),
        inversion=not (args.baseline or args.train_prompt == "simplified"),
        composed_prompt=args.composed_prompt,
    )


def restore_model(checkpoint: dict) -> PromptSG:
    """The model of train.py's checkpoint, in eval mode; CLIP's sizes are read off the weights.

    Raises ValueError if the weights do not fit the arguments saved with them.
    """
    weights = checkpoint["model"]
    clip_weights = {name.removeprefix("clip."): tensor for name, tensor in weights.items() if name.startswith("clip.")}
    try:
        clip_model = CLIP(**clip.read_sizes(clip_weights), image_size=tuple(checkpoint["args"]["image_size"]))
        model = PromptSG(clip_model, **checkpoint["model_args"])
        model.load_state_dict(weights)
    except (AttributeError, KeyError, TypeError, RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"the checkpoint's weights do not fit its settings ({one_line(error)})") from error
    return model.eval()
