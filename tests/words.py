"""Words at work, measured on the demo's people: where they are, what S* says, search by words: python tests/words.py

Of three rows of tests/ablation.py, whose runs it takes, or trains: the tables of docs/look.md.
"""

import functools
import random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from ablation import BASELINE, FULL, UNTRAINED
from experiment import DRAWING, Arguments, Row, cell, make_parser, text_to_picture, train_missing
from torch import Tensor
from torchvision.transforms import v2

import clip
import data
import evaluate
from extras import look
from model import PromptSG, restore_model, tokenize_composed
from util import demo, machine
from util.run import load_checkpoint

ROWS = [Row("before training", UNTRAINED), FULL._replace(name="PromptSG"), BASELINE]


def to_images(pictures: list, size: tuple[int, int]) -> Tensor:
    """Drawn pictures as a model takes them: (N, 3, H, W)"""
    resized = [v2.functional.resize(v2.functional.pil_to_tensor(picture), size) for picture in pictures]
    return clip.normalize(torch.stack(resized))


# ------------------------------------------------------------------------------------------ where the words are


@functools.cache
def part_mask(sample: data.Sample, part: str, draw_seed: int) -> Tensor:
    """Where a part is visible: (1, 256, 128)"""
    numbers = demo.picture_numbers(sample.pid, int(sample.path.stem.split("_")[2]), draw_seed)
    mask = demo.draw_part(demo.person_of(sample.pid, draw_seed), part, sample.camid, numbers)
    return v2.functional.pil_to_tensor(mask) / 255


def where_words_are(model: PromptSG, samples: list[data.Sample], draw_seed: int, args: Arguments) -> dict:
    """For each part, in the pictures that show it: how much of each map is on it, and how often the map's peak.

    A peak is on a part if it is in a patch of which the part covers at least half as much as of any.
    """
    found = {}
    for part in demo.PARTS:
        wearers = [s for s in samples if part in demo.describe(demo.person_of(s.pid, draw_seed))]
        masks = torch.stack([part_mask(sample, part, draw_seed) for sample in wearers])
        inside = F.adaptive_avg_pool2d(masks, model.clip.grid).flatten(1)
        wearers = [sample for sample, is_visible in zip(wearers, inside.any(dim=1)) if is_visible]
        inside = inside[inside.any(dim=1)].to(args.device)
        relative = inside / inside.max(dim=1, keepdim=True).values
        words = [demo.describe(demo.person_of(sample.pid, draw_seed))[part] for sample in wearers]
        with torch.no_grad():  # as they are, for the module, to which their length matters
            texts = model.clip.encode_text(clip.tokenize([demo.sentence(word) for word in words]).to(args.device))
        images = next(iter(data.test_loader(wearers, args.image_size, len(wearers), 0)))[0]
        images = clip.normalize(images.to(args.device))
        maps = {
            "words": look.words_relevance(model, images, texts),
            "person": look.words_relevance(model, images, model.simplified_text),
        }
        if model.interaction:
            with torch.no_grad():
                tokens = model.clip.encode_image(images).tokens
                maps["attention"] = model.interaction.attention_map(texts, tokens)
                maps["attention, person"] = model.interaction.attention_map(model.simplified_text, tokens)
        for name, tokens in maps.items():
            share, _ = look.inside_and_peak(tokens[:, 1:], inside)
            _, peak = look.inside_and_peak(tokens[:, 1:], relative)
            found[name, part] = share, peak
        found["chance", part] = inside.mean().item(), (relative >= 0.5).float().mean().item()
    return found


# ---------------------------------------------------------------------------------------------- what S* says


def own_colours(embeddings: Tensor, samples: list[data.Sample], model: PromptSG, draw_seed: int) -> dict:
    """How often the person's own colour is, of twelve, the nearest to an embedding (N, D), and among the nearest three:
    of the top and of the legs, as they are and "centred": less each word's mean cosine over all people, because a
    model may say much of people although all of them lie nearest to one word.
    """
    people = [demo.person_of(sample.pid, draw_seed) for sample in samples]
    found = {}
    for part, garments in (("top", ["top"]), ("legs", ["trousers", "shorts", "skirt"])):
        texts = torch.stack([look.encode_words(model, [f"{colour} {g}" for colour in demo.CLOTHES]) for g in garments])
        cosines = torch.einsum("nd,gcd->ngc", F.normalize(embeddings, dim=1), texts)  # (N, garments, 12)
        words = [demo.describe(person)[part].split() for person in people]
        own = torch.tensor([[list(demo.CLOTHES).index(colour)] for colour, _ in words]).to(cosines.device)
        garment = [garments.index(garment) for _, garment in words]
        for name, table in ((part, cosines), (f"{part}, centred", cosines - cosines.mean(dim=0))):
            table = table[range(len(people)), garment]  # (N, 12)
            rank = (table > table.gather(1, own)).sum(dim=1)
            found[name] = (rank < 1).float().mean().item(), (rank < 3).float().mean().item()
    return found


# ----------------------------------------------------------------------------------------- search by both


class Change(NamedTuple):
    """A person, and the same person in something of another colour; pictures by three cameras."""

    query: object
    unchanged: object
    changed: object
    words: str  # for what has changed


@functools.cache
def change(pid: int, draw_seed: int) -> Change:
    """Of a test person, drawn anew."""
    rng, person = random.Random(f"{draw_seed} change {pid}"), demo.person_of(pid, draw_seed)
    part, field = rng.choice((("top", "top"), ("legs", "bottom")))
    colour = rng.choice([rgb for rgb in demo.CLOTHES.values() if rgb != getattr(person, field)])
    other = person._replace(**{field: colour})
    cameras = rng.sample(range(1, 5), 3)
    pictures = [demo.draw_sample(who, camera, rng)[0] for who, camera in zip((person, person, other), cameras)]
    return Change(*pictures, demo.describe(other)[part])


@torch.inference_mode()
def find_changed(model: PromptSG, changes: list[Change], args: Arguments) -> dict[str, tuple[float, float]]:
    """For each kind of query: how often the changed person comes first, and among the first five, of everybody,
    changed and unchanged. "standardised": the similarities to picture and words, each brought to mean 0 and deviation 1
    over the gallery, summed.
    """

    def encode(pictures: list) -> tuple[Tensor, Tensor]:
        """v and the retrieval feature, of length 1."""
        images = to_images(pictures, args.image_size).to(args.device)
        prompt = "composed" if model.inversion else "simplified"
        return F.normalize(model.clip.encode_image(images).embedding, dim=1), model.embed(images, prompt)

    v, z = encode([x.query for x in changes])
    gallery_v, gallery_z = encode([x.changed for x in changes] + [x.unchanged for x in changes])
    text = look.encode_words(model, [x.words for x in changes])
    similarities = {
        "picture, v": v @ gallery_v.T,
        "picture, BN(z)": z @ gallery_z.T,
        "words": text @ gallery_v.T,
        "mean": (v + text) @ gallery_v.T,
    }
    if model.inversion:
        images = to_images([x.query for x in changes], args.image_size).to(args.device)
        visual = model.clip.encode_image(images).embedding
        ids = [tokenize_composed(f"A photo of a S* person with {x.words}").to(args.device) for x in changes]
        composed = torch.cat([model.compose(one[None], i) for one, i in zip(visual, ids)])
        similarities["composed"] = F.normalize(composed, dim=1) @ gallery_v.T
    picture, words = (
        (table - table.mean(dim=1, keepdim=True)) / table.std(dim=1, keepdim=True)
        for table in (similarities["picture, v"], similarities["words"])
    )
    similarities["standardised"] = picture + words
    ranks = {name: (table > table.diag()[:, None]).sum(dim=1) for name, table in similarities.items()}
    return {name: ((r < 1).float().mean().item(), (r < 5).float().mean().item()) for name, r in ranks.items()}


# ------------------------------------------------------------------------------------------------- tables


def measure(row: Row, seed: int, args: Arguments) -> dict:
    """All of it, of one run."""
    checkpoint = load_checkpoint(args.output / row.key(seed) / "last.pt")
    model, draw_seed = restore_model(checkpoint).to(args.device), DRAWING + seed
    args.image_size = tuple(checkpoint["args"]["image_size"])
    dataset = data.load_dataset(args.dataset, args.root(seed))
    samples = [sample for sample in dataset.query + dataset.gallery if sample.pid > 0]
    one_each = look.choose_people(dataset.query, len(dataset.query))
    v = evaluate.extract(lambda images: model.clip.encode_image(images).embedding, samples, args)
    found = {"text to picture": text_to_picture(model, samples, v, draw_seed)}
    found["where"] = where_words_are(model, one_each, draw_seed, args)
    found["colours", "v"] = own_colours(v, samples, model, draw_seed)
    if model.inversion:
        with torch.no_grad():
            found["colours", "S*"] = own_colours(model.compose(v), samples, model, draw_seed)
    found["search"] = find_changed(model, [change(s.pid, draw_seed) for s in one_each], args)
    return found


def pair(values: list[tuple[float, float]]) -> str:
    """Two figures in a cell."""
    return " / ".join(cell(list(column)) for column in zip(*values))


def print_row(*cells: str) -> None:
    print(f"| {' | '.join(cells)} |")


def print_tables(found: dict[str, list[dict]]) -> None:
    """Of each row's name, what was measured with each seed."""
    print("\nWhere the words are: share on the part / peak on it\n")
    print("| map | top | legs | hat | bag |\n|---|---|---|---|---|")
    maps = {"words": "its words", "person": '"A photo of a person"', "attention": "the module's attention, its words"}
    maps["attention, person"] = 'the module\'s attention, "A photo of a person"'
    some = next(iter(found.values()))
    print_row("chance: its share of the patches", *(pair([x["where"]["chance", p] for x in some]) for p in demo.PARTS))
    for name, runs in found.items():
        for kind, title in maps.items():
            if (kind, "top") in runs[0]["where"]:
                print_row(f"{name}: {title}", *(pair([x["where"][kind, p] for x in runs]) for p in demo.PARTS))

    kinds = ["top", "top, centred", "legs", "legs, centred"]
    print(f"\nNearest of twelve colours: the own one first / among three\n\n| nearest to | {' | '.join(kinds)} |")
    print(f"|---|{'---|' * len(kinds)}")
    print_row("chance", *["8.3 / 25.0"] * len(kinds))
    for name, runs in found.items():
        for space in ("v", "S*"):
            if ("colours", space) in runs[0]:
                print_row(f"{name}: {space}", *(pair([x["colours", space][kind] for x in runs]) for kind in kinds))

    ways = ["picture, v", "picture, BN(z)", "words", "composed", "mean", "standardised"]
    print(f"\nSearch: first / among five\n\n| CLIP | text to picture, mAP | {' | '.join(ways)} |\n|---|{'---|' * 7}")
    for name, runs in found.items():
        cells = [pair([x["search"][way] for x in runs]) if way in runs[0]["search"] else "" for way in ways]
        print_row(name, cell([x["text to picture"] for x in runs]), *cells)


def main() -> None:
    args, handed_on = make_parser(__doc__).parse_known_args(namespace=Arguments())
    train_missing(ROWS, args, handed_on)
    args.precision, args.workers, args.eval_batch_size = "fp32", 0, 128
    found = {}
    for row in ROWS:
        found[row.name] = [measure(row, seed, args) for seed in args.seeds]
        machine.show_progress(len(found), len(ROWS), "rows")
    print(f"seeds {' '.join(map(str, args.seeds))}; percent, with standard errors")
    print_tables(found)


if __name__ == "__main__":
    main()
