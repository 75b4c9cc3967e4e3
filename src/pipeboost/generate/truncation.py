"""What tokenizers cut off a long prompt, found where they cut it: few pipelines say so, and only in a log."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pipeboost.core.errors import quoted
from pipeboost.core.seams import add_middleware, remove_middleware

_KEPT = 256


class Truncations:
    """Middleware on a pipeline's tokenizers that keeps what they cut off, for later calls that reuse a prompt too."""

    def __init__(self, pipe: Any) -> None:
        # Some pipelines tokenize to a limit of their own, and shorten the embeddings behind a template's beginning.
        self._template = getattr(pipe, "prompt_template_encode_start_idx", None)
        self._call: Mapping[str, Any] = {}
        self._limit: Any = None
        self._found: dict[tuple[str, Any], dict[str, str]] = {}
        tokenizers: dict[int, tuple[Any, Any]] = {}
        for name, component in pipe.components.items():
            for each in (component, getattr(component, "tokenizer", None)):
                if hasattr(each, "model_max_length") and hasattr(each, "all_special_ids"):
                    tokenizers.setdefault(id(each), (each, partial(self._tokenize, name)))
        self._middleware = list(tokenizers.values())
        for tokenizer, middleware in self._middleware:
            add_middleware(tokenizer, "__call__", middleware, place="component.verify")

    def remove(self) -> None:
        """Leave the tokenizers as they were."""
        while self._middleware:
            tokenizer, middleware = self._middleware[-1]
            remove_middleware(tokenizer, "__call__", middleware)
            self._middleware.pop()

    def begin(self, call: Mapping[str, Any], limit: Any) -> None:
        """A pipeline call begins.

        Args:
            call: its arguments.
            limit: its `max_sequence_length`, given or by default.
        """
        self._call, self._limit = call, limit

    def notes(self) -> tuple[str, ...]:
        """A sentence for each text of the call, and each encoder that read only its beginning."""
        return tuple(
            f"{name} was cut: {sentence}"
            for name, text in self._texts().items()
            for sentence in self._found.get((text, self._limit), {}).values()
        )

    def _texts(self) -> dict[str, str]:
        return {name: value for name, value in self._call.items() if "prompt" in name and isinstance(value, str)}

    def _tokenize(self, name: str, call_next: Any, tokenizer: Any, *args: Any, **settings: Any) -> Any:
        given = args[0] if args else settings.get("text")
        most, start = settings.get("max_length") if settings.get("truncation") else None, 0
        if isinstance(self._template, int) and isinstance(self._limit, int):
            start = self._template
            most = min(most or self._limit + start, self._limit + start)
        for text in [given] if isinstance(given, str) else given if most and isinstance(given, (list, tuple)) else ():
            # A token stands for at least a byte, but for special ones.
            if most and isinstance(text, str) and len(text.encode(errors="replace")) + 8 > most - start:
                tokens = partial(call_next, text, truncation=False, padding=False)
                ids = tokens(add_special_tokens=settings.get("add_special_tokens", True))["input_ids"]
                if len(ids) > most:
                    self._note(name.replace("tokenizer", "text_encoder"), tokenizer, text, ids, most, start)
        return call_next(*args, **settings)

    def _note(self, encoder: str, tokenizer: Any, text: str, ids: list[int], most: int, start: int) -> None:
        special, end = set(tokenizer.all_special_ids), len(ids)
        while end and ids[end - 1] in special:
            end -= 1
        # An end token takes the place of the last one that would have been kept.
        lost = tokenizer.decode(ids[most - (0 if start else len(ids) - end) : end], skip_special_tokens=True)
        # The text may stand in a template, and be cleaned up before.
        whose = [each for each in self._texts().values() if _letters(each) and _letters(each) in _letters(text)]
        prompt = max(whose, key=len, default=self._call.get("prompt", ""))
        self._found.setdefault((prompt, self._limit), {})[encoder] = (
            f"{encoder} reads {most - start} tokens of {len(ids) - start}, without {quoted(lost.strip())}"
        )
        if len(self._found) > _KEPT:
            del self._found[next(iter(self._found))]


def _letters(text: str) -> str:
    return "".join(text.lower().split())
