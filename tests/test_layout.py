"""Imports between the files of the repository."""

import ast

import pytest
from conftest import ROOT

# What each file and each package may import of the others.
ALLOWED = {
    "util": {"util"},
    "clip": {"util"},
    "losses": {"util"},
    "data": {"util", "clip"},
    "model": {"util", "clip"},
    "evaluate": {"util", "clip", "data", "model"},
    "demo": {"util", "clip", "losses", "demo"},
    "train": {"util", "clip", "data", "model", "losses", "evaluate", "demo"},
}
ALLOWED["extras"] = ALLOWED["train"] - {"demo"} | {"train", "extras"}
ALLOWED["experiments"] = ALLOWED["extras"] | {"demo", "experiments"}
FILES = sorted(
    path for folder in (".", "util", "demo", "extras", "experiments") for path in (ROOT / folder).glob("*.py")
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports(path):
    """Only look.py of the extras may import the demo, for its masks."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    name = path.stem if path.parent == ROOT else path.parent.name
    allowed = ALLOWED[name] | ({"demo"} if path.name == "look.py" else set())
    assert imported & ALLOWED.keys() <= allowed
