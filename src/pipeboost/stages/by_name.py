"""What goes into a stage's method and comes out of it, by name, and the way back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from types import NoneType, SimpleNamespace
from typing import Any

from pipeboost.core.errors import PipeboostError
from pipeboost.core.seams import signature_of, stock_class
from pipeboost.stages.stage import Values


class Arguments:
    """The arguments of one call of a method by name, and the way back to a call."""

    def __init__(self, owner: Any, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._bound = signature_of(stock_class(owner), method).bind(owner, *args, **kwargs)
        self._bound.apply_defaults()
        parameters = self._bound.signature.parameters.values()
        self._rest = next((p.name for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD), None)
        self._owner_name = next(iter(self._bound.arguments))

    @property
    def values(self) -> Values:
        """Every argument but the object itself; those in `**kwargs` by their own names."""
        named = {name: value for name, value in self._bound.arguments.items() if name != self._owner_name}
        rest = named.pop(self._rest) if self._rest is not None else {}
        return {**named, **rest}

    def changed_to(self, values: Values) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and keyword arguments of a call with these values.

        Raises:
            PipeboostError: a value has a name that the method does not take.
        """
        bound = inspect.BoundArguments(self._bound.signature, dict(self._bound.arguments))
        if self._rest is not None:
            bound.arguments[self._rest] = {}
        for name, value in values.items():
            if name in bound.arguments and name not in (self._owner_name, self._rest):
                bound.arguments[name] = value
            elif self._rest is not None:
                bound.arguments[self._rest][name] = value
            else:
                known = ", ".join(self.values)
                raise PipeboostError(f"a stage returned the value {name!r}, unknown to its method; it has {known}")
        return bound.args[1:], bound.kwargs


def named_results(result: Any, names: tuple[str, ...]) -> Values:
    """Return what a method returned, by name: the fields of a Diffusers output, or the elements of a tuple."""
    if result is None:
        return {}
    if isinstance(result, Mapping):
        return dict(result)
    elements = result if isinstance(result, tuple) else (result,)
    return {names[i] if i < len(names) else f"output_{i}": element for i, element in enumerate(elements)}


@dataclass(frozen=True)
class ResultForm:
    """How a method returns its results; the inverse of `named_results`.

    Attributes:
        kind: the class of what has fields, `tuple`, `object` for a result by itself, `NoneType` for none.
        order: the results' names.
    """

    kind: type
    order: tuple[str, ...]

    @classmethod
    def of(cls, result: Any, names: tuple[str, ...]) -> ResultForm:
        """Return the form of what the method has returned."""
        kind: type = type(result) if isinstance(result, (Mapping, NoneType)) else object
        return cls(tuple if isinstance(result, tuple) else kind, tuple(named_results(result, names)))

    @classmethod
    def expected(cls, arguments: Values, outputs: Values, names: tuple[str, ...]) -> ResultForm:
        """Return the form that the script expects of a method whose own work was not done."""
        if not names:
            return cls(NoneType, ())
        if arguments.get("return_dict") is True:
            return cls(SimpleNamespace, tuple(dict.fromkeys((*names, *outputs))))
        order = list(names)
        while (further := f"output_{len(order)}") in outputs:
            order.append(further)
        return cls(tuple if len(order) > 1 or "return_dict" in arguments else object, tuple(order))

    def filled(self, values: Values) -> Any:
        """Return the values as the method returns its results.

        Raises:
            PipeboostError: the values lack a name.
        """
        if self.kind is NoneType:
            return None
        missing = [name for name in self.order if name not in values]
        if missing:
            raise PipeboostError(f"a stage left out {str(missing)[1:-1]}; run() returns all of {', '.join(self.order)}")
        if self.kind is tuple:
            return tuple(values[name] for name in self.order)
        if self.kind is object:
            return values[self.order[0]]
        return self.kind(**{name: values[name] for name in self.order})
