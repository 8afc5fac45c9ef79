"""Measure speed and memory: python experiments/benchmark.py [--only TOPIC ...] [--quick] [--json FILE]

step        a training step, eager and compiled
inference   Table 5: visual encoder alone, simplified and composed prompt
input       images per second of the training loader
ranking     ranking and re-ranking at the size of Market-1501 and MSMT17
counted     FLOPs and bytes, counted without a device; Table 6's ratio to CLIP-ReID

No data and no weights are needed. Seconds are medians. Compared variants run in alternation, so that a busy machine
slows them alike. GiB is the peak above the memory in use before: torch's on CUDA, resident memory on a CPU.
"""

import argparse
import gc
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from model import Output, PromptSG  # noqa: E402
from util.device import PRECISIONS, autocast, default_precision, one_line, run_script, setup, show_progress  # noqa: E402
from util.rerank import k_reciprocal  # noqa: E402

SIZE = (256, 128)
# Table 5: the prompt for `embed`, and images per second in the paper, relative to the visual encoder.
VARIANTS = {"visual encoder": ("none", 1.0), "simplified": ("simplified", 0.88), "composed": ("composed", 0.48)}
# Queries, gallery images, identities.
RANKING_SIZES = {"Market-1501": (3368, 15913, 751), "MSMT17": (11659, 82161, 3060)}
# Epochs of stage 1 and stage 2, from CLIP-ReID's configurations.
CLIP_REID_EPOCHS = {"ViT-B/16": (120, 60), "RN50": (60, 120)}


# ------------------------------------------------------------------------------------------------ measuring


def peak_gib(device: torch.device, reset: bool = False) -> float:
    """Return the peak of memory since the last reset; with `reset`, the memory in use now. NaN if it is unknown."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    process = Path("/proc/self")
    if not (process / "clear_refs").exists():  # not Linux
        return math.nan
    if reset:
        (process / "clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", (process / "status").read_text())[1]) / 2**20


def measure(variants: dict[object, Callable], turns: int, device: torch.device) -> dict[object, dict]:
    """Call each function twice to warm up, then `turns` times in alternation. With 0 turns, measure a single call.

    Returns for each variant "GiB", "seconds" (the median) and "first call", or "failed" with the reason.
    """
    results, times = {name: {} for name in variants}, {name: [] for name in variants}

    def call(name: object) -> None:
        start = time.perf_counter()
        try:
            variants[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
        except Exception as error:  # out of memory or a failing compiler: the other variants continue
            results[name] = {"failed": f"{type(error).__name__}: {one_line(error)}"}
            del times[name]

    for name in variants:
        gc.collect()
        before = peak_gib(device, reset=True)
        for _ in range(2 if turns else 1):  # twice, because Adam's state exists from the second step on
            if name in times:
                call(name)
        results[name]["GiB"] = peak_gib(device) - before
    for turn in range(turns):
        for name in list(times):
            call(name)
        show_progress(turn + 1, turns, "turns")
    for name, seconds in times.items():
        results[name] |= {"seconds": statistics.median(seconds[2:] or seconds), "first call": seconds[0]}
    return results


def new_model(backbone: str, device: torch.device) -> PromptSG:
    """Return a model with random weights and the classifier of Market-1501."""
    torch.manual_seed(0)
    return PromptSG(clip.untrained(backbone, SIZE), 751).to(device, memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------------- topics


def compute_loss(output: Output, labels: Tensor, temperature: float) -> Tensor:
    """Return the loss of Eq. 10 with the defaults of train.py."""
    triplet = sum(losses.triplet_loss(x, labels) for x in output.triplet_features)
    supcon = losses.supcon_loss(output.image, output.text, labels, temperature)
    return triplet + losses.identity_loss(output.logits, labels) + 0.5 * supcon


def train_steps(
    backbone: str, precision: str, batch: int, device: torch.device, compiled: bool = False
) -> Iterator[None]:
    """Build a model, then run one training step for each `next`.

    This repeats the step of train.py, which is inside `main`, without the log. Keep the two equal.
    """
    args = train.parse_args([])
    model = new_model(backbone, device).train()
    groups = model.parameter_groups(args.lr_visual, args.lr_new)
    optimizer = torch.optim.Adam(groups, weight_decay=args.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    temperature, forward = model.temperature, torch.compile(model) if compiled else model
    loaded = torch.randint(0, 256, (batch, 3, *SIZE), dtype=torch.uint8), torch.arange(batch) // args.batch_images
    if device.type == "cuda":
        loaded = [x.pin_memory() for x in loaded]
    while True:
        images, labels = (x.to(device, non_blocking=True) for x in loaded)
        images = clip.normalize(images)
        with autocast(device, precision):
            output = forward(images)
        loss = compute_loss(output, labels, temperature)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield


def step(device: torch.device, quick: bool) -> Iterator[dict]:
    batch = 64 if device.type == "cuda" else 8
    for backbone in ("ViT-B/16",) if quick else ("ViT-B/16", "RN50"):
        for precision in (default_precision(device),) if quick else PRECISIONS:
            compiled = {"eager": False, "compiled": True}
            steps = {name: train_steps(backbone, precision, batch, device, compiled[name]) for name in compiled}
            results = measure({name: partial(next, steps[name]) for name in steps}, 5 if quick else 15, device)
            for name, result in results.items():
                yield {"backbone": backbone, "precision": precision, "batch": batch, "variant": name, **result}
            torch._dynamo.reset()


@torch.inference_mode()
def inference(device: torch.device, quick: bool) -> Iterator[dict]:
    """In fp32, as evaluation computes; on CUDA also in bf16."""
    for backbone in ("ViT-B/16",) if quick else ("ViT-B/16", "RN50"):
        model = new_model(backbone, device).eval()

        def embed(images: Tensor, prompt: str, precision: str, model: PromptSG = model) -> None:
            with autocast(device, precision):
                model.embed(images, prompt)

        for precision in ("fp32", "bf16") if device.type == "cuda" else ("fp32",):
            for batch in (1, 8) if quick else (1, 32, 128):
                images = torch.randn(batch, 3, *SIZE, device=device)
                calls = {name: partial(embed, images, prompt, precision) for name, (prompt, _) in VARIANTS.items()}
                results = measure(calls, 5 if quick else 9, device)
                encoder = results["visual encoder"].get("seconds", math.nan)
                for name, result in results.items():
                    row = {"backbone": backbone, "precision": precision, "batch": batch, "variant": name, **result}
                    yield row | {"ours": encoder / result.get("seconds", math.nan), "paper": VARIANTS[name][1]}


def load_epochs(samples: list[data.Sample], processes: int, device: torch.device) -> Iterator[None]:
    """Build a training loader, then load one epoch for each `next`."""
    sampler = data.PKSampler([sample.pid for sample in samples])
    loader = data.train_loader(samples, sampler, SIZE, processes, pin_memory=device.type == "cuda")
    while True:
        for images, _ in loader:
            images.to(device, non_blocking=True)
        yield


def loading(device: torch.device, quick: bool) -> Iterator[dict]:
    """1,024 JPEGs of 64x128 pixels, with the augmentation of training."""
    with tempfile.TemporaryDirectory() as folder:
        samples = [data.Sample(Path(folder, f"{number}.jpg"), number // 4, 1) for number in range(1024)]
        rng = np.random.default_rng(0)
        for sample in samples:
            coarse = Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8))
            coarse.resize((64, 128), Image.Resampling.BICUBIC).save(sample.path, quality=95)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        counts = [count for count in ((1, 4, 8) if quick else (0, 1, 2, 4, 8, 16)) if count <= cores]
        epochs = {count: partial(next, load_epochs(samples, count, device)) for count in counts}
        for count, result in measure(epochs, 3 if quick else 7, device).items():
            speed = len(samples) / result.get("seconds", math.nan)
            yield {"processes": count, "cores": cores, "images/s": speed, **result}


def ranking(device: torch.device, quick: bool) -> Iterator[dict]:
    """Random features around random centres. No method can avoid the matrix product."""
    for size, (Q, G, identities) in list(RANKING_SIZES.items())[: 1 if quick else None]:
        rng = torch.Generator().manual_seed(0)
        ids = [torch.randint(1, identities, (count,), generator=rng) for count in (Q, G)]
        cams = [torch.randint(1, 16, (count,), generator=rng) for count in (Q, G)]
        centres = torch.randn(identities, 512, generator=rng)
        features = [centres[i] + 2.2 * torch.randn(len(i), 512, generator=rng) for i in ids]
        query, gallery, *labels = (x.to(device) for x in (*(F.normalize(x, dim=1) for x in features), *ids, *cams))

        def multiply(query: Tensor = query, gallery: Tensor = gallery) -> None:
            for part in query.split(400):
                part @ gallery.T

        rank = partial(evaluate.rank_metrics, query, gallery, *labels)
        variants = {"matrix product": multiply, "ranking": rank}
        variants["re-ranking"] = lambda rank=rank, query=query, gallery=gallery: rank(k_reciprocal(query, gallery))
        for name, function in variants.items():  # one at a time, so that each row is written as soon as it is known
            result = measure({name: function}, 3 if size == "Market-1501" else 0, device)[name]
            yield {"size": size, "queries": Q, "gallery": G, "variant": name, **result}


# -------------------------------------------------------------------------------------------------- counted


def count_gflop(work: Callable[[], object]) -> float:
    """Count with fake tensors. torch's counter skips the CPU's attention kernel, so attention is written out."""
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter:
        work()
    return counter.get_total_flops() / 1e9


def count_kept_gib(model: PromptSG, dtype: torch.dtype) -> float:
    """Count what the forward pass of a batch of 64 keeps for the backward pass, without weights; fake tensors."""
    weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(torch.empty(64, 3, *SIZE))
        gib = sum(size for storage, size in kept.items() if storage not in weights) / 2**30
    del output  # until here, no storage is reused
    return gib


def counted(device: torch.device, quick: bool) -> Iterator[dict]:
    """GFLOP of an image, GiB of a batch of 64, and GFLOP of an image in a whole training (Table 6)."""
    for backbone, (epochs_1, epochs_2) in CLIP_REID_EPOCHS.items():
        model = new_model(backbone, torch.device("cpu")).train()
        ours = count_gflop(partial(train_promptsg, model)) / 64
        stage_1, stage_2 = count_gflop(partial(train_prompt, model)), count_gflop(partial(train_encoder, model)) / 64
        theirs = epochs_1 * stage_1 + epochs_2 * stage_2
        state = sum(4 * p.numel() * (4 if p.requires_grad else 1) for p in model.parameters())
        row = {"backbone": backbone, "GFLOP of training": ours}
        row |= {f"GiB kept, {name}": count_kept_gib(model, PRECISIONS[name]) for name in ("bf16", "fp32")}
        row["GiB of weights, gradients, Adam"] = state / 2**30
        model.eval()
        for name, (prompt, _) in VARIANTS.items():
            row[f"GFLOP, {name}"] = count_gflop(partial(embed_batch, model, prompt)) / 64
        yield row | {"60 epochs": 60 * ours, "CLIP-ReID": theirs, "ratio": 60 * ours / theirs}


def train_promptsg(model: PromptSG) -> None:
    compute_loss(model(torch.empty(64, 3, *SIZE)), torch.arange(64) // 4, temperature=0.01).backward()


def train_prompt(model: PromptSG) -> None:
    """Stage 1 of CLIP-ReID for one image: through the frozen text encoder, with cached image features."""
    words = torch.zeros(1, 77, 512, requires_grad=True)
    model.clip.encode_embeddings(words, torch.tensor([8])).sum().backward()


def train_encoder(model: PromptSG) -> None:
    """Stage 2 of CLIP-ReID."""
    model.clip.encode_image(torch.empty(64, 3, *SIZE)).embedding.sum().backward()


@torch.no_grad()
def embed_batch(model: PromptSG, prompt: str) -> None:
    model.embed(torch.empty(64, 3, *SIZE), prompt)


# --------------------------------------------------------------------------------------------------- script

TOPICS = {"step": step, "inference": inference, "input": loading, "ranking": ranking, "counted": counted}


def print_table(title: str, rows: list[dict]) -> None:
    """Print rows as a Markdown table. A column is empty where a row does not have it."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        cells = (row.get(column, "") for column in columns)
        print(f"| {' | '.join(f'{cell:.4g}' if isinstance(cell, float) else str(cell) for cell in cells)} |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TOPICS, default=list(TOPICS), help="topics (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer variants and repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each row to a file of JSON lines, at once")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available, otherwise cpu)")
    args = parser.parse_args(argv)
    device = setup(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    machine = {"device": name, "torch": torch.__version__}
    for topic in args.only:
        rows = []
        try:
            for row in TOPICS[topic](device, args.quick):
                rows.append(row)
                if args.json:
                    with args.json.open("a") as file:
                        file.write(json.dumps({"topic": topic, **machine, **row}) + "\n")
        finally:  # also after Ctrl-C
            print_table(f"{topic}: {name}, torch {torch.__version__}", rows)


if __name__ == "__main__":
    run_script(main)
