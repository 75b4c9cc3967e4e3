"""A job as the database has it: one JSON object."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from pipeboost.serving.errors import StorageError
from pipeboost.serving.jobs import Call, Error, Job, Lora, Result


def job_to_json(job: Job) -> str:
    """Return what `job_from_json` reads."""
    return json.dumps(dataclasses.asdict(job))


def job_from_json(text: str) -> Job:
    """Return the job that was written.

    Raises:
        StorageError: it is not one.
    """
    try:
        values = json.loads(text)
        call = _tuples(values["call"])
        values["call"] = Call(**call | {"loras": tuple(Lora(**each) for each in call["loras"])})
        for name, made in (("error", Error), ("result", Result)):
            if values[name] is not None:
                values[name] = made(**_tuples(values[name]))
        return Job(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise StorageError("a job in the database cannot be read; the database is damaged") from error


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
