"""The token in a labelled Secret: cleaned of what editors and shells add, or refused with what is wrong with it."""

from __future__ import annotations

import base64
from typing import Any, cast

import pytest
from pydantic import SecretStr

from smschannel.api.errors import Refused
from smschannel.api.reasons import Reason
from smschannel.api.resource import CREDENTIALS_LABEL, SmsChannel
from smschannel.channel_cache import ChannelCache
from smschannel.core.claims import Claims
from smschannel.core.record import Login
from smschannel.kube_store import KubeStore
from smschannel.observe import Accounts, Observer, Twilio
from smschannel.twilio.client import TwilioClient
from smschannel.twilio.limits import Limiter
from tests.manifests import ACCOUNT_SID, PHONE_NUMBER, TOKEN, good


class Secrets:
    """A KubeStore that has one Secret."""

    def __init__(self, content: bytes) -> None:
        meta = {"labels": {CREDENTIALS_LABEL: "true"}, "resourceVersion": "1"}
        self.body = {"metadata": meta, "data": {"auth_token": base64.b64encode(content).decode()}}

    async def secret(self, namespace: str, name: str) -> dict[str, Any]:
        return self.body


async def token_in(content: bytes, key: str = "auth_token") -> str:
    manifest = good()
    manifest["spec"]["credentials"] = {"secretKeyRef": {"name": "twilio", "key": key}}
    manifest["metadata"] |= {"uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
    observer = Observer(
        cast(KubeStore, Secrets(content)),
        cast(Twilio, None),
        cast(Accounts, None),
        ChannelCache(Claims()),
        drift_interval=1,
        slow_interval=1,
    )
    login, _ = await observer.login(SmsChannel.model_validate(manifest))
    return login.token.get_secret_value()


@pytest.mark.parametrize(
    "content",
    [
        TOKEN.encode(),
        f"{TOKEN}\r\n".encode("utf-8-sig"),  # printf '\xef\xbb\xbf%s\r\n'
        f"\u200b{TOKEN}\u200b\n".encode(),
        f"\u00a0{TOKEN}\u2060".encode(),
        f"{TOKEN}\n".encode("utf-16"),  # iconv -t UTF-16
        f"{TOKEN}\r\n".encode("utf-16-le"),
        f"{TOKEN}\r\n".encode("utf-16-be"),
    ],
)
async def test_token_is_cleaned(content: bytes) -> None:
    assert await token_in(content) == TOKEN


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Secret twilio has no token under the key auth_token."),
        (b"\xef\xbb\xbf\r\n", "Secret twilio has no token under the key auth_token."),
        (TOKEN.encode() + b"\xe9", "The token in Secret twilio under the key auth_token is not UTF-8 text"),
        (b"\xff\xfe\x00\xd8\x00", "The token in Secret twilio under the key auth_token begins as UTF-16 text, but"),
        (b"\x1f\x8b\x08\x80", "is not UTF-8 text (nor UTF-16)"),
    ],
)
async def test_unusable_token_is_explained(content: bytes, message: str) -> None:
    with pytest.raises(Refused) as refused:
        await token_in(content)
    assert refused.value.reason is Reason.SecretKeyMissing
    assert message in str(refused.value)
    assert TOKEN not in str(refused.value)


async def test_missing_key_is_named() -> None:
    with pytest.raises(Refused, match="Secret twilio has no token under the key token"):
        await token_in(TOKEN.encode(), "token")


@pytest.mark.parametrize("character", ["\u200b", "\u2011", "\u00a0", "\n", "\x00"])
async def test_character_inside_a_token_is_named_before_twilio_is_asked(character: str) -> None:
    """A sealed token may hold one, too."""
    token = await token_in(f"{TOKEN[:4]}{character}{TOKEN[4:]}".encode())
    client = TwilioClient(
        Limiter(concurrency=1, refusal_memory=1),
        api_origin="https://twilio.example",
        messaging_origin="https://twilio.example",
        timeout=1,
        lease_outlasts=lambda _: True,
    )
    async with client:
        with pytest.raises(Refused) as refused:
            await client.find_number(Login(sid=ACCOUNT_SID, token=SecretStr(token)), ACCOUNT_SID, PHONE_NUMBER)
    assert f"The token contains U+{ord(character):04X} (" in str(refused.value)
    assert "at position 5" in str(refused.value)
