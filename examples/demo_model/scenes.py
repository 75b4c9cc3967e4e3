"""What a picture can show: one to three things on a 3×3 grid over a soft background, and which of them are held out."""

import hashlib
import random
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "moon")
COLOURS = {
    "red": (214, 40, 48),
    "orange": (244, 132, 20),
    "yellow": (250, 208, 36),
    "green": (44, 160, 74),
    "blue": (28, 104, 220),
    "purple": (142, 52, 168),
    "pink": (244, 110, 172),
    "black": (44, 46, 54),
}
BACKGROUNDS = {
    "cream": (252, 236, 184),
    "rose": (248, 186, 190),
    "mint": (166, 228, 192),
    "sky": (150, 204, 252),
    "lavender": (204, 188, 250),
    "silver": (204, 206, 210),
}
PLACES = {
    "top left": (24, 24),
    "top": (64, 24),
    "top right": (104, 24),
    "left": (24, 64),
    "centre": (64, 64),
    "right": (104, 64),
    "bottom left": (24, 104),
    "bottom": (64, 104),
    "bottom right": (104, 104),
}
SIZES = {"small": 10.0, "large": 17.0}
PIXELS = 128
MOST_THINGS = 3
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Thing:
    """One shape of a scene. `place` or `size` is None where a caption leaves it open."""

    shape: str
    colour: str
    place: str | None
    size: str | None = None


@dataclass(frozen=True)
class Scene:
    """The things in a picture, in the order a caption names them; `background` is None where it is left open."""

    things: tuple[Thing, ...]
    background: str | None = None


def is_held_out(scene: Scene) -> bool:
    """Whether training never sees this combination of shapes, colours and places.

    Sizes, the background and the order do not count, so no rewording of a held-out scene can appear in training.
    """
    key = ";".join(sorted(f"{thing.shape} {thing.colour} {thing.place}" for thing in scene.things))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def sample_scene(rng: random.Random, *, held_out: bool = False) -> Scene:
    """Draw a full scene with one, two or three things in distinct places, from the training or the held-out side."""
    while True:
        count = rng.choices((1, 2, 3), weights=(3, 4, 5))[0]
        things = tuple(
            Thing(rng.choice(SHAPES), rng.choice(tuple(COLOURS)), place, rng.choice(tuple(SIZES)))
            for place in rng.sample(tuple(PLACES), count)
        )
        scene = Scene(things, rng.choice(tuple(BACKGROUNDS)))
        if is_held_out(scene) == held_out:
            return scene


def place_on_canvas(scene: Scene, rng: random.Random) -> tuple[list[list[float]], int]:
    """Give a full scene its pixels: `MOST_THINGS` rows (present, shape, colour, x, y, radius) and a background index.

    Positions move by up to 2 pixels and radii by up to 6%, so that a caption has many pictures.
    """
    rows = [[0.0, 0.0, 0.0, 0.0, 0.0, 1.0] for _ in range(MOST_THINGS)]
    for row, thing in zip(rows, scene.things, strict=False):
        assert thing.place is not None
        assert thing.size is not None
        x, y = PLACES[thing.place]
        row[:] = [
            1.0,
            float(SHAPES.index(thing.shape)),
            float(tuple(COLOURS).index(thing.colour)),
            x + rng.uniform(-2, 2),
            y + rng.uniform(-2, 2),
            SIZES[thing.size] * rng.uniform(0.94, 1.06),
        ]
    assert scene.background is not None
    return rows, tuple(BACKGROUNDS).index(scene.background)
