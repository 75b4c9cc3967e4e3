"""Tiny stock pipelines of every family and variant that pipeboost supports, the ground on which the parity tests stand.

    from tests.pipelines.tiny import TINY

    @pytest.mark.parametrize("name", TINY)
    def test_claim(name):
        entry = TINY[name]
        pipe = entry.build()                      # random weights, the same ones every time
        before = entry.call(pipe)                 # a tensor; `entry.call_kwargs()` gives the arguments instead
        inputs = entry.forward_inputs(pipe)       # arguments of the transformer's first call

All are fp32 on the CPU, with four attention heads of 16, three or four blocks of each kind, and the real text encoder,
VAE, tokenizer and scheduler classes.
"""

import torch

from tests.pipelines import (
    tiny_flux,
    tiny_generic,
    tiny_hunyuan_video,
    tiny_hunyuan_video_15,
    tiny_ltx2,
    tiny_qwen_image,
    tiny_wan,
    tiny_z_image,
)
from tests.pipelines.tiny_adapters import (
    ip_adapter_inputs,
    ip_adapter_state_dict,
    load_tiny_ip_adapter,
    load_tiny_lora,
    lora_state_dict,
)
from tests.pipelines.tiny_entry import (
    FRAMES,
    HEIGHT,
    NEGATIVE_PROMPT,
    OTHER_PROMPT,
    PROMPT,
    WIDTH,
    TinyPipeline,
    mask,
    picture,
)

__all__ = [
    "ENDS",
    "FRAMES",
    "HEIGHT",
    "NEGATIVE_PROMPT",
    "OTHER_PROMPT",
    "PROMPT",
    "TINY",
    "WIDTH",
    "TinyPipeline",
    "ip_adapter_inputs",
    "ip_adapter_state_dict",
    "load_tiny_ip_adapter",
    "load_tiny_lora",
    "lora_state_dict",
    "mask",
    "picture",
    "tiny_names",
]

# Matrices this small gain nothing from threads, and lose a hundredfold to them when the cores are busy.
torch.set_num_threads(1)

TINY: dict[str, TinyPipeline] = {
    entry.name: entry
    for module in (
        tiny_flux,
        tiny_qwen_image,
        tiny_wan,
        tiny_hunyuan_video,
        tiny_hunyuan_video_15,
        tiny_z_image,
        tiny_ltx2,
        tiny_generic,
    )
    for entry in module.ENTRIES
}


def tiny_names(*families: str | None, branches: int | None = None) -> list[str]:
    """Names of the entries of `families` (of all, if none is named) that make `branches` calls a step (any number)."""
    return [
        name
        for name, entry in TINY.items()
        if (not families or entry.family in families) and branches in (None, entry.branches)
    ]


ENDS = [
    name
    for family in {entry.family: None for entry in TINY.values()}
    for name in tiny_names(family)[:: len(tiny_names(family)) - 1 or 1]
]
"""The first and the last variant of each family, and of those without one."""
