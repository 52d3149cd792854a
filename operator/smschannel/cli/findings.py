"""What `kubectl sms doctor` makes of what it read: one `Finding` per line. No I/O.

A finding says only what was seen. What could not be read is `Level.NOT_READ`, and is never taken for good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from pydantic import BaseModel

from smschannel.api.names import (
    FENCE,
    FINGERPRINT,
    KEYRING_SECRET,
    LEASE,
    NAMESPACES,
    PUBLIC_KEY,
    PUBLIC_KEY_CONFIGMAP,
    SETTINGS_CONFIGMAP,
)
from smschannel.api.reasons import Reason
from smschannel.api.resource import GROUP, PLURAL, Credentials, SecretKeyRef, Spec
from smschannel.api.resource import VERSION as API

Object = Mapping[str, Any]

CRD = f"{PLURAL}.{GROUP}"
_APPLY_CRD = "Apply the CRD of this release: kubectl apply -f crds/"
_NEARLY_FULL = 0.9
_COUNTED = {"secrets", "configmaps", f"count/{CRD}", "count/secrets", "count/configmaps", "count/events.events.k8s.io"}


class Level(StrEnum):
    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"
    NOT_READ = "not read"


class Finding(NamedTuple):
    """One line of the doctor: what was checked, how it is, and what to do unless it is good."""

    check: str
    level: Level
    text: str
    remedy: str = ""


class Right(NamedTuple):
    """What the operator must be allowed: `where` is "everywhere", "channels" (their namespaces) or "own" (its own)."""

    where: str
    group: str
    resource: str
    verbs: tuple[str, ...]
    names: tuple[str, ...] = ("",)


OPERATOR_RIGHTS = (
    Right("everywhere", GROUP, "smschannels", ("get", "list", "watch", "patch")),
    Right("everywhere", GROUP, "smschannels/status", ("patch",)),
    Right("channels", "", "secrets", ("get", "list", "watch")),
    Right("channels", "events.k8s.io", "events", ("create", "patch")),
    Right("own", "", "secrets", ("get", "list", "create", "patch", "delete")),
    Right("own", "events.k8s.io", "events", ("create", "patch")),
    Right("own", "", "configmaps", ("create",)),
    Right("own", "", "configmaps", ("get", "patch"), (PUBLIC_KEY_CONFIGMAP, SETTINGS_CONFIGMAP)),
    Right("own", "coordination.k8s.io", "leases", ("create",)),
    Right("own", "coordination.k8s.io", "leases", ("get", "update"), (LEASE,)),
)
"""The rights of `deploy/manifests/operator-rbac.yaml`."""

POLICIES = {
    FENCE: ("operator-fence.yaml", "a former leader may still write to Kubernetes for some seconds"),
    "smschannel-operator-ownership": ("operator-ownership.yaml", "others may write the operator's keys and records"),
    "sms-api-shim": ("shim-policy.yaml", "the REST API's ServiceAccount may change channels that are not its own"),
    "smschannel-namespace-warning": (
        "namespace-warning.yaml",
        "nobody is warned of channels in a namespace that no operator watches",
    ),
}
"""The admission policies: the file of each in `deploy/manifests`, and what is lost without it."""


def exit_status(findings: Iterable[Finding]) -> int:
    """Return 0 if all is good, 1 if something is bad, and 3 if nothing is, but not everything could be read."""
    levels = {each.level for each in findings}
    return 1 if Level.BAD in levels else 3 if Level.NOT_READ in levels else 0


def not_read(check: str, why: str, *, forbidden: bool = False) -> Finding:
    return Finding(check, Level.NOT_READ, why, "Run it with the rights of an administrator." if forbidden else "")


def crd(found: Object | None) -> Finding:
    """Judge the CRD: whether it serves the version, the fields and the values that this release knows."""
    if found is None:
        return Finding("CRD", Level.BAD, f"There is no CRD {CRD}.", _APPLY_CRD)
    conditions = {each["type"]: each["status"] for each in (found.get("status") or {}).get("conditions") or ()}
    served = {each["name"]: each for each in found["spec"]["versions"] if each.get("served")}
    if API not in served or conditions.get("Established") != "True":
        return Finding("CRD", Level.BAD, f"The CRD {CRD} does not serve {API}.", _APPLY_CRD)
    schema = served[API]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    has, known = set(_paths(schema)), set(_known_fields())
    if missing := sorted(known - has):
        return Finding(
            "CRD", Level.BAD, f"The CRD is older than this release: it lacks {', '.join(missing)}.", _APPLY_CRD
        )
    if more := sorted(has - known):
        text = f"The CRD is newer than this release: it has {', '.join(more)}."
        return Finding("CRD", Level.WARNING, text, "Install the newest kubectl sms.")
    return Finding("CRD", Level.GOOD, f"{CRD} serves {API} with the fields of this release.")


def _paths(schema: Object, path: str = "spec") -> Iterator[str]:
    for name, each in (schema.get("properties") or {}).items():
        yield from _paths(each, f"{path}.{name}") if "properties" in each else (f"{path}.{name}",)


def _known_fields() -> Iterator[str]:
    models: dict[str, type[BaseModel]] = {
        "spec": Spec,
        "spec.credentials": Credentials,
        "spec.credentials.secretKeyRef": SecretKeyRef,
    }
    for path, model in models.items():
        for field in model.model_fields.values():
            if (name := f"{path}.{field.alias}") not in models:
                yield name


def policies(installed: Iterable[Object], bindings: Iterable[Object]) -> Iterator[Finding]:
    """Judge the admission policies: each works only with a binding."""
    names = {each["metadata"]["name"] for each in installed}
    bound = {each["spec"]["policyName"] for each in bindings}
    missing = [name for name in POLICIES if name not in names or name not in bound]
    for name in missing:
        file, lost = POLICIES[name]
        what = "has no binding" if name in names else "is not installed"
        text = f"The admission policy {name} {what}: {lost}."
        yield Finding("Policies", Level.WARNING, text, f"kubectl apply -f deploy/manifests/{file}")
    if not missing:
        yield Finding("Policies", Level.GOOD, f"{len(POLICIES)} admission policies are installed and bound.")


def rights(denied: Sequence[str], asked: int) -> Finding:
    """Judge the operator's RBAC: `denied` are the rights that it lacks, of `asked`."""
    if not denied:
        return Finding("RBAC", Level.GOOD, f"The operator has all {asked} rights that it needs.")
    text = f"The operator may not: {'; '.join(denied)}."
    return Finding("RBAC", Level.BAD, text, "kubectl apply -f deploy/manifests/operator-rbac.yaml, or helm upgrade")


def leader(name: str, lease: Object | None, *, renewed_within: float | None, is_only: bool = True) -> Finding:
    """Judge the Lease of an operator; `is_only`: there are no others, as there are with shards.

    `renewed_within` is after how many seconds a renewal was seen; None if none was seen in time.
    """
    holder = ((lease or {}).get("spec") or {}).get("holderIdentity")
    start = "Start the operator: kubectl -n NAMESPACE get pods shows what keeps it from running."
    if lease is None:
        return Finding("Leader", Level.BAD, f"There is no Lease {name}: no operator has started there.", start)
    removed = "" if is_only else f" If it was removed: kubectl -n NAMESPACE delete lease {name}"
    if not holder:
        text = f"Nobody holds the Lease {name}: no operator is running."
        return Finding("Leader", Level.BAD, text, f"{start}{removed}")
    if renewed_within is None:
        text = f"{holder} holds the Lease {name}, but did not renew it while this was watched."
        return Finding("Leader", Level.BAD, text, f"{start} Its log says why it does not renew.{removed}")
    shard = name.removeprefix(LEASE).removeprefix("-")
    leads = f"{holder} leads shard {shard}" if shard else f"{holder} leads"
    return Finding("Leader", Level.GOOD, f"{leads}, and renewed its Lease after {renewed_within:.0f} s.")


def keyring(is_there: bool, *, has_published: bool | None) -> Finding:
    """Judge the keyring; `has_published` is whether the published key is one of its keys, None if none is published."""
    if not is_there:
        text = f"There is no Secret {KEYRING_SECRET}: sealed tokens and records cannot be opened."
        return Finding("Keyring", Level.BAD, text, "Restore it from its backup before the operator is started again.")
    if has_published is False:
        text = "The published key is not in the keyring: what is sealed with it cannot be opened."
        return Finding("Keyring", Level.BAD, text, "Restart the operator: it publishes its key again.")
    return Finding("Keyring", Level.GOOD, f"Secret {KEYRING_SECRET} can be read, and has the published key.")


def published(data: Mapping[str, str] | None) -> Finding:
    """Judge the ConfigMap from which everybody seals; None if it does not exist."""
    fix = "Start the operator, or restart it: it publishes its key. Is it in another namespace? --operator-namespace"
    if data is None:
        return Finding("Public key", Level.BAD, f"There is no ConfigMap {PUBLIC_KEY_CONFIGMAP}.", fix)
    if not data.get(PUBLIC_KEY) or not data.get(FINGERPRINT):
        return Finding("Public key", Level.BAD, f"The ConfigMap {PUBLIC_KEY_CONFIGMAP} has no public key.", fix)
    watched = ", ".join(data.get(NAMESPACES, "").split())
    return Finding("Public key", Level.GOOD, f"Key {data[FINGERPRINT]} is published. Watched: {watched or 'unknown'}.")


class Probe(NamedTuple):
    """The HTTP status that a URL answered with from this machine; None with a `problem` if it did not answer."""

    status: int | None
    problem: str = ""


def webhook(origin: str, answer: Probe) -> Finding:
    """Judge whether the host of the webhook URL template answers."""
    return _reachable(
        "Webhook",
        origin,
        answer,
        "Twilio must reach it from the Internet: see its DNS, TLS and firewall.",
        "Look at the instance's own service, or what is in front of it.",
    )


def twilio(origin: str, answer: Probe) -> Finding:
    """Judge whether Twilio's API answers; it refuses what has no credentials, and that is an answer."""
    hint = "See HTTPS_PROXY, NO_PROXY and SMSCHANNEL_CA_BUNDLE, or the firewall."
    return _reachable("Twilio", origin, answer, hint, "See https://status.twilio.com")


def _reachable(what: str, origin: str, answer: Probe, if_silent: str, if_failing: str) -> Finding:
    if answer.status is None:
        text = f"{origin} cannot be reached from this machine: {answer.problem}."
        return Finding(what, Level.BAD, text, if_silent)
    if answer.status >= 500:
        text = f"{origin} answers HTTP {answer.status} to this machine."
        return Finding(what, Level.WARNING, text, if_failing)
    return Finding(what, Level.GOOD, f"{origin} answers this machine (HTTP {answer.status}).")


def quotas(found: Iterable[Object]) -> Iterator[Finding]:
    """Judge the ResourceQuotas that limit what the operator and its users write."""
    fine = True
    for quota in found:
        status, meta = quota.get("status") or {}, quota["metadata"]
        for name, hard in (status.get("hard") or {}).items():
            used = (status.get("used") or {}).get(name, "0")
            if name not in _COUNTED or not (str(hard).isdecimal() and str(used).isdecimal()):
                continue
            is_full = int(used) >= int(hard)
            if is_full or int(used) >= _NEARLY_FULL * int(hard):
                fine = False
                level = Level.BAD if is_full else Level.WARNING
                text = f"ResourceQuota {meta['namespace']}/{meta['name']} allows {hard} {name}, and {used} are there."
                yield Finding(
                    "Quotas", level, text, "Raise it: each number needs a Secret in the operator's namespace."
                )
    if fine:
        yield Finding("Quotas", Level.GOOD, "No ResourceQuota is full.")


def versions(own: str, operators: str | None) -> Finding:
    """Judge whether this program and the operator are of one release; None if the operator publishes no version."""
    if operators is None:
        text = f"kubectl sms is {own}; the operator publishes no version, so it is older."
        return Finding("Versions", Level.WARNING, text, "Upgrade the operator.")
    if own != operators:
        text = f"kubectl sms is {own}, and the operator {operators}."
        return Finding("Versions", Level.WARNING, text, "Install the operator's release of kubectl sms.")
    return Finding("Versions", Level.GOOD, f"kubectl sms and the operator are {own}.")


def deployment(name: str, found: Object | None) -> Finding:
    """Judge the replicas of one of the two programs."""
    if found is None:
        text = f"There is no Deployment {name} in the operator's namespace."
        return Finding("Pods", Level.WARNING, text, "Unless it runs in another way, install the chart.")
    desired, ready = found["spec"].get("replicas", 1), (found.get("status") or {}).get("readyReplicas", 0)
    text = f"{ready} of {desired} replicas of {name} are ready."
    if ready >= desired > 0:
        return Finding("Pods", Level.GOOD, text)
    level = Level.WARNING if ready else Level.BAD
    return Finding("Pods", level, text, f"kubectl describe pods -l app.kubernetes.io/name={name}")


def channels(found: Iterable[Mapping[str, Any]], watched: Sequence[str]) -> Iterator[Finding]:
    """Judge the channels, as `channel_text.summary` has them: how many are ready, and which nobody watches."""
    reasons: Counter[str] = Counter()
    alone: set[str] = set()
    total = 0
    for each in found:
        total += 1
        if watched and each["namespace"] not in watched:
            alone.add(each["namespace"])
        elif each["ready"] != "True" or not each["reconciled"]:
            reasons[each["reason"] or "not reconciled yet"] += 1
    if alone:
        text = f"There are channels in namespaces that the operator does not watch: {', '.join(sorted(alone))}."
        yield Finding(
            "Channels", Level.WARNING, text, "Add the namespaces to the operator's setting, or move the channels."
        )
    if reasons:
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        text = f"{reasons.total()} of {total} channels are not ready: {why}."
        waits = set(reasons) <= {Reason.Pending.name, Reason.TwilioUnavailable.name}
        yield Finding(
            "Channels", Level.WARNING, text, "Wait: the operator retries." if waits else "kubectl sms status -A"
        )
    elif not alone:
        yield Finding(
            "Channels", Level.GOOD, f"All channels are ready ({total})." if total else "There are no channels yet."
        )
