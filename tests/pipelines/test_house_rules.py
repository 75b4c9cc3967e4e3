"""What the design's "Rules of the house" say, as far as no test of a feature says it."""

import ast
import copy
import dataclasses
import functools
import json
import re
import weakref
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import pipeboost
from pipeboost import CacheConfig, CompileConfig, accelerate_pipeline
from pipeboost.contract.call import current_call
from pipeboost.contract.registry import families
from pipeboost.core.families import Family
from pipeboost.features.attention import dispatcher
from pipeboost.kernels.table import KERNELS
from tests.pipelines.tiny import TINY

SOURCE = Path(pipeboost.__file__).parent
PATCHES = Path(__file__).parents[2] / "patches"
FLOORS = (
    ("core", "families"),
    ("patches", "demo_model", "distributed", "kernels"),
    ("contract",),
    ("features",),
    ("stages",),
    ("quality",),
    ("model_reader", "plan", "apply", "applied_plan", "runner", "requests"),
    ("bench", "tune"),
    ("acceleration",),
    ("generate",),
    ("serving",),
    ("cli",),
)
"""From the ground up; on the floor of the recipes each imports only what stands left of it."""
FAST = {"quality": "fast", "cache": CacheConfig(warmup=1, threshold=0.9), "compile": CompileConfig(backend="eager")}
ENTRY = TINY["flux_dev"]
pytestmark = pytest.mark.usefixtures("graphs_stay")


def _trees(folder: Path) -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in sorted(folder.rglob("*.py"))}


def _room(module: str) -> str:
    """The room of a module: a feature is a room of its own."""
    parts = module.removeprefix("pipeboost.").split(".")
    if parts == ["families"]:  # core's, under the name that patches of other packages import
        return "core"
    return ".".join(parts[:2]) if parts[0] == "features" else parts[0]


def _floor(module: str) -> int | None:
    first = module.removeprefix("pipeboost.").split(".")[0]
    return next((number for number, rooms in enumerate(FLOORS) if first in rooms), None)


@functools.cache
def _modules() -> dict[str, ast.Module]:
    named = {
        f"pipeboost.{'.'.join(path.relative_to(SOURCE).with_suffix('').parts)}": path for path in SOURCE.rglob("*.py")
    }
    named |= {f"pipeboost.patches.{path.stem}": path for path in PATCHES.glob("*.py")}
    return {name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in named.items()}


def _imports(tree: ast.Module, modules: set[str]) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {name if (name := f"{node.module}.{each.name}") in modules else node.module for each in node.names}
        elif isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
    return {name for name in found if name == "pipeboost" or name.startswith("pipeboost.")}


def test_a_module_imports_from_floors_below_and_features_never_import_each_other():
    modules, checked = _modules(), 0
    upward = []
    for module, tree in modules.items():
        room, floor = _room(module), _floor(module)
        for name in _imports(tree, set(modules)) if floor is not None else ():
            other, theirs = _room(name), _floor(name)
            assert name != "pipeboost" or floor == len(FLOORS) - 1, f"{module} imports the whole package"
            checked += 1
            if other == room or theirs is None or theirs < floor:
                continue
            rooms = FLOORS[floor]
            if theirs != floor or "plan" not in rooms or rooms.index(other) > rooms.index(room):
                upward.append(f"{module} imports {name}")
    assert not upward
    assert checked > 300


def test_no_module_imports_itself_in_a_circle():
    modules = _modules()
    graph = {}
    for module, tree in modules.items():
        at_import = ast.Module([node for node in tree.body if not _is_for_types(node)], [])
        top = [node for node in at_import.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        graph[module] = _imports(ast.Module(top, []), set(modules)) & set(modules)
    TopologicalSorter(graph).prepare()  # raises CycleError


def _is_for_types(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def test_2_an_inverse_touches_only_what_is_still_ours():
    pipe = accelerate_pipeline(ENTRY.build(), **FAST)
    theirs = object()
    acceleration, pipe.acceleration = pipe.acceleration, theirs
    acceleration.remove()
    assert pipe.acceleration is theirs


def test_2_a_processor_that_the_user_replaced_is_accelerated_again():
    pipe = accelerate_pipeline(ENTRY.build())
    attention = pipe.transformer.transformer_blocks[0].attn
    stock_processor = type(ENTRY.build().transformer.transformer_blocks[0].attn.processor)
    attention.processor = stock_processor()
    ENTRY.call(pipe)
    assert type(attention.processor) is not stock_processor
    pipe.acceleration.remove()
    assert type(attention.processor) is stock_processor


def test_3_the_stock_script_is_never_forked_by_class_name():
    pattern = re.compile(r"__name__\s*(==|!=|in\b)|(==|!=)\s*\w+\.__name__|__class__\.__name__\s*(==|!=|in\b)")
    names = {name for family in families() for name in (*family.pipelines, *family.transformers)}
    words = ("_repeated_blocks", "in names", '"__main__"')
    for path in SOURCE.rglob("*.py"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            allowed = path.name == "region.py" or any(each in line for each in words)
            assert allowed or not pattern.search(line), f"{path}:{number}: {line}"
            if path.parts[-2] != "cli":
                assert not any(f'"{name}"' in line for name in names), f"{path}:{number} names a model: {line}"


def test_3_what_depends_on_the_model_is_a_field_of_family_and_all_patches_read_alike():
    order = [field.name for field in dataclasses.fields(Family)]
    for path, tree in _trees(PATCHES).items():
        calls = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "FAMILY"
        ]
        if path.name in ("__init__.py", "text_encoders.py"):
            continue
        given = [keyword.arg for keyword in calls[0].keywords]
        assert given == sorted(given, key=order.index), path.name
        assert len(families()) >= 4


def test_4_never_a_silent_fallback(monkeypatch):
    ran, kernel = [], KERNELS["flex"]
    function = kernel.function
    monkeypatch.setattr(dispatcher, "_dispatchers", weakref.WeakValueDictionary())  # that of an earlier test may live
    monkeypatch.setitem(
        KERNELS, "flex", dataclasses.replace(kernel, function=lambda *a, **k: ran.append(1) or function(*a, **k))
    )
    pipe = accelerate_pipeline(ENTRY.build(), attention="flex")
    ENTRY.call(pipe, steps=1)
    assert len(ran) == len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)


def test_6_every_committed_benchmark_measured_in_one_run_stock_tuned_stock_and_ours():
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    others = ("residency_", "executor_", "graphs_", "parallel_", "ablation_", "vae_")
    results = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith(others)]
    assert results
    for path in folder.glob("residency_*.json"):
        rows = json.loads(path.read_text())["parts"]["capped"]["rows"]
        assert {"stock enable_model_cpu_offload", "ours, lossless"} <= rows.keys(), path.name
    for path in folder.glob("executor_*.json"):
        overlap = json.loads(path.read_text())["overlap"]
        assert {"one_by_one_seconds", "overlapped_seconds"} <= overlap.keys(), path.name
    for path in folder.glob("graphs_*.json"):
        for case in json.loads(path.read_text())["cases"].values():
            assert {"stock", "tuned stock", "ours", "ours + graph"} <= case.keys(), path.name
    for path in folder.glob("parallel_*.json"):
        rows = json.loads(path.read_text())["rows"]
        for part in {row["part"] for row in rows} - {"smoke"}:
            variants = [row["variant"].split(",")[0] for row in rows if row["part"] == part]
            assert {"stock", "ours"} <= set(variants), path.name
    for path in folder.glob("ablation_*.json"):
        found = json.loads(path.read_text())
        for run in found if isinstance(found, list) else [found]:
            for rows in run["models"].values():
                # Of two tables that build on each other the second compares with what the first compares with stock.
                assert rows.keys() & {"tuned stock", "+ all rewrites"}, path.name
    for path in folder.glob("vae_*.json"):
        for rows in json.loads(path.read_text())["cases"].values():
            assert "stock" in rows, path.name
    for path in results:
        variants = {variant["name"]: variant["median_ms"] for variant in json.loads(path.read_text())["variants"]}
        assert {"stock eager", "tuned stock", "pipeboost lossless"} <= variants.keys(), path.name
        assert all(variants.values()), path.name


def test_7_a_calls_state_belongs_to_the_call_and_never_to_a_layer_a_model_or_a_pipe():
    pipe = accelerate_pipeline(ENTRY.build(), **FAST)
    ENTRY.call(pipe, steps=4)
    tensors = []
    for module in pipe.transformer.modules():
        tensors += [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
    assert not tensors
    assert current_call() is None
    seen = []

    def look(pipe, step, timestep, kwargs):
        seen.append(current_call())
        return kwargs

    ENTRY.call(pipe, steps=2, callback_on_step_end=look)
    assert seen[0] is seen[1]
    assert seen[0].pipe is pipe


def test_7_outside_a_call_our_layers_and_processors_act_as_stock():
    inputs = ENTRY.forward_inputs(ENTRY.build())
    with torch.no_grad():
        expected = ENTRY.build().transformer(**copy.deepcopy(inputs))[0]
        pipe = accelerate_pipeline(ENTRY.build(), **{**FAST, "attention": "flex", "compile": None})
        outside = pipe.transformer(**copy.deepcopy(inputs))[0]
        with pipe.acceleration.open():
            inside = pipe.transformer(**copy.deepcopy(inputs))[0]
    assert torch.equal(outside, expected)
    assert not torch.equal(inside, expected)
