"""API keys: what a Secret may hold, and what opens it."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from api_shim.auth import load_keys
from smschannel.api.api_keys import Verb, find_key

KEY = "smsch_one_" + "aB3_" * 11
INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
OTHER = "00000000-6276-4993-bfeb-53cbbbba6f08"
NOW = datetime(2026, 5, 1, tzinfo=UTC)
ENTRY = {"sha256": hashlib.sha256(KEY.encode()).hexdigest(), "instances": ["*"], "verbs": ["get"], "expires": None}


def secret(**entries: Any) -> dict[str, str]:
    return {
        name: base64.b64encode(each if isinstance(each, bytes) else json.dumps(each).encode()).decode()
        for name, each in entries.items()
    }


def test_a_key_is_found_by_its_id_and_opened_by_its_whole() -> None:
    keys = load_keys(secret(one=ENTRY))
    found = find_key(keys, KEY, NOW)
    assert found is not None
    assert found[0] == "one"


@pytest.mark.parametrize(
    "presented", ["", "_", "__", "one", KEY[:-1], KEY + "x", KEY.replace("one", "two"), KEY.upper(), "smsch_one_\udcff"]
)
def test_anything_else_opens_nothing(presented: str) -> None:
    assert find_key(load_keys(secret(one=ENTRY)), presented, NOW) is None


def test_the_hash_is_not_the_key() -> None:
    assert find_key(load_keys(secret(one=ENTRY)), f"smsch_one_{ENTRY['sha256']}", NOW) is None


def test_two_live_keys() -> None:
    second = KEY.replace("one", "two")
    keys = load_keys(secret(one=ENTRY, two={**ENTRY, "sha256": hashlib.sha256(second.encode()).hexdigest()}))
    assert find_key(keys, KEY, NOW)
    assert find_key(keys, second, NOW)


def test_expiry() -> None:
    keys = load_keys(secret(one={**ENTRY, "expires": "2026-05-01T02:00:00+02:00"}))
    assert find_key(keys, KEY, NOW) is None
    assert find_key(keys, KEY, NOW - timedelta(seconds=1))


@pytest.mark.parametrize(
    ("instances", "verbs", "allowed"),
    [
        (["*"], ["get", "post", "delete"], True),
        ([INSTANCE], ["post"], True),
        ([OTHER, INSTANCE.upper()], ["post"], True),
        ([OTHER], ["post"], False),
        ([INSTANCE], ["get", "delete"], False),
        ([], ["post"], False),
        ([INSTANCE], [], False),
    ],
)
def test_instances_and_verbs(instances: list[str], verbs: list[str], allowed: bool) -> None:
    key = load_keys(secret(one={**ENTRY, "instances": instances, "verbs": verbs}))["one"]
    assert key.may(Verb.POST, INSTANCE) is allowed


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        (b"", "Invalid JSON"),
        (b"not json", "Invalid JSON"),
        ([], "Input should be an object"),
        ({**ENTRY, "sha256": KEY}, "sha256: String should match pattern"),
        ({**ENTRY, "sha256": str(ENTRY["sha256"]).upper()}, "sha256: String should match pattern"),
        ({**ENTRY, "instances": "*"}, "instances: "),
        ({**ENTRY, "instances": ["all"]}, "instances.0."),
        ({**ENTRY, "verbs": ["put"]}, "verbs.0: Input should be 'get', 'post' or 'delete'"),
        ({**ENTRY, "expires": "tomorrow"}, "expires: "),
        ({**ENTRY, "expires": "2026-05-01T02:00:00"}, "expires: "),
        ({**ENTRY, "expires": 1790000000}, "expires: "),
        ({**ENTRY, "expiry": None}, "expiry: Extra inputs are not permitted"),
        ({name: value for name, value in ENTRY.items() if name != "instances"}, "instances: Field required"),
    ],
)
def test_a_malformed_entry_is_named_and_disables_just_that_key(entry: Any, why: str) -> None:
    with capture_logs() as logs:
        keys = load_keys(secret(one=ENTRY, broken=entry))
    assert list(keys) == ["one"]
    (line,) = logs
    assert (line["log_level"], line["key_id"]) == ("error", "broken")
    assert why in str(line["why"])
    assert KEY not in str(line), "somebody may have written the key where its hash belongs"


def test_an_entry_that_is_not_base64() -> None:
    with capture_logs() as logs:
        assert load_keys({"one": "###"}) == {}
    assert logs[0]["why"] == "not base64"
