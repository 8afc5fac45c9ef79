"""Evaluate a trained PromptSG: mAP and CMC (Rank-k) of query and gallery images.

python evaluate.py                       the newest run, with the prompt that it was trained with
python evaluate.py --prompt simplified   "A photo of a person" for all images: faster (section 4.3)

Evaluation computes in fp32 on every device.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import clip
import data
from model import PromptSG, restore_model
from util import checkpoint
from util.device import default_workers, gather, rank, run_script, setup, show_progress, world_size
from util.pairs import compare_pairs, describe_pairs
from util.rerank import k_reciprocal

METRICS = ("mAP", "rank1", "rank5", "rank10")


# ------------------------------------------------------------------------------------------------- features


@torch.no_grad()
def extract(
    model: PromptSG, paths: Sequence[str | Path], prompt: str | None = None, batch_size: int = 128, workers: int = 0
) -> Tensor:
    """Return the retrieval features of image files: float32 (N, D), L2-normalised, on the CPU, in the order of `paths`.

    Args:
        model: in train or eval mode; the mode is restored.
        prompt: "composed", "simplified", "none" (CLIP's embedding v), or None for the prompt trained with.
        workers: number of loader processes.

    Raises OSError with the names of all unreadable images, and ValueError as `PromptSG.embed` does.
    """
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    device, was_training = next(model.parameters()).device, model.training
    loader = data.image_loader(paths, model.image_size, batch_size, workers, pin_memory=device.type == "cuda")
    features, errors, done = [torch.empty(0, model.bnneck.num_features, device=device)], [], 0
    model.eval()
    try:
        for images, unreadable in loader:
            errors += unreadable
            if not errors:  # after an error, the other images are only checked
                images = clip.normalize(images.to(device, non_blocking=True))  # (B, 3, H, W)
                features.append(model.embed(images, prompt).float())  # (B, D)
            done += len(images)
            show_progress(done, len(paths), "images")
    finally:
        model.train(was_training)
    if errors:
        raise OSError("; ".join(errors))
    return torch.cat(features).cpu()


def extract_dataset(model: PromptSG, dataset: data.Dataset, prompt: str | None = None, workers: int = 0) -> dict:
    """Extract the features of query and gallery. The processes of torchrun share the images.

    Returns "query" (Q, D) and "gallery" (G, D), on the GPU if the model is there, and "images_per_second".
    """
    paths = [sample.path for sample in (*dataset.query, *dataset.gallery)]
    start = time.perf_counter()
    # Each process extracts an equal share. The paths are padded so that the shares are equal, as gather needs.
    padded = paths + paths[:1] * (-len(paths) % world_size())
    share = len(padded) // world_size()
    own = extract(model, padded[rank() * share : (rank() + 1) * share], prompt, workers=workers)
    features = gather(own)[: len(paths)]
    speed = len(paths) / (time.perf_counter() - start)
    device = next(model.parameters()).device
    features = features.to(device if device.type == "cuda" else "cpu")
    query, gallery = features.split([len(dataset.query), len(dataset.gallery)])
    return {"query": query, "gallery": gallery, "images_per_second": speed}


# -------------------------------------------------------------------------------------------------- ranking


def rank_metrics(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor,
    gallery_cams: Tensor,
    similarities: Callable[[int, int], Tensor] | None = None,
) -> dict:
    """Return mAP and CMC by the field's conventions (section 5.1), as the strong baseline [24] computes them.

    A gallery image is correct for a query if it has the same identity and another camera. Images of the same identity
    and camera, and junk (identity -1), are ignored. A query without a correct image is skipped. AP is the mean of the
    precision at the ranks of the correct images. cmc[k - 1] is the share of queries with a correct image among the
    first k. At equal similarity, wrong images come first.

    Only the correct images are sorted; wrong images are counted. With correct images at similarity 0.9 and 0.4 and a
    wrong one at 0.6, there are 0 wrong images before the first correct image and 1 before the second. The precisions
    are 1 / (1 + 0) and 2 / (2 + 1), and AP is 0.83.

    Args:
        query, gallery: L2-normalised features, (Q, D) and (G, D).
        query_ids, gallery_ids, query_cams, gallery_cams: integers, (Q,) or (G,).
        similarities: for re-ranking, a function that replaces cosine similarity. It is called with (begin, end) and
            returns the similarities of queries begin to end - 1 to the gallery, (end - begin, G).

    Returns "mAP" (float), "cmc" (G without junk,), and "ap" (Q,), which is NaN for a skipped query.
    Raises ValueError if no query has a correct image, or if a feature is not finite.
    """
    if not (query.isfinite().all() and gallery.isfinite().all()):
        raise ValueError("features are NaN or infinite: the model has diverged")

    # Sort the gallery by identity, without junk: the images of an identity become one slice.
    order = gallery_ids.argsort(stable=True)
    order = order[gallery_ids[order] != data.JUNK]
    gallery, gallery_ids, gallery_cams = gallery[order], gallery_ids[order], gallery_cams[order]
    starts = torch.searchsorted(gallery_ids, query_ids).tolist()
    stops = torch.searchsorted(gallery_ids, query_ids, right=True).tolist()

    # Rank the queries in chunks: the similarities of all queries would need too much memory.
    ap = query.new_full((len(query),), torch.nan, dtype=torch.double)
    wrong_before_first = []
    chunk = 1 + 2**25 // (1 + len(gallery))  # 128 MB of similarities at a time
    for begin in range(0, len(query), chunk):
        end = min(begin + chunk, len(query))
        rows = similarities(begin, end)[:, order] if similarities else query[begin:end] @ gallery.T  # (chunk, G)
        for i, similarity in enumerate(rows, begin):
            # Of the query's identity, images from other cameras are correct. The query's camera is ignored.
            same_id = slice(starts[i], stops[i])
            correct = similarity[same_id][gallery_cams[same_id] != query_cams[i]].sort().values  # ascending
            if len(correct) == 0:
                continue
            # Count the wrong images before each correct one, best correct image first. A tie counts as before.
            similarity[same_id] = -torch.inf
            wrong = similarity[similarity >= correct[0]]  # the others come after all correct images
            outranked = torch.searchsorted(correct, wrong, right=True)  # number of correct images after each wrong one
            wrong_before = outranked.bincount(minlength=len(correct) + 1).flip(0).cumsum(0)[:-1]  # (correct images,)
            # Average precision, and the rank of the first correct image.
            correct_until = torch.arange(1, len(correct) + 1, device=correct.device)
            ap[i] = (correct_until / (correct_until + wrong_before)).double().mean()
            wrong_before_first.append(wrong_before[0])
        show_progress(end, len(query), "queries ranked")
    if not wrong_before_first:
        raise ValueError(
            "no query has an image of its identity from another camera in the gallery: nothing to evaluate"
        )
    # A query counts for Rank-k if fewer than k wrong images come before its first correct image.
    cmc = torch.stack(wrong_before_first).bincount(minlength=len(gallery)).cumsum(0) / len(wrong_before_first)
    return {"mAP": ap.nanmean().item(), "cmc": cmc.cpu(), "ap": ap.cpu()}


def ids_and_cameras(dataset: data.Dataset, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments of `rank_metrics`: query_ids (Q,), gallery_ids (G,), query_cams (Q,), gallery_cams (G,)."""
    rows = [[(sample.pid, sample.camid) for sample in samples] for samples in (dataset.query, dataset.gallery)]
    (query_ids, query_cams), (gallery_ids, gallery_cams) = (torch.tensor(row, device=device).T for row in rows)
    # searchsorted needs contiguous tensors
    return query_ids.contiguous(), gallery_ids.contiguous(), query_cams, gallery_cams


def rank_dataset(dataset: data.Dataset, query: Tensor, gallery: Tensor, similarities: Callable | None = None) -> dict:
    """Return `rank_metrics` of a dataset's features, with rank1, rank5, rank10 (0 to 1) and queries_skipped."""
    metrics = rank_metrics(query, gallery, *ids_and_cameras(dataset, query.device), similarities)
    cmc = metrics["cmc"]
    ranks = {f"rank{k}": cmc[min(k, len(cmc)) - 1].item() for k in (1, 5, 10)}
    return {**metrics, **ranks, "queries_skipped": int(metrics["ap"].isnan().sum())}


def evaluate(model: PromptSG, dataset: data.Dataset, prompt: str | None = None, workers: int = 0) -> dict:
    """Evaluate a model on query and gallery. Returns the results of `extract_dataset` and `rank_dataset` in one dict.

    Raises ValueError if no query has a correct image, and as `extract` and `rank_metrics` do.
    """
    # Check this first: extracting the features takes much longer.
    gallery = {(sample.pid, sample.camid) for sample in dataset.gallery}
    cameras = {camera for _, camera in gallery}
    if not any((sample.pid, camera) in gallery for sample in dataset.query for camera in cameras - {sample.camid}):
        raise ValueError("no query has an image of its identity from another camera: train with --eval-every 0")
    features = extract_dataset(model, dataset, prompt, workers)
    return {**features, **rank_dataset(dataset, features["query"], features["gallery"])}


def describe(result: dict) -> str:
    """Return a line with the metrics of a result, and a second one if queries were skipped."""
    ranks = "  ".join(f"Rank-{k} {result[f'rank{k}']:.1%}" for k in (1, 5, 10))
    speed = f"  ({result['images_per_second']:.0f} images/s)" if "images_per_second" in result else ""
    skipped = result["queries_skipped"]
    note = f"\n{skipped} of {len(result['ap'])} queries have no correct image in the gallery and are skipped"
    return f"mAP {result['mAP']:.1%}  {ranks}{speed}{note if skipped else ''}"


# --------------------------------------------------------------------------------------------------- script


def write_features(path: Path, dataset: data.Dataset, query: Tensor, gallery: Tensor, space: dict) -> None:
    """Write names, identities, cameras and features of query and gallery to .npz, and `space`, how they were made."""
    arrays = {name: np.asarray(value) for name, value in space.items()}
    for subset, features in (("query", query), ("gallery", gallery)):
        samples = getattr(dataset, subset)
        arrays[f"{subset}_names"] = np.asarray([data.printable(sample.path.name) for sample in samples])
        arrays[f"{subset}_ids"] = np.asarray([sample.pid for sample in samples])
        arrays[f"{subset}_cams"] = np.asarray([sample.camid for sample in samples])
        arrays[f"{subset}_features"] = features.cpu().numpy()
    with checkpoint.atomic_write(path) as temporary:
        np.savez(temporary, **arrays)
    print(f"features written to {path}: arrays {', '.join(arrays)}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="python evaluate.py [flags]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, help="last.pt of a run (default: the newest in runs/)")
    add("--prompt", choices=("composed", "simplified"), help="prompt at test time (default: that of training)")
    add("--dataset", choices=data.FOLDERS, help="dataset to evaluate on (default: that of training)")
    add("--data-root", default="data", help="directory of the datasets (default: data)")
    add("--device", help="cpu and cuda are tested; mps, xpu, ... may work (default: cuda if available, otherwise cpu)")
    add("--workers", type=int, help="data loader processes (default: up to 8 on CUDA, otherwise 0)")
    add(
        "--rerank", type=int, nargs="*", metavar="K", help="also re-rank (k-reciprocal), with k1 and k2 (default: 20 6)"
    )
    add("--json", type=Path, metavar="FILE.json", help="write the results to a file")
    add("--features", type=Path, metavar="FILE.npz", help="write the features of query and gallery to a file")
    args = parser.parse_args(argv)
    if args.rerank and (len(args.rerank) != 2 or min(args.rerank) < 1):
        parser.error("--rerank takes k1 and k2, both at least 1, or nothing for 20 and 6")
    for file, suffix in ((args.json, ".json"), (args.features, ".npz")):
        if file and (file.suffix != suffix or not file.parent.is_dir()):
            parser.error(f"cannot write {file}: give a name that ends in {suffix}, in a directory that exists")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # Model, and the dataset and prompt it was trained with.
    device = setup(args.device)
    path = args.checkpoint or checkpoint.newest()
    state = checkpoint.load(path)
    model = restore_model(state).to(device, memory_format=torch.channels_last)
    trained_on, prompt = state["args"]["dataset"], args.prompt or model.default_prompt
    print(f"checkpoint {path}: {state['args']['backbone']} trained on {trained_on}, epoch {state['epoch']}")

    # Data. Evaluation does not need the training images.
    name = args.dataset or trained_on
    dataset = data.load_dataset(name, args.data_root, ("query", "gallery"))
    print(data.summary(dataset))
    if name != trained_on:
        print(f"cross-domain: trained on {trained_on}, evaluated on {name}")

    # Features, by all processes of torchrun. The first process does the rest.
    workers = default_workers(device) if args.workers is None else args.workers
    features = extract_dataset(model, dataset, prompt, workers)
    if rank() > 0:
        return
    query, gallery = features["query"], features["gallery"]
    space = {"prompt": prompt, "checkpoint": str(path), "image_size": list(model.image_size)}
    if args.features:
        write_features(args.features, dataset, query, gallery, space)

    # Metrics, and thresholds for verifying pairs. Written before re-ranking, which may run out of memory.
    result = {**features, **rank_dataset(dataset, query, gallery)}
    print(f"{name}, {prompt} prompt: {describe(result)}")
    report = {key: result[key] for key in (*METRICS, "images_per_second", "queries_skipped")}
    report["pairs"] = compare_pairs(query, gallery, *ids_and_cameras(dataset, query.device))
    print(describe_pairs(report["pairs"]))
    report |= {"dataset": name, "dataset_version": dataset.version, "trained_on": trained_on, **space}
    if args.json:
        checkpoint.write_json(report, args.json)

    # Re-ranking is reported separately: published results are usually without it.
    if args.rerank is not None:
        count = len(query) + len(gallery)
        print(f"re-ranking compares {count:,} images with each other: about {0.3 + 8e-6 * count:.1f} GB of memory")
        result = rank_dataset(dataset, query, gallery, k_reciprocal(query, gallery, *args.rerank))
        print(f"{name}, {prompt} prompt, re-ranked: {describe(result)}")
        if args.json:
            checkpoint.write_json({**report, "reranked": {key: result[key] for key in METRICS}}, args.json)


if __name__ == "__main__":
    run_script(main)
