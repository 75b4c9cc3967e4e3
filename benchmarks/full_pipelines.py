"""Whole stock pipelines at the published sizes with random weights: encoders, transformer, VAE, real tokenizers.

No checkpoint is needed. Speed and memory do not depend on the weights' values; what such a pipeline draws is noise. The
tokenizers are the demo model's: they pad to the published lengths, and their ids are within the published vocabularies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

TOKENIZERS = Path(__file__).parents[1] / "examples" / "demo_model" / "weights"
_T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_SMALL_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_SMALL_CLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_SMALL_FLUX = {
    "num_layers": 4,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}
_WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
_SMALL_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "ffn_dim": 32,
    "num_layers": 4,
    "text_dim": 32,
    "freq_dim": 32,
}
FLUX_VAE = {
    "latent_channels": 16,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "sample_size": 1024,
}


def flux_pipeline(device: Any, dtype: torch.dtype = torch.bfloat16, *, small: bool = False) -> FluxPipeline:
    """FLUX.1-dev: 11.9 B parameters of transformer, T5-XXL, CLIP-L and the 16-channel VAE, 31.5 GiB in bfloat16.

    Args:
        small: the same structure with a few thousand parameters, to try a benchmark on a CPU.
    """
    tokenizer, tokenizer_2 = _tokenizer("tokenizer", 77), _tokenizer("tokenizer_2", 512)
    clip = CLIPTextConfig(**(_SMALL_CLIP if small else _CLIP_L), projection_dim=32 if small else 768)
    clip.eos_token_id, clip.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    t5 = T5Config(**(_SMALL_T5 if small else _T5_XXL), vocab_size=32128)
    widths, layers = ((8, 8, 8, 8), 1) if small else ((128, 256, 512, 512), 2)
    vae = {**FLUX_VAE, "block_out_channels": widths, "layers_per_block": layers, "norm_num_groups": min(32, widths[0])}
    with random_weights(device, dtype) as built:
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
            vae=built(lambda: AutoencoderKL(**vae)),
            text_encoder=built(lambda: CLIPTextModel(clip)),
            tokenizer=tokenizer,
            text_encoder_2=built(lambda: T5EncoderModel(t5)),
            tokenizer_2=tokenizer_2,
            transformer=built(lambda: FluxTransformer2DModel(guidance_embeds=True, **(_SMALL_FLUX if small else {}))),
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wan_pipeline(
    device: Any,
    dtype: torch.dtype = torch.bfloat16,
    *,
    vae_dtype: torch.dtype = torch.float32,
    small: bool = False,
) -> WanPipeline:
    """Wan2.1 T2V 1.3B with UMT5-XXL and its VAE, which its model card asks to run in float32.

    Args:
        small: the same structure with a few thousand parameters, to try a benchmark on a CPU.
    """
    umt5 = UMT5Config(**(_SMALL_T5 if small else _T5_XXL), vocab_size=1024 if small else 256384)
    vae = {"base_dim": 8, "num_res_blocks": 1} if small else {}
    with random_weights(device, dtype) as built:
        transformer = built(lambda: WanTransformer3DModel(**(_SMALL_WAN if small else _WAN_1_3B)))
        text_encoder = built(lambda: UMT5EncoderModel(umt5))
    with random_weights(device, vae_dtype) as built:
        autoencoder = built(lambda: AutoencoderKLWan(**vae))
    for name, parameter in transformer.named_parameters():
        if any(part in (transformer._keep_in_fp32_modules or ()) for part in name.split(".")):
            parameter.data = parameter.data.float()
    pipe = WanPipeline(
        tokenizer=_tokenizer("tokenizer_2", 512),
        text_encoder=text_encoder,
        vae=autoencoder,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _tokenizer(name: str, length: int) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZERS / name)
    ids = tokenizer("a fox", padding="max_length", max_length=length, truncation=True).input_ids
    assert len(ids) == length, f"{name} pads to {len(ids)} tokens, not {length}"
    return tokenizer


@contextlib.contextmanager
def random_weights(device: Any, dtype: torch.dtype) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Inside, models are built on the device in this dtype, where the libraries' own random init is fast."""
    before = torch.get_default_dtype()

    def built(make: Callable[[], Any]) -> Any:
        with torch.device(device):
            return make().eval().requires_grad_(False)

    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        yield built
    finally:
        torch.set_default_dtype(before)
