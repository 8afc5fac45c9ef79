"""Scores a trained checkpoint: features of query and gallery -> CMC and mAP.

python evaluate.py                                   the newest run, with the prompt it was trained with
python evaluate.py --prompt simplified               "A photo of a person" for everybody: the fast way
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

import clip
import data
from model import PromptSG

CHECKPOINT_VERSION = 1
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# -------------------------------------------------------------------------------------------------- scoring


def show_progress(done: int, total: int, what: str) -> None:
    """A line that overwrites itself, on terminals."""
    if sys.stderr.isatty():
        end = "\r\033[K" if done == total else ""
        print(f"\r{done} of {total} {what}", end=end, file=sys.stderr, flush=True)


def rank_metrics(
    query: Tensor, gallery: Tensor, query_ids: Tensor, gallery_ids: Tensor, query_cams: Tensor, gallery_cams: Tensor
) -> dict:
    """mAP and CMC as the bag-of-tricks baseline [24] computes them: {"mAP": float, "cmc": Tensor (G without junk,)}.

    query (Q, D), gallery (G, D): L2-normalised features. ids and cams (Q,) or (G,): integers; identity -1 is junk.
    For each query, pictures of its own identity by its own camera, and junk, count neither as right nor as wrong.
    A query without any right picture is left out of the mean. cmc[k - 1] is the share of queries with a right picture
    among the first k. AP is the mean, over the right pictures, of the precision at their rank. Of equally similar
    pictures the wrong ones come first, so that no order of the gallery can flatter a model.

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

    average_precisions, first_ranks = [], []
    chunk, begun = 1 + 2**25 // (1 + len(gallery)), time.perf_counter()  # 128 MB of similarities at a time
    for begin in range(0, len(query), chunk):
        similarities = query[begin : begin + chunk] @ gallery.T  # (chunk, G)
        for i, similarity in enumerate(similarities, begin):
            own = slice(starts[i], stops[i])
            right = similarity[own][gallery_cams[own] != query_cams[i]].sort().values  # ascending
            if len(right) == 0:
                continue
            similarity[own] = -torch.inf  # what is left are the wrong pictures
            wrong = similarity[similarity >= right[0]]  # those before any right one
            passed = torch.searchsorted(right, wrong, right=True)  # right pictures that each wrong one passes
            wrong_before = passed.bincount(minlength=len(right) + 1).flip(0).cumsum(0)[:-1]  # the best right one first
            right_until = torch.arange(1, len(right) + 1, device=right.device)
            average_precisions.append((right_until / (right_until + wrong_before)).double().mean())
            first_ranks.append(wrong_before[0])
        if time.perf_counter() - begun > 5:
            show_progress(begin + len(similarities), len(query), "queries ranked")
    if not first_ranks:
        raise ValueError("no query has a picture of its identity by another camera in the gallery: nothing to score")
    cmc = torch.stack(first_ranks).bincount(minlength=len(gallery)).cumsum(0) / len(first_ranks)
    return {"mAP": torch.stack(average_precisions).mean().item(), "cmc": cmc.cpu()}


@torch.inference_mode()
def extract(embed: Callable[[Tensor], Tensor], loader: DataLoader, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Features (N, D), float32 on the device, of a loader's N pictures in its order; a progress line on terminals."""
    features, done = [], 0
    for images, _ in loader:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features.append(embed(data.normalize(images.to(device, non_blocking=True))).float())
        done += len(images)
        show_progress(done, len(loader.dataset), "pictures")
    return torch.cat(features)


def score(model: PromptSG, dataset: data.Dataset, prompt: str, args: argparse.Namespace) -> dict:
    """Scores a model on query and gallery: {"mAP", "rank1", "rank5", "rank10"} from 0 to 1, and "images_per_second".

    args: image_size, eval_batch_size, workers, device, precision, as the scripts' flags of these names.
    """
    device = torch.device(args.device)
    was_training = model.training
    model.eval()
    samples = dataset.query + dataset.gallery
    loader = data.test_loader(samples, args.image_size, args.eval_batch_size, args.workers)
    start = time.perf_counter()
    features = extract(lambda images: model.embed(images, prompt), loader, device, PRECISIONS[args.precision])
    ids, cams = torch.tensor([(sample.pid, sample.camid) for sample in samples], device=device).T.contiguous()
    seconds = time.perf_counter() - start  # the copy to the device above has waited for the features
    Q = len(dataset.query)
    metrics = rank_metrics(features[:Q], features[Q:], ids[:Q], ids[Q:], cams[:Q], cams[Q:])
    model.train(was_training)
    cmc = metrics["cmc"]
    ranks = {f"rank{k}": cmc[min(k, len(cmc)) - 1].item() for k in (1, 5, 10)}
    return {"mAP": metrics["mAP"], **ranks, "images_per_second": len(samples) / seconds}


@torch.inference_mode()
def measure_speed(model: PromptSG, args: argparse.Namespace, repetitions: int = 5) -> dict[str, float]:
    """Images a second of Table 5: the visual encoder alone, and with the text features of either prompt (model only,
    the pictures already on the device). The three take turns, and the medians count, so that a busy machine is fair.
    """
    device, dtype = torch.device(args.device), PRECISIONS[args.precision]
    batch = 32 if device.type == "cpu" else args.eval_batch_size
    images = torch.randn(batch, 3, *args.image_size, device=device)
    ways = {
        "visual encoder": lambda: model.clip.encode_image(images).embedding,
        "simplified": lambda: model.embed(images, "simplified"),
        "composed": lambda: model.embed(images, "composed"),
    }
    if model.inversion is None:
        del ways["composed"]
    seconds = {name: [] for name in ways}
    for _ in range(1 + repetitions):
        for name, way in ways.items():
            start = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                way().sum().item()  # waits for the device
            seconds[name].append(time.perf_counter() - start)
    return {name: batch / statistics.median(times[1:]) for name, times in seconds.items()}  # the first warms up


def describe(result: dict) -> str:
    """One line for people."""
    ranks = "  ".join(f"Rank-{k} {result[f'rank{k}']:.1%}" for k in (1, 5, 10))
    return f"mAP {result['mAP']:.1%}  {ranks}  ({result['images_per_second']:.0f} images/s)"


# ---------------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(path: Path) -> dict:
    """What train.py saved. FileNotFoundError if there is none, ValueError if it is damaged or something else."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: give the path of a run's last.pt or best.pt, or train first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever it stumbles over in a file that is not its own
        raise ValueError(f"{path} is damaged or no checkpoint of train.py ({clip.one_line(error)})") from error
    if not isinstance(checkpoint, dict) or "version" not in checkpoint:
        raise ValueError(f"{path} was not written by train.py: give the path of a run's last.pt or best.pt")
    if checkpoint["version"] != CHECKPOINT_VERSION:
        raise ValueError(
            f"{path} is of version {checkpoint['version']}, this code reads {CHECKPOINT_VERSION}: train anew"
        )
    return checkpoint


def restore_model(checkpoint: dict) -> PromptSG:
    """The model of a checkpoint, in eval mode; its sizes are read off the weights.

    Raises ValueError if the weights do not fit the settings saved with them.
    """
    weights, settings = checkpoint["model"], checkpoint["args"]
    clip_weights = {name.removeprefix("clip."): tensor for name, tensor in weights.items() if name.startswith("clip.")}
    try:
        clip_model = clip.CLIP(**clip.read_sizes(clip_weights), image_size=tuple(settings["image_size"]))
        num_identities = len(weights["classifier.weight"])
        model = PromptSG(clip_model, num_identities, **ablations(argparse.Namespace(**settings)))
        model.load_state_dict(weights)
    except (KeyError, AttributeError, RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"the checkpoint's weights do not fit its settings ({clip.one_line(error)})") from error
    return model.eval()


def ablations(args: argparse.Namespace) -> dict:
    """PromptSG's keyword arguments, from train.py's flags."""
    return {
        "blocks": args.blocks,
        "interaction": not (args.baseline or args.without_interaction),
        "inversion": not args.baseline and args.train_prompt == "composed",
        "composed_prompt": args.composed_prompt,
    }


def newest_checkpoint(runs: Path = Path("runs")) -> Path:
    """The last.pt written last below `runs`; FileNotFoundError if there is none."""
    checkpoints = sorted(runs.glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise FileNotFoundError("no run in runs/ yet: train one, or give --checkpoint PATH")
    return checkpoints[-1]


# -------------------------------------------------------------------------------------------- command line


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that train.py and evaluate.py share: where the data are and what to compute with."""
    parser.add_argument("--cuhk03-detected", action="store_true", help="CUHK03-NP's detected boxes, not the labeled")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the datasets")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:1")
    parser.add_argument("--precision", choices=PRECISIONS, help="None: bf16 on CUDA, fp32 on a CPU")
    parser.add_argument("--workers", type=int, help="loader processes; None: up to 8 on CUDA, 0 on a CPU")
    parser.add_argument("--eval-batch-size", type=int, default=128, help="pictures at a time when scoring")


def check_machine_flags(args: argparse.Namespace) -> None:
    """Fills in --precision and --workers, applies --cuhk03-detected. ValueError for an impossible device or number."""
    try:
        if torch.device(args.device).type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.zeros(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device} is not usable here ({clip.one_line(error)})") from error
    if args.cuhk03_detected:
        if args.dataset not in ("cuhk03", "cuhk03-detected"):
            raise ValueError("--cuhk03-detected goes with --dataset cuhk03")
        args.dataset = "cuhk03-detected"
    on_cpu = torch.device(args.device).type == "cpu"
    if args.workers is None:
        args.workers = 0 if on_cpu else min(8, os.cpu_count())  # on a CPU they would only compete with the model
    if args.precision is None:
        args.precision = "fp32" if on_cpu else "bf16"
    if not 0 <= args.workers <= 256 or args.eval_batch_size < 1:
        raise ValueError("--workers must be at least 0 and at most 256, --eval-batch-size at least 1")
    if args.precision == "fp16" and on_cpu:
        raise ValueError("--precision fp16 needs CUDA: use fp32 or bf16")
    torch.set_float32_matmul_precision("high")


def exit_on_error(main: Callable[[], None]) -> None:
    """Runs a script; what a user can mend is one line on stderr and exit status 1, not a traceback."""
    try:
        main()
    except (OSError, ValueError) as error:
        # A loader process wraps its error into a traceback, whose last line is the message.
        sys.exit("error: " + str(error).strip().splitlines()[-1].removeprefix(f"{type(error).__name__}: "))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning."""
    parser = argparse.ArgumentParser(
        description="Score a trained PromptSG.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, help="None: last.pt of the newest run in runs/")
    parser.add_argument("--prompt", choices=("composed", "simplified"), help="None: the one trained with")
    parser.add_argument("--dataset", choices=data.NAMES, help="None: the one trained on")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores there, too")
    add_machine_flags(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_machine_flags(args)
    if args.json and not args.json.parent.is_dir():
        raise FileNotFoundError(f"--json {args.json}: there is no folder {args.json.parent}")
    path = args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(path)
    settings = checkpoint["args"]
    print(f"checkpoint {path}: {settings['backbone']} trained on {settings['dataset']}, epoch {checkpoint['epoch']}")
    model = restore_model(checkpoint).to(args.device)
    args.image_size = tuple(settings["image_size"])
    args.dataset = args.dataset or settings["dataset"]
    args.prompt = args.prompt or ("composed" if model.inversion else "simplified")
    dataset = data.load_dataset(args.dataset, args.data_root)
    print(data.summary(dataset))
    result = score(model, dataset, args.prompt, args)
    print(f"{args.dataset}, {args.prompt} prompt: {describe(result)}")
    speeds = measure_speed(model, args)
    alone = speeds["visual encoder"]
    table = [f"{name} {speed:.0f} images/s ({speed / alone:.2f}x)" for name, speed in speeds.items()]
    print(f"the model alone (Table 5): {', '.join(table)}")
    if args.json:
        report = {**result, "prompt": args.prompt, "dataset": args.dataset, "checkpoint": str(path)}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    exit_on_error(main)
