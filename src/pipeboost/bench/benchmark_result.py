"""What a benchmark found: plain data, its JSON, and the Markdown that people read."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOCK = "stock eager"
TUNED = "tuned stock"


@dataclass(frozen=True)
class Variant:
    """One way to run the transformer; what could not be measured is None.

    Attributes:
        name: `"stock eager"`, `"tuned stock"` or `"pipeboost <tier>"`.
        what: how it ran, in words: the attention backend, or the plan.
        milliseconds: every timed forward.
        median_ms: of those.
        speedup: stock's median over this one.
        speedup_over_tuned: tuned stock's median over this one.
        tflops: 1e12 floating-point operations of the *stock* forward a second.
        share_of_bound: the bound's time over the median.
        peak_bytes: peak GPU memory of the timed forwards, weights included.
        apply_seconds: putting it on.
        cold_start_seconds: putting it on and the first forward, with empty compile caches.
        relative_error: of one forward to stock, ‖this - stock‖ / ‖stock‖.
        max_error: of one forward to stock, largest absolute difference.
        call_seconds: each timed call of the pipeline, where `steps` was given.
        restored: whether stock was bit-identical again afterwards.
        error: why it could not be measured.
    """

    name: str
    what: str = ""
    milliseconds: tuple[float, ...] = ()
    median_ms: float | None = None
    speedup: float | None = None
    speedup_over_tuned: float | None = None
    tflops: float | None = None
    share_of_bound: float | None = None
    peak_bytes: int | None = None
    apply_seconds: float | None = None
    cold_start_seconds: float | None = None
    relative_error: float | None = None
    max_error: float | None = None
    call_seconds: tuple[float, ...] = ()
    restored: bool | None = None
    error: str | None = None

    @property
    def peak_gib(self) -> float | None:
        """The peak in GiB."""
        return None if self.peak_bytes is None else self.peak_bytes / 2**30


_COLUMNS = (
    ("over stock", "speedup", ".2f", "x"),
    ("over tuned", "speedup_over_tuned", ".2f", "x"),
    ("TFLOP/s", "tflops", ".3g", ""),
    ("share of bound", "share_of_bound", ".0%", ""),
    ("peak GiB", "peak_gib", ".2f", ""),
    ("cold start s", "cold_start_seconds", ".1f", ""),
    ("rel. error", "relative_error", ".2e", ""),
)
"""Of the table: title, attribute of a variant, how it is written."""


@dataclass(frozen=True)
class BenchmarkResult:
    """One model on one device: everything that was measured in one run, and what it depends on.

    Attributes:
        model, workload, config: the published size and its constructor arguments.
        parameters: of the transformer.
        dtype: of its weights.
        hardware: the device.
        gpu: power cap, clocks and temperature, right after stock was timed.
        versions: of everything that matters.
        date: ISO date.
        command: what was typed.
        repeats, warm_ups: timed forwards, and those before them.
        steps: denoising steps of a timed pipeline call; 0 where none was timed.
        gemm_flops, attention_flops: of one stock forward.
        attention_shape: batch, heads, queries, keys and head_dim of the main attention.
        gemm_ceiling, attention_ceiling: measured FLOP/s.
        gemm_ceiling_size, attention_ceiling_kernel: what they were measured with.
        bound_ms: the time of a forward at both ceilings.
        noise_floor: relative error of stock compiled to stock eager, native attention.
        noise_floor_max: the same, largest absolute difference.
        stock_backends: the attention backends tried for tuned stock: milliseconds of an eager forward, or why not.
        variants: the rows.
    """

    model: str
    workload: str
    config: dict[str, Any]
    parameters: int
    dtype: str
    hardware: str
    gpu: dict[str, str]
    versions: dict[str, str]
    date: str
    command: str
    repeats: int
    warm_ups: int
    steps: int
    gemm_flops: int
    attention_flops: int
    attention_shape: tuple[int, ...]
    gemm_ceiling: float
    gemm_ceiling_size: int
    attention_ceiling: float
    attention_ceiling_kernel: str
    bound_ms: float
    noise_floor: float | None
    noise_floor_max: float | None
    stock_backends: dict[str, float | str]
    variants: tuple[Variant, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """The variants that could not be measured, and why; the noise floor too, where it is missing."""
        failed = [f"{variant.name}: {variant.error}" for variant in self.variants if variant.error is not None]
        return (*failed, *(["noise floor: could not be measured"] if self.noise_floor is None else []))

    @property
    def file_name(self) -> str:
        """`<model>_<hardware>_<date>`, without a suffix."""
        device = re.sub(r"^nvidia ", "", self.hardware.split(" (")[0].lower())
        return f"{self.model}_{re.sub(r'[^a-z0-9]+', '-', device).strip('-')}_{self.date}"

    def write(self, folder: Path) -> tuple[Path, Path]:
        """Write the JSON and the Markdown file into `folder`, which is made if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        data, report = (folder / f"{self.file_name}.{suffix}" for suffix in ("json", "md"))
        data.write_text(json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        report.write_text(self.to_markdown(), encoding="utf-8")
        return data, report

    def table(self) -> str:
        """Return the Markdown table of the variants, with the noise floor under it."""
        loop = [f"s per call of {self.steps} steps"] if self.steps else []
        head = ["variant", "ms median (min–max)", *(title for title, *_ in _COLUMNS), *loop]
        rows = [head, ["---"] * len(head)]
        for variant in self.variants:
            if variant.error is not None:
                rows.append([variant.name, f"failed: {variant.error}".replace("|", "/"), *[""] * (len(head) - 2)])
                continue
            times, call = variant.milliseconds, sorted(variant.call_seconds)
            median = f"{variant.median_ms:.1f} ({min(times):.1f}–{max(times):.1f})"
            others = [_shown(getattr(variant, name), form, unit) for _, name, form, unit in _COLUMNS]
            seconds = [_shown(call[len(call) // 2] if call else None, ".2f")] if self.steps else []
            rows.append([variant.name, median, *others, *seconds])
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines += ["", f"Noise floor (stock compiled against stock eager): {_shown(self.noise_floor, '.2e')} relative, "
                  f"{_shown(self.noise_floor_max, '.2e')} at most."]  # fmt: skip
        return "\n".join(lines)

    def to_markdown(self) -> str:
        """Return the whole report."""
        tried = [
            f"- `{name}`: {f'{value:.1f} ms' if isinstance(value, float) else f'does not run: {value}'}"
            for name, value in self.stock_backends.items()
        ]
        plans = [f"**{variant.name}**\n\n```text\n{variant.what}\n```\n" for variant in self.variants if variant.what]
        unclean = [variant.name for variant in self.variants if variant.restored is False]
        sections = [
            f"# {self.model} on {self.hardware}, {self.date}",
            f"One forward of the transformer ({self.parameters / 1e9:.2f} B parameters, {self.dtype}), "
            f"{self.workload}. Random weights of the published size: speed does not depend on their values. Median of "
            f"{self.repeats} forwards after {self.warm_ups} warm-ups, all variants in one run.",
            self.table(),
            *([f"**Stock was not bit-identical again after: {', '.join(unclean)}.**"] if unclean else []),
            f"Work of one stock forward: {self.gemm_flops / 1e12:.4g} TFLOP in matrix products, "
            f"{self.attention_flops / 1e12:.4g} TFLOP in attention (main shape {list(self.attention_shape)}: batch, "
            f"heads, queries, keys, head_dim). Ceilings measured in this run: {self.gemm_ceiling / 1e12:.4g} TFLOP/s "
            f"({self.gemm_ceiling_size}³ matrix product), {self.attention_ceiling / 1e12:.4g} TFLOP/s (attention, "
            f"`{self.attention_ceiling_kernel}`). Bound: {self.bound_ms:.1f} ms.",
            "## How each variant ran",
            *plans,
            "Attention backends of Diffusers tried for tuned stock, one eager forward each:\n\n" + "\n".join(tried),
            "## Conditions",
            "\n".join(
                [f"- command: `{self.command}`"]
                + [f"- {key}: {value}" for key, value in {**self.gpu, **self.versions}.items()]
                + [f"- transformer configuration: `{json.dumps(self.config)}` (else the class's defaults)"]
            ),
        ]
        return "\n\n".join(section.strip() for section in sections) + "\n"


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "–" if value is None else f"{value:{form}}{unit}"
