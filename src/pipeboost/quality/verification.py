"""`Verification`: what `Acceleration.verify` found, as text, JSON and a contact sheet."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from PIL import Image

from pipeboost.core.user_files import make_folder, user_path
from pipeboost.quality.call_metrics import METRICS

_WORST_BLOCKS = 5
"""Blocks that the text names; JSON has all."""


@dataclass(frozen=True)
class Verification:
    """What `Acceleration.verify` found.

    Attributes:
        quality: the tier whose promise was checked.
        passed: whether it was kept.
        promise: the promise in words.
        psnr: of the whole call's result to stock, dB; the worst where it has several outputs.
        max_difference: of the whole call's result to stock; the largest where it has several outputs.
        forward_errors: transformer → relative error of one forward to stock on the same inputs; where it has several
            outputs `transformer.output` → that of each.
        noise_floor: the same → relative error that stock's own compile makes there; empty where it was not needed.
        outputs: output of the whole call → its PSNR to stock, dB, and its largest difference.
        rival: where steps are skipped, as many steps of stock as are computed, and their PSNR to stock with all, dB.
        metrics: metric of the whole call → whose result → its value. Results: `ours`; `stock again`, run a second time,
            and `stock compiled` where the tier compiles, which are the floor; `stock, fewer steps` where steps are
            skipped. `flicker`, `clip` and `drawn` judge each result by itself, `stock` too; the others compare with
            stock's.
        left_out: what could not be measured here, and why.
        block_errors: where asked for, `transformer.block` → relative error of its output on the inputs that stock gave
            the block; the largest of its outputs.
        contact_sheet: stock, ours and their amplified difference; None where the call made no pictures.
    """

    quality: str
    passed: bool
    promise: str
    psnr: float
    max_difference: float
    forward_errors: dict[str, float] = field(default_factory=dict)
    noise_floor: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, tuple[float, float]] = field(default_factory=dict)
    rival: tuple[int, float] | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    block_errors: dict[str, float] = field(default_factory=dict)
    contact_sheet: Image.Image | None = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        lines = [f"{'passed' if self.passed else 'FAILED'}: {self.promise}"]
        for name, (ratio, difference) in self.outputs.items():
            of = f", {name}" if len(self.outputs) > 1 else ""
            lines.append(f"  whole call{of}: PSNR to stock {ratio:.1f} dB, largest difference {difference:.3g}")
        if self.rival is not None:
            lines.append(f"  stock with as many forwards, {self.rival[0]} steps: PSNR {self.rival[1]:.1f} dB")
        for name, values in self.metrics.items():
            found = ", ".join(f"{whose} {value:{METRICS[name].form}}" for whose, value in values.items())
            lines.append(f"  {name}{'' if METRICS[name].alone else ' to stock'}: {found}")
        for name, error in self.forward_errors.items():
            floor = f", noise floor {self.noise_floor[name]:.3g}" if name in self.noise_floor else ""
            lines.append(f"  one forward of {name}: relative error {error:.3g}{floor}")
        if self.block_errors:
            wrong = [name for name, error in self.block_errors.items() if error]
            lines.append(f"  blocks on stock's inputs: {len(wrong)} of {len(self.block_errors)} differ from stock")
            worst = sorted(wrong, key=lambda name: -self.block_errors[name])[:_WORST_BLOCKS]
            lines.extend(f"    {name}: relative error {self.block_errors[name]:.3g}" for name in worst)
        lines.extend(f"  not measured: {why}" for why in self.left_out.values())
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return all but the contact sheet, of plain types; a number that is not finite is a text, such as `"inf"`."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name != "contact_sheet"}

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `verification.json` and, where there are pictures, `contact_sheet.png`.

        Raises:
            ConfigurationError: there can be no such folder.
        """
        path = user_path(folder, "folder")
        make_folder(path, f"folder {path}")
        Path(path, "verification.json").write_text(json.dumps(self.to_dict(), indent=2))
        if self.contact_sheet is not None:
            self.contact_sheet.save(path / "contact_sheet.png")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
