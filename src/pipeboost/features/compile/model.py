"""Compiles a transformer for the length of our calls: middleware on each block's `__call__`, or the whole model's.

The modules themselves stay as they are. Inside a call it runs the region's compiled function, which does
all that stock would do behind the seam, hooks and adapters included; outside one it runs stock.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from pipeboost.contract.call import current_call
from pipeboost.core.blocks import repeated_blocks
from pipeboost.core.config import CompileConfig
from pipeboost.core.errors import UnsupportedError, not_one_of
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.core.obstacles import hooks_in, odd_weights_of
from pipeboost.core.seams import Middleware, stock_class
from pipeboost.features.compile.inputs import aliased, forward_parameters, text_arguments
from pipeboost.features.compile.region import CompiledModel, Found, NotCaptured, Region, region_of

# Modules of one class that could not be compiled, after which the others are not tried: each costs a trace.
_MOST_FAILURES = 3

_compiled_models: weakref.WeakKeyDictionary[nn.Module, CompiledModel] = weakref.WeakKeyDictionary()


def compile_model(
    model: nn.Module, settings: CompileConfig, family: Family, ledger: Ledger, *, owner: Any = None
) -> CompiledModel:
    """Run a transformer's blocks (or all of it) through torch.compile inside our calls; undone by the ledger.

    Compiling happens at the first call of each class of blocks, with `fullgraph=True`: once per image size, and again
    for an adapter of another name or rank. The prompt and its length, the seed, the number of steps and the scales of
    adapters change nothing. For a model without a family Dynamo learns by itself which sizes vary, at the price of one
    more graph.

    A block that cannot be captured runs eager, and its counters say why: Dynamo's guards see a hook that came
    since its graph was made, and it runs compiled again once the hook is gone.

    Args:
        owner: the acceleration in whose calls the model runs compiled; None for every call.

    Raises:
        ConfigurationError: `settings.backend` is not a backend of torch.compile.
        UnsupportedError: the model has no repeated blocks, or another pipeline compiled it with other settings.
    """
    known = torch._dynamo.list_backends(exclude_tags=())
    if isinstance(settings.backend, str) and settings.backend not in known:
        raise not_one_of("compile.backend", settings.backend, known)
    if settings.scope == "regional":
        groups = _block_lists(model, family)
    else:
        groups = ((_text_dims_of_model(model, family), [model]),)

    place = "component.compile" if settings.scope == "full" else "block.compile"

    def apply(inner: Ledger) -> None:
        targets = [(module, text_dims) for text_dims, modules in groups for module in modules]
        names = dict.fromkeys(stock_class(module).__name__ for module, _ in targets)
        compiled = CompiledModel(model, len(targets), tuple(names))
        middleware: dict[Any, Middleware] = {}
        for module, text_dims in targets:
            key = (stock_class(module), tuple(text_dims.items()))
            if key not in middleware:
                region = region_of(module, settings, learn_sizes=not family.blocks)
                middleware[key] = _middleware(region, module, text_dims, compiled)
            inner.add_middleware(module, "__call__", middleware[key], place=place)
        inner.record("compiled model", functools.partial(_forget, weakref.ref(model)))
        _compiled_models[model] = compiled

    ledger.share(model, "compile", settings, apply)
    compiled = _compiled_models[model]
    if owner is None:
        compiled.every_call = True
    else:
        ledger.record("compiled calls", functools.partial(compiled.owners.discard, owner))
        compiled.owners.add(owner)
    return compiled


def _forget(reference: weakref.ref[nn.Module]) -> None:
    model = reference()
    if model is not None:
        _compiled_models.pop(model, None)


def _middleware(region: Region, module: nn.Module, text_dims: Mapping[str, int], compiled: CompiledModel) -> Middleware:
    text = text_arguments(module, text_dims)

    failed: weakref.WeakKeyDictionary[nn.Module, tuple[str, Found]] = weakref.WeakKeyDictionary()

    def count(reason: str) -> None:
        eager = compiled.counters.eager
        eager[reason] = eager.get(reason, 0) + 1

    def run_compiled(call_next: Callable[..., Any], owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = current_call()
        if call is None or not (compiled.every_call or call.owner in compiled.owners):
            return call_next(*args, **kwargs)
        if failed and (owner in failed or len(failed) >= _MOST_FAILURES):
            reason, found = failed.get(owner) or next(iter(failed.values()))
            if not found.is_past:
                count(reason)
                return call_next(*args, **kwargs)
            failed.clear()
        inputs, named = aliased(args), aliased(kwargs)
        for argument in text:
            argument.mark(inputs, named)
        try:
            return region(compiled, owner, inputs, named)
        except NotCaptured as error:
            reason, for_good = f"{region.module_class.__name__} {error}", error.for_good
        # Out here, so that what the module itself raises comes up as stock raises it; then the module is not to blame.
        output = call_next(*args, **kwargs)
        count(reason)
        if for_good:
            failed[owner] = reason, Found(compiled)
        return output

    return run_compiled


def capture_obstacles(models: Iterable[nn.Module], family: Family) -> tuple[str | None, str | None]:
    """What keeps blocks of some transformers from being captured, in words, and what may keep them from it."""
    hooks = odd = None
    for model in models:
        try:
            groups = _block_lists(model, family)
        except UnsupportedError:
            odd = odd or f"{stock_class(model).__name__} has no repeated blocks"
            continue
        for block in (module for _, modules in groups for module in modules):
            hooks = hooks or hooks_in(block)
            odd = odd or next(filter(None, map(odd_weights_of, block.modules())), None)
    return hooks, odd


def _block_lists(model: nn.Module, family: Family) -> tuple[tuple[Mapping[str, int], list[nn.Module]], ...]:
    """The modules to compile, in groups with the text dimensions of their arguments."""
    if family.blocks:
        try:
            found = [(blocks.text_dims, list(operator.attrgetter(blocks.path)(model))) for blocks in family.blocks]
        except AttributeError as error:
            raise UnsupportedError(
                f"{stock_class(model).__name__} has no blocks where family {family.name!r} expects them ({error}); "
                "use compile=None"
            ) from error
        return tuple((text_dims, modules) for text_dims, modules in found if modules)
    modules = list(repeated_blocks(model).values())
    if not modules:
        raise UnsupportedError(
            f"{stock_class(model).__name__} has no repeated blocks to compile; use compile='full' or compile=None"
        )
    return (({}, modules),)


def _text_dims_of_model(model: nn.Module, family: Family) -> dict[str, int]:
    """The text dimensions of the transformer's own arguments: those it shares by name with its blocks, and its mask."""
    text_dims = {name: dim for blocks in family.blocks for name, dim in blocks.text_dims.items()}
    if family.padded_text is not None:
        text_dims |= {family.padded_text.embeds: 1, family.padded_text.mask: 1}
    parameters = forward_parameters(model)
    return {name: dim for name, dim in text_dims.items() if name in parameters}
