"""Reads shape, colour, size and place back from a picture: thresholds, connected components and overlap, no network."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab

from .render import signed_distance
from .scenes import BACKGROUNDS, COLOURS, PIXELS, PLACES, SHAPES, SIZES, Scene, Thing

FOREGROUND = 20.0
SMALLEST_SPECK = 20
LEAST_OVERLAP = 0.70
FARTHEST_COLOUR = 32.0
FARTHEST_BACKGROUND = 12.0
FARTHEST_PLACE = 10.0

Picture = Image.Image | np.ndarray


@dataclass(frozen=True)
class Reading:
    """What a picture shows. `scene` is None where something in it is no thing that we know; `why` says what."""

    scene: Scene | None
    why: str = ""


def read_scene(image: Picture) -> Reading:
    """Read a 128×128 RGB picture (PIL, or an array (128, 128, 3) of bytes or of floats in [0, 1]).

    The background is a vertical gradient through the border; what differs from it by more than a CIELAB distance of
    20 and hangs together is a thing. Its shape is the one whose outline, fitted to its box, overlaps it best; an
    overlap (intersection over union) under 0.7, a colour or a place far from all we know makes the picture unreadable.
    """
    lab = rgb2lab(_as_floats(image))
    backdrop = _backdrop(lab)
    background = _nearest(backdrop.mean(0), _BACKGROUND_LAB, FARTHEST_BACKGROUND)
    distance = np.linalg.norm(lab - backdrop[:, None], axis=-1)
    labels = ndimage.label(distance > FOREGROUND)[0]
    things = []
    for index, box in enumerate(ndimage.find_objects(labels), start=1):
        mask = labels == index
        if mask.sum() < SMALLEST_SPECK:
            continue
        thing, why = _read_thing(mask, box, lab)
        if thing is None:
            return Reading(None, why)
        things.append(thing)
    if background is None:
        return Reading(None, "unknown background")
    return Reading(Scene(tuple(things), background))


def _read_thing(mask: np.ndarray, box: tuple[slice, slice], lab: np.ndarray) -> tuple[Thing | None, str]:
    # The rim is mixed with the background and the upper left has a shine: the median of the inside is neither.
    inside = ndimage.binary_erosion(mask)
    colour = _nearest(np.median(lab[inside if inside.any() else mask], axis=0), _COLOUR_LAB, FARTHEST_COLOUR)
    fits = [_fit(shape, mask, box) for shape in SHAPES]
    overlap, shape, x, y, radius = max(fits)
    if colour is None or overlap < LEAST_OVERLAP:
        return None, f"a {colour or 'strangely coloured'} {shape} at {x:.0f}, {y:.0f} that overlaps by {overlap:.2f}"
    place = min(PLACES, key=lambda name: (PLACES[name][0] - x) ** 2 + (PLACES[name][1] - y) ** 2)
    if max(abs(PLACES[place][0] - x), abs(PLACES[place][1] - y)) > FARTHEST_PLACE:
        return None, f"a {colour} {shape} between places, at {x:.0f}, {y:.0f}"
    size = min(SIZES, key=lambda name: abs(np.log(SIZES[name] / radius)))
    return Thing(shape, colour, place, size), ""


def _fit(shape: str, mask: np.ndarray, box: tuple[slice, slice]) -> tuple[float, str, float, float, float]:
    """Overlap of the mask with the shape fitted to its box, and that shape's centre and radius."""
    rows, columns = box
    low_x, high_x, low_y, high_y = _UNIT_BOX[shape]
    radius = ((columns.stop - columns.start) / (high_x - low_x) + (rows.stop - rows.start) / (high_y - low_y)) / 2
    x = (columns.start + columns.stop) / 2 - radius * (low_x + high_x) / 2
    y = (rows.start + rows.stop) / 2 - radius * (low_y + high_y) / 2
    # No fitted outline leaves the box by more than a pixel or two, so nothing farther out need be drawn.
    window = tuple(slice(max(0, side.start - 4), side.stop + 4) for side in box)
    grid_y, grid_x = torch.meshgrid(_CENTRES[window[0]], _CENTRES[window[1]], indexing="ij")
    drawn = (signed_distance(shape, (grid_x - x) / radius, (grid_y - y) / radius) < 0).numpy()
    seen = mask[window]
    return float((drawn & seen).sum() / (drawn | seen).sum()), shape, x, y, radius


def _backdrop(lab: np.ndarray) -> np.ndarray:
    """CIELAB of the background in every row: a line through the left and right borders' medians."""
    borders = np.median(np.concatenate([lab[:, :3], lab[:, -3:]], axis=1), axis=1)
    rows = np.arange(len(lab))
    return np.stack([np.polyval(np.polyfit(rows, channel, 1), rows) for channel in borders.T], axis=1)


def _nearest(colour: np.ndarray, palette: dict[str, np.ndarray], farthest: float) -> str | None:
    name = min(palette, key=lambda key: float(np.linalg.norm(palette[key] - colour)))
    return name if np.linalg.norm(palette[name] - colour) <= farthest else None


def _as_floats(image: Picture) -> np.ndarray:
    pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if pixels.shape != (PIXELS, PIXELS, 3):
        raise ValueError(f"a picture of shape {pixels.shape} cannot be read; give {PIXELS}×{PIXELS} RGB pixels")
    return pixels / 255 if pixels.dtype == np.uint8 else pixels


def _unit_box(shape: str) -> tuple[float, float, float, float]:
    axis = torch.linspace(-1.5, 1.5, 601)
    grid_y, grid_x = torch.meshgrid(axis, axis, indexing="ij")
    inside = signed_distance(shape, grid_x, grid_y) < 0
    xs, ys = grid_x[inside], grid_y[inside]
    return xs.min().item(), xs.max().item(), ys.min().item(), ys.max().item()


_CENTRES = torch.arange(PIXELS) + 0.5
_UNIT_BOX = {shape: _unit_box(shape) for shape in SHAPES}
_COLOUR_LAB = {name: rgb2lab(np.array(rgb) / 255) for name, rgb in COLOURS.items()}
_BACKGROUND_LAB = {name: rgb2lab(np.array(rgb) / 255 * 0.975) for name, rgb in BACKGROUNDS.items()}
