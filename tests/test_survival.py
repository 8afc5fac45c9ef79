"""Runs that are killed, stopped, diverge or meet broken files: nothing lost, nothing silent."""

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
from conftest import ROOT
from PIL import Image
from test_scripts import refused, run

import data
import evaluate
import train
from util.run import write_whole

ARGUMENTS = "--dataset synthetic --backbone tiny --epochs 4 --decay-every 2 --batch-ids 8 --eval-every 2 --log-every 1"


def start(folder, demo_root, *more, **options) -> subprocess.Popen:
    command = [sys.executable, "-u", str(ROOT / "train.py"), *ARGUMENTS.split(), "--data-root", str(demo_root), *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=subprocess.STDOUT, text=True, **options)


def wait_for(process: subprocess.Popen, words: str) -> None:
    """Reads until a line holds the words."""
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"train.py ended before it printed {words!r}")


def log_of(folder) -> list[dict]:
    lines = (folder / "runs/synthetic-tiny/log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in lines]


def weights_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "runs/synthetic-tiny/last.pt", weights_only=True)["model"]


def assert_same_run(one, other) -> None:
    assert log_of(one) == log_of(other)
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, demo_root):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run("train.py", ARGUMENTS, folder, "--data-root", demo_root).returncode == 0
    return folder


# ----------------------------------------------------------------------------------------- kill and resume


def test_a_run_killed_in_its_third_epoch_goes_on_bit_for_bit(uninterrupted, demo_root, tmp_path):
    process = start(tmp_path, demo_root)
    wait_for(process, "epoch 3/4  step 2/")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [record["epoch"] for record in log_of(tmp_path)] == [0, 1, 2]
    result = run("train.py", ARGUMENTS + " --resume", tmp_path, "--data-root", demo_root)
    assert result.returncode == 0, result.stderr
    assert_same_run(uninterrupted, tmp_path)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(uninterrupted, demo_root, tmp_path, number, status):
    """Also with loader processes, which Ctrl-C reaches as well; the middle of an epoch is no worse than its end."""
    process = start(tmp_path, demo_root, "--workers", "1")
    wait_for(process, "epoch 2/4  step 1/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == status, output
    assert "--resume" in output and "Traceback" not in output
    checkpoint = torch.load(tmp_path / "runs/synthetic-tiny/last.pt", weights_only=True)
    assert checkpoint["epoch"] == 1 and len(checkpoint["rows"]) > 0
    result = run("train.py", ARGUMENTS + " --resume", tmp_path, "--data-root", demo_root)
    assert result.returncode == 0, result.stderr
    assert_same_run(uninterrupted, tmp_path)


def test_the_same_seed_gives_the_same_run_and_another_does_not(uninterrupted, demo_root, tmp_path):
    short = ARGUMENTS.replace("--epochs 4", "--epochs 1")
    for name, seed in (("a", "0"), ("b", "1")):
        (tmp_path / name).mkdir()
        assert run("train.py", f"{short} --seed {seed}", tmp_path / name, "--data-root", demo_root).returncode == 0
    assert log_of(tmp_path / "a")[1]["loss"] == log_of(uninterrupted)[1]["loss"]
    assert log_of(tmp_path / "b")[1]["loss"] != log_of(uninterrupted)[1]["loss"]


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


def save_with_little_room(path) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as on a full disk, writing fails
    try:
        write_whole({"tensor": torch.zeros(300_000)}, path)
    except OSError as error:
        os._exit(0 if "make room" in str(error) and "\n" not in str(error) else 1)
    os._exit(2)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    write_whole({"value": 7}, path)
    process = multiprocessing.get_context("fork").Process(target=save_with_little_room, args=(path,))
    process.start()
    process.join(timeout=60)
    assert process.exitcode == 0
    assert torch.load(path, weights_only=True) == {"value": 7}
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(demo_root, tmp_path, monkeypatch):
    assert run("train.py", ARGUMENTS.replace("4", "1", 1), tmp_path, "--data-root", demo_root).returncode == 0
    before = (tmp_path / "runs/synthetic-tiny/last.pt").read_bytes()
    checkpoint = torch.load(tmp_path / "runs/synthetic-tiny/last.pt", weights_only=True)
    checkpoint["args"]["epochs"] = 4
    torch.save(checkpoint, tmp_path / "runs/synthetic-tiny/last.pt")
    before = (tmp_path / "runs/synthetic-tiny/last.pt").read_bytes()
    supcon, calls = train.losses.supcon_direction, []

    def diverging(*arguments):
        calls.append(1)
        return supcon(*arguments) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(train.losses, "supcon_direction", diverging)
    result = run("train.py", ARGUMENTS + " --resume", tmp_path, "--data-root", demo_root)
    refused(result, "loss and loss_supcon not finite at epoch 2, step 2", "learning rates [0.0002, 0.001]", "_c1s1_")
    assert (tmp_path / "runs/synthetic-tiny/last.pt").read_bytes() == before


# ----------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_pictures_of_every_mode_are_read(tmp_path, mode):
    """Mid-grey, whatever the file's mode."""
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "F": "tiff", "I": "tiff"}.get(mode, "png")
    grey = {"I": 128 << 8, "I;16": 128 << 8, "1": 1}.get(mode)
    picture = Image.new("L", (8, 16), 128).convert(mode) if grey is None else Image.new(mode, (8, 16), grey)
    picture.save(tmp_path / f"picture.{suffix}")
    pixels = data.read_picture(tmp_path / f"picture.{suffix}", (32, 16))
    assert pixels.shape == (3, 32, 16)
    assert ((pixels.float() - (255 if mode == "1" else 128)).abs() <= 2).all()


def test_small_and_odd_and_enormous_pictures(tmp_path):
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "dot.png")
    assert data.read_picture(tmp_path / "dot.png", (256, 128)).unique().tolist() == [9]
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    with pytest.raises(OSError, match=r"cannot read the picture .*huge.png .*exceeds limit") as error:
        data.read_picture(tmp_path / "huge.png", (256, 128))
    assert "\n" not in str(error.value)


# ------------------------------------------------------------------------------------------ data and names


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
    arguments = "--dataset folder --backbone tiny --batch-ids 9 --epochs 1"
    result = run("train.py", arguments, tmp_path, "--data-root", root)
    assert result.returncode == 0, result.stderr
    assert "epoch 1, composed prompt: mAP" in result.stdout


def test_a_gallery_of_one_camera_cannot_be_scored(tmp_path):
    write_tree(
        tmp_path,
        {"bounding_box_train": people(), "query": people([1], pictures=1), "bounding_box_test": people([1])},
    )
    arguments = "--dataset folder --backbone tiny --batch-ids 4 --epochs 1"
    refused(run("train.py", arguments, tmp_path, "--data-root", tmp_path), "no query has a picture", "another camera")


def test_an_output_that_cannot_be_written(demo_root, tmp_path):
    (tmp_path / "file").write_text("")
    refused(run("train.py", ARGUMENTS + " --output file", tmp_path, "--data-root", demo_root), "file")
    refused(run("train.py", ARGUMENTS + " --output /proc/run", tmp_path, "--data-root", demo_root), "/proc/run")


# -------------------------------------------------------------------------------------------- checkpoints


def test_checkpoints_of_another_version_or_with_other_weights(uninterrupted, demo_root, tmp_path):
    whole = torch.load(uninterrupted / "runs/synthetic-tiny/last.pt", weights_only=True)
    torch.save({**whole, "version": 1}, tmp_path / "old.pt")
    fewer = {name: tensor for name, tensor in whole["model"].items() if name != "bnneck.weight"}
    torch.save({**whole, "model": fewer}, tmp_path / "fewer.pt")
    torch.save({**whole, "model_args": {**whole["model_args"], "blocks": 1}}, tmp_path / "settings.pt")
    for name, words in (("old.pt", "version 1"), ("fewer.pt", "do not fit"), ("settings.pt", "do not fit")):
        refused(run("evaluate.py", f"--checkpoint {name}", tmp_path, "--data-root", demo_root), words)


def test_a_run_on_another_dataset_is_not_resumed(uninterrupted, demo_root, tmp_path):
    shutil.copytree(uninterrupted / "runs", tmp_path / "runs")
    arguments = ARGUMENTS.replace("synthetic", "folder") + " --resume --output runs/synthetic-tiny"
    refused(
        run("train.py", arguments, tmp_path, "--data-root", demo_root / "synthetic"), "--dataset synthetic, not folder"
    )


def test_a_run_on_changed_data_is_not_resumed(uninterrupted, demo_root, tmp_path):
    """One training picture has another name."""
    shutil.copytree(uninterrupted / "runs", tmp_path / "runs")
    shutil.copytree(demo_root, tmp_path / "data")
    picture = next((tmp_path / "data/synthetic/bounding_box_train").iterdir())
    picture.rename(picture.with_name(picture.name.replace("_00.jpg", "_01.jpg")))
    refused(run("train.py", ARGUMENTS + " --resume", tmp_path), "the training data is not what this run began with")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_not_ranked(bad):
    ones = torch.ones(2, dtype=torch.long)
    features = torch.tensor([[1.0, 0.0], [bad, 0.0]])
    with pytest.raises(ValueError, match="diverged"):
        evaluate.rank_metrics(features[:1], features, ones[:1], ones, ones[:1], 1 + ones)


# ------------------------------------------------------------------------------------------- random trials


def test_readers_on_random_names(tmp_path):
    """Three hundred names, good and bad: what matches is read as it says, the rest is passed over."""
    rng, expected = random.Random(0), []
    folder = tmp_path / "bounding_box_train"
    for subfolder in data.MARKET_FOLDERS.values():
        (tmp_path / subfolder).mkdir()
        (tmp_path / subfolder / "0001_c1.jpg").touch()
    for number in range(300):
        pid, cam = rng.choice([-1, 0, rng.randrange(10**6)]), rng.randrange(1, 20)
        good = f"{pid}_c{cam}{rng.choice(['', 's1', '_x'])}_{number}.{rng.choice(['jpg', 'PNG', 'jpeg'])}"
        name = rng.choice([good, good, good.replace("_c", rng.choice(["_", "c", "_k"])), good + ".txt", "x" + good])
        (folder / name).touch()
        if name == good and pid != -1:
            expected.append((pid, cam))
    read = [(sample.pid, sample.camid) for sample in data.read_market(tmp_path)[0]]
    assert sorted(read) == sorted([*expected, (1, 1)])


def test_flags_at_random_give_a_value_or_one_line():
    """Two hundred sets of flags: each is taken with sensible values, or refused in one line."""
    rng, outcomes = random.Random(0), []
    numbers = ["-1", "nan", "0", "0.1", "0.5", "0.9", "1", "3"]
    integers = ["epochs", "batch-ids", "batch-images", "decay-every", "steps", "eval-every", "log-every", "workers"]
    fractions = ["lr-visual", "lr-new", "decay-factor", "supcon-weight", "temperature", "margin", "label-smoothing"]
    switches = ["--baseline", "--without-i2t", "--without-t2i", "--without-interaction"]
    for _ in range(200):
        argv = ["--device", "cpu", *rng.sample(switches, rng.choice([0, 0, 0, 1]))]
        for name in rng.sample(integers, 1):
            argv += [f"--{name}", rng.choice(["-1", "0", "1", "3"])]
        for name in rng.sample(fractions, 1):
            argv += [f"--{name}", rng.choice(numbers)]
        try:
            args = train.parse_args(argv)
            train.check_args(args)
        except ValueError as error:
            assert "\n" not in str(error) and "--" in str(error)
            outcomes.append("refused")
        else:
            assert args.epochs > 0 and args.lr_new > 0 and args.lr_visual > 0 and args.batch_ids > 0
            assert args.margin >= 0 and 0 <= args.label_smoothing < 1 and args.workers >= 0
            outcomes.append("taken")
    assert set(outcomes) == {"taken", "refused"}
