"""What the port to Kubernetes remembers of its own writes."""

from __future__ import annotations

from typing import Any, cast

from smschannel.kube_api import KubeApi
from smschannel.kube_port import KubePort
from smschannel.resource import SmsChannel

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
    kube = KubePort(cast(KubeApi, _Api()), "sms-operator")
    assert not kube.is_outdated(body("99")), "nothing was written yet"
    await kube.write_status(SmsChannel.model_validate(body("99")), {})
    assert kube.is_outdated(body("999")), "versions are numbers, not words"
    assert not kube.is_outdated(body("1000")), "it is the one that we wrote"
    assert not kube.is_outdated(body("1001"))
    assert not kube.is_outdated(body("99", uid="uid-2")), "another channel of the same name"
