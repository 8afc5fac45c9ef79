"""The shape of the repository: which file may import which, and that ours win over installed packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SIX = ("clip", "losses", "data", "model", "evaluate", "train")
# What each of the six may import of the six.
ALLOWED = {
    "clip": set(),
    "losses": set(),
    "data": set(),
    "model": {"clip"},
    "evaluate": {"clip", "losses", "data", "model"},
    "train": {"clip", "losses", "data", "model", "evaluate"},
}
FILES = sorted(path for folder in (".", "util", "extras") for path in (ROOT / folder).glob("*.py"))


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, wherever in it: "clip", "util.machine", "extras.look"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            is_folder = node.module in ("util", "extras")
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if is_folder else {node.module}
    return {name for name in found if name.split(".")[0] in (*SIX, "util", "extras")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    """util <- the six <- extras; inside, no cycle."""
    found, name = imports(path), path.stem
    if path.parent == ROOT:
        assert name in SIX
        assert {other for other in found if other in SIX} <= ALLOWED[name]
        assert not any(other.startswith("extras") for other in found)
    elif path.parent.name == "util":
        assert all(other.startswith("util") for other in found)


def test_no_cycle_in_util_and_extras():
    left = {f"{path.parent.name}.{path.stem}": imports(path) for path in FILES if path.parent != ROOT}
    while left:
        free = [name for name, found in left.items() if not found & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for name in free:
            del left[name]


def test_an_installed_package_does_not_win_over_ours(tmp_path):
    """Packages called util and extras, on the path before the standard library: still ours."""
    for name in ("util", "extras"):
        assert (ROOT / name / "__init__.py").read_text() == ""
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('not ours')")
    command = [sys.executable, "-m", "extras.export", "--help"]
    result = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert result.returncode == 0 and "extras.export" in result.stdout, result.stderr
