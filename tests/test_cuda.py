"""What only a GPU can show: python -m pytest tests/test_cuda.py. Without CUDA, only the second half runs."""

import os
import subprocess
import sys

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the process's first matrix product

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from conftest import FLAGS, ROOT, output_of, refused, run  # noqa: E402

import clip  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import train  # noqa: E402
from model import PromptSG  # noqa: E402
from util import checkpoint, device  # noqa: E402

HERE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CUDA = FLAGS.replace("--device cpu", "--device cuda")
RANDOM = "--dataset synthetic --clip-weights random --eval-every 0 --epochs 1"
needs_cuda = pytest.mark.skipif(HERE == "cpu", reason="needs a GPU")


@pytest.fixture(autouse=True)
def restore():
    """Switch off what a test or a failing test switched on."""
    yield
    torch.use_deterministic_algorithms(False)
    if HERE == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.fixture
def shallow(monkeypatch):
    """ViT-B/16 and RN50 of their own width but with few layers."""
    for name, layers in {"ViT-B/16": 2, "RN50": (1, 1, 1, 1)}.items():
        small = {**clip.ARCHITECTURES[name], "vision_layers": layers, "text_layers": 2}
        monkeypatch.setitem(clip.ARCHITECTURES, name, small)


@pytest.fixture
def checkpoints(monkeypatch) -> list[dict]:
    """The checkpoints that a training would write; they stay in memory."""
    states = []
    monkeypatch.setattr(checkpoint, "save", lambda state, path: states.append(state))
    return states


def log_of(flags: str, folder, output: str = "run") -> list[dict]:
    """Train, and return the log."""
    train.main([*flags.split(), "--data-root", str(folder / "data"), "--output", str(folder / output)])
    return list(map(checkpoint.json.loads, (folder / output / "log.jsonl").read_text().splitlines()))


def train_briefly(monkeypatch, workplace, checkpoints, flags: str) -> None:
    """Train for one epoch of two steps; the terms must be finite (train.py sees to it) and the weights change."""
    before = {}

    def remember(model):
        before.update((name, x.detach().clone()) for name, x in model.named_parameters() if x.requires_grad)
        return model

    monkeypatch.setattr(train, "distribute", remember)
    log = log_of(f"{RANDOM} --epochs 2 {flags}", workplace)
    assert len(log) == 2
    weights = checkpoints[-1]["model"]
    assert all(weights[name].isfinite().all() for name in before)
    # The last batch norm of a random ResNet block starts at 0, so those before it hardly have a gradient.
    unchanged = [name for name in before if torch.equal(weights[name], before[name]) and ".bn" not in name]
    assert not unchanged


@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_training_is_finite_and_changes_the_weights(monkeypatch, workplace, checkpoints, backbone, precision):
    train_briefly(monkeypatch, workplace, checkpoints, f"--backbone {backbone} --precision {precision}")


@needs_cuda
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_compiled_training_is_finite_and_changes_the_weights(monkeypatch, workplace, checkpoints, shallow, backbone):
    train_briefly(monkeypatch, workplace, checkpoints, f"--backbone {backbone} --compile")


@needs_cuda
@pytest.mark.parametrize("backbone", ["vit", "resnet"])
def test_the_loss_is_the_cpus(workplace, checkpoints, shallow, backbone):
    flags = f"{RANDOM} --backbone {backbone} --precision fp32 --image-size 64 32"
    cpu, cuda = (log_of(f"{flags} --device {name}", workplace, name)[0] for name in ("cpu", "cuda"))
    for term in ("loss", "loss_triplet", "loss_id", "loss_supcon"):
        assert cuda[term] == pytest.approx(cpu[term], rel=1e-3, abs=1e-3), term


@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_training_step_does_not_wait_for_the_device(monkeypatch, workplace, checkpoints, shallow, precision):
    """From the forward pass of the second step to that of the third."""
    modes = iter(["default", "error", *["default"] * 100])

    def watched(*args):
        torch.cuda.set_sync_debug_mode(next(modes))
        return device.autocast(*args)

    monkeypatch.setattr(train, "autocast", watched)
    log_of(f"{RANDOM} --backbone vit --batch-ids 4 --precision {precision}", workplace)
    assert len(list(modes)) < 100  # at least three steps


@needs_cuda
def test_an_evaluation_batch_does_not_wait_for_the_device(monkeypatch, trained):
    """From the end of the first batch to the end of the second; the copy to the CPU comes after the last."""
    modes = iter(["error", *["default"] * 100])
    monkeypatch.setattr(evaluate, "show_progress", lambda *args: torch.cuda.set_sync_debug_mode(next(modes)))
    paths = [sample.path for sample in data.load_dataset("synthetic", trained / "data").query]
    model = PromptSG.load(trained / "runs/synthetic-tiny/last.pt", "cuda")
    assert len(evaluate.extract(model, paths, batch_size=4)) == len(paths) > 8


@needs_cuda
def test_a_resumed_run_is_equal_bit_for_bit_with_deterministic(workplace):
    flags = ON_CUDA + " --deterministic --output"
    output_of("train.py", f"{flags} whole", workplace)
    output_of("train.py", f"{flags} parts --epochs 2", workplace)
    output_of("train.py", f"{flags} parts --resume", workplace)
    whole, parts = (checkpoint.load(workplace / name / "last.pt")["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@needs_cuda
def test_features_and_metrics_are_the_cpus(trained):
    dataset = data.load_dataset("synthetic", trained / "data")
    path = trained / "runs/synthetic-tiny/last.pt"
    cpu, cuda = (evaluate.evaluate(PromptSG.load(path, name), dataset) for name in ("cpu", "cuda"))
    for subset in ("query", "gallery"):
        torch.testing.assert_close(cuda[subset].cpu(), cpu[subset], atol=1e-3, rtol=0)
    assert cuda["mAP"] == pytest.approx(cpu["mAP"], abs=5e-3)


@needs_cuda
@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_out_of_memory_is_one_line(workplace, trained, script):
    """In a training step of large images; and where the model itself does not fit into an occupied GPU."""
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
    """A file exported on the CPU; where there are two GPUs, on the second."""
    path = trained / "runs/synthetic-tiny/last.pt"
    output_of("extras/export.py", f"--checkpoint {path} --output {tmp_path}/model.pt2", tmp_path)
    name = f"cuda:{torch.cuda.device_count() - 1}"
    images = torch.zeros(3, 3, *PromptSG.load(path).image_size, dtype=torch.uint8, device=name)
    features = torch.export.load(tmp_path / "model.pt2").module().to(name)(images)
    torch.testing.assert_close(features.norm(dim=1).cpu(), torch.ones(3))


# ---------------------------------------------------------------------------- on the CPU, or on the GPU if there is one


def test_tf32_is_off():
    """Also where NVIDIA's containers switch it on. TF32 would be wrong by about 1e-2 here."""
    code = (
        "import torch; from util.device import setup; device = setup(); x = torch.rand(512, 512, device=device); "
        "assert not torch.backends.cuda.matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32; "
        "assert (x @ x - (x.double() @ x.double())).abs().max() < 1e-3"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True)


def test_a_failing_compiler_is_one_line(workplace, tmp_path):
    missing = {"CC": "/no/compiler", "CXX": "/no/compiler", "TRITON_CACHE_DIR": tmp_path, "PATH": "/nowhere"}
    environment = {**os.environ, **missing, "TORCHINDUCTOR_CACHE_DIR": tmp_path}
    command = [sys.executable, ROOT / "train.py", *FLAGS.split(), "--device", HERE, "--eval-every", "0"]
    result = subprocess.run([*command, "--compile"], cwd=workplace, env=environment, capture_output=True, text=True)
    refused(result, "--compile failed", "drop --compile")


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_memory_is_pinned_for_cuda_alone(monkeypatch, workplace, name):
    pinned = []

    class Loader(data.DataLoader):
        def __init__(self, *args, pin_memory: bool, **settings):
            pinned.append(pin_memory)
            super().__init__(*args, pin_memory=pin_memory, **settings)

    monkeypatch.setattr(data, "DataLoader", Loader)
    log_of(f"{FLAGS} --epochs 1 --device {name}", workplace)
    assert len(pinned) > 1 and set(pinned) == {name == "cuda"}


@pytest.mark.parametrize("own, other, precision", [(1, 1, "bf16"), (0, 0, "fp16"), (0, 1, "fp16"), (1, 0, "fp16")])
def test_processes_agree_on_a_precision_that_all_gpus_compute_in(monkeypatch, own, other, precision):
    """A T4 would emulate bf16, slowly."""

    def is_supported(including_emulation: bool = True) -> bool:
        return including_emulation or bool(own)

    def all_reduce(tensor: torch.Tensor, op: dist.ReduceOp) -> None:
        assert op == dist.ReduceOp.MIN
        tensor.clamp_(max=other)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(device, "world_size", lambda: 2)
    assert device.default_precision(torch.device("cuda")) == precision


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20.00 MiB ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_of_every_library_is_recognised(error):
    message = device.describe_error(error, "use a smaller batch")
    assert message.startswith("out of GPU memory") and message.endswith("use a smaller batch")
    assert len(message.splitlines()) == 1


def test_other_errors_of_cuda_keep_their_traceback():
    assert device.describe_error(RuntimeError("CUDA error: an illegal memory access was encountered"), "") is None


def test_loader_processes_are_as_many_as_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 6}, raising=False)
    assert device.default_workers(torch.device("cuda")) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert device.default_workers(torch.device("cuda")) == 1
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert device.default_workers(torch.device("cuda")) == 8
    assert device.default_workers(torch.device("cpu")) == 0
