"""The model of section 4: interaction module, prompts, retrieval features, gradients, learnable parameters."""

import re

import pytest
import torch
import torch.nn.functional as F

import clip
import losses
from model import (
    COMPOSED_PROMPT,
    S_STAR,
    SIMPLIFIED_PROMPT,
    InteractionModule,
    PromptSG,
    count_learnable,
    tokenize_composed,
)
from util import checkpoint

PROMPTS = ("composed", "simplified", "none")


# ------------------------------------------------------------------------------------- the interaction module


def test_z_is_eq_7_without_blocks():
    """Without blocks, z is Eq. 7. With blocks, z is the mean of the last block's tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens, text = (torch.randn(3, *size, 64, generator=generator, dtype=torch.double) for size in ((9,), ()))
    module = InteractionModule(64, blocks=2).double()
    Q, K, V = module.query(text)[:, None], module.key(tokens), module.value(tokens)
    attention = torch.softmax(Q @ K.transpose(1, 2) / 64**0.5, dim=-1)  # (B, 1, 1 + M)
    torch.testing.assert_close(module.attention_map(text, tokens), attention[:, 0])
    Z = 9 * attention.mT * V
    torch.testing.assert_close(Z.mean(dim=1), (attention @ V)[:, 0])
    torch.testing.assert_close(module(text, tokens), module.blocks[1](module.blocks[0](Z)).mean(dim=1))
    module.blocks = torch.nn.Sequential()
    torch.testing.assert_close(module(text, tokens), (attention @ V)[:, 0])


# -------------------------------------------------------------------------------------------------- prompts


def test_s_star_replaces_a_word(make_model):
    """With the embedding of "tall" as S*, the composed prompt is "A photo of a tall person", padded to 77 tokens."""
    model = make_model().eval()
    assert (COMPOSED_PROMPT, SIMPLIFIED_PROMPT) == ("A photo of a S* person", "A photo of a person")
    assert model.composed_ids.shape == (1, 8)
    tall = model.clip.token_embedding.weight[clip.tokenize("tall")[0, 1]]
    model.inversion.forward = lambda image: tall.expand(len(image), -1)

    def encode_padded(text):
        ids = clip.tokenize(text)
        return model.clip.encode_embeddings(model.clip.token_embedding(ids), ids.argmax(dim=1)).expand(2, -1)

    expected = F.normalize(encode_padded("a red coat")[:1], dim=1)
    torch.testing.assert_close(model.encode_text(["a red coat"]), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        for prompt in (COMPOSED_PROMPT, "A S* person with a green top"):
            text = model.compose(torch.zeros(2, 128), tokenize_composed(prompt))
            torch.testing.assert_close(text, encode_padded(prompt.replace("S*", "tall")), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(model.compose(torch.zeros(2, 128)), encode_padded("A photo of a tall person"))
        torch.testing.assert_close(model.simplified_text, encode_padded(SIMPLIFIED_PROMPT)[:1])


def test_s_star_must_be_a_word():
    before, after = (clip.tokenizer().encode(part) for part in ("a S*x", "man"))
    assert tokenize_composed("a S*x S*  man")[0, 1:-1].tolist() == [*before, S_STAR, *after]


def test_prompts_that_do_not_fit_are_refused(make_model):
    for prompt, words in (("aS* person", "S* once"), ("S* and S*", "S* once"), ("S*" + " person" * 76, "79 tokens")):
        with pytest.raises(ValueError, match=re.escape(words)):
            make_model(composed_prompt=prompt)


def test_initial_scale_of_s_star_is_that_of_a_word(make_model):
    model = make_model()
    pseudo_words = model.inversion(torch.randn(512, 128))
    assert pseudo_words.std().item() == pytest.approx(model.clip.token_embedding.weight.std().item(), rel=0.05)


# ------------------------------------------------------------------------------------------------- retrieval


def test_images_are_normalised_with_clips_mean_and_std():
    """github.com/openai/CLIP, clip.py: Normalize((0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758))."""
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 3, 1, 3)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None]
    expected = (torch.tensor([0, 0.2, 1]) - mean) / std
    torch.testing.assert_close(clip.normalize(images), expected[None, :, None].expand(2, 3, 1, 3))


def test_the_retrieval_feature_is_that_after_the_bnneck(make_model, images):
    model = make_model().eval()
    model.bnneck.running_mean.normal_()
    model.bnneck.weight.data.uniform_(0.5, 2)
    output, v = model(images), model.clip.encode_image(images)
    expected = {
        "composed": model.bnneck(output.triplet_features[0]),
        "simplified": model.bnneck(model.interaction(model.simplified_text, v.tokens)),
        "none": v.embedding,
    }
    for prompt in PROMPTS:
        torch.testing.assert_close(model.embed(images, prompt), F.normalize(expected[prompt], dim=1))
    assert (model.embed(images, "composed") - model.embed(images, "simplified")).abs().max() > 1e-4
    assert torch.equal(model.embed(images), model.embed(images, "composed"))
    with pytest.raises(ValueError, match="simplified"):
        model.embed(images, "long")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_feature_does_not_depend_on_its_batch(make_model, images, prompt):
    model, order = make_model().eval(), torch.tensor([5, 2, 7, 0])
    with torch.no_grad():
        features = model.embed(images, prompt)
        torch.testing.assert_close(model.embed(images[order], prompt), features[order], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.embed(images[3:4], prompt), features[3:4], atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------- gradients and parameters


TERMS = {
    "triplet": lambda output, labels: sum(losses.triplet_loss(x, labels) for x in output.triplet_features),
    "identity": lambda output, labels: losses.identity_loss(output.logits, labels),
    "supcon": lambda output, labels: losses.supcon_loss(output.image, output.text, labels, 0.07),
}


@pytest.mark.parametrize("term", TERMS)
def test_every_loss_reaches_s_star_and_the_visual_encoder(make_model, images, labels, term):
    """The ID and triplet losses too: the text re-weights the tokens, so they reach the inversion network."""
    model = make_model().train()
    v = torch.randn(8, 128, requires_grad=True)
    model.compose(v)[:, 0].sum().backward()  # through the frozen text encoder
    assert v.grad.abs().max() > 1e-9
    model.zero_grad()
    torch.nn.init.normal_(model.classifier.weight)  # the scale after some training
    pseudo_words = []
    model.inversion.register_forward_hook(lambda module, inputs, output: pseudo_words.append(output))
    output = model(images)
    pseudo_words[0].retain_grad()
    TERMS[term](output, labels).backward()
    assert pseudo_words[0].shape == (8, 128) and pseudo_words[0].grad.abs().max() > 1e-9
    assert model.inversion[0].weight.grad.abs().max() > 1e-9
    assert model.clip.visual.conv1.weight.grad.abs().max() > 1e-9
    frozen = set(model.clip.parameters()) - set(model.clip.visual.parameters())
    assert frozen and all(p.grad is None for p in frozen)


def test_learnable_parameters_of_table_6():
    """94M in the paper; here with Market-1501's 751 identities. The text encoder is frozen: its depth has no effect."""
    clip_model = clip.CLIP(**clip.ARCHITECTURES["ViT-B/16"], text_layers=1)
    assert count_learnable(PromptSG(clip_model, 751)) / 1e6 == pytest.approx(94.4, abs=0.05)


# ------------------------------------------------------------------------------------------------ variants


def test_without_interaction_z_is_the_visual_embedding(make_model, images):
    model = make_model(interaction=False).eval()
    output = model(images)
    assert len(output.triplet_features) == 3  # z equals v, the last state, and is counted once
    assert torch.equal(output.triplet_features[-1], output.image)
    torch.testing.assert_close(output.text, model.compose(output.image))
    torch.testing.assert_close(output.logits, model.classifier(model.bnneck(output.image)))
    torch.testing.assert_close(model.embed(images), F.normalize(model.bnneck(output.image), dim=1))


def test_without_inversion_only_the_simplified_prompt_is_used(make_model, images):
    model = make_model(inversion=False).eval()
    assert model.default_prompt == "simplified" and make_model().default_prompt == "composed"
    assert torch.equal(model(images).text, model.simplified_text.expand(8, -1))
    assert torch.equal(model.embed(images), model.embed(images, "simplified"))
    with pytest.raises(ValueError, match="simplified"):
        model.embed(images, "composed")


def test_load_the_model_of_a_checkpoint(make_model, images, tmp_path):
    """The checkpoint is enough. The model has the same features and is in eval mode."""
    ours = make_model(4, blocks=1, composed_prompt="a S* man").eval()
    ours.bnneck.running_mean.normal_()
    state = {"model": ours.state_dict(), "model_args": ours.model_args, "args": {"image_size": [64, 32]}}
    state |= {"optimizer": {}, "scheduler": {}, "scaler": {}, "epoch": 1, "log": [], "train_digest": ""}
    checkpoint.save(state, tmp_path / "last.pt")
    model = PromptSG.load(tmp_path / "last.pt")
    assert not model.training and model.image_size == (64, 32) and model.model_args == ours.model_args
    assert torch.equal(model.embed(images), ours.embed(images))
