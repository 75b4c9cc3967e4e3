"""`pipeboost.generate_image`, `generate_video` and `load_model`: what they make, refuse, keep warm and write."""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import gc
import itertools
import json
import math
import os
import time
import weakref

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

import pipeboost
from pipeboost import ParallelConfig
from pipeboost.core.errors import ConfigurationError, MissingPackageError, PipeboostError, UnsupportedError, quoted
from pipeboost.core.hardware import device_of
from pipeboost.core.seams import stock_class
from pipeboost.features.offload.place import execution_device
from pipeboost.features.parallel.rank_share import to_be_split
from pipeboost.generate import functions, inputs, loading
from pipeboost.generate.call_arguments import CallSignature
from pipeboost.generate.inputs import load_image
from pipeboost.generate.loading import Lora, ModelSettings
from pipeboost.generate.outputs import write_whole
from pipeboost.generate.requests import make_requests, read_prompts
from tests.pipelines.tiny import TINY, picture
from tests.unit.generate_support import SIZE, built, files_of_at_most, loaded, png, served, stored, stored_lora

CALL = {"max_sequence_length": 35}
TWO_STEPS = {**SIZE, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def _cold():
    yield
    pipeboost.free_models()


@pytest.fixture(scope="module")
def flux():
    with loaded("flux_dev") as model:
        yield model


@pytest.fixture(scope="module")
def wan():
    with loaded("wan21_t2v") as model:
        yield model


def pixels(made) -> np.ndarray:
    return np.asarray(made.image)


def refusal(function, /, **arguments) -> str:
    with pytest.raises(PipeboostError) as caught:
        function(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_an_argument_an_image_of_the_shipped_model_comes_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = pipeboost.generate_image(num_inference_steps=4)
    assert made.image.size == (128, 128)
    assert len(made.report.steps) == 4
    path = made.save()
    assert path.parent == pipeboost.generate.outputs.DEFAULT_FOLDER
    assert str(made.seed) in path.name
    assert np.array_equal(np.asarray(Image.open(path)), pixels(made))


def test_the_same_seed_gives_stocks_image(flux):
    entry = TINY["flux_dev"]
    made = flux.generate_image("a red fox", seed=7, call=CALL, guidance_scale=2.0, **TWO_STEPS)
    generator = torch.Generator("cpu").manual_seed(7)
    arguments = {"prompt": "a red fox", "guidance_scale": 2.0, "generator": generator, **CALL, **TWO_STEPS}
    assert np.array_equal(pixels(made), np.asarray(entry.build()(**arguments).images[0]))


def test_many_prompts_give_a_list_whose_seeds_count_up(flux):
    made = flux.generate_image(["a fox", "a fox"], seed=5, call=CALL, **TWO_STEPS)
    assert [each.seed for each in made] == [5, 6]
    assert not np.array_equal(pixels(made[0]), pixels(made[1]))
    again = flux.generate_image("a fox", seed=6, call=CALL, **TWO_STEPS)
    assert np.array_equal(pixels(again), pixels(made[1]))
    assert len(flux.generate_image(["a fox"], call=CALL, **TWO_STEPS)) == 1


def test_a_seed_is_drawn_and_told_where_none_is_given():
    first, second = (make_requests([{"prompt": "a"}], {})[0].seed for _ in range(2))
    assert first != second


def test_a_model_stays_warm_for_the_same_arguments_and_is_freed_for_others():
    call = {"device": "cpu", "call": CALL, **TWO_STEPS}
    pipeboost.generate_image(stored("flux_dev"), "a fox", **call)
    first = weakref.ref(functions._warm[0].pipe)
    pipeboost.generate_image(stored("flux_dev"), "a dog", **call)
    assert functions._warm[0].pipe is first()
    pipeboost.generate_image(stored("flux_dev"), "a dog", quality="exact", **call)
    gc.collect()
    assert first() is None
    second = weakref.ref(functions._warm[0].pipe)
    pipeboost.free_models()
    gc.collect()
    assert (functions._warm, second()) == ([], None)


def test_a_with_block_frees_its_model_and_a_freed_one_says_so():
    with loaded("flux_dev") as model:
        pipe = weakref.ref(model.pipe)
    gc.collect()
    assert pipe() is None
    assert "was freed" in refusal(model.generate_image, prompt="a fox")
    model.close()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"width": 100}, "width=100 is not a multiple of 16, as FluxPipeline needs; use 96 or 112"),
        ({"width": 8}, "use 16"),
        ({"width": 1000000}, "width=1000000 is more than 16384; use a smaller one"),
        ({"call": {"height": 10**9}}, "height=1000000000 is more than 16384"),
        ({"call": {"latents": 5}}, "call={'latents': 5}: FluxPipeline takes torch.FloatTensor | None; leave"),
        ({"call": {"max_sequence_length": "many"}}, "takes int; leave it out"),
        ({"call": {"sigmas": [1.0, "a"]}}, "takes list[float] | None; leave it out"),
        ({"height": 0}, "height=0 must be an integer of at least 1"),
        ({"num_inference_steps": 1.5}, "num_inference_steps=1.5 must be an integer"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan must be a finite number"),
        ({"seed": -1}, "seed=-1 must be an integer from 0"),
        ({"seed": "one"}, "seed='one' must be an integer"),
        ({"prompt": " "}, "prompt=' ' must be a text that is not empty"),
        ({"prompt": 5}, "prompt=5 must be a text or a list"),
        ({"prompt": ["a", None]}, "prompt=['a', None] must be a text or a list"),
        ({"call": {"prompt": "a"}}, "call={'prompt': ...} is not allowed"),
        ({"call": {"true_cfg_scale": -1}}, "call={'true_cfg_scale': -1} must be a number of at least 0"),
        ({"call": {"latents": torch.zeros(1, 3, 3)}}, "FluxPipeline cannot run with latents of shape (1, 3, 3)"),
        ({"image_path": "ftp://host/a.png"}, "cannot be fetched; only http and https addresses can"),
        ({"prompt": []}, "there is no prompt"),
        ({"image_path": picture()}, "FluxPipeline makes images from text alone"),
        ({"image_path": "nowhere.png"}, "image nowhere.png cannot be read: No such file"),
        ({"num_frames": 5}, "num_frames=5: FluxPipeline, which makes images, has no such argument"),
        ({"negative_prompt": "blurry"}, "does nothing in FluxPipeline at true_cfg_scale=1.0; use call={"),
        ({"call": {"strength": 0.5}}, "strength=0.5: FluxPipeline, which makes images, has no such argument"),
        ({"call": {"output_type": "pt"}}, "call={'output_type': ...} is not allowed"),
        ({"call": "width"}, "call='width' must map"),
        ({"colour": "red"}, "a request has no field 'colour'"),
        ({"call": {"max_sequence_length": 600}}, "FluxPipeline refused the request: `max_sequence_length`"),
    ],
)
def test_a_request_that_the_model_cannot_serve_is_one_sentence(flux, arguments, sentence):
    assert sentence in refusal(flux.generate_image, **{"prompt": "a fox", **arguments})


def test_all_requests_are_checked_before_the_first_one_runs(flux, monkeypatch):
    monkeypatch.setattr(stock_class(flux.pipe), "check_inputs", lambda *_, **__: pytest.fail("ran"))
    requests = make_requests([{"prompt": "a"}, {"prompt": "b", "width": 100}], {})
    with pytest.raises(ConfigurationError, match="width=100"):
        flux.generate(requests)


def test_the_other_kind_names_the_function_to_use(flux, wan):
    assert "FluxPipeline makes images; use generate_image" in refusal(flux.generate_video, prompt="a fox")
    assert "WanPipeline makes videos; use generate_video" in refusal(wan.generate_image, prompt="a fox")
    assert "makes images; use generate_image" in refusal(pipeboost.generate_video)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("flux_dev", "guidance_scale"),
        ("flux_schnell", "true_cfg_scale"),
        ("qwen_image", "true_cfg_scale"),
        ("wan21_t2v", "guidance_scale"),
        ("hunyuan_video", "guidance_scale"),
        ("hunyuan_video_i2v", "true_cfg_scale"),
        ("sd3", "guidance_scale"),
    ],
)
def test_guidance_goes_where_it_acts(name, argument):
    entry = TINY[name]
    pipe = entry.build()
    signature = CallSignature(pipe)
    assert signature.guidance == argument
    images = {"image_path": picture()} if signature.needs_image else {}
    seen = []
    for scale in (2.0, 6.0):
        request = make_requests([{"prompt": "a fox"}], {"guidance_scale": scale, "seed": 1, **images})[0]
        arguments = entry.call_kwargs(generator=torch.Generator("cpu").manual_seed(1))
        for replaced in ("negative_prompt", "true_cfg_scale", "guidance_scale"):
            arguments.pop(replaced, None)
        seen.append(torch.as_tensor(pipe(**{**arguments, **signature.arguments(request)})[0]))
    assert not torch.equal(*seen)


def test_a_negative_prompt_acts_with_guidance_and_is_refused_without():
    with loaded("qwen_image") as model:
        arguments = {"prompt": "a fox", "seed": 1, **TWO_STEPS}
        with_guidance = [model.generate_image(negative_prompt=text, **arguments) for text in (None, "blurry, grey")]
        assert not np.array_equal(*map(pixels, with_guidance))
        line = refusal(model.generate_image, negative_prompt="blurry", guidance_scale=1.0, **arguments)
        assert "does nothing in QwenImagePipeline at true_cfg_scale=1.0; use guidance_scale=4" in line


@functools.cache
def signature_of(name: str) -> CallSignature:
    return CallSignature(TINY[name].build())


NEGATIVE = {"negative_prompt": "grey"}


@pytest.mark.parametrize(
    ("name", "request_", "sentence"),
    [
        ("flux_dev", {"call": {"negative_prompt_2": "grey"}}, "does nothing in FluxPipeline at true_cfg_scale=1.0"),
        ("sd3", {"call": {"negative_prompt_3": "grey"}, "guidance_scale": 1}, "negative_prompt_3='grey' does nothing"),
        ("sd3", {"call": {"skip_layer_guidance_scale": 3.0}}, "without skip_guidance_layers; give both"),
        ("wan21_t2v", {**NEGATIVE, "guidance_scale": 1.0}, "at guidance_scale=1.0; use guidance_scale=4"),
        ("z_image", {**NEGATIVE, "guidance_scale": 0.0}, "at guidance_scale=0.0; use guidance_scale=4"),
        ("z_image", {"call": {"cfg_normalization": True}, "guidance_scale": 0}, "cfg_normalization=True does nothing"),
        ("hunyuan_video", NEGATIVE, "does nothing in HunyuanVideoPipeline at true_cfg_scale=1.0"),
        ("flux_schnell", {"call": {"guidance_scale": 3.0}}, "has no guidance embedding; use true_cfg_scale"),
        ("qwen_image", {"call": {"guidance_scale": 3.0}}, "has no guidance embedding; use true_cfg_scale"),
        ("flux_dev", {"call": {"joint_attention_kwargs": {"colour": 1}}}, "makes no use of 'colour'; leave it out"),
        ("qwen_image", {"call": {"attention_kwargs": {"scale": 0.5}}}, "no use of 'scale' without a LoRA"),
        ("ltx2", {"call": {"attention_kwargs": {"attention_mask": 1}}}, "no use of 'attention_mask'"),
        ("flux_dev", {"call": {"ip_adapter_image": picture()}}, "no IP-Adapter is loaded"),
        ("ltx2", {"call": {"decode_timestep": 0.1}}, "whose VAE is not conditioned on a timestep"),
        ("ltx2", {"call": {"system_prompt": "be brief"}}, "without enable_prompt_enhancement; give both"),
        ("ltx2", {"call": {"max_seconds": 3.0}, "num_frames": 9}, "beside num_frames=9; leave one of them out"),
        ("ltx2", {"call": {"sigmas": [1.0], "timesteps": [1]}}, "timesteps and sigmas contradict each other"),
        (
            "flux_dev",
            {"call": {"sigmas": [1, 0.7, 0.3]}, "num_inference_steps": 2},
            "=2 contradicts sigmas=[1, 0.7, 0.3]",
        ),
        ("flux_dev", {"call": {"sigmas": []}}, "contradicts sigmas=[], which has 0"),
        ("pixart_sigma", {"call": {"eta": 0.5}}, "eta=0.5 does nothing in PixArtSigmaPipeline, for"),
        ("stable_diffusion", {"call": {"kwargs": 1}}, "has no such argument"),
        ("flux_dev", {"call": {"callback_on_step_end_tensor_inputs": ["x"]}}, "without callback_on_step_end"),
        ("flux_dev", {"call": {"width": 64}, "width": 96}, "call={'width': 64} contradicts width=96"),
        ("qwen_image", {"call": {"true_cfg_scale": 5}, "guidance_scale": 3}, "contradicts true_cfg_scale=3"),
        ("flux_dev", {"call": {"num_inference_steps": 0}}, "call={'num_inference_steps': 0} must be an integer of at"),
        ("wan21_t2v", {"call": {"num_frames": 6}}, "num_frames=6 is not one more than a multiple of 4"),
        ("wan21_t2v", {"call": {"guidance_scale": math.nan}}, "call={'guidance_scale': nan} must be made of finite"),
        ("flux_dev", {"call": {"sigmas": [math.inf, 0.5]}}, "must be made of finite numbers"),
        ("flux_dev", {"call": {"true_cfg_scale": 10**400}}, "<an integer of 1329 bits>} must be made of finite"),
        ("flux_dev", {"guidance_scale": 10**400}, "guidance_scale=<an integer of 1329 bits> must be a finite number"),
    ],
)
def test_what_a_pipeline_would_ignore_is_refused(name, request_, sentence):
    def arguments() -> None:
        signature_of(name).arguments(*make_requests([{"prompt": "a fox"}], request_))

    assert sentence in refusal(arguments)


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("flux_true_cfg", {**NEGATIVE, "call": {"true_cfg_scale": 3.0, "negative_prompt_2": "grey"}}),
        ("z_image", {**NEGATIVE, "guidance_scale": 0.5}),
        ("ltx2", {**NEGATIVE, "guidance_scale": 1.0}),  # its sound is guided by a scale of its own
        ("hunyuan_video_15", NEGATIVE),
        ("sd3", {"call": {"skip_guidance_layers": [0], "skip_layer_guidance_scale": 3.0}}),
        ("flux_ip_adapter", {"call": {"joint_attention_kwargs": {"ip_adapter_masks": None}}}),
        ("flux_dev", {"call": {"sigmas": [1, 0.5], "joint_attention_kwargs": {}}, "num_inference_steps": 2}),
        ("flux_dev", {"call": {"width": 96}, "width": 96}),
    ],
)
def test_what_a_pipeline_uses_is_not_refused(name, request_):
    (request,) = make_requests([{"prompt": "a fox"}], request_)
    given = {key: value for key, value in request_.items() if key in ("negative_prompt", "num_inference_steps")}
    assert signature_of(name).arguments(request).items() >= {**request.call, **given}.items()


def test_what_a_call_sets_is_not_asked_for_by_the_models_defaults(tmp_path):
    of_model = {"prompt": "a fox", "width": 128, "num_inference_steps": 28, "call": {"max_sequence_length": 64}}
    for call, width, steps in (({"width": 64}, None, 28), ({"sigmas": [1.0]}, 128, None), ({"max_area": 1}, 128, 28)):
        (request,) = make_requests([{}], {"call": call}, of_model=of_model)
        assert (request.width, request.num_inference_steps) == (width, steps)
        assert request.call == {"max_sequence_length": 64, **call}
    (request,) = make_requests([{"prompt": "a", "call": {"width": 64}}], {"width": 96})
    assert (request.width, request.call) == (None, {"width": 64})


@pytest.mark.parametrize("name", ["wan21_t2v", "qwen_image", "flux_true_cfg"])
def test_a_picture_of_numbers_that_are_not_finite_is_an_error(name):
    frames = {"num_frames": 1} if name == "wan21_t2v" else {}
    with loaded(name) as model:
        decode = model.pipe.vae.decode
        model.pipe.vae.decode = lambda z, **settings: decode(z * math.nan, **settings)
        requests = make_requests([{"prompt": "a"}], {**TWO_STEPS, **frames, "call": CALL})
        with pytest.raises(PipeboostError, match="made a picture of numbers that are not finite"):
            list(model.generate(requests))


LONG = "a fox in the snow and a dog in the rain " * 12


@pytest.mark.parametrize(
    ("name", "encoders"),
    [
        ("flux_dev", {"text_encoder": 77, "text_encoder_2": 35}),
        ("qwen_image", {"text_encoder": 35}),
        ("wan21_t2v", {"text_encoder": 35}),
        ("z_image", {"text_encoder": 35}),
    ],
)
def test_what_is_cut_off_a_long_prompt_is_noted_with_each_encoders_limit(name, encoders):
    frames = {"num_frames": 1} if name == "wan21_t2v" else {}
    arguments = {**TWO_STEPS, **frames, "call": CALL, "seed": 1}
    negative = {} if name == "flux_dev" else {"negative_prompt": LONG}
    with loaded(name) as model:
        requests = [
            make_requests([{"prompt": prompt}], {**arguments, **more})[0]
            for prompt, more in (("a fox", {}), (LONG, {}), (LONG, {}), ("a fox", negative))
        ]
        short, long, again, other = (made.notes for made in model.generate(requests))
        tokenizers = [each for part, each in model.pipe.components.items() if part.startswith("tokenizer")]
    assert short == ()
    assert long == again
    assert [note.split(" tokens of ")[0] for note in long] == [
        f"prompt was cut: {encoder} reads {limit}" for encoder, limit in encoders.items()
    ]
    assert all("in the rain" in note for note in long)
    assert [note.split(" was cut")[0] for note in other] == list(negative)
    assert not any("_pipeboost_chains" in vars(each) for each in tokenizers)


def test_an_edit_model_takes_one_image_and_edit_plus_several(tmp_path):
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    picture().save(first)
    picture(seed=1, width=64).save(second)
    arguments = {"prompt": "a fox", "seed": 1, **TWO_STEPS}
    with built("qwen_image_edit") as model:
        made = [model.generate_image(image_path=path, **arguments) for path in (first, [second])]
        assert not np.array_equal(*map(pixels, made))
        assert "needs an image to start from" in refusal(model.generate_image, **arguments)
        assert "takes one per request" in refusal(model.generate_image, image_path=[first, second], **arguments)
    with built("qwen_image_edit_plus") as model:
        made = [model.generate_image(image_path=paths, **arguments) for paths in (first, [first, second])]
        assert not np.array_equal(*map(pixels, made))


def test_kontext_draws_the_size_that_was_asked_for():
    with loaded("flux_kontext") as model:
        for images in ({}, {"image_path": picture()}):
            made = model.generate_image("a fox", seed=1, call={"_auto_resize": False, **CALL}, **images, **TWO_STEPS)
            assert (made.image.size, made.notes) == ((96, 64), ())


def test_further_pictures_of_a_call_are_read_from_paths(tmp_path):
    mask = tmp_path / "mask.png"
    Image.new("L", (96, 64), 255).save(mask)
    with loaded("flux_fill") as model:
        made = model.generate_image(
            "a fox", image_path=picture(), seed=1, call={"mask_image": str(mask), **CALL}, **TWO_STEPS
        )
        assert made.image.size == (96, 64)
        assert "image gone.png cannot be read" in refusal(
            model.generate_image, prompt="a", image_path=picture(), call={"mask_image": "gone.png"}
        )


@pytest.mark.parametrize("name", ["wan21_t2v", "wan21_i2v", "hunyuan_video"])
def test_a_video_is_written_with_its_frames_size_and_rate(tmp_path, name):
    images = {"image_path": picture()} if name == "wan21_i2v" else {}
    with loaded(name) as model:
        made = model.generate_video("a fox", num_frames=5, fps=12, seed=1, call=CALL, **images, **TWO_STEPS)
    assert made.frames.shape == (5, 64, 96, 3)
    path = made.save(tmp_path / "fox.mp4")
    with av.open(path) as container:
        stream = container.streams.video[0]
        assert (stream.average_rate, stream.width, stream.height, stream.codec.name) == (12, 96, 64, "h264")
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert decoded.shape == made.frames.shape


def test_a_written_video_shows_the_frames(tmp_path):
    ramp = np.linspace(30, 220, 96, dtype=np.uint8)
    frames = np.stack([np.broadcast_to(np.roll(ramp, 8 * n)[None, :, None], (64, 96, 3)) for n in range(6)])
    path = tmp_path / "ramp.mp4"
    pipeboost.GeneratedVideo(prompt="", seed=0, report=None, frames=np.ascontiguousarray(frames)).save(path)
    with av.open(path) as container:
        decoded = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert np.abs(decoded.astype(int) - frames).mean() < 3


def test_a_number_of_frames_that_would_be_rounded_is_refused(wan):
    line = refusal(wan.generate_video, prompt="a fox", num_frames=6)
    assert "num_frames=6 is not one more than a multiple of 4, as WanPipeline needs; use 5 or 9" in line
    assert "fps=0 must be an integer from 1 to 240" in refusal(wan.generate_video, prompt="a fox", fps=0)


def test_without_pyav_saving_a_video_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    made = pipeboost.GeneratedVideo(prompt="a", seed=0, report=None, frames=np.zeros((1, 16, 16, 3), np.uint8))
    with pytest.raises(MissingPackageError, match="pip install av"):
        made.save(tmp_path / "a.mp4")


def test_a_lora_acts_by_its_scale_and_several_add_up(tmp_path):
    path, other = stored_lora(tmp_path), stored_lora(tmp_path, seed=1)
    assert Lora.of(f"{path}=0.3") == Lora.of(f"{path}:0.3") == Lora.of((path, 0.3)) != Lora.of(path)
    drawn = []
    for loras in ((), path, [(path, 0.3)], [f"{path}=0.3", other]):
        with loaded("flux_dev", lora_path=loras) as model:
            drawn.append(pixels(model.generate_image("a fox", seed=1, call=CALL, **TWO_STEPS)).tobytes())
    assert len(set(drawn)) == 4


def test_a_lora_that_is_none_is_refused(tmp_path):
    from safetensors.torch import save_file

    assert "does not exist, and is no hub id" in refusal(Lora.of, given="gone.safetensors=0.5")
    assert "the scale must be a number" in refusal(Lora.of, given=(str(tmp_path), "much"))
    foreign, damaged = tmp_path / "foreign.safetensors", tmp_path / "damaged.safetensors"
    save_file({"something.weight": torch.zeros(2, 2)}, foreign)
    damaged.write_bytes(b"no weights")
    for path in (foreign, damaged):
        line = refusal(pipeboost.load_model, model_path=stored("flux_dev"), lora_path=path, device="cpu")
        assert path.name in line


def test_another_vae_decodes_and_one_that_does_not_fit_is_refused(tmp_path):
    pipe = TINY["flux_dev"].build()
    for parameter in pipe.vae.decoder.parameters():
        parameter.data.mul_(0.5)
    pipe.vae.save_pretrained(tmp_path / "vae")
    drawn = []
    for path in (None, tmp_path / "vae", tmp_path):
        with loaded("flux_dev", vae_path=path) as model:
            drawn.append(pixels(model.generate_image("a fox", seed=1, call=CALL, **TWO_STEPS)).tobytes())
    assert drawn[1] == drawn[2] != drawn[0]
    wider = AutoencoderKL(**{**pipe.vae.config, "latent_channels": 8})
    wider.save_pretrained(tmp_path / "wider")
    for path, sentence in (
        (tmp_path / "wider", "has latent_channels 8, but the model needs 4"),
        (stored("wan21_t2v"), "has class_name AutoencoderKLWan, but the model needs AutoencoderKL"),
        (tmp_path / "gone", "does not exist, and is no hub id"),
        (stored("flux_dev") + "/scheduler", "is not a VAE: it has no config.json and no vae/config.json"),
    ):
        assert sentence in refusal(pipeboost.load_model, model_path=stored("flux_dev"), vae_path=path, device="cpu")


def test_a_vae_of_an_unknown_class_is_one_sentence(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_class_name": "Nothing"}')
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "Nothing"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for model, vae, sentence in (
        (stored("flux_dev"), tmp_path, "has class_name Nothing, but the model needs AutoencoderKL"),
        (tmp_path, stored("flux_dev"), "has no attribute Nothing"),
    ):
        assert sentence in refusal(pipeboost.load_model, model_path=model, vae_path=vae, device="cpu")


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.safetensors").write_bytes(b"")
    broken = tmp_path / "broken"
    DiffusionPipeline.from_pretrained(stored("flux_dev")).save_pretrained(broken)
    (broken / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights")
    for path, sentence in (
        ("gone/far/away", "does not exist, and is no hub id"),
        ("a cat", "does not exist, and is no hub id"),
        (tmp_path / "empty", "is not a Diffusers pipeline: it has no model_index.json"),
        (tmp_path / "file.safetensors", "is a file; it must be the folder"),
        (broken, "cannot be loaded"),
    ):
        assert sentence in refusal(pipeboost.load_model, model_path=path, device="cpu")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quality": "best"}, "quality='best' is not allowed"),
        ({"colour": "red"}, "there is no setting 'colour'"),
        ({"device": "tpu"}, "device='tpu' is not allowed"),
        ({"parallel": {"ulysses": 2}}, "parallel asks for 2 ranks, and this is one; start them by pipeboost.launch"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_is_loaded(monkeypatch, settings, sentence):
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    assert sentence in refusal(pipeboost.generate_image, **settings)


def test_images_come_from_urls(monkeypatch):
    monkeypatch.setattr(inputs, "LARGEST_IMAGE", 100_000)
    answers = {"/a.png": (200, png()), "/gone.png": (404, b""), "/text": (200, b"text"), "/huge": (200, bytes(100_001))}
    with served(answers) as address:
        assert np.array_equal(load_image(f"{address}/a.png"), picture())
        for path, sentence in (
            ("gone.png", "the server answered 404"),
            ("text", "cannot be read as a picture"),
            ("huge", "is larger than"),
        ):
            assert sentence in refusal(load_image, source=f"{address}/{path}")
    assert "cannot be fetched" in refusal(load_image, source=f"{address}/a.png")


def test_a_server_that_drips_or_never_ends_is_left_in_time(monkeypatch):
    monkeypatch.setattr(inputs, "SECONDS_TO_WAIT", 1.0)
    monkeypatch.setattr(inputs, "LARGEST_IMAGE", 2**20)

    def drip():
        for _ in range(50):
            time.sleep(0.1)
            yield b"x"

    def never_end():
        while True:
            yield bytes(2**16)

    with served({"/drip": (200, drip), "/endless": (200, never_end)}) as address:
        began = time.monotonic()
        assert "it did not come within 1 s" in refusal(load_image, source=f"{address}/drip")
        assert time.monotonic() - began < 3
        assert "is larger than 1 MiB" in refusal(load_image, source=f"{address}/endless")


def test_a_redirection_is_followed_to_the_web_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    answers = {
        "/a.png": (200, png()),
        "/moved": (302, b"/a.png"),
        "/ftp": (302, b"ftp://127.0.0.1:9/a.png"),
        "/file": (302, f"file://{tmp_path}/a.png".encode()),
    }
    with served(answers) as address:
        assert load_image(f"{address}/moved").size == picture().size
        assert "cannot be fetched: unknown url type: ftp" in refusal(load_image, source=f"{address}/ftp")
        assert "cannot be fetched: the server answered 302" in refusal(load_image, source=f"{address}/file")


def test_what_is_no_file_is_not_read_as_an_image(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in ("/dev/zero", tmp_path / "pipe"):
        assert "cannot be read: it is a device or a pipe" in refusal(load_image, source=source)
    assert "cannot be read: Is a directory" in refusal(load_image, source=tmp_path)
    for source in ("a\0b", "n" * 5000, "~nosuchuser/a.png"):
        assert len(refusal(load_image, source=source)) < 400


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
def test_an_image_may_be_of_a_common_format_and_damage_is_one_sentence(tmp_path, kind):
    path = tmp_path / "a.img"
    picture().save(path, format=kind)
    assert load_image(path).size == picture().size
    data = bytearray(path.read_bytes())
    for start in range(8, len(data), 97):
        data[start : start + 40] = bytes(40)
    for damaged in (bytes(data), path.read_bytes()[: len(data) // 3]):
        path.write_bytes(damaged)
        try:
            load_image(path)
        except ConfigurationError as error:
            assert str(error).startswith(f"image {path} ")  # noqa: PT017 - some decoders mend it


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "ICO", "DDS", "PDF"])
def test_an_image_of_another_format_is_refused(tmp_path, kind):
    picture().save(tmp_path / "a.png", format=kind)
    assert "or not in one of PNG, JPEG, WEBP" in refusal(load_image, source=tmp_path / "a.png")


def test_odd_exif_data_is_one_sentence_or_none(tmp_path):
    picture().save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with contextlib.suppress(ConfigurationError):
        load_image(tmp_path / "a.jpg")


def test_an_image_is_turned_upright_and_made_rgb(tmp_path):
    image = Image.new("RGBA", (4, 2), "red")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png")
    assert (turned.size, turned.mode) == ((2, 4), "RGB")


def test_a_16_bit_image_keeps_its_greys(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "deep.png")
    read = np.asarray(load_image(tmp_path / "deep.png"))
    assert abs(read.mean() - 127.5) < 1
    assert (read.min(), read.max()) == (0, 255)


@pytest.mark.parametrize("source", [5, b"a.png", None, "a\0b", "http://[::1"])
def test_what_names_no_image_is_refused(source):
    assert "image" in refusal(make_requests, rows=[{"prompt": "a"}], defaults={"image_path": [source]})


def test_half_a_character_and_a_path_that_cannot_be_are_refused():
    for name in ("prompt", "negative_prompt"):
        assert "is not text in UTF-8" in refusal(make_requests, rows=[{"prompt": "a", name: "fox \udcff"}], defaults={})
    for name in ("model_path", "vae_path", "lora_path"):
        for path in ("~nosuchuser/a", "a\0b", "n" * 5000):
            assert f"{name}=" in refusal(ModelSettings.of, **{name: path})
    assert "the scale must be a number" in refusal(Lora.of, given="a" + "=" + "9" * 400)
    assert "the scale must be a number" in refusal(Lora.of, given=("a", 10**400))


def test_no_lora_may_be_said_as_none():
    assert ModelSettings.of(lora_path=None).loras == ()
    assert "lora_path='5' does not exist" in refusal(ModelSettings.of, lora_path=5)


def test_a_link_is_written_through_and_a_device_stays_one(tmp_path):
    target, link, pipe = tmp_path / "a.txt", tmp_path / "link.txt", tmp_path / "pipe"
    link.symlink_to(target)
    write_whole(link, b"new")
    assert (link.is_symlink(), target.read_bytes()) == (True, b"new")
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, b"new")
    assert (os.read(reader, 9), pipe.is_fifo()) == (b"new", True)
    os.close(reader)


def test_a_prompt_file_may_be_text_jsonl_json_or_yaml(tmp_path):
    files = {
        "a.txt": "# scenes\na fox\n\n  a dog  \n",
        "a.jsonl": '{"prompt": "a fox"}\n"a dog"\n',
        "a.json": '["a fox", {"prompt": "a dog"}]',
        "a.yaml": "- a fox\n- prompt: a dog\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_prompts(tmp_path / name) == [{"prompt": "a fox"}, {"prompt": "a dog"}]


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("a.txt", "# only this\n", "holds no prompt"),
        ("a.jsonl", "{", "line 1, is not valid JSON"),
        ("a.jsonl", '{"seed": 1}', "entry 1, must be a prompt"),
        ("a.jsonl", '{"prompt": "a", "sed": 1}', "has no field 'sed'"),
        ("a.yaml", "prompt: a", "must hold a list"),
        ("a.yaml", "[", "is not valid YAML"),
    ],
)
def test_a_wrong_prompt_file_is_refused(tmp_path, name, text, sentence):
    (tmp_path / name).write_text(text)
    assert sentence in refusal(read_prompts, path=tmp_path / name)


def test_json_is_read_as_json(tmp_path):
    (tmp_path / "a.json").write_text('[\n\t"\\ud83d\\ude00",\n\t{"prompt": "a", "guidance_scale": NaN}]')
    first, second = read_prompts(tmp_path / "a.json")
    assert first == {"prompt": "\U0001f600"}
    assert math.isnan(second["guidance_scale"])
    (tmp_path / "b.json").write_text("- a fox\n")
    assert "is not valid JSON" in refusal(read_prompts, path=tmp_path / "b.json")


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join(['*' + before] * 10)}]\n" for before, after in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        "- &a [*a]\n",
        "[" * 5000,
        "- 2020-99-99\n",
        "- !!int ''\n",
        "- {[1]: 2}\n",
        "- !!python/object:os.system x\n",
        "- \x07\n",
        "- " + "9" * 5000,
    ],
    ids=["bomb", "cycle", "deep", "date", "int", "key", "tag", "control", "digits"],
)
def test_what_yaml_cannot_mean_is_one_short_sentence_everywhere(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    for line in (
        refusal(read_prompts, path=tmp_path / "a.yaml"),
        refusal(pipeboost.load_model, config=tmp_path / "a.yaml"),
    ):
        assert "a.yaml" in line
        assert len(line) < 800


def test_an_alias_that_stands_for_little_is_fine(tmp_path):
    (tmp_path / "a.yaml").write_text("- &a {prompt: a fox, seed: 1}\n- {<<: *a, seed: 2}\n- *a\n")
    assert [row["seed"] for row in read_prompts(tmp_path / "a.yaml")] == [1, 2, 1]


def test_a_message_quotes_little_of_a_large_value():
    wide = list(range(10**6))
    for value in ("x" * 10**6, wide, {"a": [wide] * 99}, 16**9999, b"x" * 10**6, Image.new("RGB", (9, 9))):
        assert len(quoted(value)) < 1000
    assert quoted({"a": [1, 2.5, None, "b"]}) == "{'a': [1, 2.5, None, 'b']}"


def test_a_line_separator_inside_a_prompt_ends_no_line(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a\u2028b"}\r\n"c"\n', encoding="utf-8")
    assert [row["prompt"] for row in read_prompts(tmp_path / "p.jsonl")] == ["a\u2028b", "c"]


def test_a_row_wins_over_the_defaults():
    rows = [{"prompt": "a", "seed": 9, "width": 32, "call": {"x": 1}}, {"prompt": "b"}]
    first, second = make_requests(rows, {"seed": 5, "width": 16, "call": {"x": 0, "y": 0}})
    assert (first.seed, first.width, first.call) == (9, 32, {"x": 1, "y": 0})
    assert (second.seed, second.width, second.call) == (6, 16, {"x": 0, "y": 0})


def an_image(**values) -> pipeboost.GeneratedImage:
    defaults = {"image": picture(), "prompt": "A fox, in the snow!", "seed": 3, "report": None}
    return pipeboost.GeneratedImage(**(defaults | values))


def test_many_that_save_into_one_folder_at_once_replace_nothing(tmp_path):
    images = [an_image(image=Image.new("RGB", (8, 8), (n, 0, 0))) for n in range(40)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        paths = list(threads.map(lambda made: made.save(tmp_path), images))
    assert len(set(paths)) == len(os.listdir(tmp_path)) == 40
    assert [Image.open(path).getpixel((0, 0))[0] for path in paths] == list(range(40))


def test_a_home_is_found_in_a_path_and_one_that_is_not_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert an_image().save("~/a.png") == tmp_path / "a.png"
    assert an_image().save("~").parent == tmp_path
    for path in ("~nosuchuser/a.png", "a\0.png", f"{'n' * 300}.png"):
        assert "cannot be a path" in refusal(an_image().save, path=path)


def test_saving_into_a_folder_replaces_nothing(tmp_path):
    names = [an_image().save(tmp_path).name for _ in range(3)]
    assert names == ["a-fox-in-the-snow-seed3.png", "a-fox-in-the-snow-seed3-2.png", "a-fox-in-the-snow-seed3-3.png"]
    assert len(an_image(prompt="long " * 99).save(tmp_path).name) < 80
    assert an_image(prompt="../..").save(tmp_path).parent == tmp_path


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("deep/er/a.webp", "WEBP")])
def test_the_name_says_the_format(tmp_path, name, kind):
    assert Image.open(an_image().save(tmp_path / name)).format == kind


def test_a_format_that_is_not_written_is_refused(tmp_path):
    assert "must be a folder or a file that ends in .png, .jpg" in refusal(an_image().save, path=tmp_path / "a.tiff")


@pytest.mark.parametrize("made", ["image", "video"])
def test_a_write_that_fails_is_one_sentence_and_leaves_the_old_file(tmp_path, made):
    frames = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8)
    video = pipeboost.GeneratedVideo(prompt="a", seed=0, report=None, frames=frames)
    each, path = (an_image(), tmp_path / "a.png") if made == "image" else (video, tmp_path / "a.mp4")
    path.write_bytes(b"old")
    with files_of_at_most(1000):
        line = refusal(each.save, path=path)
    assert f"{path} cannot be written: {os.strerror(errno.EFBIG)}" in line
    assert (os.listdir(tmp_path), path.read_bytes()) == ([path.name], b"old")


def test_every_tiny_pipeline_is_told_apart_by_its_signature():
    for name, entry in TINY.items():
        signature = signature_of(name)
        video = entry.family in ("wan", "hunyuan_video", "hunyuan_video_15", "ltx2")
        assert signature.kind == ("video" if video else "image"), name
        assert signature.needs_image == ("image" in entry.inputs() and name != "flux_kontext"), name
        assert signature.takes_several_images == (name == "qwen_image_edit_plus"), name
        assert signature.size_multiple in ((32,) if entry.family == "ltx2" else (8, 16)), name


def test_a_pipeline_of_neither_kind_is_refused():
    from diffusers import AudioLDM2Pipeline

    with pytest.raises(UnsupportedError, match="AudioLDM2Pipeline makes audios, neither images nor videos"):
        _ = CallSignature(AudioLDM2Pipeline.__new__(AudioLDM2Pipeline)).kind


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            "ran out of the GPU's memory at width=64; make it smaller, or set",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
            "ran out of the host's memory at width=64; make it smaller",
        ),
    ],
    ids=["GPU", "host"],
)
def test_a_device_that_is_too_small_for_a_request_is_one_sentence(flux, monkeypatch, error, sentence):
    def decode(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(flux.pipe.vae, "decode", decode)
    with pytest.raises(PipeboostError, match=sentence):
        flux.generate_image("a fox", width=64, num_inference_steps=1, call=CALL)


def test_weights_that_ranks_will_split_wait_on_the_host_while_the_rest_is_moved(monkeypatch):
    pipe = TINY["flux_dev"].build()
    monkeypatch.setattr(loading, "world_size", lambda: 2)
    monkeypatch.setattr(loading, "local_device", lambda: torch.device("meta"))
    settings = ModelSettings.of(
        stored("flux_dev"), device="cpu", acceleration={"parallel": ParallelConfig(tensor=2)}, ranks=2
    )
    loading._put_on_device(pipe, dataclasses.replace(settings, device="cuda"))
    found = {name: next(module.parameters()).device.type for name, module in models_of(pipe).items()}
    assert found == {"transformer": "cpu", "text_encoder": "cpu", "text_encoder_2": "cpu", "vae": "meta"}
    assert device_of(pipe).type == execution_device(pipe, None).type == "meta"


def test_where_ranks_split_no_weights_all_are_moved(monkeypatch):
    pipe = TINY["flux_dev"].build()
    assert to_be_split(pipe, ParallelConfig(ulysses=2)) == to_be_split(pipe, "auto") == ()
    assert to_be_split(pipe, ParallelConfig(tensor=2, text_encoder=False)) == ("transformer",)
    assert device_of(pipe) == execution_device(pipe, None) == torch.device("cpu")


def models_of(pipe):
    return {name: each for name, each in pipe.components.items() if isinstance(each, torch.nn.Module)}
