"""Where settings come from besides arguments: a YAML or JSON file, and `PIPEBOOST_*` environment variables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.core.own_folder import HOME_VARIABLE
from pipeboost.core.user_files import parse_json, parse_yaml, read_text

_PREFIX = "PIPEBOOST_"
_OF_SERVER = "PIPEBOOST_SERVE_"
_INJECTED = re.compile(
    r"PIPEBOOST(_[A-Z0-9]+)*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes sets in its containers for a service whose name begins with `pipeboost`."""
_OFF_WORDS = ("none", "off", "false", "0")
_WORDS = {"none": None, "true": True, "on": True, "false": False, "off": False}


class FromEnvironment(NamedTuple):
    """What `PIPEBOOST_*` variables say of one setting.

    Attributes:
        value: as an argument would give it: a word, None for off, or a mapping of fields.
        variables: that said it → the last part of the field's name.
    """

    value: Any
    variables: Mapping[str, str]

    def error(self, error: ConfigurationError) -> ConfigurationError:
        """Return an error about the value as one that names the variable, or all where it may be any of them."""
        named = [each for each, field in self.variables.items() if re.search(rf"\.{field}\b", str(error))]
        return ConfigurationError(f"environment variable {', '.join(named or self.variables)}: {error}")


def environment_settings(
    environment: Mapping[str, str], known: Mapping[str, Sequence[str]], short_names: Mapping[str, str]
) -> dict[str, FromEnvironment]:
    """Return what `PIPEBOOST_*` variables say of each setting for which one is set.

    `PIPEBOOST_CACHE` is the whole setting, `PIPEBOOST_CACHE_FN` one field of it; both are merged. In the text of a
    field, commas make a list, and a slash makes a list of lists.

    Args:
        environment: the variables.
        known: setting → its fields; a field of a field has a dot in its name.
        short_names: setting → the field that a word for the whole setting stands for.

    Raises:
        ConfigurationError: a variable stands for none of these, or contradicts another; those of `pipeboost serve`, and
            Kubernetes' own, are left to others.
    """
    fields = {variable_of(f"{name}.{field}"): (name, field) for name in known for field in known[name]}
    wholes = {variable_of(name): name for name in known}
    given: dict[str, dict[str, str]] = {}
    for variable in environment:
        if variable in fields:
            name, field = fields[variable]
            given.setdefault(name, {})[field] = environment[variable]
        elif variable in wholes:
            given.setdefault(wholes[variable], {})[""] = environment[variable]
        elif variable.startswith(_PREFIX) and variable != HOME_VARIABLE and not _is_others(variable):
            near = [each for each in fields if variable.startswith(f"{variable_of(fields[each][0])}_")]
            raise ConfigurationError(
                f"the environment variable {variable} is not one of pipeboost's; it knows {', '.join(near or wholes)}"
            )
    return {name: _merged(name, given[name], short_names.get(name)) for name in known if name in given}


def is_kubernetes(variable: str) -> bool:
    """Whether Kubernetes gives a variable of this name to pods, beside a service that is called pipeboost-something."""
    return _INJECTED.fullmatch(variable) is not None


def _is_others(variable: str) -> bool:
    return variable.startswith(_OF_SERVER) or is_kubernetes(variable)


def _merged(name: str, texts: Mapping[str, str], short: str | None) -> FromEnvironment:
    word = texts.get("", "auto")
    off = name != "quality" and word.lower() in _OFF_WORDS
    others = {field: _value(text) for field, text in texts.items() if field}
    variables = {variable_of(f"{name}.{field}"): field.rpartition(".")[2] for field in others}
    if not others:
        return FromEnvironment(None if off else word, {variable_of(name): ""})
    if off or (word != "auto" and (short is None or short in others)):
        other = variable_of(f"{name}.{short}") if short in others else next(iter(variables))
        raise ConfigurationError(f"environment variable {variable_of(name)}={word} contradicts {other}; unset one")
    values: dict[str, Any] = {field: value for field, value in others.items() if "." not in field}
    if word != "auto" and short is not None:
        values[short] = word
        variables[variable_of(name)] = short
    nested: dict[str, dict[str, Any]] = {}
    for field, value in others.items():
        outer, dot, inner = field.partition(".")
        if dot:
            nested.setdefault(outer, {})[inner] = value
    # What the second expert's variables leave open is as the first one's; a schedule of its own is for its own steps.
    for outer, inner_values in nested.items():
        inherited = {field: value for field, value in values.items() if field != "steps" or short not in inner_values}
        values = {**values, outer: {**inherited, **inner_values}}
    return FromEnvironment(values, variables)


def _value(text: str) -> Any:
    """Return the value that the text of a field stands for."""
    text = text.strip()
    if "/" in text:
        return [_value(f"{part},") for part in text.split("/")]
    if "," in text:
        return [_value(part) for part in text.split(",") if part.strip()]
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def variable_of(name: str) -> str:
    """Return the environment variable of a setting, or of a field such as `cache.fn`."""
    return f"{_PREFIX}{name.upper().replace('.', '_')}"


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
