"""The text encoders' stage: they learn to say what stands where, before any picture is involved.

FLUX gives text tokens no position in its attention, so which colour belongs to which thing must be told by the T5
states themselves. Learnt through the denoising loss alone, that takes most of a run.
"""

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import nn

from .model import TEXT_WIDTH
from .pace import Pace
from .replay import replayed
from .scenes import BACKGROUNDS, COLOURS, PLACES, SHAPES, SIZES

HEADS = 4
CLASSES = (len(SHAPES) + 1, len(COLOURS) + 1, len(SIZES) + 1)
"""Shape, colour and size of the thing in one place; class 0 is nothing."""


class LayoutReader(nn.Module):
    """Reads the nine places off the T5 states by one attention each, and the background off CLIP's pooled state.

    Thrown away after this stage. An image token of the transformer will ask the text in much the same way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(len(PLACES), TEXT_WIDTH))
        self.attention = nn.MultiheadAttention(TEXT_WIDTH, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(TEXT_WIDTH)
        self.attributes = nn.Linear(TEXT_WIDTH, sum(CLASSES))
        self.background = nn.Linear(TEXT_WIDTH, len(BACKGROUNDS))

    def forward(self, states: torch.Tensor, pooled: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Logits (batch, 9, classes) of shape, colour and size, and (batch, backgrounds).

        Args:
            states: T5 states (batch, tokens, width).
            pooled: CLIP's pooled state (batch, width).
        """
        queries = self.places.expand(len(states), -1, -1)
        read, _ = self.attention(queries, states, states, need_weights=False)
        return self.attributes(self.norm(read)).split(CLASSES, dim=-1), self.background(pooled)


def train_encoders(
    pipe: FluxPipeline,
    clip_ids: torch.Tensor,
    t5_ids: torch.Tensor,
    layouts: torch.Tensor,
    pace: Pace,
    *,
    batch_size: int,
) -> None:
    """Train the text encoders of `pipe` in place.

    Args:
        clip_ids: (captions, 64).
        t5_ids: (captions, 64).
        layouts: (captions, 28): shape, colour and size of the nine places, 0 for nothing, and the background.
    """
    device = t5_ids.device
    on_gpu = device.type == "cuda"
    reader = LayoutReader().to(device)
    modules = nn.ModuleList([pipe.text_encoder, pipe.text_encoder_2, reader]).train()
    rate, running = torch.zeros((), device=device), torch.ones((), device=device)
    optimizer = torch.optim.AdamW(
        modules.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )

    def step() -> None:
        optimizer.zero_grad()
        picked = torch.randint(len(t5_ids), (batch_size,), device=device)
        with torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            pooled = pipe.text_encoder(clip_ids[picked].long()).pooler_output
            attributes, background = reader(pipe.text_encoder_2(t5_ids[picked].long())[0], pooled)
        target = layouts[picked].long()
        things = target[:, :-1].reshape(batch_size, len(PLACES), len(CLASSES))
        loss = F.cross_entropy(background.float(), target[:, -1])
        for index, logits in enumerate(attributes):
            loss = loss + F.cross_entropy(logits.float().flatten(0, 1), things[..., index].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        running.lerp_(loss.detach(), 0.02)

    run = replayed(step, device)
    while pace.more():
        rate.fill_(pace.learning_rate())
        run()
        pace.advance(loss=float(running) if pace.prints() else None)
    print(f"encoders: {_share_read(pipe, reader, clip_ids, t5_ids, layouts):.1%} of captions read in full", flush=True)


@torch.no_grad()
def _share_read(
    pipe: FluxPipeline, reader: LayoutReader, clip_ids: torch.Tensor, t5_ids: torch.Tensor, layouts: torch.Tensor
) -> float:
    """Share of the first thousand captions whose shapes and colours are all read right; sizes may be left open."""
    states = pipe.text_encoder_2(t5_ids[:1000].long())[0]
    attributes, _ = reader(states, pipe.text_encoder(clip_ids[:1000].long()).pooler_output)
    things = layouts[:1000, :-1].reshape(-1, len(PLACES), len(CLASSES))
    right = [logits.argmax(-1) == things[..., index] for index, logits in enumerate(attributes[:2])]
    return float((right[0] & right[1]).all(dim=1).float().mean())
