"""Datasets in their owners' layouts, image files of all kinds, the PK sampler, the loaders."""

import hashlib
import io
import os
import random
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import PKSampler, Sample

GBK = "行人".encode("gbk")
BAD_NAME = os.fsdecode(GBK)  # not UTF-8, as from an archive made on a Chinese Windows


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def market_tree(folder):
    """Make names as in Market-1501, DukeMTMC-reID and CUHK03-NP, and eight others that must be skipped."""
    train = ("0002_c1s1_000451_03.jpg", "0002_c3_f0046182.jpg", "0007_c6_44.png", "900000_c19.PNG", "900001_c2_x.jpeg")
    skipped = ("Thumbs.db", "0003_1s1.jpg", "0003c1.jpg", "._0003_c1.jpg", "0003_c1.jpg.txt", f"{BAD_NAME}.jpg")
    touch(folder / "bounding_box_train", *train, *skipped, "-1_c1.jpg")
    (folder / "bounding_box_train/more").symlink_to(folder)
    touch(folder / "query", "0001_c1s1_001051_00.jpg", "Thumbs.db")
    touch(folder / "bounding_box_test", "-1_c1s1_000401_03.jpg", "0000_c1s1_000151_01.jpg", "0001_c2s1_000976_01.jpg")


def msmt17_tree(folder, *images):
    touch(folder)
    lists = {
        "train": "0000/0000_000_01_0303morning_0015_0.jpg 0\r\n0000/0000_001_14_0303morning_0016_1.jpg 0\r\n",
        "val": "0001/0001_000_05_0303noon_0015_0_ex.jpg 1\n",
        "query": "0000/0000_000_11_0303morning_0025_0.jpg 0\n",
        "gallery": "\ufeff0000/0000_008_15_0303afternoon_0025_2.jpg 0\n",
    }
    for name, text in lists.items():
        (folder / f"list_{name}.txt").write_bytes(text.encode())
    for name in images:
        touch(folder / name)


def ids_and_cameras(samples):
    return [(sample.pid, sample.camid) for sample in samples]


LAYOUTS = {"folder": "", "market1501": "Market-1501", "dukemtmc": "DukeMTMC-reID", "cuhk03": "cuhk03-np/labeled"}
LAYOUTS |= {"cuhk03-detected": "cuhk03_np/detected"}


@pytest.mark.parametrize("name, folder", LAYOUTS.items())
def test_market1501_layout_without_junk_and_with_distractors(tmp_path, name, folder):
    market_tree(tmp_path / folder)
    dataset = data.load_dataset(name, tmp_path)
    assert ids_and_cameras(dataset.train) == [(0, 1), (0, 3), (1, 6), (2, 19), (3, 2)]  # relabelled
    assert ids_and_cameras(dataset.query) == [(1, 1)]
    assert ids_and_cameras(dataset.gallery) == [(0, 1), (1, 2)]  # without -1, with 0
    assert dataset.num_identities == 4 and dataset.version is None
    assert dataset.query[0].path == tmp_path / folder / "query/0001_c1s1_001051_00.jpg"


V1, V2 = ("train", "test"), ("mask_train_v2", "mask_test_v2")
BROKEN_LISTS = {b"\n": "it is empty", b"../0000/0000_000_01_x.jpg 0": "x.jpg 0", "0 ä".encode("utf-16"): "udcff"}


@pytest.mark.parametrize("folder, images, version", [("MSMT17_V1", V1, "V1"), ("MSMT17", V2, "V2")])
def test_msmt17_versions_with_train_and_val(tmp_path, folder, images, version):
    msmt17_tree(tmp_path / folder, *images)
    dataset = data.load_dataset("msmt17", tmp_path)
    assert ids_and_cameras(dataset.train) == [(0, 1), (0, 14), (1, 5)]
    assert ids_and_cameras(dataset.query + dataset.gallery) == [(0, 11), (0, 15)]
    assert dataset.train[0].path == tmp_path / folder / images[0] / "0000/0000_000_01_0303morning_0015_0.jpg"
    assert dataset.query[0].path == tmp_path / folder / images[1] / "0000/0000_000_11_0303morning_0025_0.jpg"
    assert dataset.version == version and "train and test" not in data.summary(dataset)  # its numbers restart


@pytest.mark.parametrize("content, words", BROKEN_LISTS.items())
def test_a_broken_msmt17_list_is_named(tmp_path, content, words):
    msmt17_tree(tmp_path / "MSMT17_V1", *V1)
    (tmp_path / "MSMT17_V1/list_val.txt").write_bytes(content)
    with pytest.raises(ValueError, match=f"list_val.txt is not a list of MSMT17 .*{words}.*: unpack"):
        data.load_dataset("msmt17", tmp_path)


@pytest.mark.parametrize("subsets, counts", [(("train",), (5, 0, 0)), (("query", "gallery"), (0, 1, 2))])
def test_only_the_named_subsets_are_needed(tmp_path, subsets, counts):
    market_tree(tmp_path)
    for subset in {"train", "query", "gallery"} - set(subsets):
        (tmp_path / data.MARKET1501[subset][0]).rename(tmp_path / subset)
    dataset = data.load_dataset("folder", tmp_path, subsets)
    assert (len(dataset.train), len(dataset.query), len(dataset.gallery)) == counts
    assert [line.split()[0] for line in data.summary(dataset).splitlines()[2:-1]] == list(subsets)


def test_a_missing_dataset_is_refused_with_its_tree(tmp_path):
    def refused(name, folder, tree):
        with pytest.raises(FileNotFoundError) as error:
            data.load_dataset(name, tmp_path)
        folder = tmp_path / folder
        assert str(error.value) == f"no dataset at {folder}: expected {folder}/{{{tree}}}"

    lists = "{},list_train.txt,list_val.txt,{},list_query.txt,list_gallery.txt"
    refused("market1501", "Market-1501-v15.09.15", "bounding_box_train,query,bounding_box_test")
    refused("msmt17", "MSMT17_V1", lists.format(*V1))
    touch(tmp_path / "MSMT17_V2")
    refused("msmt17", "MSMT17_V2", lists.format(*V2))
    market_tree(tmp_path / "Market1501")
    (tmp_path / "Market1501/query").rename(tmp_path / "Market1501/queries")
    refused("market1501", "Market1501", "bounding_box_train,query,bounding_box_test")


def test_names_that_are_no_samples_are_refused_with_their_file(tmp_path):
    market_tree(tmp_path)
    (tmp_path / "query/0001_c1s1_001051_00.jpg").rename(tmp_path / f"query/{2**63}_c1.jpg")
    with pytest.raises(ValueError, match=rf"{2**63}_c1\.jpg has more than 18 digits"):
        data.load_dataset("folder", tmp_path)
    (tmp_path / f"query/{2**63}_c1.jpg").unlink()
    with pytest.raises(ValueError, match=r"query has a name like .*: 1 file skipped \(first: Thumbs.db\)"):
        data.load_dataset("folder", tmp_path)


def test_summary_counts_and_warns(tmp_path):
    market_tree(tmp_path)
    dataset = data.load_dataset("folder", tmp_path)
    lines = data.summary(dataset).splitlines()
    assert lines[0] == f"folder, read from {tmp_path}" and "warning" not in "".join(lines)
    assert [part.strip() for part in lines[2].split("|")] == ["train", "4", "5", "5"]
    assert lines[-1] == "8 files skipped (first: ._0003_c1.jpg)"  # with the linked folder
    market = dataset._replace(name="market1501")
    text = "train should have 751 ids, 12936 images, 6 cameras, not 4 ids, 5 images, 5 cameras"
    assert text in data.summary(market)
    whole = [Sample(tmp_path, i % 751, i % 6) for i in range(12936)]
    assert "train should" not in data.summary(market._replace(train=whole))
    one_camera = dataset._replace(gallery=dataset.gallery[:1])
    assert "nothing can be evaluated (--eval-every 0)" in data.summary(one_camera)
    in_train = dataset._replace(query=[Sample(tmp_path, 7, 1)])
    assert "identities in both train and test: 1 (first: 7)" in data.summary(in_train)


def test_names_that_are_not_utf8_are_read_and_printed_on_a_strict_terminal(tmp_path, monkeypatch):
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        touch(tmp_path / BAD_NAME / folder, f"0001_c1_{BAD_NAME}.jpg", f"{BAD_NAME}.jpg")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", "strict"))
    dataset = data.load_dataset("folder", tmp_path / BAD_NAME)
    print(data.summary(dataset))
    assert len(dataset.train) == 1 and len(dataset.skipped) == 3
    assert data.digest(dataset.train) == hashlib.sha256(b"0 0001_c1_" + GBK + b".jpg").hexdigest()
    ((_, errors),) = data.image_loader([dataset.train[0].path], (8, 8))  # the file is empty
    print(*errors)
    assert errors[0].startswith("cannot read image ") and data.printable("行\n.jpg") == r"\u884c\n.jpg"


# ---------------------------------------------------------------------------------------------- image files


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I;16"])
@pytest.mark.parametrize("size", [(8, 16), (1, 1)])
def test_images_of_every_mode_and_size_are_read(tmp_path, mode, size):
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    image = Image.new("RGB", size, (200, 100, 50)).convert("L" if mode == "I;16" else mode, dither=0)
    expected = np.asarray(image.convert("RGB"))[0, 0]
    (Image.new(mode, size, int(expected[0]) << 8) if mode == "I;16" else image).save(path)
    pixels = data.read_image(path, (32, 16))
    assert pixels.shape == (3, 32, 16) and pixels.dtype == torch.uint8
    assert (pixels.float() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 3


def test_images_are_resized_bicubically_with_antialiasing(tmp_path):
    image = Image.effect_noise((50, 90), 50).convert("RGB")
    image.save(tmp_path / "image.png")
    expected = torch.tensor(np.asarray(image.resize((16, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert (data.read_image(tmp_path / "image.png", (32, 16)).int() - expected.int()).abs().max() <= 1


def png(kind: int, values: np.ndarray, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of 16-bit values (H, W, channels). Pillow cannot write colours of 16 bits."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = (struct.pack(">I", len(x)) + name + x + struct.pack(">I", zlib.crc32(name + x)) for name, x in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("kind, channels", [(0, 1), (2, 3), (4, 2), (6, 4)], ids=["L", "RGB", "LA", "RGBA"])
def test_images_of_16_bits_are_never_silently_black(tmp_path, kind, channels):
    values = np.full((4, 2, channels), 200 << 8)
    text = (b"zTXt", b"comment\0\0" + zlib.compress(bytes(10_000_000)))  # which does not matter, long as it is
    (tmp_path / "bright.png").write_bytes(png(kind, values, text))
    assert np.asarray(data.open_image(tmp_path / "bright.png")).tolist() == np.full((4, 2, 3), 200).tolist()
    (tmp_path / "dark.png").write_bytes(png(kind, values >> 4))  # 12 bits
    with pytest.raises(OSError, match=r"dark\.png \(16-bit values of at most 12 bits"):
        data.open_image(tmp_path / "dark.png")


ODD_TAGS = {"text": (270, 2, b"\xff\xfe\xfd\xfc"), "number": (282, 2, b"abc\0"), "gps": (34853, 2, b"abc\0")}
ODD_TAGS |= {"type": (305, 99, b"abcd")}


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("tag, kind, value", ODD_TAGS.values(), ids=ODD_TAGS)
def test_odd_exif_neither_stops_nor_hides_the_orientation(tmp_path, suffix, tag, kind, value):
    image, path = Image.linear_gradient("L").resize((20, 40)).convert("RGB"), tmp_path / f"side.{suffix}"
    side = image.transpose(Image.Transpose.ROTATE_90)
    tags = struct.pack("<HHI4sHHII", tag, kind, 4, value, 274, 3, 1, 6)  # 274: orientation
    side.save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(4), quality=95)
    assert np.abs(np.asarray(data.open_image(path), dtype=int) - np.asarray(image)).max() < 20
    side.save(path, exif=b"Exif\0\0II")
    assert data.open_image(path).size == (40, 20)


def test_unreadable_images_are_named_in_one_line_and_stop_nothing(tmp_path, monkeypatch):
    """Neither Ghostscript is started nor a pipe opened. Good images around them are read."""
    touch(tmp_path, "empty.jpg", "was-not-run")
    (tmp_path / "gs").write_text(f"#!/bin/sh\nrm {tmp_path}/was-not-run")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    noise = Image.effect_noise((64, 128), 50)
    noise.save(tmp_path / "good.jpg")
    noise.save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "drawing.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:1000])
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("I", (8, 8), 1000).save(tmp_path / "int.tif")
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.tif")
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {"empty.jpg": "", "drawing.jpg": "", "half.jpg": "truncated", "huge.png": "exceeds limit"}
    reasons |= {"int.tif": "integer values", "float.tif": "float values", "pipe.jpg": "no image file", "no.jpg": "no image file"}
    paths = [str(tmp_path / name) for name in ("good.jpg", *reasons, "good.jpg")]
    batches = list(data.image_loader(paths, (32, 16), batch_size=4, workers=1))
    images, errors = torch.cat([images for images, _ in batches]), [e for _, errors in batches for e in errors]
    assert torch.equal(images[0], images[-1]) and images[0].any() and not images[1:-1].any()
    for error, path in zip(errors, paths[1:-1], strict=True):
        assert path in error and reasons[Path(path).name] in error and "\n" not in error
    assert (tmp_path / "was-not-run").exists()


def test_find_images_in_files_and_folders(tmp_path, capsys):
    mine = tmp_path / "mine"
    images = [f"a.{suffix}" for suffix in ("JPEG", "Png", "bmp", "gif", "jpg", "tif", "webp")]
    touch(mine, *images, "._a.jpg", "notes.txt")
    touch(mine / "sub.jpg", f"{BAD_NAME}.jpg")
    (mine / "link").symlink_to(mine)
    found = data.find_images([mine, mine / "notes.txt"])  # a file that is named is not judged by its name
    assert found == [*(mine / name for name in images), mine / "sub.jpg" / f"{BAD_NAME}.jpg", mine / "notes.txt"]
    assert capsys.readouterr().out == "3 files skipped (first: ._a.jpg)\n"
    touch(tmp_path / "empty")
    for path, words in (("nowhere", "no file or folder nowhere"), (tmp_path / "empty", "no images in .*empty: give")):
        with pytest.raises(FileNotFoundError, match=words):
            data.find_images([path])


# ------------------------------------------------------------------------------------- sampler and loaders


def pids_of(counts: dict[int, int]) -> list[int]:
    """Return the shuffled identities of images, so many of each."""
    pids = [pid for pid, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(pids)
    return pids


def test_every_batch_is_16_identities_of_4_images():
    """Images repeat in an epoch only where an identity has fewer than 4. An epoch has the baseline's length."""
    counts, seen = {pid: 1 + pid % 11 for pid in range(40)}, Counter()
    pids = pids_of(counts)
    groups = Counter({pid: max(1, count // 4) for pid, count in counts.items()})
    for batch in PKSampler(pids):
        indices = [index for index, seed in batch]
        seen.update(indices)
        four = [{pids[index] for index in indices[start : start + 4]} for start in range(0, 64, 4)]
        assert len(indices) == 64 and all(len(group) == 1 for group in four) and len(set.union(*four)) == 16
        groups.subtract(set.union(*four))
    assert all(counts[pids[index]] < 4 or times == 1 for index, times in seen.items())
    assert min(groups.values()) == 0 and sum(left > 0 for left in groups.values()) < 16
    with pytest.raises(ValueError, match=r"16 identities, train has 15: lower --batch-ids"):
        PKSampler(pids_of({pid: 4 for pid in range(15)}))


def test_seed_and_epoch_decide_the_batches_and_processes_share_them():
    def epoch(seed, number, **processes):
        sampler = PKSampler(pids_of({pid: 8 for pid in range(30)}), 16, 4, seed, **processes)
        sampler.set_epoch(number)
        return list(sampler)

    whole = epoch(3, 5)
    assert whole == epoch(3, 5) and whole != epoch(3, 6) and whole != epoch(4, 5)
    first, second = (epoch(3, 5, rank=rank, world_size=2) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == whole and len(first[0]) == 32
    with pytest.raises(ValueError, match="3 processes cannot share --batch-ids 16"):
        epoch(3, 5, world_size=3)


def test_augmentation_depends_on_the_images_own_seed_alone(tmp_path):
    """Neither on the number of loader processes nor on the global generator, whose state is kept."""
    for i in range(40):
        Image.effect_noise((16, 32), 50).save(tmp_path / f"{i}.png")
    samples = [Sample(tmp_path / f"{i}.png", i % 5, 1) for i in range(40)]
    sampler = PKSampler([sample.pid for sample in samples], num_ids=4, num_images=2)

    def epoch(workers):
        sampler.set_epoch(2)
        state = torch.manual_seed(workers).get_state()
        batches = list(data.train_loader(samples, sampler, (32, 16), workers))
        assert torch.equal(torch.get_rng_state(), state)
        return [torch.cat(part) for part in zip(*batches)]

    (images, labels), (again, labels_again) = epoch(0), epoch(2)
    assert len(images) == 8 * len(sampler) > 16 and torch.equal(images, again) and torch.equal(labels, labels_again)
    alone, index, seed = data.TrainImages(samples, (32, 16)), *list(sampler)[1][3]
    assert torch.equal(images[8 + 3], alone[index, seed][0]) and not torch.equal(images[8 + 3], alone[index, 0][0])


def test_augmentation_flips_crops_and_erases_as_often_as_it_should():
    torch.manual_seed(0)
    image = torch.full((3, 64, 32), 255, dtype=torch.uint8)
    image[:, :, :16] = 250
    augment = data.TrainImages([], (64, 32)).augment
    results = torch.stack([augment(image) for _ in range(600)])
    assert results.shape == (600, 3, 64, 32) and results.dtype == torch.uint8
    erased = (results == torch.tensor([123, 117, 104]).view(3, 1, 1)).all(1)  # CLIP's mean colour
    assert 0.43 < erased.any((1, 2)).float().mean() < 0.57
    area = erased.float().mean((1, 2))[erased.any((1, 2))]
    assert area.max() < 0.45 and area.mean() > 0.1
    black = (results == 0).all(1)  # a shift of up to 10 pixels, by zeros
    assert black.any((1, 2)).float().mean() > 0.8
    assert black.all(2).sum(1).max() == black.all(1).sum(1).max() == 10  # rows and columns
    column = results[:, 0].float()
    left_darker = [(row[:, :10][row[:, :10] > 200].mean() < row[:, -10:][row[:, -10:] > 200].mean()) for row in column]
    assert 0.4 < sum(map(float, left_darker)) / 600 < 0.6
