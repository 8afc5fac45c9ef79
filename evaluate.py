"""Scores a trained checkpoint: features of query and gallery -> CMC and mAP, and the speeds of Table 5.

python evaluate.py                       the newest run, with the prompt it was trained with
python evaluate.py --prompt simplified   "A photo of a person" for everybody: the fast way
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import clip
import data
from model import PromptSG, restore_model
from util import machine
from util.rerank import k_reciprocal
from util.run import load_checkpoint, newest_checkpoint, write_arrays, write_json

SCORES = ("mAP", "rank1", "rank5", "rank10")


# ------------------------------------------------------------------------------------------------- ranking


def rank_metrics(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor,
    gallery_cams: Tensor,
    similarities: Callable[[int, int], Tensor] | None = None,
) -> dict:
    """mAP and CMC by the field's conventions (section 5.1), as the baseline [24] that the paper names computes them.

    query (Q, D), gallery (G, D): L2-normalised features. ids and cams (Q,) or (G,): integers; identity -1 is junk.
    similarities: to rank by instead of the cosine; of the queries begin to end to the gallery, (end - begin, G).
    Returns {"mAP": float, "cmc": Tensor (G without junk,), "ap": Tensor (Q,), NaN for a query left out}.

    For each query, pictures of its own identity by its own camera, and junk, count neither as right nor as wrong.
    A query without any right picture is left out of the mean. cmc[k - 1] is the share of queries with a right picture
    among the first k. AP is the mean, over the right pictures, of the precision at their rank. Of equally similar
    pictures the wrong ones come first, so that no order of the gallery can flatter a model.

    No list is sorted: a right picture's rank follows from counting. Say the right pictures have similarities 0.9 and
    0.4, and a wrong one 0.6. The wrong one passes one right picture, the 0.4. So before the 0.9 there are 0 wrong ones,
    before the 0.4 there is 1; the precisions are 1 / (1 + 0) and 2 / (2 + 1), and AP is 0.83.

    Raises ValueError if no query has a right picture in the gallery, or if a feature is not finite.
    """
    if not (query.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("features with NaN or infinite values cannot be ranked: the model has diverged")
    # Sorted by identity, a query's candidates lie side by side.
    order = gallery_ids.argsort(stable=True)
    order = order[gallery_ids[order] != data.JUNK]
    gallery, gallery_ids, gallery_cams = gallery[order], gallery_ids[order], gallery_cams[order]
    starts = torch.searchsorted(gallery_ids, query_ids).tolist()
    stops = torch.searchsorted(gallery_ids, query_ids, right=True).tolist()

    ap = query.new_full((len(query),), torch.nan, dtype=torch.double)
    first_ranks = []
    chunk = 1 + 2**25 // (1 + len(gallery))  # 128 MB of similarities at a time
    for begin in range(0, len(query), chunk):
        end = min(begin + chunk, len(query))
        table = similarities(begin, end)[:, order] if similarities else query[begin:end] @ gallery.T  # (chunk, G)
        for i, similarity in enumerate(table, begin):
            own = slice(starts[i], stops[i])
            right = similarity[own][gallery_cams[own] != query_cams[i]].sort().values  # ascending
            if len(right) == 0:
                continue
            similarity[own] = -torch.inf  # what is left are the wrong pictures
            wrong = similarity[similarity >= right[0]]  # those before any right one
            passed = torch.searchsorted(right, wrong, right=True)  # right pictures that each wrong one passes
            wrong_before = passed.bincount(minlength=len(right) + 1).flip(0).cumsum(0)[:-1]  # the best right one first
            right_until = torch.arange(1, len(right) + 1, device=right.device)
            ap[i] = (right_until / (right_until + wrong_before)).double().mean()
            first_ranks.append(wrong_before[0])
        machine.show_progress(end, len(query), "queries ranked")
    if not first_ranks:
        raise ValueError("no query has a picture of its identity by another camera in the gallery: nothing to score")
    cmc = torch.stack(first_ranks).bincount(minlength=len(gallery)).cumsum(0) / len(first_ranks)
    return {"mAP": ap.nanmean().item(), "cmc": cmc.cpu(), "ap": ap.cpu()}


# ------------------------------------------------------------------------------------------------ features


@torch.inference_mode()
def extract(embed: Callable[[Tensor], Tensor], samples: list[data.Sample], args: argparse.Namespace) -> Tensor:
    """What `embed` makes of the pictures of samples, (N, D), float32 on the device; a progress line on terminals.

    The pictures are dealt out to the processes in turn; every process returns the features of all of them.
    args: image_size, eval_batch_size, workers, device, precision, as the scripts' flags of these names.
    """
    padded = samples + samples[:1] * (-len(samples) % machine.world_size())
    own = padded[machine.rank() :: machine.world_size()]
    features = []
    for images, _ in data.test_loader(own, args.image_size, args.eval_batch_size, args.workers):
        with machine.autocast(args), machine.out_of_memory("a smaller --eval-batch-size changes no score"):
            features.append(embed(clip.normalize(images.to(args.device, non_blocking=True))).float())
        machine.show_progress(sum(map(len, features)), len(own), "pictures")
    in_turn = machine.gather(torch.cat(features)).unflatten(0, (machine.world_size(), len(own))).transpose(0, 1)
    return in_turn.flatten(0, 1)[: len(samples)]


def labels_of(samples: list[data.Sample], device: torch.device | str) -> Tensor:
    """Identities and cameras: (2, N)"""
    return torch.tensor([(sample.pid, sample.camid) for sample in samples], device=device).T.contiguous()


def metrics_of(query: Tensor, gallery: Tensor, dataset: data.Dataset, similarities: Callable | None = None) -> dict:
    """`rank_metrics` of a dataset's features; "rank1", "rank5", "rank10" and "queries_left_out", a number, besides."""
    query_ids, query_cams = labels_of(dataset.query, query.device)
    gallery_ids, gallery_cams = labels_of(dataset.gallery, query.device)
    metrics = rank_metrics(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, similarities)
    cmc = metrics["cmc"]
    ranks = {f"rank{k}": cmc[min(k, len(cmc)) - 1].item() for k in (1, 5, 10)}
    return {**metrics, **ranks, "queries_left_out": int(metrics["ap"].isnan().sum())}


def score(model: PromptSG, dataset: data.Dataset, prompt: str, args: argparse.Namespace) -> dict:
    """Scores a model, which is left in eval mode, on query and gallery; args as in `extract`.

    Returns "mAP", "rank1", "rank5", "rank10" from 0 to 1, "images_per_second", the features "query" (Q, D) and
    "gallery" (G, D), and what else `metrics_of` gives.
    """
    model.eval()
    samples = dataset.query + dataset.gallery
    start = time.perf_counter()
    features = extract(lambda images: model.embed(images, prompt), samples, args)
    query, gallery = features.split([len(dataset.query), len(dataset.gallery)])
    if features.is_cuda:
        torch.cuda.synchronize()
    speed = len(samples) / (time.perf_counter() - start)
    return {**metrics_of(query, gallery, dataset), "images_per_second": speed, "query": query, "gallery": gallery}


def describe(result: dict) -> str:
    """One line for people; a second one if queries were left out."""
    ranks = "  ".join(f"Rank-{k} {result[f'rank{k}']:.1%}" for k in (1, 5, 10))
    speed = f"  ({result['images_per_second']:.0f} images/s)" if "images_per_second" in result else ""
    left_out = result["queries_left_out"]
    note = f"\n{left_out} of {len(result['ap'])} queries have no right picture in the gallery and are left out"
    return f"mAP {result['mAP']:.1%}  {ranks}{speed}{note if left_out else ''}"


def write_features(path: Path, dataset: data.Dataset, query: Tensor, gallery: Tensor) -> None:
    """Names, identities, cameras and features of query (Q, D) and gallery (G, D) into one .npz."""
    arrays = {}
    for subset, features in (("query", query), ("gallery", gallery)):
        samples = getattr(dataset, subset)
        arrays[f"{subset}_names"] = [sample.path.name for sample in samples]
        arrays[f"{subset}_ids"], arrays[f"{subset}_cams"] = labels_of(samples, "cpu").numpy()
        arrays[f"{subset}_features"] = features.cpu().numpy()
    write_arrays(arrays, path)


# --------------------------------------------------------------------------------------------------- speed


@torch.inference_mode()
def measure_speed(model: PromptSG, args: argparse.Namespace, turns: int = 7) -> dict[str, Tensor]:
    """Images a second of Table 5, in each turn (turns,): the visual encoder alone, and with either prompt's text.

    The model only, the pictures already on the device. The three take turns, so that a busy machine is fair to them.
    """
    batch = 32 if args.device == "cpu" else args.eval_batch_size
    images = torch.randn(batch, 3, *args.image_size, device=args.device)
    ways = {
        "visual encoder": lambda: model.clip.encode_image(images).embedding,
        "simplified": lambda: model.embed(images, "simplified"),
        "composed": lambda: model.embed(images, "composed"),
    }
    if model.inversion is None:
        del ways["composed"]
    seconds = {name: [] for name in ways}
    for _ in range(1 + turns):
        for name, way in ways.items():
            start = time.perf_counter()
            with machine.autocast(args):
                way().sum().item()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    return {name: batch / torch.tensor(times[1:]) for name, times in seconds.items()}  # the first turn warms up


def describe_speed(speeds: dict[str, Tensor]) -> str:
    """The best of each, as multiples of the visual encoder's; for people.

    The ratios of the turns should agree: where the middle half of them spreads by over a tenth, they mean nothing.
    """
    alone = speeds["visual encoder"]
    cells = [f"{name} {speed.max():.0f} images/s ({speed.max() / alone.max():.2f}x)" for name, speed in speeds.items()]
    quartiles = [(speed / alone).quantile(torch.tensor([0.25, 0.75])) for speed in speeds.values()]
    is_busy = any(high > 1.1 * low for low, high in quartiles)
    note = "; the machine is too busy for these ratios to mean anything" if is_busy else ""
    return f"the model alone (Table 5): {', '.join(cells)}{note}"


# -------------------------------------------------------------------------------------------- the script


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every script that uses a trained model."""
    add = parser.add_argument
    add("--checkpoint", type=machine.path, metavar="PATH", help="(last.pt of the newest run in runs/)")
    add("--prompt", choices=("composed", "simplified"), help="(the one trained with)")
    add("--dataset", choices=data.FOLDERS, metavar="NAME", help="(the one trained on)")
    machine.add_machine_flags(parser)


def load_run(args: argparse.Namespace) -> tuple[PromptSG, dict]:
    """The model of --checkpoint, on --device, and the flags it was trained with, which fill in what args leave open."""
    args.checkpoint = args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(args.checkpoint)
    settings = checkpoint["args"]
    trained = f"{settings['backbone']} trained on {settings['dataset']}, epoch {checkpoint['epoch']}"
    print(f"checkpoint {args.checkpoint}: {trained}")
    model = restore_model(checkpoint).to(args.device, memory_format=torch.channels_last)
    args.image_size = tuple(settings["image_size"])
    args.dataset = args.dataset or settings["dataset"]
    args.prompt = args.prompt or ("composed" if model.inversion else "simplified")
    return model, settings


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning."""
    parser = machine.make_parser("evaluate.py", "Score a trained PromptSG.")
    add = parser.add_argument
    add("--json", type=machine.path, metavar="FILE.json", help="write the scores there, too")
    add("--features", type=machine.path, metavar="FILE.npz", help="write the features of query and gallery there")
    add("--rerank", type=int, nargs="*", metavar="K", help="score again, k-reciprocal re-ranking with k1 and k2 (20 6)")
    add_checkpoint_flags(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError, in one line and before any work, for impossible combinations."""
    machine.check_machine_flags(args)
    machine.check_output("--json", args.json, ".json")
    machine.check_output("--features", args.features, ".npz")
    if args.rerank and (len(args.rerank) != 2 or min(args.rerank) < 1):
        raise ValueError("--rerank takes k1 and k2, both at least 1, or nothing for 20 and 6")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    machine.join_processes(args)
    check_args(args)
    model, settings = load_run(args)
    dataset = data.load_dataset(args.dataset, args.data_root)
    print(data.summary(dataset))
    if args.dataset != settings["dataset"]:
        print(f"cross-domain: trained on {settings['dataset']}, tested on {args.dataset}")
    result = score(model, dataset, args.prompt, args)
    if not machine.leave_processes():
        return
    print(f"{args.dataset}, {args.prompt} prompt: {describe(result)}")
    report = {name: result[name] for name in (*SCORES, "images_per_second", "queries_left_out")}
    report |= {name: str(getattr(args, name)) for name in ("prompt", "dataset", "precision", "checkpoint")}
    report |= {"dataset_version": dataset.version, "files_passed_over": len(dataset.passed_over)}
    report["trained_on"] = settings["dataset"]
    if args.rerank is not None:
        N = len(dataset.query) + len(dataset.gallery)
        print(f"re-ranking compares {N:,} pictures with each other: about {0.3 + 8e-6 * N:.1f} GB besides the features")
        similarities = k_reciprocal(result["query"], result["gallery"], *args.rerank)
        reranked = metrics_of(result["query"], result["gallery"], dataset, similarities)
        print(f"{args.dataset}, {args.prompt} prompt, re-ranked: {describe(reranked)}")
        report["reranked"] = {name: reranked[name] for name in SCORES}
    if args.json:
        write_json(report, args.json)
    if args.features:
        write_features(args.features, dataset, result["query"], result["gallery"])
    print(describe_speed(measure_speed(model, args)))


if __name__ == "__main__":
    machine.exit_on_error(main)
