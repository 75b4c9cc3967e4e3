"""Trains the demo model from nothing: `python -m examples.demo_model.train --out weights` (one H100, minutes)."""

import argparse
import shutil
import time
from pathlib import Path

import torch
from diffusers import FluxPipeline

from .autoencoder import train_autoencoder
from .data import batches
from .denoiser import train_denoiser
from .model import build_pipeline, save_pipeline
from .pace import Pace

VAE_STEPS, VAE_BATCH = 6_000, 128
STEPS, BATCH = 20_000, 256


def main() -> None:
    """Both stages, saving several times on the way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the Diffusers folder to write")
    parser.add_argument("--resume", type=Path, help="go on from this folder: its VAE is kept, stage two runs again")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-seconds", type=float, help="cut stage one to what fits in this time")
    parser.add_argument("--seconds", type=float, help="cut stage two to what fits in this time")
    parser.add_argument("--peak", type=float, default=1e-3, help="highest learning rate of stage two")
    parser.add_argument("--smoke", action="store_true", help="a few steps of each stage, to see that it runs")
    settings = parser.parse_args()

    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.suppress_errors = True
    pipe = FluxPipeline.from_pretrained(settings.resume) if settings.resume else build_pipeline()
    pipe.to(device, torch.float32)
    workers = 8 if on_gpu else 0
    torch.manual_seed(settings.seed + 1)

    if not settings.resume:
        steps, size = (8, 8) if settings.smoke else (VAE_STEPS, VAE_BATCH)
        pace = Pace("vae", steps=steps, peak=2e-3, warmup=100, seconds=settings.vae_seconds)
        data = batches(batch_size=size, seed=settings.seed, workers=workers, device=device)
        train_autoencoder(pipe.vae, data, pace, compile_model=on_gpu)
    pipe.vae.requires_grad_(False)

    steps, size = (8, 8) if settings.smoke else (STEPS, BATCH)
    pace = Pace("denoiser", steps=steps, peak=settings.peak, warmup=300, seconds=settings.seconds)
    data = batches(batch_size=size, seed=settings.seed + 1, workers=workers, device=device)
    train_denoiser(pipe, data, pace, save=lambda: _save(pipe, settings.out), saves=3, compile_model=on_gpu)
    _save(pipe, settings.out)
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
