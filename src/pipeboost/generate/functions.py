"""`generate_image`, `generate_video` and `load_model`: a model by its path, kept warm from call to call."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias, overload

from pipeboost.generate.call_arguments import Kind
from pipeboost.generate.loading import ModelSettings
from pipeboost.generate.outputs import DEFAULT_FPS, GeneratedImage, GeneratedVideo, check_fps
from pipeboost.generate.requests import FIELDS
from pipeboost.generate.session import LoadedModel, Prompts, requests_of

PathLike: TypeAlias = "str | os.PathLike[str]"

_warm: list[LoadedModel] = []
_lock = threading.RLock()


def load_model(
    model_path: PathLike | None = None,
    *,
    vae_path: PathLike | None = None,
    lora_path: Any = (),
    device: str = "auto",
    **acceleration: Any,
) -> LoadedModel:
    """Load and accelerate a model, to be freed by the `with` block it is used in, or by its `close()`.

        with pipeboost.load_model(quality="fast") as model:
            images = model.generate_image(["a red star", "a blue ring"], seed=1)

    Args:
        model_path: folder of a Diffusers pipeline, or a hub id; None is the demo model that we ship.
        vae_path: folder or hub id of another VAE for it, or of a pipeline that has that VAE.
        lora_path: an adapter or a list of them, each `"PATH"`, `"PATH=SCALE"` or `("PATH", scale)`.
        device: `"auto"`, `"cpu"` or `"cuda"`. Weights are bfloat16 on a GPU and float32 on a CPU.
        acceleration: arguments of `accelerate_pipeline`: `quality`, `attention`, `offload`, `config`, ….

    Raises:
        PipeboostError: something cannot be loaded, or not accelerated as asked.
    """
    return LoadedModel(
        ModelSettings.of(model_path, vae_path=vae_path, lora_path=lora_path, device=device, acceleration=acceleration)
    )


def free_models() -> None:
    """Free the model that `generate_image` and `generate_video` keep for their next call."""
    with _lock:
        while _warm:
            _warm.pop().close()


@overload
def generate_image(model_path: PathLike | None = ..., prompt: str | None = ..., **settings: Any) -> GeneratedImage: ...
@overload
def generate_image(model_path: PathLike | None, prompt: Sequence[str], **settings: Any) -> list[GeneratedImage]: ...
def generate_image(model_path: PathLike | None = None, prompt: Prompts = None, **settings: Any) -> Any:
    """Make images from prompts. The model stays loaded for the next call with the same model and settings.

    Args:
        model_path: folder of a Diffusers pipeline, or a hub id; None is the demo model that we ship.
        prompt: a text, or a list of texts; the demo model has a default.
        negative_prompt: what not to show; needs guidance.
        image_path: picture to edit, or several where the model takes them: paths, http(s) URLs, or pictures.
        width, height, num_inference_steps: None leaves them to the pipeline.
        guidance_scale: goes where the pipeline's guidance is, `true_cfg_scale` where that is the only one that acts.
        seed: request `i` gets seed + `i`; None draws one, which the results show.
        call: further arguments of the pipeline's own call, such as `{"max_sequence_length": 256}`.
        vae_path, lora_path, device, acceleration: as `load_model` takes them.

    Returns:
        A `GeneratedImage` for one prompt, a list of them for a list.

    Raises:
        PipeboostError: something cannot be done as asked; nothing has run then.
    """
    return _generate("image", model_path, prompt, settings)


@overload
def generate_video(model_path: PathLike | None = ..., prompt: str | None = ..., **settings: Any) -> GeneratedVideo: ...
@overload
def generate_video(model_path: PathLike | None, prompt: Sequence[str], **settings: Any) -> list[GeneratedVideo]: ...
def generate_video(
    model_path: PathLike | None = None, prompt: Prompts = None, *, fps: int = DEFAULT_FPS, **settings: Any
) -> Any:
    """Make videos from prompts; all but these arguments are those of `generate_image`.

    Args:
        image_path: the picture that the video starts from, for an image-to-video model.
        num_frames: frames of each video; None leaves it to the pipeline.
        fps: frame rate that `save` writes.

    Returns:
        A `GeneratedVideo` for one prompt, a list of them for a list.

    Raises:
        PipeboostError: something cannot be done as asked, or the model makes images; nothing has run then.
    """
    check_fps(fps)
    return _generate("video", model_path, prompt, settings, fps=fps)


def _generate(
    kind: Kind, model_path: PathLike | None, prompt: Prompts, given: dict[str, Any], *, fps: int = DEFAULT_FPS
) -> Any:
    names = [name for name in FIELDS[1:] if name in given and (kind == "video" or name != "num_frames")]
    request = {name: given.pop(name) for name in names}
    model = {name: given.pop(name) for name in ("vae_path", "lora_path", "device") if name in given}
    settings = ModelSettings.of(model_path, **model, acceleration=given)
    requests = requests_of(settings, prompt, request)
    with _lock:
        if not _warm or _warm[0].settings != settings:
            free_models()  # two may not fit
            _warm.append(LoadedModel(settings))
        return _warm[0].generate_all(kind, prompt, requests, fps=fps)
