"""Settings from environment variables: what the operator's and the shim's have in common. No I/O."""

from __future__ import annotations

import ipaddress

from pydantic import ValidationError
from pydantic_settings import BaseSettings


def settings_help(settings: type[BaseSettings]) -> str:
    """Text for --help: each environment variable, what it means and its default."""
    prefix, lines = settings.model_config["env_prefix"], []
    for name, field in settings.model_fields.items():
        default = "required" if field.is_required() else f"default: {plain(field.default)}"
        lines.append(f"\b\n{prefix}{name.upper()} ({default})\n  {field.description}")
    return "\n\n".join(lines)


def explain(error: ValidationError, settings: type[BaseSettings]) -> str:
    """Say what is wrong with the environment, one variable per line. Leaves out the values: one may be a secret."""
    prefix, lines = settings.model_config["env_prefix"], ["The settings cannot be used:"]
    for each in error.errors():
        what = "is not set" if each["type"] == "missing" else each["msg"].removeprefix("Value error, ")
        if not each["loc"]:  # about several at once
            lines.append(f"  {what}")
            continue
        name = str(each["loc"][0])
        field = settings.model_fields[name]
        lines.append(f"  {prefix}{name.upper()}: {what}\n    {field.description}")
    return "\n".join(lines)


def is_loopback(host: str) -> bool:
    """Whether `host` is a loopback address or `localhost`; 127.0.0.1.example.com is neither."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def plain(default: object) -> str:
    """A setting as it is written in the environment: words with spaces between them."""
    return " ".join(default) if isinstance(default, tuple) else str(default)
