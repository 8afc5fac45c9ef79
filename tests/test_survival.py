"""Runs that are killed, stopped, diverge or meet odd data: nothing lost, nothing silent."""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import FLAGS, ROOT, output_of, refused, run
from PIL import Image
from test_scripts import checkpoint_of, log_of

import data
import losses
from util.run import Folder, Stop, write_whole


def start(folder, words: str, *more) -> subprocess.Popen:
    """train.py in a process of its own, once it has printed a line that holds the words."""
    command = [sys.executable, "-u", str(ROOT / "train.py"), *FLAGS.split(), *more]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, **pipes)
    assert any(words in line for line in process.stdout), f"train.py ended before it printed {words!r}"
    return process


def assert_same_run(one, other) -> None:
    logs = [[{**record, "images_per_second": 0} for record in log_of(folder)] for folder in (one, other)]
    assert logs[0] == logs[1]
    a, b = (checkpoint_of(folder)["model"] for folder in (one, other))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_killed_in_its_third_epoch_goes_on_bit_for_bit(trained, workplace):
    process = start(workplace, "epoch 3/4  step 2/")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [record["epoch"] for record in log_of(workplace)] == [0, 1, 2]
    output_of("train.py", FLAGS + " --resume", workplace)
    assert_same_run(trained, workplace)


def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(trained, workplace, monkeypatch):
    """Ctrl-C with a loader process, then SIGTERM, then to the end; the middle of an epoch is no worse than its end."""
    process = start(workplace, "epoch 2/4  step 1/", "--workers", "1")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the loader process, too
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "--resume" in output and "Traceback" not in output
    assert output.count("SIGINT: finishing the step") == 1  # the loader process has nothing to say
    checkpoint = checkpoint_of(workplace)
    assert checkpoint["epoch"] == 1 and len(checkpoint["rows"]) > 0

    steps, identity_loss = [], losses.identity_loss

    def terminated(*arguments):
        steps.append(identity_loss(*arguments))
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return steps[-1]

    monkeypatch.setattr(losses, "identity_loss", terminated)
    result = run("train.py", FLAGS + " --resume", workplace)
    assert result.returncode == 128 + signal.SIGTERM and "--resume" in result.stdout and len(steps) == 6
    output_of("train.py", FLAGS + " --resume", workplace)
    assert_same_run(trained, workplace)


def test_a_run_can_be_lengthened(trained, workplace):
    output_of("train.py", FLAGS.replace("--epochs 4", "--epochs 2"), workplace)
    output_of("train.py", FLAGS + " --resume", workplace)
    assert_same_run(trained, workplace)


def save_for_ever(path) -> None:
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    value = 0
    while True:
        value += 1
        write_whole({"value": value, "tensor": torch.full((300_000,), float(value))}, path)


def test_a_kill_while_saving_leaves_a_whole_checkpoint(tmp_path):
    path, rng, last = tmp_path / "last.pt", random.Random(0), 0
    write_whole({"value": 0, "tensor": torch.zeros(300_000)}, path)
    for _ in range(25):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path,))
        process.start()
        time.sleep(rng.uniform(0.005, 0.06))
        process.kill()
        process.join()
        checkpoint = torch.load(path, weights_only=True)
        assert (checkpoint["tensor"] == checkpoint["value"]).all()
        last = max(last, checkpoint["value"])
    assert last > 0  # some were saved


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path, limits = tmp_path / "last.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_whole({"value": 7}, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as on a full disk, writing fails
    try:
        with pytest.raises(OSError, match="cannot write .*last.pt .*whole") as error:
            write_whole({"tensor": torch.zeros(300_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert torch.load(path, weights_only=True) == {"value": 7}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(trained, workplace, monkeypatch):
    shutil.copytree(trained / "runs", workplace / "runs")
    before = (workplace / "runs/synthetic-tiny/last.pt").read_bytes()
    supcon, factors = losses.supcon_direction, itertools.chain([1, 1], itertools.repeat(float("nan")))

    def diverging(*arguments):
        return supcon(*arguments) * next(factors)

    monkeypatch.setattr(losses, "supcon_direction", diverging)
    result = run("train.py", FLAGS + " --epochs 6 --resume", workplace)
    refused(result, "loss and loss_supcon not finite at epoch 5, step 2", "learning rates [0.0001, 0.0002]", "_c1s1_")
    assert (workplace / "runs/synthetic-tiny/last.pt").read_bytes() == before


def write_tree(root, names: dict[str, list[str]]) -> None:
    for subfolder in data.MARKET_FOLDERS.values():
        (root / subfolder).mkdir(parents=True)
        for name in names[subfolder]:
            Image.new("RGB", (8, 16), (len(name), 0, 0)).save(root / subfolder / name)


def people(cameras=(1, 2), identities=range(1, 9), pictures=2) -> list[str]:
    return [f"{pid:04d}_c{cam}s1_{n}.jpg" for pid in identities for cam in cameras for n in range(pictures)]


def test_odd_but_sound_data_trains(tmp_path):
    """Non-ASCII and long names, an identity with one picture, a query without a match, files that are no pictures."""
    root = tmp_path / ("Füße-数据-" + "x" * 150)
    train_names = [*people(), "0099_c1_only.png"]
    query = ["0001_c1s1_0.jpg", "0500_c1s1_nobody.jpg"]
    write_tree(root, {"bounding_box_train": train_names, "query": query, "bounding_box_test": people()})
    (root / "query" / "notes.txt").write_text("hello")
    (root / "query" / "0001.jpg").write_bytes(b"of another pattern")
    flags = "--dataset folder --backbone tiny --batch-ids 9 --epochs 1 --data-root"
    text = output_of("train.py", flags, tmp_path, root)
    assert "epoch 1, composed prompt: mAP" in text and "2 files passed over (first: 0001.jpg)" in text
    text = output_of("evaluate.py", "--json score.json --data-root", tmp_path, root)
    assert "1 of 2 queries have no right picture in the gallery and are left out" in text
    score = json.loads((tmp_path / "score.json").read_text())
    assert (score["queries_left_out"], score["files_passed_over"]) == (1, 2)


def test_a_gallery_of_one_camera_cannot_be_scored(tmp_path):
    names = {"bounding_box_train": people(), "query": people([1], pictures=1), "bounding_box_test": people([1])}
    write_tree(tmp_path, names)
    flags = "--dataset folder --backbone tiny --batch-ids 4 --epochs 1 --data-root ."
    refused(run("train.py", flags, tmp_path), "no query has a picture", "another camera")


def test_a_run_on_changed_data_is_not_resumed(trained, demo_root, tmp_path):
    """One training picture has another name."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    shutil.copytree(demo_root, tmp_path / "data")
    picture = next((tmp_path / "data/synthetic/bounding_box_train").iterdir())
    picture.rename(picture.with_name(picture.name.replace("_00.jpg", "_01.jpg")))
    refused(run("train.py", FLAGS + " --resume", tmp_path), "the training data is not what this run began with")


# ------------------------------------------------------------------------------------- folders, signals, files

ONE_STEP = FLAGS.replace("--epochs 4", "--epochs 1 --steps 1 --eval-every 0")


def test_a_reader_that_is_gone_costs_no_save(trained, workplace):
    """`train.py | tee log` and Ctrl-C, which ends tee first."""
    process = start(workplace, "epoch 2/4  step 1/")
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 128 + signal.SIGINT
    output_of("train.py", FLAGS + " --resume", workplace)
    assert_same_run(trained, workplace)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_a_signal_to_the_whole_group_is_for_the_trainer_alone(workplace, number):
    """As a terminal that closes sends it, or a cluster's scheduler: the loader processes go on and say nothing."""
    process = start(workplace, "epoch 2/4  step 1/", "--workers", "2")
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume" in output and "Traceback" not in output, output
    assert output.count("finishing the step") == 1


def test_only_one_training_writes_to_a_folder(workplace):
    process = start(workplace, "epoch 1/4  step 1/")
    for flag in ("--overwrite", "--resume"):  # before last.pt, which that one may be about to replace, is read
        refused(run("train.py", f"{FLAGS} {flag}", workplace), "another training is writing to runs/synthetic-tiny")
    process.kill()
    process.wait()
    output_of("train.py", ONE_STEP + " --overwrite", workplace)


def test_a_run_is_overwritten_when_the_new_one_is_saved_and_not_before(trained, workplace, monkeypatch):
    """A first step that fails leaves the old run as it was; other files stay, always."""
    folder = workplace / "runs/synthetic-tiny"
    shutil.copytree(trained / "runs/synthetic-tiny", folder)
    (folder / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(losses, "triplet_loss", lambda *arguments: torch.tensor(float("nan"), requires_grad=True))
        refused(run("train.py", ONE_STEP + " --overwrite", workplace), "loss_triplet not finite")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["synthetic-tiny"]
    output_of("train.py", ONE_STEP + " --overwrite", workplace)
    assert len(log_of(workplace)) == 2 and (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.parent.iterdir()] == ["synthetic-tiny"]


def test_an_old_folder_of_ones_own_is_left_alone(trained, workplace, monkeypatch):
    """Whatever happens: an --overwrite that it is in the way of, a run that ends well, one that fails."""
    old = workplace / "runs/synthetic-tiny.old/thesis.txt"
    shutil.copytree(trained / "runs/synthetic-tiny", workplace / "runs/synthetic-tiny")
    old.parent.mkdir()
    old.write_text("mine")
    refused(run("train.py", ONE_STEP + " --overwrite", workplace), "synthetic-tiny.old is there", "move it")
    assert checkpoint_of(workplace)["epoch"] == 4
    shutil.rmtree(workplace / "runs/synthetic-tiny")
    output_of("train.py", ONE_STEP, workplace)
    shutil.rmtree(workplace / "runs/synthetic-tiny")
    monkeypatch.setattr(losses, "triplet_loss", lambda *arguments: torch.tensor(float("nan"), requires_grad=True))
    refused(run("train.py", ONE_STEP, workplace), "not finite")
    assert old.read_text() == "mine" and list((workplace / "runs").iterdir()) == [old.parent]


def test_a_run_set_aside_is_put_back_when_nothing_can_be_written(trained, workplace, monkeypatch):
    """As on a full disk at args.json."""
    shutil.copytree(trained / "runs/synthetic-tiny", workplace / "runs/synthetic-tiny")
    before = {path.name: path.read_bytes() for path in (workplace / "runs/synthetic-tiny").iterdir()}

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Folder, "write_args", full)
    refused(run("train.py", ONE_STEP + " --overwrite", workplace), "No space left")
    assert {path.name: path.read_bytes() for path in (workplace / "runs/synthetic-tiny").iterdir()} == before
    assert [path.name for path in (workplace / "runs").iterdir()] == ["synthetic-tiny"]


@pytest.mark.parametrize("seconds, saves", [(1, 1), (61, 3)])
def test_an_epoch_is_saved_when_a_minute_has_passed(workplace, monkeypatch, seconds, saves):
    """Two epochs, never scored: at the end, and after each of them or none."""
    clock, written = itertools.count(0, seconds), []
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(Folder, "save", lambda folder, value, name: written.append(name))
    output_of(
        "train.py",
        FLAGS.replace("--epochs 4", "--epochs 2 --steps 1").replace("--eval-every 2", "--eval-every 0"),
        workplace,
    )
    assert written == ["last.pt"] * len(written) and len(written) == saves


def test_an_ignored_signal_stays_ignored(monkeypatch):
    """`nohup` ignores SIGHUP for its command."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_needs_no_git(workplace, monkeypatch):
    monkeypatch.setenv("PATH", str(workplace))
    output_of("train.py", ONE_STEP, workplace)
    assert json.loads((workplace / "runs/synthetic-tiny/args.json").read_text())["commit"] is None


def test_little_shared_memory_is_said_before(workplace, monkeypatch):
    """Docker gives 64 MB unless told otherwise."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=2**20))
    refused(run("train.py", FLAGS + " --workers 2", workplace), "--shm-size", "--workers")
