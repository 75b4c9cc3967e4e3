"""What a user can ask for: quality tiers and one frozen dataclass per feature, checked in this one place.

Every argument takes `"auto"`, `None`/`False` (off), a short name, or the dataclass. Keyword arguments win over a
config object or file, which wins over `PIPEBOOST_*` environment variables.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch.distributed

from pipeboost.core.cache_config import STEP_MASKS
from pipeboost.core.cache_config import CacheConfig as CacheConfig
from pipeboost.core.config_checks import (
    field_names,
    from_mapping,
    is_number,
    names_among,
    require_integer,
    require_one_of,
)
from pipeboost.core.config_sources import environment_settings, file_settings
from pipeboost.core.errors import ConfigurationError, quoted

TIERS = ("exact", "lossless", "balanced", "fast")
FEATURES = ("attention", "parallel", "cache", "compile", "quantize", "offload", "reuse")
COMPILE_SCOPES = ("regional", "full")
QUANTIZE_SCHEMES = ("fp8",)
REWRITES = (
    "cat_of_slices",
    "norm_rotary",
    "modulated_norm",
    "float8_rows",
    "real_rotary",
    "gelu_gemm",
    "conv_layout",
    "cat_gemm",
)
OFFLOAD_POLICIES = ("resident", "stage", "layerwise")
OFFLOAD_KINDS = ("text_encoders", "transformers", "vae")


def tier_allows(tier: str, needed: str) -> bool:
    """Whether a tier permits what the tier `needed` introduces."""
    return TIERS.index(tier) >= TIERS.index(needed)


@dataclass(frozen=True)
class AttentionConfig:
    """Which attention kernel runs.

    Attributes:
        backend: the name of a kernel in `pipeboost.kernels.table.KERNELS`, where the plan looks it up, or `"auto"` to
            choose by hardware, token count and mask.
    """

    backend: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.backend, str):
            raise ConfigurationError(f"attention={quoted(self.backend)} must be the name of a kernel, or 'auto'")


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work; the product of the five degrees is the size of the group (default: the world).

    Attributes:
        replicas: groups of ranks that work on samples of their own.
        cfg: ranks that share the guidance branches of a step.
        ulysses: ranks that share a sequence by exchanging heads for tokens; divides the number of heads.
        ring: ranks that share a sequence by passing keys and values around.
        tensor: ranks that share the weights.
        vae: whether the ranks share decoding and encoding.
        text_encoder: whether the ranks share the text encoders' weights.
        group: the ranks; None for the whole world.
        timeout: seconds after which a rank that makes no progress ends the call on all of them.
    """

    replicas: int = 1
    cfg: int = 1
    ulysses: int = 1
    ring: int = 1
    tensor: int = 1
    vae: str | bool = "auto"
    text_encoder: str | bool = "auto"
    group: Any = field(default=None, repr=False)
    timeout: float = 30.0

    def __post_init__(self) -> None:
        for name in ("replicas", "cfg", "ulysses", "ring", "tensor"):
            require_integer(f"parallel.{name}", getattr(self, name), minimum=1)
        for name in ("vae", "text_encoder"):
            require_one_of(f"parallel.{name}", getattr(self, name), ("auto", True, False))
        # Ranks send each other signs of life every twentieth of a second.
        if not is_number(self.timeout) or self.timeout < 1:
            raise ConfigurationError(f"parallel.timeout={self.timeout!r} must be a number of seconds, at least 1")
        if self.group is not None and not isinstance(self.group, getattr(torch.distributed, "ProcessGroup", ())):
            raise ConfigurationError(
                f"parallel.group={self.group!r} must be a torch.distributed process group, or None for the world"
            )

    @property
    def size(self) -> int:
        """How many ranks this layout takes."""
        return self.replicas * self.cfg * self.ulysses * self.ring * self.tensor

    @property
    def shares_text_encoders(self) -> bool:
        """Whether the tensor ranks share the text encoders' weights; else the first rank encodes."""
        return bool(self.text_encoder) and self.tensor > 1

    @property
    def split_kinds(self) -> tuple[str, ...]:
        """The kinds of components of which a rank has a share of the weights."""
        if self.tensor == 1:
            return ()
        return ("transformers", "text_encoders") if self.shares_text_encoders else ("transformers",)

    def shares_vae(self, tier: str) -> bool:
        """Return whether the ranks share the VAE's work, which changes rounding."""
        return bool(self.vae) and tier_allows(tier, "lossless")


@dataclass(frozen=True)
class CompileConfig:
    """torch.compile of the transformer, and CUDA graphs of its forward.

    Attributes:
        scope: `"regional"` compiles one block and reuses it for all that are alike; `"full"` the whole transformer;
            None compiles nothing, for graphs alone, which tier `"exact"` allows.
        backend: a torch.compile backend: its name, or a function as torch.compile takes it.
        dynamic: True compiles one graph for all sizes; False one per size. The text length is dynamic either way.
        recompile_limit: graphs one block may have, within our calls only.
        rewrites: what is done to captured graphs in the same precision, by name: `"norm_rotary"`, `"modulated_norm"`,
            `"gelu_gemm"`, `"cat_gemm"`, `"cat_of_slices"`, `"real_rotary"`, `"float8_rows"` and `"conv_layout"`, which
            docs/compile.md explains. Default: all that apply.
        graphs: whether forwards are replayed from CUDA graphs, one for each set of shapes and settings: True all that
            come twice, `"auto"` those that are faster so when both are timed, False none.
        vae: whether the VAE's encoder and decoder run faster in the same precision: `"auto"` with convolutions and
            norms rewritten where they are a video VAE's, and compiled where that takes no time; True compiles others
            when they are first used, one graph a size; False leaves the VAE stock.
    """

    scope: str | None = "regional"
    backend: str | Callable[..., Any] = "inductor"
    dynamic: bool = False
    recompile_limit: int = 64
    rewrites: tuple[str, ...] = REWRITES
    graphs: bool | Literal["auto"] = "auto"
    vae: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        require_one_of("compile", self.scope, (*COMPILE_SCOPES, None))
        require_one_of("compile.graphs", self.graphs, ("auto", True, False))
        require_one_of("compile.vae", self.vae, ("auto", True, False))
        if self.scope is None and self.graphs is not True:
            raise ConfigurationError(
                "compile.scope=None compiles nothing and is for CUDA graphs alone; add graphs=True, or use compile=None"
            )
        if not isinstance(self.backend, str) and not callable(self.backend):
            raise ConfigurationError(
                f"compile.backend={self.backend!r} must be a torch.compile backend: a name such as 'inductor', or a "
                "function"
            )
        require_one_of("compile.dynamic", self.dynamic, (True, False))
        object.__setattr__(self, "rewrites", names_among("compile.rewrites", self.rewrites, REWRITES))
        require_integer("compile.recompile_limit", self.recompile_limit, minimum=1, maximum=10_000)


@dataclass(frozen=True)
class QuantizeConfig:
    """Linears of the transformer in fewer bits.

    Attributes:
        scheme: `"fp8"`: weights and activations in float8_e4m3fn with a scale for each row.
        reversible: whether the weights are kept in the host's memory as they were, for `remove()`, for stock calls, and
            for what loads, fuses or saves weights. False keeps none: `remove()` then leaves the weights as 8 bits have
            them and says so, and the others raise.
    """

    scheme: str = "fp8"
    reversible: bool = True

    def __post_init__(self) -> None:
        require_one_of("quantize", self.scheme, QUANTIZE_SCHEMES)
        require_one_of("quantize.reversible", self.reversible, (True, False))


@dataclass(frozen=True)
class OffloadConfig:
    """Where components wait between their stages, and when their weights come to the device.

    Attributes:
        policy: of all components: `"resident"` on the device, `"stage"` on the host except for the component's stage,
            `"layerwise"` block by block while it computes, or `"auto"`: the cheapest that fits.
        text_encoders: policy of text and image encoders; None for the general one.
        transformers: policy of denoisers, and of ControlNets and the like, which are called with them.
        vae: policy of the autoencoders.
        memory: GiB that the pipeline may take on the device; None for what is free there.
    """

    policy: str = "auto"
    text_encoders: str | None = None
    transformers: str | None = None
    vae: str | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        require_one_of("offload", self.policy, ("auto", *OFFLOAD_POLICIES))
        for kind in OFFLOAD_KINDS:
            require_one_of(f"offload.{kind}", getattr(self, kind), (None, *OFFLOAD_POLICIES))
        if self.memory is not None and (not is_number(self.memory) or self.memory <= 0):
            raise ConfigurationError(f"offload.memory={self.memory!r} must be a number of GiB above 0, or None")

    @property
    def all_resident(self) -> bool:
        """Whether this leaves every component where it is."""
        chosen = [getattr(self, kind) or self.policy for kind in OFFLOAD_KINDS]
        return all(policy == "resident" for policy in chosen)


@dataclass(frozen=True)
class ReuseConfig:
    """Prompt embeddings are kept, so that a prompt is encoded once.

    Attributes:
        max_bytes: memory they may take, on the device the pipeline runs on; the least recently used go first.
    """

    max_bytes: int = 256 * 2**20

    def __post_init__(self) -> None:
        require_integer("reuse.max_bytes", self.max_bytes, minimum=1)


@dataclass(frozen=True)
class AccelerationConfig:
    """All settings of one acceleration. `"auto"` leaves a choice to the plan, None turns a feature off."""

    quality: str = "lossless"
    attention: AttentionConfig | Literal["auto"] | None = "auto"
    parallel: ParallelConfig | Literal["auto"] | None = "auto"
    cache: CacheConfig | Literal["auto"] | None = "auto"
    compile: CompileConfig | Literal["auto"] | None = "auto"
    quantize: QuantizeConfig | Literal["auto"] | None = "auto"
    offload: OffloadConfig | Literal["auto"] | None = "auto"
    reuse: ReuseConfig | Literal["auto"] | None = "auto"

    def __post_init__(self) -> None:
        require_one_of("quality", self.quality, TIERS)
        for feature in FEATURES:
            object.__setattr__(self, feature, _feature_setting(feature, getattr(self, feature)))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AccelerationConfig:
        """Read a YAML or JSON file whose keys are the fields of this class.

        Raises:
            ConfigurationError: the file is missing, unreadable, or has a key or value that is not allowed.
        """
        return cls(**file_settings(Path(path), _SETTINGS))


_CLASSES: dict[str, type] = {
    "attention": AttentionConfig,
    "parallel": ParallelConfig,
    "cache": CacheConfig,
    "compile": CompileConfig,
    "quantize": QuantizeConfig,
    "offload": OffloadConfig,
    "reuse": ReuseConfig,
}
_SHORT_NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cache": ("step_mask", STEP_MASKS),
    "compile": ("scope", COMPILE_SCOPES),
    "quantize": ("scheme", QUANTIZE_SCHEMES),
    "offload": ("policy", OFFLOAD_POLICIES),
}
_SETTINGS = ("quality", *FEATURES)
_FIELDS = {"quality": ()} | {
    name: field_names(cls, nested=("secondary",) if cls is CacheConfig else ()) for name, cls in _CLASSES.items()
}


def resolve_config(
    config: AccelerationConfig | str | os.PathLike[str] | None,
    arguments: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
) -> AccelerationConfig:
    """Merge environment variables, a config object or file, and keyword arguments; the later win.

    Args:
        config: an `AccelerationConfig`, the path of a YAML/JSON file, or None.
        arguments: the keyword arguments that the user gave, only those.
        environment: where `PIPEBOOST_QUALITY`, `PIPEBOOST_CACHE`, `PIPEBOOST_CACHE_FN`, … are looked up (default: the
            process's).

    Raises:
        ConfigurationError: a value that is not allowed, or a `PIPEBOOST_*` variable that stands for no setting.
    """
    environment = os.environ if environment is None else environment
    settings: dict[str, Any] = {}
    short_names = {name: field for name, (field, _) in _SHORT_NAMES.items()}
    for name, said in environment_settings(environment, _FIELDS, short_names).items():
        try:
            settings[name] = getattr(AccelerationConfig(**{name: said.value}), name)
        except ConfigurationError as error:
            raise said.error(error) from error
    if isinstance(config, AccelerationConfig):
        settings.update(vars(config))
    elif isinstance(config, (str, os.PathLike)):
        settings.update(file_settings(Path(config), _SETTINGS))
    elif config is not None:
        raise ConfigurationError(
            f"config must be an AccelerationConfig or the path of a YAML or JSON file, not {type(config).__name__}"
        )
    settings.update(arguments)
    return AccelerationConfig(**settings)


def _feature_setting(feature: str, value: Any) -> Any:
    cls = _CLASSES[feature]
    field, names = _SHORT_NAMES.get(feature, ("", ()))
    word = value if isinstance(value, str) else ""
    if value is None or value is False or word == "off":
        return None
    if isinstance(value, cls) or word == "auto":
        return value
    if isinstance(value, Mapping):
        return from_mapping(cls, feature, value)
    if word and cls is AttentionConfig:
        return AttentionConfig(word)
    if word in names:
        return cls(**{field: value})
    allowed = ", ".join(map(repr, ("auto", *names, None, False)))
    or_name = " or the name of a kernel, as `pipeboost doctor` lists them" if cls is AttentionConfig else ""
    raise ConfigurationError(
        f"{feature}={quoted(value)} is not allowed; use one of {allowed} or {cls.__name__}(...){or_name}"
    )
