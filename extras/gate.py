"""Evaluate a checkpoint of CLIP-ReID with this code and compare with the published results.

python -m extras.gate WEIGHTS.pth --dataset market1501

The README of github.com/Syliz517/CLIP-ReID has links to the checkpoints.

If the results agree, the visual encoder, the data and the evaluation are correct.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `python extras/gate.py` works too

import clip
import data
import evaluate
from util.checkpoint import read_tensors
from util.device import default_workers, ignore_interrupts, one_line, run_script, setup, show_progress

GRID = (16, 8)  # patches of an image of 256x128
MEAN_STD = {"ViT": ([0.5] * 3, [0.5] * 3), "CNN": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}  # CNN: ImageNet's
EXPECTED = {  # mAP and Rank-1 from the paper's Table 2; we assume that its rows "Baseline" are CLIP-ReID's
    "ViT-baseline": {"market1501": (86.4, 93.3), "msmt17": (66.1, 84.4), "dukemtmc": (80.0, 88.8)},
    "CNN-baseline": {"market1501": (88.1, 94.7), "msmt17": (60.7, 82.1), "dukemtmc": (79.3, 88.6)},
    "ViT-CLIP-ReID": {"market1501": (89.6, 95.5), "msmt17": (73.4, 88.7), "dukemtmc": (82.5, 90.0)},
    "CNN-CLIP-ReID": {"market1501": (89.8, 95.7), "msmt17": (63.0, 84.4), "dukemtmc": (80.7, 90.0)},
}


def load_encoder(path: Path) -> tuple[nn.Module, str, list[str]]:
    """Return the visual encoder of a checkpoint, its name in EXPECTED, and the names of the other modules.

    Raises FileNotFoundError, or ValueError if it is not a checkpoint that the gate can evaluate.
    """
    weights = read_tensors(path)
    try:
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
        others = sorted({name.split(".")[0] for name in weights} - {"image_encoder"})
        weights = {name[14:]: tensor for name, tensor in weights.items() if name.startswith("image_encoder.")}
        is_vit = "proj" in weights
        tokens = len(weights["positional_embedding" if is_vit else "attnpool.positional_embedding"]) - 1
        if "cv_embed" in others or tokens != GRID[0] * GRID[1]:
            raise ValueError(f"it has camera embeddings (SIE), another stride (OLP) or image size ({tokens} tokens)")
        if is_vit:
            layers, (width, embed_dim) = sum("in_proj_weight" in name for name in weights), weights["proj"].shape
            encoder = clip.VisionTransformer(GRID, 16, width, layers, embed_dim)
        else:
            blocks = [name.split(".")[0] for name in weights if name.endswith(".conv3.weight")]
            layers, width = [blocks.count(f"layer{stage}") for stage in (1, 2, 3, 4)], len(weights["conv3.weight"])
            encoder = clip.ModifiedResNet(GRID, layers, width, len(weights["attnpool.c_proj.weight"]), last_stride=1)
        encoder.load_state_dict(weights)
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint of CLIP-ReID for the gate: {one_line(error)}") from error
    name = ("ViT-" if is_vit else "CNN-") + ("CLIP-ReID" if "prompt_learner" in others else "baseline")
    return encoder.eval(), name, others


def read_images(paths: Sequence[Path]) -> Tensor:
    """Read image files as evaluation does, but resized as CLIP-ReID does for testing: uint8 (B, 3, 256, 128)."""
    images = [data.open_image(path).resize((128, 256), Image.Resampling.BILINEAR) for path in paths]
    return torch.stack([pil_to_tensor(image) for image in images])


@torch.inference_mode()
def extract(encoder: nn.Module, paths: list[Path], mean: list[float], std: list[float], workers: int = 0) -> Tensor:
    """Return the last hidden state and v, L2-normalised: ViT (N, 768 + 512), RN50 (N, 2048 + 1024).

    CLIP-ReID calls these features "before" the BNNecks. Raises OSError if an image cannot be read.
    """
    device, features = next(encoder.parameters()).device, []
    loader = DataLoader(paths, 128, num_workers=workers, collate_fn=read_images, worker_init_fn=ignore_interrupts)
    for images in loader:
        states = encoder(normalize(images.to(device) / 255, mean, std)).states  # v is the last one
        features.append(nn.functional.normalize(torch.cat(states[1:], dim=1)))
        show_progress(sum(map(len, features)), len(paths), "images")
    return torch.cat(features)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("weights", type=Path, metavar="WEIGHTS.pth", help="checkpoint from the README of CLIP-ReID")
    add("--dataset", choices=data.FOLDERS, required=True, help="dataset that it was trained on")
    add("--data-root", default="data", help="directory of the datasets (default: data)")
    add("--device", help="cpu, cuda, ... (default: cuda if available, otherwise cpu)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    device = setup(args.device)
    encoder, name, others = load_encoder(args.weights)
    dataset = data.load_dataset(args.dataset, args.data_root, ("query", "gallery"))
    print(f"{args.weights}: {name}; skipped: {', '.join(others)}\n{data.summary(dataset)}")
    paths = [sample.path for sample in dataset.query + dataset.gallery]
    features = extract(encoder.to(device), paths, *MEAN_STD[name[:3]], default_workers(device))
    result = evaluate.rank_dataset(dataset, *features.split([len(dataset.query), len(dataset.gallery)]))
    print(f"{args.dataset}, {name}: {evaluate.describe(result)}")
    if args.dataset not in EXPECTED[name]:
        print("no result is published for this model on this dataset: no verdict")
        return
    mAP, rank1 = EXPECTED[name][args.dataset]
    print(f"expected: mAP {mAP}%  Rank-1 {rank1}%, both within 0.3")
    if max(abs(100 * result["mAP"] - mAP), abs(100 * result["rank1"] - rank1)) > 0.3:
        sys.exit("FAILED: check the dataset's version (MSMT17: V1), the file (is it this dataset's?), the images")
    print("passed: visual encoder, data and evaluation are correct")


if __name__ == "__main__":
    run_script(main)
