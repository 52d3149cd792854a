"""The whole product with the proxy in between: one control plane and one twin, and an operator that tests kill.

Many channels are tried at the same time, with one fault each. Every `Case` has a Twilio account of its own, so that
they share no limit, cache or refusal. `Rig.unsettled` defines what must be true of each in the end.
"""

from __future__ import annotations

import base64
import json
import ssl
import time
import uuid
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import yaml
from kubernetes import client
from kubernetes.dynamic.exceptions import NotFoundError

from deploy.build import Progress
from deploy.local.cluster import write_kubeconfig
from deploy.local.stack import CHANNELS, OPERATOR, Options, Stack, free_port, ready_reason
from smschannel.api.errors import Unreadable
from smschannel.api.names import KEYRING_SECRET, PUBLIC_KEY_CONFIGMAP
from smschannel.api.resource import API_VERSION, CREDENTIALS_LABEL, FINALIZER, KIND
from smschannel.api.sealing import Keyring
from smschannel.core.conditions import violations
from smschannel.core.record import RECORD_LABEL, Contents, Record
from tests.faults.proxy import Proxy, Upstream
from tests.twin.faults import Rule

FLOOR = 0.2
"""The shortest time between two tries, in seconds."""

SETTINGS = {
    "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "3600",
    "SMSCHANNEL_SLOW_INTERVAL_SECONDS": "1",
    "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "3600",
    "SMSCHANNEL_RETRY_FLOOR_SECONDS": str(FLOOR),
    "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
    "SMSCHANNEL_TWILIO_TIMEOUT_SECONDS": "3",
    "SMSCHANNEL_LEASE_DURATION_SECONDS": "30",
    "SMSCHANNEL_WORKERS": "400",
}
PATIENT = {"SMSCHANNEL_TWILIO_TIMEOUT_SECONDS": "15"}
"""For holding calls: none may time out before the kill."""
WATCHFUL = {"SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "2", "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "3"}
"""Short intervals: what only a periodic check finds is found within seconds."""
SECOND = "second-operator"
"""The process that some tests run beside the operator, without the proxy in between. It stands by at first."""


@dataclass(eq=False)
class Case:
    """One channel. `wanted` is the number that it must have in the end; None: no channel.

    `restored_if_possible` says that Twilio itself answered that the number to be restored does not exist.
    """

    name: str
    account: Mapping[str, Any]
    secret: str = ""  # the Secret with its token; empty if the token is sealed
    wanted: str | None = None
    token: str = ""
    rule: Rule | None = None
    restored_if_possible: bool = False
    settled_at: float = 0

    @property
    def numbers(self) -> Sequence[str]:
        numbers: Sequence[str] = self.account["phone_numbers"]
        return numbers


@dataclass(frozen=True)
class World:
    """What exists: channels by name, and their records by the channel's name. A damaged record has no contents."""

    channels: Mapping[str, Mapping[str, Any]]
    records: Mapping[str, frozenset[Record]]

    def records_of(self, name: str) -> frozenset[Record]:
        return self.records.get(name, frozenset())


class Rig:
    """As a context: the operator runs behind the proxy when it is entered."""

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
        self._records: dict[tuple[str, str], Record] = {}  # opened, by uid and resourceVersion

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
        given = yaml.safe_load(self.stack.operator_kubeconfig().read_text())
        path = self.stack.home / "proxied.kubeconfig"
        token = given["users"][0]["user"]["token"]
        write_kubeconfig(path, url=self.proxy.urls["kubernetes"], ca_data="", token=token, namespace=CHANNELS)
        self._settings["KUBECONFIG"] = str(path)
        self._settings["SMSCHANNEL_TWILIO_URL"] = self.proxy.urls["twilio"]

    # The operator

    def start_operator(self, settings: Mapping[str, str] | None = None) -> None:
        """Start it with `SETTINGS`, where `settings` says nothing else."""
        self._settings.update({**SETTINGS, **(settings or {})})
        self.stack.start_operator()

    def kill_operator(self) -> None:
        self.stack.stop_process("operator", kill=True)

    def restart_operator(self, settings: Mapping[str, str] | None = None) -> None:
        if "operator" in self.stack.pids():
            self.kill_operator()
        self.start_operator(settings)

    def start_second(self) -> None:
        """Start another operator with the same settings. It talks to the API server and to the twin directly."""
        direct = {
            **self._settings,
            "KUBECONFIG": str(self.stack.operator_kubeconfig(SECOND)),
            "SMSCHANNEL_TWILIO_URL": self.stack.twilio_url,
        }
        self.stack.start_operator(SECOND, free_port(), direct)

    def stop_second(self, *, kill: bool = True) -> None:
        self.stack.stop_process(SECOND, kill=kill)
        self._statuses.clear()  # it may have written others since

    @property
    def has_second(self) -> bool:
        return SECOND in self.stack.pids()

    def delete_keyring(self) -> None:
        """As if the operator had never run here. There must be no channels, and no operator that runs."""
        core = client.CoreV1Api(self.stack.api.client)
        core.delete_namespaced_secret(KEYRING_SECRET, OPERATOR)
        core.delete_namespaced_config_map(PUBLIC_KEY_CONFIGMAP, OPERATOR)
        self._keyring = None

    # Users

    def new_cases(self, count: int) -> list[Case]:
        """Cases with two numbers each, whose webhooks contain a password and a fragment."""
        seeded = self.stack.twin_call("POST", "/seed", {"accounts": count, "numbers": 2})
        cases = []
        for account in seeded["accounts"]:
            case = Case(str(uuid.uuid4()), account, token=account["auth_token"])
            self.tokens |= {case.token, _password(case.numbers[0])}
            sids = [self.edit_webhook(number, *before(number)) for number in case.numbers]
            self.proxy.introduce(case.name, account["account_sid"], sids)
            cases.append(case)
        return cases

    def edit_webhook(self, number: str, url: str, method: str) -> str:
        """As on Twilio's console; the number's SID."""
        edited = self.stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": url, "sms_method": method})
        return str(edited["sid"])

    def apply(self, case: Case, number: str, **spec: Any) -> None:
        """Create the channel, or change it, so that it wants `number`."""
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
        """Create another token at Twilio, for the case to use. Both work until it is promoted."""
        made = self.stack.twin_call("POST", f"/accounts/{case.account['account_sid']}/tokens/secondary")
        case.token = made["auth_token"]
        self.tokens.add(case.token)

    def promote(self, case: Case) -> None:
        self.stack.twin_call("POST", f"/accounts/{case.account['account_sid']}/tokens/promote")

    def delete(self, case: Case) -> None:
        case.wanted = None
        self.stack.delete(case.name)

    def force_delete(self, case: Case) -> None:
        """Delete the channel and remove its finalizers, as people do with objects that hang: its records remain."""
        self.delete(case)
        with suppress(NotFoundError):  # the operator was faster
            patch = {"metadata": {"finalizers": None}}
            self.stack.channels.patch(
                name=case.name, namespace=CHANNELS, body=patch, content_type="application/merge-patch+json"
            )
        self.stack.wait_gone(case.name)

    def uid_of(self, case: Case) -> str:
        return str(self.stack.channels.get(name=case.name, namespace=CHANNELS).metadata.uid)

    def edit_record(self, number_sid: str, content: Mapping[str, str | None]) -> dict[str, str]:
        """Overwrite a record's sealed content (None: remove it); what it was before."""
        secrets = self.stack.api.resources.get(api_version="v1", kind="Secret")
        place = {"name": number_sid.lower(), "namespace": OPERATOR}
        secret = secrets.get(**place).to_dict()
        secrets.patch(**place, body={"data": dict(content)}, content_type="application/merge-patch+json")
        return dict(secret.get("data") or {})

    def clear(self) -> None:
        """After a failure: leave no channel for the next test."""
        self.stack.delete(*self.world().channels)

    # What is there, and what should be

    def world(self) -> World:
        channels = self._list(API_VERSION, KIND, CHANNELS)
        secrets = self._list("v1", "Secret", OPERATOR, label_selector=f"{RECORD_LABEL}=true")
        records: dict[str, set[Record]] = {}
        for record in map(self._opened, secrets):
            records.setdefault(record.name, set()).add(record)
        return World(
            {each["metadata"]["name"]: each for each in channels},
            {name: frozenset(each) for name, each in records.items()},
        )

    def written_off(self) -> list[str]:
        """The names of the records that were given up."""
        found = self._list("v1", "Secret", OPERATOR, label_selector=f"{RECORD_LABEL}=written-off")
        return [each["metadata"]["name"] for each in found]

    def _list(self, api_version: str, kind: str, namespace: str, **selectors: str) -> list[dict[str, Any]]:
        resource = self.stack.api.resources.get(api_version=api_version, kind=kind)
        answer = resource.get(namespace=namespace, serialize=False, **selectors)  # hundreds of objects: plain JSON
        items: list[dict[str, Any]] = json.loads(answer.data)["items"]
        return items

    def _opened(self, secret: Mapping[str, Any]) -> Record:
        meta = secret["metadata"]
        version = meta["uid"], meta["resourceVersion"]
        if version not in self._records:
            self._records[version] = self._open(secret)
        return self._records[version]

    def _open(self, secret: Mapping[str, Any]) -> Record:
        if self._keyring is None:
            [saved] = self._list("v1", "Secret", OPERATOR, field_selector=f"metadata.name={KEYRING_SECRET}")
            self._keyring = Keyring.load(base64.b64decode(saved["data"]["keyring"]).decode())
        record = Record.from_metadata(secret["metadata"])
        try:
            sealed = base64.b64decode(secret["data"]["record"])
            return replace(record, contents=Contents.decode(self._keyring.unwrap(sealed, record.binding)))
        except (Unreadable, KeyError, TypeError, ValueError):
            return record

    def versions(self) -> dict[str, str]:
        """Each channel's resourceVersion: every write that changes something changes it."""
        listed = self._list(API_VERSION, KIND, CHANNELS)
        return {each["metadata"]["name"]: each["metadata"]["resourceVersion"] for each in listed}

    def unsettled(self, case: Case, world: World) -> str:
        """What is not yet as it must be in the end; empty if everything is."""
        if case.rule and not case.rule.hit:
            return "the call to break was not made"
        channel, records = world.channels.get(case.name), world.records_of(case.name)
        if case.wanted is None:
            if channel or records:
                return f"not deleted: {'channel, ' if channel else ''}{len(records)} records; {_described(channel)}"
        elif why := self._not_configured(case, channel, records):
            return why
        for number in case.numbers:
            at_twilio = self.stack.number(number)
            found = at_twilio["sms_url"] or "", at_twilio["sms_method"]
            ours = webhook_of(case.name), "POST"
            right = ours if number == case.wanted else before(number)
            if found != right and not (case.restored_if_possible and found == ours):
                return f"{number} points at {found[0]!r} by {found[1]}, not at {right[0]!r} by {right[1]}"
        return ""

    def _not_configured(self, case: Case, channel: Mapping[str, Any] | None, records: Collection[Record]) -> str:
        if channel is None:
            return "no channel"
        kinds = {each["type"]: each["status"] for each in channel.get("status", {}).get("conditions", ())}
        if ready_reason(channel)[:2] != ("True", "Configured") or {"Reconciling", "Stalled"} & kinds.keys():
            return _described(channel)
        if FINALIZER not in channel["metadata"].get("finalizers", ()):
            return "no finalizer"
        if [record.phone_number for record in records] != [case.wanted]:
            return f"the records are of {[record.phone_number for record in records]}, not of {case.wanted}"
        [record] = records
        return self._wrong_record(case, channel["metadata"]["uid"], record)

    def _wrong_record(self, case: Case, uid: str, record: Record) -> str:
        if record.uid != uid:
            return f"the record is of {record.uid}, not of {uid}"
        if record.restore_since:
            return "the record says that the number is to be restored"
        contents = record.contents
        if contents is None:
            return "the record cannot be opened"
        previous = (contents.previous.url, contents.previous.method) if contents.previous else None
        if previous != before(record.phone_number):
            return f"the previous webhook in the record is {previous}"
        if contents.login.token.get_secret_value() != case.token:
            return "the record has another token"
        return "" if webhook_of(case.name) in contents.wrote else "the record lacks what was written"

    def settle(self, cases: Iterable[Case], timeout: float) -> dict[Case, str]:
        """Wait until all are as they must be; what is wrong with those that are not in time."""
        pending = dict.fromkeys(cases, "")
        deadline = time.monotonic() + timeout
        while True:
            calls = len(self.proxy.trace)
            world = self.world()
            for case in list(pending):
                pending[case] = self.unsettled(case, world)
                if not pending[case]:
                    case.settled_at = time.monotonic()
                    del pending[case]
            if not pending or time.monotonic() > deadline:
                return pending
            self.wait_for_call(calls)

    def wait_for_call(self, calls: int) -> None:
        """Wait until the proxy has seen more calls than this, and then a pause: nothing else changes what is there.

        At most a second for each, or a fifth of one while an operator runs that the proxy does not see. To look at
        hundreds of channels after each call would take the time that the operator needs.
        """
        limit = 0.2 if self.has_second else 1
        with self.proxy.changed:
            self.proxy.changed.wait_for(lambda: len(self.proxy.trace) > calls, limit)
            enough = time.monotonic() + limit
            while time.monotonic() < enough:
                calls = len(self.proxy.trace)
                if not self.proxy.changed.wait_for(lambda now=calls: len(self.proxy.trace) != now, 0.05):  # type: ignore[misc]
                    return

    # Invariants

    def writes(self, case: Case) -> list[tuple[str, str, str]]:
        """Number SID, SmsUrl and SmsMethod of each write that the twin received since its journal was cleared."""
        query = f"?account={case.account['account_sid']}&method=POST"
        entries = self.stack.twin_call("GET", f"/journal{query}")["entries"]
        return [(each["sid"], each["sms_url"], each["sms_method"]) for each in entries]

    def unexpected_writes(self, case: Case, *, at_most: int) -> str:
        writes = self.writes(case)
        right = {webhook_of(case.name), *(before(number)[0] for number in case.numbers)}
        if unexpected := [url for _, url, _ in writes if url not in right]:
            return f"wrote {unexpected} at Twilio"
        return f"{len(writes)} writes at Twilio, {at_most} are enough" if len(writes) > at_most else ""

    def leaks(self) -> list[str]:
        """The places where a token, or a password in a webhook, can be read that must not be."""
        places = {path.name: path.read_text() for path in self._operator_logs()}
        for api_version, kind in (("v1", "Event"), ("v1", "ConfigMap"), (API_VERSION, KIND)):
            for namespace in (CHANNELS, OPERATOR):
                places[f"{kind} in {namespace}"] = json.dumps(self._list(api_version, kind, namespace))
        for secret in self._list("v1", "Secret", OPERATOR):
            content = (base64.b64decode(each).decode(errors="replace") for each in (secret.get("data") or {}).values())
            places[f"Secret {secret['metadata']['name']}"] = "".join(content)
        forms = self.tokens | {base64.b64encode(each.encode()).decode() for each in self.tokens}
        return [place for place, text in places.items() if any(each in text for each in forms)]

    def bugs(self) -> list[str]:
        """Unexpected exceptions in the operators' logs, except what kopf's watches may leave at shutdown."""
        lines = [line for path in self._operator_logs() for line in path.read_text().splitlines()]
        lines = [line for line in lines if "closing of asynchronous generator" not in line]
        return [line for line in lines if '"exception"' in line or line.startswith("Traceback")]

    def _operator_logs(self) -> list[Path]:
        return sorted(self.stack.logs.glob("*operator.log"))

    def _check_status(self, channel: Mapping[str, Any]) -> None:
        """Called with each merge patch of a status that the API server accepted, in order."""
        if self.has_second:
            return  # the proxy does not see what that one writes in between
        uid = channel["metadata"]["uid"]
        earlier = self._statuses.get(uid, {})
        after = {name: value for name, value in {**earlier, **channel["status"]}.items() if value is not None}
        self._statuses[uid] = after
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 2))
        recent = any(each["lastTransitionTime"] >= stamp for each in earlier.get("conditions", ()))
        for broken in violations(earlier, after):
            if not (recent and "apart" in broken):  # stamps are whole seconds: two moves within one look alike
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
    """URL and method that a number has at first, with everything that is easily lost on the way."""
    return f"https://owner:{_password(number)}@before.example.com/sms?to={number[1:]}#rc=2&rp=all", "GET"


def webhook_of(name: str) -> str:
    return f"https://sms.example.com/v1/instances/{name}/channels/sms/webhook"


def _password(number: str) -> str:
    return f"hunter-{number[1:]}"


def _described(channel: Mapping[str, Any] | None) -> str:
    if channel is None:
        return "no channel"
    status = channel.get("status", {})
    kinds = {each["type"]: f"{each['status']} {each['reason']}" for each in status.get("conditions", ())}
    generations = f"generation {channel['metadata']['generation']}, observed {status.get('observedGeneration')}"
    return f"{kinds} ({generations})"
