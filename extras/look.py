"""Draw best matches, attention maps and transformer relevance of trained models.

python -m extras.look                               best matches and attention maps of some queries
python -m extras.look --before-after                best matches before and after training
python -m extras.look --images one.jpg folder       attention maps of your own images
python -m extras.look --figure-4 RUN RUN            relevance maps of several runs, as in Figure 4

On the demo, which has masks, it also measures how much of the attention is on the person.
"""

import argparse
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python extras/look.py` works too

import clip
import data
import evaluate
import train
from demo import tiny_clip
from model import PromptSG, restore_model
from util import checkpoint
from util.device import default_workers, run_script, setup

# ------------------------------------------------------------------------------------------------------- maps


def relevance(model: PromptSG, images: Tensor, prompt: str | None, target: Callable[..., Tensor]) -> Tensor:
    """Return the relevance of each token for a target S: normalised images (B, 3, H, W) -> (B, 1 + M).

    Transformer relevance (Chefer, Gur and Wolf, ICCV 2021; the paper's [2] has the same authors). From the first layer
    to the last: R <- R + E_heads[(dS/dA * A)^+] R, with attention probabilities A. The cross-attention multiplies token
    i by a_i, so its matrix is diagonal.

    `target` returns S (B,) from v (B, D), z (B, D) and the text embedding l (B or 1, D; constant). S must depend on z.
    Raises ValueError for a ResNet.
    """
    if not isinstance(model.clip.visual, clip.VisionTransformer):
        raise ValueError("transformer relevance needs a ViT, but this model's visual encoder is a ResNet")
    encoder = [block.attn for block in model.clip.visual.transformer.resblocks]
    after = [block.attn for block in model.interaction.blocks] if model.interaction else []
    for layer in encoder + after:
        layer.keep_probabilities = True
    features = model.clip.encode_image(images)
    v = z = features.embedding
    maps = [layer.probabilities for layer in encoder]
    with torch.no_grad():
        text = model.text_feature(v, prompt)
    if model.interaction:
        a = model.interaction.attention_map(text, features.tokens)  # (B, 1 + M)
        z = model.interaction.aggregate(a, features.tokens)
        maps += [a, *(layer.probabilities for layer in after)]
    for layer in encoder + after:
        layer.keep_probabilities = False
        del layer.probabilities

    identity = torch.eye(features.tokens.shape[1]).to(images)
    R = identity
    for A, gradient in zip(maps, torch.autograd.grad(target(v, z, text).sum(), maps)):
        positive = (A * gradient).detach().clamp(min=0)
        R = R + (positive.unsqueeze(2) * R if A.ndim == 2 else positive.mean(dim=1) @ R)  # (B, 1 + M, 1 + M)
    R = R - identity  # without each token's relevance to itself
    return R.mean(dim=1) if model.interaction else R[:, 0]  # z is the mean of the tokens, or the class token


def similarity_to_prompt(v: Tensor, z: Tensor, text: Tensor) -> Tensor:
    """Return the cosine similarity of l to v, which L_SupCon increases (Eq. 5), plus that of l to z."""
    return F.cosine_similarity(v, text) + F.cosine_similarity(z, text)


def identity_relevance(
    model: PromptSG, samples: list[data.Sample], pool: list[data.Sample], prompt: str | None = None
) -> Tensor:
    """Return the relevance of the patches (N, h, w) for recognising the person (Figure 4).

    The target is the mean similarity of an image's retrieval feature to those of the other images of the same identity
    in `pool`, which are constant.
    """
    people = {sample.pid for sample in samples}
    pool = [sample for sample in pool if sample.pid in people]
    features = evaluate.extract(model, [sample.path for sample in pool], prompt)  # (P, D)

    def of_sample(sample: data.Sample) -> Tensor:
        is_other = [other.pid == sample.pid and other.path != sample.path for other in pool]
        mean = features[is_other].mean(dim=0)  # (D,)
        image = read_image(model, sample.path)
        return relevance(model, image, prompt, lambda v, z, l: F.normalize(model.bnneck(z), dim=1) @ mean.to(z))

    return to_maps(model, [of_sample(sample) for sample in samples])


@torch.no_grad()
def attention(model: PromptSG, paths: list[Path], prompt: str) -> Tensor:
    """Return the attention maps of a prompt (Figures 1 and 2), over the patches: (N, h, w)."""
    return to_maps(model, [model.attention_map(read_image(model, path), prompt) for path in paths])


def read_image(model: PromptSG, path: Path) -> Tensor:
    """Return an image file as a batch of one normalised image (1, 3, H, W), on the device of the model."""
    return clip.normalize(data.read_image(path, model.image_size).unsqueeze(0).to(model.simplified_text.device))


def to_maps(model: PromptSG, values: list[Tensor]) -> Tensor:
    """Return values of image tokens, N times (1, 1 + M), as maps without the class token: (N, h, w), on the CPU."""
    return torch.cat(values)[:, 1:].unflatten(1, model.clip.grid).cpu()


def describe_inside(maps: Tensor, dataset: data.Dataset) -> str:
    """Return a text: how much of the maps of the demo's queries (Q, h, w) is inside the mask of the person."""
    masks = [data.open_image(dataset.folder / "masks" / f"{sample.path.stem}.png") for sample in dataset.query]
    masks = torch.stack([v2.functional.pil_to_tensor(mask)[0] for mask in masks]) / 255
    inside = F.adaptive_avg_pool2d(masks, maps.shape[1:]).flatten(1)  # (Q, M), the person's share of each patch
    maps = maps.flatten(1)
    share = ((maps * inside).sum(dim=1) / maps.sum(dim=1)).mean()
    peak = (inside.gather(1, maps.argmax(dim=1, keepdim=True)) >= 0.5).float().mean()  # as in the pointing game
    return f"{share:.1%}; the maximum in {peak:.1%} of the images; the person covers {inside.mean():.1%}"


# ------------------------------------------------------------------------------------------------------ models


def load_run(path: Path, device: torch.device) -> tuple[PromptSG, dict]:
    """Return the model of a checkpoint, and the checkpoint."""
    state = checkpoint.load(path)
    print(f"{path}: {state['args']['backbone']} trained on {state['args']['dataset']}, epoch {state['epoch']}")
    return restore_model(state).to(device), state


def before_training(state: dict) -> PromptSG:
    """Return a run's model before training, in eval mode: its initial CLIP, and new modules with random weights."""
    args = argparse.Namespace(**state["args"])
    name, image_size = train.CLIP_NAMES[args.backbone], tuple(args.image_size)
    if args.clip_weights == "random":
        clip_model = clip.untrained(name, image_size, args.seed)
    elif args.backbone == "tiny":
        clip_model = tiny_clip.load(image_size)
    else:
        clip_model = clip.load(args.clip_weights or name, image_size)
    torch.manual_seed(args.seed)
    return PromptSG(clip_model, **state["model_args"]).eval()


# ------------------------------------------------------------------------------------------------------ sheets

TILE = (192, 96)  # height and width of an image on a sheet
GREEN, RED, GREY = (0, 150, 60), (210, 30, 40), (120, 120, 120)
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # the "inferno" colour map
MATCHES = "green: same identity as the query; red: another identity; below: rank, identity, camera, similarity"
MAPS = "dark: the lowest value of each map; yellow: the highest"


class Tile(NamedTuple):
    """An image, uint8 (3, 192, 96), with a coloured frame and a caption."""

    image: Tensor
    caption: str
    frame: tuple[int, int, int] = GREY


def heat(image: Tensor, values: Tensor) -> Tensor:
    """Blend an image with a map (h, w), from its lowest (dark) to its highest value (yellow)."""
    scaled = (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)
    smooth = F.interpolate(scaled[None, None], TILE, mode="bicubic")[0, 0]
    colour = [np.interp(smooth, np.linspace(0, 1, len(HEAT)), channel) for channel in zip(*HEAT)]  # R, G, B
    return (0.4 * v2.functional.rgb_to_grayscale(image, 3) + 0.6 * torch.tensor(np.array(colour))).to(torch.uint8)


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> str:
    """Break a text into lines of at most `width` pixels; a text that is too long ends with "…"."""
    text = data.printable(text)
    for letters in range(int(width), 0, -1):
        lines = textwrap.wrap(text, letters, max_lines=max_lines, placeholder="…")
        if all(font.getlength(line) <= width for line in lines):
            break
    return "\n".join(lines)


def draw_sheet(groups: list[list[Tile]], path: Path, title: str, legend: str = "") -> None:
    """Draw groups of tiles in lines of up to twelve tiles. The title tells what they show, and for which model."""
    groups = [group[begin : begin + 12] for group in groups for begin in range(0, len(group), 12)]
    longest, cell_width, cell_height, margin = max(map(len, groups)), TILE[1] + 14, TILE[0] + 62, 16
    per_line = min(12 // longest, len(groups))
    group_width = longest * cell_width + margin
    width = max(640, margin + per_line * group_width)
    font, title_font = ImageFont.load_default(13), ImageFont.load_default(18)
    title, legend = wrap(title, title_font, width - 2 * margin, 4), wrap(legend, font, width - 2 * margin, 4)
    title_height = 24 * len(title.splitlines())
    top = 24 + title_height + 18 * len(legend.splitlines())

    sheet = Image.new("RGB", (width, top + math.ceil(len(groups) / per_line) * cell_height), "white")
    canvas = ImageDraw.Draw(sheet)
    canvas.text((margin, 8), title, "black", title_font)
    canvas.text((margin, 12 + title_height), legend, "black", font)
    for number, group in enumerate(groups):
        line, column = divmod(number, per_line)
        for n, tile in enumerate(group):
            x, y = margin + column * group_width + n * cell_width, top + line * cell_height
            sheet.paste(ImageOps.expand(v2.functional.to_pil_image(tile.image), 4, tile.frame), (x, y))
            canvas.text((x, y + TILE[0] + 10), wrap(tile.caption, font, TILE[1] + 8, 3), "black", font, spacing=2)
    with checkpoint.atomic_write(path) as temporary:
        sheet.save(temporary, quality=85)
    print(f"image written to {data.printable(path)}")


def spread(items: list, count: int) -> list:
    """Return `count` evenly spaced items of a list, or all if there are fewer."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def choose_queries(ap: Tensor, count: int) -> list[int]:
    """Choose queries from the lowest to the highest AP (Q,). Queries without an AP are skipped."""
    return spread(ap.argsort(stable=True)[: int(ap.isfinite().sum())].tolist(), count)  # NaN is last


def choose_people(samples: list[data.Sample], pool: list[data.Sample], count: int) -> list[data.Sample]:
    """Choose `count` identities with several images in `pool`, evenly spaced. Return the first image of each."""
    images = Counter(sample.pid for sample in pool)
    first = {sample.pid: sample for sample in reversed(samples) if images[sample.pid] > 1}
    return spread([first[pid] for pid in sorted(first)], count)


def best_matches(dataset: data.Dataset, q: int, similarity: Tensor, count: int, caption: str) -> list[Tile]:
    """Return the tiles of query q and of its best matches by similarity (G,), without ignored images."""
    query = dataset.query[q]
    tiles = [Tile(data.read_image(query.path, TILE), f"query id {query.pid} c{query.camid} {caption}")]
    for g in similarity.argsort(descending=True, stable=True).tolist():
        sample = dataset.gallery[g]
        if len(tiles) <= count and (sample.pid, sample.camid) != (query.pid, query.camid):
            text = f"{len(tiles)}: id {sample.pid} c{sample.camid} {similarity[g]:.2f}"
            tiles.append(Tile(data.read_image(sample.path, TILE), text, GREEN if sample.pid == query.pid else RED))
    return tiles


def map_tiles(paths: list[Path], captions: list[str], maps: dict[str, Tensor]) -> list[list[Tile]]:
    """Return a group of tiles for each image: the image and its maps. maps: (N, h, w), by caption."""
    images = [data.read_image(path, TILE) for path in paths]
    return [
        [Tile(image, caption), *(Tile(heat(image, maps[name][n]), name) for name in maps)]
        for n, (image, caption) in enumerate(zip(images, captions))
    ]


def draw_attention(model: PromptSG, paths: list[Path], prompts: list[str], path: Path, title: str) -> None:
    """Draw the attention maps of prompts and, for a ViT, transformer relevance."""
    maps = {f"{prompt} prompt": attention(model, paths, prompt) for prompt in prompts}
    if isinstance(model.clip.visual, clip.VisionTransformer):
        values = [relevance(model, read_image(model, path), prompts[-1], similarity_to_prompt) for path in paths]
        maps["transformer relevance"] = to_maps(model, values)
    draw_sheet(map_tiles(paths, [path.name for path in paths], maps), path, f"Attention of the prompts: {title}", MAPS)


# ------------------------------------------------------------------------------------------------------ script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--before-after", action="store_true", help="best matches before and after training")
    what.add_argument("--images", type=Path, nargs="+", metavar="PATH", help="attention maps of own images")
    what.add_argument("--figure-4", type=Path, nargs="+", metavar="RUN", help="relevance maps of runs or checkpoints")
    add = parser.add_argument
    add("--count", type=int, default=8, help="number of queries, images or people to draw (default: 8)")
    add("--output", type=Path, default=Path("look"), help="directory of the images (default: look)")
    add("--checkpoint", type=Path, help="a run's last.pt (default: the newest in runs/)")
    add("--prompt", choices=("composed", "simplified"), help="prompt at test time (default: the one trained with)")
    add("--dataset", choices=data.FOLDERS, help="dataset (default: the one trained on)")
    add("--data-root", default="data", help="directory of the datasets (default: data)")
    add("--device", help="cpu, cuda, ... (default: cuda if available, otherwise cpu)")
    args = parser.parse_args(argv)
    unused = {"figure_4": ["checkpoint"], "images": ["prompt", "dataset", "data_root"]}
    for name in [name for mode in unused if getattr(args, mode) for name in unused[mode]]:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} has no effect here: drop it")
    if args.count < 1:
        parser.error("--count must be at least 1")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = setup(args.device)
    workers = default_workers(device)
    args.output.mkdir(parents=True, exist_ok=True)
    if args.figure_4:
        columns = {}  # model and prompt
        for run in args.figure_4:
            model, state = load_run(run / "last.pt" if run.is_dir() else run, device)
            if not columns:  # the initial CLIP of the first run
                original = before_training(state).to(device)
                original.interaction = None  # z is v
                columns["original"] = original, "simplified"
                dataset = data.load_dataset(args.dataset or state["args"]["dataset"], args.data_root)
            columns[str(run)] = model, args.prompt
        groups = []
        test = dataset.query + dataset.gallery
        for subset, candidates, pool in (("training", dataset.train, dataset.train), ("test", dataset.query, test)):
            samples = choose_people(candidates, pool, math.ceil(args.count / 2))
            maps = {name: identity_relevance(model, samples, pool, prompt) for name, (model, prompt) in columns.items()}
            captions = [f"{subset} person {sample.pid}" for sample in samples]
            groups += map_tiles([sample.path for sample in samples], captions, maps)
        title = f"Relevance for the similarity to other images of the same person: {', '.join(columns)}"
        draw_sheet(groups, args.output / "figure-4.jpg", title, MAPS)
        if dataset.name == "synthetic":
            for name, (model, prompt) in columns.items():
                maps = identity_relevance(model, dataset.query, test, prompt)
                print(f"relevance on the person, {name}: {describe_inside(maps, dataset)}")
        return

    path = args.checkpoint or checkpoint.newest()
    model, state = load_run(path, device)
    title = f"{path}, epoch {state['epoch']}"
    prompts = ["simplified", "composed"] if model.inversion else ["simplified"]
    if args.images:
        if not model.interaction:
            raise ValueError("--images needs an interaction module, which this model does not have")
        found = data.find_images(args.images)
        if len(found) > args.count:
            print(f"{len(found)} images found, {args.count} drawn: use --count to draw more")
        draw_attention(model, found[: args.count], prompts, args.output / "attention.jpg", title)
        return

    dataset = data.load_dataset(args.dataset or state["args"]["dataset"], args.data_root, ("query", "gallery"))
    start = before_training(state).to(device) if args.before_after or dataset.name == "synthetic" else None
    result = evaluate.evaluate(model, dataset, args.prompt, workers)
    results = {"after training": result}
    if args.before_after:
        results = {"before training": evaluate.evaluate(start, dataset, "none", workers), **results}
    queries = choose_queries(result["ap"], args.count)
    prompt = args.prompt or model.default_prompt
    title += f", {prompt} prompt, {dataset.name}, queries from the lowest to the highest AP"
    scores = " and ".join(f"{caption} (mAP {result['mAP']:.1%})" for caption, result in results.items())
    groups = [
        best_matches(dataset, q, result["query"][q] @ result["gallery"].T, 10 // len(results), caption)
        for q in queries
        for caption, result in results.items()
    ]
    name = "before-after.jpg" if args.before_after else "matches.jpg"
    draw_sheet(groups, args.output / name, f"Best matches {scores}: {title}", MATCHES)
    if args.before_after or not model.interaction:
        return
    draw_attention(model, [dataset.query[q].path for q in queries], prompts, args.output / "attention.jpg", title)
    if dataset.name == "synthetic":
        for name, compared in (("untrained", start), ("trained", model)):
            for prompt in prompts:
                maps = attention(compared, [sample.path for sample in dataset.query], prompt)
                print(f"attention on the person, {name}, {prompt} prompt: {describe_inside(maps, dataset)}")


if __name__ == "__main__":
    run_script(main)
