"""Stage one: the VAE learns to reproduce the scenes through 4×32×32 latents."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .pace import Pace
from .render import render

KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.5
LATENT_NOISE = 0.05


def train_autoencoder(vae: AutoencoderKL, canvases: Iterator[tuple[torch.Tensor, ...]], pace: Pace) -> None:
    """Train in place, then set `scaling_factor` and `shift_factor` so that latents have mean 0 and deviation 1."""
    vae.train()
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
    while pace.more():
        with torch.no_grad():
            images = render(*next(canvases))
        posterior = vae.encode(images).latent_dist
        latents = posterior.sample()
        # The decoder will be given the transformer's latents, which are never quite right.
        drawn = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample
        loss = F.l1_loss(drawn, images) + EDGE_WEIGHT * _edge_loss(drawn, images)
        # `kl()` sums over a sample's latents; the weight is per latent.
        loss = loss + KL_WEIGHT * posterior.kl().mean() / latents[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = pace.learning_rate()
        optimizer.step()
        optimizer.zero_grad()
        pace.advance(loss=loss.item() if pace.prints() else None)
    vae.eval()
    _measure(vae, [render(*next(canvases)) for _ in range(16)])


@torch.no_grad()
def encode_pool(vae: AutoencoderKL, canvases: Iterator[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Latents (scenes, 4, 32, 32) in float16, of mean 0 and deviation 1, of every canvas the iterator has."""
    latents = [vae.encode(render(*canvas)).latent_dist.mode() for canvas in canvases]
    return ((torch.cat(latents) - vae.config.shift_factor) * vae.config.scaling_factor).half()


@torch.no_grad()
def _measure(vae: AutoencoderKL, images: list[torch.Tensor]) -> None:
    latents = [vae.encode(image).latent_dist.mode() for image in images]
    error = torch.stack([F.mse_loss(vae.decode(z).sample, x) for z, x in zip(latents, images, strict=True)]).mean()
    deviation, mean = torch.std_mean(torch.cat(latents))
    vae.register_to_config(scaling_factor=round(1 / deviation.item(), 5), shift_factor=round(mean.item(), 5))
    print(
        f"vae: PSNR {10 * torch.log10(4 / error):.1f} dB, latent mean {mean:.3f}, deviation {deviation:.3f}, "
        f"by channel {[round(channel, 2) for channel in torch.cat(latents).std((0, 2, 3)).tolist()]}",
        flush=True,
    )


def _edge_loss(drawn: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    difference = drawn - images
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
