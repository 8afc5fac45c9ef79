import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

if not any("test_cuda" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all other tests run on the CPU

os.environ["OMP_NUM_THREADS"] = "1"  # the tests' models are too small for several threads

import torch  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for plain `pytest`, too

import clip  # noqa: E402
from demo import draw  # noqa: E402
from model import PromptSG  # noqa: E402

FLAGS = "--dataset synthetic --backbone tiny --epochs 4 --decay-every 2 --batch-ids 8 --eval-every 2 --device cpu"
FLAGS += " --clip-weights random --image-size 64 32"
FLAGS += " --lr-visual 4e-4 --lr-new 8e-4 --decay-factor 0.5 --weight-decay 1e-3"

# Autograd starts its threads at the first backward pass. test_processes.py forks, which would hang if they were started
# after torch.export. So they are started here.
torch.ones(1, requires_grad=True).backward()


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A --data-root with a small drawing of the demo's dataset: 20 + 6 identities, four cameras."""
    root = tmp_path_factory.mktemp("data")
    draw.draw_dataset(root / "synthetic", train_ids=20, test_ids=6, images=8)
    return root


@pytest.fixture
def workplace(demo_root, tmp_path) -> Path:
    """A directory to run scripts in, with the demo's dataset in data/."""
    (tmp_path / "data").symlink_to(demo_root)
    return tmp_path


@pytest.fixture(scope="session")
def trained(demo_root, tmp_path_factory) -> Path:
    """A directory after `train.py FLAGS`, with its output in printed.txt. Tests must not change it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "data").symlink_to(demo_root)
    (folder / "printed.txt").write_text(output_of("train.py", FLAGS, folder))
    return folder


def run(script: str, arguments: str, folder: Path, *more) -> subprocess.CompletedProcess:
    """Run a script in this process, which saves the seconds of starting Python and importing torch."""
    argv, out, err, status = [script, *arguments.split(), *map(str, more)], io.BytesIO(), io.StringIO(), 0
    before = sys.argv, os.getcwd()
    sys.argv = argv
    os.chdir(folder)
    stdout = io.TextIOWrapper(out, "utf-8", write_through=True)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else print(stop.code, file=err) or 1
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    return subprocess.CompletedProcess(argv, status, out.getvalue().decode(), err.getvalue())


def output_of(script: str, arguments: str, folder: Path, *more) -> str:
    """Return the output of a script that succeeds."""
    result = run(script, arguments, folder, *more)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refused(result: subprocess.CompletedProcess, *words: str) -> None:
    """Check that a script failed with one line on stderr that contains these words, without a traceback."""
    assert result.returncode not in (0, None), result.stdout
    last = result.stderr.strip().splitlines()[-1]
    assert "error: " in last and "Traceback" not in result.stderr, result.stderr
    for word in words:
        assert word in last, last


@pytest.fixture
def make_model():
    """A function that builds the demo's small model with random weights, with the arguments of PromptSG."""

    def make(num_identities: int = 10, **components) -> PromptSG:
        torch.manual_seed(0)
        return PromptSG(clip.untrained("tiny", (64, 32)), num_identities, **components)

    return make


@pytest.fixture
def images() -> torch.Tensor:
    """Eight normalised images for `make_model`'s model."""
    return torch.randn(8, 3, 64, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def labels() -> torch.Tensor:
    return torch.tensor([0, 0, 0, 1, 1, 2, 3, 3])
