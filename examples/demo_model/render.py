"""Draws scenes: antialiased signed distance fields, batched, on whatever device the rows are."""

import math
import random

import torch

from .scenes import BACKGROUNDS, COLOURS, PIXELS, SHAPES, Scene, place_on_canvas

HEART_SIDE, HEART_DROP = 0.94, 0.10
MOON_SHIFT = 0.26


def signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance to the outline of a unit-radius shape, negative inside; `x`, `y` of one shape, y pointing down."""
    match shape:
        case "circle":
            return torch.hypot(x, y) - 1
        case "square":
            return torch.maximum(x.abs(), y.abs()) - 0.86
        case "triangle":
            y = y - 0.2
            return torch.maximum(y - 0.55, math.cos(math.pi / 6) * x.abs() - 0.5 * y - 0.55)
        case "star":
            return _star(x, y - 0.06)
        case "heart":
            return _heart(x, y - HEART_DROP)
        case "ring":
            return (torch.hypot(x, y) - 0.74).abs() - 0.26
        case "moon":
            x = x - MOON_SHIFT
            crescent = torch.maximum(torch.hypot(x, y) - 1, 0.84 - torch.hypot(x - 0.52, y))
            return torch.maximum(crescent, x - 0.543)
    raise ValueError(f"shape={shape!r} is not one of {SHAPES}")


def render(rows: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """Draw a batch. `rows` (batch, things, 6) and `background` (batch,) as `place_on_canvas` gives them.

    Returns (batch, 3, 128, 128) in [-1, 1]. Every thing has a soft shadow and a light from above.
    """
    device = rows.device
    axis = torch.arange(PIXELS, device=device) + 0.5
    canvas_y, canvas_x = axis[:, None], axis[None, :]
    soft = torch.tensor(list(BACKGROUNDS.values()), device=device)[background] / 255
    image = soft[:, :, None, None] * (1.01 - 0.07 * canvas_y / PIXELS)
    palette = torch.tensor(list(COLOURS.values()), device=device) / 255
    for present, shape, colour, left, top, radius in _unstack(rows):
        x, y = (canvas_x - left) / radius, (canvas_y - top) / radius
        shadow = _by_index(shape, x - 1.5 / radius, y - 3.0 / radius) * radius
        image = image * (1 - 0.16 * present * torch.sigmoid(-shadow / 1.5))
        alpha = present * (0.5 - _by_index(shape, x, y) * radius).clamp(0, 1)
        base = palette[colour.flatten().long()][:, :, None, None] * (1.0 - 0.12 * y)
        shine = 0.30 * torch.exp(-((x + 0.35) ** 2 + (y + 0.45) ** 2) / 0.18)
        image = image * (1 - alpha) + (base + (1 - base) * shine) * alpha
    return image.clamp(0, 1) * 2 - 1


def render_scene(scene: Scene, *, seed: int = 0) -> torch.Tensor:
    """Draw one full scene: (3, 128, 128) in [-1, 1]."""
    rows, background = place_on_canvas(scene, random.Random(seed))
    return render(torch.tensor([rows]), torch.tensor([background]))[0]


def _unstack(rows: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(row[:, i, None, None, None] for i in range(6)) for row in rows.unbind(1)]


def _by_index(shape: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    distance = torch.zeros_like(x)
    for index, name in enumerate(SHAPES):
        distance = torch.where(shape == index, signed_distance(name, x, y), distance)
    return distance


def _star(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # Fold the plane into one tenth of the star, where its outline is one straight edge from tip to notch.
    sector = 2 * math.pi / 5
    angle = torch.atan2(x, -y)
    angle = (angle - sector * torch.round(angle / sector)).abs()
    reach = torch.hypot(x, y)
    tip_x, notch_x, notch_y = 1.12, 0.50 * math.cos(sector / 2), 0.50 * math.sin(sector / 2)
    edge_x, edge_y = notch_x - tip_x, notch_y
    length = math.hypot(edge_x, edge_y)
    edge = ((reach * torch.cos(angle) - tip_x) * edge_y - reach * torch.sin(angle) * edge_x) / length
    return torch.maximum(edge, reach - tip_x)


def _heart(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    # A square standing on its corner with a half disc on each of its two upper sides.
    half = HEART_SIDE / 2
    right, down = (x.abs() + y) / math.sqrt(2), (y - x.abs()) / math.sqrt(2)
    square = torch.maximum(right.abs(), down.abs()) - half
    disc = torch.hypot(right, down + half) - half
    return torch.minimum(square, disc)
