"""Curves of a training run, drawn with Pillow."""

import math
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from util.checkpoint import atomic_write

COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (140, 86, 75))
Curve = list[tuple[int, float]]  # (epoch, value)


def draw_curves(log: list[dict], path: Path) -> None:
    """Draw the loss terms, mAP and Rank-1 of a run over its epochs, as a PNG of 1200 x 420 pixels."""
    terms = [key for key in log[-1] if key.startswith("loss")]
    panels = {
        "loss terms (Eq. 10)": {term.removeprefix("loss_"): read_curve(log, term) for term in terms},
        "evaluation on the test split, %": {
            "mAP": read_curve(log, "mAP", scale=100),
            "Rank-1": read_curve(log, "rank1", scale=100),
        },
    }
    image = Image.new("RGB", (2400, 840), "white")  # drawn at twice the size, for smooth lines
    for panel, (title, curves) in enumerate(panels.items()):
        if any(curves.values()):
            draw_panel(ImageDraw.Draw(image), 1200 * panel, title, curves)
    with atomic_write(path) as temporary:
        image.resize((1200, 420), Image.Resampling.LANCZOS).save(temporary)


def read_curve(log: list[dict], key: str, scale: float = 1) -> Curve:
    return [(record["epoch"], scale * record[key]) for record in log if key in record]


def draw_panel(draw: ImageDraw.ImageDraw, left: int, title: str, curves: dict[str, Curve]) -> None:
    """Draw named curves in axes that start at 0, in a panel of 1200 x 840 pixels."""
    font = ImageFont.load_default(30)
    x0, x1, y0, y1 = left + 130, left + 1160, 730, 90
    points = [point for curve in curves.values() for point in curve]
    x_ticks, y_ticks = (round_ticks(max(axis)) for axis in zip(*points))

    def at(epoch: float, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * epoch / x_ticks[-1], y0 + (y1 - y0) * value / y_ticks[-1]

    draw.text((x0, 30), title, "black", font, anchor="lm")
    draw.text((x1, 810), "epoch", "black", font, anchor="rm")
    for tick in y_ticks:
        draw.line([at(0, tick), at(x_ticks[-1], tick)], (225, 225, 225), 2)
        draw.text((x0 - 16, at(0, tick)[1]), f"{tick:g}", "black", font, anchor="rm")
    for tick in x_ticks:
        draw.text((at(tick, 0)[0], y0 + 34), f"{tick:g}", "black", font, anchor="mm")
    draw.line([at(0, y_ticks[-1]), at(0, 0), at(x_ticks[-1], 0)], "black", 3)
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        draw.line([at(*point) for point in curve], colour, 5, joint="curve")
        for x, y in (at(*point) for point in curve):
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], colour)
        x, y = x0 + 170 * number, 66  # the legend
        draw.line([(x, y), (x + 45, y)], colour, 8)
        draw.text((x + 55, y), name, "black", font, anchor="lm")


def round_ticks(greatest: float) -> list[float]:
    """Return four to eight round numbers, from 0 to at least `greatest`."""
    greatest = greatest or 1
    step = 10 ** math.floor(math.log10(greatest / 2))
    step *= next(factor for factor in (0.5, 1, 2, 5) if greatest / (step * factor) <= 7)
    return [step * i for i in range(math.ceil(greatest / step) + 1)]
