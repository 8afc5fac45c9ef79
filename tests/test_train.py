"""A training run: its files, kill and resume, and how it ends after an error."""

import contextlib
import functools
import itertools
import json
import multiprocessing.process
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import FLAGS, ROOT, output_of, refused, run
from torch import nn

import data
import losses
import model
from util import checkpoint

RUN = "runs/synthetic-tiny"


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / RUN / "log.jsonl").read_text().splitlines()]


def state_of(folder) -> dict:
    return torch.load(folder / RUN / "last.pt", weights_only=True)


def assert_same_run(one, other) -> None:
    logs = [[{**record, "seconds": 0, "images_per_second": 0} for record in log_of(folder)] for folder in (one, other)]
    assert logs[0] == logs[1]
    a, b = state_of(one)["model"], state_of(other)["model"]
    assert all(torch.equal(a[name], b[name]) for name in a | b)


@pytest.fixture
def start(workplace):
    """A function that starts train.py in a process group of its own. What is left of it is killed after the test."""
    processes = []

    def start(more: str = "") -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "train.py"), *f"{FLAGS} {more}".split()]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        # A background job of a shell ignores SIGINT, and so would its child processes.
        options["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        processes.append(subprocess.Popen(command, cwd=workplace, **options))
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(process: subprocess.Popen, words: str) -> None:
    assert any(words in line for line in process.stdout), process.stderr.read()


# ---------------------------------------------------------------------------------------------- a whole run


def test_files_of_a_run(trained):
    names = {path.name for path in (trained / RUN).iterdir()}
    assert names == {"args.json", "curves.png", "last.pt", "log.jsonl"}
    log, state = log_of(trained), state_of(trained)
    assert [record["epoch"] for record in log] == [0, 1, 2, 3, 4] and state["log"] == log
    assert [record["epoch"] for record in log if "mAP" in record] == [0, 2, 4]
    assert [record["lr"] for record in log[1:]] == [8e-4, 8e-4, 4e-4, 4e-4]
    assert log[4]["loss"] < log[1]["loss"] and log[4]["accuracy"] > log[1]["accuracy"]
    eq_10 = log[1]["loss_triplet"] + log[1]["loss_id"] + 0.5 * log[1]["loss_supcon"]
    assert log[1]["loss"] == pytest.approx(eq_10, rel=1e-5)
    groups = state["optimizer"]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-4, 1e-3), (2e-4, 1e-3)]  # decayed twice
    settings = json.loads((trained / RUN / "args.json").read_text())
    assert settings["seed"] == 0 and settings["torch"] == torch.__version__ and "train.py" in settings["command"]


# ------------------------------------------------------------------------------------------- kill and resume


def test_a_killed_run_resumes_bit_for_bit(trained, workplace, monkeypatch):
    """The process is killed in epoch 3. The checkpoint is that of epoch 2."""
    set_epoch = data.PKSampler.set_epoch

    def kill_in_epoch_3(sampler, epoch):
        return os.kill(os.getpid(), signal.SIGKILL) if epoch == 3 else set_epoch(sampler, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(data.PKSampler, "set_epoch", kill_in_epoch_3)
        process = multiprocessing.get_context("fork").Process(
            target=run, args=("train.py", FLAGS, workplace), daemon=True
        )
        process.start()
        process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL and state_of(workplace)["epoch"] == 2
    settings = (workplace / RUN / "args.json").read_bytes()
    assert "resumed after epoch 2" in output_of("train.py", FLAGS + " --resume", workplace)
    assert_same_run(trained, workplace)
    assert (workplace / RUN / "args.json").read_bytes() == settings


def test_a_run_with_dropout_and_loader_processes_resumes_bit_for_bit(workplace, tmp_path_factory, monkeypatch):
    def forward_with_dropout(network, v):
        return F.dropout(nn.Sequential.forward(network, v), 0.2, network.training)

    monkeypatch.setattr(model.InversionNetwork, "forward", forward_with_dropout, raising=False)
    whole = tmp_path_factory.mktemp("whole")
    (whole / "data").symlink_to(workplace / "data")
    flags = f"{FLAGS} --eval-every 0 --epochs"
    output_of("train.py", f"{flags} 2 --workers 2", whole)
    output_of("train.py", f"{flags} 1 --workers 2", workplace)
    output_of("train.py", f"{flags} 2 --resume", workplace)  # without loader processes
    assert_same_run(whole, workplace)


def test_without_last_pt_resuming_starts_a_new_run(workplace):
    (workplace / RUN).mkdir(parents=True)
    (workplace / RUN / "args.json").write_text("{}")
    printed = output_of("train.py", f"{FLAGS} --epochs 1 --eval-every 0 --resume", workplace)
    assert "starting at epoch 1" in printed and "replacing log.jsonl" in printed and "loss" in log_of(workplace)[0]


def test_resume_refuses_other_flags_and_other_data(trained, demo_root, tmp_path):
    shutil.copytree(trained / RUN, tmp_path / RUN)
    shutil.copytree(demo_root, tmp_path / "data")
    state = state_of(tmp_path)
    del state["args"]["margin"]  # as in a checkpoint older than the flag
    torch.save(state, tmp_path / RUN / "last.pt")
    refused(run("train.py", FLAGS + " --resume --margin 0.5", tmp_path), "--margin 0.3, not 0.5")
    output_of("train.py", FLAGS + " --resume", tmp_path)
    image = next((tmp_path / "data/synthetic/bounding_box_train").glob("*.jpg"))
    image.rename(image.with_name(image.name.replace("_c", "_c9")))
    refused(run("train.py", FLAGS + " --resume", tmp_path), "other data")


# ----------------------------------------------------------------------------------------------------- errors


def test_ctrl_c_and_a_killed_loader_process_end_all_processes_with_one_line(start):
    flags = "--workers 2 --epochs 1000 --eval-every 0 --output"
    interrupted, broken = start(f"{flags} interrupted"), start(f"{flags} broken")
    for process in (interrupted, broken):
        wait_for(process, "epoch 2/1000")
    os.killpg(interrupted.pid, signal.SIGINT)  # as a terminal does: to the loader processes, too
    loaders = Path(f"/proc/{broken.pid}/task/{broken.pid}/children").read_text().split()
    os.kill(int(loaders[0]), signal.SIGKILL)
    for process, status, words in ((interrupted, 130, "--resume"), (broken, 1, "error: DataLoader worker")):
        _, errors = process.communicate(timeout=120)
        assert process.returncode == status and words in errors and len(errors.strip().splitlines()) == 1, errors
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # no process of the group is left


def test_a_loss_that_is_not_finite_is_named_before_anything_is_saved(trained, workplace, monkeypatch):
    shutil.copytree(trained / RUN, workplace / RUN)
    before = (workplace / RUN / "last.pt").read_bytes()
    supcon, factors = losses.supcon_direction, itertools.chain([1, 1], itertools.repeat(float("nan")))
    monkeypatch.setattr(losses, "supcon_direction", lambda *arguments: supcon(*arguments) * next(factors))
    result = run("train.py", FLAGS + " --epochs 6 --resume", workplace)
    refused(result, "loss, loss_supcon", "epoch 5, step 2")
    assert (workplace / RUN / "last.pt").read_bytes() == before


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 7}, path)

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="last.pt .*No space left"):
        checkpoint.save({"epoch": 8}, path)
    assert torch.load(path, weights_only=True)["epoch"] == 7 and list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # torch's iterator is incomplete
def test_a_loader_process_that_cannot_be_started_leaves_no_other(workplace, monkeypatch):
    start, started = multiprocessing.process.BaseProcess.start, []

    def fail_at_the_second(process):
        started.append(process)
        if len(started) == 2:
            raise OSError(11, "Resource temporarily unavailable")
        start(process)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", fail_at_the_second)
    refused(run("train.py", FLAGS + " --workers 2 --eval-every 0", workplace), "Resource temporarily unavailable")
    started[0].join(timeout=60)
    assert not started[0].is_alive()
