"""`kubectl sms key` without a cluster: what it takes, what it refuses, and what a key is."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner, Result

from api_shim.auth import load_keys
from smschannel.api.api_keys import Made, Verb, encode_key, find_key, make_key, read_entry, secret_of
from smschannel.cli import key as keys
from smschannel.cli.key import key as cli

INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Made]:
    """What would have been stored."""
    stored: list[Made] = []

    class Nowhere:
        async def add(self, made: Made) -> None:
            stored.append(made)

    async def connected(*given: Any) -> Any:
        return await given[-1](Nowhere())

    monkeypatch.setattr(keys, "_connected", connected)
    return stored


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_a_key_opens_what_is_stored_of_it_and_is_not_in_it() -> None:
    made = make_key([INSTANCE], ["get"])
    key = made.key.get_secret_value()
    prefix, key_id, secret = key.split("_", 2)
    assert (prefix, key_id) == ("smsch", made.key_id)
    assert len(secret) == 43, "256 random bits"
    stored = secret_of(made, "sms-operator")
    assert find_key(load_keys(stored["data"]), key, datetime.now(UTC)) == (key_id, made.entry)
    assert made.entry.sha256 == hashlib.sha256(key.encode()).hexdigest()
    assert secret not in str(stored)
    assert secret not in repr(made)


def test_keys_differ() -> None:
    one, two = make_key(["*"], ["get"]), make_key(["*"], ["get"])
    assert one.key_id != two.key_id
    assert one.key != two.key


def test_an_entry_reads_back_as_it_was() -> None:
    entry = make_key(["*", INSTANCE], list(Verb), expires=datetime(2030, 1, 1, tzinfo=UTC)).entry
    assert read_entry(encode_key(entry)) == entry


def test_standard_output_is_the_key_alone(made: list[Made]) -> None:
    result = run("create", "--instances", "*", "--verbs", "get", "--expires", "90d", "--id", "reader")
    assert result.exit_code == 0
    assert result.stdout == f"{made[0].key.get_secret_value()}\n"
    assert "Key reader may get *, until " in result.stderr
    assert "It is shown once." in result.stderr
    assert made[0].key.get_secret_value() not in result.stderr


@pytest.mark.parametrize(
    ("written", "from_now"),
    [("never", None), ("90d", timedelta(days=90)), ("12h", timedelta(hours=12))],
)
def test_expiry(made: list[Made], written: str, from_now: timedelta | None) -> None:
    assert run("create", "--instances", "*", "--expires", written).exit_code == 0
    expires = made[0].entry.expires
    if from_now is None:
        assert expires is None
    else:
        assert expires
        assert abs(expires - datetime.now(UTC) - from_now) < timedelta(minutes=1)


def test_instances_in_any_form_are_the_same(made: list[Made]) -> None:
    result = run("create", "--instances", f"{INSTANCE.upper()}, {INSTANCE.replace('-', '')}")
    assert result.exit_code == 0, result.stderr
    assert [str(each) for each in made[0].entry.instances] == [INSTANCE]
    assert made[0].entry.verbs == set(Verb), "all three by default"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "Missing option '--instances'"),
        (["--instances", "all"], "write UUIDs with commas between them, or '*' for all instances"),
        (["--instances", ""], "write UUIDs with commas between them"),
        (["--instances", "*", "--verbs", "put"], "choose from get, post and delete"),
        (["--instances", "*", "--verbs", ""], "choose from get, post and delete"),
        (["--instances", "*", "--expires", "tomorrow"], "write days (90d), hours (12h)"),
        (["--instances", "*", "--expires", "0d"], "write days (90d), hours (12h)"),
        (["--instances", "*", "--expires", "2030-01-01T00:00:00"], "a time with its zone"),
        (["--instances", "*", "--expires", "2020-01-01T00:00:00Z"], "this is over already"),
        (["--instances", "*", "--id", "with_underscore"], "no underscore"),
        (["--instances", "*", "--id", ""], "an id has letters"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_made(
    made: list[Made], arguments: list[str], why: str
) -> None:
    result = run("create", *arguments)
    assert result.exit_code == 2
    assert why in re.sub(r"\s+", " ", result.stderr)
    assert (result.stdout, made) == ("", [])
