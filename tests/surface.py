"""The stable surface, read from the code: `python -m tests.surface` writes it into docs/compatibility.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import yaml
from prometheus_client.metrics import MetricWrapperBase

import api_shim.metrics
import api_shim.settings
import smschannel.metrics
import smschannel.settings
from api_shim.openapi import document
from smschannel.api import names, ownership, resource
from smschannel.api.reasons import REST_STATUSES, Effective, Reason
from smschannel.cli.main import cli
from smschannel.core.conditions import next_status
from smschannel.core.plan import Verdict
from smschannel.core.record import NAMESPACE_LABEL, RECORD_LABEL

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/compatibility.md"
HEADING = "## The names"


def surface() -> Iterator[tuple[str, list[str]]]:
    """Yield each kind of name, and all names of that kind."""
    fields = sorted(_fields(_schema()["spec"], "spec")) + sorted(_fields(_schema()["status"], "status"))
    types, reasons = _conditions()
    yield "Resource", [f"{resource.API_VERSION} {resource.KIND}", resource.PLURAL, *_short_names()]
    yield "Fields", fields
    yield "Condition types", types
    yield "Reasons of Ready", [each.name for each in Reason]
    yield "Reasons of CredentialsValid", reasons["CredentialsValid"]
    yield "Reasons of WebhookEffective", [each.value for each in Effective]
    yield (
        "Labels, annotations and the finalizer",
        [
            resource.CREDENTIALS_LABEL,
            RECORD_LABEL,
            NAMESPACE_LABEL,
            resource.CHECK_NOW_ANNOTATION,
            resource.FINALIZER,
        ],
    )
    yield (
        "Secrets and ConfigMaps",
        [
            names.KEYRING_SECRET,
            names.API_KEYS_SECRET,
            names.PUBLIC_KEY_CONFIGMAP,
            names.SETTINGS_CONFIGMAP,
        ],
    )
    yield "ServiceAccounts, Deployments and field manager", [names.OPERATOR, ownership.REST_MANAGER]
    yield "Operator's settings", [f"SMSCHANNEL_{each.upper()}" for each in smschannel.settings.Settings.model_fields]
    yield "Shim's settings", [f"SMSSHIM_{each.upper()}" for each in api_shim.settings.Settings.model_fields]
    yield "Operator's metrics", sorted(_metrics(smschannel.metrics))
    yield "Shim's metrics", sorted(_metrics(api_shim.metrics))
    yield "Commands", list(_commands(cli, "kubectl sms"))
    yield "REST calls", list(_calls())
    yield "REST fields", sorted(_rest_fields())
    yield "REST statuses", list(REST_STATUSES)


def table() -> str:
    rows = [f"| {kind} | {', '.join(f'`{name}`' for name in found)} |" for kind, found in surface()]
    return "\n".join(["| Kind | Names |", "|---|---|", *rows])


def _crd() -> Mapping[str, Any]:
    found: Mapping[str, Any] = yaml.safe_load((ROOT / "crds/smschannels.yaml").read_text())
    return found


def _short_names() -> list[str]:
    return list(_crd()["spec"]["names"]["shortNames"])


def _schema() -> Mapping[str, Any]:
    (version,) = _crd()["spec"]["versions"]
    properties: Mapping[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]
    return properties


def _fields(schema: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yield the paths of the leaves; values of an enumeration are part of the name."""
    if schema["type"] == "object" and "properties" in schema:
        for name, each in schema["properties"].items():
            yield from _fields(each, f"{path}.{name}")
    elif schema["type"] == "array" and "properties" in schema["items"]:
        yield f"{path}[]"
    else:
        yield path + (f": {' '.join(schema['enum'])}" if "enum" in schema else "")


def _conditions() -> tuple[list[str], dict[str, list[str]]]:
    """Return the types of all conditions, and the reasons of each type, that any verdict leads to."""
    rejected = [Verdict(each, "", degraded=degraded) for each in Reason for degraded in (False, True)]
    verdicts = rejected + [Verdict(Reason.WebhookOverridden, "", effective=each) for each in Effective]
    types: dict[str, dict[str, None]] = {}
    for verdict in verdicts:
        status = next_status({}, verdict, generation=1, webhook_url="", now=datetime(2026, 1, 1, tzinfo=UTC))
        for each in status["conditions"]:
            types.setdefault(each["type"], {})[each["reason"]] = None
    return sorted(types), {kind: sorted(reasons) for kind, reasons in types.items()}


def _metrics(module: object) -> Iterator[str]:
    for each in vars(module).values():
        if isinstance(each, MetricWrapperBase):
            [family] = each.describe()
            labels = f"{{{','.join(each._labelnames)}}}" if each._labelnames else ""
            yield family.name + "_total" * (family.type == "counter") + labels


def _commands(command: click.Command, name: str) -> Iterator[str]:
    if isinstance(command, click.Group):
        for each, found in sorted(command.commands.items()):
            yield from _commands(found, f"{name} {each}")
    else:
        options = sorted(max(each.opts, key=len) for each in command.params if isinstance(each, click.Option))
        yield " ".join([name, *options])


def _calls() -> Iterator[str]:
    for path, item in document()["paths"].items():
        for method in ("get", "post", "delete"):
            if method in item:
                yield f"{method.upper()} {path}: {' '.join(sorted(item[method]['responses']))}"


def _rest_fields() -> Iterator[str]:
    for name, schema in document()["components"]["schemas"].items():
        yield from (f"{name}.{field}" for field in schema["properties"])


def main() -> None:
    text = PAGE.read_text()
    before, after = text.split(f"\n{HEADING}\n")
    intro = re.split(r"^\|", after, maxsplit=1, flags=re.MULTILINE)[0]
    PAGE.write_text(f"{before}\n{HEADING}\n{intro}{table()}\n")


if __name__ == "__main__":
    main()
