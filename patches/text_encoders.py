"""Text encoders: how the weights of each class of transformers are split in tensor parallelism.

Vision towers and heads over the vocabulary stay whole; so do the norms, which are small. Several paths stand where
releases of transformers put the layers elsewhere.
"""

from __future__ import annotations

from pipeboost.families import SplitLayers, TensorSharding


def _t5() -> TensorSharding:
    attention, feed_forward = "encoder.block.*.layer.0.SelfAttention", "encoder.block.*.layer.1.DenseReluDense"
    return TensorSharding(
        layers=(
            SplitLayers(
                path=attention,
                columns=("q", "k", "v"),
                rows=("o",),
                head_biases=("relative_attention_bias",),
                counts=("n_heads", "inner_dim"),
            ),
            SplitLayers(path=feed_forward, columns=("wi", "wi_0", "wi_1"), rows=("wo",)),
            # UMT5 has a million rows of them: a fifth of its weights.
            SplitLayers(path="", gathered=("shared", "encoder.embed_tokens")),
        )
    )


def _clip() -> TensorSharding:
    layers: list[SplitLayers] = []
    for prefix in ("", "text_model."):
        layers += (
            SplitLayers(
                path=f"{prefix}encoder.layers.*.self_attn",
                columns=("q_proj", "k_proj", "v_proj"),
                rows=("out_proj",),
                counts=("num_heads", "embed_dim"),
            ),
            SplitLayers(path=f"{prefix}encoder.layers.*.mlp", columns=("fc1",), rows=("fc2",)),
            SplitLayers(path=f"{prefix}embeddings", gathered=("token_embedding",)),
        )
    return TensorSharding(layers=tuple(layers))


def _language_model(*prefixes: str) -> TensorSharding:
    layers: list[SplitLayers] = []
    for prefix in prefixes:
        layers += (
            # Fewer keys than queries share the heads, and both must divide.
            SplitLayers(
                path=f"{prefix}layers.*.self_attn",
                columns=("q_proj", "k_proj", "v_proj"),
                rows=("o_proj",),
                head_width="head_dim",
            ),
            SplitLayers(path=f"{prefix}layers.*.mlp", columns=("gate_proj", "up_proj"), rows=("down_proj",)),
            SplitLayers(path=prefix.removesuffix("."), gathered=("embed_tokens",)),
        )
    return TensorSharding(layers=tuple(layers))


TEXT_ENCODERS: dict[str, TensorSharding] = {
    "T5EncoderModel": _t5(),
    "UMT5EncoderModel": _t5(),
    "CLIPTextModel": _clip(),
    "CLIPTextModelWithProjection": _clip(),
    "LlamaModel": _language_model(""),
    "LlamaForCausalLM": _language_model("model."),
    "LlavaForConditionalGeneration": _language_model("model.language_model.", "language_model.model."),
    "Qwen2_5_VLForConditionalGeneration": _language_model("model.language_model.", "model."),
}
"""By class name; subclasses count as their base."""
