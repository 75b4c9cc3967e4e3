"""What the ranks run in `test_vae_parallel`: one VAE, some maps, as part of a call or not."""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeboost.contract.call import open_call
from pipeboost.contract.registry import families
from pipeboost.core.errors import UnsupportedError
from pipeboost.core.ledger import Ledger
from pipeboost.distributed import Mesh
from pipeboost.features.compile.vae import rewrite_vae
from pipeboost.features.parallel.vae import VAE_FORWARDS, parallelize_vae
from tests.floors import floor_of, once
from tests.pipelines import tiny_parts as parts


def wan22_vae() -> AutoencoderKLWan:
    """Wan 2.2's VAE: residual shortcuts around its down- and upsampling, and patches of two pixels."""
    return AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        latents_mean=[-0.2, 0.1, 0.0, 0.3],
        latents_std=[1.2, 0.9, 1.1, 0.8],
    ).eval()


# Family, how to build its VAE, frames of its latents (0: an image), pixels a latent.
VAES: dict[str, tuple[str, Callable[[], torch.nn.Module], int, int]] = {
    "flux": ("flux", parts.image_vae, 0, 8),
    "qwen_image": ("qwen_image", parts.qwen_vae, 1, 8),
    "wan21": ("wan", parts.wan_vae, 3, 8),
    "wan22": ("wan", wan22_vae, 2, 16),
    "hunyuan_video": ("hunyuan_video", parts.hunyuan_video_vae, 2, 8),
}


@dataclass(frozen=True)
class Map:
    """A latent map or a picture.

    Attributes:
        method: `"decode"` or `"encode"`.
        height: of the latent map.
        width: the same.
        batch: how many.
        settings: attributes of the VAE, such as `use_slicing`.
        dtype: of the VAE and the map.
    """

    method: str
    height: int
    width: int
    batch: int = 1
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Results:
    """What one rank saw."""

    outputs: list[torch.Tensor]
    counts: list[dict[str, int]]
    again: torch.Tensor
    outside: torch.Tensor
    traces: list[str]


def build(name: str) -> torch.nn.Module:
    """A VAE of the table, the same on all ranks."""
    with parts.seeded(3):
        return parts.randomised(VAES[name][1]())


def input_of(name: str, what: Map) -> torch.Tensor:
    """Random latents or pixels, the same on all ranks."""
    _, _, frames, scale = VAES[name]
    channels, height, width = 4, what.height, what.width
    if what.method == "encode":
        channels, height, width, frames = 3, scale * height, scale * width, frames and 4 * frames - 3
    generator = torch.Generator().manual_seed(what.height * 100 + what.width)
    shape = (what.batch, channels, *((frames,) if frames else ()), height, width)
    return torch.randn(shape, generator=generator).to(what.dtype)


@torch.no_grad()
def result_of(vae: torch.nn.Module, name: str, what: Map) -> torch.Tensor:
    """What the VAE makes of it: a picture, or mean and deviation."""
    # Diffusers' own `to` warns of what does not concern these models.
    torch.nn.Module.to(vae, what.dtype)
    before = {key: getattr(vae, key) for key in what.settings}
    vars(vae).update(what.settings)
    try:
        given = input_of(name, what)
        if what.method == "decode":
            return vae.decode(given, return_dict=False)[0]
        return vae.encode(given).latent_dist.parameters
    finally:
        vars(vae).update(before)


@once
def expected(name: str, what: Map) -> tuple[torch.Tensor, float]:
    """What one rank makes of it, and how far the order of sums alone moves that."""
    vae = build(name)

    def run() -> torch.Tensor:
        return result_of(vae, name, what)

    return run(), floor_of(run, vae, orders=1)


def share(name: str, maps: list[Map], rewritten: bool = False) -> Results:
    """Every map by the ranks together; then the first one outside a call, and after the change was taken back."""
    vae = build(name)
    family = next(family for family in families() if family.name == VAES[name][0])
    ledger = Ledger()
    mesh = Mesh({"ulysses": torch.distributed.get_world_size()}, device=torch.device("cpu"))
    try:
        parallelize_vae(vae, family.autoencoder, ledger)
        if rewritten:
            rewrite_vae(vae, family.autoencoder, ledger)
        outputs, counts = [], []
        for what in maps:
            with open_call(None, owner=None, mesh=mesh) as call, poisoned():
                outputs.append(result_of(vae, name, what))
            counts.append(dict(call[VAE_FORWARDS]))
        outside = result_of(vae, name, maps[0])
        ledger.undo()
        with open_call(None, owner=None, mesh=mesh):
            again = result_of(vae, name, maps[0])
        traces = [key for module in vae.modules() for key in vars(module) if "pipeboost" in key]
        return Results(outputs, counts, again, outside, traces)
    finally:
        mesh.close()


def share_with_other_attention(name: str) -> tuple[bool, dict[str, int], str]:
    """Whether a VAE with another attention processor computes what stock does, what its call counts, and what it says
    where attention has another forward.
    """
    vae = build(name)
    family = next(family for family in families() if family.name == VAES[name][0])
    mesh = Mesh({"ulysses": torch.distributed.get_world_size()}, device=torch.device("cpu"))
    ledger = Ledger()
    try:
        parallelize_vae(vae, family.autoencoder, ledger)
        attention = [module for module in vae.decoder.modules() if isinstance(module, Attention)]
        processors = [module.processor for module in attention]
        for module in attention:
            module.set_processor(AttnProcessor())
        stock = result_of(vae, name, Map("decode", 8, 8))
        with open_call(None, owner=None, mesh=mesh) as call:
            same = torch.equal(result_of(vae, name, Map("decode", 8, 8)), stock)
        for module, processor in zip(attention, processors, strict=True):
            module.set_processor(processor)
            module.forward = lambda states, **_: states
        said = ""
        with open_call(None, owner=None, mesh=mesh):
            try:
                result_of(vae, name, Map("decode", 8, 8))
            except UnsupportedError as error:
                said = str(error)
        return same, dict(call[VAE_FORWARDS]), said
    finally:
        mesh.close()


def share_between_two(name: str) -> dict[str, list[int]]:
    """How many forwards ranks shared in calls of two owners of one VAE, both, then one, then none holding it."""
    vae = build(name)
    family = next(family for family in families() if family.name == VAES[name][0])
    # A ledger stands in for the acceleration that owns it.
    owners = {"first": Ledger(), "second": Ledger()}
    found: dict[str, list[int]] = {key: [] for key in (*owners, "stranger")}
    mesh = Mesh({"ulysses": torch.distributed.get_world_size()}, device=torch.device("cpu"))
    try:
        for ledger in owners.values():
            parallelize_vae(vae, family.autoencoder, ledger, owner=ledger)
        for ledger in (Ledger(), *owners.values()):
            ledger.undo()
            for key, counts in found.items():
                with open_call(None, owner=owners.get(key), mesh=mesh) as call:
                    result_of(vae, name, Map("decode", 4, 4))
                counts.append(call[VAE_FORWARDS]["decoder shared"])
        return found
    finally:
        mesh.close()


def memory(settings: dict[str, Any], latents: torch.Tensor) -> tuple[int, int]:
    """The most bytes that a decode allocates beyond what was there: of the whole map, and of this rank's part."""
    vae = torch.nn.Module.to(AutoencoderKL(**settings).eval(), latents.dtype)
    family = next(family for family in families() if family.name == "flux")
    mesh = Mesh({"ulysses": torch.distributed.get_world_size()}, device=torch.device("cpu"))
    try:
        whole = _peak(vae, latents)
        parallelize_vae(vae, family.autoencoder, Ledger())
        with open_call(None, owner=None, mesh=mesh):
            return whole, _peak(vae, latents)
    finally:
        mesh.close()


@torch.no_grad()
def _peak(vae: torch.nn.Module, latents: torch.Tensor) -> int:
    with _Allocated() as allocated:
        vae.decode(latents)
    return allocated.peak


class _Allocated(TorchDispatchMode):
    """Counts the bytes of the tensors that operators return inside, while they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing was written to is NaN inside."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
