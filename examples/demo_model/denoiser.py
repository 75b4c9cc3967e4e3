"""The transformer's stage: it learns flow matching on the VAE's latents, together with the two text encoders."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline

from .data import CAPTION_DROPOUT, TEXT_LENGTH
from .model import SHIFT
from .pace import Pace
from .replay import replayed

STOCK_TEXT_LENGTH = 512
LONG_TEXT_EVERY = 16
LONG_TEXT_SHARE = 8
EMA_DECAY = 0.999


@dataclass(frozen=True)
class Examples:
    """What this stage learns from, all on the training device.

    Attributes:
        latents: (scenes, 16, 16, 16), of mean 0 and deviation 1.
        chosen: (captions,), the scene that each caption describes.
        clip_ids: (captions, 64).
        t5_ids: (captions, 64).
        empty_clip_ids: (64,), of the empty prompt.
        empty_t5_ids: (64,).
    """

    latents: torch.Tensor
    chosen: torch.Tensor
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor
    empty_clip_ids: torch.Tensor
    empty_t5_ids: torch.Tensor

    def batch(self, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Random latents with CLIP and T5 ids, some of them of the empty prompt, drawn on the device."""
        device = self.chosen.device
        picked = torch.randint(len(self.chosen), (size,), device=device)
        dropped = (torch.rand(size, device=device) < CAPTION_DROPOUT)[:, None]
        clip_ids = torch.where(dropped, self.empty_clip_ids, self.clip_ids[picked])
        t5_ids = torch.where(dropped, self.empty_t5_ids, self.t5_ids[picked])
        return self.latents[self.chosen[picked]].float(), clip_ids.long(), t5_ids.long()


def train_denoiser(
    pipe: FluxPipeline,
    examples: Examples,
    pace: Pace,
    *,
    batch_size: int,
    save: Callable[[], None],
    saves: int,
    compile_blocks: bool,
) -> None:
    """Train transformer and text encoders in place; they end as the exponential moving average of the run.

    `save` is called `saves` times on the way, with the average in place. Every sixteenth step pads the text to the
    stock 512 tokens (on an eighth of the batch), the others to 64: T5 and the transformer attend to the padding, as
    the stock pipeline has it.
    """
    device = examples.chosen.device
    modules = torch.nn.ModuleList([pipe.transformer, pipe.text_encoder, pipe.text_encoder_2])
    modules.train()
    parameters = list(modules.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    if compile_blocks:
        pipe.transformer.compile_repeated_blocks(dynamic=False)
    rate, running = torch.full((), 1e-6, device=device), torch.ones((), device=device)
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )
    exact: dict[str, torch.Tensor] = {}
    # Under autocast the transformer rounds the timestep to bfloat16, which stock's float32 call does not do.
    hook = pipe.transformer.time_text_embed.register_forward_pre_hook(
        lambda module, arguments: (exact["timestep"], *arguments[1:])
    )
    image_ids = FluxPipeline._prepare_latent_image_ids(
        1, examples.latents.shape[2] // 2, examples.latents.shape[3] // 2, device, torch.float32
    )

    def step(size: int, text_length: int) -> None:
        optimizer.zero_grad()
        latents, clip_ids, t5_ids = examples.batch(size)
        t5_ids = F.pad(t5_ids, (0, text_length - TEXT_LENGTH), value=pipe.tokenizer_2.pad_token_id)
        text_ids = torch.zeros(text_length, 3, device=device)
        loss = _loss(pipe, latents, clip_ids, t5_ids, text_ids, image_ids, exact)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, parameters, 1 - EMA_DECAY)
            running.lerp_(loss.detach(), 0.01)

    short = replayed(lambda: step(batch_size, TEXT_LENGTH), device)
    # A second compilation costs more than it saves on one step in sixteen.
    with torch.compiler.set_stance("force_eager"):
        long = replayed(lambda: step(max(1, batch_size // LONG_TEXT_SHARE), STOCK_TEXT_LENGTH), device)
    _copy(average, parameters)
    while pace.more():
        rate.fill_(pace.learning_rate())
        (long if pace.step % LONG_TEXT_EVERY == LONG_TEXT_EVERY - 1 else short)()
        pace.advance(loss=float(running) if pace.prints() else None)
        if pace.step % max(1, pace.steps // (saves + 1)) == 0 and pace.more():
            _with_average(parameters, average, save)
    _copy(parameters, average)
    hook.remove()
    modules.eval()


def _loss(
    pipe: FluxPipeline,
    latents: torch.Tensor,
    clip_ids: torch.Tensor,
    t5_ids: torch.Tensor,
    text_ids: torch.Tensor,
    image_ids: torch.Tensor,
    exact: dict[str, torch.Tensor],
) -> torch.Tensor:
    device, count = latents.device, len(latents)
    noise = torch.randn_like(latents)
    sigma = _sample_sigmas(count, device)
    noisy = torch.lerp(latents, noise, sigma[:, None, None, None])
    exact["timestep"] = sigma * 1000
    # A graph of the whole step cannot share autocast's cache of cast weights with other steps.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
        pooled = pipe.text_encoder(clip_ids).pooler_output
        prompt = pipe.text_encoder_2(t5_ids)[0]
        prediction = pipe.transformer(
            hidden_states=_pack(noisy),
            timestep=sigma,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            txt_ids=text_ids,
            img_ids=image_ids,
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
def _copy(targets: list[torch.nn.Parameter], sources: list[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _with_average(
    parameters: list[torch.nn.Parameter], average: list[torch.Tensor], action: Callable[[], None]
) -> None:
    """Do something while the parameters are the average; afterwards they are themselves again, in place."""
    kept = [parameter.detach().clone() for parameter in parameters]
    _copy(parameters, average)
    action()
    _copy(parameters, kept)
