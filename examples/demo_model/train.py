"""Trains the demo model from nothing: `python -m examples.demo_model.train --out weights` (one H100, 8 minutes)."""

import argparse
import shutil
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxPipeline

from .autoencoder import draw_pool, encode_pool, train_autoencoder
from .data import Canvases, Captions, batches
from .denoiser import Examples, train_denoiser
from .encoders import train_encoders
from .model import build_pipeline, save_pipeline
from .pace import Pace


@dataclass(frozen=True)
class Recipe:
    """What a run takes besides its seed; `wordings` are captions for each scene of the pool.

    The steps are those that made the weights we ship.
    """

    pool: int = 100_000
    wordings: int = 3
    vae_steps: int = 7_577
    vae_batch: int = 32
    encoder_steps: int = 2_353
    encoder_batch: int = 512
    steps: int = 15_388
    batch: int = 256
    peak: float = 1.5e-3


SMOKE = Recipe(pool=32, vae_steps=4, vae_batch=4, encoder_steps=4, encoder_batch=8, steps=18, batch=8)


def main() -> None:
    """All stages, saving several times on the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the Diffusers folder to write")
    parser.add_argument("--resume", type=Path, help="start from this folder and go on with the transformer alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-seconds", type=float, help="cut the VAE's stage to what fits in this time")
    parser.add_argument("--encoder-seconds", type=float, help="cut the text encoders' stage to what fits in this time")
    parser.add_argument("--seconds", type=float, help="cut the transformer's stage to what fits in this time")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage, to see that it runs")
    settings = parser.parse_args()

    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    # With cuDNN's attention (torch 2.11's first choice on Hopper) a compiled backward pass read out of bounds.
    torch.backends.cuda.enable_cudnn_sdp(False)
    pipe = FluxPipeline.from_pretrained(str(settings.resume)) if settings.resume else build_pipeline()
    pipe.to(device, torch.float32)
    torch.manual_seed(settings.seed + 1)
    workers = 12 if on_gpu else 0
    recipe = SMOKE if settings.smoke else Recipe()
    save = partial(_save, pipe, settings.out)

    size = min(250, recipe.pool)
    canvases = Canvases(size=size, seed=settings.seed)
    pool = draw_pool(batches(canvases, device=device, workers=workers, numbers=range(recipe.pool // size)))
    print(f"drew {len(pool)} scenes, {time.monotonic() - started:.0f} s since the start", flush=True)
    if not settings.resume:
        pace = Pace("vae", steps=recipe.vae_steps, peak=2e-3, warmup=100, seconds=settings.vae_seconds)
        train_autoencoder(pipe.vae, pool, pace, batch_size=recipe.vae_batch)
        save()
    captions = Captions(size=size, wordings=recipe.wordings, seed=settings.seed)
    words = batches(captions, device=device, workers=workers, numbers=range(recipe.pool // size))
    chosen, clip_ids, t5_ids, layouts = (torch.cat(parts) for parts in zip(*words, strict=True))
    print(f"wrote {len(chosen)} captions, {time.monotonic() - started:.0f} s since the start", flush=True)
    if not settings.resume:
        pace = Pace("encoders", steps=recipe.encoder_steps, peak=2e-3, warmup=200, seconds=settings.encoder_seconds)
        train_encoders(pipe, clip_ids, t5_ids, layouts, pace, batch_size=recipe.encoder_batch)
    pipe.vae.requires_grad_(False)
    latents = encode_pool(pipe.vae, pool)
    print(f"encoded them, {time.monotonic() - started:.0f} s since the start", flush=True)

    examples = Examples(latents, chosen, clip_ids, t5_ids, *(ids[0].to(device) for ids in captions.encode([""])))
    del pool
    pace = Pace("denoiser", steps=recipe.steps, peak=recipe.peak, warmup=500, seconds=settings.seconds)
    train_denoiser(pipe, examples, pace, batch_size=recipe.batch, save=save, saves=2, compile_blocks=on_gpu)
    save()
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    print(f"trained in {time.monotonic() - started:.0f} s, {memory:.1f} GiB", flush=True)


def _save(pipe: FluxPipeline, folder: Path) -> None:
    """Write a copy and only then put it in the place of the last one."""
    copy = build_pipeline()
    for name in ("vae", "transformer", "text_encoder", "text_encoder_2"):
        getattr(copy, name).load_state_dict(getattr(pipe, name).state_dict())
    vae = pipe.vae.config
    copy.vae.register_to_config(scaling_factor=vae.scaling_factor, shift_factor=vae.shift_factor)
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_pipeline(copy, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


if __name__ == "__main__":
    main()
