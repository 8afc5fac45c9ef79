"""What only a GPU can show, in under three minutes on one: python -m pytest tests/test_cuda.py -s

Skipped without CUDA. What of it can be tried without stands at the end and always runs.
"""

import argparse

import pytest
import torch
from conftest import FLAGS, output_of, refused, run

import clip
import data
import evaluate
import losses
import train
from extras.export import ImageToFeature, export
from model import PromptSG
from util import machine

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def new_run(backbone: str, flags: str) -> train.Run:
    """A run of ViT-B/16, RN50 or the tiny CLIP with random weights, as train.py makes it."""
    args = train.parse_args([*flags.split(), "--image-size", "256", "128"])
    train.check_args(args)
    torch.manual_seed(0)
    model = PromptSG(clip.untrained(backbone), 16).train()
    return train.Run(model.to(args.device, memory_format=torch.channels_last), args)


def batch_of(pictures: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randint(
        0, 256, (pictures, 3, 256, 128), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return images, torch.arange(pictures) // 4


@needs_cuda
@pytest.mark.parametrize("flags", ["--precision bf16", "--precision fp16", "--precision bf16 --compile"])
@pytest.mark.parametrize("backbone", ["ViT-B/16", "RN50"])
def test_steps_are_finite_and_change_the_weights(backbone, flags):
    if "bf16" in flags and machine.best_cuda_precision() != "bf16":
        pytest.skip("this GPU has no bf16")
    torch.cuda.reset_peak_memory_stats()
    run_of = new_run(backbone, flags)
    before = run_of.model.interaction.value.weight.detach().clone()
    batch = batch_of(64)
    rows = torch.stack([train.update(run_of, *batch) for _ in range(4)])  # fp16: the scaler may skip the first
    assert rows.isfinite().all() and rows[-1, 0] < rows[0, 0]
    assert not torch.equal(run_of.model.interaction.value.weight, before)
    name, peak = torch.cuda.get_device_name(), torch.cuda.max_memory_allocated() / 2**30
    print(f"\n{backbone}, {flags}, batch 64 on {name}: peak memory {peak:.1f} GiB")


@needs_cuda
@pytest.mark.parametrize("backbone", ["ViT-B/16", "RN50"])
def test_the_loss_is_the_cpus(backbone):
    cpu, cuda = (
        train.update(new_run(backbone, f"--device {d} --precision fp32"), *batch_of(8)) for d in ("cpu", "cuda")
    )
    torch.testing.assert_close(cuda.cpu(), cpu, rtol=1e-3, atol=1e-3)


@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_no_step_waits_for_the_device(precision):
    """Nor GradScaler: the fused Adam reads its flag on the device."""
    run_of = new_run("ViT-B/16", f"--precision {precision}")
    images, labels = (x.pin_memory() for x in batch_of(8))
    train.update(run_of, images, labels)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train.update(run_of, images, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_resume_is_bit_for_bit_with_deterministic(workplace):
    flags = FLAGS + " --deterministic --output"
    output_of("train.py", f"{flags} whole", workplace)
    output_of("train.py", f"{flags} parts --epochs 2", workplace)
    output_of("train.py", f"{flags} parts --resume", workplace)
    torch.use_deterministic_algorithms(False)
    whole, parts = (torch.load(workplace / name / "last.pt", weights_only=True)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@needs_cuda
def test_scores_and_features_are_the_cpus(workplace):
    output_of("train.py", FLAGS, workplace)
    args = evaluate.parse_args(["--precision", "fp32", "--checkpoint", str(workplace / "runs/synthetic-tiny/last.pt")])
    results = []
    for args.device in ("cpu", "cuda"):
        machine.check_machine_flags(args)
        model, _ = evaluate.load_run(args)
        dataset = data.load_dataset("synthetic", workplace / "data")
        results.append(evaluate.score(model, dataset, "composed", args))
    torch.testing.assert_close(results[1]["query"].cpu(), results[0]["query"], atol=1e-3, rtol=0)
    assert results[1]["mAP"] == pytest.approx(results[0]["mAP"], abs=5e-3)


@needs_cuda
def test_the_exported_model_runs_on_the_gpu(make_model, tmp_path):
    """And, where there are two, on the other one."""
    export(make_model().eval().to("cuda"), (64, 32), tmp_path / "model.pt2")
    module = torch.export.load(tmp_path / "model.pt2").module()
    other = f"cuda:{torch.cuda.device_count() - 1}"
    assert module.to(other)(torch.zeros(3, 3, 64, 32, dtype=torch.uint8, device=other)).shape == (3, 128)


# ------------------------------------------------------------------------------------------- without a GPU


@pytest.mark.parametrize("config", ["ViT-B/16", "RN50"])
def test_the_exported_graph_names_no_device(config):
    """So that a file exported on cuda:0 runs on cuda:1: seen in the graph, sizes without numbers."""
    small = dict(clip.ARCHITECTURES[config], vision_layers=1 if config == "ViT-B/16" else (1, 1, 1, 1), text_layers=1)
    model = PromptSG(clip.CLIP(**small, image_size=(64, 32)), 4).eval()
    images = torch.zeros(2, 3, 64, 32, dtype=torch.uint8)
    batch = torch.export.Dim("batch", max=2**16)
    program = torch.export.export(ImageToFeature(model), (images,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        assert "device" not in node.kwargs and "_assert_tensor_metadata" not in str(node.target), node


@pytest.mark.parametrize("has_bf16, precision", [(True, "bf16"), (False, "fp16")])
def test_the_precision_is_one_that_the_gpu_computes_in(monkeypatch, has_bf16, precision):
    """A T4 would emulate bf16, slowly."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or has_bf16
    )
    assert machine.best_cuda_precision() == precision


def test_the_device_becomes_the_current_one(monkeypatch):
    """cuda:1's name, memory and clock, not cuda:0's."""
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cuda:1", "cuda", "cpu"):
        machine.check_device(argparse.Namespace(device=device))
    assert chosen == [torch.device("cuda:1")]


def test_a_batch_too_large_for_the_gpu_is_one_line(workplace, monkeypatch):
    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\n20.00 MiB ...")

    monkeypatch.setattr(losses, "triplet_loss", full)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7.5 * 2**30)
    words = ("out of GPU memory, peak 7.5 GiB: a batch of 32 pictures", "--precision bf16", "--batch-ids", "the method")
    refused(run("train.py", FLAGS, workplace), *words)


def test_a_long_training_on_a_cpu_is_announced(workplace):
    flags = "--dataset synthetic --backbone vit --clip-weights random --image-size 32 16 --batch-ids 2 --epochs 1"
    printed = output_of("train.py", flags + " --batch-images 2 --steps 1 --eval-every 0 --device cpu", workplace)
    assert "WARNING: training on a CPU, which will take about " in printed
    (workplace / "runs/synthetic-vit/last.pt").unlink()  # 1.4 GB


def test_fp16_scales_its_loss_and_steps(make_model, labels):
    """The scaler on the CPU, where fp16 autocast exists too: it unscales, and a step that overflows is skipped."""
    args = train.parse_args(["--backbone", "tiny", "--device", "cpu", "--batch-ids", "4"])
    train.check_args(args)
    args.precision = "fp16"
    run_of = train.Run(make_model().train(), args)
    assert run_of.scaler.is_enabled() and run_of.scaler.get_scale() == 2**16
    images = torch.randint(0, 256, (8, 3, 64, 32), dtype=torch.uint8)
    before = run_of.model.interaction.value.weight.detach().clone()
    rows = torch.stack([train.update(run_of, images, labels) for _ in range(8)])
    assert rows.isfinite().all() and rows[-1, 0] < rows[0, 0]
    assert not torch.equal(run_of.model.interaction.value.weight, before)


@pytest.mark.parametrize(
    "flag, words",
    [("torchrun", "--compile does not go with torchrun"), ("no compiler", "--compile needs a C compiler")],
)
def test_compile_is_refused_where_it_cannot_work(monkeypatch, flag, words):
    if flag == "torchrun":
        monkeypatch.setattr(machine, "world_size", lambda: 2)
    else:
        monkeypatch.setenv("PATH", "")
    args = train.parse_args(["--device", "cpu", "--compile"])
    with pytest.raises(ValueError, match=words):
        train.check_args(args)


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert machine.count_cores() == 1
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    assert machine.count_cores() == machine.os.cpu_count()
