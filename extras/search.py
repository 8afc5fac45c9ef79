"""Finds, among your own pictures, those most like one; or writes the features of all of them.

python -m extras.search --images folder --query one.jpg
python -m extras.search --images folder --features features.npz
"""

import argparse
from pathlib import Path

from torch import Tensor

import data
import evaluate
from extras.look import TILE, find_pictures, save_sheets, tile
from util import machine


def draw_search(query: data.Sample, samples: list[data.Sample], similarity: Tensor, stem: Path) -> None:
    """Prints and draws the ten best matches of similarity (N,)."""
    tiles = [tile(data.read_picture(query.path, TILE), "query")]
    for value, n in zip(*(column.tolist() for column in similarity.topk(min(10, len(similarity))))):
        print(f"{value:.3f}  {samples[n].path}")
        tiles.append(tile(data.read_picture(samples[n].path, TILE), f"{value:.2f}: {samples[n].path.stem}"))
    save_sheets([tiles], stem)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Every setting and its meaning."""
    parser = machine.make_parser("-m extras.search", "Find people in your own pictures.")
    add = parser.add_argument
    add("--images", type=Path, nargs="+", metavar="PATH", required=True, help="files or folders to search in")
    add("--query", type=Path, metavar="PICTURE", help="print and draw the ten most like this one")
    add("--features", type=Path, metavar="FILE.npz", help="write the names and features of all of them there")
    evaluate.add_checkpoint_flags(parser)
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """ValueError or FileNotFoundError, in one line and before any work, for impossible combinations."""
    machine.check_machine_flags(args)
    if not (args.query or args.features):
        raise ValueError("nothing to do: give --query PICTURE or --features FILE.npz")
    machine.check_output("--features", args.features, ".npz")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_args(args)
    model, _ = evaluate.load_run(args)

    samples = find_pictures(args.images)
    query = [data.Sample(args.query, data.JUNK, 0)] if args.query else []
    both = evaluate.extract(lambda images: model.embed(images, args.prompt), query + samples, args)
    query_features, features = both.split([len(query), len(samples)])
    if args.features:
        names = [str(sample.path) for sample in samples]
        evaluate.write_arrays(args.features, {"images_names": names, "images_features": features.cpu().numpy()})
    if args.query:
        draw_search(query[0], samples, features @ query_features[0], Path(f"search-{args.query.stem}"))


if __name__ == "__main__":
    machine.exit_on_error(main)
