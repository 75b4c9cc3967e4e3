"""LTX-2: text- and image-to-video with sound. A step's two text guidance branches are one batch of both streams."""

from __future__ import annotations

from pipeboost.families import BatchedBranches, Family, StageDoor, stage_doors

FAMILY = Family(
    name="ltx2",
    pipelines=("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
    transformers=("LTX2VideoTransformer3DModel",),
    denoisers=("transformer",),
    doors=(
        *stage_doors(
            text_outputs=(
                "prompt_embeds",
                "prompt_attention_mask",
                "negative_prompt_embeds",
                "negative_prompt_attention_mask",
            )
        ),
        StageDoor("", "prepare_audio_latents", "latent preparation", ("latents",)),
        StageDoor("audio_vae", "decode", "audio decoding", ("mel_spectrogram",)),
        StageDoor("vocoder", "__call__", "audio decoding", ("audio",)),
    ),
    guided=True,
    # Its calls for skipped attention and for each stream by itself have no second branch, and run on every rank.
    batched=BatchedBranches(
        samples=(
            "hidden_states",
            "audio_hidden_states",
            "encoder_hidden_states",
            "audio_encoder_hidden_states",
            "timestep",
            "audio_timestep",
            "sigma",
            "audio_sigma",
            "encoder_attention_mask",
            "audio_encoder_attention_mask",
            "video_coords",
            "audio_coords",
            "perturbation_mask",
            "video_self_attention_mask",
            "video_keyframes_mask",
        )
    ),
)
