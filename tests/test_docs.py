"""README and docs: links, names and flags exist, commands parse, Python blocks run, excerpts match the source."""

import argparse
import importlib
import re
import runpy
import shlex
import shutil
import sys

import pytest
from conftest import ROOT, output_of

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
PLACEHOLDER = re.compile(r"\b(DATASET|BACKBONE|FLAGS|NAME|PROMPT)\b")
EXCERPT = re.compile(r"^([\w/]+\.py): [^\n]*\n\n```python\n(.*?)```", re.MULTILINE | re.DOTALL)
OTHER_TOOLS = {"--help", "--nproc_per_node", "--shm-size", "--index-url"}  # argparse's, torchrun's, docker's, pip's
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands() -> list[str]:
    """Return all commands that run our scripts. Placeholders are replaced by each row of the table next to them."""
    found = []
    for section in re.split(r"^## ", TEXT, flags=re.MULTILINE):
        code = re.findall(r"`([^`\n]+)`", section) + re.findall(r"^    (\S.*?)(?:  .*)?$", section, re.MULTILINE)
        code = [part.strip() for line in code for part in line.split("&&")]
        code = [part for part in code if re.match(r"(python|torchrun) .*(\.py|extras\.\w+|demo\.\w+)", part)]
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        rows = [row for row in rows if len(row) == len(rows[0])]  # of the first table
        for command in code:
            if not PLACEHOLDER.search(command):
                found.append(command)
                continue
            for row in rows[1:]:
                cells = ["" if cell == "none" else cell.strip("`") for cell in row]
                values = dict(zip([name.strip("`") for name in rows[0]], cells, strict=True))
                found.append(PLACEHOLDER.sub(lambda match, values=values: values[match[0]], command))
    return sorted(set(found))


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, tmp_path, monkeypatch):
    words = shlex.split(command)
    position = next(i for i, word in enumerate(words) if re.match(r".*\.py$|(extras|demo)\.\w+$", word))
    script, flags = words[position], words[position + 1 :]
    path = ROOT / (script if script.endswith(".py") else script.replace(".", "/") + ".py")
    assert path.is_file()
    if "pytest" in words or not flags:
        return
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    monkeypatch.syspath_prepend(path.parent)
    if "def parse_args(" in path.read_text():
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args(flags)
        return
    parse = argparse.ArgumentParser.parse_known_args  # parse_args calls it, too

    def parse_and_stop(parser, *args, **options):
        _, unknown = parse(parser, *args, **options)
        raise KeyError(unknown)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
    with pytest.raises(KeyError, match=r"\[\]"):
        runpy.run_path(str(path), run_name="__main__")


def test_flags_and_names_exist():
    sources = [path for path in ROOT.glob("**/*.py") if path.parent.name != "tests"]
    known = {flag for path in sources for flag in re.findall(r'"(--[a-z][\w-]*)"', path.read_text())}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) <= known | OTHER_TOOLS
    for row in ["--baseline", "--without-i2t", "--without-t2i", "--without-interaction", "--train-prompt", "--blocks"]:
        assert any(row in command for command in commands()), f"no command for the row with {row}"
    for name in set(re.findall(r"`((?:clip|data|evaluate|losses|model|train)\.(?!py\b|safetensors)\w[\w.]*)`", TEXT)):
        thing = importlib.import_module(name.split(".")[0])
        for attribute in name.split(".")[1:]:
            assert hasattr(thing, attribute), f"a page names {name}, which does not exist"
            thing = getattr(thing, attribute)
    for path in re.findall(r"`((?:tests|util|extras|experiments|demo)/[\w/]+\.\w+)`", TEXT):
        assert (ROOT / path).exists(), path


@by_name
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, target


@by_name
def test_excerpts_match_the_source(page):
    for file, excerpt in EXCERPT.findall(page.read_text()):
        source, lines = ([line.strip() for line in text.splitlines()] for text in ((ROOT / file).read_text(), excerpt))
        assert any(source[i : i + len(lines)] == lines for i in range(len(source))), f"{file}: {excerpt}"


@by_name
def test_python_blocks_run(page, trained, tmp_path, monkeypatch):
    """In a directory with a run of the demo and the images that the page names."""
    blocks = re.findall(r"```python\n(.*?)```", EXCERPT.sub("", page.read_text()), re.DOTALL)
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "runs/synthetic-tiny", tmp_path / "runs/msmt17-vit")
    queries = tmp_path / "data/synthetic/query"
    for name in re.findall(r'"([\w-]+\.jpg)"', "".join(blocks)):
        for folder in (tmp_path, queries):
            shutil.copy(next(queries.iterdir()), folder / name)
    if "model.pt2" in "".join(blocks):
        output_of("extras/export.py", "--checkpoint runs/synthetic-tiny/last.pt --output model.pt2", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(block for block in blocks if not block.startswith("# onnx")), page.name, "exec"), {})
