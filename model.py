"""PromptSG (Yang et al., CVPR 2024): section 4 of the paper, in the order of the paper.

Where the paper leaves a choice, docs/choices.md gives the readings and what was measured.

Symbols: B images in a batch, M patches, D joint embedding of CLIP, T width of CLIP's token embeddings, L tokens of a
prompt, K identities.
"""

from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip import CLIP, ResidualAttentionBlock, num_heads, read_sizes, tokenize, tokenizer
from util import checkpoint
from util.device import one_line

COMPOSED_PROMPT = "A photo of a S* person"
SIMPLIFIED_PROMPT = "A photo of a person"
S_STAR = -1  # marks the place of S* among token ids


class InversionNetwork(nn.Sequential):
    """f_theta(v) = s*, from a global visual embedding (B, D) to a pseudo-word (B, T).

    Section 5.1: "a three-layered MLP of 512-dimensional hidden state", batch normalisation "after the last state".

    Args:
        word_std: initial scale of S*, the standard deviation of CLIP's token embeddings (our choice; the paper does
            not give one).
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
    """Multimodal interaction module (section 4.2, Figure 3): the text re-weights the image tokens."""

    def __init__(self, dim: int, blocks: int = 2):
        super().__init__()
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.blocks = nn.Sequential(*(ResidualAttentionBlock(dim, num_heads(dim), blocks) for _ in range(blocks)))

    def attention_map(self, text: Tensor, tokens: Tensor) -> Tensor:
        """Return Softmax(Q K^T / sqrt d) of Eq. 7: text (B or 1, D), tokens (B, 1 + M, D) -> (B, 1 + M)."""
        B, _, D = tokens.shape
        Q = self.query(text).expand(B, D)  # one row per image
        K = self.key(tokens)  # (B, 1 + M, D)
        return (torch.einsum("bd,bnd->bn", Q, K) / D**0.5).softmax(dim=1)

    def aggregate(self, attention: Tensor, tokens: Tensor) -> Tensor:
        """Re-weight the tokens X (B, 1 + M, D) by an attention map (B, 1 + M); return z (B, D).

        Eq. 7 gives one row per image, Figure 3 a matrix Z. We follow Figure 3; the factor N = 1 + M makes the mean of
        Z over the tokens equal to Eq. 7.
        """
        N = tokens.shape[1]
        V = self.value(tokens)  # (B, 1 + M, D)
        Z = N * attention.unsqueeze(2) * V  # (B, 1 + M, D)
        # The first LayerNorm removes each token's scale: its attention weight enters through the residual only.
        return self.blocks(Z).mean(dim=1)  # (B, D)

    def forward(self, text: Tensor, tokens: Tensor) -> Tensor:
        """Text embedding l (B or 1, D), image tokens X (B, 1 + M, D) -> representation z (B, D)."""
        return self.aggregate(self.attention_map(text, tokens), tokens)


class Output(NamedTuple):
    """Inputs of the losses for one training batch."""

    # z (B, D) and CLIP-ReID's three states of the encoder: of its last two layers (B, width), and v (B, D)
    triplet_features: list[Tensor]
    logits: Tensor  # (B, K)
    image: Tensor  # (B, D) global visual embedding v
    text: Tensor  # (B, D) text embedding l of each image's prompt


class PromptSG(nn.Module):
    """The full model of the paper around a CLIP. Keyword arguments disable components (Tables 3 to 5).

    Args:
        blocks: transformer blocks after the cross-attention layer (Table 5: 0, 1 or 2).
        interaction: without the interaction module, z is v itself (Table 3 d; Table 5, first row).
        inversion: without the inversion network, only the simplified prompt exists (Table 4, second row). Without
            both, the model is the baseline of Table 2: CLIP's visual encoder with ID and triplet loss.
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
        )  # saved in a checkpoint, for restore_model
        self.image_size = clip_model.image_size
        self.default_prompt = "composed" if inversion else "simplified"  # the prompt trained with

        self.clip = clip_model
        self.clip.requires_grad_(False)  # section 4: "the text encoder is frozen in our entire framework"
        self.clip.visual.requires_grad_(True)
        T, D = self.clip.text_projection.shape

        word_std = self.clip.token_embedding.weight.std().item()
        self.inversion = InversionNetwork(D, T, word_std) if inversion else None
        self.interaction = InteractionModule(D, blocks) if interaction else None
        # BNNeck (Luo et al. 2019, [24]): the triplet loss uses z; the ID loss and retrieval use BN(z).
        self.bnneck = nn.BatchNorm1d(D)
        self.bnneck.bias.requires_grad_(False)
        self.classifier = nn.Linear(D, num_identities, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

        composed = tokenize_composed(composed_prompt)
        num_words, num_positions = self.clip.token_embedding.num_embeddings, len(self.clip.positional_embedding)
        if num_words != tokenizer().size:
            raise ValueError(f"this CLIP knows {num_words} tokens, not OpenAI's {tokenizer().size}: use other weights")
        if num_positions < composed.shape[1]:
            raise ValueError(f"the prompt has {composed.shape[1]} tokens, CLIP reads {num_positions}: shorten it")
        self.register_buffer("composed_ids", composed, persistent=False)  # (1, L), L = 8
        with torch.no_grad():  # the text encoder is frozen, so this embedding is constant
            self.register_buffer("simplified_text", self.clip.encode_text(tokenize(SIMPLIFIED_PROMPT)))  # (1, D)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "PromptSG":
        """Load the model of a checkpoint of train.py, in eval mode. Raises FileNotFoundError or ValueError."""
        return restore_model(checkpoint.load(path)).to(device)

    @property
    def temperature(self) -> float:
        """CLIP's own tau of Eq. 1, frozen with it: 0.01 in OpenAI's weights."""
        return 1 / self.clip.logit_scale.exp().item()

    def compose(self, v: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Return the text embeddings l of "A photo of a S* person", S* = f(v): v (B, D) -> (B, D), not normalised.

        The gradient passes through the frozen text encoder to S* and the inversion network.

        Args:
            token_ids: another sentence with S*, (1, L), as made by `tokenize_composed`.
        """
        ids = self.composed_ids if token_ids is None else token_ids  # (1, L)
        words = self.clip.token_embedding(ids.clamp(min=0))  # (1, L, T)
        pseudo_word = self.inversion(v).unsqueeze(1).to(words.dtype)  # (B, 1, T)
        words = torch.where((ids == S_STAR).unsqueeze(2), pseudo_word, words)  # (B, L, T)
        return self.clip.encode_embeddings(words, ids.argmax(dim=1).expand(len(v)))

    def forward(self, images: Tensor) -> Output:
        """Normalised images (B, 3, H, W) -> inputs of the losses. Prompts are composed if there is a network for S*."""
        features = self.clip.encode_image(images)
        v = features.embedding
        text = self.compose(v) if self.inversion else self.simplified_text.expand(len(v), -1)
        z = self.interact(features.tokens, text)
        # Without the module z equals v, the last of the states, and is counted once.
        triplet_features = [z, *features.states] if self.interaction else features.states
        return Output(triplet_features, self.classifier(self.bnneck(z)), v, text)

    def interact(self, tokens: Tensor, text: Tensor) -> Tensor:
        """Image tokens (B, 1 + M, D), text (B or 1, D) -> z (B, D), which is v without the interaction module."""
        return self.interaction(text, tokens) if self.interaction else tokens[:, 0]

    def embed(self, images: Tensor, prompt: str | None = None) -> Tensor:
        """Return retrieval features of normalised images (B, 3, H, W): (B, D), L2-normalised. Call it in eval mode.

        Args:
            prompt: "composed", "simplified" (faster: its text embedding is constant), "none" (CLIP's own embedding v
                instead of BN(z)), or None for the prompt trained with.

        Raises ValueError for another prompt, or for "composed" without an inversion network.
        """
        features = self.clip.encode_image(images)
        if prompt == "none":
            return F.normalize(features.embedding, dim=1)
        text = self.text_feature(features.embedding, prompt)
        return F.normalize(self.bnneck(self.interact(features.tokens, text)), dim=1)

    def encode_text(self, texts: str | list[str]) -> Tensor:
        """Return the features of texts: (N, D), L2-normalised, in the space of `embed` with prompt "none".

        Raises ValueError if a text is too long for CLIP.
        """
        ids = tokenize(texts, len(self.clip.positional_embedding)).to(self.composed_ids.device)
        with torch.no_grad():  # the text encoder is frozen
            return F.normalize(self.clip.encode_text(ids), dim=1)

    def attention_map(self, images: Tensor, prompt: str | None = None) -> Tensor:
        """Return the cross-attention weights of Eq. 7 for normalised images (B, 3, H, W): (B, 1 + M), of sum 1."""
        features = self.clip.encode_image(images)
        return self.interaction.attention_map(self.text_feature(features.embedding, prompt), features.tokens)

    def text_feature(self, v: Tensor, prompt: str | None) -> Tensor:
        """Return the text embeddings l for visual embeddings v (B, D): (B, D), or (1, D) for the simplified prompt."""
        prompt = prompt or self.default_prompt
        if prompt not in ("composed", "simplified"):
            raise ValueError(f"prompt {prompt!r} does not exist: use 'composed', 'simplified' or 'none'")
        if prompt == "composed" and self.inversion is None:
            raise ValueError("this model was trained without an inversion network: use the simplified prompt")
        if prompt == "composed" and self.interaction:  # without the module, no text is used
            return self.compose(v)
        return self.simplified_text

    def parameter_groups(self, visual_lr: float, new_lr: float) -> list[dict]:
        """Return the learnable parameters for an optimizer: CLIP's visual encoder, and all others."""
        visual = list(self.clip.visual.parameters())
        new = [p for name, p in self.named_parameters() if p.requires_grad and not name.startswith("clip.visual.")]
        return [{"params": visual, "lr": visual_lr}, {"params": new, "lr": new_lr}]


def tokenize_composed(prompt: str) -> Tensor:
    """Return the token ids (1, L) of a sentence, with S_STAR in the place of S*.

    Raises ValueError if S* is not exactly one of its words.
    """
    words = prompt.split()
    if words.count("S*") != 1:
        raise ValueError(f"the composed prompt {prompt!r} must contain S* once, as a word of its own")
    before = tokenizer().encode(" ".join(words[: words.index("S*")]))
    ids = tokenize(" ".join("x" if word == "S*" else word for word in words))  # "x" is one token
    ids[0, 1 + len(before)] = S_STAR  # after the start token and the words before S*
    return ids[:, : ids.argmax() + 1]  # the end token has the highest id


def count_learnable(model: nn.Module) -> int:
    """Return the number of learnable parameters (Table 6, #Params)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def restore_model(state: dict) -> PromptSG:
    """Return the model of a checkpoint loaded by `checkpoint.load`, in eval mode, without any download.

    CLIP's sizes are read off the weights. Raises ValueError if the weights do not fit model_args.
    """
    weights = state["model"]
    clip_weights = {name.removeprefix("clip."): tensor for name, tensor in weights.items() if name.startswith("clip.")}
    try:
        sizes = read_sizes(clip_weights)
    except (KeyError, IndexError) as error:
        raise ValueError(f"the checkpoint's weights are not those of a CLIP ({one_line(error)})") from error
    try:
        model = PromptSG(CLIP(**sizes, image_size=tuple(state["args"]["image_size"])), **state["model_args"])
        model.load_state_dict(weights)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"the checkpoint's weights do not fit its model_args ({one_line(error)})") from error
    return model.eval()
