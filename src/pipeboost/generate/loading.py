"""Which model a user wants, and loading it: pipeline, another VAE, LoRAs, device, acceleration, in this order."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from pipeboost.core.config import FEATURES, AccelerationConfig, OffloadConfig, ParallelConfig, resolve_config
from pipeboost.core.errors import (
    ConfigurationError,
    MissingPackageError,
    PipeboostError,
    UnsupportedError,
    one_line,
    quoted,
    shortened,
)
from pipeboost.core.hardware import device_type
from pipeboost.core.user_files import user_path
from pipeboost.distributed import local_device, world_size
from pipeboost.features.parallel.rank_share import to_be_split
from pipeboost.generate.requests import is_finite
from pipeboost.stages.report import component_bytes

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WITH_SCALE = re.compile(r"(?P<path>.+)[=:](?P<scale>[-+]?(\d+\.?\d*|\.\d+))")
_ACCELERATION = ("quality", *FEATURES, "config")


def located(given: str | os.PathLike[str], argument: str, thing: str, *files: str) -> str:
    """Return the path of a model's part on this machine, or its hub id.

    Args:
        thing: what it is, with an article.
        files: of which its folder has one; without any, it may be a file itself.

    Raises:
        ConfigurationError: it can be neither.
    """
    path, why = user_path(given, argument), ""
    if path.is_dir() and files and not any((path / name).is_file() for name in files):
        why = f"is not {thing}: it has no {' and no '.join(files)}"
    elif path.exists() and not path.is_dir() and files:
        why = f"is a file; it must be the folder of {thing}, as save_pretrained writes one, or a hub id"
    elif not path.exists() and not _HUB_ID.fullmatch(str(path)):
        why = "does not exist, and is no hub id such as 'Qwen/Qwen-Image'"
    if why:
        raise ConfigurationError(f"{argument}={quoted(str(path))} {why}")
    return str(path)


@contextlib.contextmanager
def loading_errors(argument: str, path: str) -> Iterator[None]:
    """Turn what libraries raise over missing, damaged or too large files into one sentence."""
    what = f"{argument}={quoted(path)}"
    try:
        yield
    except PipeboostError:
        raise
    except torch.OutOfMemoryError as error:
        raise ConfigurationError(f"{what} does not fit into the GPU's memory: {one_line(error)}") from error
    except ImportError as error:
        raise MissingPackageError(f"{what} needs a package that is missing: {one_line(error)}") from error
    except (OSError, ValueError, TypeError, RuntimeError, AttributeError, LookupError, SafetensorError) as error:
        where = "" if Path(path).exists() else " (it is no folder here, and the hub did not give it)"
        raise ConfigurationError(f"{what} cannot be loaded{where}: {one_line(error)}") from error


@dataclass(frozen=True)
class Lora:
    """One adapter.

    Attributes:
        path: a file of weights, a folder with one, or a hub id.
        scale: how strongly it acts; 1 as it was trained.
    """

    path: str
    scale: float = 1.0

    @classmethod
    def of(cls, given: Any) -> Lora:
        """Read `"PATH"`, `"PATH=0.8"`, `"PATH:0.8"` or `("PATH", 0.8)`.

        Raises:
            ConfigurationError: the file or folder does not exist, or the scale is no number.
        """
        path, scale = given if isinstance(given, (tuple, list)) and len(given) == 2 else (str(given), 1.0)
        if not os.path.exists(os.path.expanduser(str(path))) and (match := _WITH_SCALE.fullmatch(str(path))):
            path, scale = match["path"], float(match["scale"])
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not is_finite(scale):
            raise ConfigurationError(
                f"lora_path={quoted(given)}: the scale must be a number, as in 'style.safetensors=0.8'"
            )
        return cls(located(str(path), "lora_path", "a LoRA"), float(scale))


def load_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Load adapters into a pipeline and set their scales.

    Raises:
        MissingPackageError: peft is not installed.
        UnsupportedError: the pipeline takes no LoRA.
        ConfigurationError: a file is no LoRA for this model.
    """
    if not loras:
        return
    if not hasattr(pipe, "load_lora_weights"):
        raise UnsupportedError(f"lora_path: {type(pipe).__name__} takes no LoRA; leave it out")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("a LoRA needs peft: pip install peft") from error
    for number, lora in enumerate(loras):
        path = Path(lora.path)
        where = {"weight_name": path.name} if path.is_file() else {}
        with loading_errors("lora_path", lora.path):
            source = str(path.parent) if where else lora.path
            pipe.load_lora_weights(source, adapter_name=f"lora_{number}", **where)
        if not any(f"lora_{number}" in adapters for adapters in pipe.get_list_adapters().values()):
            raise ConfigurationError(f"lora_path={quoted(lora.path)} holds no weights for {type(pipe).__name__}")
    pipe.set_adapters([f"lora_{n}" for n in range(len(loras))], adapter_weights=[lora.scale for lora in loras])


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Everything that says which model is loaded and how; two equal ones share one loaded model.

    Attributes:
        model_path: folder of a Diffusers pipeline, or a hub id.
        vae_path: folder or hub id of another VAE, or of a pipeline that has it.
        device: `"cpu"` or `"cuda"`.
    """

    model_path: str
    vae_path: str | None
    loras: tuple[Lora, ...]
    device: str
    acceleration: AccelerationConfig

    @classmethod
    def of(
        cls,
        model_path: str | os.PathLike[str] | None = None,
        *,
        vae_path: str | os.PathLike[str] | None = None,
        lora_path: Any = (),
        device: str = "auto",
        acceleration: Mapping[str, Any] | None = None,
        ranks: int | None = None,
    ) -> ModelSettings:
        """Check what a user gave; nothing is loaded.

        Args:
            model_path: None stands for the demo model.
            lora_path: one adapter or a sequence, each as `Lora.of` takes it.
            acceleration: arguments of `accelerate_pipeline`.
            ranks: how many processes will load it together; None for those there are.

        Raises:
            PipeboostError: a path is missing, or a setting is not allowed.
        """
        path = demo_weights() if model_path is None else model_path
        path = located(path, "model_path", "a Diffusers pipeline", "model_index.json")
        vae_files = "config.json", "vae/config.json"
        vae = None if vae_path is None else located(vae_path, "vae_path", "a VAE", *vae_files)
        device = device_type(device)
        given = dict(acceleration or {})
        for name in given:
            if name not in _ACCELERATION:
                raise ConfigurationError(f"there is no setting {quoted(name)}; use one of {', '.join(_ACCELERATION)}")
        settings = resolve_config(given.pop("config", None), given)
        alone = (world_size() if ranks is None else ranks) == 1
        if isinstance(settings.parallel, ParallelConfig) and settings.parallel.size > 1 and alone:
            raise ConfigurationError(
                f"parallel asks for {settings.parallel.size} ranks, and this is one; start them by pipeboost.launch, "
                f"`torchrun --nproc-per-node {settings.parallel.size}` or `pipeboost generate --num-gpus`"
            )
        adapters = lora_path if isinstance(lora_path, (list, tuple)) else (lora_path,)
        return cls(
            model_path=path,
            vae_path=vae,
            loras=tuple(Lora.of(each) for each in adapters if each is not None),
            device=device,
            acceleration=settings,
        )

    @property
    def request_defaults(self) -> dict[str, Any]:
        """What a request gets that says nothing: the demo model's own size and steps; nothing for other models."""
        from pipeboost.demo_model.prompts import DEMO_CALL, DEMO_PROMPTS, WEIGHTS

        if Path(self.model_path).resolve() != WEIGHTS.resolve():
            return {}
        defaults = dict(DEMO_CALL)
        call = {"max_sequence_length": defaults.pop("max_sequence_length")}
        return {"prompt": DEMO_PROMPTS[-1].text, **defaults, "call": call}


def load_pipeline(settings: ModelSettings, on_status: Callable[[str], None] = lambda text: None) -> Any:
    """Load and accelerate a pipeline: bfloat16 on a GPU, float32 on a CPU.

    Args:
        on_status: receives a few words as each part begins.

    Raises:
        PipeboostError: the model, VAE or a LoRA cannot be loaded, or cannot be accelerated as asked.
    """
    from diffusers import DiffusionPipeline, utils

    from pipeboost.acceleration import accelerate_pipeline

    on_status(f"loading {settings.model_path}")
    # Diffusers 0.42 renamed `torch_dtype`; 0.41 would ignore the new name.
    argument = "dtype" if hasattr(utils, "_resolve_dtype") else "torch_dtype"
    dtype = {argument: torch.bfloat16 if settings.device == "cuda" else torch.float32}
    parts = {} if settings.vae_path is None else {"vae": _load_vae(settings, settings.vae_path, **dtype)}
    with loading_errors("model_path", settings.model_path):
        local = Path(settings.model_path).is_dir()
        pipe = DiffusionPipeline.from_pretrained(settings.model_path, local_files_only=local, **dtype, **parts)
    pipe.set_progress_bar_config(disable=True)
    load_loras(pipe, settings.loras)
    with loading_errors("model_path", settings.model_path):
        acceleration = _put_on_device(pipe, settings)
    on_status("accelerating")
    return accelerate_pipeline(pipe, config=acceleration)


def _put_on_device(pipe: Any, settings: ModelSettings) -> AccelerationConfig:
    """Move the weights to the device; those that do not fit stay on the host, from where offload takes them.

    So do those that ranks will split: a device never holds a whole model then.
    """
    on_gpu, acceleration = settings.device == "cuda", settings.acceleration
    waiting = to_be_split(pipe, acceleration.parallel) if on_gpu and world_size() > 1 else ()
    if waiting:
        for name, component in pipe.components.items():
            if isinstance(component, torch.nn.Module) and name not in waiting:
                component.to(local_device())
        return acceleration
    offload = acceleration.offload
    waits = isinstance(offload, OffloadConfig) and not offload.all_resident
    may_wait = on_gpu and (waits or offload == "auto")
    if may_wait and sum(component_bytes(pipe.components).values()) > torch.cuda.mem_get_info()[0]:
        return replace(acceleration, offload=offload if waits else OffloadConfig())
    pipe.to(local_device() if on_gpu else "cpu")
    return acceleration


def demo_weights() -> Path:
    """The folder of the demo model.

    Raises:
        ConfigurationError: this checkout has it not.
    """
    from pipeboost.demo_model.prompts import WEIGHTS

    if not (WEIGHTS / "model_index.json").is_file():
        raise ConfigurationError(
            f"the demo model's weights are not in {WEIGHTS}; check them out, or train them with "
            f"`python -m examples.demo_model.train --out {WEIGHTS}`"
        )
    return WEIGHTS


def _load_vae(settings: ModelSettings, vae_path: str, **dtype: Any) -> Any:
    """Load the VAE that replaces the pipeline's own, which must be of the same class and latent width."""
    import diffusers

    with loading_errors("model_path", settings.model_path):
        index = diffusers.DiffusionPipeline.load_config(settings.model_path)
        own = index.get("vae")
        if not isinstance(own, list):
            raise UnsupportedError(f"vae_path: {index.get('_class_name')} has no VAE; leave vae_path out")
        cls = getattr(diffusers, own[1])
        own = cls.load_config(settings.model_path, subfolder="vae")
    folder = Path(vae_path)
    nested = {"subfolder": "vae"} if folder.is_dir() and not (folder / "config.json").is_file() else {}
    with loading_errors("vae_path", vae_path):
        stored = cls.load_config(vae_path, **nested)
        for name in ("_class_name", "latent_channels", "z_dim"):
            if stored.get(name) != own.get(name):
                found = shortened(str(stored.get(name)))
                raise ConfigurationError(
                    f"vae_path={vae_path!r} has {name.strip('_')} {found}, but the model needs {own.get(name)}"
                )
        return cls.from_pretrained(vae_path, **nested, **dtype)
