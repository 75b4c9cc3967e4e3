"""The VAE's stage: it learns to reproduce the scenes through 16×16×16 latents."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .pace import Pace
from .render import render
from .replay import replayed

SIZE_WEIGHT = 1e-4
EDGE_WEIGHT = 0.5
THING_WEIGHT = 6.0
SQUARE_WEIGHT = 4.0
BACKDROP_WEIGHT = 2.0
BACKDROP_CELL = 16
LATENT_NOISE = 0.05
CHUNK = 250


def draw_pool(canvases: Iterator[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Draw every canvas the iterator has: (scenes, 3, 128, 128) bytes."""
    return torch.cat([((render(*canvas) + 1) * 127.5).round().byte() for canvas in canvases])


def train_autoencoder(vae: AutoencoderKL, pool: torch.Tensor, pace: Pace, *, batch_size: int) -> None:
    """Train in place on pictures of the pool, then set `scaling_factor` and `shift_factor` for unit latents.

    Many steps on small batches: the number of steps matters here, hardly the size of the batch.
    """
    device = pool.device
    on_gpu = device.type == "cuda"
    vae.train()
    rate, running = torch.zeros((), device=device), torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=1e-4, fused=on_gpu, capturable=on_gpu
    )

    def step() -> None:
        optimizer.zero_grad()
        images = _floats(pool[torch.randint(len(pool), (batch_size,), device=device)])
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            # No sampling: the noise of an untrained posterior drowns what little tells one background from another.
            latents = vae.encode(images).latent_dist.mode()
            # The decoder will be given the transformer's latents, which are never quite right.
            drawn = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample.float()
        loss = _reconstruction_loss(drawn, images) + SIZE_WEIGHT * latents.float().square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        running.lerp_(loss.detach(), 0.02)

    run = replayed(step, device)
    while pace.more():
        rate.fill_(pace.learning_rate())
        run()
        pace.advance(loss=float(running) if pace.prints() else None)
    vae.eval()
    _measure(vae, pool[: 4 * CHUNK])


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, pool: torch.Tensor) -> torch.Tensor:
    """Latents (scenes, 16, 16, 16) in float16, of mean 0 and deviation 1, of every picture of the pool."""
    latents = torch.cat([vae.encode(_floats(images)).latent_dist.mode() for images in pool.split(CHUNK)])
    return ((latents - vae.config.shift_factor) * vae.config.scaling_factor).half()


@torch.no_grad()
def _measure(vae: AutoencoderKL, pool: torch.Tensor) -> None:
    latents = torch.cat([vae.encode(_floats(images)).latent_dist.mode() for images in pool.split(CHUNK)])
    drawn = torch.cat([vae.decode(chunk).sample.clamp(-1, 1) for chunk in latents.split(CHUNK)])
    error = F.mse_loss(drawn, _floats(pool))
    deviation, mean = torch.std_mean(latents)
    vae.register_to_config(scaling_factor=round(1 / deviation.item(), 5), shift_factor=round(mean.item(), 5))
    print(
        f"vae: PSNR {10 * torch.log10(4 / error):.1f} dB, latent mean {mean:.3f}, deviation {deviation:.3f}, "
        f"by channel {[round(channel, 2) for channel in latents.std((0, 2, 3)).tolist()]}",
        flush=True,
    )


def _reconstruction_loss(drawn: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    # Things are a tenth of a picture: weigh what differs from the background, whose colour the left border has.
    weight = 1 + THING_WEIGHT * (images - images[..., :1]).abs().amax(1, keepdim=True)
    difference = drawn - images
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    absolute = (weight * difference.abs()).mean() / weight.mean()
    # Absolute error alone settles on the commonest background; squares pull towards the right one from afar.
    backdrop = F.avg_pool2d(difference, BACKDROP_CELL).abs().mean()
    return absolute + SQUARE_WEIGHT * difference.square().mean() + EDGE_WEIGHT * edges + BACKDROP_WEIGHT * backdrop


def _floats(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 127.5 - 1
