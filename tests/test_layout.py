"""Imports run one way: util <- clip, losses <- data, model <- evaluate <- train <- extras, experiments."""

import ast

from conftest import ROOT

ALLOWED = {"util": "util", "losses": "util", "clip": "util", "data": "util clip", "model": "util clip"}
ALLOWED |= {"demo": "util clip losses demo", "evaluate": "util clip data model"}
ALLOWED["extras"] = ALLOWED["evaluate"] + " losses evaluate train extras"
ALLOWED["look.py"] = ALLOWED["extras"] + " demo"
ALLOWED["experiments"] = ALLOWED["look.py"] + " experiments"
ALLOWED["train"] = ALLOWED["evaluate"] + " losses evaluate demo"


def test_imports():
    for folder in (ROOT, *(ROOT / name for name in ("util", "demo", "extras", "experiments"))):
        for path in folder.glob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            modules |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            name = path.stem if folder == ROOT else folder.name
            allowed = ALLOWED.get(path.name, ALLOWED[name]).split()
            assert {module.split(".")[0] for module in modules} & ALLOWED.keys() <= set(allowed), path
