"""The curves of a training run as a picture."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from util.run import writing

COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189))


def draw_curves(log: list[dict], path: Path) -> None:
    """The training curves, a PNG of 1200 x 420: loss terms, and mAP and Rank-1, over the epochs of a run's log."""
    panels = {
        "loss terms (Eq. 10)": {"loss": "loss", "triplet": "loss_triplet", "ID": "loss_id", "SupCon": "loss_supcon"},
        "score on the test split, %": {"mAP": "mAP", "Rank-1": "rank1"},
    }
    picture = Image.new("RGB", (2400, 840), "white")  # drawn at twice the size: lines come out smooth
    for panel, (title, keys) in enumerate(panels.items()):
        scale = 100 if "%" in title else 1
        curves = {
            name: [(line["epoch"], scale * line[key]) for line in log if key in line] for name, key in keys.items()
        }
        if any(curves.values()):
            draw_panel(ImageDraw.Draw(picture), 1200 * panel, title, curves)
    with writing(path) as unfinished:
        picture.resize((1200, 420), Image.Resampling.LANCZOS).save(unfinished)


def draw_panel(draw: ImageDraw.ImageDraw, left: int, title: str, curves: dict[str, list[tuple[int, float]]]) -> None:
    """One pair of axes from 0, 1200 x 840, with named curves of (epoch, value)."""
    font = ImageFont.load_default(30)
    x0, x1, y0, y1 = left + 130, left + 1160, 730, 90
    x_ticks, y_ticks = (
        round_ticks(max(axis)) for axis in zip(*(point for curve in curves.values() for point in curve))
    )

    def at(epoch: float, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * epoch / x_ticks[-1], y0 + (y1 - y0) * value / y_ticks[-1]

    draw.text((x0, 40), title, "black", font, anchor="lm")
    draw.text((x1, 810), "epoch", "black", font, anchor="rm")
    for tick in y_ticks:
        draw.line([at(0, tick), at(x_ticks[-1], tick)], (225, 225, 225), 2)
        draw.text((x0 - 16, at(0, tick)[1]), f"{tick:g}", "black", font, anchor="rm")
    for tick in x_ticks:
        draw.text((at(tick, 0)[0], y0 + 34), f"{tick:g}", "black", font, anchor="mm")
    draw.line([at(0, y_ticks[-1]), at(0, 0), at(x_ticks[-1], 0)], "black", 3)
    for number, (name, curve) in enumerate(curves.items()):
        draw.line([at(*point) for point in curve], COLOURS[number], 5, joint="curve")
        for x, y in (at(*point) for point in curve):
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], COLOURS[number])
        x, y = x1 - 180 * (len(curves) - number) + 60, 40
        draw.line([(x - 60, y), (x - 15, y)], COLOURS[number], 8)
        draw.text((x, y), name, "black", font, anchor="lm")


def round_ticks(greatest: float) -> list[float]:
    """Four to eight round numbers from 0 to at least `greatest`."""
    greatest = greatest or 1
    step = 10 ** math.floor(math.log10(greatest / 2))
    step *= next(factor for factor in (0.5, 1, 2, 5) if greatest / (step * factor) <= 7)
    return [step * i for i in range(math.ceil(greatest / step) + 1)]
