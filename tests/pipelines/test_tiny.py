"""The tiny pipelines can carry parity tests: they are deterministic, and every part of them is heard in the output."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from tests.parameters import often
from tests.pipelines.tiny import ENDS, OTHER_PROMPT, TINY, picture

PICTURES = {"image", "control_image", "ip_adapter_image"}
OFTEN = [*ENDS, "flux_controlnet", "wan22_t2v", "pixart_sigma"]


def _denoisers(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, denoiser) for name in names for denoiser in TINY[name].denoisers]


def _forward(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """All that a forward returns, one number after another."""
    with torch.no_grad():
        output = model(**copy.deepcopy(inputs))
    return torch.cat([part.flatten() for part in _tensors(output if isinstance(output, tuple) else output.to_tuple())])


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", often(OFTEN, TINY))
def test_same_call_gives_the_same_finite_varied_output_by_branches_times_a_step(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    state = torch.get_rng_state()
    calls = dict.fromkeys(entry.denoisers, 0)
    for denoiser in entry.denoisers:

        def count(*_: Any, denoiser: str = denoiser) -> None:
            calls[denoiser] += 1

        getattr(pipe, denoiser).register_forward_pre_hook(count)
    output = entry.call(pipe)
    steps = int(entry.steps * entry.inputs().get("strength", 1.0))
    assert set(calls.values()) == {steps * entry.branches // len(entry.denoisers)}
    assert output.dtype == torch.float32
    assert torch.isfinite(output).all()
    assert output.std() > 0.02
    assert ((output <= 0) | (output >= 1)).float().mean() < 0.1, "clipping hides differences"
    other_prompt = entry.call(pipe, prompt=OTHER_PROMPT)
    assert (output - other_prompt).abs().max() > 0.02
    assert torch.equal(output, entry.stock())
    first, other = (entry.forward_inputs(pipe, denoiser=entry.denoisers[0], seed=seed) for seed in (0, 1))
    assert not all(torch.equal(one, two) for one, two in zip(_tensors(first), _tensors(other), strict=True))
    assert torch.equal(state, torch.get_rng_state()), "the pipeline drew from the global generator"


@pytest.mark.parametrize(("name", "denoiser"), often(_denoisers(OFTEN), _denoisers(TINY)))
def test_every_attention_of_the_denoiser_is_heard(name: str, denoiser: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    model = getattr(pipe, denoiser)
    inputs = entry.forward_inputs(pipe, denoiser=denoiser)
    stock = _forward(model, inputs)
    assert torch.equal(stock, _forward(model, inputs))

    def off_by_a_percent(*hook_args: Any) -> Any:
        output = hook_args[-1]
        return tuple(map(bent, output)) if isinstance(output, tuple) else bent(output)

    def bent(states: torch.Tensor) -> torch.Tensor:
        # Some up and some down: a norm that follows would take back one factor for all channels.
        return states * torch.linspace(0.98, 1.02, states.shape[-1])

    attentions = {path: module for path, module in model.named_modules() if hasattr(module, "to_q")}
    assert len(attentions) >= 3
    for path, module in attentions.items():
        handle = module.register_forward_hook(off_by_a_percent)
        difference = (_forward(model, inputs) - stock).abs().max()
        handle.remove()
        assert difference > 1e-4, path


@pytest.mark.parametrize("name", [name for name, entry in TINY.items() if PICTURES & entry.inputs().keys()])
def test_another_picture_gives_another_output(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    before = entry.call(pipe, output_type="latent")
    for argument in PICTURES & entry.inputs().keys():
        other = picture(seed=5)
        many = isinstance(entry.inputs()[argument], list)
        after = entry.call(pipe, output_type="latent", **{argument: [picture(), other] if many else other})
        assert (after - before).abs().max() > 1e-3, argument


@pytest.mark.parametrize("name", ["qwen_image", "hunyuan_video"])
def test_prompts_of_two_lengths_make_a_mask(name: str) -> None:
    entry = TINY[name]
    pipe = entry.build()
    inputs = entry.forward_inputs(pipe, prompt=["a fox", OTHER_PROMPT], negative_prompt=["", ""])
    mask = inputs.get("encoder_hidden_states_mask", inputs.get("encoder_attention_mask"))
    assert mask is not None
    short, long = mask.sum(dim=1).tolist()
    assert 0 < short < long


def test_qwen_image_prompts_differ_in_tokens_and_the_first_is_odd() -> None:
    entry = TINY["qwen_image"]
    pipe = entry.build()
    first = entry.forward_inputs(pipe)["encoder_hidden_states"].shape[1]
    other = entry.forward_inputs(pipe, prompt=OTHER_PROMPT)["encoder_hidden_states"].shape[1]
    assert first % 2 == 1
    assert first != other
