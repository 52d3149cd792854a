"""What was read about a channel, as a document for programs and as text for people. No I/O; the clock is an argument.

The text is made from the document, so both say the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from smschannel.api.names import FINGERPRINT, NAMESPACES
from smschannel.api.reasons import Effective, Reason
from smschannel.api.resource import KIND
from smschannel.api.status import rest_status
from smschannel.cli.output import age, printable

_EVENTS = 10  # the newest that are shown
_NO_OPERATOR = "No operator has reconciled this channel yet."
_ELSEWHERE = (Effective.OVERRIDDEN_BY_APPLICATION, Effective.OVERRIDDEN_BY_MESSAGING_SERVICE, Effective.FOREIGN_URL)

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Reading:
    """A channel, and what is around it. `events` and `published` are None if they may not be read; `not_read` says why.

    `published` is what the operator publishes for everybody: its key, and the namespaces that it watches.
    """

    channel: Mapping[str, Any]
    events: Sequence[Mapping[str, Any]] | None = None
    published: Mapping[str, str] | None = None
    not_read: tuple[str, ...] = ()


def document(reading: Reading) -> dict[str, Any]:
    """Return everything that `kubectl sms status` says of one channel."""
    events = None if reading.events is None else [_event(each) for each in _newest(reading.events)]
    return {
        **summary(reading.channel),
        "credentials": _credentials(reading.channel, reading.published),
        "operator": _operator(reading),
        "events": events,
        "notRead": list(reading.not_read),
    }


def summary(channel: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the channel alone says: number, routing and conditions. Nothing is added that is not in it."""
    meta, spec, status = channel["metadata"], channel.get("spec") or {}, channel.get("status") or {}
    conditions = [_condition(each) for each in status.get("conditions") or ()]
    kinds = {each["type"]: each for each in conditions}
    ready, effective = kinds.get("Ready", {}), kinds.get("WebhookEffective", {})
    return {
        "namespace": meta["namespace"],
        "name": meta["name"],
        "created": meta.get("creationTimestamp"),
        "deleting": "deletionTimestamp" in meta,
        "phoneNumber": spec.get("phoneNumber"),
        "phoneNumberSid": status.get("phoneNumberSid"),
        "accountSid": spec.get("accountSid"),
        "suspended": bool(spec.get("suspend")),
        "ready": ready.get("status", "Unknown"),
        "reason": ready.get("reason"),
        "restStatus": rest_status(status),
        "since": ready.get("since"),
        "reconciled": bool(conditions) and status.get("observedGeneration") == meta.get("generation"),
        "routing": {
            "effective": effective.get("status", "Unknown"),
            "reason": effective.get("reason"),
            "message": effective.get("message"),
            "since": effective.get("since"),
            "webhookUrl": status.get("webhookUrl"),
        },
        "conditions": conditions,
    }


def is_ready(found: Document) -> bool:
    """Return whether the channel works as its current generation says."""
    return bool(found["reconciled"]) and found["ready"] == "True"


def is_stuck(found: Document) -> bool:
    """Return whether a person must act before the channel is Ready, as of its current generation."""
    stalled = any(each["type"] == "Stalled" for each in found["conditions"])
    return bool(found["reconciled"]) and stalled and found["ready"] != "True"


def _condition(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a condition with the remedy apart from the message, to which the operator appends it."""
    reason = Reason.__members__.get(given["reason"])
    message, remedy = str(given.get("message") or ""), reason.remedy if reason else ""
    is_trouble = bool(remedy) and message.endswith(remedy)
    return {
        "type": given["type"],
        "status": given["status"],
        "reason": given["reason"],
        "message": message.removesuffix(remedy).rstrip() if is_trouble else message,
        "remedy": remedy if is_trouble else "",
        "since": given.get("lastTransitionTime"),
    }


def _credentials(channel: Mapping[str, Any], published: Mapping[str, str] | None) -> dict[str, Any]:
    spec = channel.get("spec") or {}
    given = spec.get("credentials") or {}
    login = given.get("sid") or spec.get("accountSid")
    if reference := given.get("secretKeyRef"):
        return {"login": login, "source": "secret", "secret": reference.get("name"), "key": reference.get("key")}
    from smschannel.api.sealing import fingerprint_of

    current = (published or {}).get(FINGERPRINT)
    return {
        "login": login,
        "source": "sealed",
        "sealedWith": fingerprint_of(given.get("sealed") or "") or None,
        "newest": current,
    }


def _operator(reading: Reading) -> dict[str, Any]:
    """Return whether an operator watches the namespace; None if that cannot be read."""
    meta, published = reading.channel["metadata"], reading.published
    watched = (published or {}).get(NAMESPACES, "").split()
    return {
        "installed": None if published is None else bool(published),
        "watches": watched or None,
        "watchesThis": meta["namespace"] in watched if watched else None,
    }


def _newest(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(events, key=_time_of, reverse=True)[:_EVENTS]


def _time_of(event: Mapping[str, Any]) -> str:
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((str(each) for each in times if each), str(event["metadata"].get("creationTimestamp") or ""))


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    count = (event.get("series") or {}).get("count") or event.get("count") or 1
    message = event.get("message") or event.get("note") or ""
    return {
        "time": _time_of(event),
        "type": event.get("type"),
        "reason": event.get("reason"),
        "message": message,
        "count": count,
    }


# Text


def lines(found: Document, now: datetime) -> Iterator[str]:
    """Yield the text about one channel: the facts, the conditions as a tree, and the Events."""
    yield f"{KIND} {found['namespace']}/{found['name']}" + (" (being deleted)" if found["deleting"] else "")
    facts = {
        "Number": _number(found),
        "Messages": _messages(found, now),
        "Token": _token(found["credentials"]),
        "Ready": _ready(found, now),
    }
    for name, text in facts.items():
        yield f"  {name:<10} {printable(text)}"
    yield from _tree(found["conditions"], now)
    if not found["reconciled"]:
        yield f"  {_not_reconciled(found)}"
    yield from _event_lines(found["events"], now)
    for each in found["notRead"]:
        yield f"Not read: {printable(each)}"


HEADER = ("NAMESPACE", "NAME", "NUMBER", "READY", "REASON", "MESSAGES", "SINCE")
WIDE = ("ACCOUNT", "TOKEN", "WEBHOOK", "MESSAGE")


def row(found: Document, now: datetime, *, wide: bool = False) -> list[str]:
    """Return a channel as a row of the table with `HEADER`, and `WIDE` beside it."""
    routing = found["routing"]
    cells = [
        found["namespace"],
        found["name"],
        found["phoneNumber"] or "",
        found["ready"] if found["reconciled"] else f"{found['ready']}*",
        "Deleting" if found["deleting"] and not found["reason"] else found["reason"] or "",
        routing["reason"] or "",
        age(found["since"], now) if found["since"] else "",
    ]
    if not wide:
        return cells
    ready = next((each["message"] for each in found["conditions"] if each["type"] == "Ready"), "")
    token = found["credentials"]["source"]
    return [*cells, found["accountSid"] or "", token, routing["webhookUrl"] or "", ready]


def row_document(channel: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a list says of each channel."""
    return {**summary(channel), "credentials": _credentials(channel, None)}


def _number(found: Document) -> str:
    sid = f" ({found['phoneNumberSid']})" if found["phoneNumberSid"] else ""
    return f"{found['phoneNumber']}{sid} of account {found['accountSid']}"


def _messages(found: Document, now: datetime) -> str:
    """Say who receives the number's messages, as far as the operator saw."""
    routing = found["routing"]
    since = f", for {age(routing['since'], now)}" if routing["since"] else ""
    if routing["effective"] == "True":
        return f"go to {routing['webhookUrl']}{since}"
    if routing["effective"] == "False":
        where = "go elsewhere" if routing["reason"] in _ELSEWHERE else "do not arrive"
        return f"{where}{since}: {routing['message']}"
    return f"it is not known where they go: {routing['message'] or _NO_OPERATOR}"


def _token(credentials: Document) -> str:
    login = f"of {credentials['login']}"
    if credentials["source"] == "secret":
        return f"{login}, in Secret {credentials['secret']} under {credentials['key']}"
    key, newest = credentials["sealedWith"], credentials["newest"]
    if key is None:
        return f"{login}, sealed, but the value is damaged"
    if newest is None:
        return f"{login}, sealed with key {key}; which key is the newest could not be read"
    if key == newest:
        return f"{login}, sealed with key {key}, the newest"
    return f"{login}, sealed with key {key}; the newest is {newest}"


def _ready(found: Document, now: datetime) -> str:
    if found["reason"] is None:
        return f"Unknown: {_NO_OPERATOR}"
    return f"{found['ready']}, {found['reason']}, for {age(found['since'], now)}"


def _tree(conditions: Sequence[Document], now: datetime) -> Iterator[str]:
    """Yield the conditions as a tree: each with its message and its remedy, which are said once only."""
    said: set[str] = set()
    for number, each in enumerate(conditions):
        is_last = number == len(conditions) - 1
        head, rest = ("  └─ ", "     ") if is_last else ("  ├─ ", "  │  ")
        yield f"{head}{each['type']} {each['status']}, {printable(each['reason'])}, for {age(each['since'], now)}"
        details = [each["message"], f"What to do: {each['remedy']}" if each["remedy"] else ""]
        for text in filter(None, details):
            if text not in said:
                yield f"{rest}  {printable(text)}"
                said.add(text)


def _not_reconciled(found: Document) -> str:
    """Say why the conditions are missing or old, as far as that was read."""
    operator = found["operator"]
    if operator["watchesThis"] is False:
        watched = ", ".join(operator["watches"])
        return f"The operator does not watch namespace {found['namespace']}. It watches {watched}."
    if operator["installed"] is False:
        return (
            "No operator has published its key where it is expected: is it installed, or in another namespace"
            " (--operator-namespace)?"
        )
    what = "The newest change was not reconciled yet" if found["conditions"] else _NO_OPERATOR.rstrip(".")
    return f"{what}. If that lasts, is the operator running? kubectl sms doctor"


def _event_lines(events: Sequence[Document] | None, now: datetime) -> Iterator[str]:
    if events is None:
        return
    yield "Events" if events else "Events: none. Kubernetes keeps them for a limited time, usually an hour."
    for each in events:
        times = f" ({each['count']} times)" if each["count"] > 1 else ""
        text = printable(f"{each['type']}  {each['reason']}{times}: {each['message']}")
        yield f"  {age(each['time'], now):>4} ago  {text}"
