"""The pipeline's components at their sizes, and the folder that `FluxPipeline.from_pretrained` loads."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .text import CLIP_LENGTH, build_clip_tokenizer, build_t5_tokenizer, save_clip_tokenizer

SHIFT = 2.0
TEXT_WIDTH = 128


def build_vae() -> AutoencoderKL:
    """128×128 pixels to 16×16×16 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 48, 64, 80),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def build_transformer() -> FluxTransformer2DModel:
    """Three double and six single blocks, four heads of 40; every block starts as the identity (DiT's adaLN-zero)."""
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=40,
        num_attention_heads=4,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 16, 16),
    )
    for name, parameter in transformer.named_parameters():
        if name.endswith("linear.weight") or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return transformer


def build_pipeline() -> FluxPipeline:
    """A `FluxPipeline` with untrained weights, in float32 on the CPU."""
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(), build_t5_tokenizer()
    clip = CLIPTextConfig(
        vocab_size=len(clip_tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        projection_dim=TEXT_WIDTH,
        bos_token_id=clip_tokenizer.bos_token_id,
        eos_token_id=clip_tokenizer.eos_token_id,
        pad_token_id=clip_tokenizer.pad_token_id,
    )
    t5 = T5Config(
        vocab_size=len(t5_tokenizer),
        d_model=TEXT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        use_cache=False,
        is_encoder_decoder=False,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=build_vae(),
        text_encoder=CLIPTextModel(clip),
        tokenizer=clip_tokenizer,
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(),
    )


def save_pipeline(pipe: FluxPipeline, folder: Path) -> None:
    """Write the Diffusers folder with every weight in float16, loadable by transformers 4 and 5 alike.

    The components of `pipe` are left in float16.
    """
    pipe.to(torch.float16)
    pipe.save_pretrained(folder)
    # Without `torch_dtype`, Diffusers loads in float32 whatever the file says, transformers 5 as the config says.
    for encoder in ("text_encoder", "text_encoder_2"):
        _edit_json(folder / encoder / "config.json", dtype="float32")
    save_clip_tokenizer(pipe.tokenizer, folder / "tokenizer")
    # transformers 5 has one T5 tokenizer class; in 4 its name means the slow one, which needs a sentencepiece file.
    _edit_json(folder / "model_index.json", tokenizer_2=["transformers", "T5TokenizerFast"])
    _edit_json(folder / "tokenizer_2" / "tokenizer_config.json", tokenizer_class="T5TokenizerFast")


def _edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")
