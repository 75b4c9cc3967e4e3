"""Random LoRA and IP-Adapter weights for the tiny pipelines, loaded through Diffusers' own loaders from memory."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from tests.pipelines.tiny_parts import TEXT_DIM

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def lora_state_dict(
    model: torch.nn.Module, *, rank: int, seed: int = 0, targets: tuple[str, ...] = LORA_TARGETS
) -> dict[str, torch.Tensor]:
    """LoRA weights of `rank` for every linear of `model` whose name ends with one of `targets`.

    The keys are those of a Diffusers checkpoint (`transformer.<linear>.lora_A.weight`), and both factors are random,
    so the adapter changes the output from the start.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(tuple(f".{target}" for target in targets)):
            shapes = {"lora_A": (rank, module.in_features), "lora_B": (module.out_features, rank)}
            for factor, shape in shapes.items():
                weights[f"transformer.{name}.{factor}.weight"] = 0.3 * torch.randn(shape, generator=generator)
    if not weights:
        raise ValueError(f"{type(model).__name__} has no linear named {targets}")
    return weights


def load_tiny_lora(
    pipe: DiffusionPipeline, *, name: str = "tiny", rank: int = 4, seed: int = 0, denoiser: str = "transformer"
) -> None:
    """Load a random LoRA adapter called `name` into `pipe.<denoiser>` with `pipe.load_lora_weights`."""
    weights = lora_state_dict(getattr(pipe, denoiser), rank=rank, seed=seed)
    second_expert = {"load_into_transformer_2": True} if denoiser == "transformer_2" else {}
    pipe.load_lora_weights(weights, adapter_name=name, **second_expert)


def ip_adapter_state_dict(pipe: DiffusionPipeline, *, seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    """IP-Adapter weights for a FLUX transformer: a projection to four image tokens, each block's keys and values."""
    generator = torch.Generator().manual_seed(seed)
    config = pipe.transformer.config
    hidden, joint = pipe.transformer.inner_dim, config.joint_attention_dim

    def linear(out_features: int, in_features: int, prefix: str) -> dict[str, torch.Tensor]:
        weight = torch.randn(out_features, in_features, generator=generator) * in_features**-0.5
        return {f"{prefix}.weight": weight, f"{prefix}.bias": 0.1 * torch.randn(out_features, generator=generator)}

    image_proj = {
        **linear(4 * joint, TEXT_DIM, "proj"),
        "norm.weight": torch.ones(joint),
        "norm.bias": 0.1 * torch.randn(joint, generator=generator),
    }
    attention: dict[str, torch.Tensor] = {}
    for block in range(config.num_layers):
        attention |= linear(hidden, joint, f"{block}.to_k_ip") | linear(hidden, joint, f"{block}.to_v_ip")
    return {"image_proj": image_proj, "ip_adapter": attention}


def load_tiny_ip_adapter(pipe: DiffusionPipeline, *, seed: int = 0) -> None:
    """Load a random IP-Adapter into a FLUX pipeline with `pipe.load_ip_adapter`.

    A pipeline without an image encoder is then called with `**ip_adapter_inputs()`; one that has it (the entry
    `flux_ip_adapter`) takes `ip_adapter_image=picture()`.
    """
    pipe.load_ip_adapter(
        ip_adapter_state_dict(pipe, seed=seed), weight_name="", image_encoder_pretrained_model_name_or_path=None
    )
    pipe.set_ip_adapter_scale(0.8)


def ip_adapter_inputs(*, seed: int = 0) -> dict[str, Any]:
    """Call arguments with random image embeddings `(1, 1, TEXT_DIM)`, for a pipeline that has no image encoder.

    The script prepares the negative ones even without guidance, hence both.
    """
    positive, negative = torch.randn(2, 1, 1, TEXT_DIM, generator=torch.Generator().manual_seed(seed))
    return {"ip_adapter_image_embeds": [positive], "negative_ip_adapter_image_embeds": [negative]}
