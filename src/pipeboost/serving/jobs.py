"""A job: one request as it was accepted, and what became of it. What the rooms of the server share; imports nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["image", "video"]
State = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("completed", "failed", "cancelled")

WORKER_LOST = "worker_lost"
"""The worker died or hung twice while the job ran."""
OUT_OF_MEMORY = "out_of_memory"
DEADLINE = "deadline_exceeded"
REFUSED = "invalid_request"
"""The pipeline found fault with the request when it ran."""
FAILED = "generation_failed"
CANCELLED = "cancelled"


@dataclass(frozen=True)
class Lora:
    """An adapter that the server has in its folder.

    Attributes:
        name: of its file there, without the ending.
        scale: how strongly it acts; 1 as it was trained.
    """

    name: str
    scale: float = 1.0


@dataclass(frozen=True)
class Call:
    """What the worker is to run, of plain values; None leaves one to the model.

    Attributes:
        count: outputs; output `i` has the seed `seed + i`.
        images: names of files in the job's folder: pictures to edit or to start from.
        mask: the same for a mask; white where the first picture is to be painted anew.
        arguments: further arguments of the pipeline's call, such as `{"true_cfg_scale": 4.0}`.
        cache: `"low"`, `"medium"` or `"high"` quality within the server's tier; None for the server's own.
        previews: pictures of steps on the way that are to be sent.
    """

    prompt: str
    seed: int
    count: int = 1
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    images: tuple[str, ...] = ()
    mask: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    loras: tuple[Lora, ...] = ()
    cache: str | None = None
    previews: int = 0


@dataclass(frozen=True)
class Error:
    """Why a job ended without a result: a code for programs, and one sentence."""

    code: str
    message: str


@dataclass(frozen=True)
class Result:
    """What a job made.

    Attributes:
        files: names of the finished files in the job's folder, in the format that was asked for.
        seeds: one for each.
        plan: id of the plan that ran.
        steps: denoising steps of one output.
        seconds: of the worker, all outputs together.
        stages: seconds by stage.
        width, height: pixels of what was made.
        notes: what differs from what was asked, in sentences.
    """

    files: tuple[str, ...]
    seeds: tuple[int, ...]
    plan: str
    steps: int
    seconds: float
    stages: Mapping[str, float]
    width: int
    height: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """One request as the store has it. A snapshot: the store's methods return newer ones.

    Attributes:
        id: cannot be guessed.
        owner: digest of the key that made it; empty where the server asks for none.
        kind: what it makes.
        call: what to run.
        wire: what the client asked for beside the call and gets back, such as the output format, as JSON values.
        created, started, ended, expires: seconds since the epoch; None where that is not yet.
        deadline: when it is too late, likewise; None for never.
        attempt: how often the worker was given it.
        step, steps: where the running call is.
        cost: predicted seconds of the worker.
        upload: where the results were stored besides, as a URL; empty for nowhere.
    """

    id: str
    owner: str
    kind: Kind
    call: Call
    wire: Mapping[str, Any]
    state: State
    created: float
    cost: float
    attempt: int = 0
    step: int = 0
    steps: int = 0
    started: float | None = None
    ended: float | None = None
    expires: float | None = None
    deadline: float | None = None
    error: Error | None = None
    result: Result | None = None
    upload: str = ""

    @property
    def progress(self) -> int:
        """How much of it is done, in percent; 100 only where it is completed."""
        if self.state == "completed":
            return 100
        return min(99, 100 * self.step // self.steps) if self.steps else 0


@dataclass(frozen=True)
class ModelCard:
    """What the worker says of its model when it is ready, for the HTTP process to check requests by.

    Attributes:
        pipeline: class of the pipeline.
        kind: what it makes.
        one_frame: whether it is a video's that makes images too, of one frame.
        parameters: names of its call's parameters.
        size_multiple: what widths and heights must be multiples of, in pixels.
        width, height, num_frames, num_inference_steps: what a call without them makes.
        needs_image, several_images, takes_mask: what pictures a request must and may have.
        quality: the server's tier.
        plan: id of the plan.
        loras: whether adapters can be loaded.
        fps: frames a second of its videos where a request names none.
        frame_multiple: a video has one frame more than a multiple of it.
    """

    pipeline: str
    kind: Kind
    one_frame: bool
    parameters: tuple[str, ...]
    size_multiple: int
    width: int
    height: int
    num_frames: int
    num_inference_steps: int
    needs_image: bool
    several_images: bool
    takes_mask: bool
    quality: str
    plan: str
    loras: bool
    fps: int = 16
    frame_multiple: int = 1


@dataclass(frozen=True)
class Paths:
    """Where the server keeps things.

    Attributes:
        data: the folder of `--data-dir`.
    """

    data: Path

    @property
    def database(self) -> Path:
        """The database of jobs."""
        return self.data / "jobs.sqlite"

    @property
    def folders(self) -> Path:
        """What the folders of all jobs are in."""
        return self.data / "jobs"

    def of(self, job_id: str) -> Path:
        """Return the folder of one job: its uploads, what the worker makes, and the results."""
        return self.data / "jobs" / job_id
