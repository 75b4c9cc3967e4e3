"""The stages of a call on real tiny pipelines: found, bit-identical, composed, cancelled, overlapped."""

import contextlib
import copy
import gc
import json
import random
import threading
import time
import weakref

import pytest
import torch

from examples.stages import LatentFilter, PromptRewriter, Watermark
from pipeboost import (
    Cancelled,
    Checks,
    PipeboostError,
    Progress,
    Stage,
    StageParallelism,
    accelerate_pipeline,
)
from pipeboost.contract.call import current_call
from pipeboost.core.errors import ConfigurationError, UnsupportedError
from pipeboost.runner import _scheduler_locks
from pipeboost.stages.call_record import AdmissionQueue, CallRecord
from pipeboost.stages.stage import StageVerificationError
from tests.moments import at_once, freed_at_once, threads_here
from tests.parameters import often
from tests.pipelines.tiny import HEIGHT, OTHER_PROMPT, PROMPT, TINY, tiny_names

FAMILIES = ("flux", "qwen_image", "wan", "hunyuan_video", "hunyuan_video_15", "z_image", "ltx2")
EVERY_CALL_HAS = {
    "input validation",
    "text encoding",
    "timestep preparation",
    "latent preparation",
    "denoising",
    "decoding",
    "postprocessing",
    "other",
}
FROM_IMAGES = {
    "flux_kontext": "image VAE encoding",
    "flux_img2img": "image VAE encoding",
    "flux_ip_adapter": "image encoding",
    "qwen_image_edit": "image VAE encoding",
    "qwen_image_edit_plus": "image VAE encoding",
    "wan21_i2v": "image encoding",
    "wan22_i2v": "image VAE encoding",
    "hunyuan_video_i2v": "image VAE encoding",
    "z_image_img2img": "image VAE encoding",
}


def exact(name, **arguments):
    return accelerate_pipeline(TINY[name].build(), quality="exact", reuse=None, **arguments)


def stock(name, **overrides):
    return TINY[name].stock(**overrides)


class Failing(Stage):
    def run(self, values):
        raise RuntimeError("a stage of the user's failed")


class Heavy(Stage):
    def __init__(self, log):
        self.log = log

    def load(self):
        self.log.append("load")

    def run(self, values):
        self.log.append("run")
        return values

    def offload(self):
        self.log.append("offload")


class Recording(Stage):
    def __init__(self):
        self.seen = []

    def run(self, values):
        self.seen.append(values)
        return values


@pytest.mark.parametrize(
    "name", often([tiny_names(each)[0] for each in FAMILIES] + [*FROM_IMAGES], tiny_names(*FAMILIES))
)
def test_every_stage_is_found_and_the_output_is_stocks(name):
    entry, pipe = TINY[name], exact(name)
    assert torch.equal(entry.call(pipe), stock(name))
    report = pipe.acceleration.report()
    unchecked = {"input validation"} if entry.family == "z_image" else set()
    assert report.stages.keys() >= EVERY_CALL_HAS - unchecked
    assert FROM_IMAGES.get(name, "denoising") in report.stages
    assert set(report.stages) <= set(pipe.acceleration.stages.names)
    assert sum(report.stages.values()) == pytest.approx(report.seconds)
    assert len(report.steps) == int(entry.steps * entry.inputs().get("strength", 1.0))
    assert all(seconds >= 0 for seconds in report.stages.values())


def test_an_unknown_pipeline_gets_what_can_be_found():
    entry = TINY["sd3"]
    pipe = accelerate_pipeline(entry.build(), quality="exact")
    assert torch.equal(entry.call(pipe), entry.call(entry.build()))
    assert pipe.acceleration.report().stages.keys() >= EVERY_CALL_HAS


def test_times_are_exclusive_of_nested_stages():
    """Kontext encodes its image inside `prepare_latents`."""
    pipe = exact("flux_kontext")
    TINY["flux_kontext"].call(pipe)
    trace = {event.stage: event for event in pipe.acceleration.report().trace if event.what == "stage"}
    outer, inner = trace["latent preparation"], trace["image VAE encoding"]
    assert outer.start <= inner.start
    assert inner.start + inner.seconds <= outer.start + outer.seconds
    stages = pipe.acceleration.report().stages
    assert stages["latent preparation"] == pytest.approx(outer.seconds - inner.seconds, abs=1e-4)


@pytest.mark.parametrize("name", often(["flux_dev", "wan21_t2v"], ["qwen_image", "hunyuan_video"]))
def test_the_three_examples_do_what_they_say(name):
    entry, pipe = TINY[name], exact(name)
    pipe.acceleration.add_stage("rewriter", PromptRewriter(" in the rain"), before="text encoding")
    rewritten = entry.call(pipe)
    assert torch.equal(rewritten, stock(name, prompt=PROMPT + " in the rain"))
    pipe.acceleration.add_stage("watermark", Watermark(), after="decoding")
    marked = entry.call(pipe)
    assert torch.equal(marked[..., :-8], rewritten[..., :-8])
    assert marked[..., -8, -8].max() > 0.99
    pipe.acceleration.remove_stage("watermark")
    pipe.acceleration.remove_stage("rewriter")
    pipe.acceleration.add_stage("filter", LatentFilter(), after="denoising")
    latents = entry.call(pipe, output_type="latent")
    assert torch.equal(latents, stock(name, output_type="latent").clamp(-3, 3))
    pipe.acceleration.remove_stage("filter")
    assert torch.equal(entry.call(pipe), stock(name))


def test_stages_are_listed_in_order_and_stand_where_they_were_put():
    pipe = exact("flux_dev")
    acceleration, order = pipe.acceleration, []

    class Noting(Stage):
        def run(self, values):
            order.append(self.name)
            return values

    acceleration.add_stage("b", Noting(), before="decoding")
    acceleration.add_stage("a", Noting(), before="b")
    acceleration.add_stage("c", Noting(), after="decoding")
    acceleration.add_stage("d", Noting(), after="c")
    acceleration.add_stage("loop", Noting(), after="denoising")
    TINY["flux_dev"].call(pipe)
    assert order == ["loop", "a", "b", "c", "d"]
    names = acceleration.stages.names
    assert names[names.index("denoising") :] == (
        "denoising", "loop", "a", "b", "decoding", "c", "d", "postprocessing", "other",
    )  # fmt: skip
    assert "Noting" in str(acceleration.stages)
    assert {"loop", "a", "d"} <= acceleration.report().stages.keys()


@pytest.mark.parametrize("name", often(["qwen_image", "wan21_i2v"], ["flux_dev", "hunyuan_video"]))
def test_replacements_that_do_the_stock_work_change_nothing(name):
    pipe, runs = exact(name), set()
    built_in = {stage: pipe.acceleration.stages[stage] for stage in sorted(EVERY_CALL_HAS - {"denoising", "other"})}

    class Wrapped(Stage):
        def __init__(self, stage):
            self.stage = stage

        def run(self, values):
            runs.add(self.stage)
            return built_in[self.stage].run(values)

    for stage in built_in:
        pipe.acceleration.replace_stage(stage, Wrapped(stage))
    assert torch.equal(TINY[name].call(pipe), stock(name))
    assert runs == set(built_in)
    for stage in built_in:
        pipe.acceleration.remove_stage(stage)
        assert pipe.acceleration.stages[stage] is built_in[stage]


def test_a_replacement_may_do_the_work_itself():
    pipe = exact("flux_dev")
    width = pipe.transformer.config.joint_attention_dim

    class OwnEncoder(Stage):
        def run(self, values):
            return {
                "prompt_embeds": torch.zeros(1, 7, width),
                "pooled_prompt_embeds": torch.zeros(1, pipe.transformer.config.pooled_projection_dim),
                "text_ids": torch.zeros(7, 3),
            }

    class Grey(Stage):
        def run(self, values):
            return {"sample": torch.zeros(1, 3, HEIGHT, HEIGHT)}

    embeds = OwnEncoder().run({})
    given = {name: embeds[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    expected = stock("flux_dev", prompt=None, **given)
    pipe.acceleration.replace_stage("text encoding", OwnEncoder())
    assert torch.equal(TINY["flux_dev"].call(pipe), expected)
    pipe.acceleration.replace_stage("decoding", Grey())
    assert torch.equal(TINY["flux_dev"].call(pipe).unique(), torch.tensor([0.5]))


def test_a_replacement_that_leaves_a_result_out_is_told_so():
    pipe = exact("flux_dev")

    class Forgetful(Stage):
        def run(self, values):
            return {"prompt_embeds": torch.zeros(1, 7, 64)}

    pipe.acceleration.replace_stage("text encoding", Forgetful())
    with pytest.raises(PipeboostError, match="left out 'pooled_prompt_embeds', 'text_ids'"):
        TINY["flux_dev"].call(pipe)


def test_every_failed_check_is_raised_at_once_with_field_value_and_rule():
    pipe = exact("flux_dev")

    class Strict(Stage):
        def verify_input(self, values):
            checks = Checks(values)
            checks.tensor("sample", shape=(1, 4, None, None))
            checks.no_nan("sample")
            checks.positive_integer("nothing")
            return checks.failed

    pipe.acceleration.add_stage("strict", Strict(), after="decoding")
    with pytest.raises(StageVerificationError) as caught:
        TINY["flux_dev"].call(pipe)
    assert [check.field for check in caught.value.failed] == ["sample", "nothing"]
    assert "of shape (1, 4, any, any)" in str(caught.value)
    assert "nothing=None must be a positive integer" in str(caught.value)
    pipe.acceleration.remove_stage("strict")
    assert torch.equal(TINY["flux_dev"].call(pipe), stock("flux_dev"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be a positive integer"),
        ({"num_inference_steps": 2.5, "height": -16}, "2.5 must be a positive integer; height=-16 must be"),
        ({"width": "128"}, "width='128' must be a positive integer"),
    ],
)
def test_arguments_that_stock_would_die_of_are_refused_together(arguments, words):
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    with pytest.raises((ZeroDivisionError, TypeError, RuntimeError)):
        entry.build()(**{**entry.call_kwargs(), **arguments})
    with pytest.raises(StageVerificationError, match=words):
        pipe(**{**entry.call_kwargs(), **arguments})


def test_verification_refuses_nothing_that_stock_accepts():
    entry = TINY["flux_dev"]
    for arguments in (
        {"num_inference_steps": torch.tensor(2)},
        {"num_inference_steps": True},
        {"height": 0, "width": 16},
        {"height": 16, "width": None},
        {"height": float(HEIGHT)},
        {"num_inference_steps": 0, "sigmas": [1.0, 0.5]},
    ):
        kwargs = {**entry.call_kwargs(), **arguments}
        expected = entry.build()(**kwargs)[0]
        kwargs = {**entry.call_kwargs(), **arguments}
        assert torch.equal(exact("flux_dev")(**kwargs)[0], expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.add_stage("x", object(), before="decoding"), "must be an instance of pipeboost.Stage, not object"),
        (lambda a: a.add_stage("x", Stage()), "either before= or after="),
        (lambda a: a.add_stage("x", Stage(), before="decoding", after="decoding"), "either before= or after="),
        (lambda a: a.add_stage("x", Stage(), before="dekoding"), "'dekoding' is not allowed; use one of 'input valid"),
        (lambda a: a.add_stage("decoding", Stage(), after="denoising"), "there is a stage 'decoding' already"),
        (lambda a: a.add_stage("x", Stage(), before="denoising"), "use after='latent preparation'"),
        (lambda a: a.add_stage("x", Stage(), after="other"), "no stage can be added to it"),
        (lambda a: a.replace_stage("denoising", Stage()), "cannot be replaced"),
        (lambda a: a.remove_stage("decoding"), "is built in"),
        (lambda a: a.remove_stage("x"), "'x' is not allowed"),
    ],
)
def test_a_stage_that_cannot_stand_there_is_refused_and_nothing_changes(change, words):
    pipe = exact("flux_dev")
    before = pipe.acceleration.stages.names
    with pytest.raises((ConfigurationError, UnsupportedError), match=words):
        change(pipe.acceleration)
    assert pipe.acceleration.stages.names == before


@pytest.mark.parametrize("kind", StageParallelism)
def test_on_one_rank_every_parallelism_is_the_same(kind):
    pipe, stage = exact("flux_dev"), Recording()
    stage.parallelism = kind
    pipe.acceleration.add_stage("recording", stage, after="decoding")
    pipe.acceleration.stages["decoding"].parallelism = kind
    assert torch.equal(TINY["flux_dev"].call(pipe), stock("flux_dev"))
    assert len(stage.seen) == 1


def test_a_parallelism_that_cannot_be_is_refused_and_says_why():
    pipe, stage = exact("flux_dev"), Stage()
    stage.parallelism = "main rank"
    with pytest.raises(ConfigurationError, match=r"Stage\.parallelism='main rank' is not allowed"):
        pipe.acceleration.add_stage("x", stage, after="decoding")
    for name in ("input validation", "timestep preparation", "denoising", "other"):
        with pytest.raises(UnsupportedError, match="what it does is not in what it returns, so every rank runs it"):
            pipe.acceleration.stages[name].parallelism = StageParallelism.MAIN_RANK


def test_a_stage_is_loaded_before_its_first_run_and_offloaded_when_it_goes():
    pipe, log = exact("flux_dev"), []
    pipe.acceleration.add_stage("heavy", Heavy(log), after="decoding")
    for _ in range(2):
        TINY["flux_dev"].call(pipe)
    pipe.acceleration.remove()
    assert log == ["load", "run", "run", "offload"]


@pytest.mark.parametrize("name", often(["flux_dev"], ["wan22_t2v"]))
def test_an_exception_in_any_stage_leaves_the_pipe_clean(name):
    entry, pipe = TINY[name], exact(name)
    expected = stock(name)
    for built_in in pipe.acceleration.stages.names[:-1]:
        pipe.acceleration.add_stage("failing", Failing(), after=built_in)
        failed = built_in in EVERY_CALL_HAS
        if failed:
            with pytest.raises(RuntimeError, match="of the user's failed"):
                entry.call(pipe)
        pipe.acceleration.remove_stage("failing")
    for component in ("text_encoder", "transformer", "vae"):
        module = getattr(pipe, component)
        hook = next(module.modules()).register_forward_pre_hook(lambda *_: 1 / 0)
        if component != "vae":
            with pytest.raises(ZeroDivisionError):
                entry.call(pipe)
        hook.remove()
    assert torch.equal(entry.call(pipe), expected)
    pipe.acceleration.remove()
    assert torch.equal(entry.call(pipe), expected)


def test_the_trajectory_holds_every_steps_latents_and_timesteps():
    entry, pipe = TINY["wan21_t2v"], exact("wan21_t2v")
    output = pipe(**entry.call_kwargs(steps=3, output_type="latent"), return_trajectory=True)
    assert len(output.trajectory.latents) == len(output.trajectory.timesteps) == 3
    assert torch.equal(output.trajectory.latents[-1], output.frames)
    assert torch.equal(torch.stack(output.trajectory.timesteps), pipe.scheduler.timesteps)
    as_tuple = pipe(**entry.call_kwargs(output_type="latent"), return_dict=False, return_trajectory=True)
    assert len(as_tuple) == 2
    plain = pipe(**entry.call_kwargs(output_type="latent"))
    assert not hasattr(plain, "trajectory")
    pipe.acceleration.remove()
    with pytest.raises(TypeError, match="return_trajectory"):
        pipe(**entry.call_kwargs(), return_trajectory=True)


def test_progress_names_each_stage_and_counts_the_steps():
    entry, pipe = TINY["flux_true_cfg"], exact("flux_true_cfg")
    told: list[Progress] = []
    pipe.acceleration.progress = told.append
    entry.call(pipe, steps=3)
    assert [p.step for p in told if p.step is not None] == [1, 2, 3]
    assert {p.steps for p in told if p.step is not None} == {3}
    stages = [p.stage for p in told]
    assert stages[0] == "input validation"
    assert stages.index("text encoding") < stages.index("denoising") < stages.index("decoding")
    assert [p.seconds for p in told] == sorted(p.seconds for p in told)


def test_a_warm_up_is_not_reported():
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    pipe.acceleration.warm_up(**entry.call_kwargs(steps=1))
    with pytest.raises(PipeboostError, match="call the pipeline first"):
        pipe.acceleration.report()
    entry.call(pipe, steps=3)
    pipe.acceleration.warm_up(**entry.call_kwargs(steps=1))
    assert len(pipe.acceleration.report().steps) == 3


def test_a_report_knows_the_weights_and_writes_a_trace_that_a_browser_reads(tmp_path):
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    with pipe.acceleration.profiled():
        entry.call(pipe)
    report = pipe.acceleration.report()
    assert report.components["transformer"] == sum(p.numel() * 4 for p in pipe.transformer.parameters())
    assert set(report.components) == {"transformer", "text_encoder", "text_encoder_2", "vae"}
    report.to_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"denoising", "decoding"} <= {event["cat"] for event in events if event["ph"] == "X"}
    assert json.loads(report.to_json())["stages"].keys() == report.stages.keys()


def test_fifty_cancellations_at_random_points_leak_nothing():
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    expected = stock("flux_dev")
    entry.call(pipe)
    rng = random.Random(0)
    classes = {name: type(part) for name, part in pipe.components.items()}

    def cancel_after(count):
        def tell(progress):
            nonlocal count
            count -= 1
            if count == 0:
                thread = threading.Thread(target=pipe.acceleration.cancel)
                thread.start()
                thread.join()

        return tell

    gc.collect()
    tensors, threads = _tensors(), threads_here()
    cancelled = 0
    for _ in range(50):
        pipe.acceleration.progress = cancel_after(rng.randint(1, 12))
        try:
            entry.call(pipe, steps=4, output_type="latent")
        except Cancelled:
            cancelled += 1
    pipe.acceleration.progress = None
    assert cancelled > 25
    gc.collect()
    assert _tensors() == tensors
    assert threads_here() == threads
    assert {name: type(part) for name, part in pipe.components.items()} == classes
    assert torch.equal(entry.call(pipe), expected)
    assert not pipe.acceleration._applied.running


def _tensors():
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize("name", often(["qwen_image", "wan22_t2v"], ["flux_dev", "hunyuan_video"]))
def test_two_threads_that_call_one_pipe_never_mix(name):
    entry, pipe = TINY[name], exact(name)
    expected = {seed: stock(name, seed=seed) for seed in range(3)}
    results = {}

    def work(seed):
        results[seed] = entry.call(pipe, seed=seed)

    at_once(work, expected)
    for seed, output in expected.items():
        assert torch.equal(results[seed], output)


@pytest.mark.parametrize("name", often(["flux_true_cfg", "wan22_i2v"], ["qwen_image_edit", "hunyuan_video"]))
def test_overlapped_requests_give_what_they_give_one_by_one(name):
    entry, pipe = TINY[name], exact(name)
    seeds = range(3)

    def requests():
        prompts = [PROMPT, OTHER_PROMPT]
        return [entry.call_kwargs(seed=seed, prompt=prompts[seed % 2], steps=2 + seed % 3) for seed in seeds]

    alone = [pipe(**request)[0] for request in requests()]
    together = [output[0] for output in pipe.acceleration.run_many(requests())]
    assert len(together) == len(alone)
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_after_each_overlapped_output_the_report_is_of_its_request():
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    steps = [5, 1, 4, 2, 3, 1]
    requests = [entry.call_kwargs(seed=seed, steps=count) for seed, count in enumerate(steps)]
    assert [len(pipe.acceleration.report().steps) for _ in pipe.acceleration.run_many(requests)] == steps
    entry.call(pipe, steps=2)
    assert len(pipe.acceleration.report().steps) == 2


def test_overlapped_requests_do_overlap_and_denoise_two_at_a_time():
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    threads = set()

    class Noting(Stage):
        def run(self, values):
            threads.add(threading.current_thread().name)
            return values

    pipe.acceleration.add_stage("note", Noting(), before="decoding")
    denoising, most = 0, 0

    def count(module, args):
        nonlocal denoising, most
        denoising += 1
        most = max(most, denoising)
        time.sleep(0.05)

    def discount(module, args, output):
        nonlocal denoising
        denoising -= 1

    pipe.transformer.register_forward_pre_hook(count)
    pipe.transformer.register_forward_hook(discount)
    list(pipe.acceleration.run_many([entry.call_kwargs(seed=seed) for seed in range(6)]))
    assert most == 2
    assert len(threads) > 1


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_request_denoises_once_few_enough_before_it_do(monkeypatch, at_once):
    monkeypatch.setattr("pipeboost.stages.call_record.AT_ONCE", at_once)
    queue = AdmissionQueue()
    *first, last = [CallRecord() for _ in range(at_once + 1)]
    for record in (*first, last):
        queue.enter(record, alone=False)
    for admission in first:
        admission.begin()
    next_one = threading.Thread(target=last.begin, daemon=True)
    next_one.start()
    next_one.join(0.1)
    assert next_one.is_alive()
    first[0].end()
    next_one.join(10)
    assert not next_one.is_alive()


def test_waiting_for_a_video_vae_that_another_request_uses_is_told_as_waiting():
    entry, pipe = TINY["wan21_t2v"], exact("wan21_t2v")
    pipe.vae.post_quant_conv.register_forward_pre_hook(lambda module, args: time.sleep(0.5))
    requests = [entry.call_kwargs(seed=seed, steps=1) for seed in range(5)]
    stages = [pipe.acceleration.report().stages for _ in pipe.acceleration.run_many(requests)]
    assert max(each.get("waiting", 0.0) for each in stages) > 0.2
    assert max(each["other"] for each in stages) < 0.2


def test_requests_without_a_generator_of_their_own_run_one_by_one_as_stock_would():
    entry, pipe = TINY["flux_dev"], exact("flux_dev")

    def requests():
        return [{**entry.call_kwargs(), "generator": None} for _ in range(3)]

    other = entry.build()
    torch.manual_seed(0)
    expected = [other(**request)[0] for request in requests()]
    torch.manual_seed(0)
    for output, wanted in zip(pipe.acceleration.run_many(requests()), expected, strict=True):
        assert torch.equal(output[0], wanted)


def test_a_request_that_fails_comes_up_in_its_turn_and_ends_the_others():
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    requests = [entry.call_kwargs(seed=seed) for seed in range(6)]
    requests[2]["height"] = -16
    threads = threads_here()
    outputs = []
    with pytest.raises(StageVerificationError, match="height=-16"):
        outputs.extend(pipe.acceleration.run_many(requests))
    iteration = pipe.acceleration.run_many([entry.call_kwargs(seed=seed) for seed in range(6)])
    next(iteration)
    iteration.close()
    assert threads_here() == threads
    assert not pipe.acceleration._applied.running
    assert torch.equal(entry.call(pipe), stock("flux_dev"))


def test_a_stage_that_takes_no_such_value_is_told_what_there_is():
    pipe = exact("flux_dev")

    class Inventing(Stage):
        def run(self, values):
            return values | {"weather": "rain"}

    pipe.acceleration.add_stage("inventing", Inventing(), before="text encoding")
    with pytest.raises(PipeboostError, match="'weather', unknown to its method; it has prompt"):
        TINY["flux_dev"].call(pipe)


def test_a_views_call_runs_the_users_stages_too():
    pipe, recording = exact("flux_dev"), Recording()
    pipe.acceleration.add_stage("recording", recording, after="denoising")
    TINY["flux_dev"].call(copy.copy(pipe))
    assert len(recording.seen) == 1
    assert recording.seen[0]["latents"].ndim == 3


def test_a_pipeline_that_is_dropped_after_calls_with_stages_frees_its_memory_at_once():
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    pipe.acceleration.add_stage("recording", Stage(), after="denoising")
    built_in = pipe.acceleration.stages["decoding"]

    class Wrapped(Stage):
        def run(self, values):
            return built_in.run(values)

    pipe.acceleration.replace_stage("decoding", Wrapped())
    with freed_at_once():
        pipe(**entry.call_kwargs(), return_trajectory=True)
        list(pipe.acceleration.run_many([entry.call_kwargs(seed=seed) for seed in range(3)]))
        pipe.acceleration.add_stage("failing", Failing(), after="denoising")
        with pytest.raises(RuntimeError):
            entry.call(pipe)
        pipe.acceleration.report()
        vars(pipe.transformer).pop("_diffusers_hook", None)  # a cycle of Diffusers' own
        transformer = weakref.ref(pipe.transformer)
        del pipe
        assert transformer() is None


@contextlib.contextmanager
def a_call_that_waits(pipe):
    """Inside, a call in another thread waits for its turn; yields the list that its result, or error, comes to."""
    results = []

    def work():
        try:
            results.append(TINY["flux_dev"].call(pipe))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=work)
    with _scheduler_locks.of(pipe.scheduler):
        thread.start()
        time.sleep(0.1)
        yield results
    thread.join(60)


def test_cancel_ends_a_call_that_waits_for_its_turn_too():
    pipe = exact("flux_dev")
    with a_call_that_waits(pipe) as results:
        pipe.acceleration.cancel()
    assert isinstance(results[0], Cancelled)
    assert torch.equal(TINY["flux_dev"].call(pipe), stock("flux_dev"))


def test_a_call_that_waits_while_the_acceleration_is_removed_runs_stock_and_leaves_no_layer():
    pipe = exact("flux_dev")
    with a_call_that_waits(pipe) as results:
        pipe.acceleration.remove()
    assert torch.equal(results[0], stock("flux_dev"))
    assert not any("_pipeboost_chains" in vars(part) for part in (pipe, pipe.transformer, pipe.vae, pipe.scheduler))


def test_a_cancelled_request_that_waits_for_the_denoiser_never_denoises(monkeypatch):
    monkeypatch.setattr("pipeboost.stages.call_record.AT_ONCE", 1)
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    forwards = []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(current_call()))

    second_waits = threading.Barrier(2, timeout=60)

    def cancel_the_next(progress):
        if progress.step == 1 or (progress.stage == "waiting" and forwards):
            second_waits.wait()
        if progress.step == 1:
            for call in tuple(pipe.acceleration._applied.running):
                if call is not current_call():
                    pipe.acceleration.cancel(call)

    pipe.acceleration.progress = cancel_the_next
    with pytest.raises(Cancelled):
        list(pipe.acceleration.run_many([entry.call_kwargs(seed=seed) for seed in range(2)]))
    assert len(set(map(id, forwards))) == 1


def test_a_stage_removed_during_a_call_runs_to_its_end_and_is_offloaded_with_the_others():
    entry, pipe, log = TINY["flux_dev"], exact("flux_dev"), []
    pipe.acceleration.add_stage("heavy", Heavy(log), after="decoding")

    def remove_it(pipe, step, timestep, values):
        if step == 0:
            pipe.acceleration.remove_stage("heavy")
        return {}

    entry.call(pipe, callback_on_step_end=remove_it)
    entry.call(pipe)
    pipe.acceleration.remove()
    assert log == ["load", "run", "offload"]


def test_a_call_inside_a_call_leaves_the_outer_ones_stages_loaded_under_offload():
    entry, pipe, log = TINY["flux_dev"], exact("flux_dev", offload="stage"), []

    class Calling(Heavy):
        def run(self, values):
            if len(pipe.acceleration._applied.running) == 1:
                view = copy.copy(pipe)
                view.scheduler = copy.deepcopy(pipe.scheduler)
                entry.call(view)
            return super().run(values)

    pipe.acceleration.add_stage("calling", Calling(log), after="denoising")
    assert torch.equal(entry.call(pipe), stock("flux_dev"))
    assert log == ["load", "run", "run", "offload"]


def test_one_stage_stands_in_one_place():
    pipe = exact("flux_dev")
    stage, built_in = Stage(), pipe.acceleration.stages["decoding"]
    pipe.acceleration.add_stage("a", stage, after="decoding")
    with pytest.raises(ConfigurationError, match="'b' stands at 'a' already; use another instance of Stage"):
        pipe.acceleration.add_stage("b", stage, after="decoding")
    pipe.acceleration.replace_stage("decoding", Stage())
    with pytest.raises(ConfigurationError, match="'c' stands at 'decoding' already"):
        pipe.acceleration.add_stage("c", built_in, after="decoding")
    pipe.acceleration.replace_stage("decoding", built_in)
    pipe.acceleration.remove_stage("a")
    assert torch.equal(TINY["flux_dev"].call(pipe), stock("flux_dev"))


def test_a_built_in_stage_runs_only_from_the_stage_that_replaces_it():
    pipe = exact("flux_dev")
    decoding = pipe.acceleration.stages["decoding"]

    class Confused(Stage):
        def run(self, values):
            return decoding.run(values)

    pipe.acceleration.replace_stage("text encoding", Confused())
    with pytest.raises(PipeboostError, match="'decoding' runs inside a call, from the stage that replaces it"):
        TINY["flux_dev"].call(pipe)


@pytest.mark.parametrize("name", ["flux_dev", "sd3"])
def test_a_replacement_may_return_its_results_in_any_order(name):
    entry, pipe = TINY[name], accelerate_pipeline(TINY[name].build(), quality="exact")
    kept, built_in = [], pipe.acceleration.stages["text encoding"]

    class Keeping(Stage):
        def run(self, values):
            kept.append(built_in.run(values))
            return kept[-1]

    class Kept(Stage):
        def run(self, values):
            return dict(reversed(kept[0].items()))

    pipe.acceleration.replace_stage("text encoding", Keeping())
    expected = entry.call(pipe)
    pipe.acceleration.replace_stage("text encoding", Kept())
    assert torch.equal(entry.call(pipe), expected)


def test_a_stage_in_place_of_input_validation_knows_the_calls_arguments():
    pipe = exact("flux_dev")

    class Own(Stage):
        def verify_input(self, values):
            assert "callback_on_step_end_tensor_inputs" in values
            assert self.arguments["num_inference_steps"] == 2
            return []

    pipe.acceleration.replace_stage("input validation", Own())
    assert torch.equal(TINY["flux_dev"].call(pipe), stock("flux_dev"))


def test_a_users_stage_at_a_shared_component_keeps_no_other_view_waiting():
    entry, pipe = TINY["flux_dev"], exact("flux_dev")
    both = threading.Barrier(2, timeout=60)

    class Meeting(Stage):
        def run(self, values):
            both.wait()
            return values

    pipe.acceleration.add_stage("meeting", Meeting(), after="decoding")
    results = list(pipe.acceleration.run_many([entry.call_kwargs(seed=seed) for seed in range(2)]))
    assert torch.equal(results[1][0], stock("flux_dev", seed=1))
