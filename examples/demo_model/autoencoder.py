"""Stage one: the VAE learns to reproduce the scenes through 4×32×32 latents."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .data import Batch
from .pace import Pace
from .render import render

KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.5
LATENT_NOISE = 0.05


def train_autoencoder(vae: AutoencoderKL, data: Iterator[Batch], pace: Pace, *, compile_model: bool) -> None:
    """Train in place, then set `scaling_factor` and `shift_factor` so that latents have mean 0 and deviation 1."""
    device = next(vae.parameters()).device
    vae.to(memory_format=torch.channels_last).train()
    draw = torch.compile(render) if compile_model else render
    if compile_model:
        vae.encoder.compile()
        vae.decoder.compile()
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.98), weight_decay=1e-4)
    while pace.more():
        batch = next(data)
        with torch.no_grad():
            images = draw(batch.rows, batch.background).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            posterior = vae.encode(images).latent_dist
            latents = posterior.sample()
            # The decoder will be given the transformer's latents, which are never quite right.
            drawn = vae.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample.float()
        loss = F.l1_loss(drawn, images) + EDGE_WEIGHT * _edge_loss(drawn, images)
        # `kl()` sums over a sample's latents; the weight is per latent.
        loss = loss + KL_WEIGHT * posterior.kl().float().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = pace.learning_rate()
        optimizer.step()
        optimizer.zero_grad()
        pace.advance(loss=loss.item() if pace.prints() else None)
    vae.eval()
    with torch.compiler.set_stance("force_eager"):
        _measure(vae, [next(data) for _ in range(8)])


@torch.no_grad()
def _measure(vae: AutoencoderKL, data: list[Batch]) -> None:
    images = [render(batch.rows, batch.background) for batch in data]
    latents = [vae.encode(image).latent_dist.mode() for image in images]
    error = torch.stack([F.mse_loss(vae.decode(z).sample, x) for z, x in zip(latents, images, strict=True)]).mean()
    deviation, mean = torch.std_mean(torch.cat(latents).float())
    vae.register_to_config(scaling_factor=round(1 / deviation.item(), 5), shift_factor=round(mean.item(), 5))
    print(
        f"vae: PSNR {10 * torch.log10(4 / error):.1f} dB, latent mean {mean:.3f}, deviation {deviation:.3f}, "
        f"by channel {torch.cat(latents).float().std((0, 2, 3)).tolist()}",
        flush=True,
    )


def _edge_loss(drawn: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    difference = drawn - images
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
