"""Readers on drawn trees in their owners' layouts, the PK sampler, the transforms, the demo data."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import PKSampler, Sample
from util import demo

# ---------------------------------------------------------------------------------------------- readers


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def market_tree(folder):
    touch(
        folder / "bounding_box_train", "0002_c1s1_000451_03.jpg", "0002_c3s2_000001_01.jpg", "0007_c6s3_077419_03.jpg"
    )
    touch(folder / "bounding_box_train", "Thumbs.db")
    touch(folder / "query", "0001_c1s1_001051_00.jpg", "Thumbs.db")
    touch(folder / "bounding_box_test", "-1_c1s1_000401_03.jpg", "0000_c1s1_000151_01.jpg", "0001_c2s1_000976_01.jpg")


def ids_and_cameras(samples):
    return [(sample.pid, sample.camid) for sample in samples]


@pytest.mark.parametrize(
    "name, folder", [("market1501", "Market-1501-v15.09.15"), ("market1501", "market1501"), ("folder", "")]
)
def test_market1501_without_junk_and_with_distractors(tmp_path, name, folder):
    market_tree(tmp_path / folder)
    dataset = data.load_dataset(name, tmp_path)
    assert ids_and_cameras(dataset.train) == [(0, 1), (0, 3), (1, 6)]  # relabelled
    assert ids_and_cameras(dataset.query) == [(1, 1)]
    assert ids_and_cameras(dataset.gallery) == [(0, 1), (1, 2)]  # -1 left out, 0 kept
    assert dataset.num_identities == 2
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


@pytest.mark.parametrize(
    "name, folder, pictures",
    [
        ("dukemtmc", "DukeMTMC-reID", ["0001_c2_f0046182.jpg", "0005_c8_f0046302.jpg", "0005_c5_f0051341.jpg"]),
        ("cuhk03", "cuhk03-np/labeled", ["0001_c1_1.png", "0005_c2_44.png", "0005_c1_40.png"]),
        ("cuhk03-detected", "cuhk03-np/detected", ["0001_c1_1.png", "0005_c2_44.png", "0005_c1_40.png"]),
    ],
)
def test_layouts_that_follow_market1501(tmp_path, name, folder, pictures):
    touch(tmp_path / folder / "bounding_box_train", pictures[0])
    touch(tmp_path / folder / "query", pictures[1])
    touch(tmp_path / folder / "bounding_box_test", pictures[2])
    dataset = data.load_dataset(name, tmp_path)
    camera = int(pictures[0].split("_c")[1][0])
    assert ids_and_cameras(dataset.train) == [(0, camera)]
    assert dataset.query[0].pid == dataset.gallery[0].pid == 5
    assert dataset.query[0].camid != dataset.gallery[0].camid


def test_summary_counts_and_warns_of_what_is_missing(tmp_path):
    market_tree(tmp_path / "market1501")
    dataset = data.load_dataset("market1501", tmp_path)
    lines = data.summary(dataset).splitlines()
    assert lines[0] == f"market1501, read from {tmp_path / 'market1501'}"
    assert [part.strip() for part in lines[2].split("|")] == ["train", "2", "3", "3"]
    assert "should have 751 ids and 12936 images, not 2 and 3" in lines[3]
    whole = [Sample(tmp_path, i % 751, 1) for i in range(12936)]
    assert "train should" not in data.summary(dataset._replace(train=whole))
    assert "warning" not in data.summary(dataset._replace(name="folder"))


# Each case: where the tree lies below --data-root, and what the message says.
@pytest.mark.parametrize(
    "folder, says",
    [
        ("elsewhere/there", "is not under"),
        ("", "give --data-root the folder above it"),
        ("Market-1501-v15.09.15/Market-1501-v15.09.15", "one folder too deep"),
    ],
)
def test_a_folder_in_the_wrong_place(tmp_path, folder, says):
    market_tree(tmp_path / folder)
    with pytest.raises(FileNotFoundError, match=says) as error:
        data.load_dataset("market1501", tmp_path)
    assert "Market-1501-v15.09.15/{bounding_box_train,query,bounding_box_test}" in str(error.value)


def test_a_file_in_a_folders_place(tmp_path):
    market_tree(tmp_path / "market1501")
    (tmp_path / "market1501/query/0001_c1s1_001051_00.jpg").unlink()
    (tmp_path / "market1501/query/Thumbs.db").unlink()
    (tmp_path / "market1501/query").rmdir()
    (tmp_path / "market1501/query").touch()
    with pytest.raises(FileNotFoundError, match="is not under"):
        data.load_dataset("market1501", tmp_path)


def test_an_empty_subset_is_refused(tmp_path):
    market_tree(tmp_path / "market1501")
    (tmp_path / "market1501" / "query" / "0001_c1s1_001051_00.jpg").unlink()
    with pytest.raises(ValueError, match="no pictures of market1501's query"):
        data.load_dataset("market1501", tmp_path)


# ------------------------------------------------------------------------------------------- PK sampler


def pids_of(counts: dict[int, int], seed: int = 0) -> list[int]:
    pids = [pid for pid, count in counts.items() for _ in range(count)]
    random.Random(seed).shuffle(pids)
    return pids


def test_every_batch_is_16_identities_of_4_pictures():
    counts = {pid: 1 + pid % 11 for pid in range(40)}
    pids = pids_of(counts)
    sampler = PKSampler(pids)
    for batch in sampler:
        indices = [index for index, seed in batch]
        per_identity = Counter(pids[index] for index in indices)
        assert len(batch) == 64 and len(per_identity) == 16 and set(per_identity.values()) == {4}
        groups = [indices[start : start + 4] for start in range(0, 64, 4)]
        assert all(len({pids[index] for index in group}) == 1 for group in groups)


def test_pictures_repeat_only_where_an_identity_has_too_few():
    counts = {pid: (2, 4, 9)[pid % 3] for pid in range(60)}
    pids = pids_of(counts)
    seen = Counter(index for batch in PKSampler(pids) for index, _ in batch)
    for index, times in seen.items():
        assert counts[pids[index]] == 2 or times == 1


def test_an_epoch_has_the_length_of_the_fields_sampler():
    """RandomIdentitySampler: whole groups of 4 only, batches until fewer than 16 identities have one left."""
    equal = PKSampler(pids_of({pid: 10 for pid in range(32)}))  # two groups of each
    batches = list(equal)
    assert len(equal) == len(batches)
    assert 3 <= len(batches) <= 4
    left = Counter({pid: 2 for pid in range(32)})
    pids = pids_of({pid: 10 for pid in range(32)})
    for batch in batches:
        left -= Counter({pids[index]: 1 for index, _ in batch})
    assert len(left) < 16
    assert len(PKSampler(pids_of({pid: 7 for pid in range(16)}))) == 1  # 7 pictures are one group, 3 left out


def test_seed_and_epoch_decide_the_batches():
    pids = pids_of({pid: 8 for pid in range(30)})

    def epoch(seed, number):
        sampler = PKSampler(pids, seed=seed)
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
    filled = cached.dataset.is_cached
    assert filled.sum() == 160 == len(samples)
    monkeypatch.setattr(data, "read_picture", None)  # nothing is read any more
    second = [images for images, _ in cached]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_cache_that_does_not_fit_is_refused(tmp_path):
    samples = [Sample(tmp_path, 1, 1)] * 100_000_000
    with pytest.raises(ValueError, match=r"--cache needs 9830\.4 GB of shared memory"):
        data.AugmentedPictures(samples, (256, 128), cache=True)


def test_too_few_identities():
    with pytest.raises(ValueError, match=r"16 identities, the data has 15: use a smaller --batch-ids"):
        PKSampler(pids_of({pid: 4 for pid in range(15)}))


# ------------------------------------------------------------------------------- pictures and transforms


def test_read_picture_resizes_and_keeps_colour(tmp_path):
    Image.new("RGB", (64, 128), (200, 100, 50)).save(tmp_path / "plain.png")
    picture = data.read_picture(tmp_path / "plain.png", (256, 128))
    assert picture.shape == (3, 256, 128) and picture.dtype == torch.uint8
    assert picture.view(3, -1).float().mean(1).tolist() == [200, 100, 50]
    Image.new("L", (9, 5), 77).save(tmp_path / "grey.png")
    assert data.read_picture(tmp_path / "grey.png", (16, 8)).unique().tolist() == [77]


@pytest.mark.parametrize("content", [b"", b"not a picture", None])
def test_an_unreadable_picture_is_named(tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content is None:  # cut off in the middle
        Image.effect_noise((64, 128), 50).save(path)
        content = path.read_bytes()[:1000]
    path.write_bytes(content)
    with pytest.raises(OSError, match=r"cannot read the picture .*broken\.jpg") as error:
        data.read_picture(path, (256, 128))
    assert "\n" not in str(error.value)


def test_normalize_is_clips():
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    normalized = data.normalize(images)
    assert normalized.dtype == torch.float32
    for channel, (mean, std) in enumerate(
        zip((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    ):
        torch.testing.assert_close(normalized[:, channel], (images[:, channel] / 255 - mean) / std)


def test_augmentation_flips_crops_and_erases_as_often_as_it_should():
    torch.manual_seed(0)
    picture = torch.full((3, 64, 32), 255, dtype=torch.uint8)
    picture[:, :, :16] = 250
    transform = data.augmentation((64, 32))
    results = torch.stack([transform(picture) for _ in range(600)])
    assert results.shape == (600, 3, 64, 32) and results.dtype == torch.uint8
    erased = (results == torch.tensor([123, 117, 104]).view(3, 1, 1)).all(1)  # CLIP's mean colour
    share = erased.any((1, 2)).float().mean()
    assert 0.43 < share < 0.57
    area = erased.float().mean((1, 2))[erased.any((1, 2))]
    assert area.max() < 0.45 and area.mean() > 0.1
    padded = (results == 0).all(1).any((1, 2)).float().mean()
    assert padded > 0.8  # a shift of up to 10 pixels, by zeros
    column = results[:, 0].float()
    left_darker = [(row[:, :10][row[:, :10] > 200].mean() < row[:, -10:][row[:, -10:] > 200].mean()) for row in column]
    assert 0.4 < sum(map(float, left_darker)) / 600 < 0.6


# -------------------------------------------------------------------------------------------- demo data


def test_the_demo_is_drawn_once_and_alike(tmp_path, capsys):
    demo.draw_dataset(tmp_path / "a", data.MARKET_FOLDERS, train_ids=2, test_ids=1)
    demo.draw_dataset(tmp_path / "b", data.MARKET_FOLDERS, train_ids=2, test_ids=1)
    demo.draw_dataset(tmp_path / "c", data.MARKET_FOLDERS, train_ids=2, test_ids=1, seed=1)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    assert len(names) > 40
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_the_demo_has_every_part_of_market1501(demo_root):
    dataset = data.load_dataset("synthetic", demo_root)
    assert dataset.num_identities == 20 and len(dataset.train) == 160
    assert len(dataset.query) == 24 and {sample.camid for sample in dataset.query} == {1, 2, 3, 4}
    assert {sample.pid for sample in dataset.query} < {sample.pid for sample in dataset.gallery}
    assert sum(sample.pid == 0 for sample in dataset.gallery) > 0  # distractors
    for sample in dataset.query:
        with (
            Image.open(sample.path) as picture,
            Image.open(demo_root / f"synthetic/masks/{sample.path.stem}.png") as mask,
        ):
            assert picture.size == mask.size == (128, 256)
            assert 0.05 < (np.asarray(mask) > 0).mean() < 0.6
