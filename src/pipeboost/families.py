"""What a model family is: the dataclasses that files in `patches/`, and patches of other packages, declare."""

from pipeboost.core.families import (
    Activations,
    BlockReturn,
    Blocks,
    Family,
    FullSize,
    Linear,
    Measured,
    PaddedText,
    StageDoor,
    prediction_of_latents,
    prediction_of_tokens,
    stage_doors,
)
from pipeboost.core.sharding import (
    Autoencoder,
    BatchedBranches,
    Compiling,
    SplitLayers,
    TensorSharding,
    TokenArgument,
    TokenSharding,
)

__all__ = [
    "Activations",
    "Autoencoder",
    "BatchedBranches",
    "BlockReturn",
    "Blocks",
    "Compiling",
    "Family",
    "FullSize",
    "Linear",
    "Measured",
    "PaddedText",
    "SplitLayers",
    "StageDoor",
    "TensorSharding",
    "TokenArgument",
    "TokenSharding",
    "prediction_of_latents",
    "prediction_of_tokens",
    "stage_doors",
]
