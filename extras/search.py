"""Find people in your own images: by an image, by words, or by both.

python -m extras.search --images folder --query one.jpg two.jpg
python -m extras.search --images folder --words "a person with red top, a bag"
python -m extras.search --images folder --query one.jpg --words "a person with green top"

Images are compared by their retrieval features. With words, they are compared by CLIP's embedding v,
because text features are in the space of v.
"""

import argparse
import itertools
import os
import sys
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python extras/search.py` works too

import data
import evaluate
from extras.look import TILE, Tile, draw_sheet, load_run
from model import PromptSG
from util import checkpoint
from util.device import default_workers, run_script, setup


def search(
    model: PromptSG,
    images: list[Path],
    queries: list[Path],
    words: str | None = None,
    prompt: str | None = None,
    count: int = 10,
    workers: int = 0,
) -> list[dict]:
    """Return the best matches of each query among images. Without queries, return those of the words.

    A query with words is the mean of v and T("A photo of WORDS"). A query does not match its own file.

    Returns for each query {"query": path or None, "words": words, "matches": [{"rank", "similarity", "path"}, ...]}.
    Raises OSError if a query, or all of the images, cannot be read.
    """
    space = "none" if words else prompt
    features = evaluate.extract(model, queries, space)  # (Q, D)
    if words:
        text = model.encode_text([f"A photo of {words}"]).cpu()  # (1, D)
        features = F.normalize(features + text, dim=1) if queries else text
    images = list({os.path.realpath(path): path for path in images}.values())  # each file once
    candidates, images = extract_readable(model, images, space, workers)  # (N, D)
    results = []
    for query, similarity in zip(queries or [None], features @ candidates.T):
        order = similarity.argsort(descending=True, stable=True).tolist()
        found = (n for n in order if query is None or not os.path.samefile(images[n], query))
        matches = [
            {"rank": rank, "similarity": similarity[n].item(), "path": str(images[n])}
            for rank, n in enumerate(itertools.islice(found, count), 1)
        ]
        results.append({"query": query and str(query), "words": words, "matches": matches})
    return results


def extract_readable(model: PromptSG, paths: list[Path], space: str, workers: int) -> tuple[Tensor, list[Path]]:
    """Return the features and paths of the images that can be read. Print how many are skipped."""
    try:
        return evaluate.extract(model, paths, space, workers=workers), paths
    except OSError:
        broken = [path for path in paths if not is_readable(path)]
        if len(broken) == len(paths):
            raise
        print(f"unreadable: {data.count_skipped(broken)}")
        paths = [path for path in paths if path not in broken]
        return evaluate.extract(model, paths, space, workers=workers), paths


def is_readable(path: Path) -> bool:
    try:
        data.open_image(path)
        return True
    except OSError:
        return False


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, nargs="+", metavar="PATH", required=True, help="image files and folders to search in")
    add("--query", type=Path, nargs="+", metavar="IMAGE", default=[], help="images to search for")
    add("--words", help='words to search for, as in "A photo of WORDS"; with --query, search for both')
    add("--count", type=int, default=10, help="number of matches of each query (default: 10)")
    add("--json", type=Path, metavar="FILE.json", help="write the matches to a file")
    add(
        "--output",
        type=Path,
        metavar="FILE.jpg",
        default="search.jpg",
        help="sheet of matches (default: search.jpg)",
    )
    add("--checkpoint", type=Path, help="a run's last.pt (default: the newest in runs/)")
    add("--prompt", choices=("composed", "simplified"), help="prompt at test time (default: the one trained with)")
    add("--device", help="cpu, cuda, ... (default: cuda if available, otherwise cpu)")
    args = parser.parse_args(argv)
    args.words = args.words and args.words.strip()
    if not (args.query or args.words):
        parser.error("nothing to search for: give --query IMAGE or --words WORDS")
    if args.words and args.prompt:
        parser.error("--prompt has no effect with --words, which uses v: drop it")
    if args.count < 1:
        parser.error("--count must be at least 1")
    for file, suffix in ((args.json, ".json"), (args.output, ".jpg")):
        if file and (file.suffix != suffix or not file.parent.is_dir()):
            parser.error(f"cannot write {file}: give a name that ends in {suffix}, in a directory that exists")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = setup(args.device)
    images = data.find_images(args.images)
    path = args.checkpoint or checkpoint.newest()
    model, _ = load_run(path, device)
    results = search(model, images, args.query, args.words, args.prompt, args.count, default_workers(device))

    space = "none" if args.words else args.prompt or model.default_prompt
    groups = []
    for result in results:
        query = result["query"]
        print("matches of " + " and ".join(filter(None, (query and data.printable(query), args.words))))
        group = [Tile(data.read_image(query, TILE), f"query: {Path(query).name}")] if query else []
        for match in result["matches"]:
            print(f"{match['rank']:4d}  {match['similarity']:.3f}  {data.printable(match['path'])}")
            caption = f"{match['rank']}: {match['similarity']:.2f} {Path(match['path']).name}"
            group.append(Tile(data.read_image(match["path"], TILE), caption))
        groups.append(group)
    words, space_name = (f' for "{args.words}"', "CLIP's v") if args.words else ("", f"{space} prompt")
    draw_sheet(groups, args.output, f"Best matches{words}: {path}, {space_name}")
    if args.json:
        about = {"checkpoint": str(path), "prompt": space, "image_size": list(model.image_size)}
        checkpoint.write_json({**about, "results": results}, args.json)


if __name__ == "__main__":
    run_script(main)
