"""`pipeboost generate`: prompts in, saved images or videos out; what is finished stays, whatever happens next."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import typer

from pipeboost.cli.generate_progress import BatchProgress
from pipeboost.cli.quiet import quiet_libraries
from pipeboost.core.config import ParallelConfig
from pipeboost.core.errors import ConfigurationError, PipeboostError, RankFailedError, UnsupportedError
from pipeboost.distributed import world, world_size
from pipeboost.generate import Generated, LoadedModel
from pipeboost.generate.loading import ModelSettings
from pipeboost.generate.outputs import DEFAULT_FOLDER, DEFAULT_FPS, check_fps
from pipeboost.generate.prompt_file import read_prompts
from pipeboost.generate.requests import Request, make_requests
from pipeboost.generate.session import with_defaults
from pipeboost.generate.writing import IMAGE_FORMATS, VIDEO_FORMATS, names_folder, require_pyav, write_whole

_FIRST_TO_SPEAK = 1.0
"""Seconds by which a rank lets the first one tell of what all of them refuse."""


@dataclass(frozen=True)
class Output:
    """Where results go.

    Attributes:
        target: a file, or the folder for files with names of their own; None saves nothing.
        is_file: whether `target` is a file.
        report: JSON file of all reports.
        profile: Chrome trace of all calls.
    """

    target: Path | None
    is_file: bool = False
    report: Path | None = None
    profile: Path | None = None

    @classmethod
    def of(
        cls, *, save: str | None, no_save: bool, folder: Path | None, report: Path | None, profile: Path | None
    ) -> Output:
        """Read the flags, and make the folders, before any work is spent on what goes there.

        Raises:
            ConfigurationError: flags that contradict each other, or a folder that cannot be made.
        """
        if no_save and (save is not None or folder is not None):
            raise ConfigurationError("--no-save-output contradicts --save-output and --output-path; leave one out")
        target, is_file = None if no_save else folder or DEFAULT_FOLDER, False
        if save:
            target = (folder or Path()) / Path(save).expanduser()
            is_file = not names_folder(save, target)
        if is_file and target is not None and target.suffix.lower() not in (*IMAGE_FORMATS, *VIDEO_FORMATS):
            allowed = ", ".join((*IMAGE_FORMATS, *VIDEO_FORMATS))
            raise ConfigurationError(f"--save-output {save} must be a folder or a file that ends in {allowed}")
        _make_folder(target.parent if target and is_file else target)
        files = [file for file in (target if is_file else None, report, profile) if file is not None]
        for file in files:
            if file.is_dir():
                raise ConfigurationError(f"{file} is a folder; name a file in it")
            if len([other for other in files if other.resolve() == file.resolve()]) > 1:
                raise ConfigurationError(f"{file} is named by two flags, of which one would replace the other")
            _make_folder(file.parent)
        return cls(target, is_file, report, profile)

    def check(self, kind: str, count: int) -> None:
        """Refuse a file name that the outputs do not fit.

        Raises:
            ConfigurationError: one file for several outputs, or a suffix of the other kind.
            MissingPackageError: videos cannot be written here.
        """
        if self.target is None:
            return
        formats = VIDEO_FORMATS if kind == "video" else IMAGE_FORMATS
        if kind == "video":
            require_pyav()
        if self.is_file and count > 1:
            raise ConfigurationError(f"--save-output {self.target} is one file for {count} {kind}s; name a folder")
        if self.is_file and self.target.suffix.lower() not in formats:
            raise ConfigurationError(
                f"--save-output {self.target}: the model makes {kind}s; use a name that ends in {', '.join(formats)}"
            )

    def save(self, made: Generated) -> tuple[Path | None, str]:
        """Save one output; where it is, and a line that says so."""
        if self.target is None:
            return None, "not saved"
        replaced = self.is_file and self.target.exists()
        path: Path = made.save(self.target)  # type: ignore[attr-defined]
        return path, f"{path}{' (replaced)' if replaced else ''}"


@dataclass
class _Results:
    """What is finished so far, as the report file shows it."""

    settings: ModelSettings
    components: Mapping[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def add(self, request: Request, made: Generated, path: Path | None, *, profile: Path | None) -> None:
        process, start = len(self.rows), sum(row["report"]["seconds"] for row in self.rows)
        self.rows.append(
            {
                "prompt": made.prompt,
                "seed": made.seed,
                "path": None if path is None else str(path),
                "notes": list(made.notes),
                "report": json.loads(made.report.to_json()),
            }
        )
        if profile is not None:
            self.events += _trace_events(made, process, start, profile.parent)

    def write(self, output: Output, plan: str) -> None:
        if output.report is not None:
            whole = {
                "model": self.settings.model_path,
                "components": self.components,
                "plan": plan.splitlines(),
                "requests": self.rows,
            }
            _write_json(output.report, whole)
        if output.profile is not None:
            _write_json(output.profile, {"traceEvents": self.events, "displayTimeUnit": "ms"})


def run_generate(
    settings: ModelSettings,
    *,
    prompts: Sequence[str],
    prompt_file: Path | None,
    request: Mapping[str, Any],
    call: Sequence[str],
    fps: int | None,
    warm_up: bool,
    output: Output,
) -> None:
    """Make and save one output for each prompt.

    Args:
        request: values for all requests, by the names of `Request`.
        call: further arguments of the pipeline's call, `NAME=VALUE` each.

    Raises:
        PipeboostError: something cannot be done as asked, or an output cannot be saved; earlier ones are kept.
    """
    if fps is not None:
        check_fps(fps)
    defaults = with_defaults(settings, {**request, "call": _call_arguments(call)})
    rows: list[dict[str, Any]] = [{"prompt": text} for text in prompts]
    if prompt_file is not None:
        rows += read_prompts(prompt_file)
    if not rows:
        if "prompt" not in defaults:
            raise ConfigurationError("there is no prompt; give --prompt or --prompt-file")
        rows = [{}]
    requests = make_requests(rows, defaults)
    first = world().rank == 0
    if not first:
        output = Output(None)
    with quiet_libraries(), BatchProgress(len(requests), silent=not first) as progress:
        model = LoadedModel(settings, tell=progress.tell)
        with model:
            _make_all(model, requests, fps=fps, warm_up=warm_up, output=output, progress=progress)


def _make_all(
    model: LoadedModel,
    requests: Sequence[Request],
    *,
    fps: int | None,
    warm_up: bool,
    output: Output,
    progress: BatchProgress,
) -> None:
    if fps is not None and model.kind != "video":
        raise UnsupportedError(f"--fps {fps}: the model makes images; leave it out")
    output.check(model.kind, len(requests))
    outputs = model.generate(
        requests,
        fps=fps or DEFAULT_FPS,
        progress=progress.step,
        profiled=output.profile is not None,
        warm_up=warm_up,
    )
    results = _Results(model.settings, {name: asdict(each) for name, each in model.components.items()})
    progress.finished_loading(model.loaded_line)
    try:
        for request, made in zip(requests, outputs, strict=True):
            path, line = output.save(made)
            results.add(request, made, path, profile=output.profile)
            progress.finished(f"{line}  seed {made.seed}  {made.report.seconds:.2f} s")
            for note in made.notes:
                progress.note(note)
    except PipeboostError as error:
        raise type(error)(f"{error}{_kept(results, requests)}") from error
    except KeyboardInterrupt:
        progress.close()
        if world().rank == 0:
            print(f"pipeboost: stopped{_kept(results, requests)}", file=sys.stderr)
        raise typer.Exit(130) from None
    finally:
        results.write(output, str(model.pipe.acceleration.plan))


def accelerated_by(settings: Any, **flags: Any) -> dict[str, Any]:
    """Arguments of `accelerate_pipeline`: the config file's `acceleration:` mapping, then the flags that were given.

    Raises:
        ConfigurationError: `acceleration:` is not a mapping.
    """
    if not isinstance(settings, Mapping | None):
        raise ConfigurationError(f"acceleration: {settings!r} in the config file must be a mapping of settings")
    if flags["compile"] is True:
        flags["compile"] = "regional"
    elif flags["compile"] is False:
        flags["compile"] = "off"
    return {**(settings or {}), **{name: value for name, value in flags.items() if value is not None}}


def generate_on_ranks(settings: ModelSettings, ranks: int, **arguments: Any) -> None:
    """`run_generate` on as many processes as the model is to be shared by, of which the first tells and saves.

    Args:
        ranks: how many; those that are running already are taken.

    Raises:
        PipeboostError: as `run_generate`, or a process failed.
    """
    if ranks in (1, world_size()):
        run_generate(settings, **arguments)
        return
    if world_size() > 1:
        raise ConfigurationError(f"--num-gpus {ranks} contradicts the {world_size()} processes that are running")
    from pipeboost.distributed.launch import launch

    launch(_on_rank, settings, arguments, num_gpus=ranks)


def _on_rank(settings: ModelSettings, arguments: dict[str, Any]) -> None:
    """`run_generate` on one rank; what it raises for the user ends all ranks, and is told once, without a traceback."""
    try:
        run_generate(settings, **arguments)
    except RankFailedError:
        raise
    except PipeboostError as error:
        rank = world().rank
        if rank == 0:
            raise RankFailedError(str(error), rank=0) from error
        time.sleep(_FIRST_TO_SPEAK)
        raise RankFailedError(f"{error} (rank {rank})", rank=rank) from error


def parallel_by(
    *, gpus: int | None, cfg: bool, ulysses: int | None, ring: int | None, tensor: int | None
) -> tuple[ParallelConfig | None, int]:
    """The layout that the flags ask for, None where they leave it open, and the number of ranks.

    Raises:
        ConfigurationError: a degree that is not positive, or degrees that do not make up the GPUs.
    """
    if not cfg and (ulysses, ring, tensor) == (None,) * 3 and (gpus is None or gpus > 1):
        return None, world_size() if gpus is None else gpus
    given = {"cfg": 2 if cfg else None, "ulysses": ulysses, "ring": ring, "tensor": tensor}
    degrees: dict[str, Any] = {name: degree for name, degree in given.items() if degree is not None}
    layout = ParallelConfig(**degrees)
    if gpus is not None and gpus < 1:
        raise ConfigurationError(f"--num-gpus {gpus} must be at least 1")
    if gpus is not None and layout.size != gpus:
        raise ConfigurationError(f"--num-gpus {gpus} is not the product of the parallel flags, {layout.size}")
    return layout, layout.size


def _call_arguments(words: Sequence[str]) -> dict[str, Any]:
    import yaml

    arguments = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigurationError(f"--call {word} must be NAME=VALUE, such as --call max_sequence_length=256")
        try:
            arguments[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigurationError(f"--call {word}: the value is not valid YAML") from error
    return arguments


def _kept(results: _Results, requests: Sequence[Request]) -> str:
    if len(requests) == 1:
        return ""
    return f" ({len(results.rows)} of {len(requests)} were finished and are kept)"


def _trace_events(made: Generated, process: int, start: float, beside: Path) -> Iterator[dict[str, Any]]:
    """The report's own Chrome trace, as one process of a trace of many calls, `start` seconds after the first."""
    try:
        with tempfile.TemporaryDirectory(dir=beside) as folder:
            path = Path(folder) / "trace.json"
            made.report.to_chrome_trace(path)
            events = json.loads(path.read_text())["traceEvents"]
    except OSError as error:
        raise PipeboostError(f"the profile cannot be written to {beside}: {error.strerror or error}") from error
    name = f"seed {made.seed}: {made.prompt}"
    yield {"name": "process_name", "ph": "M", "pid": process, "args": {"name": name}}
    for event in events:
        yield {**event, "pid": process, "ts": event["ts"] + start * 1e6}


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2)
    write_whole(path, lambda file: file.write(text.encode()))


def _make_folder(path: Path | None) -> None:
    if path is None:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be made a folder: {error.strerror}") from error
