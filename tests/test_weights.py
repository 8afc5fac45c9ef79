"""Loading CLIP's weights: recorded features, file layouts, refused files, downloads."""

import base64
import hashlib
import http.server
import json
import threading

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
from util import weights as weight_files

# Every twelfth of 96 numbers: the second image of `formula_images` at 256x128, with weights for 224x224. Recorded from
# - vit and resnet: github.com/openai/CLIP, clip/model.py, `build_model`, with the position embedding interpolated
#   by torch (bicubic) and the two pools of layer4.0 replaced by nn.Identity (last stride 1). open_clip 3.3.0 agrees.
# - transformers: CLIPModel of transformers 4.57.6, with interpolate_pos_encoding=True.
IMAGE_FEATURES = {
    "vit": [-0.71398, -0.19495, -0.17918, 0.57809, 0.18768, 1.03579, -1.12564, 0.74959],
    "resnet": [-4.38228, 8.66685, -16.48807, 9.72696, -9.54683, 30.06072, 15.81951, -13.85882],
    "transformers": [-0.34723, -0.18651, 0.39982, 0.51816, 0.46326, 1.0929, 0.21374, -0.68506],
}
# The second text of TOKEN_IDS. OpenAI's code uses the same text weights for both backbones.
OPENAI_TEXT = [0.7188, 0.60331, 0.33532, -0.16477, -0.01152, -0.5258, -0.52209, -1.06616]
TRANSFORMERS_TEXT = [0.51426, 0.05443, -0.2286, 0.40886, -0.64873, 0.12959, -0.09936, 0.68831]


def transformers_weights() -> dict[str, torch.Tensor]:
    """Return formula weights with the names and shapes of transformers' CLIPModel, for 224x224."""
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
    for encoder, depth in (("vision_model", 4), ("text_model", 2)):
        for layer in [f"{encoder}.encoder.layers.{n}" for n in range(depth)]:
            norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                shapes |= {f"{layer}.self_attn.{part}.weight": (128, 128), f"{layer}.self_attn.{part}.bias": (128,)}
            shapes |= {f"{layer}.mlp.fc1.weight": (512, 128), f"{layer}.mlp.fc1.bias": (512,)}
            shapes |= {f"{layer}.mlp.fc2.weight": (128, 512), f"{layer}.mlp.fc2.bias": (128,)}
    for norm in norms:
        shapes |= {f"{norm}.weight": (128,), f"{norm}.bias": (128,)}
    return formula_weights(shapes)


def save(value, path):
    torch.save(value, path)
    return path


def save_old_format(value, path):
    torch.save(value, path, _use_new_zipfile_serialization=False)


def save_safetensors(tensors, path):
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, bytearray()
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    path.write_bytes(safetensors_bytes(header, bytes(data)))
    return path


def safetensors_bytes(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def error_of(source, **options) -> str:
    """Return the message with which clip.load refuses a file: one line that names the file."""
    with pytest.raises(ValueError) as error:
        clip.load(source, **options)
    text = str(error.value)
    assert str(source) in text and "\n" not in text
    return text


# ----------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("kind", IMAGE_FEATURES)
def test_features_match_other_implementations(kind, tmp_path):
    """At person size: interpolated position embedding, and last stride 1 for the ResNet."""
    config = dict(SMALL_RESNET if kind == "resnet" else SMALL_VIT, image_size=(224, 224))
    weights = transformers_weights() if kind == "transformers" else small_weights(config)
    model = clip.load(save_safetensors(weights, tmp_path / "weights"), image_size=(256, 128)).double()
    with torch.no_grad():
        image = model.encode_image(formula_images(256, 128).double()).embedding[1]
        text = model.encode_text(TOKEN_IDS)[1]
    expected_text = TRANSFORMERS_TEXT if kind == "transformers" else OPENAI_TEXT
    for found, expected in ((image, IMAGE_FEATURES[kind]), (text, expected_text)):
        torch.testing.assert_close(found[::12].float(), torch.tensor(expected), atol=2e-5, rtol=2e-5)


def test_position_embedding_is_interpolated_bicubically():
    """From 4 x 4 to 8 rows of 4. The class token's position does not change."""
    square = 10 * torch.arange(4.0)[:, None] ** 2 + torch.arange(4.0)[None, :]
    positions = torch.cat([torch.full((1, 1), 99.0), square.view(16, 1)])
    assert torch.equal(clip.resize_positions(positions, (4, 4)), positions)
    resized = clip.resize_positions(positions, (8, 4))
    assert resized.shape == (33, 1) and resized[0] == 99
    # Keys' kernel with a = -0.75, as in torch, at 1.75, 0.75, 0.25 and 1.25.
    kernel = torch.tensor([-0.03515625, 0.26171875, 0.87890625, -0.10546875])
    for r, row in enumerate(resized[1:].view(8, 4)):
        first = (r + 1) // 2 - 2
        near = square[torch.arange(first, first + 4).clamp(0, 3)]
        torch.testing.assert_close(row, (kernel.flip(0) if r % 2 else kernel) @ near)


def test_position_embedding_of_a_fine_tuned_clip_fits_its_own_size_only(tmp_path):
    weights = small_weights(dict(SMALL_VIT, image_size=(128, 64)))
    path = save(weights, tmp_path / "fine-tuned.pt")
    loaded = clip.load(path, image_size=(128, 64)).visual.positional_embedding
    assert torch.equal(loaded, weights["visual.positional_embedding"])
    assert "its 32 positions" in error_of(path)


# ------------------------------------------------------------------------------------------------ layouts


def half(weights: dict) -> dict:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def prefixed(prefix: str, weights: dict) -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


# OpenAI's code keeps these numbers in a state dict; a checkpoint of train.py holds other modules, too.
NUMBERS = {"input_resolution": torch.tensor(64), "context_length": torch.tensor(77), "vocab_size": torch.tensor(600)}
OTHER_MODULES = {"inversion.0.weight": torch.zeros(3), "bnneck.weight": torch.ones(2)}
LAYOUTS = {
    "TorchScript archive": write_archive,
    "before torch 1.6": save_old_format,
    "safetensors": lambda weights, path: save_safetensors(half(weights), path),
    "open_clip": lambda weights, path: save({"epoch": 3, "state_dict": prefixed("module.", half(weights))}, path),
    "OpenAI's state dict": lambda weights, path: save({**weights, **NUMBERS}, path),
    "last.pt": lambda weights, path: save({"model": prefixed("clip.", weights) | OTHER_MODULES, "log": []}, path),
}


@pytest.mark.parametrize("config", [SMALL_VIT, SMALL_RESNET], ids=["vit", "resnet"])
def test_every_layout_gives_the_same_weights(config, tmp_path):
    weights, path = small_weights(config), tmp_path / "weights.any"
    for name, write in LAYOUTS.items():
        write(weights, path)
        model = clip.load(path, image_size=(64, 64), last_stride=2)
        assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items()), name
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert model.source == {"clip_file": str(path), "clip_sha256": sha256}


def test_a_folder_of_transformers(tmp_path):
    weights, config = transformers_weights(), tmp_path / "config.json"
    config.write_text(json.dumps({"text_config": {"hidden_size": 128, "num_attention_heads": 2}}))
    save(
        {**half(weights), "text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "pytorch_model.bin"
    )
    from_bin = clip.load(tmp_path)
    assert torch.equal(from_bin.visual.proj, weights["visual_projection.weight"].T)
    path = save_safetensors(half(weights), tmp_path / "model.safetensors")  # preferred if both exist
    assert clip.load(tmp_path).source["clip_file"] == str(path)
    for settings, words in (
        ({"vision_config": {"hidden_act": "gelu"}}, "activation gelu"),
        ({"text_config": {"num_attention_heads": 4}}, "heads of 128 channels"),
        ([], "config.json"),
    ):
        config.write_text(json.dumps(settings))
        assert words in error_of(path)


def test_a_file_of_the_safetensors_package(tmp_path):
    """Written by safetensors 0.8.0: I64, F32, BF16 without dimensions, F16."""
    path = tmp_path / "some.safetensors"
    path.write_bytes(base64.b64decode(WRITTEN_BY_SAFETENSORS))
    found = {name: (tensor.dtype, tensor.tolist()) for name, tensor in weight_files.read_safetensors(path).items()}
    assert found == {
        "a": (torch.float16, [1.5, -2]),
        "b": (torch.float32, [[0, 1, 2], [3, 4, 5]]),
        "c": (torch.bfloat16, 3.25),
        "d": (torch.int64, [7, -8]),
    }


WRITTEN_BY_SAFETENSORS = (
    "AAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJwdCJ9LCJkIjp7ImR0eXBlIjoiSTY0Iiwic2hhcGUiOlsyXSwiZGF0YV9vZmZzZXRzIjpb"
    "MCwxNl19LCJiIjp7ImR0eXBlIjoiRjMyIiwic2hhcGUiOlsyLDNdLCJkYXRhX29mZnNldHMiOlsxNiw0MF19LCJjIjp7ImR0eXBlIjoiQkYxNiIsInNo"
    "YXBlIjpbXSwiZGF0YV9vZmZzZXRzIjpbNDAsNDJdfSwiYSI6eyJkdHlwZSI6IkYxNiIsInNoYXBlIjpbMl0sImRhdGFfb2Zmc2V0cyI6WzQyLDQ2XX19"
    "ICAgBwAAAAAAAAD4/////////wAAAAAAAIA/AAAAQAAAQEAAAIBAAACgQFBAAD4AwA=="
)

# ------------------------------------------------------------------------------------------------ refusals

WEIGHTS = small_weights(SMALL_VIT)


def only(word: str) -> dict:
    return {name: tensor for name, tensor in WEIGHTS.items() if name.startswith(word)}


def without(*names: str) -> dict:
    return {name: tensor for name, tensor in WEIGHTS.items() if name not in names}


def one_tensor(begin: int, end: int, shape: list[int], dtype: str = "F32") -> bytes:
    """Return a safetensors file of 16 bytes of data with this entry."""
    return safetensors_bytes({"a": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}, bytes(16))


REFUSED = {  # bytes, or what torch.save writes; words of the message
    "image encoder": (only("visual."), "image encoder alone"),
    "timm": ({"cls_token": torch.zeros(1), "patch_embed.proj.weight": torch.zeros(2, 3, 4, 4)}, "open_clip_model"),
    "text encoder": (without(*only("visual.")), "text encoder alone"),
    "another model": ({"weight": torch.zeros(3)}, "weight"),
    "missing": (without("visual.ln_post.bias"), "visual.ln_post.bias"),
    "extra": ({**WEIGHTS, "visual.unknown": torch.zeros(3)}, "visual.unknown"),
    "shape": ({**WEIGHTS, "visual.proj": torch.zeros(128, 95)}, "[128, 95] instead of [128, 96]"),
    "whole model": (torch.nn.Linear(2, 2), "Python objects"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4b86\nsize 598516980\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html>\n<html><head><title>404</title>", "web page"),
    "text": (b"not a weight file", "not a weight file"),
    "safetensors, gap": (one_tensor(4, 16, [3]), "shape of a"),
    "safetensors, cut off": (one_tensor(0, 24, [6]), "cut off"),
    "safetensors, too long": (one_tensor(0, 8, [2]), "8 bytes follow"),
    "safetensors, dtype": (one_tensor(0, 16, [2], "F64"), "F64"),
    "safetensors, header": (b"\2" + bytes(7) + b"{x", "damaged"),
    "safetensors, length": (b"\xff" * 7 + b"\x00{}", "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_in_one_line(name, tmp_path):
    content, words = REFUSED[name]
    path = tmp_path / "some.file"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    assert words in error_of(path)


def test_truncated_files_and_flipped_bits_are_refused(tmp_path):
    path = tmp_path / "weights.any"
    for write in (save, save_safetensors, write_archive):
        write(WEIGHTS, path)
        path.write_bytes(path.read_bytes()[:100_000])
        assert "cut off" in error_of(path)
    content = bytearray(save(WEIGHTS, path).read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "damaged" in error_of(path)


def test_a_path_that_does_not_exist(tmp_path):
    for source, words in ((tmp_path / "none.pt", "none.pt"), (tmp_path, "model.safetensors")):
        with pytest.raises(FileNotFoundError, match=words):
            clip.load(source)


def test_another_architecture_is_refused_if_one_is_given(tmp_path, monkeypatch):
    path = save(small_weights(SMALL_RESNET), tmp_path / "RN101.pt")
    clip.load(path)
    assert "vision_layers (1, 2, 1, 1) instead of (3, 4, 6, 3)" in error_of(path, architecture="RN50")
    monkeypatch.setitem(clip.ARCHITECTURES, "RN50", {**SMALL_RESNET, "image_size": (256, 128)})
    clip.load(path, architecture="RN50")


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_not_opened_unless_it_is_openais(tmp_path, monkeypatch):
    """Opening TorchScript runs its code."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "weights.pt"))
    monkeypatch.setattr(torch.jit, "load", None)
    assert "TorchScript" in error_of(tmp_path / "weights.pt")


# ---------------------------------------------------------------------------------------------- downloads


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers a path with server.files[path]: content and its announced length, a status, or None: nothing."""

    def do_GET(self):
        self.server.asked.append(self.path)
        answer = self.server.files.get(self.path, 404)
        if answer is None:
            self.server.closing.wait(20)
        elif isinstance(answer, int):
            self.send_error(answer)
        else:
            content, length = answer
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on loopback in place of OpenAI's (path .first) and the hub (path .second)."""
    archive = write_archive(WEIGHTS, tmp_path / "first").read_bytes()
    safetensors = save_safetensors(WEIGHTS, tmp_path / "second").read_bytes()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.closing, server.cache = [], threading.Event(), tmp_path / "cache"
        url = f"http://127.0.0.1:{server.server_port}"
        server.first = f"/{hashlib.sha256(archive).hexdigest()}/ViT-B-16.pt"
        server.second = "/timm/vit/resolve/1/open_clip_model.safetensors"
        server.files = {path: (x, len(x)) for path, x in ((server.first, archive), (server.second, safetensors))}
        monkeypatch.setitem(clip.URLS, "ViT-B/16", url + server.first)
        monkeypatch.setitem(clip.HUB, "ViT-B/16", ("timm/vit/resolve/1", hashlib.sha256(safetensors).hexdigest()))
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(weight_files, "CACHE", str(server.cache))
        monkeypatch.setattr(weight_files, "TIMEOUT", 0.3)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.closing.set()
        server.shutdown()
        thread.join()


def load_and_check(server, name: str) -> None:
    """Load ViT-B/16, which leaves one file in the cache; load it again, from the cache."""
    model = clip.load("ViT-B/16", image_size=(64, 64))
    assert torch.equal(model.visual.proj, WEIGHTS["visual.proj"])
    assert [path.name for path in server.cache.iterdir()] == [name]
    asked = len(server.asked)
    assert clip.load("ViT-B/16").source == model.source and len(server.asked) == asked


def test_a_download_is_kept_in_the_cache(server):
    load_and_check(server, "ViT-B-16.pt")
    assert server.asked == [server.first]


FAILURES = {
    "not found": (404, "404"),
    "cut off": ((b"PK", 100), "2 of 100 bytes"),
    "another file": ((b"another", 7), "sha256"),
    "silent": (None, "timed out"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_hub_is_tried_second(failure, server, capsys):
    server.files[server.first], words = FAILURES[failure]
    load_and_check(server, "ViT-B-16.openai.safetensors")
    assert server.asked == [server.first, server.second] and words in capsys.readouterr().out


def test_if_both_addresses_fail_one_line_says_what_to_do(server):
    server.files.clear()
    with pytest.raises(ConnectionError) as error:
        clip.load("ViT-B/16")
    text = str(error.value)
    for words in (server.first, server.second, str(server.cache), "ViT-B-16.pt", "--clip-weights", "404"):
        assert words in text
    assert "\n" not in text and not list(server.cache.iterdir())


def test_a_wrong_file_in_the_cache_is_named(server):
    server.cache.mkdir()
    (server.cache / "ViT-B-16.pt").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="ViT-B-16.pt .*delete"):
        clip.load("ViT-B/16")
    assert server.asked == []


def test_addresses(monkeypatch):
    """Revision and SHA-256 are also recorded in unrelated public projects."""
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    (_, sha256, name), (url, hub_sha256, hub_name) = clip.addresses("RN50")
    assert (name, hub_name) == ("RN50.pt", "RN50.openai.safetensors") and len(sha256) == len(hub_sha256) == 64
    assert url.startswith("https://huggingface.co/timm/resnet50_clip.openai/resolve/ec3d92cf63a5f9d5")
    assert url.endswith("/open_clip_model.safetensors")  # model.safetensors is the image encoder alone
