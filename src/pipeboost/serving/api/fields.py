"""The fields that requests may have: OpenAI's own, and the extensions that clients of other servers send."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeboost.core.errors import quoted
from pipeboost.serving.api.errors import ApiError, bad
from pipeboost.serving.api.forms import Body

Model = TypeVar("Model", bound="Common")
Quality = Literal[
    "auto", "standard", "hd", "low", "medium", "high", "xhigh", "max", "extra-high", "exact", "lossless", "balanced",
    "fast",
]  # fmt: skip
Scale = Annotated[float, Field(ge=0, le=1000)]
Count = Annotated[int, Field(ge=1)]
LARGEST_SEED = 2**63 - 1


class Common(BaseModel):
    """What requests for images and videos share; None leaves a value to the model.

    Attributes:
        lora, loras: an adapter or several, each a name, or an object with `name` (or `path`, a name too) and `scale`.
        user, safety_identifier: sent by habit; nothing here depends on them.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    prompt: str
    model: str | None = None
    size: str | None = None
    width: Count | None = None
    height: Count | None = None
    quality: Quality = "auto"
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED)
    negative_prompt: str | None = None
    num_inference_steps: Count | None = None
    guidance_scale: Scale | None = None
    guidance_scale_2: Scale | None = None
    true_cfg_scale: Scale | None = None
    flow_shift: Scale | None = None
    strength: float | None = Field(None, ge=0, le=1)
    lora: Any = None
    loras: Any = None
    user: str | None = None
    safety_identifier: str | None = None


class ImageFields(Common):
    """A request for images; the fields below `moderation` change nothing but what they are allowed to be."""

    n: int = Field(1, ge=1, le=10)
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: int | None = Field(None, ge=0, le=100)
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3)
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto"] = "auto"
    style: str | None = Field(None, max_length=100)


class EditFields(ImageFields):
    """A request to edit images; those and the mask are files, data URLs, or texts in JSON that hold one."""

    image: str | list[str] | None = None
    mask: str | None = None


class VideoFields(Common):
    """A request for a video.

    Attributes:
        seconds: how long it is to be, where `num_frames` does not say.
        input_reference: a picture to start from, as an object with `image_url`; or a file.
    """

    seconds: str | int | None = None
    num_frames: Count | None = None
    fps: int | None = Field(None, ge=1, le=120)
    input_reference: dict[str, str] | str | None = None
    input_references: list[dict[str, str] | str] | None = None
    reference_url: str | None = None


class RemixFields(BaseModel):
    """A request to make a video anew with another prompt."""

    model_config = ConfigDict(extra="forbid")

    prompt: str


AnyFields = TypeVar("AnyFields", bound=BaseModel)


def parse(kind: type[AnyFields], body: Body, files: tuple[str, ...] = ()) -> AnyFields:
    """Return the fields of a body.

    Args:
        files: the fields that may be uploads.

    Raises:
        ApiError: the first field that is unknown or cannot be used, by its name.
    """
    for name in body.files:
        if name not in files:
            allowed = f"only {', '.join(files)} may be" if files else "none may be"
            raise bad(name, f"{name} is a file, but of the fields of this request {allowed}", "unknown_parameter")
    try:
        # Forms have texts alone, of which numbers are made; in JSON a text is no number.
        return kind.model_validate(body.fields, strict=body.typed)
    except ValidationError as error:
        raise _of(error, kind) from None


def _of(error: ValidationError, kind: type[BaseModel]) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    if not first["loc"]:
        return bad(None, "the name of a field is not text in UTF-8", "unknown_parameter")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        shown = f"{quoted(name)[1:-1]}={quoted(first['input'])}"
        known = ", ".join(kind.model_fields)
        return bad(name[:100], f"{shown}: there is no such field here; a request may have {known}", "unknown_parameter")
    if first["type"] == "missing":
        return bad(name, f"{name} is missing; every request needs one", "missing_required_parameter")
    wanted = first["msg"].replace("Input should be", "it must be")
    return bad(name, f"{name}={quoted(first['input'])}: {wanted[0].lower()}{wanted[1:]}")
