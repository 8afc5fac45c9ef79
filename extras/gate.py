"""Does a checkpoint of CLIP-ReID, read, embedded and scored by our code as by its own, score as published?

python -m extras.gate WEIGHTS.pth --dataset market1501    # the README of github.com/Syliz517/CLIP-ReID links the files
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import normalize, pil_to_tensor

import clip
import data
import evaluate
from util import machine, run
from util.pictures import open_picture

GRID = (16, 8)  # of the tokens of a picture of 256x128
MEAN_STD = {"ViT": ([0.5] * 3, [0.5] * 3), "CNN": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])}  # CNN: ImageNet's
EXPECTED = {  # mAP and Rank-1 in the paper's Table 2, whose rows "Baseline" are, we believe, CLIP-ReID's baselines
    "ViT-baseline": {"market1501": (86.4, 93.3), "msmt17": (66.1, 84.4), "dukemtmc": (80.0, 88.8)},
    "CNN-baseline": {"market1501": (88.1, 94.7), "msmt17": (60.7, 82.1), "dukemtmc": (79.3, 88.6)},
    "ViT-CLIP-ReID": {"market1501": (89.6, 95.5), "msmt17": (73.4, 88.7), "dukemtmc": (82.5, 90.0)},
    "CNN-CLIP-ReID": {"market1501": (89.8, 95.7), "msmt17": (63.0, 84.4), "dukemtmc": (80.7, 90.0)},
}


def load_encoder(path: Path) -> tuple[nn.Module, str, list[str]]:
    """A checkpoint's encoder, its name in EXPECTED, what else it holds. ValueError if it is none for the gate."""
    weights = run.read_whole(path)
    try:
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
        others = sorted({name.split(".")[0] for name in weights} - {"image_encoder"})
        weights = {name[14:]: tensor for name, tensor in weights.items() if name.startswith("image_encoder.")}
        is_vit = "proj" in weights
        tokens = len(weights["positional_embedding" if is_vit else "attnpool.positional_embedding"]) - 1
        if "cv_embed" in others or tokens != GRID[0] * GRID[1]:
            raise ValueError(f"it has camera embeddings (SIE), another stride (OLP) or picture size ({tokens} tokens)")
        if is_vit:
            layers, (width, embed_dim) = sum("in_proj_weight" in name for name in weights), weights["proj"].shape
            encoder = clip.VisionTransformer(GRID, 16, width, layers, embed_dim)
        else:
            blocks = [name.split(".")[0] for name in weights if name.endswith(".conv3.weight")]
            layers, width = [blocks.count(f"layer{stage}") for stage in (1, 2, 3, 4)], len(weights["conv3.weight"])
            encoder = clip.ModifiedResNet(GRID, layers, width, len(weights["attnpool.c_proj.weight"]), last_stride=1)
        encoder.load_state_dict(weights)
    except (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint of CLIP-ReID for the gate: {machine.one_line(error)}") from error
    name = ("ViT-" if is_vit else "CNN-") + ("CLIP-ReID" if "prompt_learner" in others else "baseline")
    return encoder.eval(), name, others


def read_pictures(samples: list[data.Sample]) -> Tensor:
    """RGB uint8 (B, 3, 256, 128) of picture files, resized as CLIP-ReID does for testing. OSError if one is broken."""
    pictures = [open_picture(path).resize((128, 256), Image.Resampling.BILINEAR) for path, *_ in samples]
    return torch.stack([pil_to_tensor(picture) for picture in pictures])


def extract(encoder: nn.Module, samples: list[data.Sample], mean_and_std: tuple, args: argparse.Namespace) -> Tensor:
    """The last state beside v, before the necks, L2-normalised: (N, 768 + 512), of RN50 (N, 2048 + 1024)."""
    features = []
    for images in DataLoader(samples, args.eval_batch_size, num_workers=args.workers, collate_fn=read_pictures):
        with torch.inference_mode(), machine.autocast(args):
            states = encoder(normalize(images.to(args.device) / 255, *mean_and_std)).states  # v is the last one
            features.append(nn.functional.normalize(torch.cat(states[1:], dim=1).float()))
        machine.show_progress(sum(map(len, features)), len(samples), "pictures")
    return torch.cat(features)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = machine.make_parser("-m extras.gate WEIGHTS.pth", "Does CLIP-ReID's checkpoint score as published?")
    parser.add_argument("weights", type=machine.path, metavar="WEIGHTS.pth", help="one that CLIP-ReID's README links")
    parser.add_argument("--dataset", choices=data.FOLDERS, required=True, help="it was trained on")
    machine.add_machine_flags(parser)
    parser.set_defaults(precision="fp32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    machine.check_machine_flags(args)
    encoder, name, others = load_encoder(args.weights)
    dataset = data.load_dataset(args.dataset, args.data_root)
    print(f"{args.weights}: {name}; passed over: {', '.join(others)}\n{data.summary(dataset)}")
    features = extract(encoder.to(args.device), dataset.query + dataset.gallery, MEAN_STD[name[:3]], args)
    result = evaluate.metrics_of(*features.split([len(dataset.query), len(dataset.gallery)]), dataset)
    print(f"{args.dataset}, {name}: {evaluate.describe(result)}")
    if args.dataset not in EXPECTED[name]:
        return print("no figure is published for this model on this dataset: no verdict")
    mAP, rank1 = EXPECTED[name][args.dataset]
    print(f"expected: mAP {mAP}%  Rank-1 {rank1}%, both to 0.3")
    if max(abs(100 * result["mAP"] - mAP), abs(100 * result["rank1"] - rank1)) > 0.3:
        raise SystemExit("FAILED: look at the dataset's version (MSMT17: V1), the file (this dataset's?), the pictures")
    print("passed: encoder, data and scoring are right")


if __name__ == "__main__":
    machine.exit_on_error(main)
