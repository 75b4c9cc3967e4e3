"""The demo's one picture: every image it drew, a row for each variant and a column for each prompt."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw

_SCALE, _MARGIN, _LEFT, _TOP = 2, 8, 150, 72


def picture_grid(rows: Sequence[tuple[str, str, Sequence[Image.Image]]], prompts: Sequence[str]) -> Image.Image:
    """Put square images of one size side by side, enlarged.

    Args:
        rows: name, time and images of each variant, one image a prompt.
        prompts: the heading of each column.
    """
    side = rows[0][2][0].width * _SCALE
    size = (_LEFT + len(prompts) * (side + _MARGIN), _TOP + len(rows) * (side + _MARGIN))
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    for column, prompt in enumerate(prompts):
        x = _LEFT + column * (side + _MARGIN)
        for line, text in enumerate(textwrap.wrap(prompt, 40)[:4]):
            pen.text((x, 6 + 15 * line), text, fill="black", font_size=13)
    for row, (name, time, images) in enumerate(rows):
        y = _TOP + row * (side + _MARGIN)
        pen.text((8, y + side // 2 - 24), name, fill="black", font_size=18)
        pen.text((8, y + side // 2), time, fill="black", font_size=14)
        for column, image in enumerate(images):
            enlarged = image.resize((side, side), Image.Resampling.LANCZOS)
            grid.paste(enlarged, (_LEFT + column * (side + _MARGIN), y))
    return grid
