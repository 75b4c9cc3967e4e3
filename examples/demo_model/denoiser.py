"""Stage two: the transformer learns flow matching on the VAE's latents, together with the two text encoders."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline

from .data import TEXT_LENGTH
from .model import SHIFT
from .pace import Pace

STOCK_TEXT_LENGTH = 512
LONG_TEXT_EVERY = 8
EMA_DECAY = 0.999


def train_denoiser(
    pipe: FluxPipeline,
    latents: torch.Tensor,
    captions: Iterator[tuple[torch.Tensor, ...]],
    pace: Pace,
    *,
    save: Callable[[], None],
    saves: int,
    compile_blocks: bool,
) -> None:
    """Train transformer and text encoders in place; they end as the exponential moving average of the run.

    `latents` (scenes, 4, 32, 32) are what `captions` chooses from. `save` is called `saves` times on the way, with the
    average in place. Every eighth step pads the text to the stock 512 tokens (on an eighth of the batch), the others
    to 64: T5 and the transformer attend to the padding, as the stock pipeline has it.
    """
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    modules.train()
    parameters: list[torch.Tensor] = list(modules.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    # Autocast would make the embedders answer in bfloat16, and with them the residual stream and the timestep.
    hooks = [
        embedder.register_forward_hook(lambda module, args, output: output.float())
        for embedder in (pipe.transformer.x_embedder, pipe.transformer.context_embedder)
    ]
    if compile_blocks:
        pipe.transformer.compile_repeated_blocks(dynamic=False)
    optimizer = torch.optim.AdamW(
        parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=parameters[0].device.type == "cuda"
    )
    running = torch.zeros(())
    while pace.more():
        long_text = pace.step % LONG_TEXT_EVERY == LONG_TEXT_EVERY - 1
        chosen, clip_ids, t5_ids = next(captions)
        if long_text:
            chosen, clip_ids, t5_ids = (tensor[: max(1, len(tensor) // 8)] for tensor in (chosen, clip_ids, t5_ids))
            t5_ids = F.pad(t5_ids, (0, STOCK_TEXT_LENGTH - TEXT_LENGTH), value=pipe.tokenizer_2.pad_token_id)
        # A second compilation costs more than it saves on one step in eight.
        with torch.compiler.set_stance("force_eager" if long_text else "default"):
            loss = _loss(pipe, latents[chosen].float(), clip_ids, t5_ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = pace.learning_rate()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - min(EMA_DECAY, (1 + pace.step) / (10 + pace.step)))
        running = loss.detach() if pace.step == 0 else torch.lerp(running, loss.detach(), 0.02)
        pace.advance(loss=float(running) if pace.prints() else None)
        if pace.step % max(1, pace.steps // (saves + 1)) == 0 and pace.more():
            _swap(parameters, average)
            save()
            _swap(parameters, average)
    _swap(parameters, average)
    for hook in hooks:
        hook.remove()
    modules.eval()


def _loss(pipe: FluxPipeline, latents: torch.Tensor, clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> torch.Tensor:
    device, count = latents.device, len(latents)
    noise = torch.randn_like(latents)
    sigma = _sample_sigmas(count, device)
    noisy = torch.lerp(latents, noise, sigma[:, None, None, None])
    # The stock pipeline hands over the timestep in the dtype of the latents: let the model meet both roundings.
    timestep = torch.where(torch.rand_like(sigma) < 0.5, (sigma * 1000).bfloat16().float() / 1000, sigma)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        pooled = pipe.text_encoder(clip_ids).pooler_output
        prompt = pipe.text_encoder_2(t5_ids)[0]
        prediction = pipe.transformer(
            hidden_states=_pack(noisy),
            timestep=timestep,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            txt_ids=torch.zeros(prompt.shape[1], 3, device=device),
            img_ids=FluxPipeline._prepare_latent_image_ids(
                count, latents.shape[2] // 2, latents.shape[3] // 2, device, torch.float32
            ),
            return_dict=False,
        )[0]
    return F.mse_loss(prediction.float(), _pack(noise - latents))


def _sample_sigmas(count: int, device: torch.device) -> torch.Tensor:
    """Logit-normal, one in five uniform so that the ends are seen too, then the scheduler's shift (SD3's recipe)."""
    sigma = torch.sigmoid(torch.randn(count, device=device))
    sigma = torch.where(torch.rand(count, device=device) < 0.2, torch.rand(count, device=device), sigma)
    return SHIFT * sigma / (1 + (SHIFT - 1) * sigma)


def _pack(latents: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._pack_latents(latents, *latents.shape)


@torch.no_grad()
def _swap(parameters: list[torch.Tensor], average: list[torch.Tensor]) -> None:
    for parameter, other in zip(parameters, average, strict=True):
        kept = parameter.detach().clone()
        parameter.copy_(other)
        other.copy_(kept)
