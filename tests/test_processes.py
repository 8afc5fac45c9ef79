"""Several processes compute what one computes: gloo on the CPU, double precision.

train.py needs a GPU for each process, because torch's SyncBatchNorm does not run on CPUs. `on_cpus` replaces it here.
"""

import contextlib
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
    """SyncBatchNorm for the CPU: (B, C, ...) -> (B, C, ...)"""
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


def convert(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = functools.partial(synchronised_batch_norm, module)
    return model


def on_cpus() -> None:
    """Train on CPUs, which device.distribute refuses: DistributedDataParallel with the batch normalisation above."""
    distributed = nn.parallel.DistributedDataParallel
    train.distribute = lambda model: distributed(convert(model)) if device.world_size() > 1 else model


def in_processes(count: int, work, *arguments) -> None:
    """Run work(number, *arguments) in `count` processes as torchrun starts them; all must succeed."""
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
    on_cpus()
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    work(number, *arguments)


def train_in_double_precision(number: int, arguments: str, output) -> None:
    """train.py, its model and images in float64."""
    build, restore, normalize = train.PromptSG, train.restore_model, clip.normalize
    train.PromptSG = lambda *args, **components: build(*args, **components).double()
    train.restore_model = lambda state: restore(state).double()
    clip.normalize = lambda images: normalize(images).double()
    train.main([*arguments.split(), "--output", str(output)])


def result_of(output) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], torch.load(output / "last.pt", weights_only=True)["model"]


def assert_same(one, other, tolerance: float = 1e-8) -> None:
    for a, b in zip(one[0], other[0], strict=True):
        for name in a.keys() - {"seconds", "images_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=0 if name in ("mAP", "rank1") else tolerance), name
    for name, tensor in one[1].items():
        torch.testing.assert_close(
            tensor, other[1][name], rtol=0, atol=tolerance, msg=lambda text, name=name: name + text
        )


# Two steps an epoch: of the 20 identities' groups, one of five images each, 8 make a batch.
FLAGS = "--dataset synthetic --backbone tiny --clip-weights random --image-size 64 32 --device cpu"
FLAGS += " --batch-ids 8 --batch-images 5"


@pytest.mark.parametrize("more", ["", "--baseline", "--without-interaction --without-t2i"])
def test_two_processes_compute_what_one_does(demo_root, tmp_path, more):
    """The same losses and weights to 1e-8, the same mAP exactly."""
    flags = f"{FLAGS} {more} --epochs 1 --eval-every 1 --data-root {demo_root}"
    for count in (1, 2):
        in_processes(count, train_in_double_precision, flags, tmp_path / str(count))
    one, two = (result_of(tmp_path / str(count)) for count in (1, 2))
    assert_same(one, two)
    assert one[0][0]["mAP"] != one[0][1]["mAP"]  # the steps change something


def test_a_run_is_resumed_with_another_number_of_processes(demo_root, tmp_path):
    """Epoch 1 with two processes, epoch 2 with one, as both with one."""
    flags = f"{FLAGS} --eval-every 0 --data-root {demo_root}"
    in_processes(1, train_in_double_precision, f"{flags} --epochs 2", tmp_path / "whole")
    in_processes(2, train_in_double_precision, f"{flags} --epochs 1", tmp_path / "parts")
    in_processes(1, train_in_double_precision, f"{flags} --epochs 2 --resume", tmp_path / "parts")
    # Where a gradient is no larger than Adam's epsilon, 1e-8, its update shows differences of rounding.
    assert_same(result_of(tmp_path / "whole"), result_of(tmp_path / "parts"), tolerance=1e-6)


def test_evaluation_shares_the_images(demo_root, make_model):
    """Every image once, in order, for counts that three divides and others; also for fewer images than processes."""
    dataset = data.load_dataset("synthetic", demo_root, ("query", "gallery"))
    in_processes(3, extract_shares, dataset, make_model().eval())


def extract_shares(number: int, dataset: data.Dataset, model) -> None:
    counts = [(24, 28), (5, 5), (1, 1)]
    samples = [(dataset.query[:queries], dataset.gallery[:gallery]) for queries, gallery in counts]
    parts = [dataset._replace(query=query, gallery=gallery) for query, gallery in samples]
    alone = [evaluate.extract_dataset(model, part, "simplified") for part in parts]
    device.setup("cpu")
    for part, expected in zip(parts, alone):
        shared = evaluate.extract_dataset(model, part, "simplified")
        for subset in ("query", "gallery"):
            assert len(shared[subset]) == len(getattr(part, subset)) > 0
            torch.testing.assert_close(shared[subset], expected[subset])


def test_identities_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="3 processes cannot share --batch-ids 16"):
        data.PKSampler(list(range(40)) * 4, num_ids=16, rank=0, world_size=3)


def test_parts_of_a_batch_make_the_batch():
    pids = list(range(12)) * 5
    whole, *parts = (data.PKSampler(pids, 6, 2, 0, *share) for share in ((0, 1), (0, 3), (1, 3), (2, 3)))
    for batch, *shares in zip(whole, *parts, strict=True):
        assert batch == sum(shares, [])
        assert [len({pids[index] for index, _ in share}) for share in shares] == [2, 2, 2]


def children_of(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = path.read_text().rsplit(")", 1)[1].split()[1]
            children += [int(path.parent.name)] if int(parent) == pid else []
    return sorted(children)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_processes_without_gpus_are_refused_in_one_line(demo_root, tmp_path):
    """The first one prints it; the other waits for torchrun to end it."""
    in_processes(2, refuse, f"{FLAGS} --eval-every 0 --data-root {demo_root} --output {tmp_path}")


def refuse(number: int, arguments: str) -> None:
    train.distribute, waits = device.distribute, []
    time.sleep = waits.append
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115, pytest's own cannot be reconfigured
    with pytest.raises(SystemExit, match="error: training with torchrun needs a GPU for each process"):
        device.run_script(lambda: train.main(arguments.split()))
    assert waits == [5] * number


def test_torchrun_trains_and_a_dead_process_ends_the_run(demo_root, tmp_path):
    """The README's command on two CPU processes: one voice, one log; killing one of them ends the other."""
    command = [*TORCHRUN, __file__, *FLAGS.split(), "--epochs", "1000", "--eval-every", "0", "--data-root", demo_root]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "epoch 3/1000" not in (tmp_path / "out").read_text():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()
            time.sleep(0.2)
        children = children_of(process.pid)
        os.kill(children[-1], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    printed = (tmp_path / "out").read_text()
    assert printed.count("epoch 1/1000") == 1 and "SIGKILL" in printed
    log = (tmp_path / "runs/synthetic-tiny/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == list(range(1, len(log) + 1))
    assert len(children) >= 2 and not any(Path(f"/proc/{child}").exists() for child in children)


if __name__ == "__main__":  # train.py on CPUs, for torchrun
    on_cpus()
    device.run_script(train.main)
