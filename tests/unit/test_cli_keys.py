"""`kubectl sms keys`, `validate` and `reseal` without a cluster: wrong inputs, backups, what changes in a file."""

from __future__ import annotations

import base64
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from pydantic import SecretStr

from smschannel.api.sealing import Binding, Keyring, SealingKey, fingerprint_of
from smschannel.cli.keys import _opened, _restored, _rows, _sealed, _Uses
from smschannel.cli.main import cli
from smschannel.cli.reseal import _channels, _checked, _resealed
from tests.unit.memory import START

OLD, NEW = SealingKey.generate(START), SealingKey.generate(START)
RING = Keyring([OLD, NEW])
INSTANCE, ACCOUNT = "497f6eca-6276-4993-bfeb-53cbbbba6f08", "AC" + "0" * 32
TOKEN = SecretStr("5e5c0ffee5e5c0ffee5e5c0ffee5e5c0")
PASSPHRASE = "correct horse battery staple"


def sealed(key: SealingKey = OLD, namespace: str = "sms-channels") -> str:
    return key.public.seal(TOKEN, Binding(namespace, INSTANCE, ACCOUNT))


def manifest(value: str, newline: str = "\n") -> bytes:
    lines = [
        "# the webshop",
        "apiVersion: channels.hydracore.io/v1",
        "kind: SmsChannel",
        f"metadata: {{name: {INSTANCE}, namespace: sms-channels}}",
        "spec:",
        f"  accountSid: {ACCOUNT}  # production",
        '  phoneNumber: "+61400111222"',
        f"  credentials: {{sealed: {value}}}",
        "---",
        "kind: ConfigMap",
        "",
    ]
    return newline.join(lines).encode()


def resealed(content: bytes) -> tuple[str, int]:
    file = Path("channel.yaml")
    return _resealed(file, content, _channels(file, content, None, None, None), RING)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_reseal_changes_the_sealed_value_and_nothing_else(newline: str) -> None:
    value = sealed()
    text, count = resealed(manifest(value, newline))
    assert count == 1
    before, after = manifest(value, newline).decode().split(value)
    assert text.startswith(before)
    assert text.endswith(after)
    newer = text[len(before) : -len(after)]
    assert fingerprint_of(newer) == NEW.fingerprint
    assert RING.unseal(newer, Binding("sms-channels", INSTANCE, ACCOUNT)) == TOKEN
    assert TOKEN.get_secret_value() not in text


def test_value_of_the_newest_key_stays_as_it_is() -> None:
    """Else each run would be a change in Git."""
    content = manifest(sealed(NEW))
    assert resealed(content) == (content.decode(), 0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        pytest.param(sealed(namespace="elsewhere"), "sealed for another place", id="copied from another namespace"),
        pytest.param(sealed(SealingKey.generate()), "needs a key that this operator does not have", id="unknown key"),
        pytest.param("bm9uZQ==", "unknown version", id="no sealed value"),
        pytest.param(f'"{sealed()[:700]}\\\n    {sealed()[700:]}"', "altered|on one line", id="folded over two lines"),
    ],
)
def test_what_does_not_open_is_refused_and_nothing_is_written(value: str, message: str) -> None:
    with pytest.raises(click.ClickException, match=message):
        resealed(manifest(value))


@pytest.mark.parametrize(
    ("value", "keyring", "is_good", "text"),
    [
        pytest.param(sealed(NEW), RING, True, f"opens, with key {NEW.fingerprint}", id="opens"),  # not in a test's name
        (sealed(OLD), RING, True, "is not the newest: kubectl sms reseal"),
        (sealed(OLD, "elsewhere"), RING, False, "sealed for another place"),
        (sealed(NEW), None, True, "sealed with the key that the operator publishes"),
        (sealed(OLD), None, True, "which is not the published one"),
        (base64.b64encode(bytes(1200)).decode(), None, False, "truncated or altered"),
    ],
)
def test_validate_says_what_can_be_said(value: str, keyring: Keyring | None, is_good: bool, text: str) -> None:
    [found] = _channels(Path("f"), manifest(value), None, None, None)
    result, said = _checked(found, keyring, NEW.public)
    assert (result, text in said) == (is_good, True), said


def test_validate_names_the_rule_that_is_broken_without_the_value() -> None:
    content = manifest(sealed()).replace(b'"+61400111222"', TOKEN.get_secret_value().encode())
    [found] = _channels(Path("f"), content, None, None, None)
    is_good, said = _checked(found, RING, None)
    assert not is_good
    assert "phoneNumber" in said
    assert TOKEN.get_secret_value() not in said


def test_backup_opens_with_its_passphrase_only() -> None:
    content = f'{{"keyring": {RING.dump()}, "created": {RING.dump_dates()}}}'.encode()
    backup = _sealed(content, PASSPHRASE)
    assert base64.b64encode(OLD.seed) not in backup
    assert _opened(backup, PASSPHRASE) == RING
    for wrong, phrase in ((backup, "wrong"), (backup[:-1], PASSPHRASE), (b"", PASSPHRASE), (b"keys", PASSPHRASE)):
        with pytest.raises(click.ClickException, match="does not open this file"):
            _opened(wrong, phrase)
    with pytest.raises(click.ClickException, match="no keyring that this release can read"):
        _opened(_sealed(b"{}", PASSPHRASE), PASSPHRASE)


def test_list_shows_needed_keys_that_are_missing() -> None:
    uses = {OLD.fingerprint: _Uses(["a", "b"], ["c"]), "0123456789abcdef": _Uses([], ["d"]), "": _Uses(["damaged"])}
    rows = [(row["fingerprint"], row["state"], row["records"], row["channels"]) for row in _rows(RING, uses)]
    assert rows == [
        (NEW.fingerprint, "seals", 0, 0),
        (OLD.fingerprint, "opens", 2, 1),
        ("0123456789abcdef", "missing", 0, 1),
    ]


def test_restore_names_what_becomes_readable_and_cuts_long_lists() -> None:
    uses = {OLD.fingerprint: _Uses([f"pn{n}" for n in range(30)], ["sms-channels/a"])}
    said = _restored({OLD.fingerprint}, 1, uses)
    assert f"{OLD.fingerprint} opens 30 records, 1 channels" in said
    assert "Secret pn19" in said
    assert "Secret pn20" not in said
    assert "and 11 more" in said


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["keys", "import"], "my key", "96 random bytes"),
        (["keys", "import"], "", "96 random bytes"),
        (["keys", "backup", "new.age"], "", "use --passphrase-file FILE or -"),
        (["keys", "backup", "new.age", "--passphrase-file", "-"], "short", "fewer than 12 characters"),
        (["keys", "retire"], "", "Missing argument"),
        (["reseal"], "", "give manifests with -f FILE, or --rest"),
        (["reseal", "--rest", "-f", "-"], "", "give manifests with -f FILE, or --rest"),
        (["reseal", "--in-place", "-f", "-"], "", "cannot write standard input"),
        (["reseal", "-f", "a", "-f", "b"], "", "does not exist"),
        (["validate", "-f", "-"], "a: b", "There is no SmsChannel in these files"),
        (["validate", "-f", "-"], "a: [", "is not YAML: line 1"),
    ],
)
def test_wrong_inputs_say_what_to_do(
    arguments: list[str], stdin: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, arguments, input=stdin)
    assert result.exit_code in {1, 2}
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert stdin not in result.output or len(stdin) < 7
    assert not list(tmp_path.iterdir()), "nothing is written"
