"""HunyuanVideo's padded text: trimmed and unmasked inside our calls, with the same image tokens as stock."""

import copy
import inspect

import pytest
import torch

from pipeboost.contract.call import open_call
from pipeboost.contract.registry import family_named
from pipeboost.core.ledger import Ledger
from pipeboost.features.attention.padding import trim_padded_text
from pipeboost.features.attention.swap import swap_attention
from tests.floors import floor_of, is_rounding
from tests.moments import at_once
from tests.parameters import often
from tests.pipelines.tiny import TINY

# FlexAttention says so on a CPU outside torch.compile; it is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
FAMILY = family_named("HunyuanVideoPipeline")
VARIANTS = often(("hunyuan_video", "hunyuan_video_i2v_token_replace"), ["hunyuan_video_i2v"])
TEXT = 8


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return TINY[request.param].build().transformer


@pytest.fixture(scope="module")
def text_to_video():
    return TINY["hunyuan_video"].build().transformer


def mask_of(*lengths):
    return (torch.arange(TEXT)[None] < torch.tensor(lengths)[:, None]).float()


def inputs_for(model, mask, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, config = mask.shape[0], model.config

    def random(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "hidden_states": random(batch, config.in_channels, 2, 4, 6),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random(batch, mask.shape[1], config.text_embed_dim),
        "encoder_attention_mask": mask,
        "pooled_projections": random(batch, config.pooled_projection_dim),
        "guidance": torch.full((batch,), 6000.0) if config.guidance_embeds else None,
        "return_dict": False,
    }


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def differs_by_rounding(ours, stock, model, inputs):
    stock_model = copy.deepcopy(model)  # without what was done to it
    floor = floor_of(lambda: forward(stock_model, inputs), stock_model)
    return is_rounding(float((ours - stock).abs().max()), floor)


class Recorder:
    """Runs a model inside a call and records what its blocks are given."""

    def __init__(self, model):
        self.model, self.text, self.masks = model, [], []

    def __call__(self, inputs):
        blocks = [*self.model.transformer_blocks, *self.model.single_transformer_blocks]
        hooks = [block.register_forward_pre_hook(self._record, with_kwargs=True) for block in blocks]
        try:
            with open_call(None, owner=None):
                return forward(self.model, inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def _record(self, block, args, kwargs):
        arguments = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        self.text.append(arguments["encoder_hidden_states"].shape[1])
        self.masks.append(arguments["attention_mask"])


@pytest.fixture
def ledger():
    with Ledger() as ledger:
        yield ledger
        ledger.undo()


@pytest.mark.parametrize("lengths", [(2,), (5,), (8,), (2, 2), (5, 5), (2, 5), (8, 3), (8, 8)])
def test_trimmed_text_gives_the_same_video(model, lengths, ledger):
    inputs = inputs_for(model, mask_of(*lengths))
    expected = forward(model, inputs)
    trim_padded_text(model, FAMILY, ledger)
    recorder = Recorder(model)
    assert differs_by_rounding(recorder(inputs), expected, model, inputs)
    assert set(recorder.text) == {max(lengths)}
    if len(set(lengths)) == 1:
        assert recorder.masks == [None] * len(recorder.masks)
    else:
        assert all(mask is not None for mask in recorder.masks)
    assert torch.equal(forward(model, inputs), expected)


@pytest.mark.parametrize("holes", [[1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0, 0, 1]])
def test_a_mask_with_holes_is_kept_and_only_trailing_padding_goes(model, holes, ledger):
    inputs = inputs_for(model, torch.tensor([holes], dtype=torch.float32))
    expected = forward(model, inputs)
    trim_padded_text(model, FAMILY, ledger)
    recorder = Recorder(model)
    assert differs_by_rounding(recorder(inputs), expected, model, inputs)
    assert set(recorder.text) == {max(index for index, real in enumerate(holes) if real) + 1}
    assert all(mask is not None for mask in recorder.masks)


@pytest.mark.parametrize("choice", ["auto", "flex"])
def test_trimmed_text_and_a_swapped_kernel_go_together(model, choice, ledger):
    for lengths in ((5,), (2, 5)):
        inputs = inputs_for(model, mask_of(*lengths))
        expected = forward(model, inputs)
        with Ledger() as both:
            swap_attention(model, choice, both, right_padded=True)
            trim_padded_text(model, FAMILY, both)
            with open_call(None, owner=None):
                assert differs_by_rounding(forward(model, inputs), expected, model, inputs)
            both.undo()


def test_padding_has_no_influence_on_the_refiner_whatever_it_holds(text_to_video, ledger):
    inputs = inputs_for(text_to_video, mask_of(5))
    other = copy.deepcopy(inputs)
    other["encoder_hidden_states"][:, 5:] = 1e3
    expected = forward(text_to_video, inputs)
    trim_padded_text(text_to_video, FAMILY, ledger)
    with open_call(None, owner=None):
        assert torch.equal(forward(text_to_video, other), forward(text_to_video, inputs))
        assert differs_by_rounding(forward(text_to_video, inputs), expected, text_to_video, inputs)


def test_positional_arguments_are_trimmed_too(text_to_video, ledger):
    inputs = inputs_for(text_to_video, mask_of(5))
    expected = forward(text_to_video, inputs)
    trim_padded_text(text_to_video, FAMILY, ledger)
    recorder = Recorder(text_to_video)
    names = ["hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "pooled_projections"]
    positional = [inputs[name] for name in names]
    with open_call(None, owner=None), torch.no_grad():
        out = text_to_video(*positional, guidance=inputs["guidance"], return_dict=False)[0]
    assert differs_by_rounding(out, expected, text_to_video, inputs)
    assert differs_by_rounding(recorder(inputs), expected, text_to_video, inputs)
    assert set(recorder.text) == {5}


def test_lengths_are_read_from_the_device_once_per_mask(text_to_video, ledger, monkeypatch):
    inputs = [inputs_for(text_to_video, mask_of(length)) for length in (5, 3)]
    trim_padded_text(text_to_video, FAMILY, ledger)
    reads = []
    stock = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self, *args, **kwargs: reads.append(1) or stock(self))
    with open_call(None, owner=None):
        for _ in range(3):
            for branch in inputs:
                forward(text_to_video, branch)
        assert len(reads) == 2
        inputs[0]["encoder_attention_mask"][:, :7] = 1
        expected = forward(copy.deepcopy(text_to_video), inputs[0])
        assert differs_by_rounding(forward(text_to_video, inputs[0]), expected, text_to_video, inputs[0])
        assert len(reads) > 2


def test_two_threads_with_different_prompts_do_not_see_each_others_masks(text_to_video, ledger):
    cases = [inputs_for(text_to_video, mask_of(*lengths), seed=seed) for seed, lengths in enumerate(((5, 5), (2, 6)))]
    expected = [forward(text_to_video, case) for case in cases]
    trim_padded_text(text_to_video, FAMILY, ledger)
    worst = [0.0, 0.0]

    def run(index):
        with open_call(None, owner=None):
            for _ in range(20):
                difference = (forward(text_to_video, cases[index]) - expected[index]).abs().max().item()
                worst[index] = max(worst[index], difference)

    at_once(run, range(2))
    for case, stock, difference in zip(cases, expected, worst, strict=True):
        assert differs_by_rounding(stock + difference, stock, text_to_video, case)


def test_compiled_blocks_take_the_trimmed_text_without_a_mask(text_to_video, ledger):
    model = copy.deepcopy(text_to_video)
    inputs = inputs_for(model, mask_of(5))
    expected = forward(model, inputs)
    swap_attention(model, "auto", ledger)
    trim_padded_text(model, FAMILY, ledger)
    torch._dynamo.reset()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend="eager", fullgraph=True)
    with open_call(None, owner=None):
        assert differs_by_rounding(forward(text_to_video, inputs), expected, text_to_video, inputs)


def test_taking_it_off_leaves_stock_classes(text_to_video):
    # By identity: a seamed class says that it equals its stock class.
    stock = [id(type(module)) for module in text_to_video.modules()]
    ledger = Ledger()
    trim_padded_text(text_to_video, FAMILY, ledger)
    assert [id(type(module)) for module in text_to_video.modules()] != stock
    ledger.undo()
    assert [id(type(module)) for module in text_to_video.modules()] == stock


def test_a_family_without_padded_text_is_left_alone():
    pipe = TINY["flux_dev"].build()
    ledger = Ledger()
    trim_padded_text(pipe.transformer, family_named("FluxPipeline"), ledger)
    assert ledger.changes == ()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_whole_generation_changes_by_rounding_only(name):
    entry = TINY[name]
    pipe = entry.build()
    expected = entry.call(pipe, output_type="latent")
    with Ledger() as ledger:
        trim_padded_text(pipe.transformer, FAMILY, ledger)
        recorder = Recorder(pipe.transformer)
        recorder(entry.forward_inputs(pipe))
        assert recorder.masks == [None] * len(recorder.masks)
        with open_call(pipe, owner=None):
            ours = entry.call(pipe, output_type="latent")
            assert is_rounding(float((ours - expected).abs().max()), lambda: entry.floor(output_type="latent"))
        ledger.undo()
