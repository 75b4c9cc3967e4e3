"""`pipeboost doctor`: what is installed, what this device could use, and the command for each missing piece."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from rich.console import Console
from rich.table import Table

from pipeboost.core.hardware import Hardware, detect_hardware
from pipeboost.kernels.table import KERNELS, Kernel, unavailable_reason, wrong_hardware

_EXTRAS = (
    ("peft", "LoRA", "pip install peft"),
    ("av", "writing videos", "pip install av"),
    ("ftfy", "Wan's prompt clean-up", "pip install ftfy"),
    ("matplotlib", "Report.plot", "pip install matplotlib"),
    ("scikit-image", "reading the demo's pictures back", "pip install scikit-image"),
    ("scipy", "reading the demo's pictures back", "pip install scipy"),
)
_NO_COMPILER = {
    "cpu": "no C++ compiler: apt-get install g++ (or your system's equivalent)",
    "cuda": "triton is missing: pip install triton",
}
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "cache-dit")


def print_diagnosis() -> None:
    """What is installed, what this device could use, and how to install what is missing."""
    console = Console()
    hardware = detect_hardware()
    cuda = torch.version.cuda or "none"
    console.print(f"[bold]Device[/]  {hardware}, Python {platform.python_version()}, CUDA {cuda}")
    if hardware.count > 1:
        reach = "each reaches" if hardware.peer_links else "not all reach"
        console.print(f"[bold]Links[/]  {hardware.count} devices; {reach} the others' memory directly")
    console.print("[bold]Packages[/]  " + ", ".join(f"{name} {_version(name) or 'MISSING'}" for name in _REQUIRED))
    compiler = "torch.compile can build here" if hardware.compiler else _NO_COMPILER[hardware.device]
    console.print(f"[bold]Compile[/]  {compiler}")
    console.print(_kernels(hardware))
    console.print(_extras())


def _kernels(hardware: Hardware) -> Table:
    table = Table(title="Attention kernels", title_justify="left")
    for heading in ("attention=", "here", "from tier", "dtypes", "head dim", "masks"):
        table.add_column(heading, no_wrap=heading == "attention=", width=16 if heading == "here" else None)
    for name, kernel in KERNELS.items():
        smallest, largest, multiple = kernel.head_dims
        table.add_row(
            name,
            _here(kernel, hardware),
            kernel.tier,
            " ".join(_DTYPES[dtype] for dtype in kernel.dtypes),
            f"{smallest}-{largest}" + (f" by {multiple}" if multiple > 1 else ""),
            kernel.masks,
        )
    return table


def _here(kernel: Kernel, hardware: Hardware) -> str:
    """Whether a kernel runs here; if not, what is in the way, and the command where installing it would help."""
    if unavailable_reason(kernel, hardware) is None:
        return "yes"
    if wrong_hardware(kernel, hardware) is None:
        return "no: " + " or ".join(package.install for package in kernel.packages)
    lowest, end = kernel.from_capability, kernel.below_capability
    return f"needs capability {lowest[0]}.{lowest[1]}" + (f" to {end[0] - 1}.x" if end else " or later")


def _extras() -> Table:
    table = Table("package", "version", "for", "install", title="Optional packages", title_justify="left")
    for package, purpose, command in _EXTRAS:
        found = _version(package)
        table.add_row(package, found or "missing", purpose, "" if found else command)
    return table


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
