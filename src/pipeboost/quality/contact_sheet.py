"""One picture to look at: stock's pictures, ours, and their difference, amplified."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from pipeboost.quality.pictures import spread

_MOST = 8
"""Pictures side by side; a film shows some of its frames."""
_FRAMES = 4
_SIDE, _MARGIN, _LEFT, _TOP, _LEAST_WIDTH = 288, 8, 150, 40, 560


def contact_sheet(title: str, stock: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> Image.Image:
    """Put the first pictures, or frames of the first films, side by side.

    The difference is multiplied by the largest power of two that keeps it within 8 bits.

    Args:
        title: what stands above them.
        stock: uint8 `(frames, height, width, 3)` each.
        ours: the same of the same call.
    """
    columns = [
        pair
        for films in zip(stock, ours, strict=True)
        for pair in zip(*(spread(film, _FRAMES) for film in films), strict=True)
    ][:_MOST]
    differences = [np.abs(a.astype(np.int16) - b) for a, b in columns]
    largest = max(int(each.max()) for each in differences)
    gain = 2 ** int(np.log2(255 / largest)) if largest else 1
    rows = {
        "stock": [a for a, _ in columns],
        "pipeboost": [b for _, b in columns],
        f"difference {gain}x" if largest else "no difference": [(each * gain).astype(np.uint8) for each in differences],
    }
    height, width = columns[0][0].shape[:2]
    scale = _SIDE / max(height, width)
    width, height = round(width * scale), round(height * scale)
    size = (max(_LEAST_WIDTH, _LEFT + len(columns) * (width + _MARGIN)), _TOP + len(rows) * (height + _MARGIN))
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 10), title, fill="black", font_size=16)
    for row, (name, pictures) in enumerate(rows.items()):
        y = _TOP + row * (height + _MARGIN)
        pen.text((_MARGIN, y + height // 2 - 10), name, fill="black", font_size=16)
        for column, picture in enumerate(pictures):
            shown = Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.LANCZOS)
            sheet.paste(shown, (_LEFT + column * (width + _MARGIN), y))
    return sheet
