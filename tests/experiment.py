"""What tests/ablation.py, readings.py and words.py share: rows of an experiment, trained, measured, printed as tables.

A row is flags of train.py, and perhaps a patch of the model. Each is trained with each seed, a process a core, in a
folder of its own below --output; what is found there is not done again. On the demo's people every seed has a drawing
of its own, with 192 people to be scored on; no setting was chosen on them.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import clip  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
from extras import look  # noqa: E402
from util import demo, machine  # noqa: E402
from util.run import load_checkpoint  # noqa: E402

UNPATCHED = models.PromptSG
DRAWING = 1000  # seed 0 draws with seed 1000: neither the demo's people nor those of pre-training
WAYS = ("composed", "simplified", "composed queries, simplified gallery", "composed, shuffled", "simplified, shuffled")


class Patched(models.PromptSG):
    """A PromptSG that computes something else. Its checkpoints say so, and the unpatched evaluate.py refuses them."""

    supcon = staticmethod(losses.supcon_loss)

    def __init__(self, *args, patch: str = "", **kwargs):
        super().__init__(*args, **kwargs)
        self.model_args["patch"] = type(self).__name__


class Row(NamedTuple):
    name: str
    flags: str = ""
    prompt: str = "composed"
    paper: str = ""  # mAP / R-1 on Market-1501
    pretrained: str = "both"  # of CLIP's encoders: "both", "visual", "text" or "none"; the rest is random
    patch: type[models.PromptSG] | None = None

    def key(self, seed: int) -> str:
        """Of the training, which rows may share."""
        patch = self.patch.__name__ if self.patch else ""
        parts = (self.flags.replace("--", ""), self.pretrained, patch, str(seed))
        return re.sub(r"\W+", "-", " ".join(parts)).strip("-")


# ------------------------------------------------------------------------------------------------- measuring


def load_parts(args: argparse.Namespace, pretrained: str, load: Callable = models.load_clip) -> clip.CLIP:
    """CLIP with pre-trained weights for some of its encoders, and the pre-trained one's temperature in any case."""
    mixed = clip.untrained(models.BACKBONES[args.backbone], tuple(args.image_size), args.seed)
    weights = mixed.state_dict()
    for name, tensor in load(args).state_dict().items():
        encoder = "visual" if name.startswith("visual.") else "text"
        if name == "logit_scale" or pretrained in ("both", encoder):
            weights[name] = tensor
    mixed.load_state_dict(weights)
    return mixed


def text_to_picture(model: models.PromptSG, samples: list[data.Sample], v: Tensor, draw_seed: int) -> float:
    """mAP of finding drawn people by "A photo of a person with red top, blue skirt", by the cosine of T(text) and v.

    Right are the pictures of everybody whom the sentence describes.
    """
    words = [demo.describe(demo.person_of(sample.pid, draw_seed)) for sample in samples]
    own = [demo.sentence(word["top"], word["legs"]) for word in words]
    sentences = sorted(set(own))
    ids = torch.tensor([sentences.index(text) for text in own])
    text = F.normalize(model.clip.encode_text(clip.tokenize(sentences).to(v.device)), dim=1)
    cams = torch.zeros(len(ids))
    return evaluate.rank_metrics(
        text.cpu(), F.normalize(v).cpu(), torch.arange(len(sentences)), ids, cams[: len(sentences)] - 1, cams
    )["mAP"]


@torch.inference_mode()
def measure(model: models.PromptSG, dataset: data.Dataset, draw_seed: int, args: argparse.Namespace) -> dict:
    """Scores with every prompt that the model has; on drawn people, what it kept of language and where it looks."""
    prompts = ["composed", "simplified"] if model.inversion and model.interaction else ["simplified"]
    ways = {"v": lambda images: model.clip.encode_image(images).embedding}
    for prompt in prompts:
        ways[prompt] = functools.partial(model.embed, prompt=prompt)
        if model.interaction:
            ways[f"attention, {prompt}"] = functools.partial(model.attention_map, prompt=prompt)
    model.clip.encode_image = functools.lru_cache(maxsize=1)(model.clip.encode_image)  # once for all the ways
    widths = []

    def all_ways(images: Tensor) -> Tensor:
        features = [way(images).float() for way in ways.values()]
        widths[:] = [x.shape[1] for x in features]
        return torch.cat(features, dim=1)

    def found_in(samples: list[data.Sample]) -> dict[str, Tensor]:
        return dict(zip(ways, evaluate.extract(all_ways, samples, args).split(widths, dim=1)))

    samples = dataset.query + dataset.gallery
    found = found_in(samples)
    split = [len(dataset.query), len(dataset.gallery)]
    pairs = {prompt: found[prompt].split(split) for prompt in prompts}
    if len(prompts) == 2:
        pairs["composed queries, simplified gallery"] = pairs["composed"][0], pairs["simplified"][1]
    if getattr(model, "sees_its_batch", False):
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
        shuffled = found_in([samples[i] for i in order])
        pairs |= {f"{prompt}, shuffled": shuffled[prompt][order.argsort()].split(split) for prompt in prompts}
    result = {}
    for name, (query, gallery) in pairs.items():
        metrics = evaluate.metrics_of(query, gallery, dataset)
        result[name] = {metric: metrics[metric] for metric in ("mAP", "rank1")}
    if dataset.name == "synthetic":
        known = [i for i, sample in enumerate(samples) if sample.pid > 0]  # all but the distractors
        result["text to picture"] = text_to_picture(model, [samples[i] for i in known], found["v"][known], draw_seed)
        inside = look.person_shares(dataset, samples, model.clip.grid).to(args.device)
        for name in [name for name in found if name.startswith("attention")]:
            result[name] = look.inside_and_peak(found[name][:, 1:], inside)
    return result


def train_and_measure(row: Row, seed: int, args: argparse.Namespace, handed_on: list[str]) -> str:
    """Writes what `measure` finds into the row's folder, returns the scores as a line; patches modules of ours."""
    if args.device == "cpu":
        torch.set_num_threads(1)
    folder = args.output / row.key(seed)
    flags = f"--dataset {args.dataset} --backbone {args.backbone} --device {args.device} --data-root {args.root(seed)} "
    flags += f"--output {folder} --seed {seed} --precision bf16 --eval-every 0 --overwrite --cache"
    argv = [*flags.split(), *handed_on, *row.flags.split()]
    models.PromptSG = row.patch or UNPATCHED
    models.load_clip = functools.partial(load_parts, pretrained=row.pretrained)
    losses.supcon_loss = (row.patch or Patched).supcon
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train.main(argv)
        train_args = train.parse_args(argv)
        train.check_args(train_args)
        model = models.restore_model(load_checkpoint(folder / "last.pt")).to(args.device)
        dataset = data.load_dataset(args.dataset, args.root(seed))
        result = measure(model, dataset, DRAWING + seed, train_args)
    (folder / "result.json").write_text(json.dumps({**result, "handed on": handed_on}) + "\n")
    return f"{row.key(seed)}: " + json.dumps(result["composed" if "composed" in result else "simplified"])


# --------------------------------------------------------------------------------------------------- tables


def cell(values: list[float], sign: str = "") -> str:
    """Mean and standard error, in percent."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return f"{100 * statistics.mean(values):{sign}.1f}" + (f" ± {100 * error:.1f}" if len(values) > 1 else "")


def results(row: Row, args: argparse.Namespace) -> list[dict]:
    """What was measured, for each seed."""
    return [json.loads((args.output / row.key(seed) / "result.json").read_text()) for seed in args.seeds]


def print_table(title: str, rows: list[Row], args: argparse.Namespace) -> None:
    """A table of docs/miniature.md."""
    print(f"\n{title}, seeds {' '.join(map(str, args.seeds))}\n")
    print("| row | paper: mAP / R-1 | mAP | R-1 | mAP less full's | text to picture | on the person / peak |")
    print("|---|---|---|---|---|---|---|")
    reference = next((results(row, args) for row in rows if row.name == "full"), None)
    for row in rows:
        found = results(row, args)
        prompt = row.prompt if row.prompt in found[0] else "simplified"
        cells = [
            row.name,
            row.paper,
            cell([x[prompt]["mAP"] for x in found]),
            cell([x[prompt]["rank1"] for x in found]),
        ]
        less = [x[prompt]["mAP"] - y["composed"]["mAP"] for x, y in zip(found, reference or [])]
        cells.append(cell(less, "+") if less and row.name != "full" else "")
        cells.append(cell([x["text to picture"] for x in found]) if "text to picture" in found[0] else "")
        where = [x.get(f"attention, {prompt}") for x in found]
        cells.append(" / ".join(cell(list(column)) for column in zip(*where)) if where[0] else "")
        print(f"| {' | '.join(cells)} |")


def print_ways(title: str, rows: list[Row], args: argparse.Namespace) -> None:
    """mAP of each way to score, and how much less than ours scored in the same way."""
    print(f"\n{title}, seeds {' '.join(map(str, args.seeds))}: mAP, and less ours\n")
    print(f"| reading | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    ours = results(Row("ours"), args)
    for row in rows:
        found, cells = results(row, args), []
        for way in WAYS:
            values = [x[way]["mAP"] for x in found if way in x]
            less = [value - y[way.removesuffix(", shuffled")]["mAP"] for value, y in zip(values, ours)]
            cells.append(values and f"{cell(values)} ({cell(less, '+')})" or "")
        print(f"| {row.name} | {' | '.join(cells)} |")


class Arguments(argparse.Namespace):
    def root(self, seed: int) -> Path:
        """The --data-root of a seed: people drawn for it, unless another is given."""
        drawing = self.output / f"drawing-{seed}" if self.dataset == "synthetic" else Path("data")
        return self.data_root or drawing


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags of every experiment."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="synthetic", help="as train.py's (synthetic)")
    add("--backbone", default="tiny", help="as train.py's (tiny)")
    add("--data-root", type=Path, help="as train.py's (data; for synthetic, a drawing for every seed)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as train.py's")
    add("--output", type=Path, help="folder of all runs (runs/ablation-DATASET-BACKBONE)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    return parser


def train_missing(rows: list[Row], args: argparse.Namespace, handed_on: list[str]) -> None:
    """Draws, trains and measures what is not there yet, saying how it goes. Exits if what is there has other flags."""
    args.output = args.output or Path(f"runs/ablation-{args.dataset}-{args.backbone}")
    if args.dataset == "synthetic" and not args.data_root:
        for seed in args.seeds:
            if not args.root(seed).exists():
                folder = args.root(seed) / "synthetic"
                demo.draw_dataset(folder, data.MARKET_FOLDERS, train_ids=128, test_ids=192, seed=DRAWING + seed)
    jobs = {row.key(seed): (row, seed) for seed in args.seeds for row in rows}
    there = [path for key in jobs if (path := args.output / key / "result.json").exists()]
    for path in there:
        if json.loads(path.read_text())["handed on"] != handed_on:
            sys.exit(f"error: {path} was made with other flags of train.py: give another --output")
    left = [job for key, job in jobs.items() if args.output / key / "result.json" not in there]
    processes = machine.count_cores() if args.device == "cpu" else 1
    if args.device == "cpu":
        os.environ["OMP_NUM_THREADS"] = "1"  # more of them would wait for each other
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(train_and_measure, row, seed, args, handed_on) for row, seed in left]
        for number, future in enumerate(as_completed(futures), 1):
            print(f"{number}/{len(left)} {future.result()}", file=sys.stderr, flush=True)


def run(tables: dict[str, list[Row]], description: str, print_table: Callable = print_table) -> None:
    """The script of the ablation and of the readings: trains what is missing, and prints the tables."""
    parser = make_parser(description)
    add = parser.add_argument
    add("--tables", nargs="+", choices=tables, default=list(tables), help="which tables (all)")
    add("--rows", nargs="+", help="of these, and what they are compared with; other flags go to train.py")
    args, handed_on = parser.parse_known_args(namespace=Arguments())
    kept = args.rows and (*args.rows, "full", "ours")
    tables = {name: [row for row in tables[name] if not kept or row.name in kept] for name in args.tables}
    train_missing([row for rows in tables.values() for row in rows], args, handed_on)
    for title, rows in tables.items():
        print_table(title, rows, args)
