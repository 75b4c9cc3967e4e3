"""`BlocksBranch`: a row of blocks whose middle ones are skipped in some steps, their residual extrapolated.

The rule is that of cache-dit's DBCache and TaylorSeer, with the same result to the bit. The library itself replaces
methods of `logging.Logger` when it is imported, keeps its switches on classes, and averages the residual over all ranks
of the process, also those that work on another sample or guidance branch.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
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
_FIRST_DERIVATIVE = 3
"""The step from which on TaylorSeer, as cache-dit has it, takes differences."""


class BlocksBranch:
    """One row of blocks in one guidance branch of one expert: what it computed last, and where stock's loop is in it.

    Attributes:
        skipped: of each step so far, whether the middle blocks were.
        computing: whether the row runs now.
    """

    def __init__(self, settings: CacheConfig, mask: list[int] | None) -> None:
        self.skipped: list[bool] = []
        self.computing = False
        self._settings = settings
        self._mask = mask
        self.release()

    def release(self) -> None:
        """Drop all tensors; the counts stay."""
        self._residual: Tensor | None = None
        self._ladders: list[list[Tensor]] = []
        self._computed = 0
        self._output: Any = None

    def run(
        self,
        blocks: Sequence[nn.Module],
        returns: BlockReturn,
        tokens: Group | None,
        /,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Run the whole row for this step and return what its last block would have returned.

        Args:
            blocks: the row.
            returns: what each of them returns.
            tokens: the ranks that share the tokens, and so the decision.
            hidden_states: of the image.
            encoder_hidden_states: of the text.
        """

        def through(some: Sequence[nn.Module], image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
            for block in some:
                result = block(image, text, *args, **kwargs)
                if returns == "image":
                    image = result
                else:
                    image, text = result if returns == "image_text" else reversed(result)
            return image, text

        first, last = self._settings.fn, len(blocks) - self._settings.bn
        self.computing = True
        try:
            image, text = through(blocks[:first], hidden_states, encoder_hidden_states)
            skip = self._skips(image - hidden_states, tokens)
            if skip:
                image, text = self._continued(image, text)
            else:
                before = image, text
                image, text = through(blocks[first:last], image, text)
                image, text = image.contiguous(), text if returns == "image" else text.contiguous()
                self._keep([image - before[0], *([] if returns == "image" else [text - before[1]])])
            image, text = through(blocks[last:], image, text)
        finally:
            self.computing = False
        self.skipped.append(skip)
        self._output = image if returns == "image" else (image, text) if returns == "image_text" else (text, image)
        return self._output

    def hand_on(self, *args: Any, last: bool, **kwargs: Any) -> Any:
        """Return the row's result to a later block's call, which must have been given just that.

        Raises:
            UnsupportedError: something changed the states between two blocks, as a ControlNet does.
        """
        output = self._output
        given = (*args, *kwargs.values())
        states = (output,) if isinstance(output, Tensor) else output
        if output is None or not all(any(state is argument for argument in given) for state in states):
            raise UnsupportedError(
                "cache is not possible here: the model changes its states between two blocks, as a ControlNet makes it "
                "do; use cache=None"
            )
        if last:
            self._output = None
        return output

    def _skips(self, residual: Tensor, tokens: Group | None) -> bool:
        """Whether the middle blocks are skipped in this step; if not, remember the residual of the first blocks."""
        step, before = len(self.skipped), self._residual
        if self._mask is not None:
            # A scheduler of higher order may ask for more forwards than the mask has steps: these are computed.
            return bool(self._ladders) and step < len(self._mask) and not self._mask[step]
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

    def _keep(self, residuals: list[Tensor]) -> None:
        """Take in the residuals of the middle blocks in this step, each with its derivatives so far."""
        step, order = len(self.skipped), self._settings.taylorseer_order or 0
        known = self._ladders if step >= _FIRST_DERIVATIVE else []
        self._ladders = [[residual] for residual in residuals]
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
