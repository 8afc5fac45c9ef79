"""The scripts as a user runs them: from the command line, on the drawn demo data."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import FLAGS, ROOT, output_of, refused, run
from openai_format import SMALL_RESNET, SMALL_VIT, small_weights, write_archive
from PIL import Image

import clip
import data
import evaluate
import model
import train
from util.rerank import k_reciprocal

SHORT = "--dataset synthetic --backbone tiny --batch-ids 8 --epochs 1 --eval-every 0"


def run_process(script: str, arguments: str, folder) -> subprocess.CompletedProcess:
    """What `run` does, in a process of its own."""
    command = [sys.executable, str(ROOT / script), *arguments.split()]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=170)


def log_of(folder, run_folder: str = "runs/synthetic-tiny") -> list[dict]:
    return [json.loads(line) for line in (folder / run_folder / "log.jsonl").read_text().splitlines()]


def checkpoint_of(folder, run_folder: str = "runs/synthetic-tiny") -> dict:
    return torch.load(folder / run_folder / "last.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------- it works


def test_training_prints_what_a_reader_needs(trained):
    text = (trained / "printed.txt").read_text()
    words = "# ids|learnable parameters|before training, CLIP alone: mAP|epoch 2/4  step|loss |triplet |id |supcon "
    words += "|accuracy |images/s|lr 4.0e-04/8.0e-04| left|mAP |Rank-1 |Rank-5 |Rank-10 |training time (Table 6): "
    for word in words.split("|"):
        assert word in text


def test_a_run_holds_checkpoints_log_and_settings(trained):
    run_folder = trained / "runs/synthetic-tiny"
    expected = ["args.json", "best.pt", "curves.png", "last.pt", "log.jsonl"]
    assert sorted(path.name for path in run_folder.iterdir()) == expected
    records = log_of(trained)
    assert [record["epoch"] for record in records] == [0, 1, 2, 3, 4]
    assert [record["lr"] for record in records[1:]] == [8e-4, 8e-4, 4e-4, 4e-4]
    groups = checkpoint_of(trained)["optimizer"]["param_groups"]
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(1e-4, 1e-3), (2e-4, 1e-3)]  # decayed twice
    assert set(records[0]) == {"epoch", "mAP", "rank1", "dataset_version"}
    names = "epoch loss loss_triplet loss_id loss_supcon accuracy lr images_per_second"
    assert set(records[1]) == set(names.split()) and set(records[2]) == {
        *names.split(),
        "mAP",
        "rank1",
        "dataset_version",
    }
    terms = records[1]["loss_triplet"] + records[1]["loss_id"] + 0.5 * records[1]["loss_supcon"]
    assert records[1]["loss"] == pytest.approx(terms, rel=1e-5)
    assert records[2]["loss"] < records[1]["loss"]
    settings = json.loads((run_folder / "args.json").read_text())
    assert settings["seed"] == 0 and settings["torch"] == torch.__version__ and "train.py" in settings["command"]


def test_before_training_the_log_has_clips_own_score(trained):
    args = train.parse_args([*FLAGS.split(), "--data-root", str(trained / "data")])
    train.check_args(args)
    dataset = data.load_dataset("synthetic", args.data_root)
    clips_own = evaluate.score(model.build_model(args, dataset.num_identities), dataset, "none", args)
    assert log_of(trained)[0]["mAP"] == pytest.approx(clips_own["mAP"], abs=1e-4)


def test_what_scoring_leaves_out_is_said(workplace, demo_root):
    """One identity of six, four queries, has nothing in the gallery; a file has no picture's name."""
    shutil.copytree(demo_root / "synthetic", workplace / "mine")
    gallery = workplace / "mine/bounding_box_test"
    pids = sorted({path.name[:4] for path in gallery.iterdir()} - {"0000"})
    for path in gallery.glob(f"{pids[0]}_*"):
        path.unlink()
    (gallery / "notes.txt").write_text("mine")
    output_of("train.py", f"{SHORT} --steps 1", workplace)
    printed = output_of("evaluate.py", "--dataset folder --data-root mine --json score.json", workplace)
    assert "4 of 24 queries have no right picture in the gallery and are left out" in printed
    assert "1 file passed over (first: notes.txt)" in printed
    report = json.loads((workplace / "score.json").read_text())
    assert (report["queries_left_out"], report["files_passed_over"]) == (4, 1)


def test_evaluate_needs_no_flag(trained):
    result = run_process("evaluate.py", "--rerank 10 4 --features all.npz --json score.json", trained)
    assert result.returncode == 0, result.stderr
    score, arrays = json.loads((trained / "score.json").read_text()), np.load(trained / "all.npz")
    names = "mAP rank1 rank5 rank10 reranked images_per_second prompt precision checkpoint dataset dataset_version"
    names += " trained_on queries_left_out files_passed_over"
    assert set(score) == set(names.split())
    assert (score["prompt"], score["dataset"], score["trained_on"]) == ("composed", "synthetic", "synthetic")
    assert score["queries_left_out"] == score["files_passed_over"] == 0 and "left out" not in result.stdout
    assert score["mAP"] == pytest.approx(log_of(trained)[-1]["mAP"], abs=1e-6)  # what training printed at its end
    words = ("checkpoint runs/synthetic-tiny/last.pt", f"mAP {score['mAP']:.1%}", "Rank-1", "Rank-5", "Rank-10")
    assert all(word in result.stdout for word in words)
    assert re.search(r"re-ranked: mAP \d+\.\d%  Rank-1", result.stdout)
    assert re.search(r"Table 5\): visual encoder \d+ images/s .*simplified \d+ .*composed \d+", result.stdout)
    # The features that it wrote give the scores that it printed.
    tensors = {name: torch.tensor(arrays[name]) for name in arrays.files if not name.endswith("names")}
    assert len(arrays["query_names"]) == len(tensors["query_features"]) == 24
    assert arrays["gallery_names"][0].endswith(".jpg")
    pairs = [tensors[f"{subset}_{kind}"] for kind in ("features", "ids", "cams") for subset in ("query", "gallery")]
    assert evaluate.rank_metrics(*pairs)["mAP"] == pytest.approx(score["mAP"], abs=1e-6)
    reranked = evaluate.rank_metrics(*pairs, k_reciprocal(*pairs[:2], 10, 4))
    assert reranked["mAP"] == pytest.approx(score["reranked"]["mAP"], abs=1e-6)


def test_evaluate_on_other_data_than_trained_on(trained):
    """The same pictures by another name, with the other prompt."""
    flags = "--prompt simplified --dataset folder --data-root data/synthetic --json cross.json"
    text = output_of("evaluate.py", flags, trained)
    score = json.loads((trained / "cross.json").read_text())
    assert "cross-domain: trained on synthetic, tested on folder" in text
    assert f"folder, simplified prompt: mAP {score['mAP']:.1%}" in text
    assert (score["prompt"], score["dataset"], score["trained_on"]) == ("simplified", "folder", "synthetic")


def test_look_draws_and_measures(trained):
    text = output_of("extras/look.py", "--output out --count 3 --queries random --rerank", trained)
    for name, prompt in itertools.product(("untrained", "trained"), ("simplified", "composed")):
        assert re.search(rf"attention on the person, {name}, {prompt} prompt: \d+\.\d% of it", text)
    assert Image.open(trained / "out/attention-1.png").size == (6 + 4 * 142, 6 + 3 * 294)
    assert Image.open(trained / "out/ranked-1.png").size == (6 + 11 * 142, 6 + 3 * 294)


def test_ones_own_pictures(trained, demo_root, tmp_path):
    """Features of a folder, attention on single files, a search that finds the picture itself; no dataset is read."""
    pictures = sorted((demo_root / "synthetic/query").iterdir())
    (tmp_path / "mine/deep").mkdir(parents=True)
    for picture in pictures[:12]:
        shutil.copy(picture, tmp_path / "mine/deep")
    (tmp_path / "mine/notes.txt").write_text("not a picture")
    checkpoint = f"--checkpoint {trained / 'runs/synthetic-tiny/last.pt'} --data-root nowhere"
    flags = f"{checkpoint} --images mine --features mine.npz --query"
    text = output_of("extras/search.py", flags, tmp_path, pictures[3])
    matches = re.findall(r"^(-?[\d.]+)  (\S+)$", text, re.MULTILINE)
    assert len(matches) == 10 and matches[0] == ("1.000", f"mine/deep/{pictures[3].name}")
    assert [float(value) for value, _ in matches] == sorted((float(value) for value, _ in matches), reverse=True)
    assert Image.open(tmp_path / f"search-{pictures[3].stem}-1.png").size == (6 + 11 * 142, 6 + 294)
    arrays = np.load(tmp_path / "mine.npz")
    assert arrays["images_features"].shape == (12, 128)
    assert arrays["images_names"][0] == f"mine/deep/{pictures[0].name}"
    np.testing.assert_allclose(np.linalg.norm(arrays["images_features"], axis=1), 1, atol=1e-5)
    output_of("extras/look.py", f"{checkpoint} --output maps --images", tmp_path, *pictures[:2])
    assert Image.open(tmp_path / "maps/attention-1.png").size == (6 + 4 * 142, 6 + 2 * 294)


def test_export_needs_no_data(trained, tmp_path):
    output_of("extras/export.py", "--checkpoint", tmp_path, trained / "runs/synthetic-tiny/best.pt")
    module = torch.export.load(tmp_path / "model.pt2").module()
    assert module(torch.zeros(3, 3, 128, 64, dtype=torch.uint8)).shape == (3, 128)
    with pytest.raises(NotImplementedError):
        module(torch.rand(3, 3, 128, 64))  # nearly the same feature for everybody


def test_training_learns(workplace):
    """From random weights, twelve short epochs on 20 people lift the score on six unseen ones far above CLIP's own."""
    output_of("train.py", f"{SHORT} --clip-weights random --epochs 12 --decay-every 9 --eval-every 12", workplace)
    records = log_of(workplace)
    assert records[-1]["accuracy"] > 2 * records[1]["accuracy"]
    assert records[-1]["mAP"] > records[0]["mAP"] + 0.15


@pytest.mark.parametrize("flag, term", [("--seed 1", "loss"), ("--temperature 1", "loss_supcon")])
def test_a_run_depends_on(trained, workplace, flag, term):
    output_of("train.py", f"{FLAGS} --epochs 1 --eval-every 0 {flag}", workplace)
    assert abs(log_of(workplace)[-1][term] - log_of(trained)[1][term]) > 1e-4


def test_random_weights_are_announced(workplace, monkeypatch):
    monkeypatch.setitem(clip.ARCHITECTURES, "ViT-B/16", clip.ARCHITECTURES["tiny"])  # smaller, or it writes 1.4 GB
    flags = f"{SHORT} --backbone vit --clip-weights random --image-size 32 16 --steps 1"
    text = output_of("train.py", flags, workplace)
    assert "RANDOM weights" in text and "mean nothing" in text


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
def test_every_row_of_the_tables_trains_its_own_parts(workplace, row):
    flags, interaction, blocks, inversion, supcon = ROWS[row]
    arguments = f"{SHORT} --steps 2 {flags}"
    before = model.build_model(train.parse_args(arguments.split()), 20).state_dict()
    output_of("train.py", arguments, workplace)
    after = checkpoint_of(workplace)["model"]
    names = [name for name in after if not name.startswith("clip.")]
    assert any(name.startswith("inversion.") for name in names) == inversion
    assert any(name.startswith("interaction.query") for name in names) == interaction
    assert len({name.split(".")[2] for name in names if name.startswith("interaction.blocks.")}) == blocks
    frozen = [name for name in before if name.startswith("clip.") and not name.startswith("clip.visual.")]
    for name in before:
        kept = name in frozen or name in ("simplified_text", "bnneck.bias")
        if name != "interaction.key.bias":  # which softmax cancels out
            assert torch.equal(before[name], after[name]) == kept, name
    assert (log_of(workplace)[0]["loss_supcon"] > 0) == supcon
    prompt = "composed" if inversion else "simplified"
    assert f"synthetic, {prompt} prompt: mAP" in output_of("evaluate.py", "", workplace)
    if not inversion:
        assert "use the simplified prompt" in run("evaluate.py", "--prompt composed", workplace).stderr


@pytest.mark.parametrize("backbone, config", [("vit", SMALL_VIT), ("resnet", SMALL_RESNET)])
def test_both_backbones_train_score_and_resume_from_openais_archives(workplace, backbone, config):
    weights = small_weights(dict(config, vocab_size=49408))
    write_archive(weights, workplace / "CLIP.pt")
    flags = f"--dataset folder --data-root data/synthetic --backbone {backbone} --clip-weights CLIP.pt"
    flags += " --batch-ids 4 --steps 2 --image-size 64 32 --epochs"
    output_of("train.py", f"{flags} 1", workplace)
    trained = checkpoint_of(workplace, f"runs/folder-{backbone}")["model"]
    assert torch.equal(trained["clip.token_embedding.weight"], weights["token_embedding.weight"])
    change = (trained["clip.visual.conv1.weight"] - weights["visual.conv1.weight"]).abs().max()
    assert 0 < change < 1e-4
    assert "epoch 2/2" in output_of("train.py", f"{flags} 2 --resume", workplace)
    text = output_of("evaluate.py", "--data-root data/synthetic", workplace)
    assert f"{backbone} trained on folder, epoch 2" in text


# ------------------------------------------------------------------------------------------------ bad input


def test_a_process_ends_with_one_line(tmp_path):
    flags = "--dataset market1501 --clip-weights random"
    refused(run_process("train.py", flags, tmp_path), "market1501 is not under data")
    refused(run("evaluate.py", "", tmp_path), "no run in runs/ yet")


def test_an_unreadable_picture_stops_training_by_name(demo_root, tmp_path):
    shutil.copytree(demo_root, tmp_path / "data")
    for path in (tmp_path / "data/synthetic/bounding_box_train").iterdir():
        path.write_bytes(b"")
    for workers in ("0", "1"):
        refused(run("train.py", f"{SHORT} --workers {workers}", tmp_path), "cannot read the picture", ".jpg")


def test_numbers_that_are_too_small_are_refused():
    positive = "epochs batch-ids batch-images decay-every decay-factor lr-visual lr-new temperature steps log-every"
    rows = [(name, "0", "more than 0") for name in positive.split()]
    others = "seed margin weight-decay supcon-weight label-smoothing eval-every"
    rows += [(name, "-1", "at least 0") for name in others.split()]
    for name, value, words in rows:
        with pytest.raises(ValueError, match=f"^--{name} must be {words}"):
            train.check_args(train.parse_args([f"--{name}", value]))
