"""The curves of a run."""

import numpy as np
from PIL import Image

from util.curves import draw_curves


def test_every_loss_term_and_evaluation_has_a_curve(tmp_path):
    """Each one changes the image. One epoch and a loss of 0 can be drawn, too."""

    def draw(log: list[dict]) -> np.ndarray:
        draw_curves(log, tmp_path / "curves.png")
        return np.asarray(Image.open(tmp_path / "curves.png"))

    def log_of(terms: int, **evaluation: float) -> list[dict]:
        log = [{"epoch": epoch} | {f"loss_{term}": term / epoch for term in range(terms)} for epoch in (1, 2)]
        return [{**log[0], **evaluation}, log[1]]

    images = [
        draw(log_of(5)[:1]),
        *(draw(log_of(terms)) for terms in (1, 5, 6, 8)),
        draw(log_of(8, mAP=0.2, rank1=0.3)),
    ]
    assert all(image.shape == (420, 1200, 3) and image.min() < 100 for image in images)
    assert all((one != other).any() for one, other in zip(images, images[1:]))
