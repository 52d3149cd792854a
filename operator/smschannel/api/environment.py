"""Help and error messages for settings that come from environment variables. No I/O."""

from __future__ import annotations

import ipaddress

from pydantic import ValidationError
from pydantic_settings import BaseSettings


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
