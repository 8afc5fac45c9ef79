"""Common mistakes: each ends in one line that says what to do, and leaves no file."""

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
    """A directory with the demo's dataset, a run, and all other files that the rows below need."""
    folder = tmp_path_factory.mktemp("crowded")
    shutil.copytree(trained / RUN, folder / RUN)
    (folder / "data").symlink_to((trained / "data").resolve())
    state = torch.load(trained / RUN / "last.pt", weights_only=True)
    state["model_args"]["inversion"] = False  # as after --train-prompt simplified
    state["model"] = {name: w for name, w in state["model"].items() if not name.startswith("inversion.")}
    torch.save(state, folder / "simplified.pt")
    torch.save({"weight": torch.zeros(3)}, folder / "other.pt")
    torch.save(small_weights(SMALL_RESNET), folder / "small.pt")
    (folder / "broken.pt").write_bytes((folder / RUN / "last.pt").read_bytes()[:100_000])
    for path in ("market/Market-1501/Market-1501", "alone", "broken"):
        for subfolder in MARKET1501[: 1 if path == "alone" else 3]:
            (folder / path / subfolder).mkdir(parents=True)
    for path in (folder / "data/synthetic").glob("bounding_box_train/*"):
        (folder / "alone/bounding_box_train" / path.name).symlink_to(path)
        (folder / "broken/bounding_box_train" / path.name).write_text("not an image")
    (folder / "empty").mkdir()
    return folder


NEW = "--eval-every 0 --output new"
MISTAKES = [  # flags of train.py or evaluate.py, words of the message
    # datasets
    ("--dataset market1501 --output new", "data/Market-1501-v15.09.15", "bounding_box_train"),
    ("--dataset msmt17 --output new", "data/MSMT17_V1", "list_train.txt"),
    ("--dataset market1501 --data-root market --output new", "expected market/Market-1501/{bounding_box_train,"),
    ("--dataset folder --data-root alone --output new", "alone/{bounding_box_train,query,"),
    (f"--dataset folder --data-root broken --workers 2 {NEW}", "broken/bounding_box_train/"),
    ("evaluate.py --data-root empty", "empty/synthetic"),
    # CLIP's weights
    (f"--backbone vit --clip-weights none.pt {NEW}", "none.pt"),
    (f"--backbone vit --clip-weights {RUN}/last.pt {NEW}", "last.pt"),
    (f"--backbone vit --clip-weights small.pt {NEW}", "small.pt", "ViT-B/16"),
    (f"--clip-weights other.pt {NEW}", "--backbone tiny"),
    # flags
    ("--batch-ids 1", "--batch-ids"),
    (f"--batch-ids 21 {NEW}", "21 identities", "20", "--batch-ids"),
    ("--epochs 0", "--epochs"),
    ("--backbone vit --image-size 100 64", "--image-size", "16"),
    ("--composed-prompt person", "S*"),
    ("--device cuda:99", "--device cuda:99"),
    ("evaluate.py --rerank 20", "--rerank"),
    # runs and checkpoints
    ("", f"{RUN} holds a run", "--resume"),
    ("--resume --blocks 1", f"{RUN}/last.pt", "--blocks 2, not 1"),
    ("evaluate.py --checkpoint nowhere.pt", "no checkpoint nowhere.pt"),
    (f"evaluate.py --checkpoint {RUN}", f"no checkpoint {RUN}", "last.pt"),
    ("evaluate.py --checkpoint broken.pt", "broken.pt is damaged"),
    ("evaluate.py --checkpoint other.pt", "other.pt"),
    ("evaluate.py --checkpoint simplified.pt --prompt composed", "simplified prompt"),
    ("evaluate.py --json nowhere/result.json", "nowhere/result.json"),
    ("evaluate.py --features features.txt", ".npz"),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake[0])
def test_a_mistake_ends_in_one_line(crowded, monkeypatch, mistake):
    monkeypatch.setenv("HOME", str(crowded))  # where a download would go
    flags, *words = mistake
    before = {path: path.stat().st_mtime_ns for path in crowded.rglob("*")}
    is_evaluation = flags.startswith("evaluate.py ")
    script, flags = flags.split(" ", 1) if is_evaluation else ("train.py", f"{FLAGS} {flags}")
    result = run(script, flags, crowded)
    new = crowded / "new"
    if new.exists():  # a run that fails in its first step leaves args.json only
        assert [path.name for path in new.iterdir()] == ["args.json"]
        shutil.rmtree(new)
    refused(result, *words)
    assert {path: path.stat().st_mtime_ns for path in crowded.rglob("*")} == before


def test_evaluation_without_a_run(tmp_path):
    refused(run("evaluate.py", "", tmp_path), "no run in runs/", "--checkpoint")


def test_errors_that_a_user_can_fix_are_one_line_and_others_a_traceback(monkeypatch, capsys):
    def end_of(error: BaseException) -> object:
        def fail():
            raise error

        with pytest.raises(SystemExit) as stop:
            device.run_script(fail, on_interrupt="stopped")
        return stop.value.code

    monkeypatch.setattr(sys.stdout, "reconfigure", lambda **options: None, raising=False)
    assert end_of(OSError("no space:\nthe disk")) == "error: the disk"  # after a loader's traceback
    assert "error: out of GPU memory" in end_of(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert end_of(KeyboardInterrupt()) == 128 + signal.SIGINT and "stopped" in capsys.readouterr().err
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), TypeError("a"), KeyError("a")):
        with pytest.raises(type(error)):
            end_of(error)


def test_a_closed_pipe_ends_a_script_without_a_traceback():
    """As with `| head`."""
    code = "from util import device; device.run_script(lambda: [print(i) for i in range(10**5)])"
    command = f"{sys.executable} -u -c '{code}' | head -n 1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.stdout.split() == ["0", "141"] and not result.stderr
