"""Person re-identification data: readers, transforms, PK sampler, loaders, and the drawn demo data.

A reader turns an owner's folder into a Dataset of three lists of Samples. In a sample, pid is the identity
("person id") and camid the camera, both as the owner numbers them; in `train`, pids are relabelled to 0 .. K-1.
"""

import math
import random
import re
import shutil
import signal
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torchvision.transforms import v2

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


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

    @property
    def num_identities(self) -> int:
        """Identities to classify in training."""
        return len({sample.pid for sample in self.train})


# -------------------------------------------------------------------------------------------------- readers

# (identities, images) as published; Market-1501's gallery without its junk, with its distractors (identity 0).
OFFICIAL = {
    "market1501": {"train": (751, 12936), "query": (750, 3368), "gallery": (751, 15913)},
    "msmt17": {"train": (1041, 32621), "query": (3060, 11659), "gallery": (3060, 82161)},
    "dukemtmc": {"train": (702, 16522), "query": (702, 2228), "gallery": (1110, 17661)},
    "cuhk03": {"train": (767, 7368), "query": (700, 1400), "gallery": (700, 5328)},
    "cuhk03-detected": {"train": (767, 7365), "query": (700, 1400), "gallery": (700, 5332)},
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
NAMES = [name for name in FOLDERS if name != "cuhk03-detected"]  # which --cuhk03-detected asks for
MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
MARKET_NAME = re.compile(r"(-1|\d+)_c(\d+).*\.(jpg|jpeg|png)", re.IGNORECASE)
MSMT17_LINE = re.compile(r"(\S+/\d+_\d+_(\d+)_\S*\.(?:jpg|jpeg|png))\s+(\d+)", re.IGNORECASE)  # picture, camera, pid
JUNK = -1  # Market-1501's identity of bad detections, which count neither as right nor as wrong


def load_dataset(name: str, root: str | Path = "data") -> Dataset:
    """Reads one of FOLDERS below `root`. "synthetic" is drawn there first if it is missing.

    Raises FileNotFoundError, with the layout expected, if a folder or list is missing; ValueError if it is empty.
    """
    root = Path(root)
    if name == "synthetic" and not (root / "synthetic").exists():
        draw_synthetic(root / "synthetic")
    folder = find_folder(name, root)
    train, query, gallery = (read_msmt17 if name == "msmt17" else read_market)(folder)
    for subset, samples in (("train", train), ("query", query), ("gallery", gallery)):
        if not samples:
            raise ValueError(f"no pictures of {name}'s {subset} subset under {root}: unpack the dataset again")
    labels = {pid: label for label, pid in enumerate(sorted({sample.pid for sample in train}))}
    return Dataset(name, folder, [sample._replace(pid=labels[sample.pid]) for sample in train], query, gallery)


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
    raise FileNotFoundError(f"{name} is not under {root}: {expected}; see the README for where to get it")


def read_market(folder: Path) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Market-1501's layout, which DukeMTMC-reID and CUHK03-NP share: identity and camera stand in the file name.

    Files of another pattern are passed over (Market-1501 ships a Thumbs.db), and so is junk, identity -1.
    """
    subsets = []
    for subfolder in MARKET_FOLDERS.values():
        matches = [(path, MARKET_NAME.fullmatch(path.name)) for path in sorted((folder / subfolder).iterdir())]
        samples = [Sample(path, int(match[1]), int(match[2])) for path, match in matches if match]
        subsets.append([sample for sample in samples if sample.pid != JUNK])
    return tuple(subsets)


def read_msmt17(folder: Path) -> tuple[list[Sample], list[Sample], list[Sample]]:
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
        for line in (folder / name).read_text().split("\n"):
            if not line.strip():
                continue
            match = MSMT17_LINE.fullmatch(line.strip())
            if not match:
                raise ValueError(f"{folder / name} has a line not of MSMT17's pattern: {line!r}")
            samples.append(Sample(pictures / match[1], int(match[3]), int(match[2])))
        return samples

    train = read_list("list_train.txt", train_folder) + read_list("list_val.txt", train_folder)
    return train, read_list("list_query.txt", test_folder), read_list("list_gallery.txt", test_folder)


def summary(dataset: Dataset) -> str:
    """The table the field expects, with a warning for every subset that differs from the published counts."""
    lines = [f"{dataset.name}, read from {dataset.folder}", "subset           | # ids | # images | # cameras"]
    for subset in ("train", "query", "gallery"):
        samples = getattr(dataset, subset)
        ids, images = len({sample.pid for sample in samples}), len(samples)
        lines.append(f"{subset:<16} | {ids:5d} | {images:8d} | {len({sample.camid for sample in samples}):9d}")
        official_ids, official_images = OFFICIAL.get(dataset.name, {}).get(subset, (ids, images))
        if (ids, images) != (official_ids, official_images):
            lines.append(
                f"warning: {dataset.name}'s {subset} should have {official_ids} ids and {official_images} images, "
                f"not {ids} and {images}: results will not compare with published ones"
            )
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- transforms


def read_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture file of any mode as RGB at (height, width): uint8 (3, H, W).

    Sixteen bits of grey become eight. OSError names the file if it can't be read, or has over 89 million pixels, where
    Pillow suspects a bomb.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as picture:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if picture.mode.startswith("I"):
                picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
            pixels = v2.functional.pil_to_tensor(picture.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise whatever they like on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"cannot read the picture {path} ({reason}): replace it or take it out") from error
    return v2.functional.resize(pixels, size, v2.InterpolationMode.BICUBIC, antialias=True)


def augmentation(size: tuple[int, int]) -> v2.Transform:
    """What prior work does to a training picture (Luo et al. 2019, [24]), on uint8 (3, H, W).

    Flip, pad by 10 and crop, erase a rectangle (filled with CLIP's mean colour, which is 0 after normalisation).
    """
    mean_colour = [round(255 * channel) for channel in CLIP_MEAN]
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(0.5),
            v2.Pad(10),
            v2.RandomCrop(size),
            v2.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 1 / 0.3), value=mean_colour),
        ]
    )


@lru_cache
def mean_and_std(device: torch.device) -> tuple[Tensor, Tensor]:
    """CLIP's, each (1, 3, 1, 1), brought to a device once, since every copy makes it wait."""
    return tuple(torch.tensor(values).view(1, 3, 1, 1).to(device) for values in (CLIP_MEAN, CLIP_STD))


def normalize(images: Tensor) -> Tensor:
    """uint8 (B, 3, H, W) -> float32 (B, 3, H, W) with CLIP's own mean and standard deviation, on the same device."""
    mean, std = mean_and_std(images.device)
    return (images / 255 - mean) / std


# ------------------------------------------------------------------------------------- sampler and loaders


class PKSampler(Sampler[list[tuple[int, int]]]):
    """Batches of P identities x K pictures ("16 identities with 4 images per identity", section 5.1).

    A picture is its index and the seed of its augmentation, so that no result depends on the number of loader
    processes, and an epoch may be taken up in its middle.

    An epoch follows the RandomIdentitySampler of the bag-of-tricks baseline [24]: each identity's pictures, shuffled,
    are dealt into groups of K (an identity with fewer repeats some; the last incomplete group is left out); each batch
    takes one group of P random identities that have one left; the epoch ends when fewer than P identities have.

    `len` is the true number of batches, skipped ones included. The same seed and epoch give the same batches.
    part: (n, of) leaves only the n-th share of each batch's identities, from 0 on, for the n-th of so many processes.
    Raises ValueError if there are fewer than P identities, or if P cannot be shared evenly.
    """

    def __init__(
        self,
        pids: list[int],
        num_ids: int = 16,
        num_images: int = 4,
        seed: int = 0,
        part: tuple[int, int] = (0, 1),
    ):
        self.indices = defaultdict(list)
        for index, pid in enumerate(pids):
            self.indices[pid].append(index)
        if len(self.indices) < num_ids:
            raise ValueError(
                f"a batch needs {num_ids} identities, the data has {len(self.indices)}: use a smaller --batch-ids"
            )
        number, parts = part
        if num_ids % parts:
            raise ValueError(
                f"--batch-ids {num_ids} cannot be shared among {parts} processes: use a multiple of {parts}"
            )
        size = num_ids * num_images // parts
        self.part = slice(number * size, (number + 1) * size)
        self.num_ids, self.num_images, self.seed = num_ids, num_images, seed
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
        return iter([batch[self.part] for batch in self.batches[self.skip :]])


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
            needed, free = len(samples) * 3 * math.prod(size), shutil.disk_usage("/dev/shm").free
            if needed > free:
                raise ValueError(
                    f"--cache needs {needed / 1e9:.1f} GB of shared memory, {free / 1e9:.1f} GB are free: leave it away"
                )
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


def leave_signals_to_trainer(worker: int) -> None:
    """A loader process goes on at Ctrl-C, which reaches it too, and ends when train.py ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def make_loader(pictures: Pictures, workers: int, **batches) -> DataLoader:
    pin = torch.cuda.is_available()
    return DataLoader(pictures, num_workers=workers, pin_memory=pin, worker_init_fn=leave_signals_to_trainer, **batches)


def train_loader(
    samples: list[Sample], sampler: PKSampler, size: tuple[int, int], workers: int, cache: bool = False
) -> DataLoader:
    """Augmented batches (images uint8 (P * K, 3, H, W), labels (P * K,)) in the sampler's order."""
    return make_loader(AugmentedPictures(samples, size, cache), workers, batch_sampler=sampler)


def test_loader(samples: list[Sample], size: tuple[int, int], batch_size: int, workers: int) -> DataLoader:
    """Batches (images uint8 (B, 3, H, W), pids (B,)) in the order of `samples`."""
    return make_loader(Pictures(samples, size), workers, batch_size=batch_size)


# ---------------------------------------------------------------------------------- demo data, drawn by us

CLOTHES = {
    "white": (225, 222, 214), "black": (38, 38, 44), "grey": (128, 130, 134), "red": (180, 44, 48),
    "blue": (48, 84, 168), "green": (44, 126, 70), "yellow": (222, 190, 50), "brown": (104, 66, 40),
    "orange": (230, 120, 40), "pink": (226, 130, 170), "purple": (110, 62, 140), "turquoise": (60, 176, 180),
}  # fmt: skip
SKIN = ((244, 208, 178), (214, 164, 124), (156, 106, 74), (96, 64, 46))
HAIR = ((34, 28, 26), (92, 60, 36), (186, 148, 88), (150, 148, 146))


class Person(NamedTuple):
    """What makes an identity. Few values each, so that others nearly share them."""

    skin: tuple
    hair: tuple
    long_hair: bool
    hat: tuple | None
    top: tuple
    pattern: str
    pattern_colour: tuple
    long_sleeves: bool
    bottom: tuple
    legwear: str
    shoes: tuple
    bag: str
    bag_colour: tuple
    build: float


def random_person(rng: random.Random) -> Person:
    """Somebody new."""

    def colour() -> tuple:
        return rng.choice(list(CLOTHES.values()))

    return Person(
        skin=rng.choice(SKIN),
        hair=rng.choice(HAIR),
        long_hair=rng.random() < 0.4,
        hat=colour() if rng.random() < 0.3 else None,
        top=colour(),
        pattern=rng.choice(("plain", "plain", "stripes", "bars", "checks", "dots")),
        pattern_colour=colour(),
        long_sleeves=rng.random() < 0.6,
        bottom=colour(),
        legwear=rng.choice(("trousers", "trousers", "shorts", "skirt")),
        shoes=colour(),
        bag=rng.choice(("none", "none", "backpack", "shoulder bag")),
        bag_colour=colour(),
        build=rng.uniform(0.85, 1.2),
    )


def draw_person(person: Person, rng: random.Random) -> Image.Image:
    """A walking figure on a transparent ground: RGBA, 256 wide, 512 high. `rng` chooses the pose and the turn."""
    picture = Image.new("RGBA", (256, 512))
    draw = ImageDraw.Draw(picture)
    stride, swing, width = rng.uniform(-0.3, 0.3), rng.uniform(-0.35, 0.35), 46 * person.build
    shoulder, hip = 118, 272

    def limb(x: float, y: float, angle: float, length: float, thickness: float, colour: tuple) -> tuple[float, float]:
        end = x + length * math.sin(angle), y + length * math.cos(angle)
        draw.line([(x, y), end], fill=colour, width=round(thickness))
        for px, py in ((x, y), end):
            r = thickness / 2
            draw.ellipse([px - r, py - r, px + r, py + r], fill=colour)
        return end

    def arm(side: int) -> None:
        sleeve = person.top if person.long_sleeves else person.skin
        x = 128 + side * (width - 6)
        elbow = limb(x, shoulder + 14, side * (swing + 0.12), 74, 25 * person.build, person.top)
        hand = limb(*elbow, side * (swing * 1.3 + 0.05), 66, 21 * person.build, sleeve)
        draw.ellipse([hand[0] - 12, hand[1] - 6, hand[0] + 12, hand[1] + 18], fill=person.skin)

    if person.bag == "backpack":
        draw.rounded_rectangle([128 - width - 16, shoulder - 4, 128 + width + 16, 226], 22, fill=person.bag_colour)
    arm(-1)
    for side in (-1, 1):
        shin_colour = person.bottom if person.legwear == "trousers" else person.skin
        knee = limb(128 + side * 21, hip, side * stride, 96, 40 * person.build, person.bottom)
        thickness = (34 if person.legwear == "trousers" else 26) * person.build
        foot = limb(*knee, side * stride * 0.5, 92, thickness, shin_colour)
        draw.rounded_rectangle([foot[0] - 22, foot[1] - 4, foot[0] + 24, foot[1] + 22], 9, fill=person.shoes)
    if person.legwear == "skirt":
        draw.polygon([(128 - width, hip - 20), (128 + width, hip - 20), (190, 366), (66, 366)], fill=person.bottom)
    draw.rounded_rectangle([128 - width, shoulder - 10, 128 + width, hip + 18], 26, fill=person.top)
    draw_pattern(draw, person, [128 - width + 6, shoulder, 128 + width - 6, hip + 10])
    arm(1)
    if person.bag == "shoulder bag":
        draw.line([(128 - width + 10, shoulder), (128 + width, hip)], fill=person.bag_colour, width=8)
        draw.rounded_rectangle([128 + width - 30, hip - 20, 128 + width + 22, hip + 40], 8, fill=person.bag_colour)
    if person.long_hair:
        draw.rounded_rectangle([92, 34, 164, 134], 24, fill=person.hair)
    draw.rectangle([114, 86, 142, 112], fill=person.skin)
    draw.ellipse([98, 26, 158, 102], fill=person.skin)
    draw.pieslice([94, 18, 162, 96], 180, 360, fill=person.hair)
    if person.hat:
        draw.pieslice([90, 8, 166, 92], 180, 360, fill=person.hat)
        draw.rounded_rectangle([84, 44, 172, 56], 6, fill=person.hat)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def draw_pattern(draw: ImageDraw.ImageDraw, person: Person, box: list[float]) -> None:
    """The pattern of a person's top, inside the box (left, top, right, bottom)."""
    left, top, right, bottom = map(round, box)
    if person.pattern in ("stripes", "checks"):
        for y in range(top + 8, bottom - 8, 32):
            draw.rectangle([left, y, right, y + 13], fill=person.pattern_colour)
    if person.pattern in ("bars", "checks"):
        for x in range(left + 6, right - 8, 26):
            draw.rectangle([x, top, x + 9, bottom], fill=person.pattern_colour)
    if person.pattern == "dots":
        for row, y in enumerate(range(top + 12, bottom - 8, 24)):
            for x in range(left + 8 + 12 * (row % 2), right - 6, 24):
                draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=person.pattern_colour)


def draw_background(camera: int, rng: random.Random) -> Image.Image:
    """A place (one a camera) seen from a slightly different spot each time: RGB, 256 x 512."""
    place = random.Random(f"camera {camera}")

    def tone(low: int, high: int) -> tuple[int, int, int]:
        grey = place.randint(low, high)
        return tuple(grey + place.randint(-16, 16) for _ in range(3))

    picture = Image.new("RGB", (256, 512), tone(110, 220))
    draw = ImageDraw.Draw(picture)
    shift, horizon, clutter = rng.randint(-40, 40), place.randint(230, 360) + rng.randint(-15, 15), tone(60, 200)
    step = place.choice((38, 54, 76))
    for x in range(-step * 3, 256 + step * 3, step):  # a wall of slabs, windows or railings
        draw.rectangle([x + shift, place.randint(0, 120), x + shift + step // 2, horizon], fill=clutter)
    draw.rectangle([0, horizon, 256, 512], fill=tone(70, 190))
    for y in range(horizon + 14, 512, place.choice((26, 40, 60))):
        draw.line([(0, y), (256, y + shift // 4)], fill=tone(60, 180), width=4)
    for _ in range(rng.randint(0, 2)):  # whatever stands about that day
        x, w, h = rng.randint(-40, 230), rng.randint(24, 80), rng.randint(60, 220)
        draw.rounded_rectangle([x, horizon + 40 - h, x + w, horizon + 40], 8, fill=tone(50, 200))
    return picture


def draw_sample(person: Person, camera: int, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """One picture of a person by a camera, RGB, and where the person is visible, L (0 or 255); both 128 x 256."""
    view = random.Random(f"view {camera}")
    gains = [view.uniform(0.94, 1.06) for _ in range(3)]
    light, distance = view.uniform(0.85, 1.05), view.uniform(0.86, 0.98)
    picture, mask = draw_background(camera, rng), Image.new("L", (256, 512))
    scale = distance * rng.uniform(0.95, 1.05)
    figure = draw_person(person, rng).resize((round(256 * scale), round(512 * scale)), Image.Resampling.BILINEAR)
    x = (256 - figure.width) // 2 + rng.randint(-16, 16)
    y = (512 - figure.height) // 2 + rng.randint(-14, 14)
    picture.paste(figure, (x, y), figure)
    mask.paste(255, (x, y), figure.getchannel("A"))
    if rng.random() < 0.2:  # something in front: a post, or a box from below
        if rng.random() < 0.5:
            left = rng.randint(20, 200)
            box = [left, 0, left + rng.randint(16, 40), 512]
        else:
            left = rng.randint(-60, 120)
            box = [left, rng.randint(300, 420), left + rng.randint(90, 200), 512]
        ImageDraw.Draw(picture).rectangle(box, fill=rng.choice(list(CLOTHES.values())))
        ImageDraw.Draw(mask).rectangle(box, fill=0)
    exposure = light * rng.uniform(0.9, 1.1)
    tables = [min(255, round(value * gain * exposure)) for gain in gains for value in range(256)]
    picture = picture.point(tables).resize((128, 256), Image.Resampling.BOX)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(1, 7), (256, 128, 3))
    picture = Image.fromarray((np.asarray(picture) + noise).clip(0, 255).astype(np.uint8))
    return picture, mask.resize((128, 256), Image.Resampling.NEAREST)


def draw_synthetic(folder: Path, train_ids: int = 128, test_ids: int = 48, pictures: int = 8, seed: int = 0) -> None:
    """Draws the demo data in Market-1501's layout, with the visible person of every picture in `masks`.

    Each identity has `pictures` pictures, spread over four cameras; of a test identity, one a camera is a query. A
    sixth of the gallery are distractors (identity 0). The folder appears when it is whole, and if two processes draw
    it at once, the first one's stays.
    """
    print(f"Drawing the demo data in {folder}: {train_ids} + {test_ids} identities x {pictures} pictures")
    folder.parent.mkdir(parents=True, exist_ok=True)
    cameras = 4
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="drawing-") as temporary:
        unfinished = Path(temporary) / folder.name
        for subfolder in (*MARKET_FOLDERS.values(), "masks"):
            (unfinished / subfolder).mkdir(parents=True)

        def save(pid: int, number: int, person: Person, subfolder: str) -> None:
            camera = number % cameras + 1
            picture, mask = draw_sample(person, camera, random.Random(f"{seed} picture {pid} {number}"))
            name = f"{pid:04d}_c{camera}s1_{number:06d}_00"
            picture.save(unfinished / subfolder / f"{name}.jpg", quality=90)
            mask.save(unfinished / "masks" / f"{name}.png")

        for pid in range(1, train_ids + test_ids + 1):
            person = random_person(random.Random(f"{seed} person {pid}"))
            for number in range(pictures):
                test_subfolder = "query" if number < cameras else "bounding_box_test"
                save(pid, number, person, "bounding_box_train" if pid <= train_ids else test_subfolder)
        for number in range(test_ids * (pictures - cameras) // 5):
            save(0, number, random_person(random.Random(f"{seed} distractor {number}")), "bounding_box_test")
        if not folder.exists():
            unfinished.rename(folder)
