"""Several processes compute what one computes: gloo on the CPU, double precision.

train.py needs a GPU for each process: torch's SyncBatchNorm does not run on CPUs. `allow_cpus` replaces it here.
"""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import conftest  # noqa: F401, puts the repository on the path for torchrun
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import clip
import data
import evaluate
import train
from util import device


class SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward  # every process's result depends on every process's x


def synchronised_batch_norm(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """Compute SyncBatchNorm on the CPU: (B, C, ...) -> (B, C, ...)"""
    if not module.training:
        return type(module).forward(module, x)
    axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    count = device.world_size() * x.numel() // x.shape[1]
    mean = SumOverProcesses.apply(x.sum(axes)) / count
    centred = x - mean.view(shape)
    variance = SumOverProcesses.apply((centred**2).sum(axes)) / count
    with torch.no_grad():
        module.running_mean.lerp_(mean, module.momentum)
        module.running_var.lerp_(variance * count / (count - 1), module.momentum)
        module.num_batches_tracked += 1
    return centred * (module.weight / (variance + module.eps).sqrt()).view(shape) + module.bias.view(shape)


def distribute_on_cpus(model: nn.Module) -> nn.Module:
    if device.world_size() == 1:
        return model
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = functools.partial(synchronised_batch_norm, module)
    return nn.parallel.DistributedDataParallel(model)


def allow_cpus() -> None:
    """Let train.py run on CPUs in several processes, which device.distribute refuses."""
    train.distribute = distribute_on_cpus


def in_processes(count: int, work, *arguments) -> None:
    """Run work(number, *arguments) in `count` processes, with torchrun's variables. All must succeed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        _one_process, (count, port, work, arguments), nprocs=count, join=False, start_method="fork"
    )
    deadline = time.monotonic() + 120
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes hang")


def _one_process(number: int, count: int, port: int, work, arguments: tuple) -> None:
    allow_cpus()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    work(number, *arguments)


def train_in_double_precision(number: int, arguments: str, output) -> None:
    build, restore, normalize = train.PromptSG, train.restore_model, clip.normalize
    train.PromptSG = lambda *args, **components: build(*args, **components).double()
    train.restore_model = lambda state: restore(state).double()
    clip.normalize = lambda images: normalize(images).double()
    train.main([*arguments.split(), "--output", str(output)])


def result_of(output) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], torch.load(output / "last.pt", weights_only=True)["model"]


def assert_same(one, other, tolerance: float) -> None:
    for a, b in zip(one[0], other[0], strict=True):
        for name in a.keys() - {"seconds", "images_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=0 if name in ("mAP", "rank1") else tolerance), name
    for name, tensor in one[1].items():
        assert (tensor - other[1][name]).abs().max() <= tolerance, name


# Two steps in an epoch: each of the 20 identities has one group of five images, and a batch takes 8 of them.
FLAGS = "--dataset synthetic --backbone tiny --clip-weights random --image-size 64 32 --device cpu"
FLAGS += " --batch-ids 8 --batch-images 5 --lr-visual 2e-4 --lr-new 2e-3"


@pytest.mark.parametrize("row", ["", "--without-interaction --without-t2i"])
def test_two_processes_compute_what_one_does(demo_root, tmp_path, row):
    flags = f"{FLAGS} {row} --epochs 1 --eval-every 1 --data-root {demo_root}"
    for count in (1, 2):
        in_processes(count, train_in_double_precision, flags, tmp_path / str(count))
    one, two = (result_of(tmp_path / str(count)) for count in (1, 2))
    assert_same(one, two, tolerance=1e-8)
    assert one[0][0]["mAP"] != one[0][1]["mAP"]  # the steps change something


def test_a_run_resumes_with_another_number_of_processes(demo_root, tmp_path):
    """Epoch 1 with two processes and epoch 2 with one, or both with one."""
    flags = f"{FLAGS} --eval-every 0 --data-root {demo_root}"
    in_processes(1, train_in_double_precision, f"{flags} --epochs 2", tmp_path / "whole")
    in_processes(2, train_in_double_precision, f"{flags} --epochs 1", tmp_path / "parts")
    in_processes(1, train_in_double_precision, f"{flags} --epochs 2 --resume", tmp_path / "parts")
    # Adam amplifies rounding where a gradient is not larger than its epsilon, 1e-8.
    assert_same(result_of(tmp_path / "whole"), result_of(tmp_path / "parts"), tolerance=1e-5)


def test_evaluation_shares_the_images(demo_root, make_model):
    """Each image once and in order: for numbers that three divides, for others, and for fewer images than processes."""
    dataset = data.load_dataset("synthetic", demo_root, ("query", "gallery"))
    in_processes(3, extract_shares, dataset, make_model().eval())


def extract_shares(number: int, dataset: data.Dataset, model) -> None:
    counts = [(24, 28), (5, 5), (1, 1)]
    subsets = [(dataset.query[:queries], dataset.gallery[:gallery]) for queries, gallery in counts]
    datasets = [dataset._replace(query=query, gallery=gallery) for query, gallery in subsets]
    alone = [evaluate.extract_dataset(model, part, "simplified") for part in datasets]
    device.setup("cpu")
    for part, expected in zip(datasets, alone):
        shared = evaluate.extract_dataset(model, part, "simplified")
        for subset in ("query", "gallery"):
            torch.testing.assert_close(shared[subset], expected[subset])


def test_several_processes_without_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(device, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="GPU"):
        device.distribute(nn.Linear(2, 2))


def test_torchrun_trains_and_a_killed_process_ends_the_run(demo_root, tmp_path):
    """The README's command on two CPU processes. Only the first one prints and writes the log."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    command += [*FLAGS.split(), "--epochs", "1000", "--eval-every", "0", "--data-root", str(demo_root)]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "epoch 2/1000" not in (tmp_path / "out").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.2)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    printed = (tmp_path / "out").read_text()
    assert printed.count("epoch 1/1000") == 1 and "SIGKILL" in printed
    log = (tmp_path / "runs/synthetic-tiny/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == list(range(1, len(log) + 1))
    assert len(children) >= 2 and not any(Path(f"/proc/{child}").exists() for child in children)


if __name__ == "__main__":  # train.py on CPUs, for torchrun
    allow_cpus()
    device.run_script(train.main)
