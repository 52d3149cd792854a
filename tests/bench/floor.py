"""The floor: sends the Kubernetes writes of a channel and nothing else. `python -m tests.bench.floor WORKERS`.

For each new channel it adds the finalizer (unless it is there), creates the record and writes the status; for each
deleted one it deletes the record and removes the finalizer. Calls and sizes are the operator's;
the contents are made up.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

import uvloop

from deploy.local.stack import CHANNELS, OPERATOR
from smschannel.api.resource import FINALIZER
from smschannel.core.record import Record
from tests.bench.load import PATH, RECORDS, connect, events

_MERGE_PATCH = {"Content-Type": "application/merge-patch+json"}
_JSON = {"Content-Type": "application/json"}
_STAMP = "2026-01-01T00:00:00Z"


async def main(workers: int) -> None:
    slots = asyncio.Semaphore(workers)
    tasks = set()
    async with connect(os.environ["KUBECONFIG"]) as session:

        async def write(method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> None:
            content = json.dumps(body, separators=(",", ":")).encode() if body else None
            async with session.request(method, path, data=content, headers=headers) as answer:
                if answer.status >= 300:
                    sys.exit(f"{method} {path}: {await answer.text()}")
                await answer.read()

        async def configure(meta: dict[str, Any]) -> None:
            async with slots:
                if not meta.get("finalizers"):
                    await write("PATCH", f"{PATH}/{meta['name']}", _finalizers(meta, [FINALIZER]), _MERGE_PATCH)
                await write("POST", RECORDS, _record(meta), _JSON)
                await write("PATCH", f"{PATH}/{meta['name']}/status", _status(meta), _MERGE_PATCH)

        async def restore(meta: dict[str, Any]) -> None:
            async with slots:
                await write("DELETE", f"{RECORDS}/{_record_of(meta).secret_name}")
                await write("PATCH", f"{PATH}/{meta['name']}", _finalizers(meta, []), _MERGE_PATCH)

        async for line in events(session, ""):
            # Only events that need a write are parsed.
            if line.startswith(b'{"type":"ADDED"'):
                work = configure
            elif line.startswith(b'{"type":"MODIFIED"') and b'"deletionTimestamp"' in line:
                work = restore
            else:
                continue
            task = asyncio.create_task(work(json.loads(line)["object"]["metadata"]))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


def _finalizers(meta: dict[str, Any], finalizers: list[str]) -> Any:
    return {"metadata": {"uid": meta["uid"], "finalizers": finalizers}}


def _record_of(meta: dict[str, Any]) -> Record:
    """Return a record as the operator would write it; the number's SID is made from the channel's uid."""
    number_sid = "PN" + str(meta["uid"]).replace("-", "")
    return Record(number_sid, "+61400111222", f"AC{'0' * 32}", CHANNELS, meta["name"], meta["uid"], source="sealed")


def _record(meta: dict[str, Any]) -> Any:
    record = _record_of(meta)
    annotations = {name: value for name, value in record.annotations().items() if value is not None}
    metadata = {
        "name": record.secret_name,
        "namespace": OPERATOR,
        "labels": record.labels(),
        "annotations": annotations,
    }
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"record": "AAAA" * 220}}


def _status(meta: dict[str, Any]) -> Any:
    conditions = [
        {
            "type": kind,
            "status": "True",
            "reason": "Configured",
            "message": "Twilio delivers this number's messages to the instance's webhook.",
            "observedGeneration": 1,
            "lastTransitionTime": _STAMP,
        }
        for kind in ("Ready", "CredentialsValid", "WebhookEffective")
    ]
    url = f"https://sms.example.com/v1/instances/{meta['name']}/channels/sms/webhook"
    number = {"phoneNumberSid": "PN00000000000000000000000000000000", "webhookUrl": url}
    return {"metadata": {"uid": meta["uid"]}, "status": {"observedGeneration": 1, **number, "conditions": conditions}}


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
