"""What pipeboost knows of a model family: the `Family` dataclass, which is data, and what its fields are made of.

`patches/` holds one file for each; `contract/registry.py` finds the one of a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeboost.core.sharding import Autoencoder, BatchedBranches, TensorSharding, TokenSharding

BlockReturn = Literal["image_text", "text_image", "image"]


@dataclass(frozen=True)
class StageDoor:
    """A method at which a stage of the call begins and ends.

    Attributes:
        component: attribute of the pipeline that has it; empty for the pipeline itself.
        method: its name.
        stage: the stage's name. Several doors may belong to one stage.
        outputs: names of what it returns, in order; what has no name here is called `output_1` and so on.
    """

    component: str
    method: str
    stage: str
    outputs: tuple[str, ...] = ()


def stage_doors(*, text_outputs: tuple[str, ...] = ("prompt_embeds",)) -> tuple[StageDoor, ...]:
    """Return the doors of a Diffusers pipeline by the names that Diffusers gives them; a pipeline has some of them.

    Args:
        text_outputs: names of what its `encode_prompt` returns.
    """
    return (
        StageDoor("", "check_inputs", "input validation"),
        StageDoor("", "encode_prompt", "text encoding", text_outputs),
        StageDoor("", "encode_image", "image encoding", ("image_embeds",)),
        StageDoor("", "prepare_ip_adapter_image_embeds", "image encoding", ("image_embeds",)),
        StageDoor("vae", "encode", "image VAE encoding", ("latent_dist",)),
        StageDoor("scheduler", "set_timesteps", "timestep preparation"),
        StageDoor("", "get_timesteps", "timestep preparation", ("timesteps", "num_inference_steps")),
        StageDoor("", "prepare_latents", "latent preparation", ("latents",)),
        StageDoor("", "prepare_mask_latents", "latent preparation", ("mask", "masked_image_latents")),
        StageDoor("vae", "decode", "decoding", ("sample",)),
        StageDoor("image_processor", "postprocess", "postprocessing", ("images",)),
        StageDoor("video_processor", "postprocess_video", "postprocessing", ("frames",)),
    )


@dataclass(frozen=True)
class Blocks:
    """One list of repeated transformer blocks.

    Attributes:
        path: attribute of the transformer, such as `"transformer_blocks"`.
        returns: what a block returns: both streams in that order, or the image stream alone.
        text_dims: block argument → the dimension that is the text length, for arguments whose text length varies with
            the prompt. `"image_rotary_emb.1"` means the second tensor of that tuple. Empty where every prompt is padded
            to one length.
        cached_with_previous: a cache takes this list and the one before it as one row of blocks with one decision a
            step, as cache-dit does for FLUX. Both must be called with the same arguments and nothing in between.
    """

    path: str
    returns: BlockReturn
    text_dims: Mapping[str, int]
    cached_with_previous: bool = False


@dataclass(frozen=True)
class PaddedText:
    """A transformer that takes padded text with a mask, and hands its blocks a mask over image and text.

    Attributes:
        embeds: forward argument with the text states, `(batch, text tokens, width)`, padded on the right.
        mask: forward argument with its mask, `(batch, text tokens)`, nonzero where a token is real.
        block_mask: argument of the blocks that carries the joint key-padding mask.
    """

    embeds: str
    mask: str
    block_mask: str


@dataclass(frozen=True)
class FullSize:
    """A published model size, which `pipeboost bench` builds with random weights.

    Attributes:
        name: what the user types, such as `"flux.1-dev"`.
        pipeline: Diffusers pipeline class name.
        transformer: Diffusers transformer class name.
        config: its constructor arguments.
        inputs: `(device, dtype) -> forward arguments` at the published resolution, random.
        workload: the resolution in words.
    """

    name: str
    pipeline: str
    transformer: str
    config: Mapping[str, Any]
    inputs: Callable[[Any, Any], dict[str, Any]]
    workload: str


@dataclass(frozen=True)
class Measured:
    """A speed that we measured and committed to `benchmarks/results/`.

    Attributes:
        hardware: part of the device's name, such as `"H100"`.
        tier: quality tier.
        workload: size and what was timed.
        speedup: one forward, stock eager over ours.
        source: the file that holds the measurement.
    """

    hardware: str
    tier: str
    workload: str
    speedup: float
    source: str


@dataclass(frozen=True)
class Linear:
    """Bytes as a linear function of the output's size.

    Attributes:
        fixed: bytes at size zero, as the line through the measurements gives it; may be negative.
        per_pixel: bytes for each pixel of the output, over all frames.
    """

    fixed: float
    per_pixel: float

    def at(self, width: int, height: int, frames: int) -> int:
        """Return the bytes for an output of `frames` pictures of `width` times `height` pixels."""
        return max(0, round(self.fixed + self.per_pixel * width * height * frames))


@dataclass(frozen=True)
class Activations:
    """Device memory that a stage takes beyond the weights on the device, at its peak, stock eager in bf16, batch 1.

    Attributes:
        denoising: of a denoiser's forward, both guidance branches one after the other.
        decoding: of `vae.decode`.
        text_encoding: bytes, whatever the size of the output.
        width: of the output that a plan predicts the peak for, pixels.
        height: the same.
        frames: the same, 1 for an image.
        source: the file that holds the measurement.
    """

    denoising: Linear
    decoding: Linear
    text_encoding: int
    width: int
    height: int
    frames: int
    source: str


@dataclass(frozen=True)
class Family:
    """Everything that is true of one model family and of no other.

    Attributes:
        name: the family's name.
        pipelines: Diffusers pipeline class names; empty where the pipeline's script is not known.
        transformers: Diffusers transformer class names.
        denoisers: attributes of the pipeline that hold its transformers, in the order the loop uses them.
        blocks: the repeated blocks of a transformer.
        padded_text: how it masks padded text, where it does.
        full_sizes: published sizes for `pipeboost bench`.
        measured: speeds we measured, which a plan quotes on the same hardware.
        activations: what a call needs besides the weights, where it was measured.
        expert_steps: `(pipe) -> the steps that each of `denoisers` makes in the running call`, for a family whose loop
            hands over from one to the next; None where the first one makes them all. Asked inside the loop.
        doors: where the stages of a call begin and end.
        guided: whether a call makes two guidance branches a step unless its arguments say otherwise.
        prediction: `(transformer, its hidden_states) -> memory for what a forward returns`, not written to, with its
            shape, dtype and strides; None where that is not known.
        guider: component that puts a step's predictions together, where the script leaves that to one.
        batched: how its transformer takes the guidance branches where they come as one batch; None where they do not.
        token_sharding: how ranks can share the tokens; None where that is not known.
        tensor: how its transformers' weights are split in tensor parallelism; None where that is not known.
        autoencoder: what its VAE is made of; None where that is not known.
        keep_precision: paths of linears in its blocks that keep their precision where the others get 8 bits, with `*`
            for any part of a path; what is outside of the blocks always does.
        missing: where the script is not known, what else is not and is therefore left out, in words.
    """

    name: str
    pipelines: tuple[str, ...]
    transformers: tuple[str, ...]
    denoisers: tuple[str, ...]
    blocks: tuple[Blocks, ...] = ()
    padded_text: PaddedText | None = None
    full_sizes: tuple[FullSize, ...] = ()
    measured: tuple[Measured, ...] = ()
    activations: Activations | None = None
    expert_steps: Callable[[Any], tuple[int, ...]] | None = None
    doors: tuple[StageDoor, ...] = stage_doors()
    guided: bool = False
    prediction: Callable[[Any, Any], Any] | None = None
    guider: str = ""
    batched: BatchedBranches | None = None
    token_sharding: TokenSharding | None = None
    tensor: TensorSharding | None = None
    autoencoder: Autoencoder | None = None
    keep_precision: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def shares_samples(self) -> bool:
        """Whether ranks know a way to share a call."""
        return any(way is not None for way in (self.prediction, self.batched, self.token_sharding))

    def models(self, pipe: Any) -> dict[str, Any]:
        """Return the transformers this pipeline has, by attribute name, in the order the loop uses them."""
        found = {name: getattr(pipe, name, None) for name in self.denoisers}
        return {name: model for name, model in found.items() if model is not None}


def prediction_of_tokens(model: Any, hidden_states: Any) -> Any:
    """Allocate memory for a prediction for tokens `(batch, tokens, channels)`."""
    return hidden_states.new_empty((*hidden_states.shape[:-1], model.proj_out.out_features))


def prediction_of_latents(model: Any, hidden_states: Any) -> Any:
    """Allocate memory for a prediction for latents `(batch, channels, frames, height, width)`."""
    batch, _, *sizes = hidden_states.shape
    return hidden_states.new_empty((batch, model.config.out_channels, *sizes))
