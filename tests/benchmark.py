"""How fast it is, each row beside a ceiling or the naive way in the same run: python tests/benchmark.py [--quick]

Takes minutes on two cores (--quick: about one); needs no data and no weights. Medians; the rows of a topic take turns,
so that a busy machine slows all of them alike. On CUDA: bf16, and the peak memory of a training step.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from util.machine import show_progress  # noqa: E402

import clip  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import losses  # noqa: E402
import train  # noqa: E402
from model import PromptSG  # noqa: E402
from util.rerank import k_reciprocal  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32


def take_turns(ways: dict[str, Callable], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each way in so many turns after one to warm up."""
    seconds = {name: [] for name in ways}
    for turn in range(1 + repetitions):
        for name, way in ways.items():
            show_progress(turn, repetitions, name)
            start = time.perf_counter()
            way()
            if CUDA:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def medians(ways: dict[str, Callable], repetitions: int) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in take_turns(ways, repetitions).items()}


def table(title: str, header: str, rows: list[str]) -> None:
    columns = header.count("|") + 1
    print(f"\n### {title}\n\n| {header} |\n|{'---|' * columns}", *(f"| {row} |" for row in rows), sep="\n", flush=True)


def ceiling_of(repetitions: int) -> float:
    """Achieved FLOP/s of a large square matrix product."""
    n = 8192 if CUDA else 2048
    a, b = torch.randn(n, n, device=DEVICE, dtype=DTYPE), torch.randn(n, n, device=DEVICE, dtype=DTYPE)
    return 2 * n**3 / medians({"matrix product": lambda: a @ b}, repetitions)["matrix product"]


class Measured(threading.Thread):
    """While it lasts: `seconds`, until the device has finished, and `gib`, the most memory above what it began with.

    On CUDA the device's, as torch counts it; on a CPU the process's resident memory, looked at every 5 ms.
    """

    def __enter__(self) -> "Measured":
        self.done, self.gib = threading.Event(), 0.0
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated() / 2**30 if CUDA else self.resident()
        self.start()
        self.begun = time.perf_counter()
        return self

    def __exit__(self, *error) -> None:
        if CUDA:
            torch.cuda.synchronize()
            self.gib = torch.cuda.max_memory_allocated() / 2**30 - self.before
        self.seconds = time.perf_counter() - self.begun
        self.done.set()
        self.join()

    def run(self) -> None:
        while not CUDA and not self.done.wait(0.005):
            self.gib = max(self.gib, self.resident() - self.before)

    @staticmethod
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def new_model(**ablations) -> PromptSG:
    return PromptSG(clip.untrained("ViT-B/16"), 751, **ablations).to(DEVICE).eval()


# ------------------------------------------------------------------------------------------- the topics


def table_5(repetitions: int, batch: int) -> None:
    images = torch.randn(batch, 3, 256, 128, device=DEVICE)
    none, one, two = new_model(blocks=0), new_model(blocks=1), new_model()
    ids = torch.nn.functional.pad(two.composed_ids, (0, 77 - two.composed_ids.shape[1]))

    def composed_with_77_tokens():
        features = two.clip.encode_image(images)
        two.bnneck(two.interact(features.tokens, two.compose(features.embedding, ids)))

    ways = {
        "visual encoder alone": lambda: two.clip.encode_image(images),
        "+ cross layer, simplified": lambda: none.embed(images, "simplified"),
        "+ 1 block, simplified": lambda: one.embed(images, "simplified"),
        "+ 2 blocks, simplified": lambda: two.embed(images, "simplified"),
        "+ 2 blocks, composed": lambda: two.embed(images, "composed"),
        "+ 2 blocks, composed, all 77 tokens": composed_with_77_tokens,
    }
    paper = ["1x", "0.95x", "0.91x", "0.88x", "0.48x", "0.48x"]
    with torch.inference_mode(), torch.autocast(DEVICE.type, DTYPE, enabled=CUDA):
        seconds = take_turns(ways, 2 * repetitions)
    rows, alone = [], seconds["visual encoder alone"]
    for (way, times), p in zip(seconds.items(), paper):
        ratio = statistics.median(a / s for a, s in zip(alone, times))  # within a turn, so that drift cancels
        rows.append(f"{way} | {batch / statistics.median(times):.1f} | {ratio:.2f}x | {p}")
    table(f"Table 5: inference, ViT-B/16, batch {batch}", "way | images/s | ours | paper", rows)


def training_step(repetitions: int, batches: list[int], ceiling: float) -> None:
    args = train.parse_args(["--device", str(DEVICE)])
    train.check_args(args)
    run = train.Run(new_model().train(), args)

    def step(batch: int) -> None:
        images = torch.randint(0, 256, (batch, 3, 256, 128), dtype=torch.uint8)
        train.update(run, images, torch.arange(batch) // 4)

    seconds = medians(
        {f"training step, batch {batch}": lambda batch=batch: step(batch) for batch in batches}, repetitions
    )
    model = new_model().cpu().train()
    gflop = count_gflop(model, WORK["PromptSG"]) / 64
    rows = []
    for batch, s in zip(batches, seconds.values()):
        with Measured() as measured:
            step(batch)
        achieved = gflop * batch / s
        cells = (batch, f"{s:.2f}", f"{batch / s:.1f}", f"{achieved:.0f}", f"{1e9 * achieved / ceiling:.0%}")
        memory = f"{measured.gib:.1f}" if CUDA else "counted above"  # a CPU's allocator keeps what it once had
        rows.append(" | ".join(map(str, (*cells, memory))))
    header = "batch | s | images/s | GFLOP/s | of the ceiling | GiB above the weights"
    table("A training step: ViT-B/16, full method", header, rows)


# ------------------------------------------------------------------------------ counted, on no device at all


def images_of(batch: int) -> torch.Tensor:
    return torch.empty(batch, 3, 256, 128)


def training_loss(model: PromptSG, images: torch.Tensor) -> torch.Tensor:
    output = model(images)
    labels = torch.arange(len(images)) // 4
    triplet = sum(losses.triplet_loss(x, labels) for x in output.triplet_features)
    supcon = losses.supcon_loss(output.image, output.text, labels, 0.01)
    return triplet + losses.identity_loss(output.logits, labels) + 0.5 * supcon


def count_gflop(model: PromptSG, work: Callable[[PromptSG], object]) -> float:
    """With fake tensors. Attention in the open, since torch's counter passes over a CPU's kernel for it."""
    counter = FlopCounterMode(display=False)
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH), counter:
        work(model)
    return counter.get_total_flops() / 1e9


def count_kept(model: PromptSG, dtype: torch.dtype) -> float:
    """GiB that the forward pass of a batch of 64 keeps for the backward pass, weights aside; with fake tensors."""
    own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return x

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(images_of(64))
        gib = sum(kept.values()) / 2**30
    del output
    return gib


def train_prompts(model: PromptSG) -> None:
    words = torch.zeros(1, 77, 512, requires_grad=True)
    model.clip.encode_embeddings(words, torch.tensor([8])).sum().backward()


WORK = {
    "CLIP-ReID, stage 1": train_prompts,  # of one picture; through the frozen text encoder, on cached image features
    "CLIP-ReID, stage 2": lambda model: model.clip.encode_image(images_of(64)).embedding.sum().backward(),
    "PromptSG": lambda model: training_loss(model, images_of(64)).backward(),
}
INFERENCE = {
    "visual encoder": lambda model: model.clip.encode_image(images_of(64)),
    "simplified": lambda model: model.embed(images_of(64), "simplified"),
    "composed": lambda model: model.embed(images_of(64), "composed"),
}


def counted() -> None:
    """What can be said of a GPU without one. CLIP-ReID's epochs of stage 1 and 2 are those of its configurations."""
    costs, recipes = [], []
    for backbone, epochs in {"ViT-B/16": (120, 60), "RN50": (60, 120)}.items():
        model = PromptSG(clip.untrained(backbone), 751).train()
        stage_1, stage_2, ours = (count_gflop(model, work) for work in WORK.values())
        stage_2, ours = stage_2 / 64, ours / 64
        kept = [count_kept(model, dtype) for dtype in (torch.bfloat16, torch.float32)]
        state = sum(4 * p.numel() * (4 if p.requires_grad else 1) for p in model.parameters()) / 2**30
        model.eval()
        with torch.no_grad():
            inference = " / ".join(f"{count_gflop(model, work) / 64:.1f}" for work in INFERENCE.values())
        costs.append(f"{backbone} | {ours:.1f} | {inference} | {kept[0]:.1f} | {kept[1]:.1f} | {state:.1f}")
        theirs = epochs[0] * stage_1 + epochs[1] * stage_2
        recipes.append(f"{backbone} | {theirs:.0f} | {60 * ours:.0f} | {60 * ours / theirs:.2f}x")
    header = f"backbone | training | {', '.join(INFERENCE)} | bf16 | fp32 | weights, gradients, Adam"
    table("Counted: GFLOP a picture; GiB kept for the backward pass of a batch of 64", header, costs)
    title = "Counted: GFLOP a training picture, whole trainings (Table 6, ViT-B/16: 0.51x and 0.47x of the seconds)"
    table(title, "backbone | CLIP-ReID, both stages | PromptSG, 60 epochs | ratio", recipes)


def input_pipeline(seconds: float) -> None:
    """Loading alone: what the loader could feed if the device took no time."""
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        samples = []
        for number in range(1024):  # the size and texture of Market-1501's pictures, a few kilobytes each
            coarse = Image.fromarray(rng.integers(0, 256, (16, 8, 3), dtype=np.uint8)).resize(
                (64, 128), Image.Resampling.BICUBIC
            )
            path = Path(folder) / f"{number}.jpg"
            coarse.save(path, quality=95)
            samples.append(data.Sample(path, number // 4, 1))
        rows = []
        for name, cache in (("decoded every time", False), ("--cache", True)):
            sampler = data.PKSampler([sample.pid for sample in samples])
            loader = data.train_loader(samples, sampler, (256, 128), workers=2, cache=cache)
            images, start = 0, time.perf_counter()
            for epoch in range(1, 1000):
                if epoch == 2:
                    images, start = 0, time.perf_counter()
                sampler.set_epoch(epoch)
                for batch, _ in loader:
                    images += len(batch)
                if epoch > 2 and time.perf_counter() - start > seconds:
                    break
            rows.append(f"{name} | {images / (time.perf_counter() - start):.0f}")
    table("Input: 64x128 JPEG to augmented 256x128, two workers", "way | images/s", rows)


def naive_rank_metrics(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams) -> float:
    """The usual way: the whole distance matrix, every row sorted. Returns mAP."""
    order = (query @ gallery.T).argsort(dim=1, descending=True)
    average_precisions = []
    for q, row in enumerate(order):
        keep = (gallery_ids[row] != query_ids[q]) | (gallery_cams[row] != query_cams[q])
        hits = (gallery_ids[row] == query_ids[q])[keep]
        if hits.any():
            ranks = hits.nonzero().flatten() + 1
            average_precisions.append((torch.arange(1, len(ranks) + 1, device=ranks.device) / ranks).mean())
    return torch.stack(average_precisions).mean().item()


def reranked_metrics(query, gallery, *labels) -> float:
    return evaluate.rank_metrics(query, gallery, *labels, k_reciprocal(query, gallery))["mAP"]


def scoring(sizes: dict[str, tuple[int, int, int]]) -> None:
    rows = []
    for name, (Q, G, identities) in sizes.items():
        generator = torch.Generator().manual_seed(0)
        ids = [torch.randint(1, identities, (n,), generator=generator) for n in (Q, G)]
        centres = torch.randn(identities, 512, generator=generator)
        features = [centres[i] + 2.2 * torch.randn(len(i), 512, generator=generator) for i in ids]
        features = [torch.nn.functional.normalize(f, dim=1).to(DEVICE) for f in features]
        ids = [i.to(DEVICE) for i in ids]
        cams = [torch.randint(1, 16, (n,), generator=generator).to(DEVICE) for n in (Q, G)]
        problem = (*features, *ids, *cams)
        with Measured() as measured:
            result = evaluate.rank_metrics(*problem)["mAP"]
        rows.append(f"{name}, {Q:,} x {G:,} | {measured.seconds:.1f} | {measured.gib:.2f} | {result:.4f}")
        with Measured() as measured:
            for part in features[0].split(400):
                part @ features[1].T
        rows.append(f"{name}, the matrix product alone | {measured.seconds:.1f} | |")
        if len(rows) > 2:
            continue
        for way, function in (("re-ranked", reranked_metrics), ("the whole matrix sorted", naive_rank_metrics)):
            with Measured() as measured:
                result = function(*problem)
            rows.append(f"{name}, {way} | {measured.seconds:.1f} | {measured.gib:.2f} | {result:.4f}")
    table("Scoring, 512-dimensional features", "size | s | GiB above the features | mAP", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about a minute: fewer rows and repetitions")
    parser.add_argument("--only", choices=("counted", "table5", "step", "input", "scoring"), help="one topic")
    args = parser.parse_args()
    repetitions = 3 if args.quick else 7

    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if CUDA else f'{os.cpu_count()} CPU cores'}")
    ceiling = ceiling_of(10)
    print(f"ceiling, a large matrix product in {DTYPE}: {ceiling / 1e9:.0f} GFLOP/s")
    topics = {
        "counted": counted,
        "scoring": lambda: scoring(
            {"Market-1501": (3368, 15913, 751)}
            if args.quick
            else {
                "Market-1501": (3368, 15913, 751),
                "MSMT17 / 4": (11659, 82161 // 4, 3060),
                "MSMT17": (11659, 82161, 3060),
                "MSMT17 x 4": (11659, 4 * 82161, 3060),
            }
        ),
        "input": lambda: input_pipeline(5 if args.quick else 20),
        "table5": lambda: table_5(repetitions, 256 if CUDA else 8),
        "step": lambda: training_step(3, [16] if args.quick else [8, 16, 32, 64], ceiling),
    }
    for name, topic in topics.items():
        if args.only in (None, name):
            topic()


if __name__ == "__main__":
    main()
