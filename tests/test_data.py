"""Datasets in their owners' layouts, image files of all kinds, the PK sampler, the training loader."""

import os
import random
import struct
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import PKSampler, Sample

NOT_UTF8 = os.fsdecode("行人".encode("gbk"))  # a file name from an archive made on a Chinese Windows


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def make_market1501(folder):
    """Make files named as in Market-1501, DukeMTMC-reID and CUHK03-NP, and seven others that must be skipped."""
    train = ("0002_c1s1_000451_03.jpg", "0002_c3_f0046182.jpg", "0007_c6_44.png", "900000_c19.PNG", "900001_c2_x.jpeg")
    skipped = ("Thumbs.db", "0003_1s1.jpg", "0003c1.jpg", "._0003_c1.jpg", "0003_c1.jpg.txt", f"{NOT_UTF8}.jpg")
    touch(folder / "bounding_box_train", *train, *skipped, "-1_c1.jpg")
    touch(folder / "query", "0001_c1s1_001051_00.jpg", "Thumbs.db")
    touch(folder / "bounding_box_test", "-1_c1s1_000401_03.jpg", "0000_c1s1_000151_01.jpg", "0001_c2s1_000976_01.jpg")


def make_msmt17(folder, *image_folders):
    for name in image_folders:
        touch(folder / name)
    lists = {
        "train": "0000/0000_000_01_0303morning_0015_0.jpg 0\r\n0000/0000_001_14_0303morning_0016_1.jpg 0\r\n",
        "val": "0001/0001_000_05_0303noon_0015_0_ex.jpg 1\n",
        "query": "0000/0000_000_11_0303morning_0025_0.jpg 0\n",
        "gallery": "\ufeff0000/0000_008_15_0303afternoon_0025_2.jpg 0\n",
    }
    for name, text in lists.items():
        (folder / f"list_{name}.txt").write_bytes(text.encode())


def ids_and_cameras(samples):
    return [(sample.pid, sample.camid) for sample in samples]


# ------------------------------------------------------------------------------------------------- datasets


@pytest.mark.parametrize(
    "name, folder", [("folder", ""), ("market1501", "Market-1501"), ("cuhk03", "cuhk03-np/labeled")]
)
def test_market1501_layout(tmp_path, name, folder):
    make_market1501(tmp_path / folder)
    dataset = data.load_dataset(name, tmp_path)
    assert ids_and_cameras(dataset.train) == [(0, 1), (0, 3), (1, 6), (2, 19), (3, 2)]  # relabelled
    assert ids_and_cameras(dataset.query) == [(1, 1)]
    assert ids_and_cameras(dataset.gallery) == [(0, 1), (1, 2)]  # with distractors (0), without junk (-1)
    assert dataset.num_identities == 4 and len(dataset.skipped) == 7
    (tmp_path / folder / "bounding_box_train").rename(tmp_path / "other")
    assert not data.load_dataset(name, tmp_path, ("query", "gallery")).train  # evaluation does not need it
    assert dataset.query[0].path == tmp_path / folder / "query/0001_c1s1_001051_00.jpg"


V1, V2 = ("train", "test"), ("mask_train_v2", "mask_test_v2")


@pytest.mark.parametrize("folder, images, version", [("MSMT17_V1", V1, "V1"), ("MSMT17", V2, "V2")])
def test_both_versions_of_msmt17(tmp_path, folder, images, version):
    make_msmt17(tmp_path / folder, *images)
    dataset = data.load_dataset("msmt17", tmp_path)
    assert ids_and_cameras(dataset.train) == [(0, 1), (0, 14), (1, 5)]  # train and val
    assert ids_and_cameras(dataset.query + dataset.gallery) == [(0, 11), (0, 15)]
    assert dataset.train[0].path == tmp_path / folder / images[0] / "0000/0000_000_01_0303morning_0015_0.jpg"
    assert dataset.query[0].path == tmp_path / folder / images[1] / "0000/0000_000_11_0303morning_0025_0.jpg"
    assert dataset.version == version


def test_names_that_cannot_be_read_are_refused(tmp_path):
    make_msmt17(tmp_path / "MSMT17_V1", *V1)
    (tmp_path / "MSMT17_V1/list_val.txt").write_text("../0000/0000_000_01_x.jpg 0")
    with pytest.raises(ValueError, match="list_val.txt .*x.jpg 0"):
        data.load_dataset("msmt17", tmp_path)


def test_summary_counts_and_warns(tmp_path):
    make_market1501(tmp_path)
    dataset = data.load_dataset("folder", tmp_path)
    text = data.summary(dataset)
    assert "warning" not in text and "7 files skipped" in text
    assert [part.strip() for part in text.splitlines()[2].split("|")] == ["train", "4", "5", "5"]
    market1501 = dataset._replace(name="market1501")
    assert "warning: train should have 751 ids, 12936 images, 6 cameras" in data.summary(market1501)
    assert "a single camera" in data.summary(dataset._replace(gallery=dataset.gallery[:1]))
    assert "both train and test: 1 (first: 7)" in data.summary(dataset._replace(query=[Sample(tmp_path, 7, 1)]))


# ---------------------------------------------------------------------------------------------- image files


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr"])
def test_images_of_every_mode_are_read(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode in ("CMYK", "YCbCr") else "image.png")
    image = Image.new("RGB", (8, 16), (200, 100, 50)).convert(mode, dither=0)
    image.save(path)
    expected = np.asarray(image.convert("RGB"))[0, 0]
    pixels = data.read_image(path, (32, 16))
    assert pixels.shape == (3, 32, 16) and pixels.dtype == torch.uint8
    assert (pixels.float() - torch.tensor(expected).view(3, 1, 1)).abs().max() <= 3


def test_images_are_resized_bicubically_with_antialiasing(tmp_path):
    image = Image.effect_noise((50, 90), 50).convert("RGB")
    image.save(tmp_path / "image.png")
    expected = torch.tensor(np.asarray(image.resize((16, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert (data.read_image(tmp_path / "image.png", (32, 16)).int() - expected.int()).abs().max() <= 1


def test_images_of_16_bits_are_never_silently_black(tmp_path):
    Image.new("I;16", (8, 16), 200 << 8).save(tmp_path / "bright.png")
    assert (np.asarray(data.open_image(tmp_path / "bright.png")) == 200).all()
    Image.new("I;16", (8, 16), 200 << 4).save(tmp_path / "dark.png")  # 12 bits
    with pytest.raises(OSError, match="dark.png"):
        data.open_image(tmp_path / "dark.png")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_broken_metadata_does_not_hide_the_orientation(tmp_path, suffix):
    image, path = Image.linear_gradient("L").resize((20, 40)).convert("RGB"), tmp_path / f"side.{suffix}"
    tags = struct.pack("<HHI4sHHII", 282, 2, 4, b"abc\0", 274, 3, 1, 6)  # 282: a number, as text; 274: orientation
    exif = b"Exif\0\0II*\0\x08\0\0\0\x02\0" + tags + bytes(4)
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    assert np.abs(np.asarray(data.open_image(path), dtype=int) - np.asarray(image)).max() < 20


def test_unreadable_images_are_named_and_the_others_read(tmp_path):
    noise = Image.effect_noise((64, 128), 50)
    noise.save(tmp_path / "good.jpg")
    noise.save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "eps.jpg")  # Pillow would start Ghostscript
    (tmp_path / "half.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:1000])
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    Image.new("F", (8, 8), 0.5).save(tmp_path / "float.tif")
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for ever
    bad = ("eps.jpg", "half.jpg", "huge.png", "float.tif", "pipe.jpg", "missing.jpg")
    paths = [str(tmp_path / name) for name in ("good.jpg", *bad, "good.jpg")]
    batches = list(data.image_loader(paths, (32, 16), batch_size=4, workers=1))
    images, errors = torch.cat([images for images, _ in batches]), [e for _, errors in batches for e in errors]
    assert torch.equal(images[0], images[-1]) and images[0].any() and not images[1:-1].any()
    for error, path in zip(errors, paths[1:-1], strict=True):
        assert path in error and "\n" not in error


def test_find_images_in_files_and_folders(tmp_path, capsys):
    folder = tmp_path / "mine"
    images = [f"a.{suffix}" for suffix in ("JPEG", "Png", "bmp", "gif", "jpg", "tif", "webp")]
    touch(folder, *images, "._a.jpg", "notes.txt")
    touch(folder / "sub.jpg", f"{NOT_UTF8}.jpg")
    (folder / "link").symlink_to(folder)
    found = data.find_images([folder, folder / "notes.txt"])  # a named file may have any name
    assert found == [*(folder / name for name in images), folder / "sub.jpg" / f"{NOT_UTF8}.jpg", folder / "notes.txt"]
    assert "3 files skipped" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    for path in ("nowhere", tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            data.find_images([path])


# ------------------------------------------------------------------------------------- sampler and loader


def shuffled_pids(counts: dict[int, int]) -> list[int]:
    """Return the shuffled identities of images: `counts[pid]` images of each."""
    pids = [pid for pid, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(pids)
    return pids


def test_a_batch_is_16_identities_of_4_images():
    """Images repeat in an epoch only where an identity has fewer than 4. An epoch has the baseline's length."""
    counts, seen = {pid: 1 + pid % 11 for pid in range(40)}, Counter()
    pids = shuffled_pids(counts)
    groups_left = Counter({pid: max(1, count // 4) for pid, count in counts.items()})
    for batch in PKSampler(pids):
        indices = [index for index, seed in batch]
        seen.update(indices)
        groups = [{pids[index] for index in indices[start : start + 4]} for start in range(0, 64, 4)]
        assert len(indices) == 64 and all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 16
        groups_left.subtract(set.union(*groups))
    assert all(counts[pids[index]] < 4 or times == 1 for index, times in seen.items())
    assert min(groups_left.values()) == 0 and sum(left > 0 for left in groups_left.values()) < 16


def test_batches_depend_on_seed_and_epoch_and_processes_share_them():
    def batches(seed, epoch, **processes):
        sampler = PKSampler(shuffled_pids({pid: 8 for pid in range(30)}), 16, 4, seed, **processes)
        sampler.set_epoch(epoch)
        return list(sampler)

    whole = batches(3, 5)
    assert whole == batches(3, 5) and whole != batches(3, 6) and whole != batches(4, 5)
    first, second = (batches(3, 5, rank=rank, world_size=2) for rank in (0, 1))
    assert [a + b for a, b in zip(first, second, strict=True)] == whole and len(first[0]) == 32


def test_augmentation_depends_only_on_the_seed_of_the_image(tmp_path):
    """The number of loader processes has no effect. The state of the global generator does not change."""
    for i in range(40):
        Image.effect_noise((16, 32), 50).save(tmp_path / f"{i}.png")
    samples = [Sample(tmp_path / f"{i}.png", i % 5, 1) for i in range(40)]
    sampler = PKSampler([sample.pid for sample in samples], num_ids=4, num_images=2)

    def load_epoch(workers):
        state = torch.manual_seed(workers).get_state()
        batches = list(data.train_loader(samples, sampler, (32, 16), workers))
        assert torch.equal(torch.get_rng_state(), state)
        return [torch.cat(part) for part in zip(*batches)]

    (images, labels), (again, labels_again) = load_epoch(0), load_epoch(2)
    assert len(images) == 8 * len(sampler) > 16 and torch.equal(images, again) and torch.equal(labels, labels_again)
    alone, (index, seed) = data.TrainImages(samples, (32, 16)), list(sampler)[1][3]
    assert torch.equal(images[8 + 3], alone[index, seed][0]) and not torch.equal(images[8 + 3], alone[index, 0][0])


def test_rates_of_flips_crops_and_erased_areas():
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
    padding = (results == 0).all(1)
    assert padding.any((1, 2)).float().mean() > 0.8
    assert padding.all(2).sum(1).max() == padding.all(1).sum(1).max() == 10  # rows and columns
    left, right = ([half[half > 200].float().mean() for half in results[:, 0].split(16, dim=2)[i]] for i in (0, 1))
    assert 0.4 < sum(a < b for a, b in zip(left, right)) / 600 < 0.6
