"""Person re-identification data: datasets, image files, PK sampler, data loaders.

A dataset is three lists of samples: train, query and gallery. A sample is an image file with its identity (pid) and its
camera (camid), numbered as in the dataset. In train, the identities are relabelled 0 .. K-1.
"""

import hashlib
import os
import random
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate
from torchvision.transforms import v2

import clip
from util.device import ignore_interrupts, one_line


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
    skipped: list[Path] = []  # files that are no images of the dataset, by their names

    @property
    def num_identities(self) -> int:
        """Number of identities in train."""
        return len({sample.pid for sample in self.train})

    @property
    def version(self) -> str | None:
        """Version of MSMT17: V1, or V2 with masked faces. Their results do not compare. None for other datasets."""
        if self.name != "msmt17":
            return None
        first = (self.train or self.query or self.gallery)[0].path
        return "V2" if first.relative_to(self.folder).parts[0].startswith("mask_") else "V1"

    @property
    def can_be_evaluated(self) -> bool:
        """True if some query has an image of its identity from another camera in the gallery."""
        cameras = defaultdict(set)
        for sample in self.gallery:
            cameras[sample.pid].add(sample.camid)
        return any(cameras.get(sample.pid, set()) - {sample.camid} for sample in self.query)


# ------------------------------------------------------------------------------------------------- datasets

# Published (identities, images, cameras). Market-1501's gallery is counted without junk and with distractors (pid 0).
OFFICIAL = {
    "market1501": {"train": (751, 12936, 6), "query": (750, 3368, 6), "gallery": (751, 15913, 6)},
    "msmt17": {"train": (1041, 32621, 15), "query": (3060, 11659, 15), "gallery": (3060, 82161, 15)},
    "dukemtmc": {"train": (702, 16522, 8), "query": (702, 2228, 8), "gallery": (1110, 17661, 8)},
    "cuhk03": {"train": (767, 7368, 2), "query": (700, 1400, 2), "gallery": (700, 5328, 2)},
    "cuhk03-detected": {"train": (767, 7365, 2), "query": (700, 1400, 2), "gallery": (700, 5332, 2)},
}
# Where each dataset is looked for below --data-root: its owners' folder name first, then other common ones.
FOLDERS = {
    "market1501": ("Market-1501-v15.09.15", "Market-1501", "Market1501", "market1501"),
    "msmt17": ("MSMT17_V1", "MSMT17_V2", "MSMT17", "msmt17"),
    "dukemtmc": ("DukeMTMC-reID", "DukeMTMC", "dukemtmc-reid", "dukemtmcreid", "dukemtmc"),
    "cuhk03": ("cuhk03-np/labeled", "cuhk03_np/labeled", "CUHK03-NP/labeled"),
    "cuhk03-detected": ("cuhk03-np/detected", "cuhk03_np/detected", "CUHK03-NP/detected"),
    "synthetic": ("synthetic",),
    "folder": ("",),
}
# The image folder of each subset and its list files. Without list files, identity and camera are in the image's name.
MARKET1501 = {"train": ("bounding_box_train",), "query": ("query",), "gallery": ("bounding_box_test",)}
MSMT17_V1 = {
    "train": ("train", "list_train.txt", "list_val.txt"),
    "query": ("test", "list_query.txt"),
    "gallery": ("test", "list_gallery.txt"),
}
MSMT17_V2 = {subset: (f"mask_{images}_v2", *lists) for subset, (images, *lists) in MSMT17_V1.items()}
MARKET1501_NAME = re.compile(r"(?P<pid>-1|\d+)_c(?P<camid>\d+).*\.(jpg|jpeg|png)", re.IGNORECASE)
MSMT17_LINE = re.compile(r"(\d+/\d+_\d+_(?P<camid>\d+)_[^\s/]*\.(?:jpg|jpeg|png))\s+(?P<pid>\d+)", re.IGNORECASE)
JUNK = -1  # identity of Market-1501's bad detections, which are neither right nor wrong matches


def load_dataset(
    name: str, root: str | Path = "data", subsets: tuple[str, ...] = ("train", "query", "gallery")
) -> Dataset:
    """Read the names of a dataset's images below `root`. Subsets that are not named stay empty.

    Raises:
        FileNotFoundError: no dataset of this name is there; the message shows the expected folders and lists.
        ValueError: the name is not in FOLDERS, a subset has no image, or a name or line is not as expected.
    """
    if name not in FOLDERS:
        raise ValueError(f"no dataset {name}: choose one of {', '.join(FOLDERS)}")
    folder, layout = find_folder(name, Path(root), subsets)
    samples, skipped = {"train": [], "query": [], "gallery": []}, []
    for subset in subsets:
        images, *lists = layout[subset]
        if lists:
            samples[subset] = [sample for file in lists for sample in read_list(folder / file, folder / images)]
        else:
            samples[subset], others = read_folder(folder / images)
            skipped += others
    labels = {pid: label for label, pid in enumerate(sorted({sample.pid for sample in samples["train"]}))}
    samples["train"] = [sample._replace(pid=labels[sample.pid]) for sample in samples["train"]]
    return Dataset(name, folder, **samples, skipped=skipped)


def find_folder(name: str, root: Path, subsets: tuple[str, ...]) -> tuple[Path, dict[str, tuple[str, ...]]]:
    """Return the folder of a dataset and its layout. Raise FileNotFoundError if it is missing or incomplete."""

    def entries(layout: dict[str, tuple[str, ...]]) -> list[str]:
        return list(dict.fromkeys(entry for subset in subsets for entry in layout[subset]))

    def closeness(place: tuple[Path, dict[str, tuple[str, ...]]]) -> tuple:
        folder, layout = place
        present = sum((folder / entry).exists() for entry in entries(layout))
        return folder.is_dir(), present, ("V2" in folder.name) == (layout is MSMT17_V2)

    layouts = [MSMT17_V1, MSMT17_V2] if name == "msmt17" else [MARKET1501]
    places = [(root / folder, layout) for folder in FOLDERS[name] for layout in layouts]
    for folder, layout in places:
        if all((folder / entry).exists() for entry in entries(layout)):
            return folder, layout
    folder, layout = max(places, key=closeness)
    where = printable(folder)
    missing = [entry for entry in entries(layout) if not (folder / entry).exists()]
    note = f" ({', '.join(missing)} missing)" if folder.is_dir() else ""
    raise FileNotFoundError(f"no dataset at {where}: expected {where}/{{{','.join(entries(layout))}}}{note}")


def read_folder(folder: Path) -> tuple[list[Sample], list[Path]]:
    """Read a folder in Market-1501's layout. Return samples without junk, and the files of other names.

    DukeMTMC-reID and CUHK03-NP share this layout. Market-1501 itself contains other files (Thumbs.db).
    """
    matches = [(path, MARKET1501_NAME.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    samples = [parse_sample(path, match) for path, match in matches if match]
    samples = [sample for sample in samples if sample.pid != JUNK]
    skipped = [path for path, match in matches if not match]
    if not samples:
        found = count_skipped(skipped) if skipped else "it is empty or all junk"
        raise ValueError(f"no image in {printable(folder)} has a name like 0002_c1_anything.jpg: {found}")
    return samples, skipped


def read_list(file: Path, images: Path) -> list[Sample]:
    """Read a list file of MSMT17: lines of an image's path below `images` and its identity."""
    samples = []
    for line in file.read_text("utf-8-sig", "surrogateescape").split("\n"):
        match = MSMT17_LINE.fullmatch(line.strip())
        if match:
            samples.append(parse_sample(images / match[1], match))
        elif line.strip():
            raise ValueError(f"{printable(file)} has a line that is not of MSMT17's pattern: {line[:80]!r}")
    if not samples:
        raise ValueError(f"{printable(file)} lists no images: unpack the dataset again")
    return samples


def parse_sample(path: Path, match: re.Match) -> Sample:
    """Return a sample with the identity and the camera that match. Numbers must fit a tensor of 64-bit integers."""
    pid, camid = match["pid"], match["camid"]
    if max(len(pid), len(camid)) > 18:
        raise ValueError(f"identity or camera of {printable(path)} has more than 18 digits: give it a smaller number")
    return Sample(path, int(pid), int(camid))


def summary(dataset: Dataset) -> str:
    """Return a table of identities, images and cameras, and warnings where they differ from the published counts."""
    title = " ".join(filter(None, (dataset.name, dataset.version)))
    lines = [f"{title}, read from {printable(dataset.folder)}", "subset           | # ids | # images | # cameras"]
    for subset in ("train", "query", "gallery"):
        samples = getattr(dataset, subset)
        if not samples:
            continue
        found = len({sample.pid for sample in samples}), len(samples), len({sample.camid for sample in samples})
        lines.append(f"{subset:<16} | {found[0]:5d} | {found[1]:8d} | {found[2]:9d}")
        official = OFFICIAL.get(dataset.name, {}).get(subset, found)
        if found != official:
            should, has = ("{} ids, {} images, {} cameras".format(*counts) for counts in (official, found))
            lines.append(
                f"warning: {dataset.name}'s {subset} should have {should}, not {has}: "
                "results do not compare with published ones"
            )
    # MSMT17 restarts its numbers in the test split, so that equal numbers are different people.
    if dataset.name != "msmt17":
        test_pids = {sample.pid for sample in dataset.query + dataset.gallery}
        train_pids = {int(MARKET1501_NAME.fullmatch(sample.path.name)["pid"]) for sample in dataset.train}
        if shared := sorted(train_pids & test_pids):
            lines.append(f"warning: {len(shared)} identities are in both train and test (first: {shared[0]})")
    if dataset.query and dataset.gallery and not dataset.can_be_evaluated:
        lines.append(
            "warning: no query has an image of its identity from another camera in the gallery, "
            "so nothing can be evaluated: train with --eval-every 0"
        )
    if dataset.skipped:
        lines.append(count_skipped(dataset.skipped))
    return "\n".join(lines)


def digest(samples: list[Sample]) -> str:
    """Return the SHA-256 of identities and file names, by which a resumed run recognises its training data."""
    lines = sorted(f"{sample.pid} {sample.path.name}" for sample in samples)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


# ---------------------------------------------------------------------------------------------- image files

# Formats that Pillow reads itself. It would hand an EPS file, whatever its name, to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
ROTATIONS = {  # EXIF's orientation -> how to turn the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# A PNG file with a long text is an image like any other.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**28


def open_image(path: str | Path) -> Image.Image:
    """Open an image file as RGB, turned upright by its EXIF orientation. Of a GIF, open the first frame.

    16 bits become 8 (division by 256). Raises OSError, in one line, if the file cannot be read, if its values are not
    of 8 or 16 bits, or if it has more than 89 million pixels (Pillow's limit against decompression bombs).
    """
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise OSError("no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                is_16_bit = image.format in ("PNG", "TIFF") and bool(re.search(r";1[26]", str(image.tile)))
                image.load()
                try:
                    orientation = image.getexif().get(ExifTags.Base.Orientation)
                except Exception:  # broken metadata do not make an image unreadable
                    orientation = None
                if is_16_bit and image.mode.startswith("I"):
                    image = Image.fromarray((torch.tensor(list(image.getdata())).view(image.height, -1) >> 8).numpy())
                if image.mode in ("I", "F"):
                    kind = {"I": "32-bit integers", "F": "floating-point numbers"}[image.mode]
                    raise OSError(f"its values are {kind}, of unknown scale")
                image = image.convert("RGB")
                return image.transpose(ROTATIONS[orientation]) if orientation in ROTATIONS else image
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise OSError(f"cannot read image {printable(path)} ({one_line(error)}): replace or remove it") from error


def read_image(path: str | Path, size: tuple[int, int]) -> Tensor:
    """Read an image at (height, width) as uint8 (3, H, W). Raise OSError as open_image does."""
    pixels = v2.functional.pil_to_tensor(open_image(path))
    return v2.functional.resize(pixels, size, v2.InterpolationMode.BICUBIC, antialias=True)


def find_images(paths: list[str | Path]) -> list[Path]:
    """Return files as given, and all image files below folders, linked folders included. Print how many are skipped.

    Raises FileNotFoundError if a path does not exist, or if there is no image.
    """
    images, skipped, searched = [], [], set()
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"no file or folder {printable(path)}")
        if not path.is_dir():
            images.append(path)
        for folder, subfolders, names in os.walk(path, followlinks=True):
            if os.path.realpath(folder) in searched:  # a link to a folder above would be followed for ever
                subfolders.clear()
                continue
            searched.add(os.path.realpath(folder))
            subfolders.sort()
            for file in (Path(folder, name) for name in sorted(names)):
                # macOS writes notes on a file x.jpg into a file ._x.jpg.
                is_image = file.suffix.lower() in SUFFIXES and not file.name.startswith("._") and file.is_file()
                (images if is_image else skipped).append(file)
    if skipped:
        print(count_skipped(skipped))
    if not images:
        raise FileNotFoundError(f"no images in {', '.join(map(printable, paths))}: give image files or folders of them")
    return images


def printable(path: str | Path) -> str:
    """Return a path that can be printed in one line: what is not text or not in stdout's encoding is escaped."""
    text = "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(path))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def count_skipped(files: list[Path]) -> str:
    """Return a line that counts skipped files and names the first one."""
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} skipped (first: {printable(files[0].name)})"


# ------------------------------------------------------------------------------------- sampler and loaders


def augmentation(size: tuple[int, int]) -> v2.Transform:
    """Return the training augmentation of the strong baseline (Luo et al. 2019, [24]) for uint8 (3, H, W).

    Flip, pad by 10 pixels and crop, erase a rectangle (filled with CLIP's mean colour, which is 0 after normalisation).
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


class PKSampler(Sampler[list[tuple[int, int]]]):
    """Batches of P identities x K images ("16 identities with 4 images per identity", section 5.1).

    An image is an index and the seed of its augmentation, so that results do not depend on the number of loader
    processes. The same seed and epoch give the same batches.

    An epoch follows RandomIdentitySampler of the strong baseline [24]. Each identity's images are shuffled and divided
    into groups of K; an identity with fewer images repeats some, and an incomplete last group is skipped. Each batch
    takes one group of each of P random identities. The epoch ends when fewer than P identities have groups left.

    With several processes, process `rank` of `world_size` takes its share of each batch's identities.
    Raises ValueError if there are fewer than P identities, or if world_size does not divide P.
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

    def set_epoch(self, epoch: int) -> None:
        """Draw the batches of an epoch."""
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
    """Augmented training images (uint8 (3, H, W), pid), indexed by PKSampler's (index, seed)."""

    def __init__(self, samples: list[Sample], size: tuple[int, int]):
        self.samples, self.size, self.augment = samples, size, augmentation(size)

    def __getitem__(self, index_and_seed: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = index_and_seed
        image = read_image(self.samples[index].path, self.size)
        with torch.random.fork_rng(devices=[]):  # the state of the global generator is kept
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed CUDA, which is slow
            return self.augment(image), self.samples[index].pid


class TestImages(torch.utils.data.Dataset):
    """Images (uint8 (3, H, W), ""), or, if one cannot be read, (black, error message)."""

    def __init__(self, paths: list[str | Path], size: tuple[int, int]):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return read_image(self.paths[index], self.size), ""
        except OSError as error:
            return torch.zeros(3, *self.size, dtype=torch.uint8), str(error)


def collate(batch: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    images, errors = zip(*batch)
    return default_collate(images), [error for error in errors if error]


def train_loader(
    samples: list[Sample], sampler: PKSampler, image_size: tuple[int, int], workers: int, pin_memory: bool = False
) -> DataLoader:
    """Return a loader of augmented batches (images uint8 (P * K, 3, H, W), labels (P * K,)) in the sampler's order."""
    return DataLoader(
        TrainImages(samples, image_size),
        batch_sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=pin_memory,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),  # otherwise each epoch would draw from the global generator
    )


def image_loader(
    paths: list[str | Path],
    image_size: tuple[int, int],
    batch_size: int = 128,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Return a loader of batches (images uint8 (B, 3, H, W), error messages) in the order of `paths`.

    An image that cannot be read is black, and its error is among the messages.
    """
    return DataLoader(
        TestImages(paths, image_size),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),
    )
