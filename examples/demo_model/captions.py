"""Scenes as English and back: varied wording out, one parser in."""

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from .scenes import BACKGROUNDS, COLOURS, SHAPES, Scene, Thing

SHAPE_WORDS = {shape: (shape,) for shape in SHAPES} | {"circle": ("circle", "disc"), "moon": ("moon", "crescent moon")}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
PLACE_WORDS = {
    "top left": ("in the top left corner", "at the top left", "in the upper left corner"),
    "top": ("at the top", "at the top in the middle", "at the top centre"),
    "top right": ("in the top right corner", "at the top right", "in the upper right corner"),
    "left": ("on the left", "at the left edge", "on the left side"),
    "centre": ("in the centre", "in the center", "in the middle"),
    "right": ("on the right", "at the right edge", "on the right side"),
    "bottom left": ("in the bottom left corner", "at the bottom left", "in the lower left corner"),
    "bottom": ("at the bottom", "at the bottom in the middle", "at the bottom centre"),
    "bottom right": ("in the bottom right corner", "at the bottom right", "in the lower right corner"),
}
OPENERS = ("a picture of ", "an image of ", "a drawing of ", "a scene with ", "there is ", "draw ")
BEFORE = ("on a {} background, ", "{} background, ", "on {}, ")
AFTER = (" on a {} background", " over a {} background", ", {} background", " on {}")
JOINTS = (", ", ", ", "; ", " and ")


@dataclass(frozen=True)
class Prompt:
    """A caption and what a picture of it must show (None where the caption leaves it open)."""

    text: str
    scene: Scene


def vocabulary() -> list[str]:
    """Every lower-case word a caption can contain, sorted."""
    groups = [*SHAPE_WORDS.values(), *SIZE_WORDS.values(), *PLACE_WORDS.values(), OPENERS, BEFORE, AFTER, JOINTS]
    texts = [text for group in groups for text in group] + [*COLOURS, *BACKGROUNDS, "a", "an", "one", "and"]
    return sorted({word for text in texts for word in re.findall("[a-z]+", text)})


def write_caption(scene: Scene, rng: random.Random) -> Prompt:
    """Word a full scene. Sizes and background are named about half of the time, places nine times in ten."""
    with_size, with_place = rng.random() < 0.6, rng.random() < 0.9
    background = scene.background if rng.random() < 0.5 else None
    said = tuple(
        replace(t, size=t.size if with_size else None, place=t.place if with_place else None) for t in scene.things
    )
    place_first = with_place and rng.random() < 0.2
    parts = [_word_thing(thing, rng, place_first=place_first) for thing in said]
    text = parts[0] if len(parts) == 1 else rng.choice(JOINTS).join(parts[:-1]) + rng.choice((" and ", ", ", " and "))
    text += parts[-1] if len(parts) > 1 else ""
    if background is not None and rng.random() < 0.3:
        text = rng.choice(BEFORE).format(background) + text
    else:
        if not place_first and rng.random() < 0.4:
            text = rng.choice(OPENERS) + text
        if background is not None:
            text += rng.choice(AFTER).format(background)
    if rng.random() < 0.4:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.3:
        text += "."
    return Prompt(text, Scene(said, background))


def parse_caption(text: str) -> Scene:
    """Read a caption of this grammar: things and places pair up in the order they come.

    Raises ValueError where the caption names nothing, or names a different number of places than of things.
    """
    lowered = text.lower()
    found = list(_THING.finditer(lowered))
    places = [_PLACE_OF[match] for match in _PLACE.findall(lowered)]
    if not found or len(places) not in (0, len(found)):
        raise ValueError(
            f"{text!r} names {len(found)} things and {len(places)} places; name at least one thing, "
            "and a place for each of them or for none"
        )
    places_or_open: list[str | None] = [*places] or [None] * len(found)
    things = tuple(
        Thing(_SHAPE_OF[match["shape"]], match["colour"], place, _SIZE_OF.get(match["size"] or ""))
        for match, place in zip(found, places_or_open, strict=True)
    )
    background = re.search(rf"\b({'|'.join(BACKGROUNDS)})\b", lowered)
    return Scene(things, background[1] if background else None)


def _word_thing(thing: Thing, rng: random.Random, *, place_first: bool) -> str:
    words = f"{thing.colour} {rng.choice(SHAPE_WORDS[thing.shape])}"
    if thing.size is not None:
        words = f"{rng.choice(SIZE_WORDS[thing.size])} {words}"
    words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    if thing.place is None:
        return words
    place = rng.choice(PLACE_WORDS[thing.place])
    return f"{place} {words}" if place_first else f"{words} {place}"


def _inverse(words: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    return {word: key for key, group in words.items() for word in group}


def _any_of(words: dict[str, str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


_SHAPE_OF, _SIZE_OF, _PLACE_OF = _inverse(SHAPE_WORDS), _inverse(SIZE_WORDS), _inverse(PLACE_WORDS)
_THING = re.compile(
    rf"\b(?:(?P<size>{_any_of(_SIZE_OF)}) )?(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{_any_of(_SHAPE_OF)})\b"
)
_PLACE = re.compile(rf"\b({_any_of(_PLACE_OF)})\b")
