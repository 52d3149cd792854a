"""Channels as they are for each reason, for GitOps tools: their statuses come from the operator's own code.

`python -m tests.gitops` writes from them the test data of Argo CD's health check, and the ConfigMap with the check.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import yaml

from smschannel.api.reasons import Effective, Reason
from smschannel.core.conditions import next_status, status_while_refused, status_while_unavailable
from smschannel.core.plan import Verdict
from tests.documents import ROOT
from tests.manifests import good

Object = dict[str, Any]

GITOPS = ROOT / "deploy/gitops"
KIND = "resource_customizations/channels.hydracore.io/SmsChannel"
HEALTH_LUA = GITOPS / "argocd" / KIND / "health.lua"
CONFIGMAP_KEY = "resource.customizations.health.channels.hydracore.io_SmsChannel"
HOW_TO_REGENERATE = "Run: .venv/bin/python -m tests.gitops"

_NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
_SECOND_LATER = _NOW + timedelta(seconds=1)
_URL = "https://sms.example.com/v1/instances/497f6eca-6276-4993-bfeb-53cbbbba6f08/channels/sms/webhook"
_NUMBER_SID = "PN0123456789abcdef0123456789abcdef"
_WAITING = "Waiting for the operator to reconcile the current generation"

MESSAGES = {
    Reason.Pending: "The operator has begun.",
    Reason.Configured: "Twilio delivers the messages to the instance.",
    Reason.TwilioUnavailable: "Twilio answers HTTP 503.",
    Reason.SecretNotFound: "There is no Secret twilio.",
    Reason.SecretKeyMissing: "Secret twilio has no key auth_token.",
    Reason.SecretNotLabelled: "Secret twilio has no label that allows its use.",
    Reason.TokenUnreadable: "The sealed value cannot be opened.",
    Reason.AuthenticationFailed: "Twilio rejects the credentials.",
    Reason.TokenRejected: "Twilio rejects the newer token.",
    Reason.AccountSuspended: "Twilio has suspended the account.",
    Reason.NumberNotFound: "The account has no such number.",
    Reason.NumberLacksSms: "The number cannot receive SMS.",
    Reason.NumberInUse: "Another channel holds the number.",
    Reason.WebhookForeign: "The number points elsewhere.",
    Reason.WebhookDrifted: "The number's webhook was changed.",
    Reason.WebhookOverridden: "A Messaging Service receives the messages.",
    Reason.WebhookContested: "The webhook is changed back again and again.",
    Reason.WebhookRefused: "Twilio refuses the webhook URL.",
    Reason.ObserveOnly: "The operator only observes. It would: set its webhook.",
    Reason.Suspended: "The channel is suspended.",
    Reason.Restoring: "The number is being restored.",
    Reason.RestoreFailed: "The number could not be restored.",
    Reason.RecordUnreadable: "The record cannot be opened.",
    Reason.KubernetesRefused: "The API server refuses a call.",
    Reason.InvalidSpec: "Not a valid SmsChannel: spec.deletionPolicy has an unknown value.",
}
_NOT_EFFECTIVE = {
    Reason.WebhookForeign: Effective.FOREIGN_URL,
    Reason.WebhookDrifted: Effective.URL_MISMATCH,
    Reason.WebhookOverridden: Effective.OVERRIDDEN_BY_MESSAGING_SERVICE,
    Reason.WebhookContested: Effective.URL_MISMATCH,
}
_BEING_DELETED = {Reason.Restoring, Reason.RestoreFailed}


class Health(NamedTuple):
    """What the health check for Argo CD returns."""

    status: str
    message: str


class Case(NamedTuple):
    """A channel, what the health check says of it, and what kstatus does; `ready` is the status of Ready that counts.

    `ready` is empty if there is none, or it is about an older generation: `kubectl wait` goes on waiting then.
    """

    name: str
    channel: Object
    health: Health
    kstatus: str
    ready: str


def cases() -> Iterator[Case]:
    """Yield a channel for each reason, then the ones whose status is special."""
    for reason in Reason:
        yield _of_reason(reason)
    works = _status(Verdict(Reason.Configured, MESSAGES[Reason.Configured], _NUMBER_SID))
    yield Case("New", _channel({"observedGeneration": -1}), Health("Progressing", _WAITING), "InProgress", "")
    yield Case("NewGeneration", _channel(works, generation=2), Health("Progressing", _WAITING), "InProgress", "")
    down = status_while_unavailable(works, "Twilio answers HTTP 503.", generation=2, now=_SECOND_LATER)
    assert down
    trying = Health("Progressing", "Twilio answers HTTP 503.")
    yield Case("NewGenerationTwilioUnavailable", _channel(down, generation=2), trying, "InProgress", "")
    same = status_while_unavailable(works, "Twilio answers HTTP 503.", generation=1, now=_SECOND_LATER)
    assert same
    healthy = Health("Healthy", MESSAGES[Reason.Configured])
    yield Case("ConfiguredTwilioUnavailable", _channel(same), healthy, "Current", "True")
    refused = status_while_refused(works, MESSAGES[Reason.KubernetesRefused], generation=1, now=_SECOND_LATER)
    assert refused
    waiting = Health("Progressing", MESSAGES[Reason.KubernetesRefused])
    yield Case("ConfiguredKubernetesRefused", _channel(refused), waiting, "InProgress", "True")
    degraded = Verdict(Reason.SecretNotFound, MESSAGES[Reason.SecretNotFound], _NUMBER_SID, degraded=True)
    status = next_status(works, degraded, generation=1, webhook_url=_URL, now=_SECOND_LATER)
    message = f"{degraded.message} {Reason.SecretNotFound.remedy}"
    yield Case("ConfiguredSecretNotFound", _channel(status), Health("Degraded", message), "Failed", "True")


def _of_reason(reason: Reason) -> Case:
    verdict = Verdict(reason, MESSAGES[reason], _NUMBER_SID, effective=_NOT_EFFECTIVE.get(reason))
    channel = _channel(_status(verdict))
    if reason in _BEING_DELETED:
        channel["metadata"]["deletionTimestamp"] = "2026-01-02T03:04:05Z"
        channel["metadata"]["finalizers"] = ["channels.hydracore.io/restore"]
    works = reason.ready == "True" and not reason.progress
    message = MESSAGES[reason] if works else f"{MESSAGES[reason]} {reason.remedy}"
    return Case(reason.name, channel, Health(_health(reason), message), _kstatus(reason), reason.ready)


def _health(reason: Reason) -> str:
    if reason is Reason.Suspended:
        return "Suspended"
    return {"Stalled": "Degraded", "Reconciling": "Progressing", None: "Healthy"}[reason.progress]


def _kstatus(reason: Reason) -> str:
    if reason in _BEING_DELETED:
        return "Terminating"
    return {"Stalled": "Failed", "Reconciling": "InProgress", None: "Current"}[reason.progress]


def _status(verdict: Verdict) -> Object:
    return next_status({"observedGeneration": -1}, verdict, generation=1, webhook_url=_URL, now=_NOW)


def _channel(status: Object, generation: int = 1) -> Object:
    manifest = good()
    manifest["spec"]["credentials"] = {"secretKeyRef": {"name": "twilio", "key": "auth_token"}}
    manifest["metadata"]["generation"] = generation
    return {**manifest, "status": status}


def generated() -> dict[str, str]:
    """Return the text of each generated file by its path below `deploy/gitops`."""
    files = {f"argocd/{KIND}/testdata/{_file(case)}": _yaml(case.channel) for case in cases()}
    files[f"argocd/{KIND}/health_test.yaml"] = _yaml({"tests": [_health_test(case) for case in cases()]})
    files["argocd/argocd-cm-patch.yaml"] = _configmap(HEALTH_LUA.read_text())
    return files


def _health_test(case: Case) -> Object:
    return {"healthStatus": case.health._asdict(), "inputPath": f"testdata/{_file(case)}"}


def _file(case: Case) -> str:
    return "".join(f"_{each.lower()}" if each.isupper() else each for each in case.name).strip("_") + ".yaml"


def _yaml(document: Object) -> str:
    return yaml.dump(document, sort_keys=False, width=1000)


def _configmap(lua: str) -> str:
    """Return the patch as people write it: YAML's dump would fold the script."""
    script = "".join(f"    {line}\n" if line else "\n" for line in lua.splitlines())
    return f"# Generated from health.lua.\ndata:\n  {CONFIGMAP_KEY}: |\n{script}"
