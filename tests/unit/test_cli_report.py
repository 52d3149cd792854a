"""`kubectl sms report`: nothing secret is in the bundle, wherever somebody put it."""

from __future__ import annotations

import base64
import io
import json
import re
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.exceptions import ClickException
from hypothesis import given, settings
from hypothesis import strategies as st

from smschannel.api.errors import KubernetesRefused, NotFound
from smschannel.api.reasons import Reason
from smschannel.cli.masking import Mask
from smschannel.cli.report import _Collector, _write
from tests.manifests import ACCOUNT_SID, INSTANCE, PHONE_NUMBER, TOKEN

API_KEY = "smsch_0a1b2c3d_9f8e7d6c5b4a39281706f5e4d3c2b1a0"
WEBHOOK_TOKEN = "wh-7f3a9c01d2e4b586"
KEY = bytes.fromhex("abcdef1abcdefabc")
SEALED = base64.b64encode(b"\x01" + KEY + b"q" * 1200).decode()
SECRETS = (
    TOKEN,
    TOKEN.upper(),
    API_KEY,
    WEBHOOK_TOKEN,
    SEALED,
    "hunter2pass",
    PHONE_NUMBER,
    PHONE_NUMBER[1:],
    ACCOUNT_SID,
)
LEAK = (
    f'{TOKEN} token={TOKEN} "{TOKEN}" {TOKEN.upper()} {API_KEY} {SEALED} {PHONE_NUMBER} {PHONE_NUMBER[1:]}'
    f" x{PHONE_NUMBER} "
    f" https://user:hunter2pass@hook.example.com/{WEBHOOK_TOKEN}/in?token={WEBHOOK_TOKEN} {ACCOUNT_SID} Bearer:{TOKEN}"
)
METADATA = {
    "name": INSTANCE,
    "namespace": "sms-channels",
    "generation": 1,
    "resourceVersion": "1",
    "creationTimestamp": "2026-11-30T00:00:00Z",
    "labels": {"leak": TOKEN},
    "annotations": {"kubectl.kubernetes.io/last-applied-configuration": LEAK, "leak": LEAK},
    "managedFields": [{"manager": LEAK}],
}
CHANNEL = {
    "metadata": METADATA,
    "spec": {
        "accountSid": ACCOUNT_SID,
        "phoneNumber": PHONE_NUMBER,
        "credentials": {"sealed": SEALED},
        "driftPolicy": LEAK,
        "leak": LEAK,
    },
    "status": {
        "webhookUrl": f"https://user:hunter2pass@sms.example.com/{WEBHOOK_TOKEN}?token={WEBHOOK_TOKEN}",
        "conditions": [
            {
                "type": "Ready",
                "status": "False",
                "reason": "NumberNotFound",
                "message": LEAK,
                "lastTransitionTime": LEAK,
            }
        ],
        "leak": LEAK,
    },
}
HOSTILE = {
    "metadata": {**METADATA, "name": INSTANCE.replace("4", "5")},
    "spec": {"accountSid": TOKEN, "phoneNumber": LEAK, "credentials": {"sid": LEAK, "sealed": TOKEN}},
    "status": {
        "webhookUrl": LEAK,
        "conditions": [
            {"type": "Ready", "status": LEAK, "reason": LEAK, "message": LEAK},
            {"type": "WebhookEffective", "status": TOKEN, "reason": TOKEN},
            {"type": LEAK, "status": LEAK, "reason": LEAK},
        ],
    },
}
"""As somebody who may write the status could leave a channel."""
RECORD = {
    "metadata": {
        **METADATA,
        "name": "pn" + "0" * 32,
        "annotations": {
            "channels.hydracore.io/channel": f"sms-channels/{INSTANCE}",
            "channels.hydracore.io/phone-number": PHONE_NUMBER,
            "channels.hydracore.io/account-sid": ACCOUNT_SID,
            "leak": LEAK,
        },
    },
    "data": {"record": SEALED},
}


DAMAGED_RECORD = {
    "metadata": {
        **METADATA,
        "name": f"pn{TOKEN}",
        "annotations": {
            f"channels.hydracore.io/{name}": LEAK for name in ("channel", "phone-number", "deletion-policy")
        },
    }
}


def event(controller: str) -> dict[str, Any]:
    about = {"kind": "SmsChannel", "namespace": "sms-channels", "name": INSTANCE}
    meta = {"name": "x", "annotations": {"leak": LEAK}}
    return {"metadata": meta, "regarding": about, "reportingController": controller, "reason": "Leak", "note": LEAK}


SPEC = {"template": {"spec": {"containers": [{"image": "registry.example.com/sms:0.1.0", "env": [{"value": LEAK}]}]}}}
OBJECTS: dict[str, Any] = {
    "/apis/channels.hydracore.io/v1/smschannels": [CHANNEL, HOSTILE],
    "/api/v1/namespaces/sms-operator/secrets": [RECORD, DAMAGED_RECORD],
    "/api/v1/namespaces/sms-operator/pods": [{"metadata": {"name": "operator-1", "annotations": {"leak": LEAK}}}],
    "/apis/apps/v1/namespaces/sms-operator/deployments": [{"metadata": {"name": "d"}, "spec": SPEC}],
    "/apis/events.k8s.io/v1/namespaces/sms-operator/events": [event("somebody")],
    "/apis/events.k8s.io/v1/namespaces/sms-channels/events": [event("channels.hydracore.io/operator"), event(LEAK)],
    "/version": {"gitVersion": "v1.36.2"},
    "/api/v1/namespaces/sms-operator/configmaps/smschannel-sealing-key": {
        "data": {"namespaces": f"sms-channels {TOKEN}", "fingerprint": TOKEN, "public-key": SEALED, "leak": LEAK}
    },
    "/api/v1/namespaces/sms-operator/configmaps/smschannel-settings": {
        "data": {
            "SMSCHANNEL_WEBHOOK_URL_TEMPLATE": f"https://sms.example.com/{WEBHOOK_TOKEN}/{{instance_id}}",
            "version": LEAK,
            "l": LEAK,
        }
    },
    "/apis/coordination.k8s.io/v1/namespaces/sms-operator/leases": [
        {
            "metadata": {"name": "sms-channel-operator-a", "resourceVersion": "1"},
            "spec": {"holderIdentity": LEAK, "leaseDurationSeconds": 0},
        },
        {"metadata": {"name": LEAK}, "spec": {"holderIdentity": LEAK}},
    ],
}
LOG = "\n".join(
    [json.dumps({"event": "status changed", "token": TOKEN, "note": LEAK, PHONE_NUMBER: 61400111222}), LEAK]
)


class Cluster:
    """An API server in which a careless or hostile person has put secrets everywhere."""

    async def request(self, method: str, path: str, *_: Any, **__: Any) -> Any:
        if path in OBJECTS:
            return OBJECTS[path]
        raise NotFound(f"{path} not found", path.rsplit("/", 1)[-1])

    async def pages(self, path: str, params: Any = None, *, metadata_only: bool = False) -> AsyncIterator[Any]:
        if path not in OBJECTS:
            raise KubernetesRefused(403, f"forbidden: User {LEAK}")
        for each in OBJECTS[path]:
            yield {"metadata": each["metadata"]} if metadata_only else each

    async def watch(self, path: str, params: Any) -> AsyncIterator[Any]:
        yield {"type": "MODIFIED", "object": {"spec": {"renewTime": "2026-11-30T00:00:00Z"}}}

    async def text(self, path: str, params: Any = None) -> str:
        return LOG


async def bundle() -> dict[str, bytes]:
    api: Any = Cluster()
    return await _Collector(api, "sms-operator").collect()


async def test_no_canary_is_in_the_bundle() -> None:
    """Planted in spec, status, annotations, last-applied, Events, logs, records, ConfigMaps, Lease and errors."""
    files = await bundle()
    everything = b"\n".join(files.values()).decode()
    for secret in SECRETS:
        assert secret not in everything, secret
    assert base64.b64encode(TOKEN.encode()).decode() not in everything
    assert re.search("[0-9]{9}", everything) is None, "no number, in whatever form"
    assert re.search("[0-9a-fA-F]{20}", everything) is None, "nothing that looks like a token"


async def test_bundle_says_what_support_needs() -> None:
    files = await bundle()
    assert files.keys() >= {"README.txt", "channels.json", "doctor.json", "operator.json", "not-read.txt"}
    channel, _ = json.loads(files["channels.json"])
    record, _ = json.loads(files["records.json"])
    assert channel["name"] == INSTANCE
    assert (channel["account"], channel["number"]) == (record["account"], record["number"]) == ("account-1", "number-1")
    assert channel["conditions"][0]["reason"] == "NumberNotFound"
    assert channel["webhook"] == "https://sms.example.com/..."
    assert channel["token"] == f"sealed with key {KEY.hex()}"
    assert record["channel"] == f"sms-channels/{INSTANCE}"
    notes = {each["note"] is None for each in json.loads(files["events.json"])}
    assert notes == {True, False}, "only the operator's own text is there"
    assert json.loads(files["logs/operator-1.log"].splitlines()[0])["event"] == "status changed"
    assert json.loads(files["versions.json"])["kubernetes"] == "v1.36.2"
    assert b"doctor" not in files["not-read.txt"]
    for name in files.keys() - {"README.txt"}:
        assert name.split("/")[0] in files["README.txt"].decode(), "README.txt says what each file has"


async def test_what_may_not_be_read_is_in_the_bundle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(OBJECTS, "/apis/channels.hydracore.io/v1/smschannels")
    files = await bundle()
    assert json.loads(files["channels.json"]) == []
    assert files["not-read.txt"].decode().startswith("channels: forbidden: User masked-")


# Masking


@settings(deadline=None)
@given(
    st.from_regex("[0-9a-f]{32}", fullmatch=True),
    st.sampled_from(["{}", "x={}", '"{}"', "a/{}/b", "({})", "{}.", "k:{}"]),
)
def test_any_token_is_masked(token: str, place: str) -> None:
    assert token not in Mask().text(f"before {place.format(token)} after")


@settings(deadline=None)
@given(st.from_regex(r"[A-Za-z0-9+/]{40,200}={0,2}", fullmatch=True))
def test_any_long_word_is_masked(word: str) -> None:
    """Keys, sealed values, JWTs and the like."""
    masked = Mask().text(word)
    longest = max(map(len, re.findall("[A-Za-z0-9]+", masked)), default=0)
    assert word not in masked
    assert longest <= 24


@settings(deadline=None)
@given(
    st.from_regex(r"\+[1-9][0-9]{6,14}", fullmatch=True), st.sampled_from(["{}", "sms:{}", "from {},", "[{}]", "{}."])
)
def test_any_number_is_masked(number: str, place: str) -> None:
    mask = Mask()
    assert number[1:] not in mask.text(place.format(number))
    assert mask.text(number) == mask.text(number[1:]) == "number-1", "the same number has the same name"


@pytest.mark.parametrize(
    "text",
    [
        "2026-11-30T10:00:00.123456Z status changed namespace=sms-channels reason=OverriddenByMessagingService",
        "HTTP 503, code 20503, in 0.23 s; retry 3 of 10 after 15s",
        "channels.hydracore.io/v1 SmsChannel sms-channels",
        "pods is forbidden: User cannot list resource in API group",
        "2026-11-30",
        *(reason.remedy for reason in Reason),
    ],
)
def test_plain_words_stay(text: str) -> None:
    assert Mask().text(text) == text


@pytest.mark.parametrize("text", ["a.b=" * 4000, "=" * 4000, "1 " * 4000, "https://" * 1000, "x" * 100_000])
def test_no_text_is_too_much(text: str) -> None:
    Mask().text(text)


def test_names_that_are_known_stay() -> None:
    text = f"SmsChannel sms-channels/{INSTANCE} of pod operator-7d9f8b6c5-x2x4z"
    assert Mask([INSTANCE, "operator-7d9f8b6c5-x2x4z"]).text(text) == text
    assert INSTANCE not in Mask().text(text)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://user:pass@example.com:8443/a?b#c", "https://example.com:8443/..."),
        ("https://example.com", "https://example.com/..."),
        (f"https://{TOKEN}.example.com/", "https://masked.example.com/..."),
        ("https://[::1/", "masked-1"),
    ],
)
def test_urls_are_cut_after_the_host(url: str, expected: str) -> None:
    assert Mask().text(f"at {url} now") == f"at {expected} now"


# The file


def test_file_is_for_its_owner_only_and_never_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "report.tar.gz"
    _write(target, {"README.txt": b"x", "logs/a.log": b"y"})
    assert target.stat().st_mode & 0o077 == 0
    with tarfile.open(fileobj=io.BytesIO(target.read_bytes())) as archive:
        assert archive.getnames() == ["sms-report/README.txt", "sms-report/logs/a.log"]
    with pytest.raises(ClickException, match="cannot be written: File exists"):
        _write(target, {})
    with pytest.raises(ClickException, match="No such file or directory"):
        _write(tmp_path / "none/report.tar.gz", {})
