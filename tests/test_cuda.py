"""Training and evaluation on a GPU: python -m pytest tests/test_cuda.py. Without CUDA, only the second half runs."""

import json
import os
import subprocess
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch reads it at the first matrix product

import pytest  # noqa: E402
import torch  # noqa: E402
from conftest import FLAGS, ROOT, output_of, refused, run  # noqa: E402

import clip  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from model import PromptSG  # noqa: E402
from util import checkpoint, device  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CUDA = FLAGS.replace("--device cpu", "--device cuda")
RANDOM = "--dataset synthetic --clip-weights random --eval-every 0 --epochs 1"
needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def restore():
    """Restore torch's settings after each test, also after one that failed."""
    yield
    torch.use_deterministic_algorithms(False)
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.fixture
def shallow(monkeypatch):
    """ViT-B/16 and RN50 with few layers."""
    for name, layers in {"ViT-B/16": 2, "RN50": (1, 1, 1, 1)}.items():
        small = {**clip.ARCHITECTURES[name], "vision_layers": layers, "text_layers": 2}
        monkeypatch.setitem(clip.ARCHITECTURES, name, small)


@pytest.fixture
def checkpoints(monkeypatch) -> list[dict]:
    """The checkpoints of a run, which are kept in memory instead of written."""
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
def test_training_is_finite_and_changes_the_weights(monkeypatch, workplace, checkpoints, shallow, backbone, flags):
    """Two epochs. train.py refuses a loss that is not finite."""
    before = {}

    def remember(model):
        before.update((name, x.detach().clone()) for name, x in model.named_parameters() if x.requires_grad)
        return model

    monkeypatch.setattr(train, "distribute", remember)
    log_of(f"{RANDOM} --epochs 2 --backbone {backbone} {flags}", workplace)
    weights = checkpoints[-1]["model"]
    assert all(weights[name].isfinite().all() for name in before)
    # The last batch norm of a random ResNet block starts at 0, so the gradients before it are tiny.
    assert not [name for name in before if torch.equal(weights[name], before[name]) and ".bn" not in name]


@needs_cuda
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_losses_match_the_cpu(workplace, checkpoints, shallow, backbone):
    flags = f"{RANDOM} --backbone {backbone} --precision fp32 --image-size 64 32"
    cpu, cuda = (log_of(f"{flags} --device {name}", workplace, name)[0] for name in ("cpu", "cuda"))
    for term in ("loss", "loss_triplet", "loss_id", "loss_supcon"):
        assert cuda[term] == pytest.approx(cpu[term], rel=1e-3, abs=1e-3), term


@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_training_step_does_not_synchronise(monkeypatch, workplace, checkpoints, shallow, precision):
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
    model = PromptSG.load(trained / "runs/synthetic-tiny/last.pt", "cuda")
    assert len(evaluate.extract(model, paths, batch_size=4)) == len(paths) > 8


@needs_cuda
def test_a_deterministic_run_resumes_bit_for_bit(workplace):
    flags = ON_CUDA + " --deterministic --output"
    output_of("train.py", f"{flags} whole", workplace)
    output_of("train.py", f"{flags} parts --epochs 2", workplace)
    output_of("train.py", f"{flags} parts --resume", workplace)
    whole, parts = (checkpoint.load(workplace / name / "last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@needs_cuda
def test_features_and_metrics_match_the_cpu(trained):
    dataset = data.load_dataset("synthetic", trained / "data")
    path = trained / "runs/synthetic-tiny/last.pt"
    cpu, cuda = (evaluate.evaluate(PromptSG.load(path, name), dataset) for name in ("cpu", "cuda"))
    for subset in ("query", "gallery"):
        torch.testing.assert_close(cuda[subset].cpu(), cpu[subset], atol=1e-3, rtol=0)
    assert cuda["mAP"] == pytest.approx(cpu["mAP"], abs=5e-3)


@needs_cuda
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_out_of_memory_is_one_line(workplace, trained, script):
    """train.py: a training step on large images. evaluate.py: the model does not fit on an occupied GPU."""
    evaluation = f"--checkpoint {trained}/runs/synthetic-tiny/last.pt --device cuda"
    mib, flags, advice = {
        "train.py": (80, ON_CUDA + " --image-size 256 128 --eval-every 0", "--batch-ids"),
        "evaluate.py": (20, evaluation, "nvidia-smi"),
    }[script]
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_reserved() + mib * 2**20
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    refused(run(script, flags, workplace), "out of GPU memory", advice)


@needs_cuda
def test_the_exported_model_runs_on_the_gpu(trained, tmp_path):
    """The file was exported on the CPU. If there are two GPUs, it runs on the second."""
    path = trained / "runs/synthetic-tiny/last.pt"
    output_of("extras/export.py", f"--checkpoint {path} --output {tmp_path}/model.pt2", tmp_path)
    name = f"cuda:{torch.cuda.device_count() - 1}"
    images = torch.zeros(3, 3, *PromptSG.load(path).image_size, dtype=torch.uint8, device=name)
    features = torch.export.load(tmp_path / "model.pt2").module().to(name)(images)
    torch.testing.assert_close(features.norm(dim=1).cpu(), torch.ones(3))


# ------------------------------------------------------------------------- also without a GPU


def test_tf32_is_off(monkeypatch):
    """Even if it was on before. With TF32, the error is about 1e-2 here."""
    torch.set_float32_matmul_precision("high")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    x = torch.rand(512, 512, device=device.setup(DEVICE))
    assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    assert (x @ x - (x.double() @ x.double())).abs().max() < 1e-3


def test_a_failing_compiler_is_one_line(tmp_path):
    """A small function fails as the model does, but sooner."""
    code = f"import torch; from util.device import run_script; x = torch.rand(8, device='{DEVICE}'); "
    code += "run_script(lambda: torch.compile(torch.sin)(x))"
    missing = {"CC": "/no/compiler", "CXX": "/no/compiler", "TRITON_CACHE_DIR": tmp_path, "PATH": "/nowhere"}
    environment = {**os.environ, **missing, "TORCHINDUCTOR_CACHE_DIR": tmp_path}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    refused(result, "--compile failed")


@pytest.mark.parametrize("own, other, precision", [(1, 1, "bf16"), (0, 1, "fp16"), (1, 0, "fp16")])
def test_processes_agree_on_a_precision_that_all_gpus_support(monkeypatch, own, other, precision):
    """Without hardware support, as on a T4, bf16 would be emulated slowly."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or own)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.clamp_(max=other))
    monkeypatch.setattr(device, "world_size", lambda: 2)
    assert device.default_precision(torch.device("cuda")) == precision


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20.00 MiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_is_recognised(error):
    message = device.describe_error(error, "use a smaller batch")
    assert "out of GPU memory" in message and "use a smaller batch" in message and "\n" not in message
    assert device.describe_error(RuntimeError("CUDA error: an illegal memory access was encountered"), "") is None


def test_default_number_of_loader_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert device.default_workers(torch.device("cuda")) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device.default_workers(torch.device("cuda")) == 1
    assert device.default_workers(torch.device("cpu")) == 0
