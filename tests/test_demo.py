"""The demo: drawings, masks, captions, and the small CLIP pre-trained on them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from demo import draw, tiny_clip


def test_drawings_depend_only_on_the_seed(tmp_path):
    drawings = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw.draw_dataset(tmp_path / name, train_ids=2, test_ids=1, seed=seed)
        files = (tmp_path / name).rglob("*.*")
        drawings.append({str(path.relative_to(tmp_path / name)): path.read_bytes() for path in files})
    a, b, c = drawings
    assert a == b and a.keys() == c.keys() and not set(a.values()) & set(c.values())
    folders = [Path(name).parts[0] for name in a]
    assert [folders.count(x) for x in ("bounding_box_train", "query", "bounding_box_test", "masks")] == [16, 4, 4, 24]
    assert Image.open(next((tmp_path / "a" / "query").iterdir())).size == (64, 128)


def test_a_dataset_of_another_version_is_refused_and_not_replaced(tmp_path, capsys):
    for _ in range(2):
        draw.draw_dataset(tmp_path / "a", train_ids=2, test_ids=1)
    assert capsys.readouterr().out.count("drawing the demo") == 1
    (tmp_path / "a" / "drawing.json").write_text('{"version": 1}')
    with pytest.raises(ValueError, match="delete it"):
        draw.draw_dataset(tmp_path / "a", train_ids=2, test_ids=1)


def test_masks_match_the_person():
    """A person in a red top: the image is red in the top's mask, and not in the rest of the person's mask."""
    person = draw.person_of(3)._replace(pattern="plain", top=draw.CLOTHES["red"], hat=None)
    for number in range(6):
        image, mask = draw.draw_sample(person, 2, draw.image_rng(3, number))
        top = np.asarray(draw.draw_part(person, "top", 2, draw.image_rng(3, number))) > 128
        mask, image = np.asarray(mask) > 0, np.asarray(image).astype(int)
        red = (image[..., 0] > 120) & (image[..., 1] < 90) & (image[..., 2] < 90)
        assert top.any() and not (top & ~mask).any() and red[top].mean() > 0.9 > 0.1 > red[mask & ~top].mean()


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
    with pytest.raises(ValueError, match="128x64"):
        tiny_clip.load((256, 128))
