"""The layouts and pipelines of the parity tests, and the table of their differences.

    python -m tests.distributed.layouts docs/parallel.md       # runs all of it and puts the table into the file

Every entry is the largest difference of final latents in float32 between a call on that many ranks and one on one rank.
Latents reach 3.6 to 12, at guidance scales of 4 to 6, which magnify rounding.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAYOUTS: dict[str, dict[str, int]] = {
    "cfg 2": {"cfg": 2},
    "ulysses 2": {"ulysses": 2},
    "ring 2": {"ring": 2},
    "tensor 2": {"tensor": 2},
    "ulysses 4": {"ulysses": 4},
    "ring 4": {"ring": 4},
    "tensor 4": {"tensor": 4},
    "ulysses 2 × ring 2": {"ulysses": 2, "ring": 2},
    "cfg 2 × ulysses 2": {"cfg": 2, "ulysses": 2},
    "cfg 2 × ring 2": {"cfg": 2, "ring": 2},
    "cfg 2 × tensor 2": {"cfg": 2, "tensor": 2},
    "ulysses 2 × tensor 2": {"ulysses": 2, "tensor": 2},
    "ring 2 × tensor 2": {"ring": 2, "tensor": 2},
}
# One variant of each family, all with two branches a step; Wan 2.2 runs both experts.
FAMILIES = ("flux_true_cfg", "qwen_image", "wan22_t2v", "hunyuan_video_true_cfg")
_START, _END = "<!-- parity table -->", "<!-- end of the parity table -->"


def ranks_of(layout: Mapping[str, int]) -> int:
    """How many ranks a layout takes."""
    count = 1
    for degree in layout.values():
        count *= degree
    return count


def main(path: Path) -> None:
    """Run every pipeline of the four families in every layout, and write the table."""
    from rich.progress import track

    from tests.distributed import layout_cases
    from tests.distributed.ranks import on_ranks
    from tests.pipelines.tiny import TINY

    names = [name for name in TINY if TINY[name].family in ("flux", "qwen_image", "wan", "hunyuan_video")]
    found: dict[tuple[str, str], float] = {}
    for layout in track(LAYOUTS, description="layouts"):
        for name in names:
            reference = layout_cases.reference(name, several=True)
            settings = (name, LAYOUTS[layout], reference)
            results: list[Any] = on_ranks(ranks_of(LAYOUTS[layout]), layout_cases.differences, *settings, several=True)
            found[name, layout] = max(result["shared"] for result in results)
            assert all(result["removed"] == 0.0 for result in results), (name, layout)
            assert layout_cases.is_as_near(found[name, layout], LAYOUTS[layout], name), (name, layout)
    rows = [" | ".join(["| pipeline", *LAYOUTS]) + " |", "| --- " * (len(LAYOUTS) + 1) + "|"]
    rows += [
        " | ".join([f"| {name}", *(_describe(found[name, layout]) for layout in LAYOUTS)]) + " |" for name in names
    ]
    text = path.read_text()
    before, after = text.split(_START)[0], text.split(_END)[1]
    path.write_text(f"{before}{_START}\n" + "\n".join(rows) + f"\n{_END}{after}")
    print("\n".join(rows))


def _describe(difference: float) -> str:
    return "0" if difference == 0.0 else f"{difference:.1e}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
