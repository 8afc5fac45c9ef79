"""clip.py gives the results of OpenAI's code.

The expected numbers were recorded from github.com/openai/CLIP: token ids from simple_tokenizer.py, features from
`build_model` of model.py with the weights and inputs of openai_format.py, in single precision.
"""

import hashlib
import warnings

import openai_format
import pytest
import torch
from openai_format import SMALL_RESNET, SMALL_VIT, TOKEN_IDS, formula_images, shapes_of, small_weights, write_archive

import clip

TOKENS = {
    "A photo of a person": [320, 1125, 539, 320, 2533],
    "": [],
    "  A   photo\tof\n a  person  ": [320, 1125, 539, 320, 2533],
    "café Zürich naïve": [15304, 89, 6522, 4021, 1097, 35689, 563],
    "Ångström Ø": [23176, 10352, 807, 7255, 332, 45598],
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; more": [283, 321, 285, 8911, 34308, 321, 285, 261, 750],
    "<x &amp;lt; y &amp;amp;lt; z": [283, 343, 283, 344, 261, 3333, 282, 345],
    "it's they're I'd we'll won't": [585, 568, 889, 982, 328, 1896, 649, 1342, 1749, 713],
    "👩\u200d👩\u200d👧 🙂🙂": [26304, 26304, 964, 356, 32006, 14860],
    "hello!!!...???": [3306, 11194, 3002, 3824],
    "12345 3.14": [272, 273, 274, 275, 276, 274, 269, 272, 275],
    "日本語テキスト": [39121, 44353, 34002, 252, 2429, 228, 47121, 32421, 486],
    "don’t “quote”": [847, 713, 257, 4020, 257],
    "<|startoftext|> in a text <|endoftext|>": [49406, 530, 320, 4160, 49407],
    "&lt": [283],
    "x_y-z@a.b": [343, 318, 344, 268, 345, 287, 320, 269, 321],
    "Ünïcödé\u00a0space": [6522, 77, 35689, 66, 7255, 67, 4166, 2138],
    "a" * 40: [23126, 23126, 23126, 23126, 6727, 19336],
    "ﬁne ﬂow": [3797, 5608],
    "schÃ¶n": [844, 7255, 333],
}
# Every twelfth of 96 numbers.
TEXT_FEATURES = [
    [0.76457, 0.27123, 0.02574, 0.55829, 1.05258, 0.00248, -0.25156, -0.87202],
    [0.7188, 0.60331, 0.33532, -0.16477, -0.01152, -0.5258, -0.52209, -1.06616],
    [0.73814, 0.71226, -0.26875, 0.32055, 1.09126, -0.80588, 0.53291, -0.99147],
]
IMAGE_FEATURES = {
    "vit": [
        [-0.87051, -0.29916, 0.01203, 0.49935, 0.18379, 1.00501, -1.29757, 0.8388],
        [-0.71575, -0.31629, -0.32865, 0.52997, 0.22595, 1.2374, -1.12549, 0.75504],
    ],
    "resnet": [
        [12.17573, 28.78486, 1.59063, 16.48761, -19.26616, 25.22763, 3.488, -11.52325],
        [-1.50023, 8.69683, -4.61412, 13.7491, -9.29454, 15.76978, 3.43607, -2.45317],
    ],
}
# SHA-256 of the sorted lines "name shape" of the original state dicts.
LAYOUTS = {
    "ViT-B/16": "a8f7047243e613f7be6d3166dda68bd84df4eb075659f4dc9cb0bfca9a8dbea9",
    "RN50": "e5f0681b1583add73e23651791dfe72e2792dc6805a3584dfc6ea62490330233",
}
CONFIGS = {"vit": SMALL_VIT, "resnet": SMALL_RESNET}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    return {name: write_archive(small_weights(config), folder / f"{name}.pt") for name, config in CONFIGS.items()}


@pytest.mark.parametrize("text", TOKENS)
def test_token_ids_match_the_original(text):
    expected = [49406, *TOKENS[text], 49407]
    assert clip.tokenize(text).tolist() == [expected + [0] * (77 - len(expected))]


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="79 tokens long"):
        clip.tokenize("person " * 77)


@pytest.mark.parametrize("kind", CONFIGS)
def test_features_match_the_original(kind, archives):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as torch's, that torch.jit.load is deprecated
        model = clip.load(archives[kind], image_size=(64, 64), last_stride=2)
    with torch.no_grad():
        features = model.encode_image(formula_images(64, 64))
        text = model.encode_text(TOKEN_IDS)
    torch.testing.assert_close(features.embedding[:, ::12], torch.tensor(IMAGE_FEATURES[kind]), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(text[:, ::12], torch.tensor(TEXT_FEATURES), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(features.tokens[:, 0], features.embedding)


@pytest.mark.parametrize("name", LAYOUTS)
def test_names_and_shapes_match_the_original(name):
    with torch.device("meta"):
        model = clip.CLIP(**clip.ARCHITECTURES[name], image_size=(224, 224), last_stride=2)
    lines = sorted(f"{key} {shape}" for key, shape in shapes_of(model).items())
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == LAYOUTS[name]


@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_and_states_at_person_size(kind, archives):
    """ViT: the class token after the last but one block and after ln_post. ResNet: the means of two stages. Then v."""
    model, outputs = clip.load(archives[kind]), []
    visual = model.visual
    watched = [visual.transformer.resblocks[-2], visual.ln_post] if kind == "vit" else [visual.layer3, visual.layer4]
    for module in watched:
        module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    features = model.encode_image(formula_images(256, 128))
    assert model.grid == (16, 8)
    assert features.embedding.shape == (2, 96) and features.tokens.shape == (2, 1 + 16 * 8, 96)
    before = [output[:, 0] if kind == "vit" else output.mean((2, 3)) for output in outputs]
    for state, expected in zip(features.states, [*before, features.embedding], strict=True):
        assert torch.equal(state, expected)


def test_attention_pool_matches_the_definition_at_every_position(archives):
    """Compared with a loop over heads. OpenAI's code computes position 0 only."""
    pool = clip.load(archives["resnet"]).visual.attnpool
    feature_map = openai_format.formula("feature map", (1, 256, 16, 8)).float()
    with torch.no_grad():
        tokens = pool(feature_map)[0]
        x = feature_map[0].flatten(1).T
        x = torch.cat([x.mean(0, keepdim=True), x]) + pool.positional_embedding
        q, k, v = pool.q_proj(x), pool.k_proj(x), pool.v_proj(x)
        heads = [slice(64 * i, 64 * i + 64) for i in range(4)]
        mixed = [(q[:, h] @ k[:, h].T / 8).softmax(dim=1) @ v[:, h] for h in heads]
        expected = pool.c_proj(torch.cat(mixed, dim=1))
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_positions_after_the_end_token_have_no_effect(archives):
    """encode_text skips them: its features equal those of all 77 positions."""
    model = clip.load(archives["vit"])
    ids = torch.nn.functional.pad(TOKEN_IDS, (0, 69))
    expected = model.encode_embeddings(model.token_embedding(ids), ids.argmax(dim=1))
    torch.testing.assert_close(model.encode_text(ids), expected, atol=1e-5, rtol=1e-5)
