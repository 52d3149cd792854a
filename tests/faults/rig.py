"""The whole product with the proxy in its wires: one control plane and one twin; the operator is what dies.

Many channels are broken at the same time, one fault each: every `Case` has a Twilio account of its own, so that no
limit, cache or refusal is shared. What must be true of each afterwards is said once, in `Rig.unsettled`.
"""

from __future__ import annotations

import base64
import json
import ssl
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from kubernetes import client

from deploy.local.build import Progress
from deploy.local.cluster import write_kubeconfig
from deploy.local.stack import CHANNELS, OPERATOR, Options, Stack, ready_reason
from smschannel.api.resource import API_VERSION, CREDENTIALS_LABEL, FINALIZER, GROUP, KIND
from smschannel.api.sealing import Keyring
from smschannel.core.conditions import violations
from smschannel.core.record import Record
from tests.faults.proxy import Proxy, Upstream
from tests.twin.faults import Rule

FLOOR = 0.2
"""Seconds between two tries of what failed, at least."""

SETTINGS = {
    "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "3600",
    "SMSCHANNEL_SLOW_INTERVAL_SECONDS": "1",
    "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "3600",
    "SMSCHANNEL_RETRY_FLOOR_SECONDS": str(FLOOR),
    "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
    "SMSCHANNEL_TWILIO_TIMEOUT_SECONDS": "3",
    "SMSCHANNEL_WORKERS": "400",
}
PATIENT = {"SMSCHANNEL_TWILIO_TIMEOUT_SECONDS": "15"}
"""For holding calls: none may give up before the kill."""
WATCHFUL = {"SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "2", "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "3"}
"""Time passes quickly: what only a periodic check finds is found within seconds."""


@dataclass(eq=False)
class Case:
    """One channel and what is done to it. `wanted` is the number that must be ours at the end; None: no channel."""

    name: str
    account: Mapping[str, Any]
    secret: str = ""  # the Secret with its token; "" where that is sealed
    wanted: str | None = None
    token: str = ""
    rule: Rule | None = None
    may_be_written_off: bool = False
    settled_at: float = 0

    @property
    def numbers(self) -> Sequence[str]:
        numbers: Sequence[str] = self.account["phone_numbers"]
        return numbers


@dataclass(frozen=True)
class World:
    """What is there: channels and records by the channel's name."""

    channels: Mapping[str, Mapping[str, Any]]
    records: Mapping[str, Record]


class Rig:
    """`start` returns when the operator is at work behind the proxy."""

    def __init__(self, home: Path, say: Progress) -> None:
        self._settings = dict(SETTINGS)
        self.stack = Stack(
            home, Options(accounts=0, numbers=0, finalizer_policy=False, operator_settings=self._settings), say
        )
        self.proxy: Proxy
        self.tokens: set[str] = set()
        self.rows: list[Row] = []
        self.broken_rules: list[str] = []
        self._statuses: dict[str, Mapping[str, Any]] = {}
        self._keyring: Keyring | None = None

    def __enter__(self) -> Self:
        stack = self.stack
        try:
            stack.logs.mkdir(parents=True, exist_ok=True)
            stack.start_control_plane()
            stack.install()
            stack.start_twin()
            authority = base64.b64decode(stack.cluster.ca_data).decode()
            self.proxy = Proxy(
                kubernetes=Upstream(stack.cluster.url, ssl.create_default_context(cadata=authority)),
                twilio=Upstream(stack.twilio_url),
            )
            self.proxy.on_status = self._check_status
            self.proxy.__enter__()
            self._point_operator_at_proxy()
            self.start_operator()
        except BaseException:
            stack.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.stop()
        self.proxy.__exit__()

    def _point_operator_at_proxy(self) -> None:
        given = yaml.safe_load((self.stack.home / "sms-channel-operator.kubeconfig").read_text())
        path = self.stack.home / "proxied.kubeconfig"
        token = given["users"][0]["user"]["token"]
        write_kubeconfig(path, url=self.proxy.urls["kubernetes"], ca_data="", token=token, namespace=CHANNELS)
        self._settings["KUBECONFIG"] = str(path)
        self._settings["SMSCHANNEL_TWILIO_URL"] = self.proxy.urls["twilio"]

    # The operator's life

    def start_operator(self, settings: Mapping[str, str] | None = None) -> None:
        """With `settings` instead of those of `SETTINGS`."""
        self._settings.update({**SETTINGS, **(settings or {})})
        self.stack.start_operator()

    def kill_operator(self) -> None:
        self.stack.stop_process("operator", kill=True)

    def restart_operator(self, settings: Mapping[str, str] | None = None) -> None:
        self.kill_operator()
        self.start_operator(settings)

    def begin_anew(self) -> None:
        """As if the operator had never run here; only for an operator that is not at work, and without channels."""
        core = client.CoreV1Api(self.stack.api.client)
        core.delete_namespaced_secret("smschannel-keyring", OPERATOR)
        core.delete_namespaced_config_map("smschannel-sealing-key", OPERATOR)
        self._keyring = None

    # Users

    def new_cases(self, count: int) -> list[Case]:
        """Each with two numbers, whose webhooks hold a password and a fragment."""
        seeded = self.stack.twin_call("POST", "/seed", {"accounts": count, "numbers": 2})
        cases = []
        for account in seeded["accounts"]:
            case = Case(str(uuid.uuid4()), account, token=account["auth_token"])
            self.tokens |= {case.token, _password(case.numbers[0])}
            for number in case.numbers:
                url, method = before(number)
                self.stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": url, "sms_method": method})
            self.proxy.introduce(case.name, account["account_sid"])
            cases.append(case)
        return cases

    def apply(self, case: Case, number: str, **spec: Any) -> None:
        """Create the channel, or change it: it wants `number` from now on."""
        case.wanted = number
        if case.secret:
            spec["credentials"] = {"secretKeyRef": {"name": case.secret, "key": "auth_token"}}
        account = {**case.account, "auth_token": case.token}
        self.stack.apply(self.stack.manifest(number, name=case.name, account=account, **spec))

    def put_token(self, case: Case) -> None:
        secret = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {
                "name": case.secret,
                "namespace": CHANNELS,
                "labels": {CREDENTIALS_LABEL: "true"},
            },
            "data": {"auth_token": base64.b64encode(case.token.encode()).decode()},
        }
        self.stack.apply(secret)

    def second_token(self, case: Case) -> None:
        """Made at Twilio; both work until it is promoted."""
        made = self.stack.twin_call("POST", f"/accounts/{case.account['account_sid']}/tokens/secondary")
        case.token = made["auth_token"]
        self.tokens.add(case.token)

    def promote(self, case: Case) -> None:
        self.stack.twin_call("POST", f"/accounts/{case.account['account_sid']}/tokens/promote")

    def delete(self, case: Case) -> None:
        case.wanted = None
        self.stack.delete(case.name)

    def clear(self) -> None:
        """After a failure: no channel is left for the next test."""
        self.stack.delete(*self.world().channels)

    # What is there, and what should be

    def world(self) -> World:
        channels = self._list(API_VERSION, KIND, CHANNELS)
        secrets = self._list("v1", "Secret", OPERATOR, label_selector=f"{GROUP}/record=true")
        records = [self._opened(each) for each in secrets]
        return World({each["metadata"]["name"]: each for each in channels}, {each.name: each for each in records})

    def _list(self, api_version: str, kind: str, namespace: str, **selectors: str) -> list[dict[str, Any]]:
        listed = self.stack.api.resources.get(api_version=api_version, kind=kind).get(namespace=namespace, **selectors)
        items: list[dict[str, Any]] = listed.to_dict()["items"]
        return items

    def _opened(self, secret: Mapping[str, Any]) -> Record:
        if self._keyring is None:
            [kept] = self._list("v1", "Secret", OPERATOR, field_selector="metadata.name=smschannel-keyring")
            self._keyring = Keyring.load(base64.b64decode(kept["data"]["keyring"]).decode())
        wrapped = base64.b64decode(secret["data"]["record"])
        return Record.decode(self._keyring.unwrap(wrapped, secret["metadata"]["name"]))

    def versions(self) -> dict[str, str]:
        """Each channel's resourceVersion: it moves with every write that changes something."""
        listed = self._list(API_VERSION, KIND, CHANNELS)
        return {each["metadata"]["name"]: each["metadata"]["resourceVersion"] for each in listed}

    def unsettled(self, case: Case, world: World) -> str:
        """What is not yet as it must be in the end; "" when everything is."""
        if case.rule and not case.rule.hit:
            return "the call to break was not made"
        channel, record = world.channels.get(case.name), world.records.get(case.name)
        if case.wanted is None:
            if channel or record:
                return f"left: {'channel ' if channel else ''}{'record' if record else ''}; {_told(channel)}"
        elif why := self._not_configured(case, channel, record):
            return why
        for number in case.numbers:
            at_twilio = self.stack.number(number)
            found = at_twilio["sms_url"] or "", at_twilio["sms_method"]
            ours = webhook_of(case.name), "POST"
            right = ours if number == case.wanted else before(number)
            if found != right and not (case.may_be_written_off and found == ours):
                return f"{number} points at {found[0]!r} by {found[1]}, not at {right[0]!r} by {right[1]}"
        return ""

    def _not_configured(self, case: Case, channel: Mapping[str, Any] | None, record: Record | None) -> str:
        if channel is None or record is None:
            return f"missing: {'' if channel else 'channel '}{'' if record else 'record'}; {_told(channel)}"
        kinds = {each["type"]: each["status"] for each in channel.get("status", {}).get("conditions", ())}
        if ready_reason(channel)[:2] != ("True", "Configured") or {"Reconciling", "Stalled"} & kinds.keys():
            return _told(channel)
        if FINALIZER not in channel["metadata"].get("finalizers", ()):
            return "no finalizer"
        if [entry.phone_number for entry in record.entries] != [case.wanted]:
            return f"the ledger has {[entry.phone_number for entry in record.entries]}, not {case.wanted}"
        [entry] = record.entries
        previous = (entry.previous.url, entry.previous.method) if entry.previous else None
        if previous != before(entry.phone_number):
            return f"the ledger's previous webhook is {previous}"
        if entry.login.token.get_secret_value() != case.token:
            return "the ledger has another token"
        if webhook_of(case.name) not in entry.wrote:
            return "the ledger does not know what was written"
        return ""

    def settle(self, cases: Iterable[Case], timeout: float) -> dict[Case, str]:
        """Waits until all are as they must be; for those that are not in time: what is wrong."""
        pending = dict.fromkeys(cases, "")
        deadline = time.monotonic() + timeout
        while True:
            seen = len(self.proxy.trace)
            world = self.world()
            for case in list(pending):
                pending[case] = self.unsettled(case, world)
                if not pending[case]:
                    case.settled_at = time.monotonic()
                    del pending[case]
            if not pending or time.monotonic() > deadline:
                return pending
            with self.proxy.changed:  # nothing changes without a call of the operator
                self.proxy.changed.wait_for(lambda now=seen: len(self.proxy.trace) > now, 1)  # type: ignore[misc]

    # Invariants

    def writes(self, case: Case) -> list[tuple[str, str, str]]:
        """Number SID, SmsUrl and SmsMethod of each write that Twilio was asked for, since the journal was reset."""
        query = f"?account={case.account['account_sid']}&method=POST"
        entries = self.stack.twin_call("GET", f"/journal{query}")["entries"]
        return [(each["sid"], each["sms_url"], each["sms_method"]) for each in entries]

    def strange_writes(self, case: Case, *, at_most: int) -> str:
        writes = self.writes(case)
        right = {webhook_of(case.name), *(before(number)[0] for number in case.numbers)}
        if strange := [url for _, url, _ in writes if url not in right]:
            return f"wrote {strange} at Twilio"
        return f"{len(writes)} writes at Twilio, {at_most} are enough" if len(writes) > at_most else ""

    def leaks(self) -> list[str]:
        """Where a token, or a password of somebody's webhook, can be read that must not be."""
        places = {"the operator's log": (self.stack.logs / "operator.log").read_text()}
        for api_version, kind in (("v1", "Event"), ("v1", "ConfigMap"), (API_VERSION, KIND)):
            for namespace in (CHANNELS, OPERATOR):
                places[f"{kind} in {namespace}"] = json.dumps(self._list(api_version, kind, namespace))
        for secret in self._list("v1", "Secret", OPERATOR):
            content = (base64.b64decode(each).decode(errors="replace") for each in (secret.get("data") or {}).values())
            places[f"Secret {secret['metadata']['name']}"] = "".join(content)
        forms = self.tokens | {base64.b64encode(each.encode()).decode() for each in self.tokens}
        return [place for place, text in places.items() if any(each in text for each in forms)]

    def bugs(self) -> list[str]:
        """Exceptions that nobody foresaw, from the operator's log."""
        lines = (self.stack.logs / "operator.log").read_text().splitlines()
        return [line for line in lines if '"exception"' in line or line.startswith("Traceback")]

    def _check_status(self, channel: Mapping[str, Any]) -> None:
        """Called with each status that the API server took in, in order."""
        uid, after = channel["metadata"]["uid"], channel["status"]
        earlier = self._statuses.get(uid, {})
        self._statuses[uid] = after
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 2))
        fresh = any(each["lastTransitionTime"] >= stamp for each in earlier.get("conditions", ()))
        for broken in violations(earlier, after):
            if not (fresh and "apart" in broken):  # stamps are whole seconds: two moves within one look alike
                self.broken_rules.append(f"{channel['metadata']['name']}: {broken}")


@dataclass(frozen=True)
class Row:
    """A line of the table that `make faults` prints."""

    scenario: str
    call: str
    fault: str
    outcome: str
    retries: int
    seconds: float


def before(number: str) -> tuple[str, str]:
    """URL and method that a number had: with what is easily lost on the way."""
    return f"https://owner:{_password(number)}@before.example.com/sms?to={number[1:]}#rc=2&rp=all", "GET"


def webhook_of(name: str) -> str:
    return f"https://sms.example.com/v1/instances/{name}/channels/sms/webhook"


def _password(number: str) -> str:
    return f"hunter-{number[1:]}"


def _told(channel: Mapping[str, Any] | None) -> str:
    if channel is None:
        return "no channel"
    status = channel.get("status", {})
    kinds = {each["type"]: f"{each['status']} {each['reason']}" for each in status.get("conditions", ())}
    generations = f"generation {channel['metadata']['generation']}, observed {status.get('observedGeneration')}"
    return f"{kinds} ({generations})"
