"""From a model's name and a prompt to a saved image or video: `generate_image`, `generate_video`, `load_model`."""

from pipeboost.generate.functions import free_models, generate_image, generate_video, load_model
from pipeboost.generate.outputs import Generated, GeneratedImage, GeneratedVideo
from pipeboost.generate.session import LoadedModel

__all__ = [
    "Generated",
    "GeneratedImage",
    "GeneratedVideo",
    "LoadedModel",
    "free_models",
    "generate_image",
    "generate_video",
    "load_model",
]
