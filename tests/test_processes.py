"""Several processes compute what one computes: gloo on the CPU, double precision.

train.py takes a GPU for each process, and torch's SyncBatchNorm refuses CPUs. `on_cpus` replaces both, here alone.
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

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch import Tensor, nn

import clip
import data
import evaluate
import train
from util import machine


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
    count = machine.world_size() * x.numel() // x.shape[1]
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
    nn.SyncBatchNorm.convert_sync_batchnorm = convert
    machine.require_gpus = lambda args: None


def in_processes(count: int, work, *arguments) -> None:
    """Runs work(number, *arguments) in so many processes as torchrun starts them; all must end well."""
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
    """train.py, its model and pictures in float64."""
    build, restore, normalize = train.build_model, train.restore_model, clip.normalize
    train.build_model = lambda *args: build(*args).double()
    train.restore_model = lambda checkpoint: restore(checkpoint).double()
    clip.normalize = lambda images: normalize(images).double()
    train.main([*arguments.split(), "--output", str(output)])


def result_of(output) -> tuple[list[dict], dict[str, torch.Tensor]]:
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], torch.load(output / "last.pt", weights_only=True)["model"]


def assert_same(one, other, tolerance: float = 1e-8) -> None:
    for a, b in zip(one[0], other[0], strict=True):
        for name in a.keys() - {"images_per_second", "dataset_version"}:
            assert a[name] == pytest.approx(b[name], rel=0 if name in ("mAP", "rank1") else tolerance), name
    for name, tensor in one[1].items():
        torch.testing.assert_close(
            tensor, other[1][name], rtol=0, atol=tolerance, msg=lambda text, name=name: name + text
        )


FLAGS = "--dataset synthetic --backbone tiny --clip-weights random --device cpu --batch-ids 8 --steps 3"
FLAGS += " --image-size 64 32"


@pytest.mark.parametrize("more", ["", "--baseline", "--without-interaction --without-t2i"])
def test_two_processes_compute_what_one_does(demo_root, tmp_path, more):
    """Three steps: the same losses and weights to 1e-8, the same scores exactly."""
    flags = f"{FLAGS} {more} --epochs 1 --eval-every 1 --data-root {demo_root}"
    for count in (1, 2):
        in_processes(count, train_in_double_precision, flags, tmp_path / str(count))
    one, two = (result_of(tmp_path / str(count)) for count in (1, 2))
    assert_same(one, two)
    assert one[0][0]["mAP"] != one[0][1]["mAP"]  # three steps change something


def test_a_run_goes_on_with_another_number_of_processes(demo_root, tmp_path):
    """Two processes, a signal to one of them, then one process: the same as one process throughout."""
    flags = f"{FLAGS} --epochs 2 --eval-every 2 --data-root {demo_root}"
    in_processes(1, train_in_double_precision, flags, tmp_path / "whole")
    in_processes(2, interrupted, flags, tmp_path / "parts")
    assert len(torch.load(tmp_path / "parts/last.pt", weights_only=True)["rows"]) == 2
    in_processes(1, train_in_double_precision, flags + " --resume", tmp_path / "parts")
    # Six steps: where a gradient is no larger than Adam's epsilon, 1e-8, its update tells rounding apart.
    assert_same(result_of(tmp_path / "whole"), result_of(tmp_path / "parts"), tolerance=1e-6)


def interrupted(number: int, flags: str, output) -> None:
    """Only the second process has the signal, in its second step; both must stop there and save."""
    update, steps = train.update, []

    def update_and_signal(*args):
        steps.append(update(*args))
        if number == 1 and len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps[-1]

    train.update = update_and_signal
    with pytest.raises(SystemExit) as stop:
        train_in_double_precision(number, flags, output)
    assert stop.value.code == 128 + signal.SIGTERM


def test_evaluation_shares_the_pictures(demo_root, make_model):
    """Every picture once, in order, for counts that divide by the number of processes and others, down to one."""
    samples = data.load_dataset("synthetic", demo_root).query
    in_processes(3, extract_some, samples, make_model().eval())


def extract_some(number: int, samples, model) -> None:
    args = evaluate.parse_args(["--device", "cpu", "--eval-batch-size", "5"])
    args.image_size = (64, 32)
    machine.check_machine_flags(args)
    alone = evaluate.extract(model.embed, samples, args)
    machine.join_processes(args)
    for count in (len(samples), 10, 2, 1):
        torch.testing.assert_close(evaluate.extract(model.embed, samples[:count], args), alone[:count])
    machine.leave_processes()


def test_identities_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="--batch-ids 16 cannot be shared among 3 processes"):
        data.PKSampler(list(range(40)) * 4, num_ids=16, rank=0, world_size=3)


def test_parts_of_a_batch_make_the_batch():
    pids = list(range(12)) * 5
    whole, *parts = (data.PKSampler(pids, 6, 2, 0, *share) for share in ((0, 1), (0, 3), (1, 3), (2, 3)))
    for batch, *shares in zip(whole, *parts, strict=True):
        assert batch == sum(shares, [])
        assert [len({pids[index] for index, _ in share}) for share in shares] == [2, 2, 2]


def children_of(pid: int) -> list[int]:
    """The processes that a process has started, from what Linux says of all."""
    children = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # gone since
            parent = path.read_text().rsplit(")", 1)[1].split()[1]
            children += [int(path.parent.name)] if int(parent) == pid else []
    return sorted(children)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_a_process_without_a_gpu_is_refused(tmp_path):
    command = [*TORCHRUN, str(ROOT / "train.py"), *FLAGS.split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "error: training takes a GPU for each process: 2 processes, 0 GPUs" in result.stderr


def test_torchrun_trains_and_a_dead_process_ends_the_run(demo_root, tmp_path):
    """The README's command on two CPU processes: one voice, one log; killing one of them ends the other."""
    command = [*TORCHRUN, __file__, *FLAGS.split(), "--epochs", "1000", "--eval-every", "0", "--data-root", demo_root]
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "epoch 2/1000" not in (tmp_path / "out").read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert (tmp_path / "out").read_text().count("epoch 1/1000  step 3/3") == 1
        os.kill(children_of(process.pid)[-1], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert "SIGKILL" in (tmp_path / "out").read_text()


if __name__ == "__main__":  # train.py on CPUs, for torchrun
    on_cpus()
    machine.exit_on_error(train.main)
