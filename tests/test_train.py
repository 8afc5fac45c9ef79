"""train.py and evaluate.py as a user runs them: a run, killed and resumed, refused, evaluated."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import FLAGS, ROOT, output_of, refused, run
from torch import nn

import losses
import model
from util import checkpoint

RUN = "runs/synthetic-tiny"


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / RUN / "log.jsonl").read_text().splitlines()]


def state_of(folder) -> dict:
    return torch.load(folder / RUN / "last.pt", weights_only=True)


def start(folder, *more) -> subprocess.Popen:
    """Start train.py in a process group of its own."""
    command = [sys.executable, str(ROOT / "train.py"), *FLAGS.split(), *more]
    return subprocess.Popen(
        command, cwd=folder, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen, words: str) -> None:
    assert any(words in line for line in process.stdout), process.stderr.read()


def assert_same_run(one, other) -> None:
    logs = [[{**record, "seconds": 0, "images_per_second": 0} for record in log_of(folder)] for folder in (one, other)]
    assert logs[0] == logs[1]
    a, b = state_of(one), state_of(other)
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"] | b["model"])
    assert a["epoch"] == b["epoch"] == 4


# ---------------------------------------------------------------------------------------------- a whole run


def test_a_run_holds_checkpoint_log_settings_and_curves(trained):
    assert sorted(path.name for path in (trained / RUN).iterdir()) == [
        "args.json",
        "curves.png",
        "last.pt",
        "log.jsonl",
    ]
    log = log_of(trained)
    assert [record["epoch"] for record in log] == [0, 1, 2, 3, 4]
    assert [record["lr"] for record in log[1:]] == [8e-4, 8e-4, 4e-4, 4e-4]
    terms = {
        "epoch",
        "loss",
        "loss_triplet",
        "loss_id",
        "loss_supcon",
        "accuracy",
        "lr",
        "seconds",
        "images_per_second",
    }
    assert set(log[0]) == {"epoch", "mAP", "rank1"} and set(log[1]) == terms and set(log[2]) == terms | {"mAP", "rank1"}
    eq_10 = log[1]["loss_triplet"] + log[1]["loss_id"] + 0.5 * log[1]["loss_supcon"]
    assert log[1]["loss"] == pytest.approx(eq_10, rel=1e-5)
    state = state_of(trained)
    assert state["log"] == log  # the result of its own epoch included
    groups = state["optimizer"]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-4, 1e-3), (2e-4, 1e-3)]  # decayed twice
    settings = json.loads((trained / RUN / "args.json").read_text())
    assert settings["seed"] == 0 and settings["torch"] == torch.__version__ and "train.py" in settings["command"]
    seconds = sum(record.get("seconds", 0) for record in log)
    assert f"training time (Table 6): {seconds:.0f} s" in (trained / "printed.txt").read_text()


def test_training_learns(workplace):
    """From random weights, short training on 20 people raises mAP on six unseen ones far above CLIP's own."""
    flags = "--image-size 128 64 --epochs 12 --decay-every 9 --eval-every 12 --lr-visual 2e-4 --lr-new 2e-3"
    output_of("train.py", f"{FLAGS} {flags}", workplace)
    log = log_of(workplace)
    assert log[-1]["accuracy"] > 2 * log[1]["accuracy"] and log[-1]["mAP"] > log[0]["mAP"] + 0.15


def test_evaluate_gives_what_training_printed(trained):
    printed = output_of("evaluate.py", "--json result.json --features features.npz --rerank 10 4", trained)
    result = json.loads((trained / "result.json").read_text())
    assert result["mAP"] == pytest.approx(log_of(trained)[-1]["mAP"], abs=1e-6)
    assert {"rank1", "rank5", "rank10", "images_per_second", "prompt", "dataset", "checkpoint"} <= set(result)
    assert "re-ranked: mAP" in printed and result["reranked"]["mAP"] != result["mAP"]


# ------------------------------------------------------------------------------------------- kill and resume


def test_a_run_killed_after_a_saved_epoch_resumes_bit_for_bit(trained, workplace):
    process = start(workplace)
    wait_for(process, "epoch 3/4")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert state_of(workplace)["epoch"] == 2
    arguments = (workplace / RUN / "args.json").read_bytes()
    assert "resumed after epoch 2" in output_of("train.py", FLAGS + " --resume", workplace)
    assert_same_run(trained, workplace)
    assert (workplace / RUN / "args.json").read_bytes() == arguments  # only a new run writes it


def test_dropout_and_loader_processes_resume_bit_for_bit(workplace, tmp_path_factory, demo_root, monkeypatch):
    forward = nn.Sequential.forward
    monkeypatch.setattr(
        model.InversionNetwork,
        "forward",
        lambda self, x: F.dropout(forward(self, x), 0.2, self.training),
        raising=False,
    )
    whole = tmp_path_factory.mktemp("whole")
    (whole / "data").symlink_to(demo_root)
    output_of("train.py", FLAGS + " --workers 2", whole)
    output_of("train.py", FLAGS + " --workers 2 --epochs 2", workplace)
    output_of("train.py", FLAGS + " --resume", workplace)  # without loader processes
    assert_same_run(whole, workplace)


def test_ctrl_c_ends_at_once_with_one_line(workplace):
    process = start(workplace, "--workers", "2", "--epochs", "1000")
    wait_for(process, "epoch 2/1000")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loader processes too
    _, errors = process.communicate(timeout=40)
    assert process.returncode == 130 and errors.strip().startswith("interrupted; ") and "--resume" in errors
    assert len(errors.strip().splitlines()) == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)  # no process of the group is left


def test_resume_without_a_checkpoint_starts_at_epoch_1(trained, workplace):
    assert "starting at epoch 1" in output_of("train.py", FLAGS + " --resume", workplace)
    assert_same_run(trained, workplace)


def test_a_directory_without_last_pt_is_a_new_run(trained, workplace):
    shutil.copytree(trained / RUN, workplace / RUN)
    (workplace / RUN / "last.pt").unlink()
    assert "replacing log.jsonl" in output_of("train.py", FLAGS, workplace)
    assert_same_run(trained, workplace)


@pytest.mark.parametrize("seconds, saves", [(1, 1), (61, 3)])
def test_an_epoch_is_saved_when_a_minute_has_passed(workplace, monkeypatch, seconds, saves):
    clock, saved = itertools.count(0, seconds), []
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(checkpoint, "save", lambda state, path: saved.append(state["epoch"]))
    output_of("train.py", FLAGS + " --epochs 3 --eval-every 0", workplace)
    assert saved == [1, 2, 3][-saves:]


def test_a_loss_that_is_not_finite_is_named_before_anything_is_saved(trained, workplace, monkeypatch):
    shutil.copytree(trained / RUN, workplace / RUN)
    before = (workplace / RUN / "last.pt").read_bytes()
    supcon, factors = losses.supcon_direction, itertools.chain([1, 1], itertools.repeat(float("nan")))
    monkeypatch.setattr(losses, "supcon_direction", lambda *arguments: supcon(*arguments) * next(factors))
    result = run("train.py", FLAGS + " --epochs 6 --resume", workplace)
    refused(result, "loss, loss_supcon not finite in epoch 5, step 2")
    assert (workplace / RUN / "last.pt").read_bytes() == before


# --------------------------------------------------------------------------------------------------- refusals


def test_resume_refuses_other_settings_and_other_data(trained, demo_root, tmp_path):
    shutil.copytree(trained / RUN, tmp_path / RUN)
    shutil.copytree(demo_root, tmp_path / "data")
    refused(run("train.py", FLAGS, tmp_path), f"{RUN} holds a run", "--resume")
    refused(run("train.py", FLAGS + " --resume --blocks 1", tmp_path), "was trained with --blocks 2, not 1")

    state = state_of(tmp_path)
    del state["args"]["margin"]  # as in a checkpoint older than the flag
    torch.save(state, tmp_path / RUN / "last.pt")
    refused(run("train.py", FLAGS + " --resume --margin 0.5", tmp_path), "was trained with --margin 0.3, not 0.5")
    output_of("train.py", FLAGS + " --resume", tmp_path)

    image = next((tmp_path / "data/synthetic/bounding_box_train").glob("*.jpg"))
    image.rename(image.with_name(image.name.replace("_c", "_c9")))
    refused(run("train.py", FLAGS + " --resume", tmp_path), "trained on other data")


def test_a_checkpoint_that_is_damaged_foreign_or_of_another_version_is_refused(trained, tmp_path):
    state, path = state_of(trained), tmp_path / "last.pt"
    contents = {"version 2": {**state, "version": 2}, "not a checkpoint": {"a": torch.ones(1)}}
    contents["lacks model, log"] = {name: value for name, value in state.items() if name not in ("model", "log")}
    for words, content in contents.items():
        torch.save(content, path)
        refused(run("evaluate.py", "--checkpoint last.pt", tmp_path), words)
    torch.save(state, path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    refused(run("evaluate.py", "--checkpoint last.pt", tmp_path), "last.pt is damaged")
    refused(run("evaluate.py", "--checkpoint nowhere.pt", tmp_path), "no checkpoint nowhere.pt")


def test_a_checkpoint_is_always_whole(tmp_path, monkeypatch):
    """A write that fails, as on a full disk, leaves the old file and nothing else."""
    path = tmp_path / "last.pt"
    checkpoint.save({"epoch": 7}, path)

    def full(value, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot write .*last.pt .No space left"):
        checkpoint.save({"epoch": 8}, path)
    assert torch.load(path, weights_only=True)["epoch"] == 7 and list(tmp_path.iterdir()) == [path]
