"""An API server and a Twilio in memory, under the real Controller, Reconciler and KubeStore, in virtual time.

The API server keeps the rules that the operator relies on: preconditions, uids, finalizers, one object per name. Calls
take `latency` seconds, so that things happen in between; `on_call` may delay a call or make it fail.
"""

from __future__ import annotations

import asyncio
import base64
import copy
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from smschannel.api.errors import ChannelError, Conflict, NotFound
from smschannel.api.kube_client import KubeClient, Object
from smschannel.api.names import KEYRING_SECRET
from smschannel.api.resource import API_VERSION, CREDENTIALS_LABEL, GROUP, KIND, VERSION
from smschannel.api.sealing import Keyring, SealingKey
from smschannel.channel_cache import ChannelCache
from smschannel.controller import Controller
from smschannel.core.plan import Number, Routing, Rules
from smschannel.core.record import Login, Record, Webhook, WebhookTemplate
from smschannel.kube_store import KubeStore
from smschannel.observe import Accounts, Observer, Twilio
from smschannel.orphans import Orphans
from smschannel.reconcile import Intervals, Reconciler
from smschannel.report import Reporter
from smschannel.rotation import Rotation
from tests.unit.virtual_time import now

NAMESPACE = "sms-channels"
OPERATOR_NAMESPACE = "sms-operator"
ACCOUNT = "AC" + "0" * 32
TEMPLATE = WebhookTemplate("https://sms.example.com/{namespace}/{instance_id}")
START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
KEYRING = Keyring([SealingKey.generate()])
BEFORE = "https://before.example.com/"

Place = tuple[str, str, str]
"""Plural, namespace and name."""
OnCall = Callable[[str, str], Awaitable[None]]
"""Method and path."""


def instance(n: int) -> str:
    return f"00000000-0000-0000-0000-{n:012d}"


def sid_of(phone: str) -> str:
    return f"PN{int(phone):032x}"


def url_of(n: int, namespace: str = NAMESPACE) -> str:
    return TEMPLATE.url(namespace, instance(n))


def virtual_clock() -> datetime:
    return START + timedelta(seconds=now())


async def at_once(method: str, path: str) -> None:
    """Neither delay the call nor fail."""


class MemoryApi:
    """A `KubeClient` in memory. Watch events reach each controller in `watchers` at once, unless `drops_events`."""

    def __init__(self) -> None:
        self.objects: dict[Place, Object] = {}
        self.watchers: list[Controller] = []
        self.drops_events = False
        self.latency = 0.005
        self.on_call: OnCall = at_once
        self.calls: list[tuple[str, str]] = []
        self.events: list[Object] = []
        self._version = 100
        self._uids = 0
        secret = {"metadata": {"name": KEYRING_SECRET, "namespace": OPERATOR_NAMESPACE}}
        self._store("secrets", {**secret, "data": {"keyring": base64.b64encode(KEYRING.dump().encode()).decode()}})
        meta = {"name": "twilio", "namespace": NAMESPACE, "labels": {CREDENTIALS_LABEL: "true"}}
        self._store("secrets", {"metadata": meta, "data": {"auth_token": base64.b64encode(b"token").decode()}})

    # Users

    def apply(self, n: int, phone: str, *, day: int = 1, namespace: str = NAMESPACE, **spec: Any) -> Object:
        """Create or change channel `n`, created on a day of January."""
        there = self.objects.get(("smschannels", namespace, instance(n)))
        content = {
            "accountSid": ACCOUNT,
            "phoneNumber": phone,
            "credentials": {"secretKeyRef": {"name": "twilio", "key": "auth_token"}},
            **spec,
        }
        if there is None:
            meta = {
                "name": instance(n),
                "namespace": namespace,
                "generation": 1,
                "creationTimestamp": f"2026-01-{day:02d}T00:00:00Z",
            }
            body = {"metadata": meta, "spec": content, "status": {"observedGeneration": -1}}
            return self._store("smschannels", body, "ADDED")
        changed = {**there, "spec": content}
        if there["spec"] != content:
            changed["metadata"] = {**there["metadata"], "generation": there["metadata"]["generation"] + 1}
        return self._store("smschannels", changed, "MODIFIED")

    def annotate(self, n: int, *, namespace: str = NAMESPACE, **annotations: str) -> None:
        there = self.objects["smschannels", namespace, instance(n)]
        meta = {**there["metadata"], "annotations": {**there["metadata"].get("annotations", {}), **annotations}}
        self._store("smschannels", {**there, "metadata": meta}, "MODIFIED")

    def delete(self, n: int, *, force: bool = False, namespace: str = NAMESPACE) -> None:
        there = self.objects["smschannels", namespace, instance(n)]
        meta = dict(there["metadata"])
        if force:
            meta.pop("finalizers", None)
        meta["deletionTimestamp"] = virtual_clock().strftime("%Y-%m-%dT%H:%M:%SZ")
        self._store("smschannels", {**there, "metadata": meta}, "MODIFIED")

    def channel(self, n: int, namespace: str = NAMESPACE) -> Object | None:
        return self.objects.get(("smschannels", namespace, instance(n)))

    def reason(self, n: int, namespace: str = NAMESPACE) -> str:
        """Return the reason of Ready; empty if there is no channel or no status."""
        status = (self.channel(n, namespace) or {}).get("status") or {}
        return next((each["reason"] for each in status.get("conditions", ()) if each["type"] == "Ready"), "")

    def records(self) -> dict[str, Record]:
        """Return the records by phone number."""
        secrets = [body for place, body in self.objects.items() if _is_record(place, body)]
        return {each.phone_number: each for each in (Record.from_metadata(body["metadata"]) for body in secrets)}

    def edit_record(self, phone: str, data: dict[str, str]) -> dict[str, str]:
        """Overwrite a record's sealed contents. Return the former ones."""
        place = "secrets", OPERATOR_NAMESPACE, sid_of(phone).lower()
        before = dict(self.objects[place]["data"])
        self._store("secrets", {**self.objects[place], "data": data})
        return before

    # KubeClient

    async def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        params: Any = None,
        content_type: str = "",
        accept: str = "",
    ) -> Object:
        self.calls.append((method, path))
        await asyncio.sleep(self.latency)
        await self.on_call(method, path)
        plural, namespace, name, _ = _parse(path) if path.count("/") > 3 else ("", "", "-", "")
        if method == "GET" and not name:
            answer: Object = {"items": self._selected(plural, namespace, params)}
        else:
            answer = self._answer(method, path, body or {})
        await asyncio.sleep(self.latency)
        return copy.deepcopy(answer)

    async def pages(
        self, path: str, params: Any = None, *, metadata_only: bool = False, on_version: Any = None
    ) -> AsyncIterator[Object]:
        self.calls.append(("LIST", path))
        await self.on_call("LIST", path)
        plural, namespace, _, _ = _parse(path)
        for body in self._selected(plural, namespace, params):
            yield copy.deepcopy(body)

    def _selected(self, plural: str, namespace: str, params: Any) -> list[Object]:
        found = [body for place, body in self.objects.items() if place[:2] == (plural, namespace)]
        return [body for body in found if _is_selected(body, params)]

    def _answer(self, method: str, path: str, body: Object) -> Object:
        if path == "/apis":
            return {"kind": "APIGroupList", "groups": [{"name": GROUP}]}
        if path == f"/apis/{API_VERSION}":
            return {"kind": "APIResourceList", "resources": [{"kind": KIND}]}
        plural, namespace, name, subresource = _parse(path)
        if plural == "events":
            self.events += [body] if method == "POST" else []
            return body
        if method == "POST":
            if (plural, namespace, body["metadata"]["name"]) in self.objects:
                raise Conflict("already exists")
            return self._store(plural, body)
        there = self.objects.get((plural, namespace, name))
        if there is None:
            raise NotFound(f'{plural} "{name}" not found', name)
        if method == "GET":
            return there
        asked = body.get("preconditions", {}) if method == "DELETE" else body.get("metadata", {})
        for field in ("uid", "resourceVersion"):
            if asked.get(field, there["metadata"][field]) != there["metadata"][field]:
                raise Conflict("the object has been modified")
        if method == "DELETE":
            return self._remove((plural, namespace, name))
        changed = {**there, "status": body["status"]} if subresource else _merged(there, body)
        return self._store(plural, changed, "MODIFIED")

    def _store(self, plural: str, body: Object, event: str = "") -> Object:
        body = copy.deepcopy(body)
        meta = body["metadata"]
        self._version += 1
        if "uid" not in meta:
            self._uids += 1
            meta["uid"] = f"uid-{self._uids}"
        meta["resourceVersion"] = str(self._version)
        place = plural, meta["namespace"], meta["name"]
        if "deletionTimestamp" in meta and not meta.get("finalizers"):
            self.objects.setdefault(place, body)
            return self._remove(place)
        self.objects[place] = body
        if event and plural == "smschannels":
            self._emit(event, body)
        return body

    def _remove(self, place: Place) -> Object:
        body = self.objects.pop(place)
        if place[0] == "smschannels":
            self._emit("DELETED", body)
        return body

    def _emit(self, event: str, body: Object) -> None:
        for controller in () if self.drops_events else self.watchers:
            controller.on_channel(event, copy.deepcopy(body))


def _parse(path: str) -> tuple[str, str, str, str]:
    """Return plural, namespace, name and subresource of a path."""
    parts = path.removeprefix("/api/v1/").removeprefix(f"/apis/{GROUP}/{VERSION}/")
    parts = parts.removeprefix("/apis/events.k8s.io/v1/")
    _, namespace, plural, *rest = parts.split("/")
    name, subresource = [*rest, "", ""][:2]
    return plural, namespace, name, subresource


def _merged(there: Object, patch: Object) -> Object:
    """Apply a JSON merge patch."""
    merged = dict(there)
    for field, value in patch.items():
        if value is None:
            merged.pop(field, None)
        else:
            merged[field] = _merged(merged.get(field) or {}, value) if isinstance(value, dict) else value
    return merged


def _is_selected(body: Object, params: Any) -> bool:
    """Return whether a label selector, of requirements like `name=value`, `name` and `name notin (a,b)`, matches."""
    selector = str((params or {}).get("labelSelector", ""))
    labels = body["metadata"].get("labels") or {}
    for requirement in re.split(r",(?![^(]*\))", selector) if selector else ():
        name, equals, value = requirement.partition("=")
        unwanted = re.fullmatch(r"(\S+) notin \((\S+)\)", requirement)
        if unwanted:
            is_selected = labels.get(unwanted[1]) not in unwanted[2].split(",")
        else:
            is_selected = labels.get(name) == value if equals else name in labels
        if not is_selected:
            return False
    return True


def _is_record(place: Place, body: Object) -> bool:
    return place[0] == "secrets" and body["metadata"].get("labels", {}).get(f"{GROUP}/record") == "true"


class MemoryTwilio:
    """Numbers of one account, by SID. `on_call` may delay a call or make it fail; `writes` lists the webhooks set."""

    def __init__(self, *phones: str, account: str = ACCOUNT) -> None:
        webhook = Webhook(url=BEFORE, method="POST")
        self.numbers = {sid_of(each): (account, Number(sid_of(each), each, webhook, "", True)) for each in phones}
        self.writes: list[tuple[str, str]] = []
        self.calls = 0
        self.on_call: OnCall = at_once

    def webhook(self, phone: str) -> str:
        return self.numbers[sid_of(phone)][1].webhook.url

    def forget_refusal(self, login: Login, account_sid: str, *, older_than: float = 0) -> None:
        """Do nothing: no refusal is cached."""

    def trust(self, login: Login, account_sid: str) -> None:
        """Do nothing: no credential is limited."""

    async def find_number(self, login: Login, account_sid: str, phone_number: str) -> Number | None:
        await self._call("find", phone_number)
        return next(
            (
                each
                for owner, each in self.numbers.values()
                if (owner, each.phone_number) == (account_sid, phone_number)
            ),
            None,
        )

    async def fetch_number(self, login: Login, account_sid: str, number_sid: str) -> Number | None:
        await self._call("fetch", number_sid)
        owner, number = self.numbers.get(number_sid, ("", None))
        return number if owner == account_sid else None

    async def set_webhook(self, login: Login, account_sid: str, number_sid: str, webhook: Webhook) -> Number:
        await self._call("set", webhook.url)
        owner, number = self.numbers[number_sid]
        self.numbers[number_sid] = owner, replace(number, webhook=webhook)
        self.writes.append((number.phone_number, webhook.url))
        return self.numbers[number_sid][1]

    async def _call(self, kind: str, what: str) -> None:
        self.calls += 1
        await asyncio.sleep(0.01)
        await self.on_call(kind, what)


class NoCache:
    """Accounts without pages: every number is read alone, and no Messaging Service overrides it."""

    async def number(self, *_: Any) -> None:
        return None

    async def routing(self, *_: Any, **__: Any) -> Routing:
        return Routing()

    def snapshot(self, *_: Any) -> None:
        return None

    async def age_if_unchanged(self, snapshot: object) -> None:
        raise AssertionError("there is nothing to look at")


class Operator:
    """One operator process: `start` loads and runs it, `stop` ends it as SIGTERM does.

    `others` are the namespaces of other shards.
    """

    def __init__(
        self,
        api: MemoryApi,
        twilio: Twilio,
        *,
        namespaces: tuple[str, ...] = (NAMESPACE,),
        others: tuple[str, ...] = (),
        resync: float = 600,
        workers: int = 8,
        keyring_dir: Path | None = None,
        keyring_check: float = 7200,
        observe_only: bool = False,
        accounts: Accounts | None = None,
    ) -> None:
        self.api = api
        self.kube = KubeStore(cast(KubeClient, api), OPERATOR_NAMESPACE, keyring_dir, others=frozenset(others))
        self._published = sorted({*namespaces, *others})
        self.channels = ChannelCache(self.kube.claims)
        self.orphans = Orphans(self.kube, now)
        rules = Rules(TEMPLATE, deletion_grace=timedelta(seconds=120), restore_deadline=timedelta(days=7))
        accounts, channels = accounts or cast(Accounts, NoCache()), self.channels
        self.reconciler = Reconciler(
            self.kube,
            twilio,
            Observer(self.kube, twilio, accounts, channels, drift_interval=600, slow_interval=1800, clock=now),
            Reporter(self.kube, TEMPLATE, virtual_clock),
            self.orphans,
            rules=rules,
            intervals=Intervals(drift=600, slow=1800),
            clock=virtual_clock,
            observe_only=observe_only,
        )
        self.controller = Controller(
            self.kube,
            self.reconciler,
            self.channels,
            self.orphans,
            Rotation(self.kube, renewal=timedelta(days=30), clock=virtual_clock, interval=keyring_check),
            namespaces=namespaces,
            template=TEMPLATE,
            workers=workers,
            concurrency=4,
            retry_floor=1,
            retry_ceiling=300,
            resync_interval=resync,
            drift_interval=600,
        )
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.kube.open_keyring(self._published)
        await self.controller.load()
        self.api.watchers.append(self.controller)
        self._running = asyncio.create_task(self.controller.run())

    async def stop(self) -> None:
        assert self._running, "start comes first"
        self.api.watchers.remove(self.controller)
        self._running.cancel()
        await asyncio.wait({self._running})


@asynccontextmanager
async def running(api: MemoryApi, twilio: Any, **options: Any) -> AsyncIterator[Operator]:
    operator = Operator(api, twilio, **options)
    await operator.start()
    try:
        yield operator
    finally:
        await operator.stop()


def raising(error: ChannelError, *, method: str = "", path: str = "") -> OnCall:
    """Make the calls fail whose method is this one and whose path or subject contains `path`."""

    async def on_call(its_method: str, its_path: str) -> None:
        if method in {"", its_method} and path in its_path:
            raise error

    return on_call
