"""Person re-identification data: datasets, image files, PK sampler, data loaders.

A dataset has three lists of samples: train, query and gallery. A sample is an image file with its identity (pid) and
camera (camid), numbered as in the dataset. In train, identities are relabelled 0 .. K-1.
"""

import contextlib
import hashlib
import os
import random
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, PngImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2

import clip
from util.device import ignore_interrupts, one_line

# ------------------------------------------------------------------------------------------------- datasets

# Accepted folders of each dataset below --data-root: the owners' name first, then other common names.
FOLDERS = {
    "market1501": ("Market-1501-v15.09.15", "Market-1501", "Market1501", "market1501"),
    "msmt17": ("MSMT17_V1", "MSMT17_V2", "MSMT17", "msmt17"),
    "dukemtmc": ("DukeMTMC-reID", "DukeMTMC", "dukemtmc-reid", "dukemtmcreid", "dukemtmc"),
    "cuhk03": ("cuhk03-np/labeled", "cuhk03_np/labeled", "CUHK03-NP/labeled"),
    "cuhk03-detected": ("cuhk03-np/detected", "cuhk03_np/detected", "CUHK03-NP/detected"),
    "synthetic": ("synthetic",),
    "folder": ("",),
}
# Published (identities, images, cameras). Market-1501's gallery is counted without junk and with distractors (pid 0).
OFFICIAL = {
    "market1501": {"train": (751, 12936, 6), "query": (750, 3368, 6), "gallery": (751, 15913, 6)},
    "msmt17": {"train": (1041, 32621, 15), "query": (3060, 11659, 15), "gallery": (3060, 82161, 15)},
    "dukemtmc": {"train": (702, 16522, 8), "query": (702, 2228, 8), "gallery": (1110, 17661, 8)},
    "cuhk03": {"train": (767, 7368, 2), "query": (700, 1400, 2), "gallery": (700, 5328, 2)},
    "cuhk03-detected": {"train": (767, 7365, 2), "query": (700, 1400, 2), "gallery": (700, 5332, 2)},
}
# Layouts: for each subset, the image folder and the list files. All datasets but MSMT17 have Market-1501's.
MARKET1501 = {"train": ("bounding_box_train",), "query": ("query",), "gallery": ("bounding_box_test",)}
MSMT17_V1 = {
    "train": ("train", "list_train.txt", "list_val.txt"),
    "query": ("test", "list_query.txt"),
    "gallery": ("test", "list_gallery.txt"),
}
MSMT17_V2 = {subset: (f"mask_{images}_v2", *lists) for subset, (images, *lists) in MSMT17_V1.items()}  # masked faces
MARKET1501_NAME = re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d+).*\.(jpg|jpeg|png)", re.IGNORECASE)
MSMT17_LINE = re.compile(r"(\d+/\d+_\d+_(?P<camid>\d+)_[^\s/]*\.(?:jpg|jpeg|png))\s+(?P<pid>\d+)", re.IGNORECASE)
JUNK = -1  # identity of Market-1501's bad detections, which are neither correct nor wrong matches


class Sample(NamedTuple):
    """An image file with its identity and camera."""

    path: Path
    pid: int
    camid: int


class Dataset(NamedTuple):
    """The samples of a dataset."""

    name: str
    folder: Path
    train: list[Sample]
    query: list[Sample]
    gallery: list[Sample]
    skipped: list[Path] = []  # files whose names do not fit the layout

    @property
    def num_identities(self) -> int:
        """Number of identities in train."""
        return len({sample.pid for sample in self.train})

    @property
    def version(self) -> str | None:
        """Version of MSMT17, V1 or V2 (their results are not comparable); None for other datasets."""
        if self.name != "msmt17":
            return None
        first = (self.train or self.query or self.gallery)[0]
        return "V2" if first.path.parent.parent.name.startswith("mask_") else "V1"


def load_dataset(name: str, root: str | Path = "data", subsets: tuple = ("train", "query", "gallery")) -> Dataset:
    """Read the file names and lists of a dataset below `root`. Subsets that are not in `subsets` stay empty.

    Raises FileNotFoundError, with the expected folders, if one is missing; ValueError if a name or list is malformed.
    """
    if name not in FOLDERS:
        raise ValueError(f"no dataset {name}: choose one of {', '.join(FOLDERS)}")
    folder, layout = find_folder(name, Path(root), subsets)
    samples, skipped = {"train": [], "query": [], "gallery": []}, []
    for subset in subsets:
        images, *lists = layout[subset]
        for file in lists:
            samples[subset] += read_list(folder / file, folder / images)
        if not lists:
            samples[subset], others = read_folder(folder / images)
            skipped += others
    labels = {pid: label for label, pid in enumerate(sorted({sample.pid for sample in samples["train"]}))}
    samples["train"] = [sample._replace(pid=labels[sample.pid]) for sample in samples["train"]]
    return Dataset(name, folder, **samples, skipped=skipped)


def find_folder(name: str, root: Path, subsets: tuple) -> tuple[Path, dict]:
    """Return the folder and layout of a dataset. Raises FileNotFoundError if no folder holds all subsets."""
    candidates = []
    for folder in FOLDERS[name]:
        layouts = (MSMT17_V1, MSMT17_V2) if name == "msmt17" else (MARKET1501,)
        for layout in reversed(layouts) if "V2" in folder else layouts:
            entries = list(dict.fromkeys(entry for subset in subsets for entry in layout[subset]))
            missing = sum(not (root / folder / entry).exists() for entry in ["", *entries])
            if not missing:
                return root / folder, layout
            candidates.append((missing, printable(root / folder), entries))
    _, where, entries = min(candidates, key=lambda candidate: candidate[0])  # the most complete one
    raise FileNotFoundError(f"no dataset at {where}: expected {where}/{{{','.join(entries)}}}")


def read_folder(folder: Path) -> tuple[list[Sample], list[Path]]:
    """Read an image folder in Market-1501's layout. Return the samples without junk, and the skipped files."""
    matches = [(path, MARKET1501_NAME.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    samples = [parse(path, match) for path, match in matches if match and int(match["pid"]) != JUNK]
    skipped = [path for path, match in matches if not match]
    if not samples:
        found = count_skipped(skipped) if skipped else "it is empty or all junk"
        raise ValueError(f"no image in {printable(folder)} has a name like 0002_c1_anything.jpg: {found}")
    return samples, skipped


def read_list(file: Path, images: Path) -> list[Sample]:
    """Read a list of MSMT17. Each line holds the path of an image below `images` and its identity."""
    lines = [line.strip() for line in file.read_text("utf-8-sig", "surrogateescape").split("\n") if line.strip()]
    matches = [MSMT17_LINE.fullmatch(line) for line in lines]
    if not lines or None in matches:
        wrong = repr(lines[matches.index(None)][:80]) if lines else "it is empty"
        raise ValueError(f"{printable(file)} is not a list of MSMT17 ({wrong}): unpack the dataset again")
    return [parse(images / match[1], match) for match in matches]


def parse(path: Path, match: re.Match) -> Sample:
    """Return the sample of a matched file name or line. Raises ValueError if a number does not fit into 64 bits."""
    if max(len(match["pid"]), len(match["camid"])) > 18:
        raise ValueError(f"the identity or camera of {printable(path)} has more than 18 digits: use smaller numbers")
    return Sample(path, int(match["pid"]), int(match["camid"]))


def summary(dataset: Dataset) -> str:
    """Return a table of identities, images and cameras, and warnings about problems of the dataset."""
    title = " ".join(filter(None, (dataset.name, dataset.version)))
    lines = [f"{title}, read from {printable(dataset.folder)}", "subset           | # ids | # images | # cameras"]
    for subset in ("train", "query", "gallery"):
        if samples := getattr(dataset, subset):
            found = len({sample.pid for sample in samples}), len(samples), len({sample.camid for sample in samples})
            official = OFFICIAL.get(dataset.name, {}).get(subset, found)
            lines.append(f"{subset:<16} | {found[0]:5d} | {found[1]:8d} | {found[2]:9d}")
            if found != official:
                should, has = ("{} ids, {} images, {} cameras".format(*counts) for counts in (official, found))
                lines.append(
                    f"warning: {subset} should have {should}, not {has}: not comparable with published results"
                )
    test = dataset.query + dataset.gallery
    # The identities of train are relabelled, so they are read from the names again. MSMT17's names do not match; it is
    # not checked, since its test split numbers the identities from 0 again.
    matches = [MARKET1501_NAME.fullmatch(sample.path.name) for sample in dataset.train]
    if shared := {int(match["pid"]) for match in matches if match} & {sample.pid for sample in test}:
        lines.append(f"warning: identities in both train and test: {len(shared)} (first: {min(shared)})")
    if len({sample.camid for sample in test}) == 1:
        lines.append(
            "warning: query and gallery have a single camera: mAP cannot be computed (train with --eval-every 0)"
        )
    if dataset.skipped:
        lines.append(count_skipped(dataset.skipped))
    return "\n".join(lines)


def digest(samples: list[Sample]) -> str:
    """Return the SHA-256 of identities and file names. A resumed run must have the same training data."""
    lines = sorted(f"{sample.pid} {sample.path.name}" for sample in samples)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


# ---------------------------------------------------------------------------------------------- image files

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")  # not EPS, for which Pillow runs Ghostscript
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28  # bytes; long text metadata is harmless


def open_image(path: str | Path) -> Image.Image:
    """Open an image file as RGB, rotated by its EXIF orientation. Only the first frame of an animation is read.

    16-bit values are divided by 256. Raises OSError if this would make an image black (16-bit files with 10- or 12-bit
    values), for 32-bit values, above 89 million pixels (Pillow's limit), and if Pillow cannot read the file.
    """
    if not os.path.isfile(path):  # opening a pipe would wait forever
        raise FileNotFoundError(f"no image file {printable(path)}: give another path, or unpack the dataset again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                has_16_bits = re.search(";1[26]", str(image.tile))  # Pillow's raw mode, such as "RGB;16B"
                image.load()
                orientation = None
                with contextlib.suppress(Exception):  # broken metadata
                    orientation = image.getexif().get(ExifTags.Base.Orientation)
                if has_16_bits and image.mode.startswith("I"):
                    image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
                if image.mode in ("I", "F"):
                    raise OSError(f"{'integer' if image.mode == 'I' else 'float'} values of 32 bits: use 8 bits")
                image = image.convert("RGB")
                if has_16_bits and np.asarray(image).max() < 16:
                    raise OSError("16-bit values of at most 12 bits: use 8 bits")
                image.info.clear()  # exif_transpose fails on broken tags
                image.getexif()[ExifTags.Base.Orientation] = orientation
                return ImageOps.exif_transpose(image)
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise OSError(f"cannot read image {printable(path)} ({one_line(error)}): replace or remove it") from error


def read_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """Read an image, resized to (height, width), as uint8 (3, H, W). Raises OSError as `open_image` does."""
    pixels = v2.functional.pil_to_tensor(open_image(path))
    return v2.functional.resize(pixels, size, v2.InterpolationMode.BICUBIC, antialias=True)


def find_images(paths: list[str | Path]) -> list[Path]:
    """Return the given files and all image files below the given folders. Print how many other files are skipped.

    Linked folders are skipped too. Raises FileNotFoundError if a path does not exist or if no image is found.
    """
    images, skipped = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {printable(path)}")
        if not path.is_dir():
            images.append(path)
            continue
        for file in sorted(path.rglob("*")):
            # On other file systems, macOS stores metadata of x.jpg in ._x.jpg.
            if file.suffix.lower() in SUFFIXES and not file.name.startswith("._") and file.is_file():
                images.append(file)
            elif file.is_symlink() or not file.is_dir():
                skipped.append(file)
    if skipped:
        print(count_skipped(skipped))
    if not images:
        raise FileNotFoundError(f"no images in {', '.join(map(printable, paths))}: give image files or their folders")
    return images


def printable(path: str | Path) -> str:
    """Return a path as one line of text. Characters that standard output cannot print are escaped."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(path))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def count_skipped(files: list[Path]) -> str:
    """Return one line with the number of skipped files and the name of the first one."""
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} skipped (first: {printable(files[0].name)})"


# ------------------------------------------------------------------------------------- sampler and loaders


class PKSampler(Sampler[list[tuple[int, int]]]):
    """Sampler of batches of P identities x K images ("16 identities with 4 images per identity", section 5.1).

    A batch is a list of (index of an image, seed of its augmentation). Each image has its own seed, so that batches do
    not depend on the number of loader processes. Under torchrun, each process takes its share of a batch's identities.

    An epoch follows RandomIdentitySampler of the strong baseline [24]. Each identity's images are shuffled and divided
    into groups of K. An identity with fewer than K images is sampled with replacement. An incomplete last group is
    skipped. A batch takes one group from each of P random identities. The epoch ends when fewer than P identities have
    groups left.

    Raises ValueError if there are fewer than P identities, or if the processes cannot share P identities equally.
    """

    def __init__(
        self, pids: list[int], num_ids: int = 16, num_images: int = 4, seed: int = 0, rank: int = 0, world_size: int = 1
    ):
        self.indices = defaultdict(list)
        for index, pid in enumerate(pids):
            self.indices[pid].append(index)
        if len(self.indices) < num_ids:
            raise ValueError(f"a batch needs {num_ids} identities, train has {len(self.indices)}: lower --batch-ids")
        if num_ids % world_size:
            raise ValueError(f"{world_size} processes cannot share --batch-ids {num_ids}: use a multiple")
        size = num_ids * num_images // world_size
        self.share = slice(rank * size, (rank + 1) * size)
        self.num_ids, self.num_images, self.seed = num_ids, num_images, seed
        self.set_epoch(1)

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of an epoch. They depend on the seed and the epoch only."""
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

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter([batch[self.share] for batch in self.batches])


class TrainImages(torch.utils.data.Dataset):
    """Augmented training images: (index, seed) from PKSampler -> (uint8 (3, H, W), pid)."""

    def __init__(self, samples: list[Sample], size: tuple[int, int]):
        self.samples, self.size = samples, size
        # Augmentation of the strong baseline [24]. Erased pixels get CLIP's mean colour, which is 0 when normalised.
        colour = [round(255 * mean) for mean in clip.MEAN]
        erase = v2.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 1 / 0.3), value=colour)
        self.augment = v2.Compose([v2.RandomHorizontalFlip(0.5), v2.Pad(10), v2.RandomCrop(size), erase])

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = index_and_seed
        image = read_image(self.samples[index].path, self.size)
        with torch.random.fork_rng(devices=[]):  # restores the global RNG state
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed CUDA, which is slow
            return self.augment(image), self.samples[index].pid


def read_images(paths: list[str | Path], size: tuple[int, int]) -> tuple[Tensor, list[str]]:
    """Return images as uint8 (B, 3, H, W), black where unreadable, and the error messages of the unreadable ones."""
    images, errors = torch.zeros(len(paths), 3, *size, dtype=torch.uint8), []
    for image, path in zip(images, paths):
        try:
            image.copy_(read_image(path, size))
        except OSError as error:
            errors.append(str(error))
    return images, errors


def train_loader(
    samples: list[Sample], sampler: PKSampler, image_size: tuple[int, int], workers: int, pin_memory: bool = False
) -> DataLoader:
    """Return a loader of augmented batches: images uint8 (B, 3, H, W), labels (B,), B = P * K / number of processes."""
    images = TrainImages(samples, image_size)
    return make_loader(images, workers, pin_memory, batch_sampler=sampler, persistent_workers=workers > 0)


def image_loader(paths: list, image_size: tuple, batch_size=128, workers=0, pin_memory=False) -> DataLoader:
    """Return a loader of batches as returned by `read_images`, in the order of `paths`."""
    collate = partial(read_images, size=image_size)  # runs in the loader processes
    return make_loader(paths, workers, pin_memory, batch_size=batch_size, collate_fn=collate)


def make_loader(images: torch.utils.data.Dataset | list, workers: int, pin_memory: bool, **options) -> DataLoader:
    options |= {"num_workers": workers, "pin_memory": pin_memory, "worker_init_fn": ignore_interrupts}
    # Without its own generator, a loader draws from the global one at each epoch: a resumed run would differ.
    return DataLoader(images, generator=torch.Generator(), **options)
