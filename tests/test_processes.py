"""Several processes compute what one computes: gloo on the CPU, double precision.

train.py needs a GPU for each process: torch's SyncBatchNorm does not run on CPUs. `distribute_on_cpus` replaces it.
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

# Two steps in an epoch: each of the 20 identities has one group of five images, and a batch takes 8 of them.
FLAGS = "--dataset synthetic --backbone tiny --clip-weights random --image-size 64 32 --device cpu"
FLAGS += " --batch-ids 8 --batch-images 5 --lr-visual 2e-4 --lr-new 2e-3"


def sum_over_processes(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def synchronised_batch_norm(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """Normalise the whole batch; return the rows of this process: (B, C, ...) -> (B, C, ...)"""
    if not module.training:
        return type(module).forward(module, x)
    whole = device.gather(x)
    whole.register_hook(sum_over_processes)  # every process's rows depend on the whole batch
    return type(module).forward(module, whole).chunk(device.world_size())[device.rank()]


def distribute_on_cpus(model: nn.Module) -> nn.Module:
    if device.world_size() == 1:
        return model
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.forward = functools.partial(synchronised_batch_norm, module)
    return nn.parallel.DistributedDataParallel(model)


def in_processes(count: int, work, *arguments) -> None:
    """Run work(*arguments) in `count` processes, with torchrun's variables. All must succeed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start = torch.multiprocessing.start_processes
    context = start(one_process, (count, port, work, arguments), count, join=False, daemon=True, start_method="fork")
    deadline = time.monotonic() + 120
    while not context.join(timeout=1):  # raises the error of a process
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes hang")


def one_process(number: int, count: int, port: int, work, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    work(*arguments)


def train_in_double_precision(flags: str, output: Path) -> None:
    build, restore, normalize = train.PromptSG, train.restore_model, clip.normalize
    train.distribute = distribute_on_cpus
    train.PromptSG = lambda *args, **components: build(*args, **components).double()
    train.restore_model = lambda state: restore(state).double()
    clip.normalize = lambda images: normalize(images).double()
    train.main([*flags.split(), "--output", str(output)])


def assert_same(one: Path, other: Path, tolerance: float) -> dict[str, Tensor]:
    """Compare log and weights of two runs. Return the weights."""
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (one, other)]
    for a, b in zip(*logs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "images_per_second"}:
            assert a[name] == pytest.approx(b[name], rel=0 if name in ("mAP", "rank1") else tolerance), name
    weights, others = (torch.load(run / "last.pt", weights_only=True)["model"] for run in (one, other))
    for name in weights:
        assert (weights[name] - others[name]).abs().max() <= tolerance, name
    return weights


def test_two_processes_compute_what_one_does_and_resume_its_run(demo_root, tmp_path):
    """One epoch with one process and with two; then each run is resumed with the other number of processes."""
    flags = f"{FLAGS} --eval-every 1 --data-root {demo_root} --epochs"
    one, two = tmp_path / "one", tmp_path / "two"
    in_processes(1, train_in_double_precision, f"{flags} 1", one)
    in_processes(2, train_in_double_precision, f"{flags} 1", two)
    assert_same(one, two, tolerance=1e-8)
    before = torch.load(one / "last.pt", weights_only=True)["model"]
    in_processes(2, train_in_double_precision, f"{flags} 2 --resume", one)
    in_processes(1, train_in_double_precision, f"{flags} 2 --resume", two)
    # Resuming rounds the weights to float32, and Adam amplifies rounding where a gradient is near its epsilon, 1e-8.
    after = assert_same(one, two, tolerance=1e-5)
    assert (after["clip.visual.proj"] - before["clip.visual.proj"]).abs().max() > 1e-4


def test_evaluation_shares_the_images(demo_root, make_model):
    """Each image once and in order: for numbers that three divides, for others, and for fewer images than processes."""
    dataset = data.load_dataset("synthetic", demo_root, ("query", "gallery"))
    in_processes(3, extract_shares, dataset, make_model().eval())


def extract_shares(dataset: data.Dataset, model: nn.Module) -> None:
    counts = [(24, 27), (5, 5), (1, 1)]
    parts = [dataset._replace(query=dataset.query[:q], gallery=dataset.gallery[:g]) for q, g in counts]
    alone = [evaluate.extract_dataset(model, part, "simplified") for part in parts]
    device.setup("cpu")
    for part, expected in zip(parts, alone):
        shared = evaluate.extract_dataset(model, part, "simplified")
        for subset in ("query", "gallery"):
            torch.testing.assert_close(shared[subset], expected[subset])


def test_several_processes_without_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(device, "world_size", lambda: 2)
    with pytest.raises(ValueError, match="GPU"):
        device.distribute(nn.Linear(2, 2))


def test_torchrun_trains_and_a_killed_process_ends_the_run(demo_root, tmp_path):
    """On two CPU processes. Only the first one prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    command += [*FLAGS.split(), "--epochs", "1000", "--eval-every", "0", "--data-root", str(demo_root)]
    out = tmp_path / "out"
    with out.open("w") as file:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 120
        while "epoch 2/1000" not in out.read_text():
            assert process.poll() is None and time.monotonic() < deadline, out.read_text()
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.terminate()  # torchrun ends its processes
        process.wait(timeout=60)
    assert out.read_text().count("epoch 1/1000") == 1 and "SIGKILL" in out.read_text()
    assert len(children) >= 2 and not any(Path(f"/proc/{child}").exists() for child in children)


if __name__ == "__main__":  # train.py on CPUs, for torchrun
    train.distribute = distribute_on_cpus
    device.run_script(train.main)
