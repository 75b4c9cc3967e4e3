"""`ModelInfo`: what a plan needs to know of a pipeline's models, without their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from pipeboost.core.families import Activations


@dataclass(frozen=True)
class ComponentSize:
    """The weights of one component.

    Attributes:
        path: attribute of the pipeline.
        kind: a name of `OFFLOAD_KINDS`.
        part: denoisers are on the device one at a time, each a part of its stage; None for what is there with others.
        nbytes: all weights.
        block_bytes: those in repeated blocks, which can be streamed.
        largest_block: the largest of them.
    """

    path: str
    kind: str
    part: str | None
    nbytes: int
    block_bytes: int
    largest_block: int

    def resized(self, nbytes: int) -> ComponentSize:
        """Return it with another size, its blocks in proportion."""
        if nbytes == self.nbytes:
            return self
        return replace(
            self,
            nbytes=nbytes,
            block_bytes=self.block_bytes * nbytes // self.nbytes,
            largest_block=self.largest_block * nbytes // self.nbytes,
        )


@dataclass(frozen=True)
class Quantizable:
    """What of one transformer can have 8 bits.

    Attributes:
        count: linears.
        nbytes: of their weights as they are.
        quantised: of their weights in 8 bits.
        left: reason → how many linears of its blocks stay, in words that follow "linears".
        already: whether Diffusers has quantised it as it was loaded.
    """

    count: int
    nbytes: int
    quantised: int
    left: Mapping[str, int] = field(default_factory=dict)
    already: bool = False


@dataclass(frozen=True)
class Split:
    """What tensor parallelism can split of one component.

    Attributes:
        nbytes: of the weights that it splits; the others are whole on every rank.
        degrees: into how many parts.
    """

    nbytes: int
    degrees: tuple[int, ...]


@dataclass(frozen=True)
class ModelInfo:
    """What a plan needs to know of the pipeline's models, without their weights.

    Attributes:
        pipeline: class name of the pipeline.
        dtype: the transformer's.
        weights: bytes of the weights.
        weighed: whose weights those are.
        offloaded: whether Diffusers' own CPU offload is on.
        components: what each component weighs; empty where that is not known.
        device: where the pipeline is to run; None for the hardware's first device.
        free: bytes that the pipeline could take there, its weights included; None for all of the device's memory.
        unmovable: component → reason, for each whose weights offload cannot move.
        controlnet: whether a ControlNet adds residuals between the transformer's blocks.
        encodes: whether it has an `encode_prompt`.
        processors: how many attention processors can be swapped; None where nobody has looked.
        stock_processors: class name and reason, for each kind of processor that cannot.
        stock_denoisers: component → class name, for each model that a step calls besides the transformers.
        model: class name of the transformer.
        hooks: those of Diffusers or accelerate in the transformers' blocks, in words; they cannot be compiled.
        odd_blocks: what else may keep the blocks from being compiled, in words.
        heads: its attention heads, None where it does not say.
        ranks: how many processes there are to run the pipeline.
        splits: component → what tensor parallelism can split of it, without those that it cannot split; None where that
            was not asked.
        quantizable: transformer → what of it can have 8 bits; None where nobody has looked.
        activations: what the stages take besides weights, on one rank; None where no family says.
        vae: what may be rewritten of the VAE: `"causal"` its convolutions over frames, `"compiled"` nothing, for the
            user has compiled it, `"other"` nothing; None where there is none.
        vae_key: stands for the VAE's class, configuration and dtype, by which compiled code of it is found.
    """

    pipeline: str
    dtype: torch.dtype
    weights: int
    weighed: str = "all components"
    offloaded: bool = False
    components: tuple[ComponentSize, ...] = ()
    device: torch.device | None = None
    free: int | None = None
    unmovable: Mapping[str, str] = field(default_factory=dict)
    controlnet: bool = False
    encodes: bool = True
    processors: int | None = None
    stock_processors: tuple[tuple[str, str], ...] = ()
    stock_denoisers: Mapping[str, str] = field(default_factory=dict)
    model: str = "the transformer"
    hooks: str | None = None
    odd_blocks: str | None = None
    heads: int | None = None
    ranks: int = 1
    splits: Mapping[str, Split] | None = None
    quantizable: Mapping[str, Quantizable] | None = None
    activations: Activations | None = None
    vae: Literal["causal", "compiled", "other"] | None = None
    vae_key: str = ""

    def degrees(self, denoisers: Sequence[str]) -> tuple[int, ...] | None:
        """Return the degrees of tensor parallelism that all of its denoisers allow; None where that was not asked."""
        if self.splits is None:
            return None
        present = [component.path for component in self.components if component.path in denoisers]
        allowed = [set(self.splits[path].degrees) if path in self.splits else set() for path in present]
        return tuple(sorted(set.intersection(*allowed))) if allowed else ()
