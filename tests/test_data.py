"""Readers on drawn trees in their owners' layouts, the PK sampler, the transforms, the demo data."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
from data import PKSampler, Sample
from util import demo

# ---------------------------------------------------------------------------------------------- readers


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")


def market_tree(folder):
    """Names as in Market-1501, DukeMTMC-reID and CUHK03-NP, which one reader reads, and others to be passed over."""
    train = ("0002_c1s1_000451_03.jpg", "0002_c3_f0046182.jpg", "0007_c6_44.png", "900000_c19.PNG", "900001_c2_x.jpeg")
    passed_over = ("Thumbs.db", "0003_1s1.jpg", "0003c1.jpg", "0003_k1.jpg", "0003_c1.jpg.txt", "x0003_c1.jpg")
    touch(folder / "bounding_box_train", *train, *passed_over, "-1_c1.jpg")
    touch(folder / "query", "0001_c1s1_001051_00.jpg", "Thumbs.db")
    touch(folder / "bounding_box_test", "-1_c1s1_000401_03.jpg", "0000_c1s1_000151_01.jpg", "0001_c2s1_000976_01.jpg")


def ids_and_cameras(samples):
    return [(sample.pid, sample.camid) for sample in samples]


LAYOUTS = [
    ("market1501", "Market-1501-v15.09.15"),
    ("market1501", "market1501"),
    ("folder", ""),
    ("dukemtmc", "DukeMTMC-reID"),
    ("cuhk03", "cuhk03-np/labeled"),
    ("cuhk03-detected", "cuhk03-np/detected"),
]


@pytest.mark.parametrize("name, folder", LAYOUTS)
def test_layouts_of_market1501_without_junk_and_with_distractors(tmp_path, name, folder):
    market_tree(tmp_path / folder)
    dataset = data.load_dataset(name, tmp_path)
    assert ids_and_cameras(dataset.train) == [(0, 1), (0, 3), (1, 6), (2, 19), (3, 2)]  # relabelled
    assert ids_and_cameras(dataset.query) == [(1, 1)]
    assert ids_and_cameras(dataset.gallery) == [(0, 1), (1, 2)]  # -1 left out, 0 kept
    assert dataset.num_identities == 4
    assert dataset.query[0].path == tmp_path / folder / "query" / "0001_c1s1_001051_00.jpg"


@pytest.mark.parametrize(
    "folder, pictures", [("MSMT17_V1", ("train", "test")), ("MSMT17_V2", ("mask_train_v2", "mask_test_v2"))]
)
def test_msmt17_by_its_lists_train_with_val(tmp_path, folder, pictures):
    root = tmp_path / folder
    for subfolder in pictures:
        touch(root / subfolder)
    lists = {
        "list_train.txt": "0000/0000_000_01_0303morning_0015_0.jpg 0\n0000/0000_001_14_0303morning_0016_1.jpg 0\n",
        "list_val.txt": "0001/0001_000_05_0303noon_0015_0_ex.jpg 1\n",
        "list_query.txt": "0000/0000_000_11_0303morning_0025_0.jpg 0\n",
        "list_gallery.txt": "0000/0000_008_15_0303afternoon_0025_2.jpg 0\n",
    }
    for name, text in lists.items():
        (root / name).write_text(text)
    dataset = data.load_dataset("msmt17", tmp_path)
    assert ids_and_cameras(dataset.train) == [(0, 1), (0, 14), (1, 5)]
    assert ids_and_cameras(dataset.query) == [(0, 11)]
    assert ids_and_cameras(dataset.gallery) == [(0, 15)]
    assert dataset.train[0].path == root / pictures[0] / "0000/0000_000_01_0303morning_0015_0.jpg"
    assert dataset.query[0].path == root / pictures[1] / "0000/0000_000_11_0303morning_0025_0.jpg"
    (root / "list_val.txt").write_text("\n0001/0001_000_05_0303noon_0015_0_ex.jpg one\n")
    with pytest.raises(ValueError, match=r"list_val\.txt has a line not of MSMT17's pattern"):
        data.load_dataset("msmt17", tmp_path)
    (root / "list_val.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"list_val\.txt is missing"):
        data.load_dataset("msmt17", tmp_path)


def test_summary_counts_and_warns_of_what_is_missing(tmp_path):
    market_tree(tmp_path / "market1501")
    dataset = data.load_dataset("market1501", tmp_path)
    lines = data.summary(dataset).splitlines()
    assert lines[0] == f"market1501, read from {tmp_path / 'market1501'}"
    assert [part.strip() for part in lines[2].split("|")] == ["train", "4", "5", "5"]
    assert "should have 751 ids, 12936 images, 6 cameras, not 4 ids, 5 images, 5 cameras" in lines[3]
    whole = [Sample(tmp_path, i % 751, i % 6) for i in range(12936)]
    assert "train should" not in data.summary(dataset._replace(train=whole))
    assert "warning" not in data.summary(dataset._replace(name="folder"))
    assert lines[-1] == "7 files passed over (first: 0003_1s1.jpg)"


# Where the tree lies below --data-root, and what the message says.
WRONG_PLACES = {
    "elsewhere/there": "is not under",
    "": "give --data-root the folder above it",
    "Market-1501-v15.09.15/Market-1501-v15.09.15": "one folder too deep",
}


@pytest.mark.parametrize("folder, says", WRONG_PLACES.items())
def test_a_folder_in_the_wrong_place(tmp_path, folder, says):
    market_tree(tmp_path / folder)
    with pytest.raises(FileNotFoundError, match=says) as error:
        data.load_dataset("market1501", tmp_path)
    assert "Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}" in str(error.value)


def test_an_empty_subset_and_a_file_in_its_place_are_refused(tmp_path):
    market_tree(tmp_path / "market1501")
    query = tmp_path / "market1501/query"
    (query / "0001_c1s1_001051_00.jpg").unlink()
    with pytest.raises(ValueError, match=r"query has a name like .*: 1 file passed over .first: Thumbs.db"):
        data.load_dataset("market1501", tmp_path)
    query.rename(tmp_path / "away")
    query.touch()
    with pytest.raises(FileNotFoundError, match="is not under"):
        data.load_dataset("market1501", tmp_path)


# ------------------------------------------------------------------------------------------- PK sampler


def pids_of(counts: dict[int, int]) -> list[int]:
    """So many pictures of each identity, shuffled."""
    pids = [pid for pid, count in counts.items() for _ in range(count)]
    random.Random(0).shuffle(pids)
    return pids


def test_every_batch_is_16_identities_of_4_pictures():
    """Pictures repeat in an epoch only where an identity has fewer than 4."""
    counts, seen = {pid: 1 + pid % 11 for pid in range(40)}, Counter()
    pids = pids_of(counts)
    for batch in PKSampler(pids):
        indices = [index for index, seed in batch]
        seen.update(indices)
        assert len(indices) == 64
        groups = [{pids[index] for index in indices[start : start + 4]} for start in range(0, 64, 4)]
        assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 16
    for index, times in seen.items():
        assert counts[pids[index]] < 4 or times == 1


def test_an_epoch_has_the_length_of_the_fields_sampler():
    """RandomIdentitySampler: whole groups of 4 only, batches until fewer than 16 identities have one left."""
    pids = pids_of({pid: 10 for pid in range(32)})  # two groups of each
    sampler = PKSampler(pids)
    assert 3 <= len(sampler) == len(list(sampler)) <= 4
    left = Counter({pid: 2 for pid in range(32)})
    for batch in sampler:
        left -= Counter({pids[index]: 1 for index, _ in batch})
    assert len(left) < 16
    assert len(PKSampler(pids_of({pid: 7 for pid in range(16)}))) == 1  # 7 pictures are one group, 3 left out
    with pytest.raises(ValueError, match=r"16 identities, the data has 15: use a smaller --batch-ids"):
        PKSampler(pids_of({pid: 4 for pid in range(15)}))


def test_seed_and_epoch_decide_the_batches():
    def epoch(seed, number):
        sampler = PKSampler(pids_of({pid: 8 for pid in range(30)}), seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(3, 5) == epoch(3, 5)
    assert epoch(3, 5) != epoch(3, 6) and epoch(3, 5) != epoch(4, 5)


def test_an_epoch_can_be_taken_up_in_its_middle(demo_root):
    """The same pictures, augmented alike, however many loader processes there are."""
    samples = data.load_dataset("synthetic", demo_root).train
    sampler = PKSampler([sample.pid for sample in samples], num_ids=4, num_images=2)

    def batches(skip, workers, cache=False):
        sampler.set_epoch(2, skip)
        return list(data.train_loader(samples, sampler, (32, 16), workers, cache))

    whole, rest = batches(0, workers=0), batches(len(sampler) - 2, workers=1, cache=True)
    assert len(whole) == len(sampler) > 2 and len(rest) == 2
    for (images, labels), (rest_images, rest_labels) in zip(whole[-2:], rest):
        assert torch.equal(images, rest_images) and torch.equal(labels, rest_labels)


def test_the_cache_is_filled_by_the_workers_and_changes_nothing(demo_root, monkeypatch):
    samples = data.load_dataset("synthetic", demo_root).train
    sampler = PKSampler([sample.pid for sample in samples], num_ids=20, num_images=4)
    cached = data.train_loader(samples, sampler, (32, 16), workers=1, cache=True)
    first = [images for images, _ in cached]
    assert cached.dataset.is_cached.sum() == 160 == len(samples)
    monkeypatch.setattr(data, "read_picture", None)  # nothing is read any more
    second = [images for images, _ in cached]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(ValueError, match=r"9830\.4 GB of shared memory are needed, .* drop --cache"):
        data.AugmentedPictures(range(100_000_000), (256, 128), cache=True)  # so many samples


# ------------------------------------------------------------------------------- pictures and transforms


def test_read_picture_resizes_and_keeps_colour(tmp_path):
    for size in ((64, 128), (1, 1)):
        Image.new("RGB", size, (200, 100, 50)).save(tmp_path / "plain.png")
        picture = data.read_picture(tmp_path / "plain.png", (256, 128))
        assert picture.shape == (3, 256, 128) and picture.dtype == torch.uint8
        assert picture.view(3, -1).float().mean(1).tolist() == [200, 100, 50]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_pictures_of_every_mode_are_read(tmp_path, mode):
    """Mid-grey, whatever the file's mode."""
    suffix = {"CMYK": "jpg", "YCbCr": "jpg", "F": "tiff", "I": "tiff"}.get(mode, "png")
    grey = {"I": 128 << 8, "I;16": 128 << 8, "1": 1}.get(mode)
    picture = Image.new("L", (8, 16), 128).convert(mode) if grey is None else Image.new(mode, (8, 16), grey)
    picture.save(tmp_path / f"picture.{suffix}")
    pixels = data.read_picture(tmp_path / f"picture.{suffix}", (32, 16))
    assert pixels.shape == (3, 32, 16)
    assert ((pixels.float() - (255 if mode == "1" else 128)).abs() <= 2).all()


def test_unreadable_and_enormous_pictures_are_named(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_bytes(b"not a picture")
    Image.effect_noise((64, 128), 50).save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1000])
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    for name, reason in (("empty.jpg", ""), ("text.jpg", ""), ("half.jpg", ""), ("huge.png", ".*exceeds limit")):
        with pytest.raises(OSError, match=f"cannot read the picture .*{name} {reason}") as error:
            data.read_picture(tmp_path / name, (256, 128))
        assert "\n" not in str(error.value)


def test_normalize_is_clips():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    means, stds = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = [(images[:, channel] / 255 - means[channel]) / stds[channel] for channel in range(3)]
    torch.testing.assert_close(clip.normalize(images), torch.stack(expected, dim=1))


def test_augmentation_flips_crops_and_erases_as_often_as_it_should():
    torch.manual_seed(0)
    picture = torch.full((3, 64, 32), 255, dtype=torch.uint8)
    picture[:, :, :16] = 250
    transform = data.augmentation((64, 32))
    results = torch.stack([transform(picture) for _ in range(600)])
    assert results.shape == (600, 3, 64, 32) and results.dtype == torch.uint8
    erased = (results == torch.tensor([123, 117, 104]).view(3, 1, 1)).all(1)  # CLIP's mean colour
    assert 0.43 < erased.any((1, 2)).float().mean() < 0.57
    area = erased.float().mean((1, 2))[erased.any((1, 2))]
    assert area.max() < 0.45 and area.mean() > 0.1
    padded = (results == 0).all(1).any((1, 2)).float().mean()
    assert padded > 0.8  # a shift of up to 10 pixels, by zeros
    column = results[:, 0].float()
    left_darker = [(row[:, :10][row[:, :10] > 200].mean() < row[:, -10:][row[:, -10:] > 200].mean()) for row in column]
    assert 0.4 < sum(map(float, left_darker)) / 600 < 0.6


# -------------------------------------------------------------------------------------------- demo data


def test_the_demo_is_drawn_once_and_alike(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        demo.draw_dataset(tmp_path / name, data.MARKET_FOLDERS, train_ids=2, test_ids=1, seed=seed)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(names) > 40
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes() and content != (tmp_path / "c" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_the_demo_has_every_part_of_market1501(demo_root):
    dataset = data.load_dataset("synthetic", demo_root)
    assert dataset.num_identities == 20 and len(dataset.train) == 160
    assert len(dataset.query) == 24 and {sample.camid for sample in dataset.query} == {1, 2, 3, 4}
    assert {sample.pid for sample in dataset.query} < {sample.pid for sample in dataset.gallery}
    assert sum(sample.pid == 0 for sample in dataset.gallery) > 0  # distractors
    for sample in dataset.query:
        mask = Image.open(demo_root / f"synthetic/masks/{sample.path.stem}.png")
        assert Image.open(sample.path).size == mask.size == (128, 256)
        assert 0.05 < (np.asarray(mask) > 0).mean() < 0.6
