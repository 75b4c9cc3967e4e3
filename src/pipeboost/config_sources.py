"""Where settings come from besides arguments: a YAML or JSON file, and `PIPEBOOST_*` environment variables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeboost.errors import ConfigurationError

_PREFIX = "PIPEBOOST_"


def environment_settings(environment: Mapping[str, str], known: Sequence[str]) -> dict[str, str]:
    """The text of each `PIPEBOOST_*` variable that is set, by the setting's name.

    Raises:
        ConfigurationError: a `PIPEBOOST_*` variable that stands for none of the `known` settings.
    """
    variables = {variable_of(name): name for name in known}
    for variable in environment:
        if variable.startswith(_PREFIX) and variable not in variables:
            raise ConfigurationError(
                f"the environment variable {variable} is not one of pipeboost's; it knows {', '.join(variables)}"
            )
    return {name: environment[variable] for variable, name in variables.items() if variable in environment}


def variable_of(name: str) -> str:
    """The environment variable of a setting."""
    return f"{_PREFIX}{name.upper()}"


def file_settings(path: Path, known: Sequence[str]) -> dict[str, Any]:
    """The mapping in a YAML or JSON file.

    Raises:
        ConfigurationError: the file is missing or unreadable, or has a key that is not one of the `known` settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"config file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"config file {path} is not text in UTF-8; it must be YAML or JSON") from error
    if path.suffix == ".json":
        try:
            settings = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigurationError(f"config file {path} is not valid JSON: {error}") from error
    else:
        import yaml

        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigurationError(f"config file {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ConfigurationError(f"config file {path} must hold a mapping of settings")
    for key in settings:
        if key not in known:
            raise ConfigurationError(f"config file {path} has no setting {key!r}; it may have {', '.join(known)}")
    return settings
