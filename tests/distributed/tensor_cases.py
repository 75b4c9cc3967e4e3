"""What the ranks run in `test_tensor_parallel`."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from pipeboost.call import open_call
from pipeboost.distributed import Group, Mesh
from pipeboost.families import TensorSharding, family_of, text_encoder_sharding
from pipeboost.ledger import Ledger
from pipeboost.parallel.tensor import ShardReport, bytes_per_rank, shard_weights
from tests.pipelines import tiny_parts
from tests.pipelines.tiny import OTHER_PROMPT, PROMPT, TINY

TOKENS = 23


@contextlib.contextmanager
def tensor_group(degree: int) -> Iterator[Group]:
    """The tensor axis of a mesh that has no other, or of one with an axis beside it where there are more ranks."""
    from pipeboost.distributed import world

    mesh = Mesh({"tensor": degree, "cfg": world().size // degree}, device=torch.device("cpu"))
    try:
        yield mesh.group("tensor")
    finally:
        mesh.close()


def transformers(
    name: str, degree: int, *, dtype: str = "float32", batch: int = 1, **call: Any
) -> list[dict[str, Any]]:
    """For each denoiser of a tiny pipeline: whole against split, and whole again."""
    entry = TINY[name]
    pipe = entry.build()
    if batch > 1:
        call = {"prompt": [PROMPT, OTHER_PROMPT], **call}
    results = []
    for denoiser in entry.denoisers:
        model, inputs = getattr(pipe, denoiser), entry.forward_inputs(pipe, denoiser=denoiser, **call)
        inputs = {argument: _fresh(value, argument) for argument, value in inputs.items()}
        if dtype != "float32":
            model, inputs = model.to(getattr(torch, dtype)), _to(inputs, getattr(torch, dtype))
        sharding = family_of(pipe).tensor
        assert sharding is not None
        with tensor_group(degree) as group:
            results.append(split_and_joined(model, inputs, sharding, group))
    return results


def text_encoder(builder: str, degree: int) -> dict[str, Any]:
    """A tiny text encoder on a padded batch of two: whole against split, and whole again."""
    with tiny_parts.seeded(0):
        model = getattr(tiny_parts, builder)()
        tiny_parts.randomised(model)
        ids = torch.randint(5, 150, (2, TOKENS))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    sharding = text_encoder_sharding(model)
    assert sharding is not None
    with tensor_group(degree) as group:
        inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True, "return_dict": True}
        return split_and_joined(model, inputs, sharding, group)


@torch.no_grad()
def split_and_joined(model: nn.Module, inputs: Any, sharding: TensorSharding, group: Group) -> dict[str, Any]:
    """The figures of one model: differences, bytes, and what is left of the change in the end."""
    before = {path: (parameter, parameter.data.clone()) for path, parameter in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    expected, whole = _outputs(model, inputs), _bytes(model)
    predicted = bytes_per_rank(model, sharding, group.size)
    ledger = Ledger()
    report: ShardReport = shard_weights(model, sharding, group, ledger)
    own = _bytes(model)
    with open_call(None, owner=None):
        actual = _outputs(model, inputs)
    ledger.undo()
    after = dict(model.named_parameters())
    return {
        "difference": max(float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True)),
        "size": max(float(each.abs().max()) for each in expected),
        "same_on_ranks": all(torch.equal(group.all_reduce(each), each * group.size) for each in actual),
        "whole": whole,
        "own": own,
        "predicted": predicted,
        "report": report,
        "left_in_place": all(after[path] is parameter for path, (parameter, _) in before.items()),
        "restored": all(torch.equal(parameter.data, value) for parameter, value in before.values()),
        "classes": classes == [type(module) for module in model.modules()],
        "again": max(float((a - b).abs().max()) for a, b in zip(_outputs(model, inputs), expected, strict=True)),
        "changes": ledger.changes,
    }


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    output = model(**copy.deepcopy(inputs))
    if isinstance(output, tuple):
        return [output[0]]
    hidden = output.hidden_states if isinstance(output.hidden_states, tuple) else ()
    return [*hidden, output[0]]


def _bytes(model: nn.Module) -> int:
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def _fresh(value: Any, argument: str) -> Any:
    if argument not in ("hidden_states", "encoder_hidden_states"):
        return value
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(len(argument)))


def _to(value: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, value)
