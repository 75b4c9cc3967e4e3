"""`BlocksBranch`: a row of blocks whose middle ones are skipped in some steps, their residual extrapolated.

The rule is that of cache-dit's DBCache and TaylorSeer, with the same result to the bit. The library itself replaces
methods of `logging.Logger` when it is imported, keeps its switches on classes, and averages the residual over all ranks
of the process, also those that work on another sample or guidance branch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from pipeboost.core.config import CacheConfig
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.families import BlockReturn
from pipeboost.distributed import Group
from pipeboost.features.cache.masks import LONGEST

_STATES = ("hidden_states", "encoder_hidden_states")
Block = tuple[int, int, BlockReturn]
"""A block's place in its row, how many there are, and what they return."""
_FIRST_DERIVATIVE = 3
"""The step from which on TaylorSeer, as cache-dit has it, takes differences."""


class BlocksBranch:
    """One row of blocks in one guidance branch of one expert: what it computed last, and where stock's loop is in it.

    Attributes:
        skipped: of each step so far, whether the middle blocks were.
    """

    def __init__(self, settings: CacheConfig, mask: list[int] | None) -> None:
        self.skipped: list[bool] = []
        self._settings = settings
        self._mask = mask
        self._skip = False
        self.release()

    def release(self) -> None:
        """Drop all tensors; the counts stay."""
        self._residual: Tensor | None = None
        self._ladders: list[list[Tensor]] = []
        self._computed = 0
        self._before: tuple[Tensor, Tensor] | None = None
        self._states: tuple[Tensor, Tensor] | None = None

    def run(self, block: Block, forward: Callable[[], Any], image: Tensor, text: Tensor, tokens: Group | None) -> Any:
        """Return what a block returns in this step; a middle block is not computed where those are skipped.

        Args:
            block: which one it is.
            forward: computes it.
            image: its `hidden_states`.
            text: its `encoder_hidden_states`.
            tokens: the ranks that share the tokens, and so the decision.

        Raises:
            UnsupportedError: something changed the states between two blocks, as a ControlNet does.
        """
        place, count, returns = block
        first, last = self._settings.fn, count - self._settings.bn
        if place == 0:
            self._before, self._skip = (image, text), False
        elif self._states is None or self._states[0] is not image or self._states[1] is not text:
            raise UnsupportedError(
                "cache is not possible here: the model changes its states between two blocks, as a ControlNet makes it "
                "do; use cache=None"
            )
        if place == first < last:
            assert self._before is not None
            self._skip = self._skips(self._before[0], image, tokens)
            self._before = image, text
        if self._skip and first <= place < last:
            image, text = self._continued(image, text) if place == last - 1 else (image, text)
        else:
            result = forward()
            image, text = (result, text) if returns == "image" else result if returns == "image_text" else result[::-1]
            if first <= place == last - 1:
                image, text = image.contiguous(), text if returns == "image" else text.contiguous()
                self._keep(image, text, changed=1 if returns == "image" else 2)
        self._states = image, text
        if place == count - 1:
            self.skipped.append(self._skip)
            self._states = self._before = None
        return image if returns == "image" else (image, text) if returns == "image_text" else (text, image)

    def _skips(self, start: Tensor, image: Tensor, tokens: Group | None) -> bool:
        """Whether the middle blocks are skipped in this step; if not, remember the residual of the first blocks."""
        step, before = len(self.skipped), self._residual
        if self._mask is not None:
            # A scheduler of higher order may ask for more forwards than the mask has steps: these are computed.
            return bool(self._ladders) and step < len(self._mask) and not self._mask[step]
        residual = image - start
        in_a_row = len(list(takewhile(bool, reversed(self.skipped))))
        may = step >= self._settings.warmup and in_a_row < (self._settings.max_continuous or LONGEST)
        if may and before is not None and before.shape == residual.shape and self._is_quiet(before, residual, tokens):
            return True
        self._residual = residual
        return False

    def _is_quiet(self, before: Tensor, now: Tensor, tokens: Group | None) -> bool:
        threshold = self._settings.threshold
        if threshold >= 1:
            return True
        if tokens is None or tokens.size == 1:
            return bool(((before - now).abs().mean() / before.abs().mean()).item() < threshold)
        # Ranks may have one token more or less, so sums and not means are added up.
        sums = torch.stack([(before - now).abs().sum(dtype=torch.float32), before.abs().sum(dtype=torch.float32)])
        difference, size = tokens.all_reduce(sums).tolist()
        return bool(difference / size < threshold)

    def _keep(self, image: Tensor, text: Tensor, *, changed: int) -> None:
        """Take in the residuals that the middle blocks gave their states, each with its derivatives so far."""
        assert self._before is not None
        step, order = len(self.skipped), self._settings.taylorseer_order or 0
        known = self._ladders if step >= _FIRST_DERIVATIVE else []
        self._ladders = [[now - before] for now, before in zip((image, text)[:changed], self._before, strict=False)]
        for ladder, before in zip(self._ladders, known, strict=False):
            for previous in before[:order]:
                ladder.append((ladder[-1] - previous) / (step - self._computed))
        self._computed = step

    def _continued(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states with the residuals as they would be by now; of text that blocks do not change, as it is."""
        elapsed = len(self.skipped) - self._computed
        residuals = [
            sum((1 / math.factorial(n)) * each * elapsed**n for n, each in enumerate(ladder))
            for ladder in self._ladders
        ]
        states = [(residual + state).contiguous() for residual, state in zip(residuals, (image, text), strict=False)]
        return states[0], states[1] if len(states) > 1 else text


def fits(blocks: Sequence[nn.Module], returns: BlockReturn) -> bool:
    """Whether all blocks take and return their states in this form, as far as their signatures say."""
    for block in blocks:
        signature = inspect.signature(block.forward)
        outputs = str(signature.return_annotation).count("torch.Tensor")
        if not signature.parameters.keys() >= set(_STATES) or outputs not in (0, 1 if returns == "image" else 2):
            return False
    return True
