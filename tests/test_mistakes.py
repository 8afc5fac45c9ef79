"""The mistakes that people make: each ends in one line that says what to do, and leaves no file."""

import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import FLAGS, ROOT, refused, run
from openai_format import SMALL_RESNET, small_weights

from util import device

RUN = "runs/synthetic-tiny"
MARKET1501 = ("bounding_box_train", "query", "bounding_box_test")


@pytest.fixture(scope="module")
def crowded(trained, tmp_path_factory):
    """A directory with the demo data, a run, and everything else that the rows below need."""
    folder = tmp_path_factory.mktemp("crowded")
    shutil.copytree(trained / RUN, folder / RUN)
    (folder / "data").symlink_to((trained / "data").resolve())
    state = torch.load(trained / RUN / "last.pt", weights_only=True)
    state["model_args"]["inversion"] = False  # as --train-prompt simplified makes it
    state["model"] = {name: w for name, w in state["model"].items() if not name.startswith("inversion.")}
    torch.save(state, folder / "simplified.pt")
    torch.save({"weight": torch.zeros(3)}, folder / "other.pt")
    torch.save(small_weights(SMALL_RESNET), folder / "small.pt")
    (folder / "broken.pt").write_bytes((folder / RUN / "last.pt").read_bytes()[:100_000])
    for path in ("market/Market-1501/Market-1501", "names", "alone", "broken"):
        for subfolder in MARKET1501[: 1 if path == "alone" else 3]:
            (folder / path / subfolder).mkdir(parents=True)
            if path == "names":
                (folder / path / subfolder / "IMG_1.jpg").touch()
    for path in (folder / "data/synthetic").glob("bounding_box_train/*"):
        (folder / "alone/bounding_box_train" / path.name).symlink_to(path)
        (folder / "broken/bounding_box_train" / path.name).write_text("no image")
    (folder / "empty").mkdir()
    return folder


NEW = "--eval-every 0 --output new"
ROWS = [
    # the dataset
    ("--dataset market1501 --output new", "no dataset at data/Market-1501-v15.09.15: expected", "bounding_box_train"),
    ("--dataset msmt17 --output new", "no dataset at data/MSMT17_V1: expected", "list_train.txt"),
    ("--dataset market1501 --data-root market --output new", "expected market/Market-1501/{bounding_box_train,"),
    (f"--dataset folder --data-root names {NEW}", "no image in names/bounding_box_train has a name like"),
    ("--dataset folder --data-root alone --output new", "expected alone/{bounding_box_train,query,"),
    (f"--dataset folder --data-root broken {NEW}", "cannot read image broken/bounding_box_train/"),
    ("evaluate.py --data-root empty", "no dataset at empty/synthetic"),
    ("evaluate.py --dataset market1501", "no dataset at data/Market-1501-v15.09.15"),
    # CLIP's weights
    (f"--backbone vit --clip-weights none.pt {NEW}", "none.pt"),
    (f"--backbone vit --clip-weights broken.pt {NEW}", "broken.pt"),
    (f"--backbone vit --clip-weights other.pt {NEW}", "other.pt"),
    (f"--backbone vit --clip-weights {RUN}/last.pt {NEW}", "last.pt"),
    (f"--backbone vit --clip-weights small.pt {NEW}", "small.pt", "another CLIP than ViT-B/16"),
    (f"--clip-weights other.pt {NEW}", "--backbone tiny has its own weights"),
    # flags
    ("--batch-ids 1", "--batch-ids and --batch-images must be at least 2"),
    ("--batch-images 1", "must be at least 2"),
    (f"--batch-ids 21 {NEW}", "needs 21 identities", "has 20", "--batch-ids"),
    ("--epochs 0", "must be at least 1"),
    ("--decay-every 0", "must be at least 1"),
    ("--backbone vit --image-size 100 64", "--image-size must be two multiples of 16"),
    ("--composed-prompt person", "must contain S* once"),
    (f"--temperature 0 {NEW}", "--temperature must be above 0"),
    ("--device cuda:99", "--device cuda:99 cannot be used here"),
    ("evaluate.py --device gpu", "--device gpu cannot be used here"),
    ("evaluate.py --rerank 20", "--rerank takes k1 and k2"),
    # runs and checkpoints
    ("", f"{RUN} holds a run", "--resume"),
    ("--resume --margin 0.5", f"{RUN}/last.pt was trained with --margin 0.3, not 0.5"),
    ("--output other.pt/run", "cannot create other.pt/run", "choose another --output"),
    ("evaluate.py --checkpoint nowhere.pt", "no checkpoint nowhere.pt", "last.pt"),
    (f"evaluate.py --checkpoint {RUN}", f"no checkpoint {RUN}", "last.pt"),
    ("evaluate.py --checkpoint broken.pt", "broken.pt is damaged"),
    ("evaluate.py --checkpoint other.pt", "other.pt is not a checkpoint of train.py"),
    ("evaluate.py --checkpoint simplified.pt --prompt composed", "use the simplified prompt"),
    ("evaluate.py --json nowhere/result.json", "in a directory that exists"),
    ("evaluate.py --features features.txt", "a name that ends in .npz"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_mistake_ends_in_one_line(crowded, monkeypatch, row):
    monkeypatch.setenv("HOME", str(crowded))  # where a download would go
    flags, *words = row
    before = {path: path.stat().st_mtime_ns for path in crowded.rglob("*")}
    is_evaluation = flags.startswith("evaluate.py ")
    script, flags = flags.split(" ", 1) if is_evaluation else ("train.py", f"{FLAGS} {flags}")
    result = run(script, flags, crowded)
    made = crowded / "new"  # a run that fails in its first step leaves args.json only
    if made.exists():
        assert [path.name for path in made.iterdir()] == ["args.json"]
        shutil.rmtree(made)
    refused(result, *words)
    assert {path: path.stat().st_mtime_ns for path in crowded.rglob("*")} == before


def test_without_a_run_or_with_a_gpu_of_another_process(tmp_path, monkeypatch):
    refused(run("evaluate.py", "", tmp_path), "no run in runs/: train one, or give --checkpoint")
    monkeypatch.setenv("LOCAL_RANK", "1")
    refused(run("evaluate.py", "--device cuda:1", tmp_path), "drop --device cuda:1")


def test_errors_of_a_user_are_one_line_and_errors_of_the_code_a_traceback(monkeypatch, capsys):
    def end_of(error: BaseException) -> object:
        def fail():
            raise error

        with pytest.raises(SystemExit) as stop:
            device.run_script(fail, on_interrupt="stopped")
        return stop.value.code

    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    assert end_of(OSError("no space:\nthe disk")) == "error: the disk"  # a loader's traceback comes before its message
    assert "error: out of GPU memory" in end_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert end_of(KeyboardInterrupt()) == 128 + signal.SIGINT and "stopped" in capsys.readouterr().err
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), TypeError("a"), KeyError("a")):
        with pytest.raises(type(error)):
            end_of(error)


def test_a_reader_that_has_seen_enough(crowded):
    """`| head` ends the script without a traceback, as it ends other programs."""
    command = f"{sys.executable} -u {ROOT / 'evaluate.py'} | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=crowded, capture_output=True, text=True, timeout=60)
    first, status = result.stdout.splitlines()
    assert first.startswith("checkpoint ") and status == "141" and not result.stderr
