"""The demo's dataset: people drawn with Pillow, with masks and captions, deterministic from a seed.

An identity has clothes, colours, a pattern, a build, perhaps a hat and a bag. A camera has a background, a light and a
distance. Each image has its own pose, position, occlusion and noise.
"""

import json
import math
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from util.device import show_progress

CLOTHES = {
    "white": (225, 222, 214), "black": (38, 38, 44), "grey": (128, 130, 134), "red": (180, 44, 48),
    "blue": (48, 84, 168), "green": (44, 126, 70), "yellow": (222, 190, 50), "brown": (104, 66, 40),
    "orange": (230, 120, 40), "pink": (226, 130, 170), "purple": (110, 62, 140), "turquoise": (60, 176, 180),
}  # fmt: skip
COLOURS = {rgb: name for name, rgb in CLOTHES.items()}
SKIN = ((244, 208, 178), (214, 164, 124), (156, 106, 74), (96, 64, 46))
HAIR = ((34, 28, 26), (92, 60, 36), (186, 148, 88), (150, 148, 146))
CAMERAS = 4  # of the dataset
VERSION = 2  # of the dataset; increase it when the drawings or the defaults of draw_dataset change


class Person(NamedTuple):
    """An identity. Each attribute has few values, so that some identities look almost the same."""

    skin: tuple
    hair: tuple
    long_hair: bool
    hat: tuple | None
    top: tuple
    pattern: str
    pattern_colour: tuple
    long_sleeves: bool
    bottom: tuple
    legwear: str
    shoes: tuple
    bag: str
    bag_colour: tuple
    build: float


def random_person(rng: random.Random) -> Person:
    def colour() -> tuple:
        return rng.choice(list(CLOTHES.values()))

    return Person(
        skin=rng.choice(SKIN),
        hair=rng.choice(HAIR),
        long_hair=rng.random() < 0.4,
        hat=colour() if rng.random() < 0.3 else None,
        top=colour(),
        pattern=rng.choice(("plain", "plain", "stripes", "bars", "checks", "dots")),
        pattern_colour=colour(),
        long_sleeves=rng.random() < 0.6,
        bottom=colour(),
        legwear=rng.choice(("trousers", "trousers", "shorts", "skirt")),
        shoes=colour(),
        bag=rng.choice(("none", "none", "backpack", "shoulder bag")),
        bag_colour=colour(),
        build=rng.uniform(0.85, 1.2),
    )


def person_of(pid: int, seed: int = 0) -> Person:
    """Return the person that `draw_dataset` draws for an identity."""
    return random_person(random.Random(f"{seed} person {pid}"))


def image_rng(pid: int, number: int, seed: int = 0) -> random.Random:
    """Return the random generator that `draw_dataset` uses for an image of an identity."""
    return random.Random(f"{seed} picture {pid} {number}")


def describe(person: Person) -> dict[str, str]:
    """Name what a person wears: "top", "legs", and "hat" and "bag" if there is one."""
    words = {"top": f"{COLOURS[person.top]} top", "legs": f"{COLOURS[person.bottom]} {person.legwear}"}
    if person.hat:
        words["hat"] = "a hat"
    if person.bag != "none":
        words["bag"] = "a bag"
    return words


def caption(*words: str) -> str:
    """Return a caption, for example "A photo of a person with red top, a bag"."""
    return "A photo of a person" + (" with " + ", ".join(words) if words else "")


def draw_person(person: Person, rng: random.Random) -> Image.Image:
    """Draw a walking person in a random pose on a transparent background: RGBA, 256x512 (width x height)."""
    image = Image.new("RGBA", (256, 512))
    draw = ImageDraw.Draw(image)
    stride, swing, width = rng.uniform(-0.3, 0.3), rng.uniform(-0.35, 0.35), 46 * person.build
    shoulder, hip = 118, 272

    def limb(x: float, y: float, angle: float, length: float, thickness: float, colour: tuple) -> tuple[float, float]:
        end = x + length * math.sin(angle), y + length * math.cos(angle)
        draw.line([(x, y), end], fill=colour, width=round(thickness))
        for px, py in ((x, y), end):
            r = thickness / 2
            draw.ellipse([px - r, py - r, px + r, py + r], fill=colour)
        return end

    def arm(side: int) -> None:
        sleeve = person.top if person.long_sleeves else person.skin
        x = 128 + side * (width - 6)
        elbow = limb(x, shoulder + 14, side * (swing + 0.12), 74, 25 * person.build, person.top)
        hand = limb(*elbow, side * (swing * 1.3 + 0.05), 66, 21 * person.build, sleeve)
        draw.ellipse([hand[0] - 12, hand[1] - 6, hand[0] + 12, hand[1] + 18], fill=person.skin)

    if person.bag == "backpack":
        draw.rounded_rectangle([128 - width - 16, shoulder - 4, 128 + width + 16, 226], 22, fill=person.bag_colour)
    arm(-1)
    for side in (-1, 1):
        shin_colour = person.bottom if person.legwear == "trousers" else person.skin
        knee = limb(128 + side * 21, hip, side * stride, 96, 40 * person.build, person.bottom)
        thickness = (34 if person.legwear == "trousers" else 26) * person.build
        foot = limb(*knee, side * stride * 0.5, 92, thickness, shin_colour)
        draw.rounded_rectangle([foot[0] - 22, foot[1] - 4, foot[0] + 24, foot[1] + 22], 9, fill=person.shoes)
    if person.legwear == "skirt":
        draw.polygon([(128 - width, hip - 20), (128 + width, hip - 20), (190, 366), (66, 366)], fill=person.bottom)
    draw.rounded_rectangle([128 - width, shoulder - 10, 128 + width, hip + 18], 26, fill=person.top)
    draw_pattern(draw, person, [128 - width + 6, shoulder, 128 + width - 6, hip + 10])
    arm(1)
    if person.bag == "shoulder bag":
        draw.line([(128 - width + 10, shoulder), (128 + width, hip)], fill=person.bag_colour, width=8)
        draw.rounded_rectangle([128 + width - 30, hip - 20, 128 + width + 22, hip + 40], 8, fill=person.bag_colour)
    if person.long_hair:
        draw.rounded_rectangle([92, 34, 164, 134], 24, fill=person.hair)
    draw.rectangle([114, 86, 142, 112], fill=person.skin)
    draw.ellipse([98, 26, 158, 102], fill=person.skin)
    draw.pieslice([94, 18, 162, 96], 180, 360, fill=person.hair)
    if person.hat:
        draw.pieslice([90, 8, 166, 92], 180, 360, fill=person.hat)
        draw.rounded_rectangle([84, 44, 172, 56], 6, fill=person.hat)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def draw_pattern(draw: ImageDraw.ImageDraw, person: Person, box: list[float]) -> None:
    """Draw the pattern of a person's top inside a box (left, top, right, bottom)."""
    left, top, right, bottom = map(round, box)
    if person.pattern in ("stripes", "checks"):
        for y in range(top + 8, bottom - 8, 32):
            draw.rectangle([left, y, right, y + 13], fill=person.pattern_colour)
    if person.pattern in ("bars", "checks"):
        for x in range(left + 6, right - 8, 26):
            draw.rectangle([x, top, x + 9, bottom], fill=person.pattern_colour)
    if person.pattern == "dots":
        for row, y in enumerate(range(top + 12, bottom - 8, 24)):
            for x in range(left + 8 + 12 * (row % 2), right - 6, 24):
                draw.ellipse([x - 6, y - 6, x + 6, y + 6], fill=person.pattern_colour)


def draw_background(camera: int, rng: random.Random) -> Image.Image:
    """Draw the background of a camera, slightly different each time: RGB, 256x512."""
    place = random.Random(f"camera {camera}")

    def tone(low: int, high: int) -> tuple[int, int, int]:
        grey = place.randint(low, high)
        return tuple(grey + place.randint(-16, 16) for _ in range(3))

    image = Image.new("RGB", (256, 512), tone(110, 220))
    draw = ImageDraw.Draw(image)
    shift, horizon, clutter = rng.randint(-40, 40), place.randint(230, 360) + rng.randint(-15, 15), tone(60, 200)
    step = place.choice((38, 54, 76))
    for x in range(-step * 3, 256 + step * 3, step):  # a wall of slabs, windows or railings
        draw.rectangle([x + shift, place.randint(0, 120), x + shift + step // 2, horizon], fill=clutter)
    draw.rectangle([0, horizon, 256, 512], fill=tone(70, 190))
    for y in range(horizon + 14, 512, place.choice((26, 40, 60))):
        draw.line([(0, y), (256, y + shift // 4)], fill=tone(60, 180), width=4)
    for _ in range(rng.randint(0, 2)):  # objects that stand there only in this image
        x, w, h = rng.randint(-40, 230), rng.randint(24, 80), rng.randint(60, 220)
        draw.rounded_rectangle([x, horizon + 40 - h, x + w, horizon + 40], 8, fill=tone(50, 200))
    return image


def draw_scene(person: Person | None, camera: int, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """Draw a background, a person (or nobody) and perhaps an occlusion, before the camera's effects.

    Return the scene, RGB, and the visible part of the person on a transparent background, RGBA; both are 256x512.
    """
    distance = camera_view(camera)[2]
    image, visible = draw_background(camera, rng), Image.new("RGBA", (256, 512))
    if person:
        scale = distance * rng.uniform(0.95, 1.05)
        figure = draw_person(person, rng).resize((round(256 * scale), round(512 * scale)), Image.Resampling.BILINEAR)
        x = (256 - figure.width) // 2 + rng.randint(-16, 16)
        y = (512 - figure.height) // 2 + rng.randint(-14, 14)
        visible.paste(figure, (x, y))
        image.paste(visible, mask=visible)
    if rng.random() < 0.2:  # occlusion: a post, or a box at the bottom
        if rng.random() < 0.5:
            left = rng.randint(20, 200)
            box = [left, 0, left + rng.randint(16, 40), 512]
        else:
            left = rng.randint(-60, 120)
            box = [left, rng.randint(300, 420), left + rng.randint(90, 200), 512]
        ImageDraw.Draw(image).rectangle(box, fill=rng.choice(list(CLOTHES.values())))
        ImageDraw.Draw(visible).rectangle(box, fill=(0, 0, 0, 0))
    return image, visible


def camera_view(camera: int) -> tuple[list[float], float, float]:
    """Return a camera's colour gains, its brightness, and the scale of people in its images."""
    view = random.Random(f"view {camera}")
    return [view.uniform(0.94, 1.06) for _ in range(3)], view.uniform(0.85, 1.05), view.uniform(0.86, 0.98)


def draw_sample(person: Person | None, camera: int, rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """Draw an image of a person (or nobody) by a camera, RGB, and the mask of the visible person, L (0 or 255).

    Both are 128x256.
    """
    image, visible = draw_scene(person, camera, rng)
    gains, light, _ = camera_view(camera)
    exposure = light * rng.uniform(0.9, 1.1)
    tables = [min(255, round(value * gain * exposure)) for gain in gains for value in range(256)]
    image = image.point(tables).resize((128, 256), Image.Resampling.BOX)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(1, 7), (256, 128, 3))
    image = Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))
    return image, visible.getchannel("A").resize((128, 256), Image.Resampling.NEAREST)


PARTS = {"top": ("top", "pattern_colour"), "legs": ("bottom",), "hat": ("hat",), "bag": ("bag_colour",)}


def draw_part(person: Person, part: str, camera: int, rng: random.Random) -> Image.Image:
    """Draw the mask of one of PARTS: L, 128x256.

    It fits the image that `draw_sample` draws with a generator in the same state: the scene is drawn again, with this
    part white and the rest of the person black.
    """
    names = ("skin", "hair", "hat", "top", "pattern_colour", "bottom", "shoes", "bag_colour")
    colours = {name: (255,) * 3 if name in PARTS[part] else (0,) * 3 for name in names if getattr(person, name)}
    _, visible = draw_scene(person._replace(**colours), camera, rng)
    mask = Image.new("L", visible.size)
    mask.paste(visible.convert("L"), mask=visible)
    return mask.resize((128, 256), Image.Resampling.NEAREST)


def draw_dataset(folder: Path, train_ids: int = 128, test_ids: int = 128, images: int = 8, seed: int = 0) -> None:
    """Draw the demo's dataset in Market-1501's layout, and the masks in `masks`, unless the folder exists.

    Images and masks are saved at 64x128 (width x height), the size that the demo's CLIP reads. Each identity has
    `images` images, spread over four cameras. For a test identity, the first image of each camera is a query. One sixth
    of the gallery are distractors (identity 0).

    Raises ValueError if the folder exists but was not drawn by this VERSION.
    """
    record = folder / "drawing.json"
    if folder.exists():
        if not record.is_file() or json.loads(record.read_text())["version"] != VERSION:
            raise ValueError(f"{folder} was drawn by another version of demo/draw.py: delete it to draw it again")
        return
    print(f"drawing the demo's dataset in {folder}: {train_ids} + {test_ids} identities, {images} images each")
    folder.parent.mkdir(parents=True, exist_ok=True)
    distractors = test_ids * (images - CAMERAS) // 5
    total = (train_ids + test_ids) * images + distractors
    drawn = 0
    # Drawn in a temporary folder, which is renamed when it is complete.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="drawing-") as temporary:
        unfinished = Path(temporary) / folder.name
        for subfolder in ("bounding_box_train", "query", "bounding_box_test", "masks"):
            (unfinished / subfolder).mkdir(parents=True)

        def save(pid: int, number: int, person: Person, subfolder: str) -> None:
            nonlocal drawn
            camera = number % CAMERAS + 1
            image, mask = draw_sample(person, camera, image_rng(pid, number, seed))
            image, mask = image.reduce(2), mask.resize((64, 128), Image.Resampling.NEAREST)
            name = f"{pid:04d}_c{camera}s1_{number:06d}_00"
            image.save(unfinished / subfolder / f"{name}.jpg", quality=90)
            mask.save(unfinished / "masks" / f"{name}.png")
            drawn += 1
            show_progress(drawn, total, "drawings")

        for pid in range(1, train_ids + test_ids + 1):
            person = person_of(pid, seed)
            for number in range(images):
                test_subset = "query" if number < CAMERAS else "bounding_box_test"
                save(pid, number, person, "bounding_box_train" if pid <= train_ids else test_subset)
        for number in range(distractors):
            save(0, number, random_person(random.Random(f"{seed} distractor {number}")), "bounding_box_test")
        settings = {"train_ids": train_ids, "test_ids": test_ids, "images": images, "seed": seed}
        (unfinished / record.name).write_text(json.dumps({"version": VERSION, **settings}))
        if not folder.exists():  # another process may have drawn it at the same time
            unfinished.rename(folder)
