"""The scripts as a user runs them: from the command line, on the drawn demo data."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from openai_format import SMALL_RESNET, SMALL_VIT, small_weights, write_archive
from PIL import Image

import evaluate
import model
import train
from extras import export, look, search
from util import machine
from util.rerank import k_reciprocal

QUICK = "--dataset synthetic --backbone tiny --epochs 2 --batch-ids 8 --eval-every 1"


def run_process(script: str, arguments: str, folder, *more) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments.split(), *map(str, more)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=170)


def run(script: str, arguments: str, folder, *more) -> subprocess.CompletedProcess:
    """The same without starting Python and importing torch anew, which takes seconds."""
    module = {module.__name__.split(".")[-1]: module for module in (train, evaluate, look, search, export)}
    main = module[script.removesuffix(".py").removeprefix("extras.")].main
    argv, out, error, status, before = [*arguments.split(), *map(str, more)], io.StringIO(), "", 0, os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out):
            machine.exit_on_error(lambda: main(argv))
    except SystemExit as stop:
        error, status = str(stop.code), 1
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(argv, status, out.getvalue(), error)


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """One line on stderr that says these words; not a traceback; exit status not 0."""
    assert result.returncode not in (0, None), result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, demo_root):
    """A folder in which train.py has run for two epochs, and what it printed."""
    folder = tmp_path_factory.mktemp("work")
    result = run_process("train.py", QUICK, folder, "--data-root", demo_root)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


# ------------------------------------------------------------------------------------------------- it works


def test_training_prints_what_a_reader_needs(trained):
    _, text = trained
    for word in (
        "# ids",
        "learnable parameters",
        "untrained",
        "epoch 2/2  step",
        "loss ",
        "triplet ",
        "id ",
        "supcon ",
    ):
        assert word in text
    for word in ("accuracy ", "images/s", "lr 2.0e-04/1.0e-03", " left", "mAP ", "Rank-1 ", "Rank-5 ", "Rank-10 "):
        assert word in text
    assert "training time (Table 6): " in text


def test_a_run_holds_checkpoints_log_and_settings(trained):
    run_folder = trained[0] / "runs" / "synthetic-tiny"
    expected = ["args.json", "best.pt", "curves.png", "last.pt", "log.jsonl"]
    assert sorted(path.name for path in run_folder.iterdir()) == expected
    records = [json.loads(line) for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [0, 1, 2]
    assert set(records[0]) == {"epoch", "mAP", "rank1", "dataset_version"}
    names = "epoch loss loss_triplet loss_id loss_supcon accuracy lr images_per_second mAP rank1 dataset_version"
    assert set(records[2]) == set(names.split())
    terms = records[1]["loss_triplet"] + records[1]["loss_id"] + 0.5 * records[1]["loss_supcon"]
    assert records[1]["loss"] == pytest.approx(terms, rel=1e-5)
    assert records[2]["loss"] < records[1]["loss"]
    settings = json.loads((run_folder / "args.json").read_text())
    assert settings["seed"] == 0 and settings["torch"] == torch.__version__ and "train.py" in settings["command"]


@pytest.mark.parametrize("prompt", ["composed", "simplified"])
def test_evaluate_needs_no_other_flag_than_the_prompt(trained, demo_root, prompt):
    folder, _ = trained
    result = run_process("evaluate.py", f"--prompt {prompt} --json score.json", folder, "--data-root", demo_root)
    assert result.returncode == 0, result.stderr
    assert "checkpoint runs/synthetic-tiny/last.pt" in result.stdout
    score = json.loads((folder / "score.json").read_text())
    names = "mAP rank1 rank5 rank10 images_per_second prompt dataset dataset_version trained_on precision checkpoint"
    assert set(score) == set(names.split())
    assert (score["prompt"], score["dataset"], score["trained_on"]) == (prompt, "synthetic", "synthetic")
    last = json.loads((folder / "runs/synthetic-tiny/log.jsonl").read_text().splitlines()[-1])
    if prompt == "composed":
        assert score["mAP"] == pytest.approx(last["mAP"], abs=1e-6)  # what training printed at its end
    for words in (f"mAP {score['mAP']:.1%}", "Rank-1", "Rank-5", "Rank-10", "images/s"):
        assert words in result.stdout
    assert re.search(r"Table 5\): visual encoder \d+ images/s .*simplified \d+ .*composed \d+", result.stdout)


def test_resume_goes_on_where_the_run_stopped(trained, demo_root, tmp_path):
    """Two epochs at once, or a run of one that is then lengthened: the same weights and the same log."""
    first = QUICK.replace("--epochs 2", "--epochs 1 --decay-every 30")
    shutil.copytree(trained[0] / "runs", tmp_path / "whole")
    assert run("train.py", first, tmp_path, "--data-root", demo_root).returncode == 0
    result = run("train.py", QUICK + " --decay-every 30 --resume", tmp_path, "--data-root", demo_root)
    assert result.returncode == 0, result.stderr
    whole = torch.load(tmp_path / "whole/synthetic-tiny/last.pt", weights_only=True)["model"]
    parts = torch.load(tmp_path / "runs/synthetic-tiny/last.pt", weights_only=True)["model"]
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [(tmp_path / folder / "synthetic-tiny/log.jsonl").read_text().splitlines() for folder in ("whole", "runs")]
    for one, other in zip(*logs, strict=True):
        one, other = ({k: v for k, v in json.loads(line).items() if k != "images_per_second"} for line in (one, other))
        assert one == other


def test_evaluate_writes_and_ranks_again(trained, demo_root, tmp_path):
    checkpoint = trained[0] / "runs/synthetic-tiny/last.pt"
    flags = f"--checkpoint {checkpoint} --rerank 10 4 --features all.npz --json s.json --data-root"
    result = run("evaluate.py", flags, tmp_path, demo_root)
    assert result.returncode == 0, result.stderr
    assert re.search(r"re-ranked: mAP \d+\.\d%  Rank-1", result.stdout)
    score, arrays = json.loads((tmp_path / "s.json").read_text()), np.load(tmp_path / "all.npz")
    tensors = {name: torch.tensor(arrays[name]) for name in arrays.files if not name.endswith("names")}
    assert len(arrays["query_names"]) == len(tensors["query_features"]) == 24
    assert arrays["gallery_names"][0].endswith(".jpg")
    pairs = [tensors[f"{subset}_{kind}"] for kind in ("features", "ids", "cams") for subset in ("query", "gallery")]
    assert evaluate.rank_metrics(*pairs)["mAP"] == pytest.approx(score["mAP"], abs=1e-6)
    reranked = evaluate.rank_metrics(*pairs, k_reciprocal(*pairs[:2], 10, 4))
    assert reranked["mAP"] == pytest.approx(score["reranked"]["mAP"], abs=1e-6)


def test_look_draws_and_measures(trained, demo_root, tmp_path):
    checkpoint = trained[0] / "runs/synthetic-tiny/last.pt"
    flags = f"--checkpoint {checkpoint} --output out --count 3 --queries random --rerank --data-root"
    result = run("extras.look", flags, tmp_path, demo_root)
    assert result.returncode == 0, result.stderr
    for name, prompt in itertools.product(("untrained", "trained"), ("simplified", "composed")):
        assert re.search(rf"attention on the person, {name}, {prompt} prompt: \d+\.\d% of it", result.stdout)
    assert Image.open(tmp_path / "out/attention-1.png").size == (6 + 4 * 142, 6 + 3 * 294)
    assert Image.open(tmp_path / "out/ranked-1.png").size == (6 + 11 * 142, 6 + 3 * 294)


def test_ones_own_pictures(trained, demo_root, tmp_path):
    """Features of a folder, attention on single files, a search that finds the picture itself; no dataset is read."""
    folder, checkpoint = demo_root / "synthetic/query", trained[0] / "runs/synthetic-tiny/last.pt"
    pictures = sorted(folder.iterdir())
    (tmp_path / "mine/deep").mkdir(parents=True)
    for picture in pictures[:12]:
        shutil.copy(picture, tmp_path / "mine/deep")
    (tmp_path / "mine/notes.txt").write_text("not a picture")
    flags = f"--checkpoint {checkpoint} --data-root nowhere --images mine --features mine.npz --query"
    result = run("extras.search", flags, tmp_path, pictures[3])
    assert result.returncode == 0, result.stderr
    matches = re.findall(r"^(-?[\d.]+)  (\S+)$", result.stdout, re.MULTILINE)
    assert len(matches) == 10 and matches[0] == ("1.000", f"mine/deep/{pictures[3].name}")
    assert [float(value) for value, _ in matches] == sorted((float(value) for value, _ in matches), reverse=True)
    assert Image.open(tmp_path / f"search-{pictures[3].stem}-1.png").size == (6 + 11 * 142, 6 + 294)
    arrays = np.load(tmp_path / "mine.npz")
    assert arrays["images_features"].shape == (12, 128)
    assert arrays["images_names"][0] == f"mine/deep/{pictures[0].name}"
    np.testing.assert_allclose(np.linalg.norm(arrays["images_features"], axis=1), 1, atol=1e-5)
    flags = f"--checkpoint {checkpoint} --output maps --images"
    assert run("extras.look", flags, tmp_path, pictures[0], pictures[1]).returncode == 0
    assert Image.open(tmp_path / "maps/attention-1.png").size == (6 + 4 * 142, 6 + 2 * 294)


def test_evaluate_on_other_data_than_trained_on(trained, demo_root, tmp_path):
    checkpoint = trained[0] / "runs/synthetic-tiny/last.pt"
    flags = f"--checkpoint {checkpoint} --dataset folder --json score.json --data-root"
    result = run("evaluate.py", flags, tmp_path, demo_root / "synthetic")
    assert "cross-domain: trained on synthetic, tested on folder" in result.stdout
    score = json.loads((tmp_path / "score.json").read_text())
    assert (score["dataset"], score["trained_on"]) == ("folder", "synthetic")


def test_export_needs_no_data(trained, tmp_path):
    checkpoint = trained[0] / "runs/synthetic-tiny/last.pt"
    result = run("extras.export", f"--checkpoint {checkpoint}", tmp_path)
    assert result.returncode == 0, result.stderr
    module = torch.export.load(tmp_path / "model.pt2").module()
    assert module(torch.zeros(3, 3, 128, 64, dtype=torch.uint8)).shape == (3, 128)


def test_training_learns(demo_root, tmp_path):
    """Twelve short epochs on 20 people lift the score on six unseen ones far above the untrained model's."""
    arguments = "--dataset synthetic --backbone tiny --batch-ids 8 --epochs 12 --decay-every 9 --eval-every 12"
    result = run("train.py", arguments, tmp_path, "--data-root", demo_root)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "runs/synthetic-tiny/log.jsonl").read_text().splitlines()]
    assert records[-1]["accuracy"] > 2 * records[1]["accuracy"]
    assert records[-1]["mAP"] > records[0]["mAP"] + 0.15


@pytest.mark.parametrize(
    "flag, values, term",
    [
        ("--temperature", (0.07, 1), "loss_supcon"),
        ("--margin", (0, 5), "loss_triplet"),
        ("--label-smoothing", (0, 0.5), "loss_id"),
        ("--supcon-weight", (0, 2), "loss"),
    ],
)
def test_flags_of_the_losses_reach_the_losses(demo_root, tmp_path, flag, values, term):
    arguments = "--dataset synthetic --backbone tiny --batch-ids 8 --epochs 1 --steps 1 --eval-every 0 --overwrite"
    logs = []
    for value in values:
        result = run("train.py", f"{arguments} {flag} {value}", tmp_path, "--data-root", demo_root)
        assert result.returncode == 0, result.stderr
        logs.append(json.loads((tmp_path / "runs/synthetic-tiny/log.jsonl").read_text()))
    assert abs(logs[0][term] - logs[1][term]) > 1e-4
    for log, value in zip(logs, values):
        weight = value if flag == "--supcon-weight" else 0.5
        parts = log["loss_triplet"] + log["loss_id"] + weight * log["loss_supcon"]
        assert log["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_schedule_and_the_optimizer_are_as_the_flags_say(demo_root, tmp_path):
    arguments = "--dataset synthetic --backbone tiny --batch-ids 8 --epochs 3 --steps 1 --eval-every 0 --lr-new 0.008"
    more = " --decay-every 1 --decay-factor 0.5 --weight-decay 0.25"
    assert run("train.py", arguments + more, tmp_path, "--data-root", demo_root).returncode == 0
    log = (tmp_path / "runs/synthetic-tiny/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in log] == pytest.approx([0.008, 0.004, 0.002])
    args = train.parse_args(arguments.split() + more.split())
    optimizer = train.make_optimizer(model.build_model(args, 20), args)
    assert type(optimizer) is torch.optim.Adam
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(2e-4, 0.25), (0.008, 0.25)]


def test_random_weights_are_announced(demo_root, tmp_path):
    arguments = "--dataset synthetic --backbone vit --clip-weights random --image-size 32 16 --batch-ids 2"
    more = " --batch-images 2 --epochs 1 --steps 1 --eval-every 0"
    result = run("train.py", arguments + more, tmp_path, "--data-root", demo_root)
    assert result.returncode == 0 and "RANDOM weights" in result.stdout and "mean nothing" in result.stdout
    (tmp_path / "runs/synthetic-vit/last.pt").unlink()  # 1.4 GB


# ----------------------------------------------------------------------------------- backbones and ablations

# Flags of a row; whether it has the interaction module, how many blocks, the inversion network, and a SupCon loss.
ROWS = {
    "Table 3 a": ("", True, 2, True, True),
    "Table 3 b": ("--without-i2t", True, 2, True, True),
    "Table 3 c": ("--without-t2i", True, 2, True, True),
    "Table 3 d": ("--without-interaction", False, 0, True, True),
    "Table 4, w/o composed": ("--train-prompt simplified", True, 2, False, False),
    "Table 5, + 1 cross": ("--blocks 0", True, 0, True, True),
    "Table 5, + 1 self": ("--blocks 1", True, 1, True, True),
    "Table 2, baseline": ("--baseline", False, 0, False, False),
}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_of_the_tables_trains_its_own_parts(demo_root, tmp_path, row):
    flags, interaction, blocks, inversion, supcon = ROWS[row]
    arguments = f"--dataset synthetic --backbone tiny --epochs 1 --steps 2 --batch-ids 8 --eval-every 0 {flags}"
    args = train.parse_args(arguments.split())
    torch.manual_seed(0)
    before = model.build_model(args, 20).state_dict()
    result = run("train.py", arguments, tmp_path, "--data-root", demo_root)
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / "runs/synthetic-tiny/last.pt"
    after = torch.load(checkpoint, weights_only=True)["model"]

    names = [name for name in after if not name.startswith("clip.")]
    assert any(name.startswith("inversion.") for name in names) == inversion
    assert any(name.startswith("interaction.query") for name in names) == interaction
    assert len({name.split(".")[2] for name in names if name.startswith("interaction.blocks.")}) == blocks
    frozen = [name for name in before if name.startswith("clip.") and not name.startswith("clip.visual.")]
    for name in before:
        kept = name in frozen or name in ("simplified_text", "bnneck.bias")
        if name != "interaction.key.bias":  # which softmax cancels out
            assert torch.equal(before[name], after[name]) == kept, name
    log = json.loads((tmp_path / "runs/synthetic-tiny/log.jsonl").read_text())
    assert (log["loss_supcon"] > 0) == supcon

    result = run("evaluate.py", "", tmp_path, "--data-root", demo_root)
    assert result.returncode == 0 and "simplified" in result.stdout, result.stderr
    result = run("evaluate.py", "--prompt composed", tmp_path, "--data-root", demo_root)
    assert result.returncode == 0 if inversion else "use the simplified prompt" in result.stderr


@pytest.mark.parametrize("backbone, config", [("vit", SMALL_VIT), ("resnet", SMALL_RESNET)])
def test_both_backbones_train_score_and_resume_from_openais_archives(demo_root, tmp_path, backbone, config):
    weights = small_weights(dict(config, vocab_size=49408))
    archive = write_archive(weights, tmp_path / "CLIP.pt")
    arguments = f"--dataset folder --backbone {backbone} --batch-ids 4 --epochs 1 --steps 2 --image-size 64 32"
    more = ("--data-root", demo_root / "synthetic", "--clip-weights", archive)
    result = run("train.py", arguments, tmp_path, *more)
    assert result.returncode == 0, result.stderr
    checkpoint = tmp_path / f"runs/folder-{backbone}/last.pt"
    trained = torch.load(checkpoint, weights_only=True)
    assert torch.equal(trained["model"]["clip.token_embedding.weight"], weights["token_embedding.weight"])
    change = (trained["model"]["clip.visual.conv1.weight"] - weights["visual.conv1.weight"]).abs().max()
    assert 0 < change < 1e-4

    trained["args"]["epochs"] = 2  # as if it had been cut off after the first epoch
    torch.save(trained, checkpoint)
    result = run("train.py", arguments.replace("--epochs 1", "--epochs 2 --resume"), tmp_path, *more)
    assert result.returncode == 0 and "epoch 2/2" in result.stdout, result.stderr
    result = run("evaluate.py", "--data-root", tmp_path, demo_root / "synthetic")
    assert result.returncode == 0 and f"{backbone} trained on folder, epoch 2" in result.stdout, result.stderr


def test_weights_of_the_other_backbone(demo_root, tmp_path):
    archive = write_archive(small_weights(dict(SMALL_RESNET, vocab_size=49408)), tmp_path / "RN.pt")
    arguments = "--dataset synthetic --backbone vit --batch-ids 8 --clip-weights"
    refused(run("train.py", arguments, tmp_path, archive, "--data-root", demo_root), "not those of --backbone vit")


# ------------------------------------------------------------------------------------------------ bad input


def test_a_missing_dataset(tmp_path):
    refused(
        run_process("train.py", "--dataset market1501 --clip-weights random", tmp_path), "market1501 is not under data"
    )


def test_an_unreadable_picture_stops_training_by_name(demo_root, tmp_path):
    shutil.copytree(demo_root, tmp_path / "data")
    for path in (tmp_path / "data/synthetic/bounding_box_train").iterdir():
        path.write_bytes(b"")
    arguments = QUICK + " --eval-every 0 --workers "
    for workers in ("0", "1"):
        refused(run("train.py", arguments + workers, tmp_path), "cannot read the picture", ".jpg")


def test_no_such_checkpoint(trained, tmp_path):
    refused(run_process("evaluate.py", "--checkpoint nowhere.pt", tmp_path), "no checkpoint nowhere.pt")
    refused(run("evaluate.py", "", tmp_path), "no run in runs/ yet")
    refused(run("train.py", QUICK + " --resume", tmp_path), "no checkpoint runs/synthetic-tiny/last.pt")


def test_a_checkpoint_that_is_none(trained, demo_root, tmp_path):
    whole = (trained[0] / "runs/synthetic-tiny/last.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    for name, words in (("half.pt", "damaged"), ("picture.png", "damaged"), ("other.pt", "not written by train.py")):
        result = run("evaluate.py", f"--checkpoint {name}", tmp_path, "--data-root", demo_root)
        refused(result, name, words)


def test_a_checkpoint_of_another_backbone(trained, tmp_path):
    arguments = "--dataset synthetic --backbone vit --clip-weights random --resume --output"
    refused(run("train.py", arguments, trained[0], "runs/synthetic-tiny"), "was trained with --backbone tiny, not vit")


def test_another_run_is_not_overwritten(trained, demo_root):
    refused(run("train.py", QUICK, trained[0], "--data-root", demo_root), "holds a run", "--resume", "--overwrite")


def test_too_few_identities_for_a_batch(demo_root, tmp_path):
    arguments = "--dataset synthetic --backbone tiny --batch-ids 21"
    refused(run("train.py", arguments, tmp_path, "--data-root", demo_root), "needs 21 identities, the data has 20")


def test_a_weight_file_that_is_missing_or_wrong(demo_root, tmp_path):
    arguments = "--dataset synthetic --backbone vit --batch-ids 8 --clip-weights"
    refused(run("train.py", arguments + " none.pt", tmp_path, "--data-root", demo_root), "no weight file none.pt")
    (tmp_path / "wrong.pt").write_text("something")
    refused(run("train.py", arguments + " wrong.pt", tmp_path, "--data-root", demo_root), "wrong.pt is damaged")


def test_a_weight_file_with_the_wrong_hash(demo_root, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache/clip").mkdir(parents=True)
    (tmp_path / ".cache/clip/ViT-B-16.pt").write_text("something else")
    arguments = "--dataset synthetic --backbone vit --batch-ids 8"
    result = run("train.py", arguments, tmp_path, "--data-root", demo_root)
    refused(result, "ViT-B-16.pt is not OpenAI's file", "sha256", "delete it")


def test_a_report_into_nowhere_is_refused_before_the_work(trained):
    refused(run("evaluate.py", "--json nowhere/score.json", trained[0]), "there is no folder nowhere")


@pytest.mark.parametrize(
    "script, flags, words",
    [
        ("evaluate.py", "--features nowhere/x.npz", "there is no folder nowhere"),
        ("evaluate.py", "--rerank 20", "--rerank takes k1 and k2"),
        ("extras.search", "--images .", "give --query PICTURE or --features FILE.npz"),
        ("extras.search", "--images nowhere.jpg --features x.npz", "cannot read the picture nowhere.jpg"),
        ("extras.search", "--images empty --features x.npz", "no pictures in empty"),
        ("extras.search", "--images . --features nowhere/x.npz", "there is no folder nowhere"),
        ("extras.export", "--output nowhere/x.pt2", "there is no folder nowhere"),
        ("extras.export", "--device gpu", "--device gpu is not usable here"),
        ("extras.look", "--count 0", "--count must be at least 1"),
    ],
)
def test_flags_that_make_no_sense_for_a_trained_model(trained, script, flags, words):
    (trained[0] / "empty").mkdir(exist_ok=True)
    refused(run(script, flags, trained[0]), words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--epochs 0", "--epochs must be more than 0"),
        ("--lr-new nan", "--lr-new must be more than 0"),
        ("--temperature 0", "--temperature must be more than 0"),
        ("--margin -1", "--margin must be at least 0"),
        ("--seed 99999999999999999999", "--seed must be at least 0 and less than 2**32"),
        ("--lr-visual inf", "--lr-visual must be more than 0"),
        ("--image-size 0 64", "--image-size must be more than 0"),
        ("--label-smoothing 1", "--label-smoothing must be less than 1"),
        ("--device cuda:99", "--device cuda:99 is not usable here"),
        ("--device gpu", "--device gpu is not usable here"),
        ("--device meta", "only cpu and cuda"),
        ("--batch-ids 1", "must be at least 2"),
        ("--batch-images 1", "must be at least 2"),
        ("--clip-weights some.pt", "drop --clip-weights"),
        ("--workers -1", "--workers must be at least 0"),
        ("--workers 100000", "at most 256"),
        ("--precision fp16 --device cpu", "--precision fp16 needs CUDA"),
        ("--image-size 100 64", "does not divide by 16"),
        ("--baseline --without-i2t", "--baseline has neither prompts nor interaction module"),
        ("--train-prompt simplified --without-t2i", "no SupCon loss"),
        ("--without-interaction --blocks 1", "without --blocks"),
        ("--without-i2t --without-t2i", "use --supcon-weight 0"),
        ("--composed-prompt person", "must have S* as one of its words"),
    ],
)
def test_flags_that_make_no_sense(demo_root, tmp_path, flags, words):
    refused(run("train.py", f"{QUICK} {flags}", tmp_path, "--data-root", demo_root), words)
