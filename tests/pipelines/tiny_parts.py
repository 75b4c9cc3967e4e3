"""Tiny text encoders, vision encoders and VAEs: the real classes with two layers or so and random weights."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from diffusers import AutoencoderKL, AutoencoderKLHunyuanVideo, AutoencoderKLQwenImage, AutoencoderKLWan
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.pipelines import tiny_tokenizers as tokenizers

ModelT = TypeVar("ModelT", bound=nn.Module)

TEXT_DIM = 32
VISION_DIM = 32
# Weights this wide keep the activations of a two-layer encoder near 1, so that another prompt gives another embedding.
INITIALIZER_RANGE = 0.2
VISION_SIZE = 32
LLAVA_SIZE = 48


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def randomised(model: ModelT, *, seed: int = 1) -> ModelT:
    """The same model in evaluation mode, its parameters redrawn so that none of its parts is silent.

    Linear and convolution weights get the standard deviation `fan_in ** -0.5`, which keeps activations near 1 and makes
    the attention's share of the output visible; every other parameter (biases, norm weights, modulation tables) gets
    noise of 0.1 added, so that no two norms have the same weight and no zero-initialised gate stays shut.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if name == "weight" and isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
                    parameter.copy_(noise * (parameter.numel() / parameter.shape[0]) ** -0.5)
                else:
                    parameter.add_(noise, alpha=0.1)
    return model.eval()


def clip_text_encoder(*, projection: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """CLIP's text encoder with pooled outputs of `TEXT_DIM`."""
    tokenizer = tokenizers.clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        projection_dim=TEXT_DIM,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _t5_settings(vocabulary: int | None = None) -> dict[str, int | str]:
    return {
        "vocab_size": vocabulary or len(tokenizers.t5_tokenizer()),
        "d_model": TEXT_DIM,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
    }


def t5_encoder(*, vocabulary: int | None = None) -> T5EncoderModel:
    """T5 v1.1's encoder, for the tokens of `t5_tokenizer` or another number of them."""
    return T5EncoderModel(T5Config(**_t5_settings(vocabulary))).eval()


def umt5_encoder() -> UMT5EncoderModel:
    """UMT5's encoder, the text encoder of Wan."""
    return UMT5EncoderModel(UMT5Config(**_t5_settings())).eval()


def qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    """Qwen2.5-VL with one windowed and one full vision layer, the text and image encoder of Qwen-Image."""
    tokenizer = tokenizers.qwen_tokenizer()
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": TEXT_DIM,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "initializer_range": INITIALIZER_RANGE,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "bos_token_id": token_id("<|endoftext|>"),
            "eos_token_id": token_id("<|im_end|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": TEXT_DIM,
            "fullatt_block_indexes": [1],
            "initializer_range": INITIALIZER_RANGE,
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        initializer_range=INITIALIZER_RANGE,
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def _llama_config() -> LlamaConfig:
    tokenizer: PreTrainedTokenizerBase = tokenizers.llama_tokenizer()
    # HunyuanVideo reads the hidden states three from the end, which needs three layers.
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def llama() -> LlamaModel:
    """Llama, the text encoder of HunyuanVideo."""
    return LlamaModel(_llama_config()).eval()


def llava() -> LlavaForConditionalGeneration:
    """Llava, the text and image encoder of HunyuanVideo image-to-video; a picture is 576 tokens, as in the real one."""
    tokenizer = tokenizers.llama_tokenizer()
    config = LlavaConfig(
        vision_config=_vision_config(image_size=LLAVA_SIZE, patch_size=2),
        text_config=_llama_config(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config).eval()


def _vision_config(*, image_size: int, patch_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=VISION_DIM,
        intermediate_size=64,
        projection_dim=TEXT_DIM,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
    )


def clip_vision_encoder(*, projection: bool = False) -> CLIPVisionModel | CLIPVisionModelWithProjection:
    """CLIP's vision encoder for `VISION_SIZE` pixels: 17 tokens of width 32, or one projection of `TEXT_DIM`."""
    config = _vision_config(image_size=VISION_SIZE, patch_size=8)
    return (CLIPVisionModelWithProjection if projection else CLIPVisionModel)(config).eval()


def image_vae(*, latent_channels: int = 4) -> AutoencoderKL:
    """The image VAE of FLUX, SD3, PixArt and Stable Diffusion: 8 pixels a latent."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=latent_channels,
        norm_num_groups=4,
        scaling_factor=0.5,
        shift_factor=0.1,
        force_upcast=False,
    ).eval()


def qwen_vae() -> AutoencoderKLQwenImage:
    """Qwen-Image's VAE: 8 pixels a latent, four channels."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.2, 0.1, 0.0, 0.3],
        latents_std=[1.2, 0.9, 1.1, 0.8],
    ).eval()


def wan_vae() -> AutoencoderKLWan:
    """Wan's VAE: 8 pixels and 4 frames a latent, four channels."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.2, 0.1, 0.0, 0.3],
        latents_std=[1.2, 0.9, 1.1, 0.8],
    ).eval()


def hunyuan_video_vae() -> AutoencoderKLHunyuanVideo:
    """HunyuanVideo's VAE: 8 pixels and 4 frames a latent, four channels."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=4
    ).eval()
