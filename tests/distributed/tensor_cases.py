"""What the ranks run in `test_tensor_parallel`."""

import contextlib
import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from pipeboost.contract.call import open_call
from pipeboost.contract.registry import family_of, text_encoder_sharding
from pipeboost.core.config import CompileConfig
from pipeboost.core.errors import PipeboostError, UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.core.sharding import TensorSharding
from pipeboost.distributed import Group, Mesh, world
from pipeboost.features.compile import compile_model
from pipeboost.features.parallel.tensor import guard_pipeline, shard_weights, split_of
from tests.floors import floor_of
from tests.pipelines import tiny_parts
from tests.pipelines.tiny import (
    OTHER_PROMPT,
    PROMPT,
    TINY,
    ip_adapter_state_dict,
    load_tiny_lora,
    lora_state_dict,
)

TOKENS = 23


@contextlib.contextmanager
def tensor_group(degree: int) -> Iterator[Group]:
    """The tensor axis of a mesh that has no other, or of one with an axis beside it where there are more ranks."""
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
        with tensor_group(degree) as group:
            results.append(split_and_joined(model, inputs, _sharding(pipe), group))
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
def refusals() -> dict[str, str]:
    """What is said to everything that must not be done with split weights, by what was done."""
    entry = TINY["flux_dev"]
    pipe = entry.build()
    model, inputs = pipe.transformer, entry.forward_inputs(pipe)
    weights = lora_state_dict(model, rank=2)
    adapter = ip_adapter_state_dict(pipe)
    expected, processors = _outputs(model, inputs), dict(model.attn_processors)
    attempts: dict[str, Callable[[], Any]] = {
        "call": lambda: model(**copy.deepcopy(inputs)),
        "state_dict": lambda: model.state_dict(),
        "save": lambda: model.save_pretrained("unused"),
        "load": lambda: model.load_state_dict({}),
        "copy": lambda: copy.deepcopy(model),
        "pickle": lambda: pickle.dumps(model),
        "fuse": lambda: model.fuse_qkv_projections(),
        "lora": lambda: pipe.load_lora_weights(dict(weights), adapter_name="late"),
        "lora of the model": lambda: model.load_lora_adapter(dict(weights), adapter_name="late"),
        "ip_adapter": lambda: pipe.load_ip_adapter(adapter, "", image_encoder_pretrained_model_name_or_path=None),
        "ip_adapter of the model": lambda: model._load_ip_adapter_weights(adapter),
        "save pipeline": lambda: pipe.save_pretrained("unused"),
    }
    said = {}
    with tensor_group(2) as group, Ledger() as ledger:
        shard_weights(model, _sharding(pipe), group, ledger)
        guard_pipeline(pipe, group, ledger)
        for name, attempt in attempts.items():
            try:
                attempt()
            except UnsupportedError as error:
                said[name] = str(error)
        model.set_attn_processor({name: type(processor)() for name, processor in processors.items()})
        ledger.undo()
    assert _largest(_outputs(model, inputs), expected) == 0.0
    assert stock_class(pipe) is type(pipe)
    return said


@torch.no_grad()
def lora(state: str) -> dict[str, Any]:
    """A transformer with a LoRA that is `"loaded"`, `"fused"`, or fused and `"unloaded"`."""
    entry = TINY["flux_dev"]
    pipe = entry.build()
    load_tiny_lora(pipe)
    if state != "loaded":
        pipe.fuse_lora()
    if state == "unloaded":
        pipe.unload_lora_weights()
    model, inputs = pipe.transformer, entry.forward_inputs(pipe)
    if state != "loaded":
        with tensor_group(2) as group:
            return split_and_joined(model, inputs, _sharding(pipe), group)
    expected, said = _outputs(model, inputs), ""
    with tensor_group(2) as group:
        try:
            shard_weights(model, _sharding(pipe), group, Ledger())
        except UnsupportedError as error:
            said = str(error)
    again = _largest(_outputs(model, inputs), expected)
    return {"said": said, "again": again, "class": type(model) is stock_class(model)}


@torch.no_grad()
def changed_meanwhile() -> dict[str, bool]:
    """What the user did to parameters while they were split, and what is there after the weights were joined."""
    pipe = TINY["wan21_t2v"].build()
    block = pipe.transformer.blocks[0]
    linear, other, norm = block.attn1.to_out[0], block.ffn.net[0].proj, block.attn1.norm_q
    theirs = nn.Parameter(torch.randn_like(other.weight))
    doubled = linear.weight.data * 2
    linear.weight.requires_grad_(False)
    with tensor_group(2) as group, Ledger() as ledger:
        shard_weights(pipe.transformer, _sharding(pipe), group, ledger)
        other.weight = theirs
        linear.weight.mul_(2)
        norm.to(torch.bfloat16)
        block.attn1.heads = 17
        ledger.undo()
    return {
        "a replaced parameter stays": other.weight is theirs,
        "new values are joined": torch.equal(linear.weight, doubled),
        "no gradient was asked for": not linear.weight.requires_grad and other.bias.requires_grad,
        "a new dtype stays": norm.weight.dtype is torch.bfloat16 and norm.weight.shape == (64,),
        "a new count stays": block.attn1.heads == 17 and block.attn2.heads == 4,
    }


def shared() -> dict[str, Any]:
    """Two pipelines hold one transformer, with the same group and with another."""
    pipe = TINY["qwen_image"].build()
    model, sharding, first, second, third = pipe.transformer, _sharding(pipe), Ledger(), Ledger(), Ledger()
    whole = _bytes(model)
    with tensor_group(2) as group:
        same = shard_weights(model, sharding, group, first) is shard_weights(model, sharding, group, second)
        with tensor_group(2) as other:
            try:
                shard_weights(model, sharding, other, third)
            except UnsupportedError as error:
                said = str(error)
        sizes = [_bytes(model)]
        for ledger in (first, second):
            ledger.undo()
            sizes.append(_bytes(model))
    return {"whole": whole, "sizes": sizes, "same": same, "said": said}


def dropped() -> tuple[int, int]:
    """Models and shares left in memory once a pipeline is dropped without joining its weights; the ledger is kept."""
    pipe = TINY["wan21_t2v"].build()
    ledger = Ledger()
    with tensor_group(2) as group:
        shard_weights(pipe.transformer, _sharding(pipe), group, ledger)
        left = weakref.ref(pipe.transformer), weakref.ref(pipe.transformer.blocks[0].ffn.net[2].weight)
        del pipe
        gc.collect()
        found = tuple(int(reference() is not None) for reference in left)
        ledger.undo()
    return found[0], found[1]


def broken_off() -> tuple[str, str]:
    """The ranks stopped to talk to each other, as after a failure, before the weights were joined."""
    pipe = TINY["wan21_t2v"].build()
    with tensor_group(2) as group:
        ledger = Ledger()
        shard_weights(pipe.transformer, _sharding(pipe), group, ledger)
        group.abort()
        said = []
        for attempt in (ledger.undo, lambda: pipe.transformer(None)):
            try:
                attempt()
            except PipeboostError as error:
                said.append(str(error))
    return said[0], said[1]


def different_weights() -> tuple[str, bool]:
    """Rank 1 has built another model."""
    pipe = TINY["flux_dev"].build()
    with tensor_group(2) as group, torch.no_grad():
        pipe.transformer.proj_out.weight.add_(group.rank)
        try:
            shard_weights(pipe.transformer, _sharding(pipe), group, Ledger())
        except UnsupportedError as error:
            return str(error), stock_class(pipe.transformer) is type(pipe.transformer)
    return "", False


@torch.no_grad()
def tied() -> dict[str, Any]:
    """One weight tied to a layer that is split alike, another to one that is not split."""
    pipe = TINY["wan21_t2v"].build()
    model, inputs = pipe.transformer, TINY["wan21_t2v"].forward_inputs(pipe)
    first, second = model.blocks[0].ffn, model.blocks[1].ffn
    second.net[0].proj.weight = first.net[0].proj.weight
    model.blocks[2].attn1.to_q.weight = model.condition_embedder.time_embedder.linear_2.weight
    with tensor_group(2) as group:
        result = split_and_joined(model, inputs, _sharding(pipe), group)
    return result | {"tied": second.net[0].proj.weight is first.net[0].proj.weight}


@torch.no_grad()
def compiled(name: str, backend: str) -> dict[str, Any]:
    """Regional compile with `fullgraph`, whole and split."""
    entry = TINY[name]
    pipe = entry.build()
    model, inputs, family = pipe.transformer, entry.forward_inputs(pipe), family_of(pipe)
    expected, floor = _outputs(model, inputs), floor_of(lambda: _outputs(model, inputs), model)
    with tensor_group(2) as group, Ledger() as ledger:
        shard_weights(model, _sharding(pipe), group, ledger)
        report = compile_model(model, CompileConfig(backend=backend), family, ledger)
        with open_call(None, owner=None):
            actual = _outputs(model, inputs)
            repeated = _outputs(model, inputs)
        ledger.undo()
    return {
        "difference": _largest(actual, expected),
        "floor": floor,
        "repeated": _largest(actual, repeated),
        "graphs": report.counters.graphs,
        "classes": len(report.classes),
        "again": _largest(_outputs(model, inputs), expected),
    }


@torch.no_grad()
def split_and_joined(model: nn.Module, inputs: Any, sharding: TensorSharding, group: Group) -> dict[str, Any]:
    """The figures of one model: differences, bytes, and what is left of the change in the end."""
    before = {path: (parameter, parameter.data.clone()) for path, parameter in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    expected, whole = _outputs(model, inputs), _bytes(model)
    split = split_of(model, sharding).nbytes
    floor = group.all_reduce(torch.tensor([_floor(model, inputs) if group.rank == 0 else 0.0])).item()
    ledger = Ledger()
    shares = shard_weights(model, sharding, group, ledger)
    own = _bytes(model)
    with open_call(None, owner=None):
        actual = _outputs(model, inputs)
    ledger.undo()
    after = dict(model.named_parameters())
    return {
        "difference": _largest(actual, expected),
        "floor": floor,
        "size": max(float(each.abs().max()) for each in expected),
        "same_on_ranks": all(torch.equal(group.all_reduce(each), each * group.size) for each in actual),
        "whole": whole,
        "own": own,
        "predicted": whole - split + split // group.size,
        "shares": (shares.own_bytes, shares.whole_bytes),
        "split": {layer.path for layer in shares.layout.layers},
        "left_in_place": all(after[path] is parameter for path, (parameter, _) in before.items()),
        "restored": all(torch.equal(parameter.data, value) for parameter, value in before.values()),
        "classes": classes == [type(module) for module in model.modules()],
        "again": _largest(_outputs(model, inputs), expected),
        "changes": ledger.changes,
    }


def _floor(model: nn.Module, inputs: Any) -> float:
    """How far rounding moves the outputs; in 16 bits, where ranks round their parts of a sum too, by the true ones."""
    dtype = next(model.parameters()).dtype
    if dtype is torch.float32:
        return floor_of(lambda: _outputs(model, inputs), model)
    rounded, true = _outputs(model, inputs), _outputs(model.to(torch.float64), _to(inputs, torch.float64))
    model.to(dtype)
    return _largest(rounded, true)


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    output = model(**copy.deepcopy(inputs))
    if isinstance(output, tuple):
        return [output[0]]
    hidden = output.hidden_states if isinstance(output.hidden_states, tuple) else ()
    return [*hidden, output[0]]


def _largest(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) for a, b in zip(actual, expected, strict=True))


def _sharding(pipe: Any) -> TensorSharding:
    sharding = family_of(pipe).tensor
    assert sharding is not None
    return sharding


def _bytes(model: nn.Module) -> int:
    storages = {parameter.untyped_storage().data_ptr(): parameter.untyped_storage() for parameter in model.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def _fresh(value: Any, argument: str) -> Any:
    if argument not in ("hidden_states", "encoder_hidden_states"):
        return value
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(len(argument)))


def _to(value: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda each: each.to(dtype) if each.is_floating_point() else each, value)


def accelerated_again(name: str) -> dict[str, Any]:
    """A pipeline accelerated again and again while its weights are split, in other layouts and the same.

    Returns:
        `"differences"`: of each layout to one rank, the last one of stock to stock; `"weights"`: that each plan began
        with; `"components"`: of this rank's, by the plans that split them.
    """
    from pipeboost import ParallelConfig, accelerate_pipeline
    from pipeboost.model_reader import model_info

    entry = TINY[name]
    pipe = entry.build()
    family = family_of(pipe)
    results, weights, components = [], [], []
    with torch.no_grad():
        stock = entry.call(pipe)
        for layout in ({"tensor": 2}, {"tensor": 2}, {"ulysses": 2}, {"tensor": 2}):
            accelerate_pipeline(pipe, parallel=ParallelConfig(**layout), reuse=None)
            weights.append(model_info(pipe, family, torch.device("cpu")).weights)
            if "tensor" in layout:
                components.append([part.nbytes for part in pipe.acceleration.plan.model.components])
            results.append(entry.call(pipe))
        pipe.acceleration.remove()
        results.append(entry.call(pipe))
    differences = [float((each - stock).abs().max()) for each in results]
    return {"differences": differences, "weights": weights, "components": components}
