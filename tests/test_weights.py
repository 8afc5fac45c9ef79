"""Loading CLIP's weights: recorded features, file layouts, refused files, downloads."""

import base64
import hashlib
import json
import socket
import threading
from functools import partial
from http.server import HTTPServer, SimpleHTTPRequestHandler

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
TRANSFORMERS_TEXT = [0.51426, 0.05443, -0.2286, 0.40886, -0.64873, 0.12959, -0.09936, 0.68831]  # the second text


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


def safetensors_bytes(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def save_safetensors(tensors, path):
    names = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    path.write_bytes(safetensors_bytes(header, data))
    return path


def error_of(source, **options) -> str:
    """Return the message with which clip.load refuses a file: one line that names the file."""
    with pytest.raises(ValueError) as error:
        clip.load(source, **options)
    text = str(error.value)
    assert str(source) in text and "\n" not in text
    return text


@pytest.mark.parametrize("kind", IMAGE_FEATURES)
def test_features_match_other_implementations(kind, tmp_path):
    """At person size: interpolated position embedding, and last stride 1 for the ResNet."""
    config = dict(SMALL_RESNET if kind == "resnet" else SMALL_VIT, image_size=(224, 224))
    weights = transformers_weights() if kind == "transformers" else small_weights(config)
    model = clip.load(save_safetensors(weights, tmp_path / "weights"), image_size=(256, 128)).double()
    with torch.no_grad():
        image = model.encode_image(formula_images(256, 128).double()).embedding[1, ::12]
        text = model.encode_text(TOKEN_IDS)[1, ::12]
    torch.testing.assert_close(image.float(), torch.tensor(IMAGE_FEATURES[kind]), atol=2e-5, rtol=2e-5)
    if kind == "transformers":  # test_clip.py has the text features of OpenAI's code
        torch.testing.assert_close(text.float(), torch.tensor(TRANSFORMERS_TEXT), atol=2e-5, rtol=2e-5)


def test_a_fine_tuned_clip_fits_its_own_size_only(tmp_path):
    weights = small_weights(dict(SMALL_VIT, image_size=(128, 64)))
    path = save(weights, tmp_path / "fine-tuned.pt")
    assert "embed_dim 96 instead of 512" in error_of(path, architecture="ViT-B/16")
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
    "before torch 1.6": lambda weights, path: torch.save(weights, path, _use_new_zipfile_serialization=False),
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
    save(weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "pytorch_model.bin")
    assert torch.equal(clip.load(tmp_path).visual.proj, weights["visual_projection.weight"].T)
    path = save_safetensors(half(weights), tmp_path / "model.safetensors")  # preferred if both exist
    assert clip.load(tmp_path).source["clip_file"] == str(path)
    for settings, words in (
        ({"vision_config": {"hidden_act": "gelu"}}, "activation gelu"),
        ({"text_config": {"num_attention_heads": 4}}, "heads of 128 channels"),
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
GAP = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [4, 16]}}
LN_POST = "visual.ln_post.bias"
IMAGE_ENCODER = {name: tensor for name, tensor in WEIGHTS.items() if name.startswith("visual.")}


REFUSED = {  # content of a file, or object for torch.save; words of the error
    "image encoder": (IMAGE_ENCODER, "image encoder alone"),
    "another model": ({"weight": torch.zeros(3)}, "weight"),
    "missing": ({name: WEIGHTS[name] for name in WEIGHTS.keys() - {LN_POST}}, LN_POST),
    "shape": ({**WEIGHTS, "visual.proj": torch.zeros(128, 95)}, "[128, 95] instead of [128, 96]"),
    "whole model": (torch.nn.Linear(2, 2), "Python objects"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4b86\nsize 598516980\n", "git lfs pull"),
    "web page": (b"\n<!DOCTYPE html>\n<html><head><title>404</title>", "web page"),
    "safetensors, gap": (safetensors_bytes(GAP, bytes(16)), "shape of a"),
    "safetensors, header": (b"\2" + bytes(7) + b"{x", "damaged"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_refused_in_one_line(name, tmp_path):
    content, words = REFUSED[name]
    path = tmp_path / "some.file"
    path.write_bytes(content) if isinstance(content, bytes) else save(content, path)
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


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_not_opened_unless_it_is_openais(tmp_path, monkeypatch):
    """Opening TorchScript runs its code."""
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "weights.pt"))
    monkeypatch.setattr(torch.jit, "load", None)
    assert "TorchScript" in error_of(tmp_path / "weights.pt")


# ---------------------------------------------------------------------------------------------- downloads


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The folders of a server on loopback: `first` in place of OpenAI's, `second` in place of the hub's; the cache."""
    folder, cache = tmp_path / "server", tmp_path / "cache"
    (folder / "archive").mkdir(parents=True)
    sha256 = hashlib.sha256(write_archive(WEIGHTS, folder / "archive/ViT-B-16.pt").read_bytes()).hexdigest()
    first, second = (folder / "archive").rename(folder / sha256), folder / "hub"
    second.mkdir()
    hub_file = save_safetensors(WEIGHTS, second / "open_clip_model.safetensors")
    with HTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as server:
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setitem(clip.URLS, "ViT-B/16", f"{url}/{sha256}/ViT-B-16.pt")
        monkeypatch.setitem(clip.HUB, "ViT-B/16", ("hub", hashlib.sha256(hub_file.read_bytes()).hexdigest()))
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr(weight_files, "CACHE", str(cache))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield first, second, cache
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("failure", [None, "404", "sha256", "timed out"])
def test_weights_are_downloaded_once_and_if_the_first_address_fails_from_the_second(
    failure, server, capsys, monkeypatch
):
    first, second, cache = server
    if failure == "404":
        (first / "ViT-B-16.pt").unlink()
    elif failure == "sha256":
        (first / "ViT-B-16.pt").write_bytes(b"another file")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and does not answer
        if failure == "timed out":
            url = f"http://127.0.0.1:{silent.getsockname()[1]}/{first.name}/ViT-B-16.pt"
            monkeypatch.setitem(clip.URLS, "ViT-B/16", url)
            monkeypatch.setattr(weight_files, "TIMEOUT", 1)
        model = clip.load("ViT-B/16", image_size=(64, 64))
    assert torch.equal(model.visual.proj, WEIGHTS["visual.proj"])
    name = "ViT-B-16.openai.safetensors" if failure else "ViT-B-16.pt"
    assert [path.name for path in cache.iterdir()] == [name]
    assert (failure or "") in capsys.readouterr().out
    assert clip.load("ViT-B/16").source == model.source and "downloading" not in capsys.readouterr().out


def test_if_both_addresses_fail_one_line_says_what_to_do(server):
    first, second, cache = server
    (first / "ViT-B-16.pt").unlink()
    (second / "open_clip_model.safetensors").unlink()
    with pytest.raises(ConnectionError) as error:
        clip.load("ViT-B/16")
    text = str(error.value)
    for words in (first.name, "hub/open_clip_model", str(cache), "ViT-B-16.pt", "--clip-weights", "404"):
        assert words in text
    assert "\n" not in text and not list(cache.iterdir())


def test_a_wrong_file_in_the_cache_is_named(server):
    *_, cache = server
    cache.mkdir()
    (cache / "ViT-B-16.pt").write_bytes(b"half of it")
    with pytest.raises(ValueError, match="ViT-B-16.pt .*delete"):
        clip.load("ViT-B/16")
