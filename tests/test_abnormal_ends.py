"""No error hangs: every abnormal end of the main process or of a loader process ends the script within seconds."""

import signal
import subprocess
import sys
from pathlib import Path

from conftest import FLAGS, ROOT


def start(folder, *more, code=None) -> subprocess.Popen:
    """Start train.py with two loader processes in a process group of its own."""
    script = ["-c", code] if code else [str(ROOT / "train.py")]
    command = [sys.executable, "-u", *script, *FLAGS.split(), "--workers", "2", *more]
    return subprocess.Popen(
        command, cwd=folder, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_ends_with_one_line(process: subprocess.Popen, *words: str) -> None:
    """The script ends within seconds with a non-zero status and one line of ours; torch may print lines before it."""
    loaders = children(process.pid)
    try:
        _, errors = process.communicate(timeout=40)
    finally:
        process.kill()
    assert process.returncode not in (0, -signal.SIGKILL), errors
    lines = errors.strip().splitlines()
    assert sum(line.startswith("error: ") for line in lines) == 1 and lines[-1].startswith("error: "), errors
    assert all(word in lines[-1] for word in words), lines[-1]
    assert not any(Path(f"/proc/{pid}").exists() for pid in loaders)


def wait_for(process: subprocess.Popen, words: str) -> None:
    assert any(words in line for line in process.stdout), process.stderr.read()


def test_an_unreadable_image_in_a_loader_process(workplace, demo_root):
    (workplace / "data").unlink()
    for path in (demo_root / "synthetic").rglob("*.jpg"):
        copy = workplace / "data" / path.relative_to(demo_root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    broken = sorted((workplace / "data/synthetic/bounding_box_train").iterdir())
    for path in broken[:8]:  # one identity
        path.unlink()
        path.write_text("no image")
    process = start(workplace, "--eval-every", "0")
    assert_ends_with_one_line(process, "cannot read", broken[0].name.split("_")[0])


def test_a_loader_process_that_is_killed(workplace):
    process = start(workplace, "--epochs", "1000", "--eval-every", "0")
    wait_for(process, "epoch 2/")
    subprocess.run(["kill", "-KILL", str(children(process.pid)[0])], check=True)
    assert_ends_with_one_line(process, "DataLoader worker")


def test_a_loader_process_that_cannot_be_started(workplace):
    code = f"""
import multiprocessing.process, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
real, calls = multiprocessing.process.BaseProcess.start, []
def start(process):
    calls.append(process)
    if len(calls) == 2:
        raise OSError(11, "Resource temporarily unavailable")
    real(process)
multiprocessing.process.BaseProcess.start = start
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""
    assert_ends_with_one_line(start(workplace, "--eval-every", "0", code=code), "Resource temporarily unavailable")
