"""Where settings come from besides arguments: a YAML or JSON file, and `PIPEBOOST_*` environment variables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.core.own_folder import HOME_VARIABLE
from pipeboost.core.user_files import parse_json, parse_yaml, read_text

_PREFIX = "PIPEBOOST_"
_SERVER = "PIPEBOOST_SERVE_"
_KUBERNETES = re.compile(
    r"PIPEBOOST(_\w+)?_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)


def environment_settings(environment: Mapping[str, str], known: Sequence[str]) -> dict[str, str]:
    """Return the text of each `PIPEBOOST_*` variable that is set, by the setting's name.

    Raises:
        ConfigurationError: a `PIPEBOOST_*` variable that stands for none of the `known` settings; those of
            `pipeboost serve`, and Kubernetes' own, are left to others.
    """
    variables = {variable_of(name): name for name in known}
    for variable in environment:
        others = variable.startswith(_SERVER) or is_kubernetes(variable)
        if variable.startswith(_PREFIX) and variable not in (*variables, HOME_VARIABLE) and not others:
            raise ConfigurationError(
                f"the environment variable {variable} is not one of pipeboost's; it knows {', '.join(variables)}"
            )
    return {name: environment[variable] for variable, name in variables.items() if variable in environment}


def is_kubernetes(variable: str) -> bool:
    """Whether Kubernetes gives a variable of this name to pods, beside a service that is called pipeboost-something."""
    return _KUBERNETES.fullmatch(variable) is not None


def variable_of(name: str) -> str:
    """Return the environment variable of a setting."""
    return f"{_PREFIX}{name.upper()}"


def file_settings(path: Path, known: Sequence[str]) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file.

    Raises:
        ConfigurationError: the file is missing or unreadable, or has a key that is not one of the `known` settings.
    """
    what = f"config file {path}"
    text = read_text(path, "config file")
    if path.suffix == ".json":
        settings = parse_json(text, what, object_pairs_hook=lambda pairs: _without_repeats(pairs, path))
    else:
        settings = parse_yaml(text, what, loader=_loader(path))
    if not isinstance(settings, dict):
        raise ConfigurationError(f"config file {path} must hold a mapping of settings")
    for key in settings:
        if key not in known:
            raise ConfigurationError(f"config file {path} has no setting {quoted(key)}; it may have {', '.join(known)}")
    return settings


def _loader(path: Path) -> Any:
    """Return PyYAML's safe loader, which by itself lets the last of several equal keys win."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            _without_repeats([(key.value, None) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"], path)
            return dict(super().construct_mapping(node, deep=deep))

    return Loader


def _without_repeats(pairs: Sequence[tuple[Any, Any]], path: Path) -> dict[Any, Any]:
    settings: dict[Any, Any] = {}
    for key, value in pairs:
        if isinstance(key, str) and key in settings:
            raise ConfigurationError(f"config file {path} has {quoted(key)} twice; leave one out")
        if isinstance(key, str):
            settings[key] = value
    return settings
