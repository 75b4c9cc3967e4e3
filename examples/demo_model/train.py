"""Trains the demo model from nothing: `python -m examples.demo_model.train --out weights` (one H100, minutes)."""

import argparse
import shutil
import time
from functools import partial
from pathlib import Path

import torch
from diffusers import FluxPipeline

from .autoencoder import encode_pool, train_autoencoder
from .data import Canvases, Captions, batches
from .denoiser import train_denoiser
from .model import build_pipeline, save_pipeline
from .pace import Pace

# Steps and batch of the VAE, scenes in the pool, steps and batch of the transformer.
RECIPE = (6_000, 64, 200_000, 20_000, 256)


def main() -> None:
    """Both stages, saving several times on the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the Diffusers folder to write")
    parser.add_argument("--resume", type=Path, help="go on from this folder: its VAE is kept, stage two runs again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-seconds", type=float, help="cut stage one to what fits in this time")
    parser.add_argument("--seconds", type=float, help="cut stage two to what fits in this time")
    parser.add_argument("--peak", type=float, default=1.5e-3, help="highest learning rate of stage two")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage, to see that it runs")
    settings = parser.parse_args()

    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    # cuDNN's attention, torch 2.11's first choice on Hopper, reads out of bounds in the backward pass here.
    torch.backends.cuda.enable_cudnn_sdp(False)
    pipe = FluxPipeline.from_pretrained(str(settings.resume)) if settings.resume else build_pipeline()
    pipe.to(device, torch.float32)
    torch.manual_seed(settings.seed + 1)
    workers = 12 if on_gpu else 0
    vae_steps, vae_batch, pool, steps, batch = (8, 8, 16, 16, 8) if settings.smoke else RECIPE

    save = partial(_save, pipe, settings.out)
    canvases = Canvases(size=vae_batch, seed=settings.seed)
    if not settings.resume:
        pace = Pace("vae", steps=vae_steps, peak=2e-3, warmup=100, seconds=settings.vae_seconds)
        train_autoencoder(pipe.vae, batches(canvases, device=device, workers=workers), pace)
        save()
    pipe.vae.requires_grad_(False)
    latents = encode_pool(pipe.vae, batches(canvases, device=device, workers=workers, numbers=range(pool // vae_batch)))
    print(f"encoded {len(latents)} scenes, {time.monotonic() - started:.0f} s since the start", flush=True)

    captions = batches(Captions(size=batch, pool=pool, seed=settings.seed), device=device, workers=workers)
    pace = Pace("denoiser", steps=steps, peak=settings.peak, warmup=300, seconds=settings.seconds)
    train_denoiser(pipe, latents, captions, pace, save=save, saves=3, compile_blocks=on_gpu)
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
