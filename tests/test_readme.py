"""README and docs say what the code does: commands, names, files, links, defaults; a bare train.py is section 5.1."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch import nn

import evaluate
import model
import train

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
README = (ROOT / "README.md").read_text()
SCRIPTS = {"train.py": train, "evaluate.py": evaluate}
SCRIPTS |= {
    f"extras.{name}": importlib.import_module(f"extras.{name}")
    for name in ("look", "search", "export", "pretrain", "gate")
}
PLACEHOLDER = re.compile(r"\b(DATASET|BACKBONE|FLAGS|NAME|PROMPT)\b")


def commands() -> list[str]:
    """Every run of a script of ours, in code blocks and in tables; patterns filled in with each row of their table."""
    code = re.findall(r"`([^`\n]+)`", TEXT) + re.findall(r"^    (\S.*)$", TEXT, re.MULTILINE)
    parts = [part.strip() for line in code for part in line.split("&&")]
    found = {part for part in parts if re.match(r"(python|torchrun)\b.*(\.py|extras\.\w+)\b", part)}
    return sorted({part for part in found if not PLACEHOLDER.search(part)} | set(filled_in()))


def filled_in() -> list[str]:
    """The patterns of docs/reproduce.md, with the values of each row of the table below them."""
    found = []
    for section in (ROOT / "docs/reproduce.md").read_text().split("\n## "):
        patterns = [line for line in re.findall(r"^    (\S.*)$", section, re.MULTILINE) if PLACEHOLDER.search(line)]
        rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
        for row in rows[1:] if patterns else []:
            cells = ["" if cell == "none" else cell.strip("`") for cell in row]
            values = dict(zip([name.strip("`") for name in rows[0]], cells, strict=True))
            found += [PLACEHOLDER.sub(lambda match, values=values: values[match[0]], pattern) for pattern in patterns]
    return found


@pytest.mark.parametrize("command", commands())
def test_commands_parse(command, tmp_path, monkeypatch):
    """Against the scripts' own parsers and checks."""
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py") or word.startswith("extras."))
    flags = words[words.index(script) + 1 :]
    if script.startswith("tests/"):
        assert (ROOT / script).is_file()
        assert "pytest" in words or all(flag in (ROOT / script).read_text() for flag in flags)
    elif words[1:] != ["-m", "extras.gate"]:  # named in a sentence
        monkeypatch.chdir(tmp_path)
        args = SCRIPTS[script].parse_args(flags)
        getattr(SCRIPTS[script], "check_args", lambda args: None)(args)


def test_there_are_commands_for_every_row_of_the_tables():
    assert len(filled_in()) >= 16 + 10 + 10 + 2
    for flag in ("--baseline", "--without-i2t", "--without-t2i", "--without-interaction", "--train-prompt", "--blocks"):
        assert any(flag in command for command in commands())


def test_flags_exist():
    actions = [action for script in SCRIPTS.values() for action in parser_of(script.parse_args)._actions]
    known = {option for action in actions for option in action.option_strings}
    known |= {"--nproc_per_node", "--shm-size", "--quick", "--only"}  # torchrun's, docker's, tests/benchmark.py's
    known |= {"--seeds", "--tables"}  # tests/ablation.py's
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) <= known


def test_help_states_the_defaults():
    """In brackets, beside the flag."""
    for action in parser_of(train.parse_args)._actions[1:]:
        stated = (action.help % {"default": action.default}).split("(")[-1]
        for value in action.default if isinstance(action.default, list) else [action.default]:
            numbers = [float(number) for number in re.findall(r"\d[\d.]*(?:e-\d+)?", stated)]
            if value is not None and not isinstance(value, bool):
                assert value in numbers if isinstance(value, int | float) else stated.startswith(str(value)), (
                    action.dest
                )


def parser_of(parse_args) -> argparse.ArgumentParser:
    """The parser that a script builds, caught when it is about to parse."""
    found, parse = [], argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda self, argv: found.append(self) or parse(self, argv)
    try:
        needed = {"extras.search": ["--images", "."], "extras.gate": ["x.pth", "--dataset", "msmt17"]}
        parse_args(needed.get(parse_args.__module__, []))
    finally:
        argparse.ArgumentParser.parse_args = parse
    return found[0]


def test_files_and_functions_exist():
    names = set(re.findall(r"`((?:clip|model|losses|data|train|evaluate)\.\w[\w.]*)`", TEXT))
    files = {name for name in names if name.endswith(".py")}
    assert len(names - files) > 20
    for name in names - files:
        module, *attributes = name.split(".")
        thing = importlib.import_module(module)
        for attribute in attributes:
            if not hasattr(thing, attribute):
                pytest.fail(f"a page names {name}, which does not exist")
            thing = getattr(thing, attribute)
    for path in files | set(re.findall(r"`((?:tests|util|extras)/[\w.]*)`", TEXT)):
        assert (ROOT / path).exists(), path


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = [line.lstrip("# ") for line in page.read_text().splitlines() if re.match("#+ ", line)]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file() and (not anchor or anchor in anchors(file)), target


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_a_page_opens_with_whom_it_is_for(page):
    assert re.match(r"# .+\n\nThis page is for [^.]+[.:]", page.read_text())
    assert f"](docs/{page.name})" in README


def test_the_readme_is_short_and_no_line_is_long():
    assert len(README.splitlines()) <= 200
    assert not [line for line in TEXT.splitlines() if len(line) > 120 and not line.startswith(("|", "    "))]


def test_every_equation_figure_and_table_is_named():
    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    for number in range(1, 11):
        assert re.search(rf"Eqs?\. (\d+, )*{number}\b", table), f"Eq. {number}"
    for number in (1, 2, 3, 4):
        assert re.search(rf"Figures? (\d+, )*{number}\b", table), f"Figure {number}"
    assert "Table 1" in table and "Tables 2 to 6" in table


def test_stated_defaults_are_the_codes():
    rows = re.findall(r"^\| .* \| `--([\w-]+)` \| ([\w. -]+) \|$", TEXT, re.MULTILINE)
    assert len(rows) == 10
    args = train.parse_args([])
    for flag, stated in rows:
        value = getattr(args, flag.replace("-", "_"))
        words = stated.split()
        found = (
            [str(value)] if isinstance(value, str) else [float(part) for part in (value if len(words) > 1 else [value])]
        )
        assert found == [type(part)(word) for part, word in zip(found, words, strict=True)], flag


# ---------------------------------------------------------------------------------------------- section 5.1


def test_a_bare_train_py_is_section_5_1(make_model, tmp_path):
    """Value by value, from the flags to what the optimizer does in sixty epochs."""
    args = train.parse_args([])
    assert args.backbone == "vit"  # "ResNet-50 and ViT-B/16"
    assert model.BACKBONES["vit"] == "ViT-B/16" and model.BACKBONES["resnet"] == "RN50"
    assert (
        args.batch_ids == 16 and args.batch_images == 4
    )  # "64, encompassing 16 identities with 4 images per identity"
    assert args.image_size == [256, 128]
    assert args.epochs == 60
    assert args.supcon_weight == 0.5  # lambda of Eq. 10
    assert args.composed_prompt == "A photo of a S* person"
    assert args.train_prompt == "composed" and args.blocks == 2  # "two transformer blocks"
    rows = ("baseline", "without_i2t", "without_t2i", "without_interaction")
    assert not any(getattr(args, row) for row in rows)

    args.device, args.precision, args.output, promptsg = "cpu", "fp32", tmp_path, make_model()
    run = train.Run(promptsg, args)
    assert type(run.optimizer) is torch.optim.Adam
    rates = []
    for _ in range(args.epochs):
        rates.append(run.learning_rates())
        run.optimizer.step()
        run.scheduler.step()
    for epochs, factor in ((rates[:20], 1), (rates[20:40], 0.1), (rates[40:], 0.01)):
        for visual, new in epochs:
            assert visual == pytest.approx(5e-6 * factor) and new == pytest.approx(5e-5 * factor)
    trained = [{id(p) for p in group["params"]} for group in run.optimizer.param_groups]
    assert trained[0] == {id(p) for p in promptsg.clip.visual.parameters()}
    for name, parameter in promptsg.named_parameters():
        frozen = name.startswith("clip.") and not name.startswith("clip.visual.") or name == "bnneck.bias"
        assert parameter.requires_grad != frozen, name
        assert frozen or id(parameter) in trained[0] | trained[1], name

    layers = [type(layer) for layer in promptsg.inversion]
    assert layers == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.BatchNorm1d]  # "three-layered", BN last
    assert [layer.out_features for layer in promptsg.inversion if isinstance(layer, nn.Linear)][:2] == [512, 512]


def test_choices_of_ours_are_as_the_pages_say():
    """The rest of the defaults, which the table of choices states."""
    args = train.parse_args([])
    assert (args.label_smoothing, args.margin, args.weight_decay, args.temperature) == (0.1, 0.3, 1e-4, None)
    for words in ("label smoothing 0.1", "margin 0.3", "weight decay 1e-4", "tau is CLIP's own, frozen: 0.01"):
        assert words in TEXT


def test_no_picture_is_large():
    """They are of drawn people, and small."""
    for path in Path(ROOT / "docs").iterdir():
        assert path.suffix == ".md" or path.suffix == ".png" and path.stat().st_size < 400_000, path
