"""Finds people in your own pictures by a picture, by words, or by both; or writes the features of all of them.

python -m extras.search --images folder --query one.jpg
python -m extras.search --images folder --words "a person with red top, a bag"
python -m extras.search --images folder --query one.jpg --words "a person with green top"
python -m extras.search --images folder --features features.npz

With --backbone it searches by CLIP alone, before any training.
"""

import argparse
import functools
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import clip
import data
import evaluate
from extras import look
from extras.look import TILE, tile
from util import machine
from util.run import write_arrays


def draw_search(head: list[Tensor], samples: list[data.Sample], similarity: Tensor, stem: Path) -> None:
    """Prints the ten best matches of similarity (N,), and draws them behind the tiles of the query."""
    tiles = list(head)
    for value, n in zip(*(column.tolist() for column in similarity.topk(min(10, len(similarity))))):
        print(f"{value:.3f}  {samples[n].path}")
        tiles.append(tile(data.read_picture(samples[n].path, TILE), f"{samples[n].path.stem}: {value:.2f}"))
    look.save_sheets([tiles], stem)


def sentence(words: str) -> str:
    """What the text encoder reads of --words."""
    return f"A photo of {words}"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning."""
    parser = machine.make_parser("-m extras.search", "Find people in your own pictures.")
    add = parser.add_argument
    add("--images", type=machine.path, nargs="+", metavar="PATH", required=True, help="files or folders to search in")
    add("--query", type=machine.path, metavar="PICTURE", help="print and draw the ten most like this one")
    add("--words", help='the same by words, as in "A photo of WORDS"; with --query, by both')
    add("--features", type=machine.path, metavar="FILE.npz", help="write the names and features of all of them there")
    look.add_model_flags(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError, in one line and before any work, for impossible combinations."""
    look.check_model_flags(args)
    if args.words is not None:
        if not args.words.strip():
            raise ValueError("--words is empty: say what to search for")
        clip.tokenize(sentence(args.words))  # ValueError if it is too long
    if not (args.query or args.words or args.features):
        raise ValueError("nothing to do: give --query PICTURE, --words WORDS or --features FILE.npz")
    machine.check_output("--features", args.features, ".npz")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    samples = look.find_pictures(args.images)
    model, _ = look.load_model(args)
    is_of_v = args.words or args.backbone
    print("space: CLIP's joint space, v" if is_of_v else f"space: retrieval features, BN(z), {args.prompt} prompt")
    embed = functools.partial(model.embed, prompt="none" if is_of_v else args.prompt)

    query = [data.Sample(args.query, data.JUNK, 0)] if args.query else []
    queries, features = evaluate.extract(embed, query + samples, args).split([len(query), len(samples)])
    if args.features:
        names = [str(sample.path) for sample in samples]
        write_arrays({"images_names": names, "images_features": features.cpu().numpy()}, args.features)
    head = [tile(data.read_picture(sample.path, TILE), "query") for sample in query]
    if args.words:
        text = look.encode_sentences(model, [sentence(args.words)])
        queries = torch.cat([queries, text])
        head.append(look.words_tile(args.words, "query"))
        print(f"words: {sentence(args.words)}")
    if head:
        names = [args.query.stem if args.query else "", re.sub(r"\W+", "-", args.words or "")[:40]]
        similarity = features @ F.normalize(queries.mean(dim=0), dim=0)  # by both: tests/words.py finds the mean better
        draw_search(head, samples, similarity, Path("-".join(["search", *filter(None, names)])))


if __name__ == "__main__":
    machine.exit_on_error(main)
