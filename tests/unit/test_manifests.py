"""The model in `resource.py` accepts and refuses what the table says, with the patterns and messages of the CRD."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from smschannel.api.resource import (
    AccountSid,
    InstanceId,
    LoginSid,
    PhoneNumber,
    Rule,
    Sealed,
    SecretKey,
    SecretName,
    SmsChannel,
    Spec,
)
from tests.manifests import ACCOUNT_SID, INSTANCE, KEY_SID, PHONE_NUMBER, ROWS, SEALED, TOKEN, Manifest, Row, good

CRD = yaml.safe_load((Path(__file__).parents[2] / "crds/smschannels.yaml").read_text())
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]

TYPES: dict[str, Any] = {
    ".metadata.name": InstanceId,
    ".spec.accountSid": AccountSid,
    ".spec.phoneNumber": PhoneNumber,
    ".spec.credentials.sid": LoginSid,
    ".spec.credentials.sealed": Sealed,
    ".spec.credentials.secretKeyRef.name": SecretName,
    ".spec.credentials.secretKeyRef.key": SecretKey,
}
EXAMPLES = {
    ".metadata.name": INSTANCE,
    ".spec.accountSid": ACCOUNT_SID,
    ".spec.phoneNumber": PHONE_NUMBER,
    ".spec.credentials.sid": KEY_SID,
    ".spec.credentials.sealed": SEALED,
    ".spec.credentials.secretKeyRef.name": "twilio.team-1",
    ".spec.credentials.secretKeyRef.key": "auth_token",
}


def crd_rules(schema: dict[str, Any] = SCHEMA, path: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    for each in schema.get("x-kubernetes-validations", ()):
        yield path + each.get("fieldPath", ""), each
    for name, inner in schema.get("properties", {}).items():
        yield from crd_rules(inner, f"{path}.{name}")


def crd_field(path: str) -> dict[str, Any]:
    field: dict[str, Any] = SCHEMA
    for name in path.strip(".").split("."):
        field = field["properties"][name]
    return field


def crd_pattern(path: str) -> str:
    [pattern] = [found[1] for at, each in crd_rules() if at == path and (found := _matches(each["rule"]))]
    return pattern


def _matches(rule: str) -> re.Match[str] | None:
    return re.search(r"matches\('(.*)'\)", rule)


def parsed(manifest: Manifest) -> SmsChannel:
    """Return the manifest as an object of the API server, with the fields that the server adds."""
    given_by_server = {"uid": "f1d7", "generation": 1, "creationTimestamp": "2026-01-02T03:04:05Z"}
    return SmsChannel.model_validate({**manifest, "metadata": {**given_by_server, **manifest["metadata"]}})


def message(error: ValidationError) -> str:
    return "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())


@pytest.mark.parametrize("row", [pytest.param(row, id=row.why) for row in ROWS])
def test_model_accepts_or_refuses_as_the_table_says(row: Row) -> None:
    if row.accepted:
        parsed(row.manifest)
        return
    with pytest.raises(ValidationError) as refused:
        parsed(row.manifest)
    text = message(refused.value).casefold()
    assert [fragment for fragment in row.refusal if fragment.casefold() not in text] == [], text


def test_rows_are_different() -> None:
    assert len({row.why for row in ROWS}) == len(ROWS)
    assert len({repr(row.manifest) for row in ROWS}) >= len(ROWS) - 2  # some rows only write a default explicitly


@pytest.mark.parametrize("path", TYPES)
def test_model_has_the_pattern_and_message_of_the_crd(path: str) -> None:
    [rule] = [each for each in get_args(TYPES[path]) if isinstance(each, Rule)]
    [in_crd] = [each for at, each in crd_rules() if at == path]
    assert rule.pattern == crd_pattern(path)
    assert rule.message == in_crd["message"]
    size = re.search(r"size\(\) >= ([0-9]+)", in_crd["rule"])
    assert rule.shortest == (int(size[1]) if size else 0)


def test_every_rule_of_the_crd_is_compared() -> None:
    elsewhere = {".spec.credentials"}  # exactly one source: not a pattern
    assert {path for path, _ in crd_rules()} == TYPES.keys() | elsewhere


@pytest.mark.parametrize("path", TYPES)
def test_maximum_lengths_match_the_crd(path: str) -> None:
    assert TypeAdapter(TYPES[path]).json_schema().get("maxLength") == crd_field(path).get("maxLength")


@pytest.mark.parametrize("path", TYPES)
@given(chosen=st.data())
def test_model_accepts_what_the_pattern_of_the_crd_matches(path: str, chosen: st.DataObject) -> None:
    pattern, field = crd_pattern(path), crd_field(path)
    fitting = st.from_regex(pattern, fullmatch=True)
    text = chosen.draw(st.one_of(fitting, _nearly(EXAMPLES[path]), fitting.flatmap(_nearly), st.text(max_size=40)))
    shortest = 1528 if path.endswith(".sealed") else 0
    # RE2's "$" is the end of the text, as Python's \Z is
    matches = bool(re.search(pattern.removesuffix("$") + r"\Z", text))
    assert _accepts(TYPES[path], text) == (matches and shortest <= len(text) <= field.get("maxLength", len(text)))


def _nearly(text: str) -> st.SearchStrategy[str]:
    """Return texts with one character added, removed or replaced, often by a line end."""
    characters = st.one_of(st.sampled_from("\n\r\t \x00\u2028\u0661\uff10Ggf+-.=/_A0"), st.characters())
    at = st.integers(0, len(text))
    return st.one_of(
        st.just(text),
        st.builds(lambda i, new: text[:i] + new + text[i:], at, characters),
        st.builds(lambda i, new: text[:i] + new + text[i + 1 :], at, characters),
        st.builds(lambda i: text[:i] + text[i + 1 :], at),
        st.builds(lambda new: text + new, characters),
        st.sampled_from([text.upper(), text.lower(), text * 2, ""]),
    )


def _accepts(kind: Any, text: str) -> bool:
    try:
        TypeAdapter(kind).validate_python(text)
    except ValidationError:
        return False
    return True


def test_fields_and_enums_match_the_crd() -> None:
    schema = Spec.model_json_schema(by_alias=True)
    assert _shape(schema, schema["$defs"]) == _shape(crd_field(".spec"), {})


def _shape(schema: dict[str, Any], definitions: dict[str, Any]) -> Any:
    """Return names, types, required fields, enums and defaults of a schema, without descriptions."""
    alternatives = [each for each in schema.get("anyOf", [schema]) if each.get("type") != "null"]
    [schema] = [{**each, **({"default": schema["default"]} if schema.get("default") else {})} for each in alternatives]
    if "$ref" in schema:
        schema = {**definitions[schema["$ref"].rpartition("/")[2]], **schema}
    return {
        "type": schema["type"],
        "required": sorted(schema.get("required", ())),
        "enum": schema.get("enum"),
        "default": schema.get("default") or None,  # "" and false mean the same as an absent default
        "properties": {name: _shape(each, definitions) for name, each in schema.get("properties", {}).items()},
    }


def test_validation_error_never_shows_the_value() -> None:
    manifest = good()
    manifest["spec"]["credentials"] = {"sealed": TOKEN, "sid": TOKEN}
    with pytest.raises(ValidationError) as refused:
        parsed(manifest)
    assert TOKEN not in str(refused.value)
    assert TOKEN not in repr(refused.value)
