"""Compile on tiny transformers: how many graphs are made and when, and that nothing outlives the call or the ledger."""

import contextlib
import copy
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import accelerate
import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    QwenImageTransformer2DModel,
    WanTransformer3DModel,
)
from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading
from peft import LoHaConfig, LoKrConfig, LoraConfig
from torch import nn

from pipeboost.contract.call import open_call
from pipeboost.contract.registry import families
from pipeboost.core.config import CompileConfig
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.core.families import Family
from pipeboost.core.ledger import Ledger
from pipeboost.core.seams import stock_class
from pipeboost.features.compile import CompiledModel, compile_model
from tests.floors import floor_of, is_rounding
from tests.moments import at_once
from tests.parameters import often

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
LENGTHS = (7, 9, 3, 64)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


class Counting:
    """A torch.compile backend that runs the captured graph as it is, and counts."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


def flux(blocks: int = 12, singles: int = 12) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=blocks,
        num_single_layers=singles,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
        **HEADS,
    )


def flux_inputs(size: int = 4, text: int = 7, seed: int = 0, batch: int = 1) -> dict[str, Any]:
    draw = _draw(seed)
    ids = torch.stack(
        torch.meshgrid(torch.zeros(1), torch.arange(float(size)), torch.arange(4.0), indexing="ij"), dim=-1
    )
    return {
        "hidden_states": draw(batch, size * 4, 16),
        "encoder_hidden_states": draw(batch, text, 32),
        "pooled_projections": draw(batch, 32),
        "timestep": draw(batch),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def qwen(blocks: int = 12) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=blocks, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **HEADS
    )


def qwen_inputs(size: int = 4, text: int = 7, seed: int = 0, batch: int = 1) -> dict[str, Any]:
    draw = _draw(seed)
    return {
        "hidden_states": draw(batch, size * 4, 16),
        "encoder_hidden_states": draw(batch, text, 32),
        "timestep": draw(batch),
        "img_shapes": [[(1, size, 4)]] * batch,
    }


def wan(blocks: int = 12) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=32, freq_dim=16, ffn_dim=64, num_layers=blocks, **HEADS
    )


def wan_inputs(size: int = 4, text: int = 7, seed: int = 0, batch: int = 1) -> dict[str, Any]:
    draw = _draw(seed)
    return {
        "hidden_states": draw(batch, 4, 2, 2 * size, 8),
        "encoder_hidden_states": draw(batch, text, 32),
        "timestep": draw(batch),
    }


def hunyuan(blocks: int = 12) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_layers=blocks // 4,
        num_single_layers=blocks,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 6, 6),
        **HEADS,
    )


def hunyuan_inputs(size: int = 4, text: int = 7, seed: int = 0, batch: int = 1) -> dict[str, Any]:
    draw = _draw(seed)
    mask = torch.ones(batch, text, dtype=torch.long)
    mask[0, -1] = 0
    return {
        "hidden_states": draw(batch, 4, 2, 2 * size, 8),
        "encoder_hidden_states": draw(batch, text, 32),
        "encoder_attention_mask": mask,
        "pooled_projections": draw(batch, 32),
        "timestep": draw(batch),
        "guidance": torch.full((batch,), 3.5),
    }


def dora(**settings: Any) -> LoraConfig:
    return LoraConfig(use_dora=True, **settings)


def _draw(seed: int) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Case:
    """A transformer, its inputs, its family, how many classes of blocks it has, and whether prompts are not padded."""

    build: Callable[..., nn.Module]
    inputs: Callable[..., dict[str, Any]]
    family_name: str
    classes: int
    any_length: bool = False

    @property
    def family(self) -> Family:
        return next(family for family in families() if family.name == self.family_name)


CASES = {
    "flux": Case(flux, flux_inputs, "flux", 2),
    "qwen": Case(qwen, qwen_inputs, "qwen_image", 1, True),
    "wan": Case(wan, wan_inputs, "wan", 1),
    "hunyuan": Case(hunyuan, hunyuan_inputs, "hunyuan_video", 2, True),
}


@dataclass
class Compiled:
    """A compiled transformer with its counting backend; `run` gives the output inside a call."""

    model: nn.Module
    family: Family
    settings: dict[str, Any] = field(default_factory=dict)
    backend: Counting = field(default_factory=Counting)
    ledger: Ledger = field(default_factory=Ledger)

    def __post_init__(self) -> None:
        self.model.eval()
        # Rewrites change rounding; `test_rewrites.py` has them.
        settings = CompileConfig(**{"backend": self.backend, "rewrites": (), **self.settings})
        self.report: CompiledModel = compile_model(self.model, settings, self.family, self.ledger)

    @property
    def graphs(self) -> int:
        assert self.report.counters.graphs == self.backend.graphs
        return self.backend.graphs

    def run(self, inputs: dict[str, Any]) -> torch.Tensor:
        with open_call(None, owner=None):
            return self.model(**inputs, return_dict=False)[0]

    def difference(self, inputs: dict[str, Any]) -> float:
        """Largest difference between a run inside a call and stock."""
        stock = self.model(**inputs, return_dict=False)[0]
        return (self.run(inputs) - stock).abs().max().item()


@contextlib.contextmanager
def compiled_case(name: str, **settings: Any) -> Iterator[Compiled]:
    case = CASES[name]
    torch.manual_seed(0)
    compiled = Compiled(case.build(), case.family, settings)
    yield compiled
    compiled.ledger.undo()


@pytest.mark.parametrize("name", often(["wan", "hunyuan"], CASES))
def test_one_graph_a_block_class_and_one_more_for_a_new_size_and_batch(name: str) -> None:
    """Prompts of another length need none: FLUX and Wan pad theirs, and the others have a dimension of any size."""
    case = CASES[name]
    with compiled_case(name) as compiled:
        assert compiled.report.modules >= 12
        assert compiled.difference(case.inputs()) == 0.0
        assert compiled.graphs == case.classes
        for text in LENGTHS if case.any_length else LENGTHS[:1]:
            assert compiled.difference(case.inputs(seed=1, text=text)) == 0.0
            assert compiled.graphs == case.classes
        for text in LENGTHS if case.any_length else LENGTHS[:1]:
            assert compiled.difference(case.inputs(size=6, text=text, batch=2)) == 0.0
            assert compiled.graphs == 2 * case.classes
        assert compiled.report.counters.seconds > 0


@pytest.mark.parametrize("name", often(["qwen", "wan"], CASES))
def test_dynamic_sizes_need_no_graph_for_a_new_size(name: str) -> None:
    case = CASES[name]
    with compiled_case(name, dynamic=True) as compiled:
        for size, text in ((4, 7), (6, 7), (5, 9)):
            assert compiled.difference(case.inputs(size=size, text=text)) == 0.0
            assert compiled.graphs == case.classes


@pytest.mark.parametrize("name", ["qwen", pytest.param("hunyuan", marks=pytest.mark.exhaustive)])
def test_full_scope_makes_one_graph_for_all_prompt_lengths(name: str) -> None:
    case = CASES[name]
    compiled = Compiled(case.build(blocks=1), case.family, {"scope": "full"})
    assert compiled.report.modules == 1
    for text in LENGTHS:
        assert compiled.difference(case.inputs(text=text)) == 0.0
        assert compiled.graphs == 1


def test_controlnet_residuals_need_no_graph() -> None:
    inputs = flux_inputs()
    with compiled_case("flux") as compiled:
        compiled.run(inputs)
        inputs["controlnet_block_samples"] = [_draw(seed)(1, 16, 32) for seed in range(4)]
        inputs["controlnet_single_block_samples"] = [_draw(seed)(1, 16, 32) for seed in range(4)]
        assert compiled.difference(inputs) == 0.0
        assert compiled.graphs == 2


def test_outside_a_call_the_model_is_stock() -> None:
    inputs = qwen_inputs()
    torch.manual_seed(0)
    before = qwen().eval()(**inputs).sample
    with compiled_case("qwen") as compiled:
        assert torch.equal(compiled.model(**inputs).sample, before)
        assert compiled.graphs == 0


def test_undo_leaves_no_seams_and_stock_output() -> None:
    inputs = flux_inputs()
    with compiled_case("flux") as compiled:
        before = compiled.model(**inputs).sample
        compiled.run(inputs)
    assert all(type(module) is stock_class(module) for module in compiled.model.modules())
    assert all("_pipeboost_chains" not in vars(module) for module in compiled.model.modules())
    assert torch.equal(compiled.run(inputs), before)
    assert compiled.graphs == 2


def test_undo_lets_go_of_the_graphs() -> None:
    graphs: list[weakref.ref[torch.fx.GraphModule]] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(weakref.ref(graph))
        return graph.forward

    ledger = Ledger()
    model = wan(blocks=2)
    compile_model(model, CompileConfig(backend=backend), CASES["wan"].family, ledger)
    with open_call(None, owner=None):
        model(**wan_inputs())
    assert [graph() is None for graph in graphs] == [False]
    ledger.undo()
    gc.collect()  # the region, which lets go of its graphs
    gc.collect()  # the graphs
    assert [graph() is None for graph in graphs] == [True]


def test_more_lora_ranks_than_dynamo_recompiles_for_run_one_after_another_and_leave_its_settings_alone() -> None:
    model, inputs = flux(blocks=0, singles=1), flux_inputs()
    compiled = Compiled(model, CASES["flux"].family)
    stock = compiled.run(inputs)
    with torch._dynamo.config.patch(recompile_limit=2):
        before = torch._dynamo.config.get_config_copy()
        for rank in range(1, 5):
            torch.manual_seed(rank)
            adapter = LoraConfig(r=rank, init_lora_weights=False, target_modules=["to_q"])
            model.add_adapter(adapter, adapter_name=f"rank{rank}")
            assert compiled.difference(inputs) == 0.0
            assert not torch.equal(compiled.run(inputs), stock)
            model.delete_adapters(f"rank{rank}")
        assert compiled.graphs == 1 + 4
        assert torch._dynamo.config.get_config_copy() == before


def test_at_the_recompile_limit_a_block_runs_eager_and_says_so_and_another_model_starts_anew() -> None:
    with compiled_case("qwen", recompile_limit=2) as compiled:
        for size in (4, 5, 6):
            assert compiled.difference(qwen_inputs(size=size)) == 0.0
        ((reason, blocks),) = compiled.report.counters.eager.items()
        assert reason.startswith("QwenImageTransformerBlock has compile.recompile_limit=2 graphs")
        assert blocks == 12
        compiled.run(qwen_inputs(size=4))
        assert compiled.report.counters.eager == {reason: 12}
        twin = Compiled(qwen(blocks=1), compiled.family, {"recompile_limit": 2, "backend": compiled.backend})
        assert twin.difference(qwen_inputs(size=6)) == 0.0
        assert twin.report.counters.graphs == 1
        assert not twin.report.counters.eager


@pytest.mark.parametrize("family", ["wan", pytest.param("flux", marks=pytest.mark.exhaustive)])
def test_graphs_of_unloaded_adapters_make_room_and_those_still_in_use_stay(family: str) -> None:
    case = CASES[family]
    model, inputs = case.build(blocks=1).requires_grad_(False), case.inputs()
    compiled = Compiled(model, case.family, {"recompile_limit": 2})
    compiled.run(inputs)
    target = "attn1.to_q" if family == "wan" else "to_q"
    for user in range(3):
        adapter = LoraConfig(r=4, init_lora_weights=False, target_modules=[target])
        model.add_adapter(adapter, adapter_name=f"user{user}")
        assert compiled.difference(inputs) == 0.0
        model.unload_lora()
        made = compiled.graphs
        compiled.run(inputs)  # the graph without adapters is among those that stay
        assert compiled.graphs == made == (user + 2) * case.classes
    assert not compiled.report.counters.eager


@pytest.mark.parametrize("name", often(["qwen"], CASES))
def test_the_scale_of_an_adapter_needs_no_graph(name: str) -> None:
    case = CASES[name]
    model, inputs = case.build(blocks=4), case.inputs()
    compiled = Compiled(model, case.family)
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k"]), adapter_name="style")
    outputs = []
    for scale in (0.5, 0.7, 1.0, 0.0, -2.0):
        model.set_adapters(["style"], [scale])
        assert compiled.difference(inputs) == 0.0
        outputs.append(compiled.run(inputs))
    assert not torch.equal(outputs[0], outputs[1])
    assert compiled.graphs == case.classes


def test_where_a_graph_for_all_scales_cannot_be_made_there_is_one_for_each() -> None:
    graphs = []

    def only_fixed_numbers(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        if any(tensor.dtype is torch.float64 for tensor in inputs if isinstance(tensor, torch.Tensor)):
            raise NotImplementedError
        graphs.append(graph)
        return graph.forward

    model, inputs = qwen(blocks=1), qwen_inputs()
    compiled = Compiled(model, CASES["qwen"].family, {"backend": only_fixed_numbers, "rewrites": ("real_rotary",)})
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q"]), adapter_name="style")
    for scale in (0.5, 0.7):
        model.set_adapters(["style"], [scale])
        with torch.no_grad():
            assert compiled.difference(inputs) < 1e-5
    assert len(graphs) == compiled.report.counters.graphs == 2
    assert compiled.report.counters.rewrites == {"real_rotary": 2 * 4}  # those of the graph that was given up are none


def test_blocks_whose_adapter_cannot_be_captured_run_eager_until_it_is_unloaded() -> None:
    model, inputs = qwen(blocks=2).requires_grad_(False), qwen_inputs()
    compiled = Compiled(model, CASES["qwen"].family)
    compiled.run(inputs)
    for count, kind in enumerate((dora, LoHaConfig, LoKrConfig), start=1):
        model.add_adapter(kind(r=4, target_modules=["to_q"]), adapter_name="style")
        for _ in range(2):
            assert compiled.difference(inputs) == 0.0
        assert sum(compiled.report.counters.eager.values()) == 4 * count
        model.unload_lora()
        assert compiled.difference(inputs) == 0.0
        assert compiled.graphs == 1
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q"]), adapter_name="style")
    assert compiled.difference(inputs) == 0.0
    assert sum(compiled.report.counters.eager.values()) == 12
    assert compiled.graphs == 2


def test_threads_that_call_at_once_share_the_graphs() -> None:
    outputs: dict[int, list[float]] = {}
    with compiled_case("flux") as compiled:
        start = threading.Barrier(3)

        def work(seed: int) -> None:
            with torch.no_grad():
                start.wait()
                outputs[seed] = [compiled.difference(flux_inputs(seed=seed)) for _ in range(5)]

        at_once(work, range(3))
        assert outputs == {seed: [0.0] * 5 for seed in range(3)}
        # A thread may look for a graph in the moment before another has stored it, and then makes it too.
        assert compiled.graphs <= 4


def test_a_deep_copy_runs_on_the_graphs_of_its_original() -> None:
    inputs = flux_inputs()
    with compiled_case("flux") as compiled:
        output = compiled.run(inputs)
        twin = copy.deepcopy(compiled.model)
        with open_call(None, owner=None):
            assert torch.equal(twin(**inputs).sample, output)
        assert compiled.graphs == 2


def test_two_experts_share_their_graphs() -> None:
    backend, inputs = Counting(), wan_inputs()
    high, low = (Compiled(wan(), CASES["wan"].family, {"backend": backend}) for _ in range(2))
    assert high.difference(inputs) == 0.0
    assert low.difference(inputs) == 0.0
    assert (high.report.counters.graphs, low.report.counters.graphs) == (1, 0)


def test_inference_mode_costs_one_graph_more_and_only_once() -> None:
    with compiled_case("flux") as compiled:
        for mode in (torch.no_grad, torch.inference_mode) * 2:
            with mode():
                compiled.run(flux_inputs())
        assert compiled.graphs == 4


def test_an_overridden_forward_and_a_later_hook_are_called() -> None:
    with compiled_case("qwen") as compiled:
        block = compiled.model.transformer_blocks[3]
        stock_forward = block.forward
        block.forward = lambda *args, **kwargs: [2 * stream for stream in stock_forward(*args, **kwargs)]
        assert compiled.difference(qwen_inputs()) == 0.0
        compiled.model.transformer_blocks[5].img_mlp.register_forward_hook(lambda module, args, output: -output)
        assert compiled.difference(qwen_inputs()) == 0.0


HOOKS: dict[str, Callable[[Any], Any]] = {
    "group offload of leaves": lambda model: group_offloading(model, offload_type="leaf_level"),
    "group offload of blocks": lambda model: group_offloading(
        model, offload_type="block_level", num_blocks_per_group=1
    ),
    "layerwise casting": lambda model: model.enable_layerwise_casting(torch.bfloat16, torch.float32),
    "a cache": lambda model: model.enable_cache(FirstBlockCacheConfig(threshold=1e-9)),
    "sequential offload": lambda model: accelerate.cpu_offload(model, execution_device="cpu"),
}


def group_offloading(model: nn.Module, **how: Any) -> None:
    apply_group_offloading(model, torch.device("cpu"), torch.device("cpu"), **how)


@functools.cache
def traced_once(name: str) -> Compiled:
    """A model that has made the graphs which others of its class run on, as experts do."""
    case = CASES[name]
    compiled = Compiled(case.build(blocks=2), case.family)
    compiled.run(case.inputs())
    return compiled


@pytest.mark.parametrize(
    ("name", "kind"), [*(("qwen", kind) for kind in HOOKS), ("flux", "a cache"), ("wan", "sequential offload")]
)
def test_a_block_with_hooks_of_others_that_came_later_runs_eager_and_the_report_says_why(name: str, kind: str) -> None:
    case = CASES[name]
    model, inputs = case.build(blocks=2), case.inputs()
    compiled = Compiled(model, case.family, backend=traced_once(name).backend)
    compiled.run(inputs)
    HOOKS[kind](model)
    with model.cache_context("test"):
        assert torch.isfinite(compiled.run(inputs)).all()
    assert compiled.backend.graphs == case.classes
    assert any("hook" in reason for reason in compiled.report.counters.eager)


def test_a_block_runs_compiled_again_once_its_hook_is_gone() -> None:
    with compiled_case("qwen") as compiled:
        block = compiled.model.transformer_blocks[3]
        for _ in range(2):
            accelerate.cpu_offload(block, execution_device="cpu")
            assert compiled.difference(qwen_inputs()) == 0.0
            accelerate.hooks.remove_hook_from_submodules(block)
            assert compiled.difference(qwen_inputs()) == 0.0
        assert list(compiled.report.counters.eager.values()) == [2]
        assert compiled.graphs <= 2


def test_code_that_depends_on_data_runs_eager_and_is_not_tried_for_ever() -> None:
    with compiled_case("qwen") as compiled:
        for block in compiled.model.transformer_blocks:
            stock = block.forward
            block.forward = lambda *args, stock=stock, **kwargs: (
                stock(*args, **kwargs) if kwargs["hidden_states"].sum().item() < 1e9 else None
            )
        for runs in (1, 2):
            assert compiled.difference(qwen_inputs()) == 0.0
            assert sum(compiled.report.counters.eager.values()) == 12 * runs
        assert "QwenImageTransformerBlock cannot be compiled" in next(iter(compiled.report.counters.eager))
        assert compiled.graphs == 0


def test_what_a_block_raises_comes_up_as_it_is_and_counts_for_nothing() -> None:
    with compiled_case("qwen") as compiled:
        block = compiled.model.transformer_blocks[0]
        block.forward = lambda *args, **kwargs: (_ for _ in ()).throw(KeyError("mine"))
        with pytest.raises(KeyError, match="mine"):
            compiled.run(qwen_inputs())
        del block.forward
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            compiled.run({**qwen_inputs(), "hidden_states": torch.zeros(1, 16, 15)})
        assert compiled.difference(qwen_inputs()) == 0.0
        assert not compiled.report.counters.eager
        assert compiled.graphs == 1


def test_calls_of_another_acceleration_stay_stock() -> None:
    class Acceleration:
        pass

    owner, other, backend = Acceleration(), Acceleration(), Counting()
    model, ledger = qwen().eval(), Ledger()
    compile_model(model, CompileConfig(backend=backend), CASES["qwen"].family, ledger, owner=owner)
    with open_call(None, owner=other):
        model(**qwen_inputs())
    assert backend.graphs == 0
    with open_call(None, owner=owner):
        model(**qwen_inputs())
    assert backend.graphs == 1
    ledger.undo()


def test_a_shared_transformer_stays_compiled_until_its_last_holder_leaves() -> None:
    with compiled_case("qwen") as compiled:
        second = Ledger()
        settings = CompileConfig(backend=compiled.backend, rewrites=())
        assert compile_model(compiled.model, settings, compiled.family, second) is compiled.report
        with pytest.raises(UnsupportedError, match="shared with another accelerated pipeline"):
            compile_model(compiled.model, CompileConfig(dynamic=True), compiled.family, Ledger())
        second.undo()
        compiled.run(qwen_inputs())
        assert compiled.graphs == 1


def test_what_cannot_be_compiled_is_refused_before_any_change() -> None:
    model, ledger = nn.Sequential(nn.Linear(2, 2)), Ledger()
    with pytest.raises(ConfigurationError, match=r"compile\.backend='warp'"):
        compile_model(model, CompileConfig(backend="warp"), CASES["qwen"].family, ledger)
    with pytest.raises(UnsupportedError, match="Sequential has no blocks where family 'qwen_image' expects them"):
        compile_model(model, CompileConfig(), CASES["qwen"].family, ledger)
    assert ledger.changes == ()
    assert all(type(module) is stock_class(module) for module in model.modules())


def test_inductor_agrees_with_stock() -> None:
    compiled = Compiled(qwen(blocks=2), CASES["qwen"].family, {"backend": "inductor"})
    model = copy.deepcopy(compiled.model)
    for inputs in (qwen_inputs(), qwen_inputs(text=9)):
        floor = floor_of(functools.partial(model, **inputs, return_dict=False), model)
        assert is_rounding(compiled.difference(inputs), floor)
    assert compiled.report.counters.graphs == 1
