"""Person re-identification data: readers, transforms, PK sampler, loaders.

A reader turns an owner's folder into a Dataset of three lists of Samples. In a sample, pid is the identity
("person id") and camid the camera, both as the owner numbers them; in `train`, pids are relabelled to 0 .. K-1.
"""

import math
import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2

import clip
from util import demo, machine
from util.pictures import count_passed_over, open_picture


class Sample(NamedTuple):
    path: Path
    pid: int
    camid: int


class Dataset(NamedTuple):
    name: str
    folder: Path
    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]
    passed_over: list[Path] = []  # files whose names are not of the dataset's pattern

    @property
    def num_identities(self) -> int:
        """Identities to classify in training."""
        return len({sample.pid for sample in self.train})

    @property
    def version(self) -> str | None:
        """Of MSMT17, whose two versions score differently: V1, or V2 with its faces masked."""
        is_masked = "mask_train_v2" in self.train[0].path.parts
        return ("V2" if is_masked else "V1") if self.name == "msmt17" else None


# -------------------------------------------------------------------------------------------------- readers

# (identities, images, cameras) as published; Market-1501's gallery without its junk, with its distractors (identity 0).
OFFICIAL = {
    "market1501": {"train": (751, 12936, 6), "query": (750, 3368, 6), "gallery": (751, 15913, 6)},
    "msmt17": {"train": (1041, 32621, 15), "query": (3060, 11659, 15), "gallery": (3060, 82161, 15)},
    "dukemtmc": {"train": (702, 16522, 8), "query": (702, 2228, 8), "gallery": (1110, 17661, 8)},
    "cuhk03": {"train": (767, 7368, 2), "query": (700, 1400, 2), "gallery": (700, 5328, 2)},
    "cuhk03-detected": {"train": (767, 7365, 2), "query": (700, 1400, 2), "gallery": (700, 5332, 2)},
}
FOLDERS = {
    "market1501": ("Market-1501-v15.09.15", "market1501"),
    "msmt17": ("MSMT17_V1", "MSMT17_V2", "MSMT17", "msmt17"),
    "dukemtmc": ("DukeMTMC-reID", "dukemtmc"),
    "cuhk03": ("cuhk03-np/labeled",),
    "cuhk03-detected": ("cuhk03-np/detected",),
    "synthetic": ("synthetic",),
    "folder": ("",),
}
MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
MARKET_NAME = re.compile(r"(-1|\d+)_c(\d+).*\.(jpg|jpeg|png)", re.IGNORECASE)
# Picture, camera, pid.
MSMT17_LINE = re.compile(r"(\d+/\d+_\d+_(\d+)_[^\s/]*\.(?:jpg|jpeg|png))\s+(\d+)", re.IGNORECASE)
JUNK = -1  # Market-1501's identity of bad detections, which count neither as right nor as wrong


def load_dataset(name: str, root: str | Path = "data") -> Dataset:
    """Reads one of FOLDERS below `root`. "synthetic" is drawn there first if it is missing.

    Raises FileNotFoundError, with the layout expected, if a folder or list is missing; ValueError if `name` is none of
    FOLDERS, `root` no folder, or a subset empty.
    """
    root = Path(root)
    if name not in FOLDERS:
        raise ValueError(f"no dataset {name}: give --dataset one of {', '.join(FOLDERS)}")
    if os.path.lexists(root) and not root.is_dir():
        raise ValueError(f"--data-root {root} is a file, or a link that leads nowhere: give a folder")
    if name == "synthetic" and not os.path.lexists(root / "synthetic"):
        demo.draw_dataset(root / "synthetic", MARKET_FOLDERS)
    folder = find_folder(name, root)
    train, query, gallery, passed_over = (read_msmt17 if name == "msmt17" else read_market)(folder)
    labels = {pid: label for label, pid in enumerate(sorted({sample.pid for sample in train}))}
    train = [sample._replace(pid=labels[sample.pid]) for sample in train]
    return Dataset(name, folder, train, query, gallery, passed_over)


def find_folder(name: str, root: Path) -> Path:
    """The first folder below `root` that holds the dataset; FileNotFoundError with advice if there is none."""
    inside = ["train|mask_train_v2", "list_train.txt"] if name == "msmt17" else list(MARKET_FOLDERS.values())

    def is_there(path: Path) -> bool:
        return path.is_file() if path.suffix == ".txt" else path.is_dir()

    def holds(folder: Path) -> bool:
        return all(any(is_there(folder / entry) for entry in choices.split("|")) for choices in inside)

    candidates = [root / folder for folder in FOLDERS[name]]
    for folder in candidates:
        if holds(folder):
            return folder
    expected = f"expected {candidates[0]}/{{{','.join(inside)}}}"
    if holds(root):
        raise FileNotFoundError(f"{root} is {name} itself: give --data-root the folder above it ({expected})")
    for folder in candidates:
        nested = next((child for child in folder.glob("*/") if holds(child)), None)
        if nested:
            raise FileNotFoundError(f"{name} lies one folder too deep, in {nested}: move it up ({expected})")
    raise FileNotFoundError(f"{name} is not under {root}: {expected}; docs/data.md says where to get it")


def read_market(folder: Path) -> tuple[list[Sample], list[Sample], list[Sample], list[Path]]:
    """Market-1501's layout, which DukeMTMC-reID and CUHK03-NP share: identity and camera stand in the file name.

    Junk, identity -1, is left out. Files of another pattern are passed over (Market-1501 ships a Thumbs.db); these are
    returned last. ValueError if nothing else is there.
    """
    subsets, passed_over = [], []
    for subfolder in MARKET_FOLDERS.values():
        matches = [(path, MARKET_NAME.fullmatch(path.name)) for path in sorted((folder / subfolder).iterdir())]
        samples = [Sample(path, int(match[1]), int(match[2])) for path, match in matches if match]
        others = [path for path, match in matches if not match]
        subsets.append([sample for sample in samples if sample.pid != JUNK])
        passed_over += others
        if not subsets[-1]:
            there = count_passed_over(others) if others else "it is empty, or all junk"
            raise ValueError(f"no picture in {folder / subfolder} has a name like 0002_c1_anything.jpg: {there}")
    return *subsets, passed_over


def read_msmt17(folder: Path) -> tuple[list[Sample], list[Sample], list[Sample], list[Path]]:
    """MSMT17 V1 (train, test) or V2 (mask_train_v2, mask_test_v2) by its list files; train is train + val."""
    train_folder = next(path for path in (folder / "train", folder / "mask_train_v2") if path.exists())
    test_folder = folder / train_folder.name.replace("train", "test")
    if not test_folder.is_dir():
        raise FileNotFoundError(f"MSMT17's {test_folder} is missing: unpack the dataset again")

    def read_list(name: str, pictures: Path) -> list[Sample]:
        """Lines of a picture's path and its identity; the camera is the third number in the picture's name."""
        if not (folder / name).is_file():
            raise FileNotFoundError(f"MSMT17's {name} is missing in {folder}: unpack the dataset again")
        samples = []
        for line in (folder / name).read_text("utf-8-sig", "replace").split("\n"):
            if not line.strip():
                continue
            match = MSMT17_LINE.fullmatch(line.strip())
            if not match:
                raise ValueError(f"{folder / name} has a line not of MSMT17's pattern: {line[:80]!r}")
            samples.append(Sample(pictures / match[1], int(match[3]), int(match[2])))
        if not samples:
            raise ValueError(f"{folder / name} lists no pictures: unpack the dataset again")
        return samples

    train = read_list("list_train.txt", train_folder) + read_list("list_val.txt", train_folder)
    return train, read_list("list_query.txt", test_folder), read_list("list_gallery.txt", test_folder), []


def summary(dataset: Dataset) -> str:
    """The table the field expects, with a warning for every subset that differs from the published counts."""
    name = " ".join(filter(None, (dataset.name, dataset.version)))
    lines = [f"{name}, read from {dataset.folder}", "subset           | # ids | # images | # cameras"]
    for subset in ("train", "query", "gallery"):
        samples = getattr(dataset, subset)
        found = len({sample.pid for sample in samples}), len(samples), len({sample.camid for sample in samples})
        lines.append(f"{subset:<16} | {found[0]:5d} | {found[1]:8d} | {found[2]:9d}")
        official = OFFICIAL.get(dataset.name, {}).get(subset, found)
        if found != official:
            should, has = ("{} ids, {} images, {} cameras".format(*counts) for counts in (official, found))
            lines.append(
                f"warning: {dataset.name}'s {subset} should have {should}, not {has}: "
                "results will not compare with published ones"
            )
    if dataset.passed_over:
        lines.append(count_passed_over(dataset.passed_over))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- transforms


def read_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture file at (height, width): uint8 (3, H, W). Raises as `open_picture` does."""
    pixels = v2.functional.pil_to_tensor(open_picture(path))
    return v2.functional.resize(pixels, size, v2.InterpolationMode.BICUBIC, antialias=True)


def augmentation(size: tuple[int, int]) -> v2.Transform:
    """What prior work does to a training picture (Luo et al. 2019, [24]), on uint8 (3, H, W).

    Flip, pad by 10 and crop, erase a rectangle (filled with CLIP's mean colour, which is 0 after normalisation).
    """
    mean_colour = [round(255 * channel) for channel in clip.MEAN]
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.Pad(10),
            v2.RandomCrop(size),
            v2.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 1 / 0.3), value=mean_colour),
        ]
    )


# ------------------------------------------------------------------------------------- sampler and loaders


class PKSampler(Sampler[list[tuple[int, int]]]):
    """Batches of P identities x K pictures ("16 identities with 4 images per identity", section 5.1).

    A picture is its index and the seed of its augmentation, so that no result depends on the number of loader
    processes, and an epoch may be taken up in its middle.

    An epoch follows the RandomIdentitySampler of the bag-of-tricks baseline [24]: each identity's pictures, shuffled,
    are dealt into groups of K (an identity with fewer repeats some; the last incomplete group is left out); each batch
    takes one group of P random identities that have one left; the epoch ends when fewer than P identities have.

    `len` is the true number of batches, skipped ones included. The same seed and epoch give the same batches.
    rank, world_size: of several processes, each takes its own share of every batch's identities.
    Raises ValueError if there are fewer than P identities, or if P cannot be shared evenly.
    """

    def __init__(
        self,
        pids: list[int],
        num_ids: int = 16,
        num_images: int = 4,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.indices = defaultdict(list)
        for index, pid in enumerate(pids):
            self.indices[pid].append(index)
        if len(self.indices) < num_ids:
            raise ValueError(
                f"a batch needs {num_ids} identities, the data has {len(self.indices)}: use a smaller --batch-ids"
            )
        if num_ids % world_size:
            raise ValueError(
                f"--batch-ids {num_ids} cannot be shared among {world_size} processes: use a multiple of {world_size}"
            )
        size = num_ids * num_images // world_size
        self.share = slice(rank * size, (rank + 1) * size)
        self.num_ids = num_ids
        self.num_images = num_images
        self.seed = seed
        self.set_epoch(1)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Deals the batches of an epoch, of which iteration leaves out the first `skip`."""
        rng = random.Random(f"{self.seed} {epoch}")
        groups = {}
        for pid, indices in self.indices.items():
            if len(indices) < self.num_images:
                indices = rng.choices(indices, k=self.num_images)
            shuffled = rng.sample(indices, len(indices))
            starts = range(0, len(shuffled) - self.num_images + 1, self.num_images)
            groups[pid] = [shuffled[start : start + self.num_images] for start in starts]
        self.batches = []
        while len(groups) >= self.num_ids:
            batch = []
            for pid in rng.sample(sorted(groups), self.num_ids):
                batch += groups[pid].pop()
                if not groups[pid]:
                    del groups[pid]
            self.batches.append([(index, rng.getrandbits(63)) for index in batch])
        self.skip = skip

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([batch[self.share] for batch in self.batches[self.skip :]])


class Pictures(torch.utils.data.Dataset):
    """Samples as (uint8 picture (3, H, W), pid)."""

    def __init__(self, samples: list[Sample], size: tuple[int, int]):
        self.samples, self.size = samples, size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return read_picture(self.samples[index].path, self.size), self.samples[index].pid


class AugmentedPictures(Pictures):
    """The same, augmented; indexed as PKSampler does, by index and seed.

    cache: keep every picture, decoded and resized, in memory that the loader processes share and fill as they go.
    Raises ValueError, with the size, if that memory is not there.
    """

    def __init__(self, samples: list[Sample], size: tuple[int, int], cache: bool = False):
        super().__init__(samples, size)
        self.augment = augmentation(size)
        self.cache = None
        if cache:
            needed = len(samples) * 3 * math.prod(size)
            machine.require_shared_memory(needed, "drop --cache")
            print(f"caching {len(samples)} pictures takes {needed / 1e9:.1f} GB of shared memory")
            self.cache = torch.empty(len(samples), 3, *size, dtype=torch.uint8).share_memory_()
            self.is_cached = torch.zeros(len(samples), dtype=torch.bool).share_memory_()

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = index_and_seed
        if self.cache is None:
            picture = read_picture(self.samples[index].path, self.size)
        else:
            if not self.is_cached[index]:
                self.cache[index] = read_picture(self.samples[index].path, self.size)
                self.is_cached[index] = True
            picture = self.cache[index]
        torch.default_generator.manual_seed(seed)  # the generator that torchvision's transforms draw from
        return self.augment(picture), self.samples[index].pid


def make_loader(pictures: Pictures, count: int, workers: int, **batches) -> DataLoader:
    """count: pictures in a batch; each loader process prepares two batches ahead, in shared memory."""
    needed = 2 * workers * count * 3 * math.prod(pictures.size)
    machine.require_shared_memory(needed, "use fewer --workers, or give Docker a larger --shm-size")
    return DataLoader(
        pictures,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=machine.ignore_interrupts,
        **batches,
    )


def train_loader(
    samples: list[Sample], sampler: PKSampler, size: tuple[int, int], workers: int, cache: bool = False
) -> DataLoader:
    """Augmented batches (images uint8 (P * K, 3, H, W), labels (P * K,)) in the sampler's order."""
    pictures = AugmentedPictures(samples, size, cache)
    count = sampler.num_ids * sampler.num_images
    return make_loader(pictures, count, workers, batch_sampler=sampler, persistent_workers=workers > 0)


def test_loader(samples: list[Sample], size: tuple[int, int], batch_size: int, workers: int) -> DataLoader:
    """Batches (images uint8 (B, 3, H, W), pids (B,)) in the order of `samples`."""
    return make_loader(Pictures(samples, size), batch_size, workers, batch_size=batch_size)
