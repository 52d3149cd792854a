"""`kubectl sms plan` on the real API server: what it shows is what the operator then does. Looking writes nothing."""

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
from deploy.local.stack import CHANNELS, OPERATOR, Stack, ready_reason
from smschannel.api.resource import FINALIZER
from smschannel.cli.main import cli
from tests.cluster.steps import before, name_of, patch, take_finalizers_off
from tests.documents import section
from tests.manifests import INSTANCE, PHONE_NUMBER

Numbers = Callable[[int], list[str]]


@pytest.fixture(autouse=True)
def _in_the_operators_pod(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operator's rights and no settings at all: what it needs to know, the operator has published."""
    monkeypatch.setenv("KUBECONFIG", str(stack.home / "sms-channel-operator.kubeconfig"))


def plan(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["plan", *arguments], input=stdin)


def shown(result: Result, code: int) -> str:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return str(result.stdout)


def applied(stack: Stack, manifest: Any, reason: str = "Configured") -> dict[str, Any]:
    stack.apply(manifest)
    name = name_of(manifest)
    return stack.wait_until(lambda each: ready_reason(each)[1] == reason, name)[name]


def version(stack: Stack, manifest: Any) -> str:
    return str(stack.channels.get(name=name_of(manifest), namespace=CHANNELS).metadata.resourceVersion)


def test_a_manifest_that_is_not_applied_yet(stack: Stack, number: str) -> None:
    """What is shown for it is what happens once it is applied, and until then nothing does."""
    found = "https://user:s3cret@before.example.com/sms#rc=2"
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": found, "sms_method": "GET"})
    manifest = stack.manifest(number)
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(manifest)), 2)
    url = stack.options.webhook_url_template.replace("{instance_id}", name_of(manifest))
    sid = stack.number(number)["sid"]
    assert text.splitlines() == [
        f"SmsChannel {CHANNELS}/{name_of(manifest)}: 3 changes",
        f"  would add the finalizer {FINALIZER}",
        f"  would record what {number} ({sid}) points at now: https://***@before.example.com/sms#rc=2",
        f"  would write {number} ({sid}): SmsUrl https://***@before.example.com/sms#rc=2 -> {url},"
        " SmsMethod GET -> POST",
        "Then: Configured. The number points at the instance's webhook.",
    ]
    assert stack.number(number)["sms_url"] == found, "it was only looked at"

    applied(stack, manifest)
    assert (stack.number(number)["sms_url"], stack.number(number)["sms_method"]) == (url, "POST")
    text = shown(plan(name_of(manifest)), 0)
    assert text.splitlines() == [
        f"SmsChannel {CHANNELS}/{name_of(manifest)}: nothing to do",
        "Configured. The number points at the instance's webhook.",
    ]


def test_json_is_for_machines(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    document = json.loads(shown(plan("-f", "-", "-o", "json", stdin=json.dumps(manifest)), 2))
    assert (document["namespace"], document["name"]) == (CHANNELS, name_of(manifest))
    assert (document["reason"], document["stuck"], document["left"]) == ("Configured", False, [])
    assert [each["change"] for each in document["changes"]] == ["AddFinalizer", "SaveRecord", "SetWebhook"]
    write = document["changes"][-1]
    assert write["from"] == {"smsUrl": before(number), "smsMethod": "POST"}
    assert (write["phoneNumber"], write["accountSid"]) == (number, stack.twin["account_sid"])


def test_drift_is_shown_and_nothing_is_written(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    url = applied(stack, manifest)["status"]["webhookUrl"]
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drift.example.com/"})
    seen = version(stack, manifest)
    text = shown(plan(name_of(manifest)), 2)
    assert "1 change\n" in text
    assert f"SmsUrl https://drift.example.com/ -> {url}" in text
    assert stack.number(number)["sms_url"] == "https://drift.example.com/"
    assert version(stack, manifest) == seen


def test_an_edit_of_the_number_shows_both_numbers(stack: Stack, numbers: Numbers) -> None:
    old, new = numbers(2)
    manifest = stack.manifest(old)
    url = applied(stack, manifest)["status"]["webhookUrl"]
    manifest["spec"]["phoneNumber"] = new
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(manifest)), 2)
    assert f"would write {new} ({stack.number(new)['sid']}): SmsUrl {before(new)} -> {url}" in text
    assert f"would give back {old} ({stack.number(old)['sid']}): SmsUrl {url} -> {before(old)}" in text
    assert text.index("would write") < text.index("would give back"), "the new one works before the old one goes"
    assert "would add the finalizer" not in text, "it has it"


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        pytest.param("Restore", "would give back {number} ({sid}): SmsUrl {url} -> {before}", id="Restore"),
        pytest.param("Clear", "would give back {number} ({sid}): SmsUrl {url} -> (empty)", id="Clear"),
        pytest.param("Retain", "{number} ({sid}) is left as it is: the deletion policy is Retain", id="Retain"),
    ],
)
def test_what_would_i_get_back(stack: Stack, number: str, policy: str, says: str) -> None:
    manifest = stack.manifest(number, deletionPolicy=policy)
    url = applied(stack, manifest)["status"]["webhookUrl"]
    text = shown(plan(name_of(manifest), "--delete"), 2)
    sid = stack.number(number)["sid"]
    assert says.format(number=number, sid=sid, url=url, before=before(number)) in text
    assert "would drop the operator's record of the channel" in text
    assert "would remove the finalizer" in text
    assert stack.number(number)["sms_url"] == url
    assert not stack.channels.get(name=name_of(manifest), namespace=CHANNELS).metadata.deletionTimestamp

    stack.delete(name_of(manifest))
    stack.wait_gone(name_of(manifest))
    left = {"Restore": before(number), "Clear": "", "Retain": url}[policy]
    assert (stack.number(number)["sms_url"] or "") == left, "as it was told"


def test_what_somebody_pointed_elsewhere_is_left_alone(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    applied(stack, manifest)
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://me:pw@theirs.example.com/sms"})
    text = shown(plan(name_of(manifest), "--delete"), 2)
    assert "left as it is: somebody pointed it elsewhere since, at https://***@theirs.example.com/sms" in text
    assert "pw" not in text


def test_a_channel_whose_deletion_waits_for_twilio_says_why(stack: Stack) -> None:
    [account] = stack.twin_call("POST", "/seed", {"accounts": 1, "numbers": 1, "first": "+61496000000"})["accounts"]
    manifest = stack.manifest(account["phone_numbers"][0], account=account)
    applied(stack, manifest)
    held = {"metadata": {"finalizers": [FINALIZER, "example.com/hold"]}}
    patch(stack, name_of(manifest), held)
    stack.twin_call("PATCH", f"/accounts/{account['account_sid']}", {"status": "suspended"})
    stack.delete(name_of(manifest))
    text = shown(plan(name_of(manifest)), 1)
    assert f"{account['phone_numbers'][0]} (PN" in text
    assert "cannot be given back: The Twilio account is suspended or closed" in text
    assert "RestoreFailed. The number is not given back yet" in text
    take_finalizers_off(stack, name_of(manifest))
    stack.wait_gone(name_of(manifest))
    text = shown(plan(name_of(manifest)), 1)
    assert "cannot be given back" in text, "the operator's record outlives the channel, and is told of too"


def test_a_number_that_another_channel_holds(stack: Stack, number: str) -> None:
    """Whoever holds a number is known from the records alone, as the operator knows it."""
    holder = stack.manifest(number)
    applied(stack, holder)
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(stack.manifest(number))), 1)
    assert f"NumberInUse. {number} already serves another channel. Use another number, or" in text
    assert name_of(holder) not in text


def test_a_token_that_twilio_refuses(stack: Stack, number: str) -> None:
    stranger = {**stack.twin, "auth_token": "0" * 32}
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(stack.manifest(number, account=stranger))), 1)
    assert "AuthenticationFailed. Twilio refuses the credentials" in text
    assert "Take the account SID and auth token from the Twilio console" in text


def test_twilio_cannot_be_asked(stack: Stack, number: str) -> None:
    stack.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "status", "status": 503, "code": 20503}})
    result = plan("-f", "-", stdin=yaml.safe_dump(stack.manifest(number)))
    assert shown(result, 1) == ""
    assert "Twilio answers HTTP 503, code 20503. Nothing can be told of the number now: try again." in result.stderr


def test_a_suspended_channel_has_nothing_to_do(stack: Stack, number: str) -> None:
    text = shown(plan("-f", "-", stdin=yaml.safe_dump(stack.manifest(number, suspend=True))), 0)
    assert "nothing to do\nSuspended. Twilio is left as it is" in text


def refusal(result: Result) -> str:
    assert shown(result, 1) == ""
    return " ".join(result.stderr.split())


def test_a_channel_that_is_not_there(stack: Stack) -> None:
    name = str(uuid.uuid4())
    said = refusal(plan(name))
    assert f"There is no channel {name} in namespace {CHANNELS}" in said
    assert "before it is applied: -f FILE" in said


def test_a_namespace_that_the_operator_does_not_look_after(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    manifest["metadata"]["namespace"] = "default"
    admin = str(stack.kubeconfig)
    said = refusal(plan("-f", "-", "--kubeconfig", admin, stdin=yaml.safe_dump(manifest)))
    assert f"looks after the channels of {CHANNELS}" in said
    assert "only, not of default" in said


def test_a_manifest_that_breaks_a_rule_is_refused_in_the_rules_words(stack: Stack) -> None:
    said = refusal(plan("-f", "-", stdin=yaml.safe_dump(stack.manifest("0400 111 222"))))
    assert "spec.phoneNumber: phoneNumber is in E.164" in said


def test_without_the_rights_it_says_which_and_what_to_do(stack: Stack) -> None:
    """The shim's account stands for those who may write channels and no more."""
    said = refusal(plan(str(uuid.uuid4()), "--kubeconfig", str(stack.home / "sms-api-shim.kubeconfig")))
    assert f'cannot get resource "configmaps" in API group "" in the namespace "{OPERATOR}"' in said
    assert "as an administrator may" in said
    assert f"kubectl -n {OPERATOR} exec deploy/sms-channel-operator -- kubectl-sms plan" in said


def test_an_administrator_needs_no_settings_either(stack: Stack, number: str) -> None:
    manifest = stack.manifest(number)
    applied(stack, manifest)
    assert "nothing to do" in shown(plan(name_of(manifest), "--kubeconfig", str(stack.kubeconfig)), 0)


def test_the_environment_overrides_what_the_operator_published(
    stack: Stack, number: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would another template do?"""
    manifest = stack.manifest(number)
    url = applied(stack, manifest)["status"]["webhookUrl"]
    monkeypatch.setenv("SMSCHANNEL_WEBHOOK_URL_TEMPLATE", "https://new.example.com/{instance_id}")
    text = shown(plan(name_of(manifest)), 2)
    assert f"SmsUrl {url} -> https://new.example.com/{name_of(manifest)}" in text
    assert f"would record that https://new.example.com/{name_of(manifest)} is ours" in text


def test_where_no_operator_has_published_anything_it_says_so(stack: Stack) -> None:
    said = refusal(plan(str(uuid.uuid4()), "--operator-namespace", "default", "--kubeconfig", str(stack.kubeconfig)))
    assert "SMSCHANNEL_WEBHOOK_URL_TEMPLATE: is not set" in said
    assert "has published none in namespace default: has it started once?" in said


def test_a_stale_login_is_told(stack: Stack, tmp_path: Path) -> None:
    cluster = stack.cluster
    stale = write_kubeconfig(
        tmp_path / "stale", url=cluster.url, ca_data=cluster.ca_data, token="unknown", namespace=CHANNELS
    )
    assert "does not accept your credentials: log in again" in refusal(
        plan(str(uuid.uuid4()), "--kubeconfig", str(stale))
    )


def test_the_documents_tell_the_truth(
    stack: Stack, number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands work as printed, and its example is what is printed then."""
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://user:pw@before.example.com/sms"})
    manifest = stack.manifest(number)
    monkeypatch.chdir(tmp_path)
    Path("channel.yaml").write_text(yaml.safe_dump(manifest))
    said = section("See what would happen")
    [commands] = re.findall(r"```sh\n(.*?)```", said, re.DOTALL)
    [example] = re.findall(r"```\n(SmsChannel .*?)```", said, re.DOTALL)
    now, before_it_is_applied, before_it_is_deleted = (
        shlex.split(line.replace(INSTANCE, name_of(manifest)), comments=True) for line in commands.splitlines()
    )
    assert now[:3] == ["kubectl", "sms", "plan"]
    assert "would set the webhook" in shown(plan(*before_it_is_applied[3:]), 2)
    url = applied(stack, manifest)["status"]["webhookUrl"]
    assert "nothing to do" in shown(plan(*now[3:]), 0)
    text = shown(plan(*before_it_is_deleted[3:]), 2)
    abridged = {name_of(manifest): INSTANCE, number: PHONE_NUMBER, stack.number(number)["sid"]: "PN..."}
    for real, printed in {url: "https://sms.example.com/...", **abridged}.items():
        text = text.replace(real, printed)
    assert text == example
