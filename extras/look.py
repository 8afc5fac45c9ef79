"""Shows what a trained model sees: where its prompts look, transformer relevance, and the best matches of some queries.

python -m extras.look                           eight queries of the dataset it was trained on, the worst first
python -m extras.look --images one.jpg folder   where it looks in your own pictures

On the demo, whose masks say where the person is, it also measures how much of the attention lies on the person.
"""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms import v2
from torchvision.utils import make_grid

import clip
import data
import evaluate
from model import PromptSG, build_model
from util import machine
from util.pictures import find_readable
from util.rerank import k_reciprocal

# ---------------------------------------------------------------------------------------- where a model looks


def relevance(model: PromptSG, images: Tensor, prompt: str) -> Tensor:
    """How much each token matters for the similarity of the image to its prompt: (B, 3, H, W) -> (B, 1 + M).

    Transformer relevance (Chefer, Gur and Wolf, ICCV 2021, by the authors of the paper's [2]), for a ViT: from the
    first layer to the last, R <- R + E_heads[(dS/dA * A)^+] R, where A are attention probabilities. The cross-attention
    weights token i by a_i, so that its matrix is diagonal. S is the cosine of the text embedding to both of the image's
    representations, summed: v, which L_SupCon brings to it (Eq. 5), and z, which passes the interaction module.
    """
    with torch.no_grad():
        text = model.text_feature(model.clip.encode_image(images).embedding, prompt).expand(len(images), -1)
    encoder = [block.attn for block in model.clip.visual.transformer.resblocks]
    behind = [block.attn for block in model.interaction.blocks]
    for layer in encoder + behind:
        layer.keep_probabilities = True
    features = model.clip.encode_image(images)
    a = model.interaction.attention_map(text, features.tokens)  # (B, 1 + M)
    z = model.interaction.aggregate(a, features.tokens)
    maps = [*(layer.probabilities for layer in encoder), a, *(layer.probabilities for layer in behind)]
    for layer in encoder + behind:
        layer.keep_probabilities = False
        del layer.probabilities

    similarity = F.cosine_similarity(features.embedding, text) + F.cosine_similarity(z, text)
    gradients = torch.autograd.grad(similarity.sum(), maps)
    identity = torch.eye(a.shape[1]).to(a)
    R = identity
    for A, gradient in zip(maps, gradients):
        positive = (A * gradient).detach().clamp(min=0)
        R = R + (positive.unsqueeze(2) * R if A is a else positive.mean(dim=1) @ R)  # (B, 1 + M, 1 + M)
    return (R - identity).mean(dim=1)  # z is the mean of the last tokens; a token's relevance to itself tells nothing


def person_shares(dataset: data.Dataset, samples: list[data.Sample], grid: tuple[int, int]) -> Tensor:
    """The share of each patch that shows the person, from the demo data's masks: (N, M)."""
    paths = [dataset.folder / "masks" / f"{sample.path.stem}.png" for sample in samples]
    masks = torch.stack([data.read_picture(path, (256, 128))[:1] for path in paths])
    return F.adaptive_avg_pool2d(masks / 255, grid).flatten(1)


def inside_and_peak(maps: Tensor, inside: Tensor) -> tuple[float, float]:
    """Maps over the patches (N, M), the share of each patch that counts (N, M): the share of the maps that lies there,
    and how often their peak does (the pointing game).
    """
    share = (maps * inside).sum(dim=1) / maps.sum(dim=1)
    peak = inside.gather(1, maps.argmax(dim=1, keepdim=True)) >= 0.5
    return share.mean().item(), peak.float().mean().item()


def print_attention_inside(models: dict[str, PromptSG], dataset: data.Dataset, args: argparse.Namespace) -> None:
    """Of each model and prompt: how much of the attention on the patches of the demo's queries lies on the person."""
    grid = next(iter(models.values())).clip.grid
    inside = person_shares(dataset, dataset.query, grid).to(args.device)
    for name, model in models.items():
        for prompt in ("simplified", "composed") if model.inversion else ("simplified",):
            attend = functools.partial(model.attention_map, prompt=prompt)
            share, peak = inside_and_peak(evaluate.extract(attend, dataset.query, args)[:, 1:], inside)
            print(
                f"attention on the person, {name}, {prompt} prompt: {share:.1%} of it, "
                f"its peak in {peak:.1%} of the pictures (the person is {inside.mean():.1%} of a picture)"
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
    colours = torch.tensor(HEAT).float()
    below = position.long().clamp(max=len(HEAT) - 2)
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
    dataset: data.Dataset, similarities: Callable[[int, int], Tensor], queries: list[int], stem: Path
) -> None:
    """Each query and its ten best, framed green if right and red if wrong; junk is left out.

    similarities: of the queries begin to end to the gallery, (end - begin, G).
    """
    drawing = []
    for q in queries:
        query = dataset.query[q]
        is_junk = [(sample.pid, sample.camid) == (query.pid, query.camid) for sample in dataset.gallery]
        similarity = similarities(q, q + 1)[0].cpu().masked_fill(torch.tensor(is_junk), -torch.inf)
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
    is_vit = isinstance(model.clip.visual, clip.VisionTransformer)
    drawing = []
    for sample in samples:
        picture = data.read_picture(sample.path, TILE)
        image = data.normalize(data.read_picture(sample.path, args.image_size)[None].to(args.device))
        with torch.inference_mode():
            maps = {prompt: model.attention_map(image, prompt) for prompt in prompts}
        if is_vit:
            maps["relevance"] = relevance(model, image, prompts[-1])
        patches = {name: heat(picture, tokens[0, 1:].view(model.clip.grid)) for name, tokens in maps.items()}
        drawing.append([tile(picture, sample.path.stem), *(tile(heated, name) for name, heated in patches.items())])
    save_sheets(drawing, stem)


def find_pictures(paths: list[Path]) -> list[data.Sample]:
    """Picture files, and all those below folders, as `find_readable` finds them, of nobody by no camera."""
    return [data.Sample(file, data.JUNK, 0) for file in find_readable(paths)]


# -------------------------------------------------------------------------------------------- the script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning."""
    parser = machine.make_parser("-m extras.look", "Draw what a trained PromptSG sees.")
    add = parser.add_argument
    add("--images", type=Path, nargs="+", metavar="PATH", help="your own pictures, files or folders (queries)")
    add("--output", type=Path, default=Path("look"), metavar="DIR", help="folder of the drawings (look)")
    add("--count", type=int, default=8, metavar="N", help="how many queries to draw (8)")
    add("--queries", choices=("worst", "random"), default="worst", help="which queries to draw (worst)")
    add("--rerank", action="store_true", help="rank with k-reciprocal re-ranking")
    evaluate.add_checkpoint_flags(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """ValueError, in one line and before any work, for an impossible device or number."""
    machine.check_machine_flags(args)
    if args.count < 1:
        raise ValueError("--count must be at least 1")


def look_at_dataset(model: PromptSG, settings: dict, args: argparse.Namespace) -> None:
    """Ranked lists and attention maps of some queries; on the demo, how much of the attention is on the person."""
    dataset = data.load_dataset(args.dataset, args.data_root)
    result = evaluate.score(model, dataset, args.prompt, args)
    query, gallery = result["query"], result["gallery"]
    similarities = k_reciprocal(query, gallery) if args.rerank else lambda begin, end: query[begin:end] @ gallery.T
    ap = evaluate.metrics_of(query, gallery, dataset, similarities)["ap"]
    queries = choose_queries(ap, args.queries, args.count)
    draw_ranked_lists(dataset, similarities, queries, args.output / "ranked")
    if model.interaction:
        draw_attention(model, [dataset.query[q] for q in queries], args, args.output / "attention")
    if model.interaction and dataset.name == "synthetic":
        untrained = build_model(argparse.Namespace(**settings), dataset.num_identities).to(args.device).eval()
        print_attention_inside({"untrained": untrained, "trained": model}, dataset, args)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    model, settings = evaluate.load_run(args)
    if not args.images:
        look_at_dataset(model, settings, args)
    elif model.interaction:
        draw_attention(model, find_pictures(args.images), args, args.output / "attention")
    else:
        raise ValueError("--images shows the interaction module's attention, and this model was trained without one")


if __name__ == "__main__":
    machine.exit_on_error(main)
