"""What the port to Kubernetes remembers of its own writes."""

from __future__ import annotations

from typing import Any, cast

import pytest

from smschannel.api.errors import ChannelError, KubernetesRefused, KubernetesUnavailable
from smschannel.api.kube_client import KubeClient
from smschannel.api.resource import SmsChannel
from smschannel.core.record import Record
from smschannel.kube_store import KubeStore

INSTANCE = "497f6eca-6276-4993-bfeb-53cbbbba6f08"


def body(version: str, uid: str = "uid-1") -> dict[str, Any]:
    return {
        "metadata": {
            "name": INSTANCE,
            "namespace": "sms-channels",
            "uid": uid,
            "resourceVersion": version,
            "creationTimestamp": "2026-01-02T03:04:05Z",
        },
        "spec": {
            "accountSid": "AC" + "0" * 32,
            "phoneNumber": "+61400111222",
            "credentials": {"secretKeyRef": {"name": "twilio", "key": "auth_token"}},
        },
    }


class _Api:
    async def request(self, method: str, path: str, *_: object, **__: object) -> dict[str, Any]:
        return body("1000")


async def test_a_body_from_before_our_own_status_is_outdated() -> None:
    """A late event must not have a status follow from the one before the last, or keep it from being written."""
    kube = KubeStore(cast(KubeClient, _Api()), "sms-operator")
    assert not kube.is_outdated(body("99")), "nothing was written yet"
    await kube.write_status(SmsChannel.model_validate(body("99")), {})
    assert kube.is_outdated(body("999")), "versions are numbers, not words"
    assert not kube.is_outdated(body("1000")), "it is the one that we wrote"
    assert not kube.is_outdated(body("1001"))
    assert not kube.is_outdated(body("99", uid="uid-2")), "another channel of the same name"


async def test_a_status_is_its_own_channels_and_no_successors() -> None:
    """The API server refuses a patch that names another uid than the object of that name has."""
    api = _Writes(None)
    await KubeStore(cast(KubeClient, api), "sms-operator").write_status(SmsChannel.model_validate(body("99")), {"a": 1})
    assert api.bodies == [{"metadata": {"uid": "uid-1"}, "status": {"a": 1}}]


class _Writes:
    """Notes what is written, and where; answers Events with an error."""

    def __init__(self, error: ChannelError | None) -> None:
        self.error = error
        self.paths: list[str] = []
        self.bodies: list[object] = []

    async def request(self, method: str, path: str, content: object = None, **_: object) -> dict[str, Any]:
        self.paths.append(path)
        self.bodies.append(content)
        if self.error and path.endswith("/events"):
            raise self.error
        return {"metadata": {"resourceVersion": "100"}}


@pytest.mark.parametrize(
    ("error", "written", "why"),
    [
        (None, 2, "told first: after the label nobody comes back"),
        (KubernetesUnavailable("away"), 1, "the label waits, so that it is told at the next try"),
        (KubernetesRefused(403, "forbidden"), 2, "where Events are refused for good, the record's annotation says it"),
    ],
)
async def test_a_write_off_is_told_before_it_is_labelled(error: ChannelError | None, written: int, why: str) -> None:
    api = _Writes(error)
    kube = KubeStore(cast(KubeClient, api), "sms-operator")
    record = Record(uid="uid-1", namespace="sms-channels", name=INSTANCE)
    if isinstance(error, KubernetesUnavailable):
        with pytest.raises(KubernetesUnavailable):
            await kube.write_off(record, "the token was revoked")
    else:
        await kube.write_off(record, "the token was revoked")
    event = "/apis/events.k8s.io/v1/namespaces/sms-operator/events"
    assert api.paths == [event, "/api/v1/namespaces/sms-operator/secrets/uid-1"][:written], why
