"""Shared code of ablation.py and readings.py: train rows, save their results, print tables.

Each training appends a line to experiments/results/DATASET-BACKBONE.jsonl and is not repeated. To train it again,
delete its line. Several processes can share the work: give each one different --seeds.
"""

import argparse
import functools
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import clip  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import losses  # noqa: E402
import model as models  # noqa: E402
import train  # noqa: E402
from demo import draw, tiny_clip  # noqa: E402
from util import checkpoint  # noqa: E402
from util.device import default_workers, setup  # noqa: E402

# Schedule on the demo's drawings. It does not depend on the demo's defaults, so changing those changes no table.
# Other datasets use train.py's defaults, from section 5.1.
MINIATURE = "--epochs 16 --decay-every 12 --lr-visual 2e-4 --lr-new 2e-3 --image-size 128 64 --batch-ids 16"
TRAIN_PEOPLE, TEST_PEOPLE = 128, 192
DRAWING = 1000  # training seed 0 draws with seed 1000: other people than in the demo and in the pre-training
TEST_BATCH = 64  # has an effect only if the blocks attend across the batch; 64 as in IADT


class Variant(models.PromptSG):
    """Base class of the variants of PromptSG. evaluate.py refuses their checkpoints."""

    def __init__(self, *args, variant: str = "", **kwargs):
        super().__init__(*args, **kwargs)
        self.model_args["variant"] = type(self).__name__


class Row(NamedTuple):
    """A row of a table. Rows that differ only in name, prompt or paper share one training."""

    name: str
    flags: str = ""  # of train.py
    model: type[models.PromptSG] = models.PromptSG
    supcon: Callable = losses.supcon_loss
    pretrained: str = "both"  # CLIP's encoders with pre-trained weights: "both", "visual", "text", "none"
    prompt: str = "composed"  # at test time
    paper: str = ""  # mAP on Market-1501 in the paper

    def training(self, more_flags: str = "") -> str:
        """Return the name of the row's training."""
        parts = [self.model.__name__] if self.model is not models.PromptSG else []
        parts += [self.supcon.__name__] if self.supcon is not losses.supcon_loss else []
        parts += [f"pretrained={self.pretrained}"] if self.pretrained != "both" else []
        return " ".join([*parts, *self.flags.split(), *more_flags.split()]) or "ours"


# ------------------------------------------------------------------------------------------- one training


def partly_pretrained(args: argparse.Namespace, pretrained: str) -> clip.CLIP:
    """Return a CLIP with one or no pre-trained encoder. Its temperature is always pre-trained."""
    name = train.CLIP_NAMES[args.backbone]
    whole = tiny_clip.load(args.image_size) if name == "tiny" else clip.load(args.clip_weights or name, args.image_size)
    mixed = clip.untrained(name, args.image_size, args.seed)
    weights = mixed.state_dict()
    for name, tensor in whole.state_dict().items():
        if name == "logit_scale" or pretrained == ("visual" if name.startswith("visual.") else "text"):
            weights[name] = tensor
    mixed.load_state_dict(weights)
    return mixed.eval()


def train_row(row: Row, seed: int, args: argparse.Namespace) -> dict:
    """Train a row with train.py and evaluate it. An interrupted training is resumed."""
    name = re.sub(r"[^\w.]+", "-", f"{row.training(args.more_flags)} {seed}").strip("-")
    folder = Path(args.runs, f"{args.dataset}-{args.backbone}", name)
    flags = f"--dataset {args.dataset} --backbone {args.backbone} --seed {seed} --eval-every 0 --resume"
    root = args.data_root or "data"
    if args.dataset == "synthetic":
        root = Path(args.runs, f"drawing-{seed}")
        draw.draw_dataset(root / "synthetic", TRAIN_PEOPLE, TEST_PEOPLE, seed=DRAWING + seed)
        flags = f"{MINIATURE} {flags}"
    argv = f"{flags} {args.more_flags} {row.flags}".split() + ["--data-root", str(root), "--output", str(folder)]
    train_args = train.parse_args(argv)
    with ExitStack() as stack:
        for module in (train, models):
            stack.enter_context(mock.patch.object(module, "PromptSG", row.model))
        stack.enter_context(mock.patch.object(losses, "supcon_loss", row.supcon))
        if row.pretrained != "both":
            mixed = partly_pretrained(train_args, row.pretrained)
            for module in (clip, tiny_clip):
                stack.enter_context(mock.patch.object(module, "load", lambda *_: mixed))
        train.main(argv)
        model = models.restore_model(checkpoint.load(folder / "last.pt")).to(setup(train_args.device))
    result = measure(model, data.load_dataset(args.dataset, root), DRAWING + seed)
    if args.dataset == "synthetic":
        shutil.rmtree(folder)
    return result


# ---------------------------------------------------------------------------------------------- measuring


def accuracy(query: torch.Tensor, gallery: torch.Tensor, dataset: data.Dataset) -> dict[str, float]:
    """Return mAP and Rank-1 of features (Q, D) and (G, D)."""
    metrics = evaluate.rank_dataset(dataset, query, gallery)
    return {name: round(metrics[name], 5) for name in ("mAP", "rank1")}


def text_to_image(model: models.PromptSG, samples: list[data.Sample], v: torch.Tensor, draw_seed: int) -> float:
    """Return the mAP of text-to-image retrieval with sentences like "A photo of a person with red top, blue skirt".

    Correct images are those of all people whom the sentence describes. v (N, D): L2-normalised, as T(text).
    """
    words = [draw.describe(draw.person_of(sample.pid, draw_seed)) for sample in samples]
    own = [draw.caption(word["top"], word["legs"]) for word in words]
    sentences = sorted(set(own))
    ids = torch.tensor([sentences.index(sentence) for sentence in own])
    text = model.encode_text(sentences).cpu()  # (number of sentences, D)
    cams = torch.zeros(len(ids))
    queries = torch.arange(len(sentences))
    return round(evaluate.rank_metrics(text, v, queries, ids, cams[: len(sentences)] - 1, cams)["mAP"], 5)


@torch.inference_mode()
def measure(model: models.PromptSG, dataset: data.Dataset, draw_seed: int) -> dict:
    """Evaluate a model with all its prompts and with CLIP's own v; on drawings, also text-to-image retrieval."""
    samples = dataset.query + dataset.gallery
    paths = [sample.path for sample in samples]
    split = [len(dataset.query), len(dataset.gallery)]
    workers = default_workers(next(model.parameters()).device)
    extract = functools.partial(evaluate.extract, model, batch_size=TEST_BATCH, workers=workers)
    prompts = ["none", "simplified", "composed"] if model.inversion and model.interaction else ["none", "simplified"]
    features = {prompt: extract(paths, prompt) for prompt in prompts}  # each (N, D)
    result = {prompt: accuracy(*features[prompt].split(split), dataset) for prompt in prompts}
    if "composed" in prompts:
        mixed = features["composed"].split(split)[0], features["simplified"].split(split)[1]
        result["composed queries, simplified gallery"] = accuracy(*mixed, dataset)

    # Does a feature depend on its batch? Compare one image alone, and if it does, all images in another order.
    alone, among = extract(paths[:1], prompts[-1])[0], features[prompts[-1]][0]  # (D,)
    result["alone and among others"] = round(F.cosine_similarity(alone, among, dim=0).item(), 4)
    if result["alone and among others"] < 0.999:
        for name, feature in (("alone", alone), (f"among {TEST_BATCH - 1} others", among)):
            print(f"feature of {paths[0].name} {name}: {' '.join(f'{x:+.4f}' for x in feature[:6].tolist())} ...")
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(0))
        for prompt in prompts[1:]:
            shuffled = extract([paths[i] for i in order], prompt)[order.argsort()].split(split)
            result[f"{prompt}, shuffled"] = accuracy(*shuffled, dataset)
            print(f"{prompt} prompt: sorted order {result[prompt]}, shuffled {result[f'{prompt}, shuffled']}")
    if dataset.name == "synthetic":
        known = [i for i, sample in enumerate(samples) if sample.pid > 0]  # without distractors
        result["text to image"] = text_to_image(model, [samples[i] for i in known], features["none"][known], draw_seed)
    return result


# ------------------------------------------------------------------------------------------------- tables


def spread(values: list[float], sign: str = "") -> str:
    """Format mean and standard error of fractions in percent. "n.s.": a difference below two standard errors."""
    mean = 100 * statistics.mean(values)
    if len(values) == 1:
        return f"{mean:{sign}.1f}"
    error = 100 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:{sign}.1f} ± {error:.1f}" + (" n.s." if sign and abs(mean) < 2 * error else "")


def difference(values: list[float], reference: list[float]) -> str:
    """Format the mean difference between results of the same seed."""
    return spread([value - other for value, other in zip(values, reference, strict=True)], "+")


def run(tables: dict[str, list[Row]], description: str, print_table: Callable) -> None:
    """Train the rows that have no result yet, then print the tables with print_table(title, rows, found).

    found(row) returns the row's results, one for each seed.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--dataset", default="synthetic", help="as train.py's (default: synthetic)")
    add("--backbone", default="tiny", help="as train.py's (default: tiny)")
    add("--data-root", help="as train.py's (default: data; synthetic: drawn for each seed)")
    add("--runs", default="runs/experiments", help="directory of drawings and checkpoints (default: runs/experiments)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="random seeds (default: 0 1 2)")
    add("--tables", nargs="+", choices=tables, default=list(tables), help="tables to make (default: all)")
    add("--rows", nargs="+", help="rows to make, besides the reference (default: all); other flags go to train.py")
    args, more_flags = parser.parse_known_args()
    args.more_flags = " ".join(more_flags)
    names = [row.name for title in args.tables for row in tables[title]]
    if unknown := set(args.rows or ()) - set(names):
        parser.error(f"no row {'; '.join(unknown)}: the rows of these tables are {'; '.join(names)}")
    tables = {
        title: [row for i, row in enumerate(tables[title]) if not args.rows or i == 0 or row.name in args.rows]
        for title in args.tables
    }

    results = ROOT / "experiments" / "results" / f"{args.dataset}-{args.backbone}.jsonl"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(line["training"], line["seed"]): line for line in lines}
    rows = {row.training(args.more_flags): row for table in tables.values() for row in table}
    left = [(name, seed) for name in rows for seed in args.seeds if (name, seed) not in done]
    minutes = [line["minutes"] for line in lines]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    for number, (name, seed) in enumerate(left):
        length = f"about {(len(left) - number) * statistics.median(minutes):.0f} min" if minutes else "unknown length"
        print(f"== {len(left) - number} trainings left ({length}), now: {name}, seed {seed}", flush=True)
        start = time.monotonic()
        result = train_row(rows[name], seed, args)
        minutes.append(round((time.monotonic() - start) / 60, 2))
        line = {"training": name, "seed": seed, **result, "minutes": minutes[-1], "commit": commit.strip()}
        line |= {"torch": str(torch.__version__), "device": str(setup(None))}
        done[name, seed] = line
        results.parent.mkdir(exist_ok=True)
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def found(row: Row) -> list[dict]:
        return [done[row.training(args.more_flags), seed] for seed in args.seeds]

    for title, table in tables.items():
        print_table(f"{title}; seeds {' '.join(map(str, args.seeds))}", table, found)
