"""Everything that `pipeboost serve` can be told, checked once, and handed to the HTTP process as a file."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Collection, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipeboost.core.config_sources import is_kubernetes
from pipeboost.core.errors import ConfigurationError, quoted
from pipeboost.core.own_folder import kept_in
from pipeboost.core.user_files import parse_json, read_text

PREFIX = "PIPEBOOST_SERVE"
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
_RATE = re.compile(r"([1-9]\d*)/(second|minute|hour|day)")


class Settings(BaseModel):
    """Settings of one server; durations in seconds.

    Attributes:
        acceleration: arguments of `accelerate_pipeline`, as JSON values.
        ranks: processes that share the model.
        lora_memory: GiB that adapters may take.
        warm_sizes: `WIDTHxHEIGHT` or `WIDTHxHEIGHTxFRAMES`, run once before the server is ready.
        max_wait: predicted waiting above which a request is refused.
        timeout: of one request, from when it was accepted.
        disk_budget: GiB that results may take.
        max_body: MiB of a request's body.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model_path: str | None = None
    vae_path: str | None = None
    device: str = "auto"
    acceleration: dict[str, Any] = Field(default_factory=dict)
    ranks: int = Field(1, ge=1)
    served_model_name: str = Field("", max_length=200)
    lora_dir: Path | None = None
    lora_memory: float = Field(4.0, gt=0, allow_inf_nan=False)
    warm_sizes: tuple[str, ...] = ()

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None
    cors_origin: tuple[str, ...] = ()

    data_dir: Path = Field(default_factory=lambda: kept_in(os.environ).parent / "serve")
    retention: float = Field(7 * 86400.0, gt=0, allow_inf_nan=False)
    disk_budget: float = Field(20.0, gt=0, allow_inf_nan=False)
    upload: str | None = None

    policy: Literal["fair", "fifo"] = "fair"
    max_queue: int = Field(256, ge=1)
    max_queue_per_key: int = Field(64, ge=1)
    max_wait: float = Field(1800.0, gt=0, allow_inf_nan=False)
    rate_limit: str | None = None
    timeout: float = Field(3600.0, gt=0, allow_inf_nan=False)
    step_timeout: float = Field(120.0, gt=0, allow_inf_nan=False)
    start_timeout: float = Field(1800.0, gt=0, allow_inf_nan=False)
    drain_timeout: float = Field(30.0, ge=0, allow_inf_nan=False)

    max_body: float = Field(64.0, gt=0, allow_inf_nan=False)
    max_prompt: int = Field(10_000, ge=1)
    max_pixels: int = Field(4096 * 4096, ge=1)
    max_frames: int = Field(481, ge=1)
    max_steps: int = Field(200, ge=1)
    max_images: int = Field(10, ge=1, le=10)
    allow_image_urls: bool = False
    log_prompts: bool = False

    @field_validator(
        "retention", "timeout", "max_wait", "step_timeout", "start_timeout", "drain_timeout", mode="before"
    )
    @classmethod
    def _seconds(cls, value: Any) -> Any:
        """Read `"7d"`, `"12h"`, `"30m"` and `"90s"`."""
        text = value.strip() if isinstance(value, str) else ""
        return float(text[:-1]) * _UNITS[text[-1]] if re.fullmatch(r"\d+(\.\d+)?[smhd]", text) else value

    @field_validator("lora_dir", "api_key_file", "data_dir")
    @classmethod
    def _home(cls, value: Path | None) -> Path | None:
        return value and value.expanduser()

    @field_validator("rate_limit")
    @classmethod
    def _rate(cls, value: str | None) -> str | None:
        if value is not None and not _RATE.fullmatch(value):
            raise ValueError("must be COUNT/second, minute, hour or day, as 60/minute")
        return value

    @field_validator("warm_sizes")
    @classmethod
    def _sizes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for size in value:
            if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", size):
                raise ValueError("must be WIDTHxHEIGHT or WIDTHxHEIGHTxFRAMES, as 1024x1024")
        return value

    @field_validator("cors_origin")
    @classmethod
    def _origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            parts = urlsplit(origin)
            if (
                parts.scheme not in ("http", "https")
                or not parts.hostname
                or origin != f"{parts.scheme}://{parts.netloc}"
            ):
                raise ValueError("must be a scheme and a host, as https://app.example.com")
        return value

    @field_validator("upload")
    @classmethod
    def _target(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"(s3|gs|az|file)://.", value):
            raise ValueError("must begin with s3://, gs://, az:// or file://")
        return value

    @field_validator("api_key")
    @classmethod
    def _keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # Headers of HTTP carry no other characters; the value is a secret, so that no message has it.
        if any(not key.isascii() or not key.isprintable() or " " in key or len(key) < 8 for key in value):
            raise ValueError("must be at least 8 printable ASCII characters without blanks")
        return value

    @model_validator(mode="after")
    def _no_key_no_network(self) -> Settings:
        if not self.is_loopback and not self.api_key and self.api_key_file is None:
            raise ValueError(f"host={self.host!r} is reachable from elsewhere; give --api-key or --api-key-file too")
        return self

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def model_name(self) -> str:
        """Return the name that clients know the model by."""
        return self.served_model_name or Path(self.model_path or "pipeboost-demo").name

    def all_keys(self) -> tuple[str, ...]:
        """Return the keys that open the server, those of the file too: one a line, `#` begins a comment.

        Raises:
            ConfigurationError: the file cannot be read, holds no key, or one that is not usable.
        """
        if self.api_key_file is None:
            return self.api_key
        lines = (line.partition("#")[0].strip() for line in read_text(self.api_key_file, "--api-key-file").splitlines())
        found = tuple(filter(None, lines))
        if not found:
            raise ConfigurationError(f"--api-key-file {self.api_key_file} holds no key")
        return checked({"api_key": (*self.api_key, *found)}).api_key


def checked(given: Mapping[str, Any]) -> Settings:
    """Return settings of what a user gave.

    Raises:
        ConfigurationError: a value that cannot be used, by its flag.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            raise ConfigurationError(message) from None
        name = str(first["loc"][0])
        value = "" if name.startswith("api_key") else f" {quoted(first['input'])}"
        raise ConfigurationError(f"{flag_of(name)}{value}: {message[0].lower()}{message[1:]}") from None


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def save(settings: Settings, path: Path) -> None:
    """Write settings for the HTTP process; they hold keys, so that nobody else may read the file."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(settings.model_dump_json())


def load(path: Path) -> Settings:
    """Read what `save` wrote.

    Raises:
        ConfigurationError: it cannot be read.
    """
    return checked(parse_json(read_text(path, "settings"), f"settings {path}"))


def check_environment(environment: MutableMapping[str, str], known: Collection[str]) -> None:
    """Refuse variables that stand for no flag, and drop what only looks like one.

    Kubernetes sets variables such as `PIPEBOOST_SERVE_PORT=tcp://10.0.0.1:8000` for a service called pipeboost-serve.

    Args:
        known: names of the flags' parameters.

    Raises:
        ConfigurationError: a variable of our prefix that is neither a flag's nor Kubernetes' own.
    """
    port = f"{PREFIX}_PORT"
    if _ADDRESS.match(environment.get(port, "")):
        del environment[port]
    variables = {f"{PREFIX}_{name.upper()}" for name in known}
    for variable in environment:
        if variable.startswith(f"{PREFIX}_") and variable not in variables and not is_kubernetes(variable):
            known_ones = ", ".join(sorted(variables))
            raise ConfigurationError(f"the environment variable {variable} stands for no flag; there are {known_ones}")
