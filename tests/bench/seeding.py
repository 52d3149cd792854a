"""Makes Ready channels without an operator's reconciles: objects, records, numbers and status as the operator has them.

The operator's own code decides what is in them (`core.plan`, `core.conditions`) and writes them (`KubeStore`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from time import perf_counter
from typing import Any

import aiohttp
from pydantic import SecretStr

from deploy.local.stack import CHANNELS, EXAMPLE_TEMPLATE, OPERATOR, Stack
from smschannel.api.kube_client import KubeClient
from smschannel.api.resource import FINALIZER, SmsChannel
from smschannel.core.conditions import next_status
from smschannel.core.plan import CreateRecord, Number, Observed, Rules, desired, foresee
from smschannel.core.record import Login, Webhook, WebhookTemplate
from smschannel.kube_store import KubeStore
from tests.bench.load import PATH, in_flight, send
from tests.bench.run import manifests

_RULES = Rules(WebhookTemplate(EXAMPLE_TEMPLATE), deletion_grace=timedelta(days=1), restore_deadline=timedelta(days=1))


async def seed(
    stack: Stack, session: aiohttp.ClientSession, accounts: int, numbers: int, chance: random.Random
) -> float:
    """Make a Ready channel for each of `numbers` numbers in each of `accounts` new accounts. Return the seconds."""
    began = perf_counter()
    new = stack.twin_call("POST", "/seed", {"accounts": accounts, "numbers": numbers})["accounts"]
    logins = {each["account_sid"]: Login(sid=each["account_sid"], token=SecretStr(each["auth_token"])) for each in new}
    made = manifests(stack.public_key(), new, chance)
    async with await KubeClient.connect(str(stack.cluster.kubeconfig)) as api:
        kube = KubeStore(api, OPERATOR)
        await kube.open_keyring([CHANNELS])

        async def one(manifest: str) -> None:
            body = json.loads(manifest)
            body["metadata"]["finalizers"] = [FINALIZER]
            created = json.loads(await send(session, "POST", PATH, json.dumps(body).encode()))
            await _make_ready(created, logins, kube, stack, session)

        await in_flight(one, (manifest.decode() for _, manifest in made))
    return perf_counter() - began


async def _make_ready(
    body: Mapping[str, Any],
    logins: Mapping[str, Login],
    kube: KubeStore,
    stack: Stack,
    session: aiohttp.ClientSession,
) -> None:
    channel, now = SmsChannel.model_validate(body), datetime.now(UTC)
    want = desired(channel, _RULES.template)
    assert want, "a new channel is not being deleted"
    number = await _point(want.phone_number, _RULES.template.url(CHANNELS, want.name), stack, session)
    login = logins[want.account_sid]
    seen = Observed(finalizer=True, login=login, source="sealed", number=number)
    plan = foresee(want, seen, _RULES, now)
    [record] = [change.record for change in plan.changes if isinstance(change, CreateRecord)]
    await kube.create_record(record)
    status = next_status(
        {}, plan.verdict, generation=channel.metadata.generation, webhook_url=want.webhook.url, now=now
    )
    await kube.write_status(channel, status)


async def _point(phone_number: str, url: str, stack: Stack, session: aiohttp.ClientSession) -> Number:
    """Point a number at `url`, at Twilio. Return it as it was before."""
    path = f"{stack.twilio_url}/_twin/numbers/{phone_number}"
    async with session.get(path) as answer:
        answer.raise_for_status()
        before = await answer.json()
    async with session.patch(path, json={"sms_url": url, "sms_method": "POST"}) as answer:
        answer.raise_for_status()
    previous = Webhook(url=before["sms_url"], method=before["sms_method"])
    return Number(before["sid"], phone_number, previous, application_sid="", receives_sms=True)
