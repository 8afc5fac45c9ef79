"""The curves of a run."""

import numpy as np
from PIL import Image

from util.curves import draw_curves


def test_every_loss_term_and_evaluation_has_a_curve(tmp_path):
    """Each one changes the image. One epoch can be drawn, too."""

    def draw(epochs: int, terms: int, **evaluation: float) -> bytes:
        losses = [{"epoch": n} | {f"loss_{term}": term / n for term in range(terms)} for n in range(1, epochs + 1)]
        draw_curves([losses[0] | evaluation, *losses[1:]], tmp_path / "curves.png")
        return np.asarray(Image.open(tmp_path / "curves.png")).tobytes()

    assert len({draw(1, 5), draw(2, 5), draw(2, 6), draw(2, 8), draw(2, 8, mAP=0.2, rank1=0.3)}) == 5
