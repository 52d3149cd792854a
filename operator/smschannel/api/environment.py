"""Settings that come from environment variables: cleaning, help and error messages. No I/O."""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError, field_validator
from pydantic_settings import BaseSettings

from smschannel.api.text import clean_line

_SERVICE_LINK = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_[A-Z]+)?)?)")


class EnvironmentSettings(BaseSettings):
    """Settings whose values lose invisible characters around them, and are refused for those inside."""

    @field_validator("*", mode="before")
    @classmethod
    def _clean(cls, value: Any) -> Any:
        return clean_line(value) if isinstance(value, str) else value


def unknown_variables(settings: type[BaseSettings], environment: Mapping[str, str]) -> Iterator[str]:
    """Describe each variable with the settings' prefix that is no setting, with the nearest one that is.

    Variables that Kubernetes sets for a Service of that name are left out.
    """
    prefix = str(settings.model_config["env_prefix"])
    known = [name.upper() for name in settings.model_fields]
    for variable, value in sorted(environment.items()):
        name = variable.upper().removeprefix(prefix)
        if name == variable.upper() or name in known or _is_service_link(name, value):
            continue
        nearest = difflib.get_close_matches(name, known, 1)
        yield f"{variable} is not a setting" + (f"; did you mean {prefix}{nearest[0]}?" if nearest else "")


def _is_service_link(name: str, value: str) -> bool:
    """Return whether Kubernetes set the variable, for a Service whose name begins like the settings' prefix."""
    is_port = name == "PORT" or name.endswith("_PORT")
    return bool(_SERVICE_LINK.fullmatch(name)) and (not is_port or "://" in value or "SERVICE_PORT" in name)


def settings_help(settings: type[BaseSettings]) -> str:
    """Return the text for --help: each environment variable with its default and description."""
    prefix, lines = settings.model_config["env_prefix"], []
    for name, field in settings.model_fields.items():
        default = "required" if field.is_required() else f"default: {plain(field.default)}"
        lines.append(f"\b\n{prefix}{name.upper()} ({default})\n  {field.description}")
    return "\n\n".join(lines)


def explain(error: ValidationError, settings: type[BaseSettings]) -> str:
    """Return the errors in the environment, one variable per line, without the values: one may be a secret."""
    prefix, lines = settings.model_config["env_prefix"], ["The settings cannot be used:"]
    for each in error.errors():
        what = "is not set" if each["type"] == "missing" else each["msg"].removeprefix("Value error, ")
        if not each["loc"]:  # an error about several variables
            lines.append(f"  {what}")
            continue
        name = str(each["loc"][0])
        field = settings.model_fields[name]
        lines.append(f"  {prefix}{name.upper()}: {what}\n    {field.description}")
    return "\n".join(lines)


def is_loopback(host: str) -> bool:
    """Return whether `host` is a loopback address or `localhost`; 127.0.0.1.example.com is neither."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def plain(default: object) -> str:
    """Return a setting as it is written in the environment: a tuple is separated by spaces."""
    return " ".join(default) if isinstance(default, tuple) else str(default)
