"""API keys: which entries of the Secret are valid, and which keys they accept."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from api_shim.auth import decode_keys
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


def test_key_is_found_by_its_id() -> None:
    keys = decode_keys(secret(one=ENTRY))
    found = find_key(keys, KEY, NOW)
    assert found is not None
    assert found[0] == "one"


@pytest.mark.parametrize(
    "presented", ["", "_", "__", "one", KEY[:-1], KEY + "x", KEY.replace("one", "two"), KEY.upper(), "smsch_one_\udcff"]
)
def test_wrong_key_is_not_found(presented: str) -> None:
    assert find_key(decode_keys(secret(one=ENTRY)), presented, NOW) is None


def test_hash_is_not_accepted_as_key() -> None:
    assert find_key(decode_keys(secret(one=ENTRY)), f"smsch_one_{ENTRY['sha256']}", NOW) is None


def test_two_keys_work_at_once() -> None:
    second = KEY.replace("one", "two")
    keys = decode_keys(secret(one=ENTRY, two={**ENTRY, "sha256": hashlib.sha256(second.encode()).hexdigest()}))
    assert find_key(keys, KEY, NOW)
    assert find_key(keys, second, NOW)


def test_expired_key_is_not_found() -> None:
    keys = decode_keys(secret(one={**ENTRY, "expires": "2026-05-01T02:00:00+02:00"}))
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
def test_key_allows_its_instances_and_verbs_only(instances: list[str], verbs: list[str], allowed: bool) -> None:
    key = decode_keys(secret(one={**ENTRY, "instances": instances, "verbs": verbs}))["one"]
    assert key.allows(Verb.POST, INSTANCE) is allowed


@pytest.mark.parametrize(
    ("entry", "error"),
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
def test_malformed_entry_is_logged_and_disables_only_that_key(entry: Any, error: str) -> None:
    with capture_logs() as logs:
        keys = decode_keys(secret(one=ENTRY, broken=entry))
    assert list(keys) == ["one"]
    (line,) = logs
    assert (line["log_level"], line["key_id"]) == ("error", "broken")
    assert error in str(line["error"])
    assert KEY not in str(line), "an administrator may have stored the key in place of its hash"


def test_entry_that_is_not_base64_is_logged() -> None:
    with capture_logs() as logs:
        assert decode_keys({"one": "###"}) == {}
    assert logs[0]["error"] == "not base64"
