"""Writes the pages in `docs/reference` from what they describe: `python -m deploy.reference`, or `make docs`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

import api_shim.settings
import smschannel.settings
from api_shim.openapi import document
from smschannel.api.environment import EnvironmentSettings

ROOT = Path(__file__).parents[1]
CRD = ROOT / "crds/smschannels.yaml"
PAGES = ROOT / "docs/reference"


def pages() -> dict[Path, str]:
    """Return the text of each reference page by its path."""
    written = {
        "smschannel.md": _resource(yaml.safe_load(CRD.read_text())),
        "rest.md": _rest(document()),
        "settings.md": _settings(),
    }
    return {PAGES / name: "\n".join(lines).rstrip() + "\n" for name, lines in written.items()}


def _generated(source: str) -> str:
    return f"<!-- Made from {source} by `make docs`. Change that, not this page. -->\n"


# The resource


def _resource(crd: Mapping[str, Any]) -> Iterator[str]:
    spec = crd["spec"]
    [version] = spec["versions"]
    schema = version["schema"]["openAPIV3Schema"]
    names = spec["names"]
    yield from ("# The SmsChannel resource", "", _generated("crds/smschannels.yaml"), schema["description"], "")
    yield f"- `apiVersion: {spec['group']}/{version['name']}`, `kind: {names['kind']}`"
    yield f"- for kubectl: `{names['plural']}`, `{names['singular']}` or `{names['shortNames'][0]}`"
    yield f"- {spec['scope'].lower()}; rights on it name `{names['plural']}` and `{names['plural']}/status`"
    selectable = ", ".join(f"`{each['jsonPath'][1:]}`" for each in version["selectableFields"])
    yield f"- `--field-selector` knows {selectable}, beside `metadata.name` and `metadata.namespace`"
    yield from _rules(schema)
    yield from (
        "",
        "The API server refuses what breaks a rule. [README.md](../../README.md#the-resource) has an example.",
        "",
    )
    for part in ("spec", "status"):
        yield from (f"## {part}", "")
        yield from _fields(schema["properties"][part], part)


def _fields(schema: Mapping[str, Any], path: str) -> Iterator[str]:
    required = schema.get("required", ())
    for name, field in schema["properties"].items():
        inner = field.get("items", field)
        full = f"{path}.{name}" + ("[]" if "items" in field else "")
        yield from (f"### {full}", "", f"*{', '.join(_kind(field, name in required))}*", "")
        if "description" in field:
            yield from (field["description"], "")
        if rules := list(_rules(field)):
            yield from (*rules, "")
        if "properties" in inner:
            yield from _fields(inner, full)


def _kind(field: Mapping[str, Any], required: bool) -> Iterator[str]:
    items = field.get("items")
    yield f"list of {items['type']}s" if items else field["type"]
    if "enum" in field:
        yield " or ".join(f"`{each}`" for each in field["enum"])
    if "maxLength" in field:
        yield f"at most {field['maxLength']} characters"
    if "maxItems" in field:
        yield f"at most {field['maxItems']}"
    if field.get("default") not in (None, ""):
        yield f"`{yaml.safe_dump(field['default'], default_flow_style=True).splitlines()[0]}` if left out"
    if required:
        yield "required"


def _rules(schema: Mapping[str, Any]) -> Iterator[str]:
    for each in schema.get("x-kubernetes-validations", ()):
        yield f"- Rule: {each['message']}"


# The REST API


def _rest(api: Mapping[str, Any]) -> Iterator[str]:
    yield from ("# REST reference", "", _generated("api_shim/openapi.py"))
    yield "The same document is served as `/openapi.json` (OpenAPI 3.1) and, for people, as `/docs`."
    yield "The guide with examples is [The REST API](../rest-api.md)."
    yield from ("", api["info"]["description"], "")
    for path, item in api["paths"].items():
        for method in ("get", "post", "delete"):
            yield from _call(f"{method.upper()} {path}", item["parameters"], item[method])
    yield from ("## Bodies", "")
    for name, schema in api["components"]["schemas"].items():
        yield from _schema(name, schema)
    yield from ("## Headers of answers", "", "| Header | Meaning |", "|---|---|")
    for name, header in api["components"]["headers"].items():
        yield f"| `{name}` | {header['description']} |"


def _call(title: str, parameters: list[dict[str, Any]], call: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"## {title.split()[0]}", "", f"`{title}`", "")
    if "description" in call:
        yield from (call["description"], "")
    if "requestBody" in call:
        yield from (f"The body is {_ref(call['requestBody']['content']['application/json']['schema'])}, as JSON.", "")
    yield from ("| Parameter | In | Meaning |", "|---|---|---|")
    for each in [*parameters, *call["parameters"]]:
        yield f"| `{each['name']}` | {each['in']} | {each['description']} |"
    yield from ("", "| Answer | Meaning | Body | Headers |", "|---|---|---|---|")
    for status, answer in call["responses"].items():
        content = answer.get("content", {}).get("application/json")
        headers = ", ".join(f"`{name}`" for name in answer["headers"])
        yield f"| {status} | {answer['description']} | {_ref(content['schema']) if content else 'none'} | {headers} |"
    yield ""


def _schema(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "")
    if "description" in schema:
        yield from (schema["description"], "")
    yield from ("| Field | Type | Required | Meaning |", "|---|---|---|---|")
    for field, each in schema["properties"].items():
        required = "yes" if field in schema.get("required", ()) else "no"
        yield f"| `{field}` | {_type(each)} | {required} | {each.get('description', '')} |"
    yield ""


def _type(schema: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        return _ref(schema)
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if schema["type"] == "array":
        return f"list of {_type(schema['items'])}"
    if "enum" in schema:
        return "one of " + ", ".join(f"`{each}`" for each in schema["enum"])
    return str(schema["type"])


def _ref(schema: Mapping[str, Any]) -> str:
    name = schema["$ref"].rpartition("/")[2]
    return f"[{name}](#{name.lower()})"


# The settings


def _settings() -> Iterator[str]:
    yield from ("# Settings", "", _generated("the settings of both programs"))
    yield "Both programs are configured with environment variables; `--help` of each prints the same list. In the chart"
    yield "they are below `operator.settings` and `shim.settings`, in camelCase and without the prefix, unless it has a"
    yield "value of its own for them."
    for title, prefix, settings in (
        ("The operator", "SMSCHANNEL_", smschannel.settings.Settings),
        ("The shim", "SMSSHIM_", api_shim.settings.Settings),
    ):
        yield from ("", f"## {title}", "", "| Variable | If unset | Meaning |", "|---|---|---|")
        yield from _variables(prefix, settings)


def _variables(prefix: str, settings: type[EnvironmentSettings]) -> Iterator[str]:
    for name, field in settings.model_fields.items():
        default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
        unset = "it is required" if field.is_required() else "" if default in (None, "") else f"`{default}`"
        yield f"| `{prefix}{name.upper()}` | {unset} | {field.description} |"


def main() -> None:
    """Write the pages that differ."""
    PAGES.mkdir(exist_ok=True)
    for path, text in pages().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    main()
