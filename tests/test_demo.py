"""The demo: drawings, masks, captions, and the small CLIP pre-trained on them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clip
from demo import draw, tiny_clip


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


def test_drawings_depend_only_on_the_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw.draw_dataset(tmp_path / name, train_ids=2, test_ids=1, seed=seed)
    a, b, c = (contents_of(tmp_path / name) for name in "abc")
    assert a == b and a.keys() == c.keys() and not set(a.values()) & set(c.values())
    folders = [Path(name).parts[0] for name in a]
    assert [folders.count(x) for x in ("bounding_box_train", "query", "bounding_box_test", "masks")] == [16, 4, 4, 24]
    assert Image.open(next((tmp_path / "a" / "query").iterdir())).size == (64, 128)


def test_an_existing_dataset_is_kept_or_refused(tmp_path, capsys):
    """It is never replaced. A folder drawn by another version, or before there were versions, is an error."""
    record = tmp_path / "a" / "drawing.json"
    for _ in range(2):
        draw.draw_dataset(tmp_path / "a", train_ids=2, test_ids=1)
    assert capsys.readouterr().out.count("drawing the demo") == 1
    for make_old in (lambda: record.write_text('{"version": 1}'), record.unlink):
        make_old()
        with pytest.raises(ValueError, match="delete it"):
            draw.draw_dataset(tmp_path / "a", train_ids=2, test_ids=1)


RECORDED = [[134, 118, 127], [136, 121, 130], [128, 125, 125], [121, 130, 139]]
RECORDED += [[109, 120, 110], [110, 113, 106], [146, 115, 108], [91, 54, 37]]


def test_a_drawing_matches_its_recorded_colours():
    """Another version of Pillow changes these mean colours only by rounding. Another drawing needs a new VERSION."""
    image, _ = draw.draw_sample(draw.person_of(7), 1, draw.image_rng(7, 0))
    found = np.asarray(image.resize((2, 4), Image.Resampling.BOX)).reshape(-1, 3)
    assert np.abs(found.astype(int) - RECORDED).max() <= 2


def test_masks_match_the_person():
    """A person in a red top: the image is red in the top's mask, and not in the rest of the person's mask."""
    person = draw.person_of(3)._replace(pattern="plain", top=draw.CLOTHES["red"], hat=None)
    for number in range(6):
        image, mask = draw.draw_sample(person, 2, draw.image_rng(3, number))
        top = np.asarray(draw.draw_part(person, "top", 2, draw.image_rng(3, number))) > 128
        mask, image = np.asarray(mask) > 0, np.asarray(image).astype(int)
        red = (image[..., 0] > 120) & (image[..., 1] < 90) & (image[..., 2] < 90)
        assert top.any() and not (top & ~mask).any() and red[top].mean() > 0.9 > 0.1 > red[mask & ~top].mean()


def test_captions_name_up_to_two_things_that_the_person_wears():
    rng, counts = random.Random(0), set()
    for pid in range(200):
        person = draw.person_of(pid)
        text = tiny_clip.weak_caption(person, rng)
        words = text.removeprefix("A photo of a person").removeprefix(" with ").split(", ") if " with " in text else []
        assert set(words) <= set(draw.describe(person).values())
        assert ("a hat" in words) <= (person.hat is not None) and ("a bag" in words) <= (person.bag != "none")
        counts.add(len(words))
    assert counts == {0, 1, 2}


def test_pretraining_lowers_the_loss_and_writes_only_its_output(tmp_path, capsys):
    tracked = tiny_clip.WEIGHTS.read_bytes()
    with pytest.raises(SystemExit):  # --output has no default
        tiny_clip.main([])
    tiny_clip.main(f"--output {tmp_path / 'new.pt'} --images 96 --batch-size 32 --epochs 2".split())
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert losses[0] > losses[1]
    assert tiny_clip.WEIGHTS.read_bytes() == tracked and [path.name for path in tmp_path.iterdir()] == ["new.pt"]


def test_the_pretrained_clip_knows_some_words():
    model = tiny_clip.load()
    accuracies = tiny_clip.zero_shot(model, tiny_clip.Drawings(128, 1, "test"))
    assert accuracies["colour of the top"] > 0.3 and accuracies["person or empty place"] > 0.8  # chance: 0.08, 0.5
    known, unknown = clip.tokenize("red cathedral")[0, 1:3]
    words, others = model.token_embedding.weight, tiny_clip.load(seed=1).token_embedding.weight
    assert torch.equal(words[known], others[known]) and not torch.equal(words[unknown], others[unknown])
    with pytest.raises(ValueError, match="128x64"):
        tiny_clip.load((256, 128))
