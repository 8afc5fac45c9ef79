"""What a hostile or a clumsy user does, and what then happens: one line, at once; nothing is lost, run or left over."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import FLAGS, ROOT, refused, run
from openai_format import SMALL_RESNET, small_weights, write_archive
from PIL import Image
from test_scripts import checkpoint_of

import clip
import data
import evaluate
import train
from model import S_STAR
from util import demo

RUN = "runs/synthetic-tiny"


class Command:
    """Pickled, a command that runs when it is read."""

    def __reduce__(self):
        return os.system, ("touch was-run",)


@pytest.fixture(scope="module")
def crowded(trained, tmp_path_factory):
    """The folder of a run, and in it every broken thing that a row below names."""
    folder = tmp_path_factory.mktemp("crowded") / "work"
    shutil.copytree(trained, folder, symlinks=True)
    (folder / "empty").mkdir()
    (folder / "folder.json").mkdir()
    (folder / "wrong.pt").write_text("something")
    (folder / "link").symlink_to("nowhere")
    whole, content = checkpoint_of(trained), (trained / RUN / "last.pt").read_bytes()

    def save(name: str, value: object) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save(value, folder / name)

    save("other.pt", {"weight": torch.zeros(3)})
    save("old.pt", {**whole, "version": 1})
    save("no-model.pt", {**whole, "model": None})
    save("no-backbone.pt", {**whole, "args": {**whole["args"], "backbone": None}})
    save("mars.pt", {**whole, "args": {**whole["args"], "dataset": "mars"}})
    save("fewer.pt", {**whole, "model": {name: w for name, w in whole["model"].items() if name != "bnneck.weight"}})
    save("numbers.pt", {**whole, "model": dict.fromkeys(whole["model"], 1)})
    save("settings.pt", {**whole, "model_args": {**whole["model_args"], "blocks": 1}})
    save("command.pt", Command())
    save("rows/last.pt", {name: value for name, value in whole.items() if name != "rows"})
    (folder / "best").mkdir()
    shutil.copy(folder / RUN / "best.pt", folder / "best/last.pt")
    for part in ("last.pt", "best.pt", "log.jsonl", "args.json"):
        (folder / f"only-{part}").mkdir()
        (folder / f"only-{part}" / part).touch()
    (folder / "half.pt").write_bytes(content[:1_000_000])
    (folder / "zeroed.pt").write_bytes(content[:1_000_000] + bytes(100) + content[1_000_100:])
    torch.load(folder / "zeroed.pt", weights_only=True)  # torch takes it
    Image.new("RGB", (8, 8)).save(folder / "picture.png")
    write_archive(small_weights(SMALL_RESNET), folder / "RN.pt")
    (folder / ".cache/clip").mkdir(parents=True)
    (folder / ".cache/clip/ViT-B-16.pt").write_text("something else")
    return folder


EVALUATE, LOOK, SEARCH, EXPORT, PRETRAIN = (
    "evaluate.py",
    *(f"extras/{name}.py" for name in ("look", "search", "export", "pretrain")),
)
ROWS = [
    # checkpoints
    (EVALUATE, "--checkpoint nowhere.pt", "no checkpoint nowhere.pt"),
    (EVALUATE, f"--checkpoint {RUN}", f"no checkpoint {RUN}: give the path of a run's last.pt"),
    (EVALUATE, "--checkpoint half.pt", "half.pt is damaged"),
    (EVALUATE, "--checkpoint zeroed.pt", "zeroed.pt is damaged"),
    (EVALUATE, "--checkpoint picture.png", "picture.png is damaged"),
    (EVALUATE, "--checkpoint command.pt", "holds other things than tensors: get it again"),
    (EVALUATE, "--checkpoint other.pt", "other.pt was not written by train.py"),
    (EVALUATE, "--checkpoint old.pt", "old.pt is of version 1"),
    (EVALUATE, "--checkpoint no-model.pt", "no-model.pt has no model"),
    (EVALUATE, "--checkpoint no-backbone.pt", "no-backbone.pt has no backbone"),
    (EVALUATE, "--checkpoint mars.pt", "no dataset mars: give --dataset one of market1501, "),
    (EVALUATE, "--checkpoint fewer.pt", "do not fit"),
    (EVALUATE, "--checkpoint numbers.pt", "do not fit"),
    (EVALUATE, "--checkpoint settings.pt", "do not fit"),
    # outputs
    (EVALUATE, "--json nowhere/score.json", "there is no folder nowhere"),
    (EVALUATE, f"--json {RUN}/last.pt", "give a name that ends in .json"),
    (EVALUATE, "--json folder.json", "folder.json is a folder"),
    (EVALUATE, "--features nowhere/x.npz", "there is no folder nowhere"),
    (EVALUATE, "--features x.txt", "give a name that ends in .npz"),
    (SEARCH, "--images . --features nowhere/x.npz", "there is no folder nowhere"),
    (EXPORT, "--output nowhere/x.pt2", "there is no folder nowhere"),
    (EXPORT, "--output x.onnx", "give a name that ends in .pt2"),
    (PRETRAIN, "--output x.npz", "give a name that ends in .pt"),
    # data and pictures
    (EVALUATE, "--data-root link", "--data-root link is a file, or a link that leads nowhere"),
    (EVALUATE, "--data-root wrong.pt", "--data-root wrong.pt is a file, or a link"),
    (SEARCH, "--images nowhere.jpg --features x.npz", "--images nowhere.jpg: there is no such file or folder"),
    (SEARCH, "--images empty --features x.npz", "no pictures in empty"),
    (SEARCH, "--images wrong.pt --features x.npz", "no pictures in wrong.pt"),
    (SEARCH, "--images picture.png --query nowhere.jpg", "cannot read the picture nowhere.jpg"),
    # flags
    (EVALUATE, "--rerank 20", "--rerank takes k1 and k2"),
    (SEARCH, "--images .", "nothing to do: give --query"),
    (EXPORT, "--device gpu", "--device gpu is not usable here"),
    (LOOK, "--count 0", "--count must be at least 1"),
    (LOOK, "--images . --rerank", "--rerank is for the ranked lists"),
    (LOOK, "--output picture.png", "--output picture.png is a file"),
    ("--lr-new nan", "--lr-new must be more than 0"),
    ("--seed 99999999999999999999", "--seed must be at least 0 and less than 2**32"),
    ("--lr-visual inf", "--lr-visual must be more than 0"),
    ("--image-size 0 64", "--image-size must be more than 0"),
    ("--label-smoothing 1", "--label-smoothing must be less than 1"),
    ("--device cuda:99", "--device cuda:99 is not usable here"),
    ("--device meta", "--device meta is not usable here: only cpu, cuda"),
    ("--batch-ids 1", "must be at least 2"),
    ("--batch-ids 21 --output new", "needs 21 identities, the data has 20"),
    ("--batch-images 1", "must be at least 2"),
    ("--clip-weights some.pt --output new", "weights of its own"),
    ("--workers -1", "--workers must be at least 0"),
    ("--workers 100000", "at most 256"),
    ("--precision fp16 --device cpu", "--precision fp16 needs CUDA"),
    ("--clip-weights random --image-size 100 64 --output new", "does not divide by 16"),
    ("--baseline --without-i2t", "--baseline has neither prompts nor interaction module"),
    ("--baseline --temperature 1", "--baseline has neither prompts nor interaction module"),
    ("--train-prompt simplified --without-t2i", "no SupCon loss"),
    ("--train-prompt simplified --supcon-weight 1", "no SupCon loss"),
    ("--train-prompt simplified --composed-prompt S*", "no S* and no SupCon loss"),
    ("--without-interaction --blocks 1", "without --blocks"),
    ("--without-i2t --without-t2i", "use --supcon-weight 0"),
    ("--composed-prompt person --output new", "must have S* as one of its words"),
    # runs
    ("", f"{RUN} holds a run: --resume it, --overwrite it"),
    *((f"--output only-{part}", "holds a run") for part in ("last.pt", "best.pt", "log.jsonl", "args.json")),
    ("--resume --overwrite", "give one of them"),
    ("--resume --epochs 3", "has begun 4 epochs already"),
    ("--resume --output new", "no checkpoint new/last.pt"),
    ("--resume --output best", "best/last.pt has no optimizer, as a best.pt has none"),
    ("--resume --output rows", "rows/last.pt has no rows"),
    (f"--resume --backbone vit --output {RUN}", "was trained with --backbone tiny, not vit"),
    (f"--resume --dataset folder --output {RUN}", "--dataset synthetic, not folder"),
    ("--output wrong.pt", "cannot make the folder wrong.pt"),
    ("--output link", "cannot make the folder link"),
    ("--output /proc/run", "cannot make the folder /proc/run"),
    # CLIP's weights
    ("--backbone vit --clip-weights none.pt", "no weight file none.pt"),
    ("--backbone vit --clip-weights command.pt", "holds Python objects"),
    ("--backbone vit --clip-weights RN.pt", "not those of --backbone vit"),
    ("--backbone vit", "ViT-B-16.pt is damaged or another file (wrong sha256): delete it"),
]


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_is_refused_in_one_line_and_leaves_nothing(crowded, monkeypatch, row):
    monkeypatch.setenv("HOME", str(crowded))  # whose .cache holds a wrong file
    *script, flags, words = row
    before = sorted(crowded.rglob("*"))
    refused(run(*(script or ["train.py"]), flags if script else f"{FLAGS} {flags}", crowded), words)
    assert sorted(crowded.rglob("*")) == before  # no half-made folder, nothing overwritten, no command run


def test_without_a_home_or_the_demos_weights(crowded, monkeypatch):
    def nobody(number):
        raise KeyError(number)

    with monkeypatch.context() as patch:
        patch.delenv("HOME")
        patch.setattr(pwd, "getpwuid", nobody)
        flags = "--dataset folder --data-root data/synthetic --backbone vit --output new"
        refused(run("train.py", flags, crowded), "no home folder", "give --clip-weights PATH")
    for name, words in (("nowhere.pt", "there is no file"), ("wrong.pt", "is damaged")):
        monkeypatch.setattr(demo, "TINY_CLIP", crowded / name)
        refused(run("train.py", f"{FLAGS} --output new", crowded), words, name)


def test_flags_that_torchrun_cannot_honour(crowded, monkeypatch):
    """And of several processes that fail alike, the others wait for torchrun to end them."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank, device, words in (("0", "cuda:1", "drop --device cuda:1"), ("1", "cuda", "lower --nproc_per_node")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        refused(run("evaluate.py", f"--device {device}", crowded), words)
        assert waits == [5] * int(rank)


def test_a_path_is_not_empty_and_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(train.parse_args(["--output=~/run"]).output) == "/home/me/run"  # which no shell has replaced
    for parse, flag in ((train.parse_args, "--output"), (evaluate.parse_args, "--data-root")):
        with pytest.raises(SystemExit, match="2"):
            parse([flag, ""])  # as of a variable that is not set: it would be this folder


@pytest.mark.parametrize("prompt", ["a S*x S* man", "S*", "A  photo of a S*  person"])
def test_s_star_is_the_word_that_is_replaced(make_model, prompt):
    encode = clip.tokenizer().encode
    before, after = (encode(part) for part in f" {' '.join(prompt.split())} ".split(" S* "))
    ids = make_model(composed_prompt=prompt).composed_ids[0].tolist()
    assert ids[1:-1] == [*before, S_STAR, *after]


# ------------------------------------------------------------------------------- full disks, Ctrl-C, pipes

ONE_EPOCH = FLAGS.replace("--epochs 4", "--epochs 1")


@pytest.mark.parametrize("name", ["args.json", "log.jsonl", "last.pt", "best.pt"])
def test_a_full_disk_in_training(workplace, monkeypatch, name):
    """Only best.pt comes after a first save."""
    fill_at(monkeypatch, name)
    refused(run("train.py", ONE_EPOCH, workplace), f"cannot write {RUN}/{name} (No space left on device)")
    left = [path.name for path in workplace.glob(f"{RUN}/*")]
    assert sorted(left) == (["args.json", "last.pt", "log.jsonl"] if name == "best.pt" else [])


def fill_at(monkeypatch, name: str) -> None:
    """No room for a file of this name."""
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == name:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)


@pytest.mark.parametrize(
    "script, flags, name",
    [
        (EVALUATE, "--json score.json", "score.json"),
        (EVALUATE, "--features new.npz", "new.npz"),
        (EXPORT, "--output new.pt2", "new.pt2"),
    ],
)
def test_a_full_disk_afterwards(crowded, monkeypatch, script, flags, name):
    fill_at(monkeypatch, name)
    before = sorted(crowded.iterdir())
    refused(run(script, flags, crowded), f"cannot write {name} (No space left on device)")
    assert sorted(crowded.iterdir()) == before


def interrupt(*arguments, **keywords):
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize(
    "doing, script, flags",
    [
        ((demo, "draw_sample"), "train.py", "--dataset synthetic --backbone tiny --data-root new --output run"),
        ((torch.hub, "urlopen"), "train.py", "--dataset folder --data-root data/synthetic --backbone vit --output run"),
        ((data, "read_picture"), EVALUATE, "--json new.json"),
        ((data, "read_picture"), SEARCH, "--images picture.png --features new.npz"),
        ((np, "savez"), EVALUATE, "--features new.npz"),
        ((torch.export, "save"), EXPORT, ""),
    ],
    ids=["drawing", "downloading", "scoring", "searching", "writing", "exporting"],
)
def test_ctrl_c_leaves_nothing(crowded, monkeypatch, doing, script, flags):
    (crowded / "home").mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(crowded / "home"))
    monkeypatch.setattr(*doing, interrupt)
    before = {path for path in crowded.rglob("*")}
    result = run(script, flags, crowded)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")
    left = {str(path.relative_to(crowded)) for path in set(crowded.rglob("*")) - before}
    assert left <= {"new", "home/.cache", "home/.cache/clip"}  # --data-root and the cache, empty


def test_a_reader_that_has_seen_enough(crowded):
    command = f"{sys.executable} -u {ROOT / 'evaluate.py'} | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=crowded, capture_output=True, text=True, timeout=60)
    first, status = result.stdout.splitlines()
    assert first.startswith("checkpoint ") and status == "141" and not result.stderr
