"""Which attributes a pipeline's `encode_prompt` reads and writes, found in its code and in the methods it calls.

An embedding depends on more than arguments and encoders: a template, a maximal length, a scale set by the script. The
names are an upper bound: an attribute of the same name on another object counts too, and then only costs a miss.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any


@dataclass(frozen=True)
class Names:
    """Attribute names.

    Attributes:
        read: those whose value is asked for.
        written: those that are set.
    """

    read: frozenset[str]
    written: frozenset[str]


@functools.cache
def names_in(pipeline_class: type, method: str) -> Names:
    """The attributes that `method` and the methods and properties it mentions, overridden ones included, touch."""
    from diffusers import DiffusionPipeline

    own = [cls for cls in pipeline_class.__mro__ if cls not in DiffusionPipeline.__mro__]
    read: set[str] = set()
    written: set[str] = set()
    waiting, seen = [method], {method}
    while waiting:
        name = waiting.pop()
        for code in (code for cls in own for code in _code_of(vars(cls).get(name))):
            for instruction in dis.get_instructions(code):
                if instruction.opname == "STORE_ATTR":
                    written.add(instruction.argval)
                elif instruction.opname.startswith("LOAD_") and instruction.opname.endswith(("_ATTR", "_METHOD")):
                    read.add(instruction.argval)
        waiting += read - seen
        seen |= read
    return Names(frozenset(read), frozenset(written))


def _code_of(member: Any) -> Iterator[CodeType]:
    if isinstance(member, property):
        member = member.fget
    member = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else member
    if isinstance(member, FunctionType):
        yield from _nested(member.__code__)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)
