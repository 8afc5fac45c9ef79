"""Measure speed and memory: python experiments/benchmark.py [--only TOPIC ...] [--quick] [--json FILE]

step        a training step, eager and compiled
inference   Table 5: visual encoder alone, simplified and composed prompt
input       images per second of the training loader
ranking     ranking and re-ranking at the size of Market-1501 and MSMT17
counted     FLOPs and bytes, counted without a device; Table 6's ratio to CLIP-ReID

No data and no weights are needed. Seconds are medians. Compared variants run in alternation, so that a busy machine
slows them alike. GiB is the peak above the memory in use before: torch's on CUDA; on a CPU resident memory, where later
rows can show too little, because they reuse freed memory.
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
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import common  # noqa: F401, puts the repository on the path
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import clip
import data
import evaluate
import losses
from demo import draw
from model import PromptSG
from util.device import PRECISIONS, autocast, default_precision, one_line, run_script, setup
from util.rerank import k_reciprocal

SIZE = (256, 128)
# Table 5: the prompt for `embed`, and images per second in the paper, relative to the visual encoder.
VARIANTS = {"visual encoder": ("none", 1.0), "simplified": ("simplified", 0.88), "composed": ("composed", 0.48)}
CLIP_REID_EPOCHS = {"ViT-B/16": (120, 60), "RN50": (60, 120)}  # of stage 1 and stage 2, from its configurations


def peak_gib(device: torch.device, reset: bool = False) -> float:
    """Return the peak of memory since the last reset; with `reset`, the memory in use now. NaN if it is unknown."""
    if device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**30
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():  # not Linux
        return math.nan
    if reset:
        clear_refs.write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20


def measure(variants: dict[object, Callable], turns: int, device: torch.device) -> dict[object, dict]:
    """Return the median "seconds" and the peak "GiB" of each function, NaN for one that fails in its first calls.

    Each is called twice to warm up, then `turns` times in alternation. With 0 turns, a single call is measured.
    """

    def call(name: object) -> float:
        start = time.perf_counter()
        variants[name]()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times, gib = {}, dict.fromkeys(variants, math.nan)
    for name in variants:
        gc.collect()
        before = peak_gib(device, reset=True)
        try:
            times[name] = [call(name) for _ in range(2 if turns else 1)]  # Adam's state exists from the second step on
            gib[name] = peak_gib(device) - before
        except Exception as error:  # out of memory or a failing compiler: the other variants continue
            print(f"{name} failed: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
        if turns and name in times:
            times[name] = []  # the warm-up does not count
    for name in list(times) * turns:
        times[name].append(call(name))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return {name: {"seconds": medians.get(name, math.nan), "GiB": gib[name]} for name in variants}


def new_model(backbone: str, device: torch.device) -> PromptSG:
    """Return a model with random weights and the classifier of Market-1501."""
    torch.manual_seed(0)
    return PromptSG(clip.untrained(backbone, SIZE), 751).to(device, memory_format=torch.channels_last)


def compute_loss(forward: Callable, images: Tensor, labels: Tensor, precision: str = "fp32") -> Tensor:
    """Return the loss of Eq. 10 as in a training step, with the defaults of train.py."""
    with autocast(images.device, precision):
        output = forward(images)
    triplet = sum(losses.triplet_loss(x, labels) for x in output.triplet_features)
    supcon = losses.supcon_loss(output.image, output.text, labels, temperature=0.01)  # that of OpenAI's weights
    return triplet + losses.identity_loss(output.logits, labels) + 0.5 * supcon


def train_steps(device: torch.device, variant: str, backbone: str, precision: str, batch: int) -> Iterator[None]:
    """Build a model, then run one training step for each `next`: train.py's, without its loader and log."""
    model = new_model(backbone, device).train()
    forward = torch.compile(model) if variant == "compiled" else model
    optimizer = torch.optim.Adam(model.parameter_groups(5e-6, 5e-5), weight_decay=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    images = torch.randint(0, 256, (batch, 3, *SIZE), dtype=torch.uint8, device=device)
    labels = torch.arange(batch, device=device) // 4
    while True:
        loss = compute_loss(forward, clip.normalize(images), labels, precision)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        yield


def step(device: torch.device, quick: bool) -> Iterator[dict]:
    """Measure a training step. GiB includes weights and Adam's state."""
    for backbone in ("ViT-B/16",) if quick else ("ViT-B/16", "RN50"):
        for precision in (default_precision(device),) if quick else PRECISIONS:
            row = {"backbone": backbone, "precision": precision, "batch": 64 if device.type == "cuda" else 8}
            steps = {name: partial(next, train_steps(device, name, **row)) for name in ("eager", "compiled")}
            for name, result in measure(steps, 5 if quick else 15, device).items():
                yield {**row, "variant": name, **result}
            torch._dynamo.reset()


@torch.inference_mode()
def inference(device: torch.device, quick: bool) -> Iterator[dict]:
    """Measure the speed of the prompts relative to the visual encoder, in fp32 as in evaluation; on CUDA also bf16."""
    model = new_model("ViT-B/16", device).eval()
    for precision in ("fp32", "bf16") if device.type == "cuda" else ("fp32",):
        embed = autocast(device, precision)(model.embed)  # as a decorator
        for batch in (1, 8) if quick else (1, 32, 128):
            images = torch.randn(batch, 3, *SIZE, device=device)
            calls = {name: partial(embed, images, prompt) for name, (prompt, _) in VARIANTS.items()}
            results = measure(calls, 5 if quick else 9, device)
            for name, (_, paper) in VARIANTS.items():
                row = {"precision": precision, "batch": batch, "variant": name, **results[name]}
                yield {**row, "ratio": results["visual encoder"]["seconds"] / row["seconds"], "paper": paper}


def loading(device: torch.device, quick: bool) -> Iterator[dict]:
    """Measure the training loader on 16 batches of drawn people, JPEGs of 64x128 pixels as in Market-1501."""
    with tempfile.TemporaryDirectory() as folder:
        draw.draw_dataset(Path(folder, "synthetic"), train_ids=256, test_ids=0, images=4)
        samples = data.load_dataset("synthetic", folder, ("train",)).train
        sampler = data.PKSampler([sample.pid for sample in samples])
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        counts = [count for count in ((1, 4, 8) if quick else (0, 1, 2, 4, 8, 16)) if count <= cores]
        loaders = [data.train_loader(samples, sampler, SIZE, count, device.type == "cuda") for count in counts]
        epochs = {count: partial(deque, loader, maxlen=0) for count, loader in zip(counts, loaders)}  # keeps no batch
        for count, result in measure(epochs, 3 if quick else 7, device).items():
            yield {"processes": count, "cores": cores, "images/s": len(samples) / result["seconds"], **result}


def ranking(device: torch.device, quick: bool) -> Iterator[dict]:
    """Measure ranking and re-ranking of random features around random centres."""

    def rerank(query: Tensor, gallery: Tensor, *labels: Tensor) -> None:
        evaluate.rank_metrics(query, gallery, *labels, k_reciprocal(query, gallery))

    sizes = {"Market-1501": (3368, 15913, 751), "MSMT17": (11659, 82161, 3060)}  # queries, gallery images, ids
    for size, (Q, G, identities) in list(sizes.items())[: 1 if quick else None]:
        rng = torch.Generator().manual_seed(0)
        ids, cams = (torch.randint(1, end, (Q + G,), generator=rng) for end in (identities, 16))
        centres, noise = (torch.randn(count, 512, generator=rng) for count in (identities, Q + G))
        features = F.normalize(centres[ids] + 2.2 * noise, dim=1)
        arguments = [part for x in (features, ids, cams) for part in x.to(device).split([Q, G])]
        calls = {"ranking": partial(evaluate.rank_metrics, *arguments), "re-ranking": partial(rerank, *arguments)}
        for name, result in measure(calls, 3 if size == "Market-1501" else 0, device).items():
            yield {"size": size, "queries": Q, "gallery": G, "variant": name, **result}


def count_gflop(work: Callable, *arguments: object) -> float:
    """Count GFLOP per image of a batch of 64 with fake tensors, with the backward pass if there is one."""
    counter = FlopCounterMode(display=False)  # does not count the CPU's fused attention, which is switched off here
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter:
        output = work(*arguments)
        if output.requires_grad:
            output.sum().backward()
    return counter.get_total_flops() / 64e9


def count_kept_gib(model: PromptSG, images: Tensor, precision: str) -> float:
    """Count what the forward pass keeps for the backward pass, without weights, with fake tensors."""
    weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage
        return x

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
    with FakeTensorMode(allow_non_fake_inputs=True), hooks, autocast(images.device, precision):
        model(images)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in weights) / 2**30


def counted(device: torch.device, quick: bool) -> Iterator[dict]:
    """Count GFLOP of an image, GiB of a batch of 64, and GFLOP of an image in a whole training (Table 6)."""
    images, labels = torch.empty(64, 3, *SIZE), torch.arange(64) // 4
    words, end = torch.zeros(64, 77, 512, requires_grad=True), torch.full((64,), 8)
    for backbone, (epochs_1, epochs_2) in CLIP_REID_EPOCHS.items():
        model = new_model(backbone, torch.device("cpu")).train()
        ours = count_gflop(compute_loss, model, images, labels)
        # CLIP-ReID: stage 1 trains words through the text encoder, with cached image features; stage 2 the encoder.
        stage_1 = count_gflop(model.clip.encode_embeddings, words, end)
        stage_2 = count_gflop(model.embed, images, "none")
        theirs = epochs_1 * stage_1 + epochs_2 * stage_2
        row = {"backbone": backbone, "GFLOP of training": ours}
        row |= {f"GiB kept, {name}": count_kept_gib(model, images, name) for name in ("bf16", "fp32")}
        model.eval().requires_grad_(False)
        row |= {f"GFLOP, {name}": count_gflop(model.embed, images, prompt) for name, (prompt, _) in VARIANTS.items()}
        yield row | {"GFLOP, 60 epochs": 60 * ours, "GFLOP, CLIP-ReID": theirs, "ratio": 60 * ours / theirs}


TOPICS = {"step": step, "inference": inference, "input": loading, "ranking": ranking, "counted": counted}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=TOPICS, default=list(TOPICS), help="topics (default: all)")
    parser.add_argument("--quick", action="store_true", help="fewer variants and repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each row to a file of JSON lines")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available, otherwise cpu)")
    args = parser.parse_args()
    device = setup(args.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    for topic in args.only:
        for number, row in enumerate(TOPICS[topic](device, args.quick)):
            if number == 0:
                print(f"\n### {topic}: {name}, torch {torch.__version__}\n")
                print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
            cells = (f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row.values())
            print(f"| {' | '.join(cells)} |")
            if args.json:
                with args.json.open("a") as file:
                    print(json.dumps({"topic": topic, "device": name, "torch": torch.__version__, **row}), file=file)


if __name__ == "__main__":
    run_script(main)
