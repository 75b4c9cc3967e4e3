"""Where the outputs of `pipeboost generate` go, checked before the model is loaded, and what its report holds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeboost.core.errors import ConfigurationError, PipeboostError
from pipeboost.core.user_files import make_folder, user_path
from pipeboost.generate import Generated, GeneratedImage, GeneratedVideo, LoadedModel
from pipeboost.generate.outputs import DEFAULT_FOLDER, output_path, require_pyav, write_whole

_FORMATS = {"image": GeneratedImage.formats, "video": GeneratedVideo.formats}
_ALL_FORMATS = sum(_FORMATS.values(), ())


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
            ConfigurationError: flags that contradict each other, or a folder that cannot be made or written to.
        """
        if no_save and (save is not None or folder is not None):
            raise ConfigurationError("--no-save-output contradicts --save-output and --output-path; leave one out")
        target, is_file = user_path(folder or DEFAULT_FOLDER, "--output-path"), False
        if target.suffix.lower() in _ALL_FORMATS and not target.is_dir():
            raise ConfigurationError(f"--output-path {target} is no folder; for a file use --save-output {target.name}")
        if save:
            named, is_file = output_path(save, _ALL_FORMATS, "--save-output")
            target = target / named if folder else named
            is_file = is_file and not target.is_dir()
        files = {"--save-output": target} if is_file else {}
        files |= {flag: user_path(path, flag) for flag, path in (("--report", report), ("--profile", profile)) if path}
        folders = {} if no_save or is_file else {str(target): target}
        for flag, file in files.items():
            if file.is_dir():
                raise ConfigurationError(f"{flag} {file} is a folder; name a file in it")
            if [other.resolve() for other in files.values()].count(file.resolve()) > 1:
                raise ConfigurationError(f"{file} is named by two flags, of which one would replace the other")
            if not file.exists() or file.is_file():  # a device is written to where it is
                folders[f"{file.parent}, the folder of {flag} {file.name},"] = file.parent
        for name, path in folders.items():
            make_folder(path, name)
        return cls(None if no_save else target, is_file, files.get("--report"), files.get("--profile"))

    def check(self, kind: str, count: int) -> None:
        """Refuse a file name that the outputs do not fit.

        Raises:
            ConfigurationError: one file for several outputs, or a suffix of the other kind.
            MissingPackageError: videos cannot be written here.
        """
        if self.target is not None and kind == "video":
            require_pyav()
        if self.target is None or not self.is_file:
            return
        if count > 1:
            raise ConfigurationError(f"--save-output {self.target} is one file for {count} {kind}s; name a folder")
        if self.target.suffix.lower() not in (formats := _FORMATS[kind]):
            named = f"--save-output {self.target}: the model makes {kind}s"
            raise ConfigurationError(f"{named}; use a name that ends in {', '.join(formats)}")


class Results:
    """Saves what is finished, and keeps it for the report and the profile.

    Args:
        count: how many outputs there will be.
    """

    def __init__(self, model: LoadedModel, count: int, output: Output) -> None:
        self._count = count
        self._output = output
        self._rows: list[dict[str, Any]] = []
        self._events: list[dict[str, Any]] = []
        self._whole = {
            "model": model.settings.model_path,
            "components": {name: asdict(each) for name, each in model.components.items()},
            "plan": str(model.pipe.acceleration.plan).splitlines(),
            "requests": self._rows,
        }

    @property
    def kept(self) -> str:
        """How many were finished, to be put behind the reason why no more are."""
        return f" ({len(self._rows)} of {self._count} were finished and are kept)" if self._count > 1 else ""

    def add(self, made: Generated) -> str:
        """Save an output; the words that say where it is."""
        target = self._output.target
        replaced = target is not None and self._output.is_file and target.exists()
        path = None if target is None else str(made.save(target))
        start = sum(row["report"]["seconds"] for row in self._rows)
        name = {"name": f"seed {made.seed}: {made.prompt}"}
        self._events.append({"name": "process_name", "ph": "M", "pid": len(self._rows), "args": name})
        self._events += made.report.trace_events(process=len(self._rows), start=start)
        row = {"prompt": made.prompt, "seed": made.seed, "path": path, "notes": list(made.notes)}
        self._rows.append({**row, "report": json.loads(made.report.to_json())})
        return f"{path or 'not saved'}{' (replaced)' if replaced else ''}"

    def write(self) -> None:
        """Write the report and the profile, where they were asked for.

        Raises:
            PipeboostError: one cannot be written; the outputs themselves are kept.
        """
        trace = {"traceEvents": self._events, "displayTimeUnit": "ms"}
        try:
            for path, content in ((self._output.report, self._whole), (self._output.profile, trace)):
                if path is not None:
                    write_whole(path, json.dumps(content, indent=2).encode())
        except PipeboostError as error:
            error.args = (f"{error}{self.kept}",)
            raise
