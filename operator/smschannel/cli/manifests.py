"""Reads and makes manifests of SmsChannels. Error messages quote nothing of a file: there may be a token in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
import yaml
from pydantic import ValidationError

from smschannel.api.resource import API_VERSION, KIND, Spec
from smschannel.api.text import TextError, decode
from smschannel.cli.options import INSTANCE, NAMESPACE

Manifest = Mapping[str, Any]


def read_channels(source: str, content: bytes) -> list[tuple[str, Manifest]]:
    """Return name and manifest of each SmsChannel in a YAML or JSON file. Raises `click.ClickException`."""
    try:
        documents = [each for each in yaml.safe_load_all(decode(content)) if isinstance(each, dict)]
    except TextError as error:
        raise click.ClickException(f"{source} {error}") from None
    except RecursionError:
        raise click.ClickException(f"{source} is nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # a ValueError is a date or number that cannot be
        at = getattr(error, "problem_mark", None)  # and no more of it: there may be a token on that line
        raise click.ClickException(f"{source} is not YAML" + (f": line {at.line + 1}" if at else "")) from None
    channels = [each for each in documents if (each.get("apiVersion"), each.get("kind")) == (API_VERSION, KIND)]
    named: list[tuple[str, Manifest]] = []
    for each in channels:
        try:
            meta = each["metadata"]
            named.append((INSTANCE.rule.validate_python(meta["name"]), each))
            NAMESPACE.rule.validate_python(meta.get("namespace", "default"))
        except (KeyError, TypeError, AttributeError):
            raise click.ClickException(f"{source} holds an {KIND} without a name") from None
        except ValidationError as error:
            raise click.ClickException(f"{source}: {error.errors(include_input=False)[0]['msg']}") from None
    return named


def manifest_of(channel: Manifest) -> dict[str, Any]:
    """Return a channel as somebody would write it: without defaults, status, and what the API server or tools add."""
    defaults = {field.alias: field.default for field in Spec.model_fields.values() if not field.is_required()}
    spec = {name: value for name, value in channel["spec"].items() if name not in defaults or value != defaults[name]}
    spec["credentials"] = {name: value for name, value in spec["credentials"].items() if value}
    meta = {name: channel["metadata"][name] for name in ("name", "namespace")}
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec}
