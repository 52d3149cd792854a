"""Make the stored objects of the current release: `python -m tests.stored v1`."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any, cast

import yaml
from pydantic import SecretStr

from smschannel.api.api_keys import make_key, secret_of
from smschannel.api.kube_client import KubeClient, Object
from smschannel.api.names import core_path
from smschannel.api.reasons import Effective, Reason
from smschannel.api.resource import API_VERSION, FINALIZER, KIND, DeletionPolicy
from smschannel.api.sealing import Binding, Keyring
from smschannel.api.status import rest_status
from smschannel.core.conditions import next_status
from smschannel.core.plan import Verdict
from smschannel.core.record import Contents, Login, Record, Webhook
from smschannel.kube_store import KubeStore
from smschannel.settings import Settings
from tests.stored import FOLDER
from tests.unit.memory import ACCOUNT, NAMESPACE, OPERATOR_NAMESPACE, MemoryApi, instance, sid_of, url_of

TOKEN = "a-token-of-a-test"
API_KEY_SID = "SK" + "1" * 32
BEFORE = "https://user:password@before.example.com/sms#rc=2"
MADE = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LATER = datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)


def phone(n: int) -> str:
    return f"+614001112{n:02d}"


def records() -> Iterator[Record]:
    """Yield one record of each kind; the channel of the n-th is the n-th below."""
    login = Login(sid=ACCOUNT, token=SecretStr(TOKEN))
    before = Webhook(url=BEFORE, method="GET")
    plain = [
        {"source": "secret/twilio@7"},
        {"source": "sealed", "deletion_policy": DeletionPolicy.CLEAR},
        {"restore_since": MADE, "deletion_policy": DeletionPolicy.RETAIN},
        {"unseen_since": MADE},
    ]
    sealed = [
        Contents(login=login, previous=before, wrote=(url_of(0),)),
        Contents(login=login, previous=None, wrote=(url_of(1),)),
        Contents(login=login.model_copy(update={"sid": API_KEY_SID}), previous=before, wrote=(url_of(2), BEFORE)),
        Contents(login=login, previous=Webhook(url="", method="POST"), wrote=()),
    ]
    for n, (metadata, contents) in enumerate(zip(plain, sealed, strict=True)):
        record = Record(sid_of(phone(n)), phone(n), ACCOUNT, NAMESPACE, instance(n), f"uid-{n}", contents=contents)
        yield replace(record, **cast(Any, metadata))


def channels(keyring: Keyring) -> Iterator[Object]:
    """Yield one channel for each reason and each answer about its webhook, as the API server returns it."""
    verdicts = [Verdict(reason, "Why.", sid_of(phone(n))) for n, reason in enumerate(Reason)]
    verdicts += [Verdict(Reason.WebhookOverridden, "Why.", effective=each) for each in Effective]
    verdicts.append(Verdict(Reason.TokenUnreadable, "Why.", degraded=True))
    for n, verdict in enumerate(verdicts):
        binding = Binding(NAMESPACE, instance(n), ACCOUNT)
        sealed = {"sid": "", "sealed": keyring.current.public.seal(SecretStr(TOKEN), binding)}
        ref = {"sid": API_KEY_SID, "secretKeyRef": {"name": "twilio", "key": "auth_token"}}
        status = next_status(
            {}, verdict, generation=2, webhook_url=url_of(n), check_now="asked" if n % 3 == 0 else "", now=MADE
        )
        meta = {
            "name": instance(n),
            "namespace": NAMESPACE,
            "uid": f"uid-{n}",
            "generation": 2,
            "resourceVersion": "7",
            "creationTimestamp": "2026-01-02T03:04:05Z",
            "finalizers": [FINALIZER],
        }
        spec = {
            "accountSid": ACCOUNT,
            "phoneNumber": phone(n),
            "credentials": sealed if n % 2 else ref,
            "suspend": verdict.reason is Reason.Suspended,
            "takeoverPolicy": "IfUnused" if n % 2 else "Always",
            "driftPolicy": "Report" if n % 3 else "Correct",
            "deletionPolicy": ("Restore", "Clear", "Retain")[n % 3],
        }
        yield {"apiVersion": API_VERSION, "kind": KIND, "metadata": meta, "spec": spec, "status": status}


class Empty(MemoryApi):
    """A cluster in which nothing of the product was ever installed."""

    def __init__(self) -> None:
        super().__init__()
        self.objects.clear()

    def _answer(self, method: str, path: str, body: Object) -> Object:
        if (method, path) == ("GET", core_path(OPERATOR_NAMESPACE, "secrets")):
            return {"items": []}  # before the operator makes a keyring, it looks for records
        return super()._answer(method, path, body)


async def make() -> dict[str, list[Object]]:
    """Return the objects by file, made by the code that makes them in a cluster, and what they mean."""
    api = Empty()
    kube = KubeStore(cast(KubeClient, api), OPERATOR_NAMESPACE)
    keyring = await kube.open_keyring([NAMESPACE])
    await kube.publish_settings(Settings(webhook_url_template="https://sms.example.com/{instance_id}").published())
    key = make_key([instance(0)], ["get", "post"], expires=LATER, key_id="0a1b2c3d")
    everything = make_key(["*"], ["get", "post", "delete"], key_id="4e5f6a7b")
    keys = secret_of(key, OPERATOR_NAMESPACE)
    keys["data"] |= secret_of(everything, OPERATOR_NAMESPACE)["data"]
    operator = [*api.objects.values(), keys]
    api.objects.clear()
    made = [await kube.create_record(record) for record in records()]
    await kube.write_off(made[0], "the account is closed")
    made[0] = await kube.create_record(replace(made[0], version=""))
    all_channels = list(channels(keyring))
    meaning = {
        "token": TOKEN,
        "apiKeys": {new.key_id: new.key.get_secret_value() for new in (key, everything)},
        "records": {record.secret_name: _meaning(record) for record in made},
        "restStatuses": {each["metadata"]["name"]: rest_status(each["status"]) for each in all_channels},
    }
    return {"operator": operator, "records": [*api.objects.values()], "channels": all_channels, "expected": [meaning]}


def _meaning(record: Record) -> dict[str, Any]:
    """Return a record in plain text."""
    assert record.contents
    plain = {name: value for name, value in asdict(replace(record, contents=None)).items() if value is not None}
    del plain["version"], plain["sealed_with"], plain["secret"]
    contents = record.contents.model_dump(mode="json", context="reveal")
    return {**plain, "deletion_policy": record.deletion_policy.value, "contents": contents}


def main(version: str) -> None:
    made = asyncio.run(make())
    folder = FOLDER / version
    folder.mkdir()  # fails if it is there: what a release stored does not change afterwards
    for name, objects in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump_all(objects, sort_keys=False, width=1_000_000))


if __name__ == "__main__":
    main(*sys.argv[1:])
