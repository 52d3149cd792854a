"""Keys for life, on a real API server: a restore after everything was lost, and a rotation of manifests in Git."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from kubernetes import client

from deploy.local.stack import CHANNELS, OPERATOR, Options, Stack, StackError
from smschannel.api.sealing import fingerprint_of
from smschannel.cli import keys as keys_module
from smschannel.cli.admin_store import KEYRING_DIR
from smschannel.cli.main import cli
from tests.cluster.steps import configured, delete, name_of, read_record, wait_checked, wait_reason, webhook
from tests.conftest import running

PASSPHRASE = "correct horse battery staple"
KEYRING, PUBLISHED = "smschannel-keyring", "smschannel-sealing-key"
SEALED_WITH = "channels.hydracore.io/sealed-with"
_PATIENCE = 90  # seconds: the operator looks at its keyring every 15, the shim at the public key every 30


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack of this module's own: its keyring is lost and found."""
    settings = {
        "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "3600",
        "SMSCHANNEL_SLOW_INTERVAL_SECONDS": "3600",
        "SMSCHANNEL_RETRY_FLOOR_SECONDS": "0.2",
        "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
        "SMSCHANNEL_DELETION_GRACE_SECONDS": "2",
    }
    with running(tmp_path_factory.mktemp("keys"), Options(numbers=20, operator_settings=settings)) as started:
        yield started


@pytest.fixture
def sms(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `kubectl sms` as an administrator."""
    monkeypatch.setenv("KUBECONFIG", str(stack.cluster.kubeconfig))

    def run(*arguments: str | Path, stdin: str = "") -> Result:
        result = CliRunner().invoke(cli, [str(each) for each in arguments], input=stdin)
        assert "Traceback" not in result.output, result.output
        assert stack.twin["auth_token"] not in result.output
        return result

    return run


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.output


def refused(result: Result) -> str:
    assert result.exit_code == 1, result.output
    return " ".join(result.output.split())


def listed(sms: Callable[..., Result]) -> dict[str, dict[str, Any]]:
    result = sms("keys", "list", "-o", "json")
    ok(result)
    return {each["fingerprint"]: each for each in json.loads(result.stdout)}


def wait_until(check: Callable[[], bool], what: str) -> None:
    give_up = time.monotonic() + _PATIENCE
    while not check():
        assert time.monotonic() < give_up, f"not within {_PATIENCE} s: {what}"
        time.sleep(0.5)


def published(stack: Stack) -> str:
    return stack.public_key().fingerprint.hex()


def alarms(stack: Stack) -> list[str]:
    """The alarms about Secrets: the keyring and records."""
    events = client.CoreV1Api(stack.api.client).list_namespaced_event(OPERATOR).items
    return [str(each.message) for each in events if "changed this Secret" in str(each.message)]


def test_backup_opens_everything_after_the_keyring_was_lost(
    stack: Stack, sms: Callable[..., Result], numbers: Callable[[int], list[str]], tmp_path: Path
) -> None:
    """The drill: backup, lose everything, start again without it, restore: all Ready, and nobody touched a channel."""
    core = client.CoreV1Api(stack.api.client)
    first, second = numbers(2)
    before = configured(stack, stack.manifest(first))
    name, url = name_of(before), webhook(stack, first)
    backup, lost = tmp_path / "keyring.age", published(stack)
    ok(sms("keys", "backup", backup, "--passphrase-file", "-", stdin=f"{PASSPHRASE}\n"))
    assert backup.stat().st_mode & 0o777 == 0o600
    assert backup.read_bytes().startswith(b"age-encryption.org/v1\n-> scrypt ")
    assert "exists already" in refused(sms("keys", "backup", backup, "--passphrase-file", "-", stdin=PASSPHRASE))

    stack.stop_process("operator")
    core.delete_namespaced_secret(KEYRING, OPERATOR)
    with pytest.raises(StackError, match="ended with status 1"):
        stack.start_operator()
    log = (stack.logs / "operator.log").read_text()
    assert "kubectl sms keys restore BACKUP" in log
    assert "kubectl sms keys restore BACKUP" in refused(sms("keys", "renew"))
    ok(sms("keys", "renew", "--without-backup"))
    stack.start_operator()
    wait_checked(stack, before)
    closed = wait_reason(stack, name, "RecordUnreadable")
    assert f"needs a key that this operator does not have ({lost})" in json.dumps(closed["status"])
    assert webhook(stack, first) == url, "Twilio keeps working untouched"
    assert listed(sms)[lost] == {"fingerprint": lost, "state": "missing", "created": None, "records": 1, "channels": 1}
    since = stack.manifest(second)
    configured(stack, since)

    wrong = sms("keys", "restore", backup, "--passphrase-file", "-", stdin="another passphrase")
    assert "The passphrase does not open this file" in refused(wrong)
    said = ok(sms("keys", "restore", backup, "--passphrase-file", "-", stdin=PASSPHRASE))
    assert f"{lost} opens 1 records, 1 channels" in said
    assert f"SmsChannel {CHANNELS}/{name}" in said
    stack.wait_until(lambda each: _is_ready(each), name, timeout=_PATIENCE)
    wait_checked(stack, since)
    wait_reason(stack, name_of(since), "Configured")
    assert webhook(stack, first) == url
    keys = listed(sms)
    assert keys[lost]["state"] == "opens"
    assert published(stack) != lost, "what seals since then still does"
    again = sms("keys", "restore", backup, "--passphrase-file", "-", stdin=PASSPHRASE)
    assert "Nothing was changed" in ok(again)
    wait_until(lambda: listed(sms)[lost]["records"] == 0, "the record is sealed with the newest key")
    assert alarms(stack) == []
    delete(stack, name, name_of(since))


def _is_ready(channel: dict[str, Any]) -> bool:
    return any(each["type"] == "Ready" and each["status"] == "True" for each in channel["status"]["conditions"])


def test_rotation_of_manifests_in_git_and_of_the_rest_api(
    stack: Stack,
    sms: Callable[..., Result],
    numbers: Callable[[int], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The drill: renew, re-seal, retire; nothing is written to Twilio, and nothing looks like tampering."""
    first, second = numbers(2)
    manifest, instance = stack.manifest(first), "0a1b2c3d-0000-4000-8000-000000000001"
    configured(stack, manifest)
    wait_until(lambda: _is_sealed_by_shim(stack, instance, second), "the shim reads the key that was published last")
    git = tmp_path / "channel.yaml"
    git.write_text(f"# the webshop's number\n{yaml.safe_dump(manifest)}# end\n")
    former, urls = published(stack), [webhook(stack, each) for each in (first, second)]

    ok(sms("keys", "renew"))
    wait_until(lambda: published(stack) != former, "the operator publishes the new key")
    wait_until(
        lambda: _sealed_with(stack, first) == _sealed_with(stack, second) == published(stack), "re-sealed records"
    )
    assert "so young that others may still seal" in refused(sms("keys", "retire", former, "-y"))
    assert "is the key that seals" in refused(sms("keys", "retire", published(stack), "-y"))
    monkeypatch.setattr(keys_module, "_STILL_SEALS", timedelta(0))
    needed = refused(sms("keys", "retire", former, "-y"))
    assert f"SmsChannel {CHANNELS}/{name_of(manifest)}" in needed
    assert f"SmsChannel {CHANNELS}/{instance}" in needed
    assert "Nothing was changed" in needed

    assert "is not the newest: kubectl sms reseal" in ok(sms("validate", "-f", git))
    text = git.read_text()
    ok(sms("reseal", "--in-place", "-f", git))
    lines = [(old, new) for old, new in zip(text.splitlines(), git.read_text().splitlines(), strict=True) if old != new]
    [(old, new)] = lines
    assert fingerprint_of(old.split()[-1]) == former
    assert fingerprint_of(new.split()[-1]) == published(stack)
    stack.apply(*yaml.safe_load_all(git.read_text()))
    ok(sms("reseal", "--rest"))
    assert listed(sms)[former] | {"records": 0, "channels": 0} == listed(sms)[former]
    ok(sms("keys", "retire", former, "-y"))
    assert former not in listed(sms)

    time.sleep(20)  # the operator has looked at its keyring since
    for each in (name_of(manifest), instance):
        wait_reason(stack, each, "Configured")
    wait_checked(stack, manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    assert [webhook(stack, each) for each in (first, second)] == urls
    assert alarms(stack) == [], "retiring a key is not tampering"
    status, _ = _post(stack, instance, second)
    assert status == 200, "the channel is still REST's"
    wait_until(lambda: _is_sealed_by_shim(stack, instance, second), "the shim follows without a restart")


def _post(stack: Stack, instance: str, number: str) -> tuple[int, Any]:
    setup = {"account_sid": stack.twin["account_sid"], "auth_token": stack.twin["auth_token"], "phone_number": number}
    return stack.rest("POST", instance, setup, Prefer="wait=30")


def _is_sealed_by_shim(stack: Stack, instance: str, number: str) -> bool:
    """Send a channel by REST, and return whether the shim sealed its token with the published key."""
    _post(stack, instance, number)
    sealed = stack.channels.get(name=instance, namespace=CHANNELS).spec.credentials.sealed
    return fingerprint_of(sealed) == published(stack)


def _sealed_with(stack: Stack, number: str) -> str:
    return str(read_record(stack, number).metadata.annotations.get(SEALED_WITH))


def test_channels_heal_one_by_one_when_everything_was_lost(
    stack: Stack, sms: Callable[..., Result], numbers: Callable[[int], list[str]], tmp_path: Path
) -> None:
    """The keyring and the operator's memory are gone, and there seems to be no backup. Then one is found after all."""
    healed, waiting, late = numbers(3)
    manifests = {each: stack.manifest(each) for each in (healed, waiting, late)}
    for each in (healed, waiting):
        configured(stack, manifests[each])
    urls = {each: webhook(stack, each) for each in manifests}
    backup = tmp_path / "keyring.age"
    ok(sms("keys", "backup", backup, "--passphrase-file", "-", stdin=PASSPHRASE))
    stack.stop_process("operator", kill=True)
    client.CoreV1Api(stack.api.client).delete_namespaced_secret(KEYRING, OPERATOR)
    stack.twin_call("DELETE", "/journal")

    ok(sms("keys", "renew", "--without-backup"))
    stack.start_operator()
    stack.apply(manifests[late])  # as Argo CD or Flux would, from Git
    for number, reason, remedy in (
        (healed, "RecordUnreadable", "Without a backup: kubectl sms detach --orphan, then seal the token again"),
        (waiting, "RecordUnreadable", "Restore the keyring (kubectl sms keys restore)"),
        (late, "TokenUnreadable", "Otherwise seal the token again for this namespace, name and accountSid"),
    ):
        wait_checked(stack, manifests[number])
        wait_reason(stack, name_of(manifests[number]), reason)
        assert remedy in _text(sms("status", name_of(manifests[number]), "-n", CHANNELS))
    assert stack.twin_call("GET", "/journal?method=POST")["entries"] == []
    assert {each: webhook(stack, each) for each in manifests} == urls, "Twilio works as before"

    configured(stack, stack.manifest(late, name=name_of(manifests[late])))
    stack.stop_process("operator")
    ok(sms("detach", name_of(manifests[healed]), "-n", CHANNELS, "--orphan", "--yes"))
    stack.start_operator()
    configured(stack, stack.manifest(healed, name=name_of(manifests[healed])))
    assert webhook(stack, healed) == urls[healed]
    wait_reason(stack, name_of(manifests[waiting]), "RecordUnreadable")

    ok(sms("keys", "restore", backup, "--passphrase-file", "-", stdin=PASSPHRASE))
    stack.wait_until(_is_ready, name_of(manifests[waiting]), timeout=_PATIENCE)
    for each in (healed, late):
        wait_checked(stack, manifests[each])
        wait_reason(stack, name_of(manifests[each]), "Configured")
    git = tmp_path / "channels.yaml"
    git.write_text(yaml.safe_dump_all(manifests.values()))
    assert ok(sms("validate", "-f", git)).count("opens, with key") == 3, "what was sealed before the loss, too"
    assert alarms(stack) == []
    delete(stack, *map(name_of, manifests.values()))


def _text(result: Result) -> str:
    """The output of `kubectl sms status`, which ends with 1 for a channel that is not ready."""
    return " ".join(result.output.split())


def test_keys_in_files_are_followed_by_operator_and_shim(
    stack: Stack,
    sms: Callable[..., Result],
    numbers: Callable[[int], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a Secret to a volume, renewed there as a CSI driver does it, and back to a Secret."""
    core: Any = client.CoreV1Api(stack.api.client)
    first, second = numbers(2)
    manifest, instance = stack.manifest(first), "0a1b2c3d-0000-4000-8000-000000000002"
    configured(stack, manifest)
    former, volume = published(stack), tmp_path / "keys"
    stack.stop_process("operator")
    files = {"2026-01.key": base64.b64decode(core.read_namespaced_secret(KEYRING, OPERATOR).data["keyring"]).decode()}
    _mount(volume, files)
    core.delete_namespaced_secret(KEYRING, OPERATOR)
    stack.start_operator(settings={KEYRING_DIR: str(volume)})
    wait_checked(stack, manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    assert published(stack) == former
    assert "whoever provides them adds and removes keys there" in refused(sms("keys", "renew"))
    assert f"with {KEYRING_DIR} set" in refused(sms("keys", "list"))

    files["2026-02.key"] = base64.encodebytes(os.urandom(96)).decode()  # as openssl rand -base64 96 prints it
    _mount(volume, files)
    wait_until(lambda: published(stack) != former, "the operator publishes the last key by name")
    wait_until(lambda: _sealed_with(stack, first) == published(stack), "its record is sealed again")
    wait_until(lambda: _is_sealed_by_shim(stack, instance, second), "the shim follows without a restart")
    wait_checked(stack, manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    wait_reason(stack, instance, "Configured")
    assert KEYRING not in {each.metadata.name for each in core.list_namespaced_secret(OPERATOR).items}
    monkeypatch.setenv(KEYRING_DIR, str(volume))
    assert {row["state"] for row in listed(sms).values()} == {"seals", "opens"}
    monkeypatch.delenv(KEYRING_DIR)

    stack.stop_process("operator")
    with pytest.raises(StackError, match="ended with status 1"):
        stack.start_operator()
    for name in sorted(files):
        ok(sms("keys", "import", volume / name, "--without-backup"))
    stack.start_operator()
    for each in (name_of(manifest), instance):
        wait_reason(stack, each, "Configured")
    wait_checked(stack, manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    assert alarms(stack) == []
    delete(stack, name_of(manifest), instance)


def _mount(volume: Path, files: dict[str, str]) -> None:
    """Replace the files of a volume as Kubernetes does: names are links into a folder that is changed at once."""
    volume.mkdir(exist_ok=True)
    content = volume / f"..{len(list(volume.iterdir()))}"
    content.mkdir()
    for name, text in files.items():
        (content / name).write_text(text)
    (volume / "..data_tmp").symlink_to(content.name)
    (volume / "..data_tmp").rename(volume / "..data")
    for name in files:
        if not (volume / name).is_symlink():
            (volume / name).symlink_to(f"..data/{name}")


def test_missing_rights_are_named(stack: Stack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As somebody who may read nothing but the public key."""
    monkeypatch.setenv("KUBECONFIG", str(stack.home / "sms-api-shim.kubeconfig"))
    message = refused(CliRunner().invoke(cli, ["keys", "list"]))
    assert "create and update operatorobjects.channels.hydracore.io" in message
    manifest = tmp_path / "channel.yaml"
    manifest.write_text(yaml.safe_dump(stack.manifest("+61400111222")))
    validated = CliRunner().invoke(cli, ["validate", "-f", str(manifest)])
    assert "whether it opens cannot be said without the keyring" in ok(validated)
    resealed = refused(CliRunner().invoke(cli, ["reseal", "-f", str(manifest)]))
    assert "right to get the Secret smschannel-keyring" in resealed
