"""A prompt is encoded once: as long as everything its embeddings depend on is the same, and to the bit as stock."""

import copy
import weakref

import pytest
import torch
from peft import LoraConfig
from PIL import Image

from pipeboost import ReuseConfig, accelerate_pipeline
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.seams import middleware_of
from tests.moments import at_once, freed_at_once
from tests.pipelines.tiny import OTHER_PROMPT, TINY, load_tiny_lora, picture
from tests.pipelines.tiny_flux import parts

FAMILIES = ("flux_dev", "flux_true_cfg", "qwen_image", "wan21_t2v", "wan21_i2v", "hunyuan_video")
EDITS = ("qwen_image_edit", "qwen_image_edit_plus", "hunyuan_video_i2v")
ENTRY = TINY["flux_dev"]
ENCODERS = ("text_encoder", "text_encoder_2")


class Runs:
    """Counts real forwards of a pipeline's encoders."""

    def __init__(self, pipe):
        self.count = 0
        for name in ENCODERS:
            encoder = getattr(pipe, name, None)
            if encoder is not None:
                encoder.register_forward_hook(self._count)

    def _count(self, *_):
        self.count += 1

    def of(self, run):
        before = self.count
        result = run()
        return self.count - before, result


def accelerated(entry=ENTRY, **settings):
    pipe = accelerate_pipeline(entry.build(), quality="exact", **settings)
    return pipe, Runs(pipe)


def call(pipe, entry=ENTRY, **arguments):
    """A short call; prompts are heard in its latents."""
    return entry.call(pipe, **{"output_type": "latent", **arguments})


def encoded(entry, pipe, runs, **arguments):
    """How many forwards of encoders one short call makes."""
    return runs.of(lambda: call(pipe, entry, steps=1, **arguments))[0]


@pytest.mark.parametrize("name", [*FAMILIES, *EDITS])
def test_the_second_call_runs_no_encoder_and_is_bit_identical_to_stock(name):
    entry = TINY[name]
    expected = entry.stock(output_type="latent")
    pipe, runs = accelerated(entry)
    first, output = runs.of(lambda: call(pipe, entry))
    assert first > 0
    assert torch.equal(output, expected)
    again, output = runs.of(lambda: call(pipe, entry))
    assert again == 0
    assert torch.equal(output, expected)
    assert encoded(entry, pipe, runs, prompt=OTHER_PROMPT) > 0
    assert encoded(entry, pipe, runs) == 0
    pipe.acceleration.remove()
    again, output = runs.of(lambda: call(pipe, entry))
    assert again == first
    assert torch.equal(output, expected)


@pytest.mark.parametrize("name", EDITS)
def test_another_picture_is_encoded_anew(name):
    entry = TINY[name]
    pipe, runs = accelerated(entry)
    encoded(entry, pipe, runs)
    image = entry.call_kwargs()["image"]
    changed = [picture(seed=7)] * len(image) if isinstance(image, list) else picture(seed=7, width=image.width)
    changed = changed.resize(image.size) if isinstance(changed, Image.Image) else changed
    assert encoded(entry, pipe, runs, image=changed) > 0
    assert encoded(entry, pipe, runs) == 0


def _text_lora(pipe, *, name="text", seed=0):
    """A random LoRA on CLIP, through Diffusers' own loader."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for path, module in pipe.text_encoder.named_modules():
        path = path.removesuffix(".base_layer")
        if isinstance(module, torch.nn.Linear) and path.endswith(("q_proj", "v_proj")):
            for factor, shape in (("lora_A", (4, module.in_features)), ("lora_B", (module.out_features, 4))):
                weights[f"text_encoder.{path}.{factor}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    pipe.load_lora_weights(weights, adapter_name=name)


def _own_tokenizers(pipe):
    """The tiny pipelines share theirs."""
    pipe.tokenizer, pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.tokenizer_2)


def _data(pipe):
    pipe.text_encoder_2.shared.weight.data[5] += 1


def _in_place(pipe):
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight[0, 0] += 1


def _other_encoder(pipe):
    torch.manual_seed(3)
    pipe.text_encoder_2 = parts.t5_encoder()


def _other_tokenizer(pipe):
    pipe.tokenizer = copy.deepcopy(pipe.tokenizer)


def _padding_side(pipe):
    pipe.tokenizer_2.padding_side = "left"


def _tokens(pipe):
    pipe.tokenizer.add_tokens(["xyzzy"])


def _attention(pipe):
    pipe.text_encoder_2.set_attn_implementation("eager")


def _longest(pipe):
    pipe.tokenizer_max_length = 40


CHANGES = {
    change.__name__: change
    for change in (
        _text_lora,
        _data,
        _in_place,
        _other_encoder,
        _other_tokenizer,
        _padding_side,
        _tokens,
        _attention,
        _longest,
    )
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_encodes_is_a_miss_and_the_output_is_that_of_stock(change):
    stock, (pipe, runs) = ENTRY.build(), accelerated()
    _own_tokenizers(stock)
    _own_tokenizers(pipe)
    before = call(stock)
    CHANGES[change](stock)
    expected = call(stock)
    assert torch.equal(call(pipe), before)
    CHANGES[change](pipe)
    runs = Runs(pipe) if change == "_other_encoder" else runs
    count, output = runs.of(lambda: call(pipe))
    assert count > 0
    assert torch.equal(output, expected)
    assert encoded(ENTRY, pipe, runs) == 0


def test_every_state_of_a_lora_on_a_text_encoder_is_its_own():
    stock = ENTRY.build()
    pipe, runs = accelerated()

    def both(change):
        change(stock)
        change(pipe)
        count, output = runs.of(lambda: call(pipe))
        again, repeated = runs.of(lambda: call(pipe))
        expected = call(stock)
        assert torch.equal(output, expected)
        assert torch.equal(repeated, expected)
        assert again == 0
        return count, expected

    steps = {
        "load": _text_lora,
        "scale": lambda p: p.set_adapters(["text"], [0.5]),
        "disable": lambda p: p.disable_lora(),
        "enable": lambda p: p.enable_lora(),
        "second": lambda p: _text_lora(p, name="other", seed=1),
        "switch": lambda p: p.set_adapters(["other"]),
        "fuse": lambda p: p.fuse_lora(components=["text_encoder"]),
        "unfuse": lambda p: p.unfuse_lora(components=["text_encoder"]),
        "unload": lambda p: p.unload_lora_weights(),
    }
    counts, outputs = zip(*[both(change) for change in steps.values()], strict=True)
    # Enabling goes back to the state that "scale" left, and a newly loaded adapter is the active one already.
    assert [name for name, count in zip(steps, counts, strict=True) if count == 0] == ["enable", "switch"]
    assert not torch.equal(outputs[0], outputs[1])


def test_a_lora_on_the_transformer_leaves_prompts_alone():
    pipe, runs = accelerated()
    encoded(ENTRY, pipe, runs)
    load_tiny_lora(pipe)
    assert encoded(ENTRY, pipe, runs) == 0


def test_a_transformers_adapter_counts_too():
    pipe, runs = accelerated()
    encoded(ENTRY, pipe, runs)
    torch.manual_seed(0)
    pipe.text_encoder_2.add_adapter(LoraConfig(r=2, target_modules=["q"], init_lora_weights=False))
    pipe.text_encoder_2.eval()
    assert encoded(ENTRY, pipe, runs) > 0
    assert encoded(ENTRY, pipe, runs) == 0
    pipe.text_encoder_2.disable_adapters()
    assert encoded(ENTRY, pipe, runs) > 0


@pytest.mark.parametrize("scale", [0.5, 0.3, 0.0])
def test_a_lora_scale_of_the_call_leaves_the_pipeline_as_stock_does(scale):
    def outcome(pipe):
        outputs = [call(pipe, joint_attention_kwargs={"scale": scale}), call(pipe)]
        outputs += [call(pipe, joint_attention_kwargs={"scale": scale}), call(pipe)]
        scales = [module.scaling for module in pipe.text_encoder.modules() if hasattr(module, "scaling")]
        return outputs, scales, vars(pipe).get("_lora_scale")

    stock, (pipe, _) = ENTRY.build(), accelerated()
    for each in (stock, pipe):
        _text_lora(each)
        each.set_adapters(["text"], [0.7])
    expected, ours = outcome(stock), outcome(pipe)
    assert all(torch.equal(a, b) for a, b in zip(expected[0], ours[0], strict=True))
    assert expected[1:] == ours[1:]


def test_the_arguments_count():
    entry = TINY["wan21_t2v"]
    pipe, runs = accelerated(entry)
    encoded(entry, pipe, runs)
    for change in (
        {"max_sequence_length": 24},
        {"negative_prompt": "grey"},
        {"num_videos_per_prompt": 2},
        {"guidance_scale": 1.0},
        {"prompt": [entry.call_kwargs()["prompt"]] * 2, "negative_prompt": ["a", "b"]},
    ):
        assert encoded(entry, pipe, runs, **change) > 0, change
        assert encoded(entry, pipe, runs, **change) == 0, change
    assert encoded(entry, pipe, runs, guidance_scale=5.0) == 0


def test_the_numerical_settings_count():
    pipe, runs = accelerated()
    encoded(ENTRY, pipe, runs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoded(ENTRY, pipe, runs) > 0
        assert encoded(ENTRY, pipe, runs) == 0
    assert encoded(ENTRY, pipe, runs) == 0


def test_embeddings_given_by_the_user_pass_through():
    pipe, _ = accelerated()
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(prompt="a", prompt_2=None, max_sequence_length=35)
    given = {"prompt": None, "prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
    expected = call(ENTRY.build(), **given)
    for _ in range(2):
        assert torch.equal(call(pipe, **given), expected)
    assert pipe.acceleration._applied.context.joined["reuse"].store.size == 0


def test_an_encoder_in_training_mode_is_never_reused():
    pipe, runs = accelerated()
    pipe.text_encoder_2.train()
    assert encoded(ENTRY, pipe, runs) == encoded(ENTRY, pipe, runs) > 0


def test_an_encoder_that_draws_random_numbers_is_never_reused():
    pipe, runs = accelerated()
    pipe.text_encoder_2.register_forward_hook(lambda *_: torch.rand(1) and None)
    assert encoded(ENTRY, pipe, runs) == encoded(ENTRY, pipe, runs) > 0


def test_an_encoder_that_changes_while_it_encodes_is_never_reused():
    pipe, runs = accelerated()
    encoder = pipe.text_encoder_2
    encoder.register_forward_hook(lambda *_: setattr(encoder, "turns", encoder.turns + 1))
    for _ in range(2):
        encoder.turns = 0
        assert encoded(ENTRY, pipe, runs) > 0
        assert encoder.turns == 1


def test_a_weight_that_changes_while_it_encodes_is_seen():
    pipe, runs = accelerated()
    weight = pipe.text_encoder_2.shared.weight
    pipe.text_encoder_2.register_forward_hook(lambda *_: _turn(weight))
    assert encoded(ENTRY, pipe, runs) > 0
    assert pipe.acceleration._applied.context.joined["reuse"].store.size == 0


def _turn(weight):
    weight.neg_()


def test_a_hit_leaves_the_attributes_that_the_script_would_have_set():
    pipe, runs = accelerated()
    counts = []
    for scale in (0.5, 0.25, 0.5):
        counts.append(encoded(ENTRY, pipe, runs, joint_attention_kwargs={"scale": scale}) > 0)
        assert pipe._lora_scale == scale
    assert counts == [True, True, False]
    for repeated in (False, True):
        assert (encoded(ENTRY, pipe, runs) == 0) is repeated
        assert pipe._lora_scale == (0.25 if repeated else 0.5)
        encoded(ENTRY, pipe, runs, joint_attention_kwargs={"scale": 0.25})


@pytest.mark.parametrize("attribute", ["tone", "_tone"])
def test_whatever_somebody_elses_pipeline_encodes_by_counts(attribute):
    class Toned(type(ENTRY.build())):
        style = property(lambda self: getattr(self, attribute))

        def encode_prompt(self, prompt, prompt_2=None, **others):
            return super().encode_prompt(f"{prompt} {self.style}", prompt_2, **others)

    pipe = ENTRY.build()
    pipe.__class__ = Toned
    accelerate_pipeline(pipe, quality="exact")
    runs = Runs(pipe)
    for tone in ("warm", "cold"):
        setattr(pipe, attribute, tone)
        assert encoded(ENTRY, pipe, runs) > 0
        assert encoded(ENTRY, pipe, runs) == 0


def test_what_an_offloader_does_keeps_the_prompts():
    pipe, runs = accelerated()
    first = call(pipe)
    for name in ENCODERS:
        for tensor in (*getattr(pipe, name).parameters(), *getattr(pipe, name).buffers()):
            tensor.data = tensor.data.clone()
    count, output = runs.of(lambda: call(pipe))
    assert count == 0
    assert torch.equal(output, first)


def test_what_the_script_does_to_embeddings_in_place_does_not_reach_the_store():
    pipe, runs = accelerated()
    expected = call(pipe)

    def spoil(pipe, step, timestep, kwargs):
        kwargs["prompt_embeds"].zero_()
        return kwargs

    spoiled = {"callback_on_step_end": spoil, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    call(pipe, **spoiled)
    assert torch.equal(call(pipe), expected)
    assert runs.count == 2


def test_the_bound_is_kept():
    pipe, runs = accelerated(reuse=ReuseConfig(max_bytes=12_000))
    store = pipe.acceleration._applied.context.joined["reuse"].store
    for prompt in ("a", "b", "c"):
        encoded(ENTRY, pipe, runs, prompt=prompt)
        assert 0 < store.size <= 12_000
    assert encoded(ENTRY, pipe, runs, prompt="c") == 0
    assert encoded(ENTRY, pipe, runs, prompt="a") > 0
    pipe, runs = accelerated(reuse=ReuseConfig(max_bytes=100))
    assert encoded(ENTRY, pipe, runs) == encoded(ENTRY, pipe, runs) > 0


@pytest.mark.parametrize("off", [None, False, "off"])
def test_the_argument_turns_it_off(off):
    pipe, runs = accelerated(reuse=off)
    assert not middleware_of(pipe, "encode_prompt") or len(middleware_of(pipe, "encode_prompt")) == 1
    assert "turned off" in pipe.acceleration.plan["reuse"].why
    assert encoded(ENTRY, pipe, runs) == encoded(ENTRY, pipe, runs) > 0


def test_a_pipeline_without_encode_prompt_says_so():
    class WithoutDoor(type(ENTRY.build())):
        encode_prompt = None

    pipe = ENTRY.build()
    pipe.__class__ = WithoutDoor
    accelerate_pipeline(pipe)
    assert pipe.acceleration.plan["reuse"].why == "the pipeline has no encode_prompt"
    with pytest.raises(UnsupportedError, match="reuse keeps what encode_prompt returns, which WithoutDoor does not"):
        accelerate_pipeline(pipe, reuse=ReuseConfig())


def test_outside_a_call_paused_or_with_gradients_nothing_is_reused():
    pipe, runs = accelerated()
    encoded(ENTRY, pipe, runs)
    with pipe.acceleration.paused():
        assert encoded(ENTRY, pipe, runs) > 0
    with torch.no_grad():
        assert runs.of(lambda: pipe.encode_prompt(prompt="a", prompt_2=None))[0] > 0
    with pipe.acceleration.open(), torch.enable_grad():
        _, embeds = runs.of(lambda: pipe.encode_prompt(prompt="a", prompt_2=None))
    assert embeds[0].requires_grad


def test_remove_and_a_dropped_pipeline_free_every_embedding():
    for drop in ("remove", "forget"):
        pipe, runs = accelerated()
        encoded(ENTRY, pipe, runs)
        acceleration = pipe.acceleration if drop == "remove" else None
        store = pipe.acceleration._applied.context.joined["reuse"].store
        kept = weakref.ref(next(iter(store._entries.values())).returned[0])
        del store, runs
        with freed_at_once():
            if acceleration is not None:
                acceleration.remove()
            del pipe
            assert kept() is None, drop


def test_views_in_threads_share_what_is_kept_and_each_gets_its_own_prompt():
    stock = ENTRY.build()
    prompts = ("a cat", "a dog", "a cat", "a fox")
    expected = {prompt: call(stock, prompt=prompt) for prompt in set(prompts)}
    pipe, runs = accelerated()
    wrong = []

    def work(prompt):
        view = copy.copy(pipe)
        view.scheduler = copy.deepcopy(pipe.scheduler)
        for _ in range(3):
            if not torch.equal(call(view, prompt=prompt), expected[prompt]):
                wrong.append(prompt)

    at_once(work, prompts)
    assert not wrong
    assert len(middleware_of(pipe, "encode_prompt")) == 2
    for prompt in prompts:
        assert encoded(ENTRY, pipe, runs, prompt=prompt) == 0


def test_a_view_with_an_encoder_of_its_own_has_prompts_of_its_own():
    pipe, runs = accelerated()
    encoded(ENTRY, pipe, runs)
    view = copy.copy(pipe)
    _other_encoder(view)
    assert encoded(ENTRY, view, runs) > 0
    assert encoded(ENTRY, pipe, runs) == 0
    assert encoded(ENTRY, view, runs) == 0


def test_the_counts_of_a_call_are_in_its_report():
    pipe, _ = accelerated(TINY["flux_true_cfg"])
    call(pipe, TINY["flux_true_cfg"])
    assert pipe.acceleration.report().reuse == {"hits": 0, "misses": 2, "passed": 0}
    call(pipe, TINY["flux_true_cfg"])
    assert pipe.acceleration.report().reuse == {"hits": 2, "misses": 0, "passed": 0}
