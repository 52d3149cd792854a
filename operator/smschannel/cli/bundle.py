"""What a support bundle says about each object: an allow-list of fields, masked. No I/O.

Annotations, labels, managed fields and the data of Secrets are in none of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from smschannel.api.resource import GROUP
from smschannel.api.sealing import fingerprint_of
from smschannel.cli.channel_text import summary
from smschannel.cli.masking import Mask
from smschannel.core.record import Record

Object = Mapping[str, Any]

_OURS = f"{GROUP}/operator"
_POLICIES = ("suspend", "takeoverPolicy", "driftPolicy", "deletionPolicy")

README = """\
A support bundle of 'kubectl sms report'.

doctor.json      what 'kubectl sms doctor' says
versions.json    releases of kubectl sms, the operator, Python and Kubernetes
operator.json    published settings, leader, Deployments and pods of the operator's namespace
channels.json    for each channel: policies, status and conditions
records.json     for each number that the operator holds: since when, and its policy; never what is sealed
events.json      Events of channels and of the operator's objects
logs/            the last lines of the logs of operator and REST API
not-read.txt     what could not be read, and is therefore missing

Numbers, accounts and other SIDs have names such as number-1 and account-1: the same one everywhere in this bundle.
URLs are cut after the host. The contents of Secrets and the sealed tokens were not written, nor annotations or labels.
Of text, words that may be a token, a number or a secret are replaced by masked-1 and so on; of Events that others than
the operator posted, only reason and time are here. Names of namespaces, instances, pods and hosts are as they are.
Look through it before you send it: a secret that is an ordinary word, in the operator's own log, would not be noticed.
"""


def channel(body: Object, mask: Mask) -> dict[str, Any]:
    """Return what is said of a channel: no token, no name of a Secret, and none of its metadata that tenants write."""
    spec, found = body.get("spec") or {}, summary(body)
    credentials = spec.get("credentials") or {}
    login = credentials.get("sid") or spec.get("accountSid") or ""
    key = fingerprint_of(credentials.get("sealed") or "")
    mask.know(found["name"], found["namespace"], key or "")
    return {
        "namespace": found["namespace"],
        "name": found["name"],
        "created": found["created"],
        "deleting": found["deleting"],
        "generation": body["metadata"].get("generation"),
        "account": mask.sid(str(found["accountSid"])),
        "number": mask.number(str(found["phoneNumber"])),
        "login": mask.sid(str(login)),
        "token": "in a Secret" if "secretKeyRef" in credentials else f"sealed with key {key}",
        **{name: mask.value(spec[name]) for name in _POLICIES if name in spec},
        "ready": mask.text(str(found["ready"])),
        "reconciled": found["reconciled"],
        "webhook": mask.url(found["routing"]["webhookUrl"]) if found["routing"]["webhookUrl"] else None,
        "conditions": [mask.value({**each, "remedy": None}) for each in found["conditions"]],
    }


def record(meta: Object, mask: Mask) -> dict[str, Any]:
    """Return what the plain metadata of a record says."""
    found = Record.from_metadata(meta)
    return {
        "channel": mask.text(f"{found.namespace}/{found.name}") if found.name else None,
        "number": mask.number(found.phone_number),
        "numberSid": mask.sid(found.number_sid),
        "account": mask.sid(found.account_sid),
        "deletionPolicy": found.deletion_policy.value,
        "created": meta.get("creationTimestamp"),
        "restoreSince": str(found.restore_since or ""),
        "unseenSince": str(found.unseen_since or ""),
    }


def event(body: Object, mask: Mask) -> dict[str, Any]:
    """Return an Event; its text only if the operator posted it."""
    about, series = body.get("regarding") or {}, body.get("series") or {}
    is_ours = body.get("reportingController") == _OURS
    return {
        "time": (body.get("series") or {}).get("lastObservedTime")
        or body.get("eventTime")
        or body.get("deprecatedLastTimestamp"),
        "about": mask.text(f"{about.get('kind')} {about.get('namespace')}/{about.get('name')}"),
        "type": mask.text(str(body.get("type"))),
        "reason": mask.text(str(body.get("reason"))),
        "count": series.get("count") or 1,
        "note": mask.text(str(body.get("note") or "")) if is_ours else None,
    }


def deployment(body: Object, mask: Mask) -> dict[str, Any]:
    """Return how many pods a Deployment has, and their images."""
    status = body.get("status") or {}
    counts = {name: status.get(name, 0) for name in ("replicas", "readyReplicas", "updatedReplicas")}
    containers = body["spec"]["template"]["spec"]["containers"]
    images = [mask.text(str(each.get("image"))) for each in containers]
    return {"name": body["metadata"]["name"], "desired": body["spec"].get("replicas"), **counts, "images": images}


def pod(body: Object, mask: Mask) -> dict[str, Any]:
    """Return how a pod and its containers are."""
    mask.know(body["metadata"]["name"])
    status = body.get("status") or {}
    containers = [
        {
            "restarts": each.get("restartCount"),
            "ready": each.get("ready"),
            "lastEnd": mask.value(((each.get("lastState") or {}).get("terminated") or {}).get("reason")),
            "exitCode": ((each.get("lastState") or {}).get("terminated") or {}).get("exitCode"),
        }
        for each in status.get("containerStatuses") or ()
    ]
    return {
        "name": body["metadata"]["name"],
        "phase": status.get("phase"),
        "started": status.get("startTime"),
        "containers": containers,
    }


def log(text: str, mask: Mask) -> str:
    """Return a log with each line masked; lines that are JSON stay JSON."""
    return "".join(f"{_line(each, mask)}\n" for each in text.splitlines())


def _line(line: str, mask: Mask) -> str:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):
        return mask.text(line)
    return json.dumps(mask.value(document)) if isinstance(document, dict) else mask.text(line)


def files(parts: Mapping[str, Any], logs: Mapping[str, str], not_read: Iterable[str], mask: Mask) -> dict[str, bytes]:
    """Return the files of the bundle by name; `parts` are documents that are masked already."""
    documents = {f"{name}.json": json.dumps(part, indent=2).encode() for name, part in parts.items()}
    written = {f"logs/{name}.log": log(text, mask).encode() for name, text in logs.items()}
    missing = "".join(f"{mask.text(each)}\n" for each in not_read)
    return {"README.txt": README.encode(), **documents, **written, "not-read.txt": missing.encode()}
