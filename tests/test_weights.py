"""Loading CLIP's weights: equality with three other implementations, layouts, refusals, downloads.

OUTPUTS were recorded once, in an environment of their own, from models that held the weights and read the inputs of
openai_format.py, sizes SMALL_VIT and SMALL_RESNET at 224x224:

- "vit" and "resnet" from github.com/openai/CLIP, clip/model.py, `build_model`, the ResNet in double precision. At
  256x128 the position embedding was replaced by torch's bicubic interpolation of it, and the two pools of layer4.0 by
  nn.Identity (last stride 1). open_clip 3.3.0's CLIP with quick_gelu=True had the same names and gave the same numbers.
- "transformers" from CLIPModel of Hugging Face transformers 4.57.6; at 256x128 with interpolate_pos_encoding=True.
"""

import base64
import hashlib
import http.server
import json
import socket
import sys
import threading
import time
import warnings

import pytest
import torch
from openai_format import (
    SMALL_RESNET,
    SMALL_VIT,
    TOKEN_IDS,
    formula_images,
    formula_weights,
    small_weights,
    write_archive,
)

import clip
from util import weights as files

VIT = dict(SMALL_VIT, image_size=(224, 224))
RESNET = dict(SMALL_RESNET, image_size=(224, 224))
OPENAI_TEXT = [
    [0.76457, 0.27123, 0.02574, 0.55829, 1.05258, 0.00248, -0.25156, -0.87202],
    [0.7188, 0.60331, 0.33532, -0.16477, -0.01152, -0.5258, -0.52209, -1.06616],
    [0.73814, 0.71226, -0.26875, 0.32055, 1.09126, -0.80588, 0.53291, -0.99147],
]
# Every twelfth of 96 numbers: two images at 224x224, two at 256x128, three texts.
OUTPUTS = {
    "vit": (
        [
            [-0.77829, -0.2504, -0.13996, 0.5792, 0.20879, 1.00128, -1.20956, 0.77566],
            [-0.73673, -0.23314, -0.19083, 0.60255, 0.15774, 1.07674, -1.14713, 0.74364],
        ],
        [
            [-0.84273, -0.28825, -0.14375, 0.59064, 0.15117, 1.01444, -1.21928, 0.79643],
            [-0.71398, -0.19495, -0.17918, 0.57809, 0.18768, 1.03579, -1.12564, 0.74959],
        ],
        OPENAI_TEXT,
    ),
    "resnet": (
        [
            [4.03752, 19.23066, -10.88312, 12.79773, -17.14239, 30.29054, 14.21915, -27.99005],
            [5.90292, 20.94779, -6.49323, 8.14117, -16.86366, 32.56497, 6.28115, -12.10325],
        ],
        [
            [4.22865, 10.49629, -15.44542, 38.03233, -4.82684, 4.19797, 8.01565, -0.39024],
            [-4.38228, 8.66685, -16.48807, 9.72696, -9.54683, 30.06072, 15.81951, -13.85882],
        ],
        OPENAI_TEXT,
    ),
    "transformers": (
        [
            [-0.32269, -0.26038, 0.41194, 0.46797, 0.48021, 1.15481, 0.17503, -0.69422],
            [-0.32255, -0.18041, 0.41953, 0.52794, 0.46055, 1.08949, 0.24086, -0.69587],
        ],
        [
            [-0.38474, -0.25418, 0.38118, 0.47617, 0.49443, 1.21738, 0.17073, -0.69917],
            [-0.34723, -0.18651, 0.39982, 0.51816, 0.46326, 1.0929, 0.21374, -0.68506],
        ],
        [
            [0.32265, 0.2088, -0.89871, 0.60347, -0.43097, 0.22418, 0.27458, 0.24831],
            [0.51426, 0.05443, -0.2286, 0.40886, -0.64873, 0.12959, -0.09936, 0.68831],
            [0.33793, 0.47241, -0.44241, 1.00366, -0.41199, -0.01875, -0.41075, 0.39756],
        ],
    ),
}


def transformers_weights() -> dict[str, torch.Tensor]:
    """Formula weights by the names and shapes of transformers' CLIPModel, sizes VIT."""
    shapes = {
        "logit_scale": (),
        "visual_projection.weight": (96, 128),
        "text_projection.weight": (96, 128),
        "vision_model.embeddings.class_embedding": (128,),
        "vision_model.embeddings.patch_embedding.weight": (128, 3, 16, 16),
        "vision_model.embeddings.position_embedding.weight": (197, 128),
        "text_model.embeddings.token_embedding.weight": (600, 128),
        "text_model.embeddings.position_embedding.weight": (77, 128),
    }
    norms = ["vision_model.pre_layrnorm", "vision_model.post_layernorm", "text_model.final_layer_norm"]
    for layer in [f"vision_model.encoder.layers.{n}" for n in range(4)] + [
        f"text_model.encoder.layers.{n}" for n in "01"
    ]:
        norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{part}.weight": (128, 128), f"{layer}.self_attn.{part}.bias": (128,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (512, 128), f"{layer}.mlp.fc1.bias": (512,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (128, 512), f"{layer}.mlp.fc2.bias": (128,)}
    for norm in norms:
        shapes |= {f"{norm}.weight": (128,), f"{norm}.bias": (128,)}
    return formula_weights(shapes)


def write_safetensors(tensors, path):
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def save(value, path):
    torch.save(value, path)
    return path


def refusal(source, **options) -> str:
    """Return the message with which clip.load refuses a file; check that it is one line that names the file."""
    with pytest.raises(ValueError) as error:
        clip.load(source, **options)
    text = str(error.value)
    assert str(source) in text and "\n" not in text and "size mismatch" not in text
    return text


# ----------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("kind", OUTPUTS)
def test_features_are_those_of_other_implementations(kind, tmp_path):
    weights = transformers_weights() if kind == "transformers" else small_weights(RESNET if kind == "resnet" else VIT)
    path = write_safetensors(weights, tmp_path / "weights")
    square = clip.load(path, image_size=(224, 224), last_stride=2).double()
    person = clip.load(path, image_size=(256, 128)).double()
    with torch.no_grad():
        outputs = (
            square.encode_image(formula_images(224, 224).double()).embedding,
            person.encode_image(formula_images(256, 128).double()).embedding,
            square.encode_text(TOKEN_IDS),
        )
    for output, expected in zip(outputs, OUTPUTS[kind], strict=True):
        torch.testing.assert_close(output[:, ::12].float(), torch.tensor(expected), atol=2e-5, rtol=2e-5)


def test_position_embedding_is_resized_bicubically_and_its_class_row_kept():
    """From a square of 4 x 4 to 8 rows of 4: along the rows nothing changes, along the columns by the cubic kernel."""
    square = 10 * torch.arange(4.0)[:, None] ** 2 + torch.arange(4.0)[None, :]
    positions = torch.cat([torch.full((1, 1), 99.0), square.view(16, 1)])
    assert torch.equal(clip.resize_positions(positions, (4, 4)), positions)
    resized = clip.resize_positions(positions, (8, 4))
    assert resized.shape == (33, 1) and resized[0] == 99
    rows = resized[1:].view(8, 4)
    # Keys' kernel with a = -0.75, as torch uses it, at 1.75, 0.75, 0.25 and 1.25.
    kernel = torch.tensor([-0.03515625, 0.26171875, 0.87890625, -0.10546875])
    for r in range(8):
        first = (r + 1) // 2 - 2
        near = square[torch.arange(first, first + 4).clamp(0, 3)]
        torch.testing.assert_close(rows[r], (kernel.flip(0) if r % 2 else kernel) @ near)


def test_untrained_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b = clip.untrained("tiny", seed=1).state_dict(), clip.untrained("tiny", seed=1).state_dict()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["visual.proj"], clip.untrained("tiny", seed=2).visual.proj)


# ------------------------------------------------------------------------------------------------ layouts


def half(weights):
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def prefixed(prefix, weights):
    return {prefix + name: tensor for name, tensor in weights.items()}


NUMBERS = {"input_resolution": 64, "context_length": 77, "vocab_size": 600}  # which OpenAI's code keeps in a state dict
OTHERS = {"inversion.0.weight": torch.zeros(3), "bnneck.weight": torch.ones(2)}
LAYOUTS = {
    "archive": write_archive,
    "half": lambda weights, path: save(half(weights), path),
    "before 1.6": lambda weights, path: torch.save(weights, path, _use_new_zipfile_serialization=False),
    "safetensors": lambda weights, path: write_safetensors(half(weights), path),
    "wrapped": lambda weights, path: save({"epoch": 3, "state_dict": prefixed("module.", weights)}, path),
    "numbers": lambda weights, path: save(
        {"model": {**weights, **{k: torch.tensor(n) for k, n in NUMBERS.items()}}}, path
    ),
    "last.pt": lambda weights, path: save(
        {"version": 2, "model": prefixed("clip.", weights) | OTHERS, "log": []}, path
    ),
}


@pytest.mark.parametrize("config", [SMALL_VIT, SMALL_RESNET], ids=["vit", "resnet"])
def test_each_layout_gives_the_same_weights(config, tmp_path, capsys):
    weights = small_weights(config)
    for name, write in LAYOUTS.items():
        path = tmp_path / f"{name}.any"
        write(weights, path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch.jit.load is deprecated and says so; a user can do nothing about it
            model = clip.load(path, image_size=(64, 64), last_stride=2)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items()), name
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert model.source == {"clip_file": str(path), "clip_sha256": sha256}
        assert capsys.readouterr().out == f"CLIP's weights: {path}, sha256 {sha256}\n"


def test_folder_and_bin_file_of_transformers(tmp_path):
    weights = transformers_weights()
    expected = clip.load(write_safetensors(weights, tmp_path / "expected")).state_dict()
    (tmp_path / "snapshot").mkdir()
    config = {
        "text_config": {"hidden_size": 128, "num_attention_heads": 2},
        "vision_config": {"hidden_act": "quick_gelu"},
    }
    (tmp_path / "snapshot" / "config.json").write_text(json.dumps(config))
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    path = save({**half(weights), **ids}, tmp_path / "snapshot" / "pytorch_model.bin")
    for source in (path, path.parent, str(path.parent)):
        loaded = clip.load(source)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    write_safetensors(half(weights), tmp_path / "snapshot" / "model.safetensors")
    assert clip.load(path.parent).source["clip_file"].endswith("model.safetensors")
    for settings, words in (
        ({"vision_config": {"hidden_act": "gelu"}}, "config.json asks for the activation gelu"),
        ({"text_config_dict": {"hidden_act": "gelu"}, "text_config": {}}, "the activation gelu"),
        ({"text_config": {"num_attention_heads": 4}}, "heads of 128 channels"),
        ({"vision_config": {"num_attention_heads": "many"}}, "config.json beside it is damaged"),
        ([], "config.json beside it is damaged"),
    ):
        (tmp_path / "snapshot" / "config.json").write_text(json.dumps(settings))
        assert words in refusal(path)


def test_position_embedding_of_a_fine_tuned_clip_fits_its_own_size_only(tmp_path):
    weights = small_weights(dict(SMALL_VIT, image_size=(128, 64)))
    path = save(weights, tmp_path / "fine-tuned.pt")
    loaded = clip.load(path, image_size=(128, 64)).visual.positional_embedding
    assert torch.equal(loaded, weights["visual.positional_embedding"])
    assert "its 32 positions are not the 16x8 of this image size" in refusal(path)


def test_safetensors_file_of_the_safetensors_package(tmp_path):
    """Written by safetensors 0.8.0: F32, F16, BF16 without dimensions, and I64."""
    path = tmp_path / "some.safetensors"
    path.write_bytes(base64.b64decode(WRITTEN_BY_SAFETENSORS))
    tensors = files.read_safetensors(path)
    assert tensors["b"].tolist() == [[0, 1, 2], [3, 4, 5]] and tensors["b"].dtype == torch.float32
    assert tensors["a"].tolist() == [1.5, -2] and tensors["a"].dtype == torch.float16
    assert tensors["c"].shape == () and tensors["c"] == 3.25 and tensors["c"].dtype == torch.bfloat16
    assert tensors["d"].tolist() == [7, -8] and tensors["d"].dtype == torch.int64


WRITTEN_BY_SAFETENSORS = (
    "AAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJwdCJ9LCJkIjp7ImR0eXBlIjoiSTY0Iiwic2hhcGUiOlsyXSwiZGF0YV9vZmZzZXRzIjpb"
    "MCwxNl19LCJiIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOlsyLDNdLCJkYXRhX29mZnNldHMiOlsxNiw0MF19LCJjIjp7ImR0eXBlIjoiQkYxNiIsInNo"
    "YXBlIjpbXSwiZGF0YV9vZmZzZXRzIjpbNDAsNDJdfSwiYSI6eyJkdHlwZSI6IkYxNiIsInNoYXBlIjpbMl0sImRhdGFfb2Zmc2V0cyI6WzQyLDQ2XX19"
    "ICAgBwAAAAAAAAD4/////////wAAAAAAAIA/AAAAQAAAQEAAAIBAAACgQFBAAD4AwA=="
)


# ----------------------------------------------------------------------------------------------- refusals


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header, words",
    [
        ({"a": entry(0, 8, [2]), "b": entry(12, 16, [1])}, "offsets or the shape of b"),  # a gap
        ({"a": entry(0, 8, [2]), "b": entry(4, 16, [3])}, "offsets or the shape of b"),  # an overlap
        ({"a": entry(0, 16, [3])}, "offsets or the shape of a"),
        ({"a": entry(0, 16, [-2, -2])}, "offsets or the shape of a"),
        ({"a": entry(0, 16, [2.0, 2])}, "offsets or the shape of a"),
        ({"a": entry(0, 8, [2])}, "8 bytes follow"),
        ({"a": entry(0, 24, [6])}, "cut off, at least 8 bytes are missing: get it again"),
        ({"a": entry(0, 2**60, [2**58])}, "cut off"),
        ({"a": entry(0, 16, [2], "F64")}, "a has dtype F64"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "header is damaged"),
        ({"a": entry("0", 16, [4])}, "the offsets"),
        ({"a": 3}, "header is damaged"),
    ],
)
def test_safetensors_file_that_is_not_whole_is_refused(header, words, tmp_path):
    text = json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    assert words in refusal(path)


@pytest.mark.parametrize(
    "content", [b"\xff" * 7 + b"\x00{}", (99).to_bytes(8, "little") + b'{"a"', b"\2" + bytes(7) + b"{x"]
)
def test_safetensors_header_outside_the_file_or_no_json(content, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    assert "damaged" in refusal(path)


WHOLE = small_weights(SMALL_VIT)
VISUAL = {name: tensor for name, tensor in WHOLE.items() if name.startswith("visual.")}
TEXT = {name: tensor for name, tensor in WHOLE.items() if not name.startswith("visual.")}
THEIRS = transformers_weights()
K_PROJ = "text_model.encoder.layers.1.self_attn.k_proj.weight"
BLOCK = {name: None for name in TEXT if name.startswith("transformer.resblocks.0.")}


def changed(changes: dict) -> dict:
    """Return WHOLE with these changes; None removes."""
    return {name: tensor for name, tensor in {**WHOLE, **changes}.items() if tensor is not None}


REFUSALS = {
    "image encoder alone": (VISUAL, "holds an image encoder alone"),
    "image encoder of timm": (
        {"cls_token": torch.zeros(1), "patch_embed.proj.weight": torch.zeros(2, 3, 4, 4)},
        "open_clip_model",
    ),
    "image encoder of transformers": (
        {n: t for n, t in THEIRS.items() if "vision" in n},
        "holds an image encoder alone",
    ),
    "text encoder alone": (TEXT, "holds a text encoder alone"),
    "text encoder of transformers": ({n: t for n, t in THEIRS.items() if "text" in n}, "holds a text encoder alone"),
    "another model": ({"weight": torch.zeros(3)}, "other weights than CLIP's, such as weight"),
    "nothing": ({}, "other weights than CLIP's"),
    "no dictionary": ([torch.zeros(3)], "no state dict"),
    "no tensors": ({"epoch": 3}, "no state dict"),
    "missing": (changed({"visual.ln_post.bias": None}), "it lacks visual.ln_post.bias"),
    "missing size": (changed({"text_projection": None}), "it lacks text_projection"),
    "missing projection": (changed({"visual.proj": None}), "it lacks visual.proj"),
    "missing positions": (changed({"visual.positional_embedding": None}), "it lacks visual.positional_embedding"),
    "missing block": (changed(BLOCK), "and 11 more"),
    "missing of transformers": ({n: t for n, t in THEIRS.items() if n != K_PROJ}, f"it lacks {K_PROJ}"),
    "extra": (changed({"visual.unknown": torch.zeros(3)}), "unexpected weights: visual.unknown"),
    "number as name": ({**WHOLE, 3: torch.zeros(3)}, "unexpected weights: 3"),
    "shape": (changed({"visual.proj": torch.zeros(128, 95)}), "visual.proj is [128, 95] instead of [128, 96]"),
    "flat": (changed({"text_projection": torch.zeros(128)}), "other shapes"),
    "flat convolution": (changed({"visual.conv1.weight": torch.zeros(128, 768)}), "other shapes"),
    "module": (torch.nn.Linear(2, 2), "holds Python objects, such as a whole model"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4b86\nsize 598516980\n", "git lfs pull"),
    "page": (b"\n<!DOCTYPE html>\n<html><head><title>404</title>", "web page"),
    "answer": (b'{"error": "Repository not found"}', "not a weight file"),
    "text": (b"not a weight file", "not a weight file"),
    "empty": (b"", "not a weight file"),
    "zip": (b"PK\5\6" + bytes(18), "not a weight file"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_other_files_are_refused_in_one_line(name, tmp_path):
    content, words = REFUSALS[name]
    path = tmp_path / "some.file"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    text = refusal(path)
    assert words in text and "get it again" not in text


def test_truncated_files_and_flipped_bytes_are_noticed(tmp_path):
    path = tmp_path / "weights.any"
    for write in (save, write_safetensors, write_archive):
        write(WHOLE, path)
        path.write_bytes(path.read_bytes()[:100_000])
        assert "cut off" in refusal(path)
    content = save(WHOLE, path).read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    assert "damaged" in refusal(path)
    path.write_bytes(content[:-1000] + bytes(900) + content[-100:])  # the directory of the zip file
    assert "damaged" in refusal(path)


def test_paths_that_lead_nowhere(tmp_path):
    for source, words in (
        (tmp_path / "none.pt", "no weight file"),
        ("ViT-B/32", "no weight file ViT-B/32"),
        (tmp_path, "no model.safe"),
    ):
        with pytest.raises(FileNotFoundError, match=words):
            clip.load(source)


CHANGES = dict(patch_size=32, vision_width=1024, vision_layers=24, embed_dim=768, text_width=768, text_layers=6)


@pytest.mark.parametrize("name", [*CHANGES, None])
def test_another_architecture_is_refused(name):
    change = {name: CHANGES[name]} if name else {}
    with torch.device("meta"):  # shapes without values
        sizes = clip.read_sizes(clip.CLIP(**{**clip.ARCHITECTURES["ViT-B/16"], **change}).state_dict())
    if name is None:
        return clip.check_architecture(sizes, "ViT-B/16")
    with pytest.raises(ValueError, match=f"another CLIP than ViT-B/16: {name} {CHANGES[name]} instead of [0-9]+$"):
        clip.check_architecture(sizes, "ViT-B/16")


def test_load_compares_with_the_architecture_only_if_asked(tmp_path, monkeypatch):
    path = save(small_weights(SMALL_RESNET), tmp_path / "RN101.pt")
    clip.load(path)
    assert "another CLIP than RN50: " in (text := refusal(path, architecture="RN50"))
    assert "vision_layers (1, 2, 1, 1) instead of (3, 4, 6, 3)" in text
    monkeypatch.setitem(clip.ARCHITECTURES, "RN50", {**SMALL_RESNET, "image_size": (256, 128)})
    clip.load(path, architecture="RN50")


class WritesWhenOpened(torch.nn.Module):
    """TorchScript calls __setstate__ when it opens an archive."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.path)


def test_a_weight_file_cannot_run_code(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(WritesWhenOpened(str(tmp_path / "written"))).save(str(tmp_path / "weights.pt"))
        torch.jit.load(tmp_path / "weights.pt")
    assert (tmp_path / "written").exists()  # so it would
    (tmp_path / "written").unlink()
    assert "it is TorchScript, whose code would run" in refusal(tmp_path / "weights.pt")
    assert not (tmp_path / "written").exists()


# ---------------------------------------------------------------------------------------------- downloads


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a path with what server.files has for it: bytes, a part of them, a status, or (None) nothing at all."""

    def do_GET(self):
        self.server.asked.append(self.path)
        answer = self.server.files.get(self.path, 404)
        if answer is None:
            self.server.closing.wait(20)
            return
        if isinstance(answer, int):
            return self.send_error(answer)
        content, length = answer if isinstance(answer, tuple) else (answer, len(answer))
        self.send_response(200)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """The same weights in OpenAI's archive and as the hub has them."""
    folder = tmp_path_factory.mktemp("contents")
    paths = write_archive(WHOLE, folder / "first"), write_safetensors(WHOLE, folder / "second")
    return [path.read_bytes() for path in paths]


@pytest.fixture
def server(contents, tmp_path, monkeypatch):
    """A server on loopback in place of OpenAI's and the hub. .first and .second are its paths."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.closing, server.url = [], threading.Event(), f"http://127.0.0.1:{server.server_port}"
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        server.first, server.second = f"/{digests[0]}/ViT-B-16.pt", "/timm/vit/resolve/1/open_clip_model.safetensors"
        server.files = dict(zip((server.first, server.second), contents))
        monkeypatch.setitem(clip.URLS, "ViT-B/16", server.url + server.first)
        monkeypatch.setitem(clip.HUB, "ViT-B/16", ("timm/vit/resolve/1", digests[1]))
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(files, "CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(files, "TIMEOUT", 0.3)
        server.cache = tmp_path / "cache"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_openais_file_is_fetched_once_and_kept(server, capsys):
    model = clip.load("ViT-B/16", image_size=(64, 64))
    assert torch.equal(model.visual.proj, WHOLE["visual.proj"])
    assert names_in(server.cache) == ["ViT-B-16.pt"] and server.asked == [server.first]
    out = capsys.readouterr().out
    assert f"downloading {server.url}{server.first}" in out and model.source["clip_sha256"] in out
    server.files.clear()
    assert clip.load("ViT-B/16").source == model.source and server.asked == [server.first]


PAGE = b"<html>sign in to this network</html>"
FAILURES = {
    "not found": (404, "404"),
    "cut off": ((b"PK", 100), "cut off after 2 of 100 bytes"),
    "another file": (b"another", "wrong sha256"),
    "page": (PAGE, "wrong sha256"),
    "silent": (None, "timed out"),
    "refused": ("refused", "refused"),
    "no address": ("no address", "unknown url type"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_hub_follows_when_openais_address_fails(failure, server, monkeypatch, capsys):
    answer, words = FAILURES[failure]
    server.files[server.first] = answer
    if isinstance(answer, str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            start = f"http://127.0.0.1:{free.getsockname()[1]}" if answer == "refused" else "nowhere"
        monkeypatch.setitem(clip.URLS, "ViT-B/16", start + server.first)
    start = time.monotonic()
    model = clip.load("ViT-B/16", image_size=(64, 64))
    assert time.monotonic() - start < 10
    assert torch.equal(model.visual.proj, WHOLE["visual.proj"])
    assert names_in(server.cache) == ["ViT-B-16.openai.safetensors"] and server.asked[-1] == server.second
    assert words in capsys.readouterr().out
    server.files.clear()
    asked = len(server.asked)
    assert clip.load("ViT-B/16").source == model.source and len(server.asked) == asked  # from the cache


def test_if_both_addresses_fail_one_line_says_what_to_do(server):
    server.files = {server.first: 404, server.second: PAGE}
    with pytest.raises(ConnectionError) as error:
        clip.load("ViT-B/16")
    for words in (
        server.url + server.first,
        server.url + server.second,
        str(server.cache),
        "--clip-weights PATH",
        "404",
    ):
        assert words in str(error.value)
    assert "ViT-B-16.pt or ViT-B-16.openai.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert names_in(server.cache) == []


def test_an_interrupted_download_does_not_stay(server, monkeypatch):
    def interrupt(done, total, what):
        assert (what == "") == (total == 0)
        if done < total or what:
            assert [path.suffix for path in server.cache.iterdir()] == [".part"]
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "show_progress", interrupt)
    with pytest.raises(KeyboardInterrupt):
        clip.load("ViT-B/16")
    assert names_in(server.cache) == []


def test_progress_is_shown_on_terminals(server, monkeypatch, capsys):
    clip.load("ViT-B/16")
    assert capsys.readouterr().err == ""
    (server.cache / "ViT-B-16.pt").unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    clip.load("ViT-B/16")
    assert "1 of 2 MiB of ViT-B-16.pt" in capsys.readouterr().err


def test_a_wrong_file_in_the_cache_is_named(server):
    server.cache.mkdir()
    for name in ("ViT-B-16.openai.safetensors", "ViT-B-16.pt"):
        (server.cache / name).write_bytes(b"half of it")
        with pytest.raises(ValueError, match=f"{name} is damaged or another file .* delete it and run again"):
            clip.load("ViT-B/16")
    assert server.asked == []


def test_addresses(monkeypatch):
    """Of the files in DESIGN: revisions and sha256 are recorded in unrelated public projects."""
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    (_, sha256, name), (url, hub_sha256, hub_name) = clip.addresses("RN50")
    assert (name, hub_name) == ("RN50.pt", "RN50.openai.safetensors") and len(sha256) == len(hub_sha256) == 64
    assert url.startswith("https://huggingface.co/timm/resnet50_clip.openai/resolve/ec3d92cf63a5f9d5")
    assert url.endswith("/open_clip_model.safetensors")  # model.safetensors is the image encoder alone
