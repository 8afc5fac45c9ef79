"""Training and evaluation on a GPU: python -m pytest tests/test_cuda.py. Without CUDA, only the second half runs."""

import json
import os

import pytest
import torch
from conftest import FLAGS, output_of, refused, run

import clip
import data
import evaluate
import train
from extras import export
from model import PromptSG
from util import checkpoint, device

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it at the first matrix product

ON_CUDA = FLAGS.replace("--device cpu", "--device cuda")
RANDOM = "--dataset synthetic --clip-weights random --eval-every 0 --epochs 1"
CHECKPOINT = "runs/synthetic-tiny/last.pt"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(autouse=True)
def restore():
    """Restore torch's settings after each test, also after one that failed."""
    yield
    torch.use_deterministic_algorithms(False)
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.fixture
def checkpoints(monkeypatch) -> list[dict]:
    """The checkpoints of a run, kept in memory instead of written. ViT-B/16 and RN50 have few layers."""
    for name, layers in {"ViT-B/16": 2, "RN50": (1, 1, 1, 1)}.items():
        small = {**clip.ARCHITECTURES[name], "vision_layers": layers, "text_layers": 2}
        monkeypatch.setitem(clip.ARCHITECTURES, name, small)
    states = []
    monkeypatch.setattr(checkpoint, "save", lambda state, path: states.append(state))
    return states


def log_of(flags: str, folder, output: str = "run") -> list[dict]:
    """Train, and return the log."""
    train.main([*flags.split(), "--data-root", str(folder / "data"), "--output", str(folder / output)])
    return [json.loads(line) for line in (folder / output / "log.jsonl").read_text().splitlines()]


@needs_cuda
@pytest.mark.parametrize("flags", ["--precision bf16", "--precision fp16", "--compile"])
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_training_is_finite_and_changes_the_weights(monkeypatch, workplace, checkpoints, backbone, flags):
    """Two epochs. train.py refuses a loss that is not finite."""
    before = {}

    def remember(model):
        before.update((name, x.detach().clone()) for name, x in model.named_parameters() if x.requires_grad)
        return model

    monkeypatch.setattr(train, "distribute", remember)
    log_of(f"{RANDOM} --epochs 2 --backbone {backbone} {flags}", workplace)
    weights = checkpoints[-1]["model"]
    assert before and all(weights[name].isfinite().all() for name in before)
    # Batch norms are skipped: the last one of a random ResNet block starts at 0, so those before it have no gradient.
    assert not [name for name in before if torch.equal(weights[name], before[name]) and ".bn" not in name]


@needs_cuda
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_losses_match_the_cpu(workplace, checkpoints, backbone):
    flags = f"{RANDOM} --backbone {backbone} --precision fp32 --image-size 64 32"
    cpu, cuda = (log_of(f"{flags} --device {name}", workplace, name)[0] for name in ("cpu", "cuda"))
    terms = ("loss", "loss_triplet", "loss_id", "loss_supcon")
    assert [cuda[term] for term in terms] == pytest.approx([cpu[term] for term in terms], rel=1e-3, abs=1e-3)


@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_training_step_does_not_synchronise(monkeypatch, workplace, checkpoints, precision):
    """Checked from the forward pass of the second step to that of the third."""
    modes = iter(["default", "error", *["default"] * 100])

    def watched(*args):
        torch.cuda.set_sync_debug_mode(next(modes))
        return device.autocast(*args)

    monkeypatch.setattr(train, "autocast", watched)
    log_of(f"{RANDOM} --backbone vit --batch-ids 4 --precision {precision}", workplace)
    assert len(list(modes)) < 100  # at least three steps


@needs_cuda
def test_an_evaluation_batch_does_not_synchronise(monkeypatch, trained):
    """Checked from the end of the first batch to the end of the second. The copy to the CPU follows the last batch."""
    modes = iter(["error", *["default"] * 100])
    monkeypatch.setattr(evaluate, "show_progress", lambda *args: torch.cuda.set_sync_debug_mode(next(modes)))
    paths = [sample.path for sample in data.load_dataset("synthetic", trained / "data").query]
    model = PromptSG.load(trained / CHECKPOINT, "cuda")
    assert len(evaluate.extract(model, paths, batch_size=4)) == len(paths) > 8


@needs_cuda
def test_a_deterministic_run_resumes_bit_for_bit(workplace):
    flags = ON_CUDA + " --deterministic --output"
    for arguments in ("whole", "parts --epochs 2", "parts --resume"):
        output_of("train.py", f"{flags} {arguments}", workplace)
    whole, parts = (checkpoint.load(workplace / name / "last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@needs_cuda
def test_features_and_metrics_match_the_cpu(trained, tmp_path):
    """Also those of the exported model."""
    dataset = data.load_dataset("synthetic", trained / "data")
    models = [PromptSG.load(trained / CHECKPOINT, name) for name in ("cpu", "cuda")]
    cpu, cuda = (evaluate.evaluate(model, dataset) for model in models)
    for subset in ("query", "gallery"):
        torch.testing.assert_close(cuda[subset].cpu(), cpu[subset], atol=1e-3, rtol=0)
    assert cuda["mAP"] == pytest.approx(cpu["mAP"], abs=5e-3)

    export.export(models[0], tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module().to("cuda")
    images = torch.randint(256, (3, 3, *models[0].image_size), dtype=torch.uint8)
    expected = models[0].embed(clip.normalize(images), "simplified")
    torch.testing.assert_close(exported(images.to("cuda")).cpu(), expected, atol=1e-3, rtol=0)


@needs_cuda
@pytest.mark.parametrize("script, mib, advice", [("train.py", 80, "--batch-ids"), ("evaluate.py", 20, "nvidia-smi")])
def test_out_of_memory_is_one_line(workplace, trained, script, mib, advice):
    """train.py: a training step on large images. evaluate.py: the model does not fit on an occupied GPU."""
    training = ON_CUDA + " --image-size 256 128 --eval-every 0"
    flags = training if script == "train.py" else f"--checkpoint {trained / CHECKPOINT} --device cuda"
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + mib * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    refused(run(script, flags, workplace), "out of GPU memory", advice)


# ------------------------------------------------------------------------- also without a GPU


def test_tf32_is_off(monkeypatch):
    """Even if it was on before. With TF32, the error is about 1e-2 here."""
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x = torch.rand(512, 512, device=device.setup())
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert (x @ x - (x.double() @ x.double())).abs().max() < 1e-3


@pytest.mark.parametrize("own, other, precision", [(1, 1, "bf16"), (0, 1, "fp16"), (1, 0, "fp16")])
def test_processes_agree_on_a_precision_that_all_gpus_support(monkeypatch, own, other, precision):
    """Without hardware support, as on a T4, bf16 would be emulated slowly."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or own)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.clamp_(max=other))
    monkeypatch.setattr(device, "world_size", lambda: 2)
    assert device.default_precision(torch.device("cuda")) == precision


def test_errors_of_libraries_are_one_line():
    for sign in ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"):
        message = device.describe_error(RuntimeError(f"{sign}\nwhen calling"), "use a smaller batch")
        assert "out of GPU memory" in message and "use a smaller batch" in message and "\n" not in message
    assert device.describe_error(RuntimeError("CUDA error: an illegal memory access was encountered"), "") is None
    with pytest.raises(RuntimeError) as failure:
        torch.compile(torch.sin, backend=lambda graph, inputs: 1 / 0)(torch.rand(8))
    message = device.describe_error(failure.value, "")
    assert "--compile failed" in message and "\n" not in message


def test_default_number_of_loader_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert device.default_workers(torch.device("cuda")) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device.default_workers(torch.device("cuda")) == 1
    assert device.default_workers(torch.device("cpu")) == 0
