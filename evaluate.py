"""Scores a trained checkpoint (features of query and gallery -> CMC and mAP), shows what it sees, and puts it to use.

python evaluate.py                                   the newest run, with the prompt it was trained with
python evaluate.py --prompt simplified               "A photo of a person" for everybody: the fast way
python evaluate.py --attention-maps out              where the prompts look
python evaluate.py --images folder --search one.jpg  the pictures most like one

All else that one does with a trained model is here, too: re-ranking, ranked lists, features to a file, export.
"""

import argparse
import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms import v2
from torchvision.utils import make_grid

import clip
import data
from model import PromptSG

CHECKPOINT_VERSION = 1
SCORES = ("mAP", "rank1", "rank5", "rank10")
PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
BACKBONES = {"vit": "ViT-B/16", "resnet": "RN50", "tiny": "tiny"}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# -------------------------------------------------------------------------------------------------- scoring


def show_progress(done: int, total: int, what: str) -> None:
    """A line that overwrites itself, on terminals."""
    if sys.stderr.isatty() and process_number() == 0:
        end = "\r\033[K" if done == total else ""
        print(f"\r{done} of {total} {what}", end=end, file=sys.stderr, flush=True)


def rank_metrics(
    query: Tensor,
    gallery: Tensor,
    query_ids: Tensor,
    gallery_ids: Tensor,
    query_cams: Tensor,
    gallery_cams: Tensor,
    rows: Callable[[int, int], Tensor] | None = None,
) -> dict:
    """mAP and CMC as the bag-of-tricks baseline [24] computes them.

    query (Q, D), gallery (G, D): L2-normalised features. ids and cams (Q,) or (G,): integers; identity -1 is junk.
    rows: similarities to rank by instead of the cosine, as `k_reciprocal` gives them.
    Returns {"mAP": float, "cmc": Tensor (G without junk,), "ap": Tensor (Q,), NaN for a query left out}.

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

    ap, first_ranks = query.new_full((len(query),), torch.nan, dtype=torch.double), []
    chunk, begun = 1 + 2**25 // (1 + len(gallery)), time.perf_counter()  # 128 MB of similarities at a time
    for begin in range(0, len(query), chunk):
        end = min(begin + chunk, len(query))
        similarities = rows(begin, end)[:, order] if rows else query[begin:end] @ gallery.T  # (chunk, G)
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
            ap[i] = (right_until / (right_until + wrong_before)).double().mean()
            first_ranks.append(wrong_before[0])
        if time.perf_counter() - begun > 5:
            show_progress(end, len(query), "queries ranked")
    if not first_ranks:
        raise ValueError("no query has a picture of its identity by another camera in the gallery: nothing to score")
    cmc = torch.stack(first_ranks).bincount(minlength=len(gallery)).cumsum(0) / len(first_ranks)
    return {"mAP": ap.nanmean().item(), "cmc": cmc.cpu(), "ap": ap.cpu()}


@torch.inference_mode()
def extract(embed: Callable[[Tensor], Tensor], samples: list[data.Sample], args: argparse.Namespace) -> Tensor:
    """What `embed` makes of the pictures of samples, (N, D), float32 on the device; a progress line on terminals.

    The pictures are dealt out to the processes in turn; every process returns the features of all of them.
    args: image_size, eval_batch_size, workers, device, precision, as the scripts' flags of these names.
    """
    features, done, device, dtype = [], 0, torch.device(args.device), PRECISIONS[args.precision]
    even = samples + samples[:1] * (-len(samples) % processes())
    own = even[process_number() :: processes()]
    for images, _ in data.test_loader(own, args.image_size, args.eval_batch_size, args.workers):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            features.append(embed(data.normalize(images.to(device, non_blocking=True))).float())
        done += len(images)
        show_progress(done, len(own), "pictures")
    in_turn = gather(torch.cat(features)).unflatten(0, (processes(), len(own))).transpose(0, 1)
    return in_turn.flatten(0, 1)[: len(samples)]


def labels_of(samples: list[data.Sample], device: torch.device | str) -> Tensor:
    """Identities and cameras: (2, N)"""
    return torch.tensor([(sample.pid, sample.camid) for sample in samples], device=device).T.contiguous()


def score(model: PromptSG, dataset: data.Dataset, prompt: str, args: argparse.Namespace) -> dict:
    """Scores a model on query and gallery; args as in `extract`.

    Returns "mAP", "rank1", "rank5", "rank10" from 0 to 1, "images_per_second", the features "query" (Q, D) and
    "gallery" (G, D), and what else `rank_metrics` gives.
    """
    was_training = model.training
    model.eval()
    samples, start = dataset.query + dataset.gallery, time.perf_counter()
    features = extract(lambda images: model.embed(images, prompt), samples, args)
    query, gallery = features.split([len(dataset.query), len(dataset.gallery)])
    if features.is_cuda:
        torch.cuda.synchronize()
    speed = len(samples) / (time.perf_counter() - start)
    model.train(was_training)
    return {**rank(query, gallery, dataset), "images_per_second": speed, "query": query, "gallery": gallery}


def rank(query: Tensor, gallery: Tensor, dataset: data.Dataset, rows: Callable | None = None) -> dict:
    """`rank_metrics` of a dataset's features, with "rank1", "rank5" and "rank10" besides."""
    (query_ids, query_cams), (gallery_ids, gallery_cams) = (
        labels_of(samples, query.device) for samples in (dataset.query, dataset.gallery)
    )
    metrics = rank_metrics(query, gallery, query_ids, gallery_ids, query_cams, gallery_cams, rows)
    cmc = metrics["cmc"]
    return {**metrics, **{f"rank{k}": cmc[min(k, len(cmc)) - 1].item() for k in (1, 5, 10)}}


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


def print_speed(model: PromptSG, args: argparse.Namespace) -> None:
    """`measure_speed` for people, as multiples of the visual encoder's."""
    speeds = measure_speed(model, args)
    alone = speeds["visual encoder"]
    table = [f"{name} {speed:.0f} images/s ({speed / alone:.2f}x)" for name, speed in speeds.items()]
    print(f"the model alone (Table 5): {', '.join(table)}")


def describe(result: dict) -> str:
    """One line for people."""
    ranks = "  ".join(f"Rank-{k} {result[f'rank{k}']:.1%}" for k in (1, 5, 10))
    speed = f"  ({result['images_per_second']:.0f} images/s)" if "images_per_second" in result else ""
    return f"mAP {result['mAP']:.1%}  {ranks}{speed}"


# ---------------------------------------------------------------------------------------------- re-ranking


def cosine(query: Tensor, gallery: Tensor) -> Callable[[int, int], Tensor]:
    """The plain ranking as `rows`: similarities of the queries begin to end to the gallery, (end - begin, G)."""
    return lambda begin, end: query[begin:end] @ gallery.T


def k_reciprocal(
    query: Tensor, gallery: Tensor, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> Callable[[int, int], Tensor]:
    """Re-ranking with k-reciprocal encoding (Zhong et al., CVPR 2017), in that paper's symbols.

    query (Q, D), gallery (G, D): L2-normalised features. Returns the `rows` of `rank_metrics`: similarities of the
    queries begin to end to the gallery, (end - begin, G), which are -((1 - weight) * Jaccard distance + weight * d).
    As in the authors' code, d(i, j) is the squared Euclidean distance divided by the largest one of picture i.
    """
    features, Q, N = torch.cat([query, gallery]), len(query), len(query) + len(gallery)
    neighbours, farthest = find_neighbours(features, min(k1 + 1, N))
    # V, sparse: pictures i, in order, their neighbours j, and the weights V_ij.
    i, j, V = encode_neighbours(features, neighbours, farthest, half=round(k1 / 2) + 1)

    # Local query expansion: each row of V becomes the mean over those of the picture's k2 nearest.
    nearest = neighbours[:, :k2]
    first = torch.searchsorted(i, torch.arange(N + 1, device=i.device))  # where each row begins
    entries, counts = join_runs(first[nearest.flatten()], first[nearest.flatten() + 1])
    owner = torch.arange(N, device=i.device).repeat_interleave(nearest.shape[1]).repeat_interleave(counts)
    pairs, position = torch.unique(owner * N + j[entries], return_inverse=True)
    V = V.new_zeros(len(pairs)).index_add(0, position, V[entries] / nearest.shape[1])
    i, j = pairs // N, pairs % N

    # The gallery's part of V once more, by neighbour: the inverted index.
    first = torch.searchsorted(i, torch.arange(Q + 1, device=i.device)).tolist()
    order = first[Q] + j[first[Q] :].argsort(stable=True)
    first_of_neighbour = torch.searchsorted(j[order], torch.arange(N + 1, device=i.device))

    def rows(begin: int, end: int) -> Tensor:
        similarities = weight / farthest[begin:end, None] * (2 * query[begin:end] @ gallery.T - 2)
        for q, similarity in enumerate(similarities, begin):
            own = slice(first[q], first[q + 1])
            entries, counts = join_runs(first_of_neighbour[j[own]], first_of_neighbour[j[own] + 1])
            minima = torch.minimum(V[order[entries]], V[own].repeat_interleave(counts))
            overlap = similarity.new_zeros(N - Q).index_add(0, i[order[entries]] - Q, minima)  # sum of min(V_q, V_g)
            similarity -= (1 - weight) * (1 - overlap / (2 - overlap))
        return similarities

    return rows


def join_runs(starts: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers from each start to before its stop (R,), one run after the other (sum,), and their counts (R,)."""
    counts = stops - starts
    offsets = (starts - counts.cumsum(0) + counts).repeat_interleave(counts)
    return offsets + torch.arange(len(offsets), device=offsets.device), counts


def find_neighbours(features: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of every picture (N, D): its k nearest, itself first (N, k), and its largest squared distance (N,)."""
    N = len(features)
    neighbours = torch.empty(N, k, dtype=torch.long, device=features.device)
    farthest = features.new_empty(N)
    chunk = 1 + 2**25 // N  # 128 MB of similarities at a time
    for begin in range(0, N, chunk):
        part = slice(begin, begin + chunk)
        similarities = features[part] @ features.T  # (chunk, N)
        neighbours[part] = similarities.topk(k).indices
        farthest[part] = (2 - 2 * similarities.amin(dim=1)).clamp(min=1e-12)  # 0 if all pictures are the same
        show_progress(min(begin + chunk, N), N, "pictures compared")
    return neighbours, farthest


def encode_neighbours(
    features: Tensor, neighbours: Tensor, farthest: Tensor, half: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Every picture i's expanded k-reciprocal neighbours j, R* of Zhong et al., and weights ~ exp(-d(i, j)), of sum 1.

    Three tensors of one length, in the order of i.
    """
    N = len(features)

    def mutual(neighbours: Tensor) -> Tensor:
        """Which of a picture's neighbours (N, k) have it among their own: the k-reciprocal ones, (N, k)"""
        pictures = torch.arange(N, device=neighbours.device)
        parts = zip(neighbours.split(1024), pictures.split(1024))
        return torch.cat([(neighbours[part] == i[:, None, None]).any(dim=2) for part, i in parts])

    near, near_half = mutual(neighbours), mutual(neighbours[:, :half])
    encoded = []
    for begin in range(0, N, 1024):
        part = slice(begin, begin + 1024)
        R = neighbours[part].where(near[part], -1)  # (n, k), -1 for those not reciprocal
        theirs = neighbours[neighbours[part], :half]  # (n, k, half): what each of them could add
        is_theirs = near_half[neighbours[part]] & near[part].unsqueeze(2)
        shared = is_theirs & (theirs.unsqueeze(3) == R[:, None, None]).any(dim=3)
        added = 3 * shared.sum(dim=2) > 2 * is_theirs.sum(dim=2)  # (n, k): more than two thirds shared
        expansion = theirs.where(is_theirs & added.unsqueeze(2), -1).flatten(1)
        R = torch.cat([R, expansion], dim=1).sort(dim=1).values  # R*, with repetitions
        is_first = (R >= 0) & (R.diff(dim=1, prepend=torch.full_like(R[:, :1], -1)) > 0)
        i, j = is_first.nonzero()[:, 0] + begin, R[is_first]
        weights = ((2 * (features[i] * features[j]).sum(dim=1) - 2) / farthest[i]).exp()
        total = features.new_zeros(N).index_add(0, i, weights)
        encoded.append((i, j, weights / total[i]))
        show_progress(min(begin + 1024, N), N, "pictures encoded")
    return tuple(map(torch.cat, zip(*encoded)))


# ---------------------------------------------------------------------------------------- where a model looks


class RecordAttention(TorchFunctionMode):
    """While it lasts, attention over image tokens is computed in the open, and its probabilities are kept in `maps`:
    self-attention (B, heads, N, N), the interaction module's cross-attention (B, N), in the order of the layers.
    """

    def __init__(self):
        super().__init__()
        self.maps = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and not kwargs["is_causal"]:
            q, k, v = args
            self.maps.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1))
            return self.maps[-1] @ v
        result = function(*args, **(kwargs or {}))
        if function is Tensor.softmax:
            self.maps.append(result)
        return result


def relevance(model: PromptSG, images: Tensor, prompt: str) -> Tensor:
    """How much each token matters for the similarity of the image to its prompt: (B, 3, H, W) -> (B, 1 + M).

    Transformer relevance (Chefer, Gur and Wolf, ICCV 2021, which generalises the paper's [2]), for a ViT: from the
    first layer to the last, R <- R + E_heads[(dS/dA * A)^+] R, where A are attention probabilities. The cross-attention
    weights token i by a_i, so that its matrix is diagonal. S is the cosine of the text embedding to both of the image's
    representations, summed: v, which L_SupCon brings to it (Eq. 5), and z, which passes the interaction module.
    """
    with torch.no_grad():
        text = model.text_feature(model.clip.encode_image(images).embedding, prompt).expand(len(images), -1)
    with RecordAttention() as record:
        features = model.clip.encode_image(images)
        z = model.interact(features.tokens, text)
    similarity = F.cosine_similarity(features.embedding, text) + F.cosine_similarity(z, text)
    gradients = torch.autograd.grad(similarity.sum(), record.maps)
    identity = torch.eye(record.maps[0].shape[-1]).to(record.maps[0])
    R = identity
    for A, gradient in zip(record.maps, gradients):
        positive = (A * gradient).detach().clamp(min=0)
        R = R + (positive.mean(dim=1) @ R if A.dim() == 4 else positive.unsqueeze(2) * R)  # (B, 1 + M, 1 + M)
    return (R - identity).mean(dim=1)  # z is the mean of the last tokens; a token's relevance to itself tells nothing


def person_shares(dataset: data.Dataset, samples: list[data.Sample], grid: tuple[int, int]) -> Tensor:
    """The share of each patch that shows the person, from the demo data's masks: (N, M)."""
    paths = [dataset.folder / "masks" / f"{sample.path.stem}.png" for sample in samples]
    masks = torch.stack([data.read_picture(path, (256, 128))[:1] for path in paths])
    return F.adaptive_avg_pool2d(masks / 255, grid).flatten(1)


def attention_inside(
    model: PromptSG, dataset: data.Dataset, prompt: str, args: argparse.Namespace
) -> tuple[float, ...]:
    """On the demo's queries: the share of the patches' attention that lies on the person, how often its peak does, and
    what attention spread evenly would reach of the first.
    """
    inside = person_shares(dataset, dataset.query, model.clip.grid).to(args.device)
    attention = extract(lambda images: model.attention_map(images, prompt), dataset.query, args)[:, 1:]
    share = (attention * inside).sum(dim=1) / attention.sum(dim=1)
    peak = inside.gather(1, attention.argmax(dim=1, keepdim=True)) >= 0.5
    return share.mean().item(), peak.float().mean().item(), inside.mean().item()


def print_attention_inside(models: dict[str, PromptSG], dataset: data.Dataset, args: argparse.Namespace) -> None:
    """`attention_inside` of each model and prompt, for people."""
    for name, model in models.items():
        for prompt in ("simplified", "composed") if model.inversion else ("simplified",):
            share, peak, area = attention_inside(model, dataset, prompt, args)
            print(
                f"attention on the person, {name}, {prompt} prompt: {share:.1%} of it, "
                f"its peak in {peak:.1%} of the pictures (the person is {area:.1%} of a picture)"
            )


# --------------------------------------------------------------------------------------------------- pictures

TILE = (256, 128)  # height and width of a picture in our drawings
GREEN, RED, GREY = (0, 150, 60), (210, 30, 40), (120, 120, 120)
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # the "inferno" colour map


def tile(picture: Tensor, caption: str, frame: tuple[int, int, int] = GREY) -> Tensor:
    """A picture uint8 (3, 256, 128) in a coloured frame with a caption below: uint8 (3, 288, 136)"""
    height, width = TILE
    canvas = Image.new("RGB", (width + 8, height + 32), "white")
    canvas.paste(frame, (0, 0, width + 8, height + 8))
    canvas.paste(v2.functional.to_pil_image(picture), (4, 4))
    font = ImageFont.load_default(14)
    while font.getlength(caption) > width + 8:
        caption = caption[1:]  # the end of a long file name tells more
    ImageDraw.Draw(canvas).text((width // 2 + 4, height + 20), caption, "black", font, anchor="mm")
    return v2.functional.pil_to_tensor(canvas)


def heat(picture: Tensor, attention: Tensor) -> Tensor:
    """A map (h, w) over a picture uint8 (3, 256, 128), from its least (dark) to its greatest value (yellow)."""
    attention = (attention - attention.min()) / (attention.max() - attention.min()).clamp(min=1e-12)
    smooth = F.interpolate(attention.cpu()[None, None], TILE, mode="bicubic", align_corners=False)[0, 0]
    position = smooth.clamp(0, 1) * (len(HEAT) - 1)
    colours, below = torch.tensor(HEAT).float(), position.long().clamp(max=len(HEAT) - 2)
    colour = colours[below].lerp(colours[below + 1], (position - below).unsqueeze(2)).permute(2, 0, 1)
    grey = v2.functional.rgb_to_grayscale(picture, num_output_channels=3)
    return (0.4 * grey + 0.6 * colour).to(torch.uint8)


def save_sheets(rows: list[list[Tensor]], stem: Path, rows_a_sheet: int = 8) -> None:
    """Draws rows of tiles, STEM-1.png and so on, and says where."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    for number, begin in enumerate(range(0, len(rows), rows_a_sheet), 1):
        part = rows[begin : begin + rows_a_sheet]
        columns = max(map(len, part))
        blank = torch.full_like(part[0][0], 255)
        tiles = [drawn for row in part for drawn in row + [blank] * (columns - len(row))]
        path = stem.with_name(f"{stem.name}-{number}.png")
        v2.functional.to_pil_image(make_grid(tiles, columns, padding=6, pad_value=255)).save(path)
        print(f"drawn: {path}")


def choose_queries(ap: Tensor, order: str, count: int) -> list[int]:
    """The `count` queries with the lowest AP (Q,), the worst first, or as many at random; those with none left out."""
    scored = ap.isfinite().nonzero().flatten()
    if order == "random":
        scored = scored[torch.randperm(len(scored), generator=torch.Generator().manual_seed(0))]
    else:
        scored = scored[ap[scored].argsort(stable=True)]
    return scored[:count].tolist()


def draw_ranked_lists(
    dataset: data.Dataset, rows: Callable[[int, int], Tensor], queries: list[int], stem: Path
) -> None:
    """Each query and its ten best, framed green if right and red if wrong; junk is left out."""
    drawing = []
    for q in queries:
        query = dataset.query[q]
        is_junk = [(sample.pid, sample.camid) == (query.pid, query.camid) for sample in dataset.gallery]
        similarity = rows(q, q + 1)[0].cpu().masked_fill(torch.tensor(is_junk), -torch.inf)
        tiles = [tile(data.read_picture(query.path, TILE), f"query {query.pid} c{query.camid}")]
        for value, g in zip(*(column.tolist() for column in similarity.topk(min(10, len(similarity))))):
            sample = dataset.gallery[g]
            if value > -torch.inf:
                caption = f"{value:.2f}: {sample.pid} c{sample.camid}"
                picture = data.read_picture(sample.path, TILE)
                tiles.append(tile(picture, caption, GREEN if sample.pid == query.pid else RED))
        drawing.append(tiles)
    save_sheets(drawing, stem)


def draw_attention(model: PromptSG, samples: list[data.Sample], args: argparse.Namespace, stem: Path) -> None:
    """Figure 4 for our model: each picture, where either prompt looks, and, for a ViT, the transformer relevance."""
    prompts = ("simplified", "composed") if model.inversion else ("simplified",)
    is_vit, drawing = isinstance(model.clip.visual, clip.VisionTransformer), []
    for sample in samples:
        picture = data.read_picture(sample.path, TILE)
        image = data.normalize(data.read_picture(sample.path, args.image_size)[None].to(args.device))
        with torch.inference_mode():
            maps = {prompt: model.attention_map(image, prompt) for prompt in prompts}
        if is_vit:
            maps["relevance"] = relevance(model, image, prompts[-1])
        patches = {name: heat(picture, tokens[0, 1:].view(model.clip.grid)) for name, tokens in maps.items()}
        drawing.append([tile(picture, sample.path.stem), *(tile(map, name) for name, map in patches.items())])
    save_sheets(drawing, stem)


def draw_search(query: data.Sample, samples: list[data.Sample], similarity: Tensor, stem: Path) -> None:
    """Prints and draws the ten best matches of similarity (N,)."""
    tiles = [tile(data.read_picture(query.path, TILE), "query")]
    for value, n in zip(*(column.tolist() for column in similarity.topk(min(10, len(similarity))))):
        print(f"{value:.3f}  {samples[n].path}")
        tiles.append(tile(data.read_picture(samples[n].path, TILE), f"{value:.2f}: {samples[n].path.stem}"))
    save_sheets([tiles], stem)


COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))


def draw_curves(log: list[dict], path: Path) -> None:
    """The training curves, a PNG of 1200 x 420: loss terms, and mAP and Rank-1, over the epochs of a run's log."""
    panels = {
        "loss terms (Eq. 10)": {"loss": "loss", "triplet": "loss_triplet", "ID": "loss_id", "SupCon": "loss_supcon"},
        "score on the test split, %": {"mAP": "mAP", "Rank-1": "rank1"},
    }
    picture = Image.new("RGB", (2400, 840), "white")  # drawn at twice the size: lines come out smooth
    for panel, (title, keys) in enumerate(panels.items()):
        scale = 100 if "%" in title else 1
        curves = {
            name: [(line["epoch"], scale * line[key]) for line in log if key in line] for name, key in keys.items()
        }
        if any(curves.values()):
            draw_panel(ImageDraw.Draw(picture), 1200 * panel, title, curves)
    picture.resize((1200, 420), Image.Resampling.LANCZOS).save(path)


def draw_panel(draw: ImageDraw.ImageDraw, left: int, title: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    """One pair of axes from 0, 1200 x 840, with named curves of (epoch, value)."""
    font = ImageFont.load_default(30)
    x0, x1, y0, y1 = left + 130, left + 1160, 730, 90
    x_ticks, y_ticks = (
        round_ticks(max(axis)) for axis in zip(*(point for curve in curves.values() for point in curve))
    )

    def at(epoch: float, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * epoch / x_ticks[-1], y0 + (y1 - y0) * value / y_ticks[-1]

    draw.text((x0, 40), title, "black", font, anchor="lm")
    draw.text((x1, 810), "epoch", "black", font, anchor="rm")
    for tick in y_ticks:
        draw.line([at(0, tick), at(x_ticks[-1], tick)], (225, 225, 225), 2)
        draw.text((x0 - 16, at(0, tick)[1]), f"{tick:g}", "black", font, anchor="rm")
    for tick in x_ticks:
        draw.text((at(tick, 0)[0], y0 + 34), f"{tick:g}", "black", font, anchor="mm")
    draw.line([at(0, y_ticks[-1]), at(0, 0), at(x_ticks[-1], 0)], "black", 3)
    for number, (name, curve) in enumerate(curves.items()):
        draw.line([at(*point) for point in curve], COLOURS[number], 5, joint="curve")
        for x, y in (at(*point) for point in curve):
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], COLOURS[number])
        x, y = x1 - 180 * (len(curves) - number) + 60, 40
        draw.line([(x - 60, y), (x - 15, y)], COLOURS[number], 8)
        draw.text((x, y), name, "black", font, anchor="lm")


def round_ticks(greatest: float) -> list[float]:
    """Four to eight round numbers from 0 to at least `greatest`."""
    greatest = greatest or 1
    step = 10 ** math.floor(math.log10(greatest / 2))
    step *= next(factor for factor in (0.5, 1, 2, 5) if greatest / (step * factor) <= 7)
    return [step * i for i in range(math.ceil(greatest / step) + 1)]


# ------------------------------------------------------------------------- one process, or several (torchrun)


def join_processes(args: argparse.Namespace) -> None:
    """Under torchrun: meets the other processes, takes a GPU of its own, and falls silent unless it is the first."""
    if "LOCAL_RANK" not in os.environ:
        return
    if args.device == "cuda":
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    dist.init_process_group("gloo" if args.device == "cpu" else "cpu:gloo,cuda:nccl")
    if process_number() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, for as long as the process lives


def leave_processes() -> bool:
    """Parts from the other processes; True for the first one, which goes on alone."""
    is_first = process_number() == 0
    if dist.is_initialized():
        dist.destroy_process_group()
    return is_first


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def process_number() -> int:
    """From 0 on; the first one prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """The rows of x (B, ...) of all processes, the first process's first: (processes * B, ...).

    Only a process's own rows carry gradient. If each computes the same loss from all rows, the sum of the processes'
    gradients is the gradient of that loss.
    """
    if processes() == 1:
        return x
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(processes())]
    dist.all_gather(parts, own)
    parts[process_number()] = x
    return torch.cat(parts)


def agree(number: int | None) -> int | None:
    """The largest of the processes' numbers, or None if none has one."""
    if processes() == 1:
        return number
    largest = torch.tensor(number or 0)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item() or None


def distribute(model: nn.Module) -> nn.Module:
    """The model as training calls it: with several processes, batch statistics and gradients are of all of them."""
    if processes() == 1:
        return model
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.forward = functools.partial(synchronised_batch_norm, module)
    parallel = nn.parallel.DistributedDataParallel(model)
    # The sum, where its default is the mean: see `gather`.
    parallel.register_comm_hook(
        None,
        lambda _, bucket: dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda f: f.value()[0]),
    )
    return parallel


class SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    backward = forward  # every process's result depends on every process's x


def synchronised_batch_norm(module: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """torch's SyncBatchNorm, which runs on GPUs only, for the CPU: (B, C, ...) -> (B, C, ...)"""
    if not module.training:
        return type(module).forward(module, x)
    axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
    count = processes() * x.numel() // x.shape[1]
    mean = SumOverProcesses.apply(x.sum(axes)) / count
    centred = x - mean.view(shape)
    variance = SumOverProcesses.apply((centred**2).sum(axes)) / count
    with torch.no_grad():
        module.running_mean.lerp_(mean, module.momentum)
        module.running_var.lerp_(variance * count / (count - 1), module.momentum)
        module.num_batches_tracked += 1
    return centred * (module.weight / (variance + module.eps).sqrt()).view(shape) + module.bias.view(shape)


# ------------------------------------------------------------------------------------- models and checkpoints


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


def build_model(args: argparse.Namespace, num_identities: int) -> PromptSG:
    """CLIP with its weights, and PromptSG around it, new modules initialised from the seed."""
    name = BACKBONES[args.backbone]
    if name == "tiny" and args.clip_weights not in (None, "random"):
        raise ValueError("--backbone tiny has random weights: leave --clip-weights away")
    if name == "tiny" or args.clip_weights == "random":
        clip_model = clip.untrained(name, tuple(args.image_size), args.seed)
        if name != "tiny":
            print("WARNING: CLIP starts from RANDOM weights (--clip-weights random): the results will mean nothing")
    else:
        clip_model = clip.load(args.clip_weights or name, tuple(args.image_size))
        if isinstance(clip_model.visual, clip.VisionTransformer) != (name == "ViT-B/16"):
            raise ValueError(f"--clip-weights {args.clip_weights} are not those of --backbone {args.backbone}")
    torch.manual_seed(args.seed)
    return PromptSG(clip_model, num_identities, **ablations(args))


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


# ------------------------------------------------------------------------------------------ features to go


class ImageToFeature(nn.Module):
    """PromptSG with the simplified prompt, whose text feature is a constant: a plain function of the picture."""

    def __init__(self, model: PromptSG):
        super().__init__()
        self.visual, self.interaction, self.bnneck = model.clip.visual, model.interaction, model.bnneck
        self.register_buffer("text", model.simplified_text)
        for name, values in (("mean", data.CLIP_MEAN), ("std", data.CLIP_STD)):
            self.register_buffer(name, torch.tensor(values, device=self.text.device).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """RGB uint8 (B, 3, H, W) -> L2-normalised features (B, D)"""
        tokens = self.visual((images / 255 - self.mean) / self.std).tokens
        z = self.interaction(self.text, tokens) if self.interaction else tokens[:, 0]
        return F.normalize(self.bnneck(z), dim=1)


@torch.no_grad()
def export(model: PromptSG, image_size: tuple[int, int], path: Path) -> None:
    """Writes ImageToFeature with torch.export, for batches of any size, reads it again and compares the two.

    Raises ValueError if they differ by more than 1e-5.
    """
    device = model.simplified_text.device
    few, more = (torch.randint(0, 256, (B, 3, *image_size), dtype=torch.uint8, device=device) for B in (2, 5))
    batch = torch.export.Dim("batch")
    program = torch.export.export(ImageToFeature(model).eval(), (few,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)
    reloaded = torch.export.load(path).module()
    difference = (reloaded(more) - model.embed(data.normalize(more), "simplified")).abs().max().item()
    if not difference <= 1e-5:
        raise ValueError(f"{path} differs from the model by {difference:.1e}: do not use it, and please report this")
    height, width = image_size
    print(
        f"exported to {path}: RGB uint8 (B, 3, {height}, {width}) -> (B, {len(model.bnneck.weight)}); "
        f"differs from the model by {difference:.0e}; use it: torch.export.load({str(path)!r}).module()"
    )


def write_features(path: Path, dataset: data.Dataset, query: Tensor, gallery: Tensor) -> None:
    """Names, identities, cameras and features of query (Q, D) and gallery (G, D) into one .npz."""
    arrays = {}
    for subset, features in (("query", query), ("gallery", gallery)):
        samples = getattr(dataset, subset)
        arrays[f"{subset}_names"] = [sample.path.name for sample in samples]
        arrays[f"{subset}_ids"], arrays[f"{subset}_cams"] = labels_of(samples, "cpu").numpy()
        arrays[f"{subset}_features"] = features.cpu().numpy()
    write_arrays(path, arrays)


def write_arrays(path: Path, arrays: dict) -> None:
    """An .npz of exactly this name, where np.savez would add its own suffix."""
    with path.open("wb") as file:
        np.savez(file, **arrays)
    print(f"features written to {path}: arrays {', '.join(arrays)}")


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
        cores = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        args.workers = 0 if on_cpu else min(8, cores)  # on a CPU they would only compete with the model
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
        description="Score a trained PromptSG, look at it, use it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, help="None: last.pt of the newest run in runs/")
    add("--prompt", choices=("composed", "simplified"), help="None: the one trained with")
    add("--dataset", choices=data.NAMES, help="None: the one trained on")
    add("--rerank", action="store_true", help="score again with k-reciprocal re-ranking (Zhong et al., 2017)")
    add("--json", type=Path, metavar="FILE", help="write the scores there, too")

    add = parser.add_argument_group("look at it").add_argument
    add("--ranked-lists", type=Path, metavar="DIR", help="draw queries with their ten best")
    add("--attention-maps", type=Path, metavar="DIR", help="draw where queries, or --images, are looked at")
    add("--count", type=int, default=8, help="how many queries to draw")
    add("--queries", choices=("worst", "random"), default="worst", help="which queries to draw")

    add = parser.add_argument_group("use it").add_argument
    add("--features", type=Path, metavar="FILE.npz", help="write the features of query and gallery, or of --images")
    add("--images", type=Path, nargs="+", metavar="PATH", help="your own pictures, files or folders")
    add("--search", type=Path, metavar="PICTURE", help="print and draw the ten of --images most like this one")
    add("--export", type=Path, metavar="FILE.pt2", help="write image -> feature with torch.export; simplified prompt")
    add_machine_flags(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError, in one line and before any work, for what cannot be."""
    check_machine_flags(args)
    for flag, file in (("--json", args.json), ("--features", args.features), ("--export", args.export)):
        if file and not file.parent.is_dir():
            raise FileNotFoundError(f"{flag} {file}: there is no folder {file.parent}")
    if args.count < 1:
        raise ValueError("--count must be at least 1")
    if args.search and not args.images:
        raise ValueError("--search needs --images: the pictures to search in")
    if args.images and not (args.features or args.search or args.attention_maps):
        raise ValueError("--images goes with --features, --search or --attention-maps: say which")
    if (args.images or args.export) and (args.dataset or args.rerank or args.ranked_lists or args.json):
        raise ValueError(
            "--images and --export score nothing: leave --dataset, --rerank, --ranked-lists and --json away"
        )
    if args.export and not args.images and (args.features or args.attention_maps):
        raise ValueError("--export reads no dataset: leave --features and --attention-maps away, or give --images")
    if args.export and args.prompt == "composed":
        raise ValueError("--export writes the model with the simplified prompt: leave --prompt composed away")


def find_pictures(paths: list[Path]) -> list[data.Sample]:
    """Picture files, and all those below folders. FileNotFoundError if there are none."""
    files = []
    for path in paths:
        below = sorted(path.rglob("*")) if path.is_dir() else []
        files += [file for file in below if file.suffix.lower() in PICTURES] if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"no pictures in {' '.join(map(str, paths))}: give --images files or folders of them")
    return [data.Sample(file, data.JUNK, 0) for file in files]


def use_images(model: PromptSG, args: argparse.Namespace) -> None:
    """--attention-maps, --features and --search for --images."""
    samples = find_pictures(args.images)
    if args.attention_maps:
        draw_attention(model, samples, args, args.attention_maps / "attention")
    if args.features or args.search:
        features = extract(lambda images: model.embed(images, args.prompt), samples, args)
    if args.features:
        names = [str(sample.path) for sample in samples]
        write_arrays(args.features, {"images_names": names, "images_features": features.cpu().numpy()})
    if args.search:
        query = data.Sample(args.search, data.JUNK, 0)
        feature = extract(lambda images: model.embed(images, args.prompt), [query], args)[0]
        draw_search(query, samples, features @ feature, Path(f"search-{query.path.stem}"))


def score_dataset(model: PromptSG, checkpoint: dict, path: Path, args: argparse.Namespace) -> None:
    """Scores query and gallery, and does what else the flags ask for."""
    settings = checkpoint["args"]
    dataset = data.load_dataset(args.dataset, args.data_root)
    print(data.summary(dataset))
    if args.dataset != settings["dataset"]:
        print(f"cross-domain: trained on {settings['dataset']}, tested on {args.dataset}")
    result = score(model, dataset, args.prompt, args)
    if not leave_processes():
        return
    print(f"{args.dataset}, {args.prompt} prompt: {describe(result)}")
    report = {name: result[name] for name in (*SCORES, "images_per_second")}
    report |= {
        "prompt": args.prompt,
        "dataset": args.dataset,
        "trained_on": settings["dataset"],
        "checkpoint": str(path),
    }

    query, gallery = result["query"], result["gallery"]
    rows = cosine(query, gallery)
    if args.rerank:
        N = len(query) + len(gallery)
        print(f"re-ranking compares {N:,} pictures with each other: about {0.3 + 8e-6 * N:.1f} GB besides the features")
        rows = k_reciprocal(query, gallery)
        result = rank(query, gallery, dataset, rows)
        print(f"{args.dataset}, {args.prompt} prompt, re-ranked: {describe(result)}")
        report["reranked"] = {name: result[name] for name in SCORES}
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.features:
        write_features(args.features, dataset, query, gallery)
    queries = choose_queries(result["ap"], args.queries, args.count)
    if args.ranked_lists:
        draw_ranked_lists(dataset, rows, queries, args.ranked_lists / "ranked")
    if args.attention_maps:
        draw_attention(model, [dataset.query[q] for q in queries], args, args.attention_maps / "attention")
    if dataset.name == "synthetic" and model.interaction:
        untrained = build_model(argparse.Namespace(**settings), dataset.num_identities).to(args.device).eval()
        print_attention_inside({"untrained": untrained, "trained": model}, dataset, args)
    print_speed(model, args)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    join_processes(args)
    check_args(args)
    path = args.checkpoint or newest_checkpoint()
    checkpoint = load_checkpoint(path)
    settings = checkpoint["args"]
    print(f"checkpoint {path}: {settings['backbone']} trained on {settings['dataset']}, epoch {checkpoint['epoch']}")
    model = restore_model(checkpoint).to(args.device)
    args.image_size = tuple(settings["image_size"])
    args.dataset = args.dataset or settings["dataset"]
    args.prompt = args.prompt or ("composed" if model.inversion else "simplified")
    if args.attention_maps and not model.interaction:
        raise ValueError("--attention-maps needs the interaction module, which this model was trained without")
    if (args.export or args.images) and not leave_processes():
        return
    if args.export:
        export(model, args.image_size, args.export)
    if args.images:
        use_images(model, args)
    if not (args.export or args.images):
        score_dataset(model, checkpoint, path, args)


if __name__ == "__main__":
    exit_on_error(main)
