"""The method: what the text does, where the gradient goes, what is frozen, and how large it all is."""

import pytest
import torch

import clip
import losses
import train
from model import COMPOSED_PROMPT, SIMPLIFIED_PROMPT, InteractionModule, PromptSG, count_learnable, tokenize_composed


def text_parameters(model: PromptSG) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.clip.named_parameters() if not name.startswith("visual.")}


# ------------------------------------------------------------------------------------- the interaction module


@pytest.fixture
def tokens_and_text():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 9, 64, generator=generator), torch.randn(3, 64, generator=generator)


def test_without_blocks_the_output_is_eq_7(tokens_and_text):
    tokens, text = tokens_and_text
    module = InteractionModule(64, blocks=0).double()
    tokens, text = tokens.double(), text.double()
    Q, K, V = module.query(text)[:, None], module.key(tokens), module.value(tokens)
    expected = torch.softmax(Q @ K.transpose(1, 2) / 64**0.5, dim=-1) @ V  # (B, 1, D)
    torch.testing.assert_close(module(text, tokens), expected[:, 0])


def test_the_map_is_normalised_over_the_image_tokens_and_not_constant(tokens_and_text):
    tokens, text = tokens_and_text
    attention = InteractionModule(64).attention_map(text, tokens)
    assert attention.shape == (3, 9)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(3))
    assert attention.std(dim=1).min() > 1e-3


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_the_output_depends_on_the_prompt(tokens_and_text, blocks):
    tokens, text = tokens_and_text
    module = InteractionModule(64, blocks)
    z = module(text, tokens)
    assert z.shape == (3, 64)
    assert (module(text.flip(0), tokens) - z).abs().max() > 1e-3
    torch.testing.assert_close(module(text[:1], tokens)[:1], z[:1])  # one text for all is broadcast


def test_with_blocks_the_output_is_the_mean_over_the_re_weighted_tokens(tokens_and_text):
    tokens, text = tokens_and_text
    module = InteractionModule(64, blocks=2)
    Z = 9 * module.attention_map(text, tokens)[:, :, None] * module.value(tokens)
    torch.testing.assert_close(module(text, tokens), module.blocks[1](module.blocks[0](Z)).mean(dim=1))


def test_two_blocks_are_clips_own(tokens_and_text):
    module = InteractionModule(128)
    assert [type(block) for block in module.blocks] == [clip.ResidualAttentionBlock] * 2
    assert module.blocks[0].attn.heads == 2  # D / 64


# -------------------------------------------------------------------------------------------------- prompts


def test_s_star_takes_the_place_of_a_word(make_model, images):
    """With the embedding of "tall" as S*, the composed prompt is CLIP's own "A photo of a tall person"."""
    model = make_model().eval()
    assert (COMPOSED_PROMPT, SIMPLIFIED_PROMPT) == ("A photo of a S* person", "A photo of a person")
    assert model.composed_ids.shape == (1, 8)
    tall = model.clip.token_embedding.weight[clip.tokenize("tall")[0, 1]]
    model.inversion.forward = lambda image: tall.expand(len(image), -1)
    with torch.no_grad():
        text = model.compose(torch.zeros(2, 128))
        expected = model.clip.encode_text(clip.tokenize("A photo of a tall person"))
        other = model.compose(torch.zeros(2, 128), tokenize_composed("A S* person with a green top"))
        other_expected = model.clip.encode_text(clip.tokenize("A tall person with a green top"))
    torch.testing.assert_close(text, expected.expand(2, -1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other, other_expected.expand(2, -1), atol=1e-5, rtol=1e-5)


def test_prompts_without_one_slot_or_too_long_are_refused(make_model):
    assert make_model(composed_prompt="S* walks").composed_ids.shape == (1, 4)
    for prompt in ("A photo of a person", "S* and S*", "A photo of aS* person"):
        with pytest.raises(ValueError, match=r"must have S\* as one of its words"):
            make_model(composed_prompt=prompt)
    with pytest.raises(ValueError, match="79 tokens long"):
        make_model(composed_prompt="S*" + " person" * 76)


def test_s_star_starts_out_the_size_of_a_word(make_model):
    model = make_model()
    pseudo_words = model.inversion(torch.randn(512, 128))
    words = model.clip.token_embedding.weight
    assert pseudo_words.shape == (512, 128)
    assert pseudo_words.std().item() == pytest.approx(words.std().item(), rel=0.05)


def test_a_clip_of_another_vocabulary_or_shorter_texts_is_refused():
    tiny = clip.ARCHITECTURES["tiny"]
    for other in ({"vocab_size": 600}, {"context_length": 7}):
        with pytest.raises(ValueError, match="another vocabulary than OpenAI's, or reads too few tokens"):
            PromptSG(clip.CLIP(**tiny, **other), 10)


def test_the_simplified_feature_is_clips(make_model):
    model = make_model()
    expected = model.clip.encode_text(clip.tokenize("A photo of a person"))
    assert torch.equal(model.simplified_text, expected)


@pytest.mark.parametrize("prompt", ["composed", "simplified"])
def test_embed_is_normalised_and_of_the_prompt(make_model, images, prompt):
    model = make_model().eval()
    with torch.no_grad():
        features = model.embed(images, prompt)
    assert features.shape == (8, 128)
    torch.testing.assert_close(features.norm(dim=1), torch.ones(8))


def test_the_retrieval_feature_is_taken_behind_the_bnneck(make_model, images):
    model = make_model().eval()
    model.bnneck.running_mean.normal_()
    model.bnneck.weight.data.uniform_(0.5, 2)
    expected = torch.nn.functional.normalize(model.bnneck(model(images).triplet_features[0]), dim=1)
    torch.testing.assert_close(model.embed(images), expected)


def test_embed_differs_between_prompts_and_refuses_others(make_model, images):
    model = make_model().eval()
    assert (model.embed(images, "composed") - model.embed(images, "simplified")).abs().max() > 1e-4
    v = model.clip.encode_image(images).embedding
    torch.testing.assert_close(model.embed(images, "none"), torch.nn.functional.normalize(v))
    with pytest.raises(ValueError, match="use 'composed', 'simplified' or 'none'"):
        model.embed(images, "long")


# -------------------------------------------------------------------------------------------- what is learned


def loss_terms(output, labels, temperature: float) -> dict[str, torch.Tensor]:
    return {
        "triplet": sum(losses.triplet_loss(features, labels) for features in output.triplet_features),
        "identity": losses.identity_loss(output.logits, labels),
        "supcon": losses.supcon_loss(output.image, output.text, labels, temperature),
    }


@pytest.mark.parametrize("term", ["triplet", "identity", "supcon"])
def test_every_loss_reaches_s_star_and_the_image_through_the_frozen_text(make_model, images, labels, term):
    """Also ID and triplet loss: they reach the inversion network through the text that steers the map."""
    model = make_model().train()
    torch.nn.init.normal_(model.classifier.weight)  # of the size it grows to, not the tiny one it starts with
    pseudo_words = []
    model.inversion.register_forward_hook(lambda module, inputs, output: pseudo_words.append(output))
    output = model(images)
    pseudo_words[0].retain_grad()
    loss_terms(output, labels, model.temperature)[term].backward()
    assert pseudo_words[0].shape == (8, 128) and pseudo_words[0].grad.abs().max() > 1e-9
    assert model.inversion[0].weight.grad.abs().max() > 1e-9
    assert model.clip.visual.conv1.weight.grad.abs().max() > 1e-9
    assert all(p.grad is None for p in text_parameters(model).values())


def test_the_gradient_passes_through_the_text_encoder_to_the_image(make_model):
    image = torch.randn(8, 128, requires_grad=True)
    make_model().train().compose(image)[:, 0].sum().backward()
    assert image.grad.abs().max() > 1e-9


def test_training_changes_all_that_is_learnable_and_no_text_weight(make_model, images, labels):
    model = make_model().train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameter_groups(1e-3, 1e-3), weight_decay=1e-4)
    for _ in range(3):
        loss = sum(loss_terms(model(images), labels, model.temperature).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    text = {f"clip.{name}" for name in text_parameters(model)}
    assert len(text) > 20
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (name in text or name == "bnneck.bias"), name


def test_the_text_encoder_never_trains(make_model):
    model = make_model().train()
    assert model.clip.visual.training and model.inversion.training
    assert not model.clip.transformer.training and not model.clip.ln_final.training
    assert not any(p.requires_grad for p in text_parameters(model).values())


def test_the_classifier_starts_small(make_model):
    assert make_model(1000).classifier.weight.std().item() == pytest.approx(0.001, rel=0.05)


def test_parameter_groups_hold_every_learnable_parameter_once(make_model):
    model = make_model()
    groups = model.parameter_groups(5e-6, 5e-5)
    assert [group["lr"] for group in groups] == [5e-6, 5e-5]
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert {id(p) for p in model.clip.visual.parameters()} == {id(p) for p in groups[0]["params"]}


@pytest.mark.parametrize("identities, millions", [(751, 94.4), (1041, 94.6)])
def test_learnable_parameters_of_table_6(identities, millions):
    """The paper says 94M on Market-1501 (751 identities) and on MSMT17 (1,041)."""
    model = PromptSG(clip.untrained("ViT-B/16"), identities)
    assert round(count_learnable(model) / 1e6, 1) == millions


# ------------------------------------------------------------------------------------------------ ablations


def test_the_model_runs_on_a_resnet(images, labels):
    config = dict(embed_dim=64, vision_layers=(1, 1, 1, 1), vision_width=16, text_width=64, text_layers=1)
    model = PromptSG(clip.CLIP(**config, vocab_size=49408, image_size=(64, 32)), 4).train()
    output = model(images)
    assert output.triplet_features[0].shape == (8, 64) and output.logits.shape == (8, 4)
    sum(loss_terms(output, labels, model.temperature).values()).backward()
    assert model.clip.visual.conv1.weight.grad.abs().max() > 0


def test_without_interaction_z_is_the_visual_embedding(make_model, images):
    model = make_model(interaction=False).eval()
    output = model(images)
    assert model.interaction is None
    assert len(output.triplet_features) == 3  # v is z and the last state: counted once
    assert torch.equal(output.triplet_features[-1], output.image)
    torch.testing.assert_close(output.text, model.compose(output.image))


def test_without_inversion_only_the_simplified_prompt_exists(make_model, images):
    model = make_model(inversion=False).eval()
    assert model.inversion is None
    assert torch.equal(model(images).text, model.simplified_text.expand(8, -1))
    assert model.embed(images, "simplified").shape == (8, 128)
    with pytest.raises(ValueError, match="simplified"):
        model.embed(images, "composed")


def test_a_feature_does_not_depend_on_its_batch(make_model, images):
    """Alone, in another order, among other pictures: the same feature to 1e-5, whatever the prompt."""
    model = make_model().eval()
    with torch.no_grad():
        for prompt in ("composed", "simplified"):
            features = model.embed(images, prompt)
            alone = torch.cat([model.embed(image[None], prompt) for image in images])
            torch.testing.assert_close(alone, features, atol=1e-5, rtol=0)
            order = torch.tensor([5, 2, 7, 0])
            torch.testing.assert_close(model.embed(images[order], prompt), features[order], atol=1e-5, rtol=0)


# -------------------------------------------------------------------------------------------------- the update


@pytest.mark.parametrize(
    "flags", ["--supcon-weight 0.7", "--supcon-weight 0.7 --without-i2t", "--train-prompt simplified", "--baseline"]
)
def test_an_update_is_eq_10_and_one_step_of_adam(make_model, flags):
    argv = "--backbone tiny --device cpu --batch-ids 4 --margin 1.3 --label-smoothing 0.2 "
    args = train.parse_args((argv + flags).split())
    train.check_args(args)
    ablations = {"inversion": args.train_prompt == "composed" and not args.baseline, "interaction": not args.baseline}
    run, other = (train.Run(make_model(**ablations).train(), args) for _ in range(2))
    images = torch.randint(0, 256, (8, 3, 64, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
    loss, triplet, identity, supcon, accuracy = train.update(run, images, labels)

    output = other.model(clip.normalize(images))
    expected_triplet = sum(losses.triplet_loss(features, labels, 1.3) for features in output.triplet_features)
    expected_identity = losses.identity_loss(output.logits, labels, 0.2)
    directions = ["t2i"] if args.without_i2t else ["i2t", "t2i"] if ablations["inversion"] else []
    expected_supcon = losses.supcon_loss(output.image, output.text, labels, other.model.temperature, directions)
    torch.testing.assert_close(triplet, expected_triplet)
    torch.testing.assert_close(identity, expected_identity)
    torch.testing.assert_close(supcon, expected_supcon)
    torch.testing.assert_close(loss, triplet + identity + args.supcon_weight * supcon)
    assert accuracy == (output.logits.argmax(dim=1) == labels).float().mean()
    (expected_triplet + expected_identity + args.supcon_weight * expected_supcon).backward()
    other.optimizer.step()
    for one, expected in zip(run.model.parameters(), other.model.parameters()):
        torch.testing.assert_close(one, expected)
