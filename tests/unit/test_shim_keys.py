"""`kubectl sms key` without a cluster: its options, its error messages, and the keys it makes."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import cast

import click
import pytest
from click.testing import CliRunner, Result

from api_shim.auth import decode_keys
from smschannel.api.api_keys import NewKey, Verb, decode_key, encode_key, find_key, make_key, secret_of
from smschannel.api.kube_client import KubeClient
from smschannel.cli import key as key_module
from smschannel.cli.key import KeyStore
from smschannel.cli.main import cli

INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> list[NewKey]:
    """The keys that the command stored, without a cluster."""
    keys: list[NewKey] = []

    class Store:
        def __init__(self, *_: object) -> None:
            pass

        async def add(self, new: NewKey) -> None:
            keys.append(new)

    @contextlib.asynccontextmanager
    async def cluster(*_: object, **__: object) -> AsyncIterator[None]:
        yield

    monkeypatch.setattr(key_module, "KeyStore", Store)
    monkeypatch.setattr(key_module, "cluster", cluster)
    return keys


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["key", *arguments])


def test_secret_holds_the_hash_and_not_the_key() -> None:
    new = make_key([INSTANCE], ["get"])
    key = new.key.get_secret_value()
    prefix, key_id, secret = key.split("_", 2)
    assert (prefix, key_id) == ("smsch", new.key_id)
    assert len(secret) == 43, "256 random bits"
    manifest = secret_of(new, "sms-operator")
    assert find_key(decode_keys(manifest["data"]), key, datetime.now(UTC)) == (key_id, new.entry)
    assert new.entry.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert secret not in str(manifest)
    assert secret not in repr(new)


def test_keys_are_unique() -> None:
    one, two = make_key(["*"], ["get"]), make_key(["*"], ["get"])
    assert one.key_id != two.key_id
    assert one.key != two.key


def test_encoded_entry_decodes_to_the_same() -> None:
    entry = make_key(["*", INSTANCE], list(Verb), expires=datetime(2030, 1, 1, tzinfo=UTC)).entry
    assert decode_key(encode_key(entry)) == entry


def test_create_prints_the_key_alone_to_standard_output(stored: list[NewKey]) -> None:
    result = run("create", "--instances", "*", "--verbs", "get", "--expires", "90d", "--id", "reader")
    assert result.exit_code == 0
    assert result.stdout == f"{stored[0].key.get_secret_value()}\n"
    assert "Key reader allows get for *, until " in result.stderr
    assert "It is printed only once." in result.stderr
    assert stored[0].key.get_secret_value() not in result.stderr


@pytest.mark.parametrize(
    ("written", "from_now"),
    [("never", None), ("90d", timedelta(days=90)), ("12h", timedelta(hours=12))],
)
def test_create_accepts_days_hours_and_never(stored: list[NewKey], written: str, from_now: timedelta | None) -> None:
    assert run("create", "--instances", "*", "--expires", written).exit_code == 0
    expires = stored[0].entry.expires
    if from_now is None:
        assert expires is None
    else:
        assert expires
        assert abs(expires - datetime.now(UTC) - from_now) < timedelta(minutes=1)


def test_create_accepts_any_form_of_a_uuid(stored: list[NewKey]) -> None:
    result = run("create", "--instances", f"{INSTANCE.upper()}, {INSTANCE.replace('-', '')}")
    assert result.exit_code == 0, result.stderr
    assert [str(each) for each in stored[0].entry.instances] == [INSTANCE]
    assert stored[0].entry.verbs == set(Verb), "all three by default"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "Missing option '--instances'"),
        (["--instances", "all"], "use comma-separated UUIDs, or '*' for all instances"),
        (["--instances", ""], "use comma-separated UUIDs"),
        (["--instances", "*", "--verbs", "put"], "use get, post and delete"),
        (["--instances", "*", "--verbs", ""], "use get, post and delete"),
        (["--instances", "*", "--expires", "tomorrow"], "use days (90d), hours (12h)"),
        (["--instances", "*", "--expires", "0d"], "use days (90d), hours (12h)"),
        (["--instances", "*", "--expires", "2030-01-01T00:00:00"], "a time with its time zone"),
        (["--instances", "*", "--expires", "2020-01-01T00:00:00Z"], "this time is in the past"),
        (["--instances", "*", "--id", "with_underscore"], "no underscore"),
        (["--instances", "*", "--id", ""], "an ID has at most 63 letters"),
    ],
)
def test_create_rejects_invalid_options(stored: list[NewKey], arguments: list[str], expected: str) -> None:
    result = run("create", *arguments)
    assert result.exit_code == 2
    assert expected in re.sub(r"\s+", " ", result.stderr)
    assert (result.stdout, stored) == ("", [])


async def test_key_given_in_place_of_its_id_is_not_repeated() -> None:
    class Keys(KeyStore):
        async def entries(self) -> dict[str, str]:
            return {}

    made = make_key(["*"], ["get"]).key.get_secret_value()
    with pytest.raises(click.ClickException) as refused:
        await Keys(cast(KubeClient, None), "sms-operator").remove([made])
    assert made not in str(refused.value)
    assert "not its ID" in str(refused.value)
