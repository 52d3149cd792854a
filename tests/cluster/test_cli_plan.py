"""`kubectl sms plan` on the real API server: what it shows is what the operator then does, and it writes nothing."""

from __future__ import annotations

import json
import re
import shlex
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from deploy.local.cluster import write_kubeconfig
from deploy.local.stack import CHANNELS, OPERATOR, Stack
from smschannel.api.resource import FINALIZER
from smschannel.cli.main import cli
from tests.cluster.steps import (
    TWILIO_DOWN,
    before,
    configured,
    damage_record,
    delete,
    name_of,
    patch,
    remove_finalizers,
    seed_account,
    wait_reason,
    wait_record_gone,
    webhook,
)
from tests.documents import section
from tests.manifests import INSTANCE, PHONE_NUMBER

Numbers = Callable[[int], list[str]]


@pytest.fixture(autouse=True)
def _in_the_operators_pod(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's rights and Twilio's URL; the command reads the other settings as the operator published them."""
    monkeypatch.setenv("KUBECONFIG", str(stack.operator_kubeconfig()))
    monkeypatch.setenv("SMSCHANNEL_TWILIO_URL", stack.twilio_url)


def plan(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments], input=stdin)


def shown(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return str(result.stdout)


def version(stack: Stack, manifest: Any) -> str:
    return str(stack.channels.get(name=name_of(manifest), namespace=CHANNELS).metadata.resourceVersion)


def test_manifest_that_is_not_applied_yet(stack: Stack, number: str) -> None:
    """What is shown for it is what happens once it is applied; until then nothing does."""
    found = "https://user:s3cret@before.example.com/sms#rc=2"
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": found, "sms_method": "GET"})
    manifest = stack.manifest(number)
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(manifest)), 2)
    url = stack.webhook_url(name_of(manifest))
    sid = stack.number(number)["sid"]
    assert text.splitlines() == [
        f"SmsChannel {CHANNELS}/{name_of(manifest)}: 3 changes",
        f"  would add the finalizer {FINALIZER}",
        f"  would claim {number} ({sid}), and record what it points at now: https://***@before.example.com/sms#rc=2",
        f"  would set the webhook of {number} ({sid}): SmsUrl https://***@before.example.com/sms#rc=2 -> {url},"
        " SmsMethod GET -> POST",
        "Then: Configured. The number points at the instance's webhook.",
    ]
    assert webhook(stack, number) == found, "nothing was written"

    configured(stack, manifest)
    assert (stack.number(number)["sms_url"], stack.number(number)["sms_method"]) == (url, "POST")
    text = shown(plan(name_of(manifest)), 0)
    assert text.splitlines() == [
        f"SmsChannel {CHANNELS}/{name_of(manifest)}: nothing to do",
        "Configured. The number points at the instance's webhook.",
    ]


def test_json_document(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    document = json.loads(shown(plan("-f", "-", "-o", "json", stdin=json.dumps(manifest)), 2))
    assert (document["namespace"], document["name"]) == (CHANNELS, name_of(manifest))
    assert (document["reason"], document["stuck"], document["notRestored"]) == ("Configured", False, [])
    assert [each["change"] for each in document["changes"]] == ["AddFinalizer", "CreateRecord", "SetWebhook"]
    write = document["changes"][-1]
    assert write["from"] == {"smsUrl": before(number), "smsMethod": "POST"}
    assert (write["phoneNumber"], write["accountSid"]) == (number, stack.twin["account_sid"])


def test_drift_is_shown_and_not_corrected(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    unchanged = version(stack, manifest)
    text = shown(plan(name_of(manifest)), 2)
    assert "1 change\n" in text
    assert f"SmsUrl https://drift.example.com/ -> {url}" in text
    assert webhook(stack, number) == "https://drift.example.com/"
    assert version(stack, manifest) == unchanged


def test_change_of_number_shows_both_numbers(stack: Stack, numbers: Numbers) -> None:
    old, new = numbers(2)
    manifest = stack.manifest(old)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    manifest["spec"]["phoneNumber"] = new
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(manifest)), 2)
    assert f"would set the webhook of {new} ({stack.number(new)['sid']}): SmsUrl {before(new)} -> {url}" in text
    assert f"would restore the webhook of {old} ({stack.number(old)['sid']}): SmsUrl {url} -> {before(old)}" in text
    assert text.index("would set") < text.index("would restore"), "the new number works before the old one is restored"
    assert "would add the finalizer" not in text, "it has it"


@pytest.mark.parametrize(
    ("policy", "line"),
    [
        pytest.param(
            "Restore", "would restore the webhook of {number} ({sid}): SmsUrl {url} -> {before}", id="Restore"
        ),
        pytest.param("Clear", "would restore the webhook of {number} ({sid}): SmsUrl {url} -> (empty)", id="Clear"),
        pytest.param("Retain", "{number} ({sid}) is left as it is: the deletion policy is Retain", id="Retain"),
    ],
)
def test_deletion_shows_what_is_restored(stack: Stack, number: str, policy: str, line: str) -> None:
    manifest = stack.manifest(number, deletionPolicy=policy)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    text = shown(plan(name_of(manifest), "--delete"), 2)
    sid = stack.number(number)["sid"]
    assert line.format(number=number, sid=sid, url=url, before=before(number)) in text
    assert f"would free {number} ({sid}): delete the operator's record of it" in text
    assert "would remove the finalizer" in text
    assert webhook(stack, number) == url
    assert not stack.channels.get(name=name_of(manifest), namespace=CHANNELS).metadata.deletionTimestamp

    delete(stack, name_of(manifest))
    left = {"Restore": before(number), "Clear": "", "Retain": url}[policy]
    assert webhook(stack, number) == left, "as the plan said"


def test_webhook_set_by_somebody_else_is_left_alone(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    configured(stack, manifest)
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://me:pw@theirs.example.com/sms"})
    text = shown(plan(name_of(manifest), "--delete"), 2)
    assert "left as it is: somebody pointed it elsewhere since, at https://***@theirs.example.com/sms" in text
    assert "pw" not in text


def test_pending_deletion_says_why_the_number_is_not_restored(stack: Stack) -> None:
    account = seed_account(stack, "+61496000000")
    manifest = stack.manifest(account["phone_numbers"][0], account=account)
    configured(stack, manifest)
    held = {"metadata": {"finalizers": [FINALIZER, "example.com/hold"]}}
    patch(stack, name_of(manifest), held)
    stack.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "suspended"})
    stack.delete(name_of(manifest))
    text = shown(plan(name_of(manifest)), 1)
    assert f"{account['phone_numbers'][0]} (PN" in text
    assert "cannot be restored: The Twilio account is suspended or closed" in text
    assert "RestoreFailed. The number is not restored yet" in text
    remove_finalizers(stack, name_of(manifest))
    stack.wait_gone(name_of(manifest))
    text = shown(plan(name_of(manifest)), 1)
    assert "cannot be restored" in text, "the record outlives the channel and is shown too"


def test_numbers_of_earlier_channels_of_the_name_come_first(stack: Stack, numbers: Numbers) -> None:
    """Deleted by force while Twilio is down: its successor is configured once the former number is restored."""
    old, new = numbers(2)
    manifest = stack.manifest(old)
    name = name_of(manifest)
    predecessor = configured(stack, manifest)
    stack.twin_call("POST", "/faults", TWILIO_DOWN)
    remove_finalizers(stack, name)
    stack.delete(name)
    stack.wait_gone(name)
    stack.stop_process("operator")  # so that nothing is restored before it is shown
    try:
        stack.twin_call("DELETE", "/faults")
        stack.apply(stack.manifest(new, name=name))
        text = shown(plan(name), 2)
        ours = stack.webhook_url(name)
        old_sid, new_sid = stack.number(old)["sid"], stack.number(new)["sid"]
        assert [line.strip() for line in text.splitlines()[1:]] == [
            f"would restore the webhook of {old} ({old_sid}): SmsUrl {ours} -> {before(old)}",
            f"would free {old} ({old_sid}): delete the operator's record of it",
            f"would claim {new} ({new_sid}), and record what it points at now: {before(new)}",
            f"would set the webhook of {new} ({new_sid}): SmsUrl {before(new)} -> {ours}",
            "Then: Configured. The number points at the instance's webhook.",
        ]
        changes = json.loads(shown(plan(name, "-o", "json"), 2))["changes"]
        assert [each["change"] for each in changes] == ["RestoreWebhook", "DeleteRecord", "CreateRecord", "SetWebhook"]
    finally:
        stack.start_operator()
    wait_reason(stack, name, "Configured")
    wait_record_gone(stack, predecessor["metadata"]["uid"])
    assert (webhook(stack, old), webhook(stack, new)) == (before(old), ours), "as the plan said"


def test_unreadable_record_is_shown_with_its_remedy(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    configured(stack, manifest)
    damage_record(stack, number)
    text = shown(plan(name_of(manifest)), 1)
    assert f"RecordUnreadable. The operator's record of {number}, Secret {stack.record_name(number)}" in text
    assert "Restore the keyring (kubectl sms keys restore)" in text
    text = shown(plan(name_of(manifest), "--delete"), 1)
    assert f"{number} ({stack.number(number)['sid']}) cannot be restored: the record has an unknown version" in text


def test_number_in_use_is_known_from_the_records(stack: Stack, number: str) -> None:
    holder = stack.manifest(number)
    configured(stack, holder)
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(stack.manifest(number))), 1)
    assert f"NumberInUse. {number} already serves another channel. Use another number, or" in text
    assert name_of(holder) not in text


def test_refused_token_is_shown_with_its_remedy(stack: Stack, number: str) -> None:
    wrong = {**stack.twin, "auth_token": "0" * 32}
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(stack.manifest(number, account=wrong))), 1)
    assert "AuthenticationFailed. Twilio refuses the credentials" in text
    assert "Take the account SID and auth token from the Twilio console" in text


def test_outage_shows_no_plan(stack: Stack, number: str) -> None:
    stack.twin_call("POST", "/faults", TWILIO_DOWN)
    result = plan("-f", "-", stdin=yaml.safe_dump(stack.manifest(number)))
    assert shown(result, 1) == ""
    assert "Twilio answers HTTP 503, code 20503. The number cannot be read now: try again." in result.stderr


def test_suspended_channel_has_nothing_to_do(stack: Stack, number: str) -> None:
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(stack.manifest(number, suspend=True))), 0)
    assert "nothing to do\nSuspended. Twilio is left as it is" in text


def refusal(result: Result) -> str:
    assert shown(result, 1) == ""
    return " ".join(result.stderr.split())


def test_unknown_channel_is_refused(stack: Stack) -> None:
    name = str(uuid.uuid4())
    message = refusal(plan(name))
    assert f"There is no channel {name} in namespace {CHANNELS}" in message
    assert "before it is applied: -f FILE" in message


def test_unknown_namespace_is_named(stack: Stack) -> None:
    """Only to those who may read namespaces, which the operator may not."""
    admin = str(stack.kubeconfig)
    message = refusal(plan(str(uuid.uuid4()), "-n", "nosuch", "--kubeconfig", admin))
    assert "There is no namespace nosuch." in message


def test_unwatched_namespace_is_refused(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    manifest["metadata"]["namespace"] = "default"
    admin = str(stack.kubeconfig)
    message = refusal(plan("-f", "-", "--kubeconfig", admin, stdin=yaml.safe_dump(manifest)))
    assert f"The operator watches the namespaces {CHANNELS}, team-b, team-c only" in message
    assert "only, not default" in message


def test_invalid_manifest_is_refused_with_the_rules_message(stack: Stack) -> None:
    message = refusal(plan("-f", "-", stdin=yaml.safe_dump(stack.manifest("0400 111 222"))))
    assert "spec.phoneNumber: phoneNumber is in E.164" in message


def test_missing_right_is_named_with_a_remedy(stack: Stack) -> None:
    """The shim's account may write channels, and no more."""
    message = refusal(plan(str(uuid.uuid4()), "--kubeconfig", str(stack.home / "sms-api-shim.kubeconfig")))
    assert f'cannot get resource "configmaps" in API group "" in the namespace "{OPERATOR}"' in message
    assert "as an administrator may" in message
    assert f"kubectl -n {OPERATOR} exec deploy/sms-channel-operator -- kubectl-sms plan" in message


def test_administrator_needs_no_settings(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    configured(stack, manifest)
    assert "nothing to do" in shown(plan(name_of(manifest), "--kubeconfig", str(stack.kubeconfig)), 0)


def test_environment_overrides_published_settings(stack: Stack, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows what another template would do."""
    manifest = stack.manifest(number)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    monkeypatch.setenv("SMSCHANNEL_WEBHOOK_URL_TEMPLATE", "https://new.example.com/{namespace}/{instance_id}")
    theirs = f"https://new.example.com/{CHANNELS}/{name_of(manifest)}"
    text = shown(plan(name_of(manifest)), 2)
    assert f"SmsUrl {url} -> {theirs}" in text
    assert f"would record for {number} ({stack.number(number)['sid']}): {theirs} as a URL of ours" in text


def test_published_twilio_url_is_not_followed(stack: Stack, number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may write the ConfigMap would get the tokens of all channels."""
    manifest = stack.manifest(number)
    configured(stack, manifest)
    monkeypatch.delenv("SMSCHANNEL_TWILIO_URL")
    message = refusal(plan(name_of(manifest)))
    assert f"name another Twilio: SMSCHANNEL_TWILIO_URL={stack.twilio_url}. Logins are sent there" in message
    assert "set it here: export SMSCHANNEL_TWILIO_URL=..." in message


def test_missing_published_settings_are_reported(stack: Stack) -> None:
    message = refusal(plan(str(uuid.uuid4()), "--operator-namespace", "default", "--kubeconfig", str(stack.kubeconfig)))
    assert "SMSCHANNEL_WEBHOOK_URL_TEMPLATE: is not set" in message
    assert "has published none in namespace default: has it started once?" in message


def test_expired_login_is_reported(stack: Stack, tmp_path: Path) -> None:
    cluster = stack.cluster
    stale = write_kubeconfig(
        tmp_path / "stale", url=cluster.url, ca_data=cluster.ca_data, token="unknown", namespace=CHANNELS
    )
    assert "does not accept your credentials: log in again" in refusal(
        plan(str(uuid.uuid4()), "--kubeconfig", str(stale))
    )


def test_documented_commands_work_and_print_the_example(
    stack: Stack, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://user:pw@before.example.com/sms"})
    manifest = stack.manifest(number)
    monkeypatch.chdir(tmp_path)
    Path("channel.yaml").write_text(yaml.safe_dump(manifest))
    text = section("See what would happen")
    [commands] = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    [example] = re.findall(r"```\n(SmsChannel .*?)```", text, re.DOTALL)
    now, before_it_is_applied, before_it_is_deleted = (
        shlex.split(line.replace(INSTANCE, name_of(manifest)), comments=True) for line in commands.splitlines()
    )
    assert now[:3] == ["kubectl", "sms", "plan"]
    assert "would set the webhook" in shown(plan(*before_it_is_applied[3:]), 2)
    url = configured(stack, manifest)["status"]["webhookUrl"]
    assert "nothing to do" in shown(plan(*now[3:]), 0)
    text = shown(plan(*before_it_is_deleted[3:]), 2)
    abridged = {name_of(manifest): INSTANCE, number: PHONE_NUMBER, stack.number(number)["sid"]: "PN..."}
    for real, printed in {url: "https://sms.example.com/...", **abridged}.items():
        text = text.replace(real, printed)
    assert text == example
