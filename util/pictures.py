"""Picture files: which are opened, and how."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

# Those that Pillow reads itself: it would hand an EPS, whatever its name, to Ghostscript.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF")
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}


def open_picture(path: Path) -> Image.Image:
    """A picture file of any mode as RGB, upright as its EXIF says; of a GIF the first frame.

    Sixteen bits of grey become eight. OSError names the file if it can't be read, or has over 89 million pixels, where
    Pillow suspects a bomb.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("there is no such file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd EXIF and palettes
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                ImageOps.exif_transpose(picture, in_place=True)
                if picture.mode.startswith("I"):
                    picture = Image.fromarray((np.asarray(picture) >> 8).clip(0, 255).astype(np.uint8))
                return picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise whatever they like on broken files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OSError(f"cannot read the picture {path} ({reason}): replace it or take it out") from error


def count_passed_over(files: list[Path]) -> str:
    """How many files were left alone, and the first one's name; for people."""
    return f"{len(files)} {'file' if len(files) == 1 else 'files'} passed over (first: {files[0].name})"


def find_readable(paths: list[Path]) -> list[Path]:
    """Of files, and of all files below folders, those that can be read as pictures. The others are passed over: what
    should be a picture is named, and all are counted.

    FileNotFoundError if a path does not exist, or if nothing is left.
    """
    files, passed_over, readable = [], [], []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--images {path}: there is no such file or folder")
        if not path.is_dir():
            files.append(path)
            continue
        for file in sorted(path.rglob("*")):
            if file.is_dir():
                continue
            is_picture = file.suffix.lower() in SUFFIXES and not file.name.startswith("._")  # macOS's notes on a file
            (files if is_picture else passed_over).append(file)
    for file in files:
        try:
            open_picture(file)
            readable.append(file)
        except OSError as error:
            print(error)
            passed_over.append(file)
    if passed_over:
        print(count_passed_over(passed_over))
    if not readable:
        raise FileNotFoundError(f"no pictures in {' '.join(map(str, paths))}: give --images files or folders of them")
    return readable
