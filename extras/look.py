"""Shows what a trained model sees: where its prompts look, transformer relevance, and the best matches of some queries.

python -m extras.look                               eight queries of the dataset it was trained on, the worst first
python -m extras.look --images one.jpg folder       where it looks in your own pictures
python -m extras.look --figure-4 RUN RUN            what several runs know people by, side by side
python -m extras.look --words "red top" "a bag"     where these words are
python -m extras.look --s-star                      what the pseudo-word S* says of a person

On the demo, whose masks say where the person is, it also measures how much of the attention lies on the person.
"""

import argparse
import functools
import random
import textwrap
from collections import defaultdict
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
import train
from model import BACKBONES, PromptSG, build_model
from util import demo, machine
from util.pictures import find_readable
from util.rerank import k_reciprocal

S_STAR_WORDS = [f"{colour} {garment}" for colour in demo.CLOTHES for garment in ("top", "trousers")]
S_STAR_WORDS += ["a hat", "a bag"]


# ---------------------------------------------------------------------------------------- where a model looks


def relevance(model: PromptSG, images: Tensor, prompt: str, target: Callable[..., Tensor]) -> Tensor:
    """How much each token matters for a target S: normalised images (B, 3, H, W) -> (B, 1 + M).

    target: of v (B, D), z (B, D) and the prompt's text embedding l (B or 1, D), which is held constant -> S (B,).

    Transformer relevance (Chefer, Gur and Wolf, ICCV 2021, by the authors of the paper's [2]): from the first layer to
    the last that S depends on, R <- R + E_heads[(dS/dA * A)^+] R, where A are attention probabilities. The
    cross-attention weights token i by a_i, so that its matrix is diagonal. Raises ValueError for a ResNet.
    """
    if not isinstance(model.clip.visual, clip.VisionTransformer):
        raise ValueError("transformer relevance is for a ViT, and this model's visual encoder is a ResNet")
    encoder = [block.attn for block in model.clip.visual.transformer.resblocks]
    behind = [block.attn for block in model.interaction.blocks] if model.interaction else []
    for layer in encoder + behind:
        layer.keep_probabilities = True
    features = model.clip.encode_image(images)
    v = z = features.embedding
    maps = [layer.probabilities for layer in encoder]
    with torch.no_grad():
        text = model.text_feature(v, prompt)
    if model.interaction:
        a = model.interaction.attention_map(text, features.tokens)  # (B, 1 + M)
        z = model.interaction.aggregate(a, features.tokens)
        maps += [a, *(layer.probabilities for layer in behind)]
    for layer in encoder + behind:
        layer.keep_probabilities = False
        del layer.probabilities

    gradients = torch.autograd.grad(target(v, z, text).sum(), maps, allow_unused=True)  # None behind v, if S is of v
    identity = torch.eye(features.tokens.shape[1]).to(images)
    R = identity
    for A, gradient in zip(maps, gradients):
        if gradient is not None:
            positive = (A * gradient).detach().clamp(min=0)
            R = R + (positive.unsqueeze(2) * R if A.ndim == 2 else positive.mean(dim=1) @ R)  # (B, 1 + M, 1 + M)
    R = R - identity  # a token's relevance to itself tells nothing
    is_of_v = len(maps) == len(encoder) or gradients[-1] is None
    return R[:, 0] if is_of_v else R.mean(dim=1)  # v is the class token, z the mean of the last tokens


def likeness_to_prompt(v: Tensor, z: Tensor, text: Tensor) -> Tensor:
    """A target: the cosine of l to both of an image, summed: v, which L_SupCon brings to it (Eq. 5), and z."""
    return F.cosine_similarity(v, text) + F.cosine_similarity(z, text)


def words_relevance(model: PromptSG, images: Tensor, text: Tensor) -> Tensor:
    """Where words are: relevance for the cosine of v and T(sentence), of images (B, 3, H, W) and text (B or 1, D)."""
    return relevance(model, images, "simplified", lambda v, z, l: F.cosine_similarity(v, text))


def identity_relevance(
    model: PromptSG, samples: list[data.Sample], pool: list[data.Sample], args: argparse.Namespace
) -> Tensor:
    """What a model knows people by (Figure 4): samples -> relevance of the patches (N, M).

    The target is the similarity of a picture's retrieval feature to those of the same person's other pictures in
    `pool`, on average. These are held constant.
    """
    people = {sample.pid for sample in samples}
    pool = [sample for sample in pool if sample.pid in people]
    features = evaluate.extract(lambda images: model.embed(images, args.prompt), pool, args)  # (P, D)
    is_other = [[other.pid == sample.pid and other.path != sample.path for other in pool] for sample in samples]
    weights = torch.tensor(is_other).to(features)
    others = weights / weights.sum(dim=1, keepdim=True) @ features  # (N, D)
    maps = []
    for (images, _), mean in zip(data.test_loader(samples, args.image_size, 16, args.workers), others.split(16)):

        def likeness(v: Tensor, z: Tensor, text: Tensor, mean: Tensor = mean) -> Tensor:
            return (F.normalize(model.bnneck(z), dim=1) * mean).sum(dim=1)

        maps.append(relevance(model, clip.normalize(images.to(args.device)), args.prompt, likeness)[:, 1:])
        machine.show_progress(sum(map(len, maps)), len(samples), "maps")
    return torch.cat(maps)


@torch.no_grad()
def encode_sentences(model: PromptSG, sentences: list[str]) -> Tensor:
    """T(sentence) of each, of length 1: (N, D)"""
    token_ids = clip.tokenize(sentences).to(model.simplified_text.device)
    return F.normalize(model.clip.encode_text(token_ids), dim=1)


def encode_words(model: PromptSG, words: list[str]) -> Tensor:
    """T("A photo of a person with red top") of each of the words, of length 1: (N, D)"""
    return encode_sentences(model, [demo.sentence(word) for word in words])


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


def describe_inside(what: str, share: float, peak: float, inside: Tensor) -> str:
    """One line for people."""
    area = f"the person is {inside.mean():.1%} of a picture"
    return f"{what}: {share:.1%} of it, its peak in {peak:.1%} of the pictures ({area})"


def print_attention_inside(models: dict[str, PromptSG], dataset: data.Dataset, args: argparse.Namespace) -> None:
    """Of each model and prompt: how much of the attention on the patches of the demo's queries lies on the person."""
    grid = next(iter(models.values())).clip.grid
    inside = person_shares(dataset, dataset.query, grid).to(args.device)
    for name, model in models.items():
        for prompt in ("simplified", "composed") if model.inversion else ("simplified",):
            attend = functools.partial(model.attention_map, prompt=prompt)
            share, peak = inside_and_peak(evaluate.extract(attend, dataset.query, args)[:, 1:], inside)
            print(describe_inside(f"attention on the person, {name}, {prompt} prompt", share, peak, inside))


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


def words_tile(words: str, caption: str) -> Tensor:
    """Lines of words in the place of a picture: uint8 (3, 288, 136)"""
    height, width = TILE
    canvas = Image.new("RGB", (width, height), "white")
    lines = "\n".join(textwrap.fill(line, 16) for line in words.splitlines())
    font = ImageFont.load_default(14)
    ImageDraw.Draw(canvas).text((width // 2, height // 2), lines, "black", font, anchor="mm", align="center")
    return tile(v2.functional.pil_to_tensor(canvas), caption)


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


def draw_maps(
    maps_of: Callable[[Tensor], dict[str, Tensor]],
    grid: tuple[int, int],
    samples: list[data.Sample],
    args: argparse.Namespace,
    stem: Path,
) -> None:
    """Each picture and the maps over its tokens, (1, 1 + M) by their captions, that `maps_of` finds in it."""
    drawing = []
    for sample in samples:
        picture = data.read_picture(sample.path, TILE)
        image = clip.normalize(data.read_picture(sample.path, args.image_size)[None].to(args.device))
        maps = [tile(heat(picture, tokens[0, 1:].view(grid)), name) for name, tokens in maps_of(image).items()]
        drawing.append([tile(picture, sample.path.stem), *maps])
    save_sheets(drawing, stem)


def draw_attention(model: PromptSG, samples: list[data.Sample], args: argparse.Namespace) -> None:
    """Figures 1 and 2: each picture, where either prompt looks, and, for a ViT, the transformer relevance."""
    prompts = ("simplified", "composed") if model.inversion else ("simplified",)

    def maps_of(image: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode():
            maps = {prompt: model.attention_map(image, prompt) for prompt in prompts}
        if isinstance(model.clip.visual, clip.VisionTransformer):
            maps["relevance"] = relevance(model, image, prompts[-1], likeness_to_prompt)
        return maps

    draw_maps(maps_of, model.clip.grid, samples, args, args.output / "attention")


def draw_words(model: PromptSG, samples: list[data.Sample], args: argparse.Namespace) -> None:
    """Each picture and where each of --words is."""
    texts = encode_words(model, args.words).split(1)

    def maps_of(image: Tensor) -> dict[str, Tensor]:
        return {word: words_relevance(model, image, text) for word, text in zip(args.words, texts)}

    draw_maps(maps_of, model.clip.grid, samples, args, args.output / "words")


def draw_pseudo_words(model: PromptSG, samples: list[data.Sample], args: argparse.Namespace) -> None:
    """Prints and draws, for each picture, the five words that T("A photo of a S* person") is nearest to."""
    words = args.s_star or S_STAR_WORDS
    composed = evaluate.extract(lambda images: model.compose(model.clip.encode_image(images).embedding), samples, args)
    drawing = []
    for sample, cosines in zip(samples, F.normalize(composed, dim=1) @ encode_words(model, words).T):
        best = cosines.topk(min(5, len(words)))
        lines = [f"{words[i]} {value:.2f}" for value, i in zip(best.values.tolist(), best.indices.tolist())]
        print(f"{sample.path.name}: {', '.join(lines)}")
        picture = data.read_picture(sample.path, TILE)
        drawing.append([tile(picture, sample.path.stem), words_tile("\n\n".join(lines), "S*")])
    save_sheets(drawing, args.output / "s-star")


def load_columns(args: argparse.Namespace) -> list[tuple[str, PromptSG, argparse.Namespace]]:
    """Figure 4's models, each with its name and its settings: CLIP as the first run found it, and the runs."""
    columns = []
    for run in args.figure_4:
        own = argparse.Namespace(**vars(args))
        own.checkpoint = run / "last.pt" if run.is_dir() else run
        model, settings = evaluate.load_run(own)
        if not columns:
            original = build_model(argparse.Namespace(**{**settings, "baseline": True}), 1).to(args.device).eval()
            columns.append(("original", original, argparse.Namespace(**{**vars(own), "prompt": "simplified"})))
        columns.append((run.name if run.is_dir() else f"{run.parent.name}/{run.stem}", model, own))
    return columns


def choose_people(samples: list[data.Sample], count: int) -> list[data.Sample]:
    """A picture each of so many people at random, of those who have several. ValueError if nobody has."""
    rng, pictures = random.Random(0), defaultdict(list)
    for sample in samples:
        pictures[sample.pid].append(sample)
    people = [pid for pid in sorted(pictures) if len(pictures[pid]) > 1]
    if not people:
        raise ValueError("nobody in this dataset has several pictures, so there is nothing to compare")
    return [rng.choice(pictures[pid]) for pid in rng.sample(people, min(count, len(people)))]


def draw_figure_4(args: argparse.Namespace) -> None:
    """Figure 4: what each model knows the same people by, training people on the left and gallery people on the right.

    On the demo, how much of it is on the person.
    """
    columns = load_columns(args)
    dataset = data.load_dataset(columns[0][2].dataset, args.data_root)
    test = dataset.query + dataset.gallery
    known = {sample.pid for sample in dataset.query}  # the gallery may hold distractors
    gallery = [sample for sample in dataset.gallery if sample.pid in known]
    halves = []
    for name, candidates, pool in (("training", dataset.train, dataset.train), ("gallery", gallery, test)):
        samples = choose_people(candidates, (args.count + 1) // 2)
        pictures = [data.read_picture(sample.path, TILE) for sample in samples]
        half = [[tile(picture, f"{name} person")] for picture in pictures]
        for column, model, own in columns:
            for row, picture, patches in zip(half, pictures, identity_relevance(model, samples, pool, own)):
                row.append(tile(heat(picture, patches.view(model.clip.grid)), column))
        halves.append(half)
    print(f"{len(halves[0])} training people and {len(halves[1])} gallery people, chosen at random (seed 0)")
    save_sheets([left + right for left, right in zip(*halves)], args.output / "figure-4")
    for column, model, own in columns if dataset.name == "synthetic" else []:
        inside = person_shares(dataset, dataset.query, model.clip.grid).to(args.device)
        share, peak = inside_and_peak(identity_relevance(model, dataset.query, test, own), inside)
        print(describe_inside(f"relevance on the person, {column}", share, peak, inside))


def find_pictures(paths: list[Path]) -> list[data.Sample]:
    """Picture files, and all those below folders, as `find_readable` finds them, of nobody by no camera."""
    return [data.Sample(file, data.JUNK, 0) for file in find_readable(paths)]


# -------------------------------------------------------------------------------------------- the script


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a script that uses a run, or CLIP before any training."""
    add = parser.add_argument
    add("--backbone", choices=BACKBONES, help="in place of a run: this CLIP before any training")
    add("--clip-weights", metavar="PATH", help="of --backbone, as train.py's (downloaded on first use)")
    evaluate.add_checkpoint_flags(parser)


def check_model_flags(args: argparse.Namespace) -> None:
    """ValueError for an impossible device, or for two models."""
    machine.check_machine_flags(args)
    if args.backbone and args.checkpoint:
        raise ValueError("--checkpoint is a run, --backbone a CLIP before any training: give one of them")
    if args.clip_weights and not args.backbone:
        raise ValueError("--clip-weights are those of --backbone: give it, too")


def load_model(args: argparse.Namespace) -> tuple[PromptSG, dict]:
    """As `evaluate.load_run`. CLIP before any training is the baseline's model, whose features are v."""
    if not args.backbone:
        return evaluate.load_run(args)
    start = train.parse_args(["--backbone", args.backbone, "--baseline"])
    start.clip_weights = args.clip_weights
    args.image_size, args.prompt, args.dataset = tuple(start.image_size), "simplified", args.dataset or start.dataset
    print(f"{args.backbone}, before any training")
    return build_model(start, num_identities=1).to(args.device).eval(), vars(start)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning."""
    parser = machine.make_parser("-m extras.look", "Draw what a trained PromptSG sees.")
    add = parser.add_argument
    add("--images", type=machine.path, nargs="+", metavar="PATH", help="your own pictures, files or folders (queries)")
    add("--figure-4", type=machine.path, nargs="+", metavar="RUN", help="what runs, folders or files, know people by")
    add("--words", nargs="+", metavar="WORDS", help='where words are, as in "A photo of a person with WORDS"')
    add("--s-star", nargs="*", metavar="WORDS", help="which words S* is nearest to (of colours and clothes)")
    add("--output", type=machine.path, default=Path("look"), metavar="DIR", help="folder of the drawings (look)")
    add("--count", type=int, default=8, metavar="N", help="how many queries, or people, to draw (8)")
    add("--queries", choices=("worst", "random"), default="worst", help="which queries to draw (worst)")
    add("--rerank", action="store_true", help="rank with k-reciprocal re-ranking")
    add_model_flags(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """ValueError, in one line and before any work, for an impossible device, number or combination."""
    check_model_flags(args)
    if args.backbone and not args.words:
        raise ValueError("--backbone is CLIP before any training, which has only --words to look for: give them")
    if args.count < 1:
        raise ValueError("--count must be at least 1")
    if sum(map(bool, (args.figure_4, args.words, args.s_star is not None))) > 1:
        raise ValueError("--figure-4, --words and --s-star are drawings of their own: give one of them")
    if args.figure_4 and (args.images or args.checkpoint):
        raise ValueError("--figure-4 names its runs and takes people of their dataset: drop --images and --checkpoint")
    if args.rerank and (args.images or args.figure_4 or args.words or args.s_star is not None):
        raise ValueError("--rerank is for the ranked lists of a dataset's queries: drop it")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file: give the name of a folder")
    words = [*(args.words or ()), *(args.s_star or ())]
    if not all(map(str.strip, words)):
        raise ValueError("--words and --s-star take words, and one of them is empty")
    clip.tokenize([demo.sentence(word) for word in words])  # ValueError if they are too many


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
        draw_attention(model, [dataset.query[q] for q in queries], args)
    if model.interaction and dataset.name == "synthetic":
        untrained = build_model(argparse.Namespace(**settings), dataset.num_identities).to(args.device).eval()
        print_attention_inside({"untrained": untrained, "trained": model}, dataset, args)


def look_at_words(model: PromptSG, args: argparse.Namespace) -> None:
    """--words or --s-star, of --images or of some queries of the dataset, chosen at random."""
    if args.s_star is not None and not model.inversion:
        raise ValueError("--s-star needs the inversion network, and this model was trained without one")
    if args.images:
        samples = find_pictures(args.images)
    else:
        query = data.load_dataset(args.dataset, args.data_root).query
        samples = random.Random(0).sample(query, min(args.count, len(query)))
    (draw_words if args.words else draw_pseudo_words)(model, samples, args)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    if args.figure_4:
        return draw_figure_4(args)
    model, settings = load_model(args)
    if args.words or args.s_star is not None:
        look_at_words(model, args)
    elif not args.images:
        look_at_dataset(model, settings, args)
    elif model.interaction:
        draw_attention(model, find_pictures(args.images), args)
    else:
        raise ValueError("--images shows the interaction module's attention, and this model was trained without one")


if __name__ == "__main__":
    machine.exit_on_error(main)
