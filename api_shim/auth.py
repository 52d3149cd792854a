"""Who asks, and what they may. Every check fails closed.

`X-Api-Key: prefix_id_secret` is looked up by its id (it has no underscore) in the Secret `smschannel-api-keys`:

    id: {"sha256": hex of the whole key, "instances": ["*"] or [UUID, ...], "verbs": ["get", "post", "delete"],
         "expires": RFC 3339 or null}

`Authorization: Bearer` is Kubernetes' to judge: TokenReview with our audience says who it is, SubjectAccessReview on
the SmsChannel what they may. Where both headers are sent, both must be right.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from cachetools import TTLCache
from multidict import CIMultiDictProxy

from api_shim.clients import FailedLogins
from api_shim.merging import Merged
from api_shim.schemas import Refusal
from smschannel.api.api_keys import ApiKey, Verb, find_key, read_entry
from smschannel.api.errors import ChannelError, NotFound
from smschannel.api.kube_client import KubeClient, Object
from smschannel.api.names import API_KEYS_SECRET
from smschannel.api.resource import GROUP, PLURAL, VERSION

_REREAD_SECONDS = 30  # a watch that died without a sign is found out by then
_STALE_SECONDS = 120  # keys that could not be read for so long may have been revoked
_CACHE_SECONDS = 10
_CACHE_ENTRIES = 4096
_TRUSTED_SECONDS = 3600  # so long, who was right is asked about again whatever strangers at that address do
_CHALLENGE = {"WWW_Authenticate": 'Bearer realm="sms-channels", ApiKey realm="sms-channels"'}

log = structlog.get_logger()


_REVIEWS = {"TokenReview": "authentication.k8s.io/v1", "SubjectAccessReview": "authorization.k8s.io/v1"}
_KUBERNETES_VERBS = {Verb.GET: ("get",), Verb.POST: ("create", "update"), Verb.DELETE: ("delete",)}


def load_keys(entries: Mapping[str, str]) -> dict[str, ApiKey]:
    """From a Secret's `data`. A malformed entry is logged by its id, and disables just that key."""
    keys = {}
    for key_id, encoded in entries.items():
        entry = read_entry(encoded)
        if isinstance(entry, ApiKey):
            keys[key_id] = entry
        else:
            log.error("an API key cannot be used", key_id=key_id, why=entry)
    return keys


class ApiKeys:
    """The Secret of hashed keys, followed by a watch: what is revoked there ends here within seconds."""

    def __init__(self, api: KubeClient, namespace: str) -> None:
        self._api = api
        self._path = f"/api/v1/namespaces/{namespace}/secrets"
        self._entries: Mapping[str, str] = {}
        self._keys: dict[str, ApiKey] = {}
        self._read_at: float | None = None

    @property
    def known(self) -> bool:
        """Whether they were read, and lately."""
        return self._read_at is not None and asyncio.get_running_loop().time() - self._read_at < _STALE_SECONDS

    def find(self, presented: str) -> tuple[str, ApiKey] | None:
        if not self.known:
            raise Refusal(503, "The API keys cannot be read at the moment.", Retry_After="5")
        return find_key(self._keys, presented, datetime.now(UTC))

    async def follow(self) -> None:
        """For ever. The watch tells what changes; reading again now and then bounds what it may have missed."""
        while True:
            try:
                async with asyncio.timeout(_REREAD_SECONDS):
                    await self._read()
                    await self._watch()
            except TimeoutError:
                continue
            except ChannelError as error:
                log.warning("the API keys cannot be followed", error=str(error))
            except Exception:
                log.exception("the API keys cannot be followed")
            await asyncio.sleep(random.uniform(0.5, 2))  # noqa: S311

    async def _read(self) -> None:
        try:
            self._take(await self._api.request("GET", f"{self._path}/{API_KEYS_SECRET}"))
        except NotFound:
            self._take({})

    async def _watch(self) -> None:
        # Without a resourceVersion, since that of a Secret that rarely changes is soon too old to begin at.
        async for event in self._api.watch(self._path, {"fieldSelector": f"metadata.name={API_KEYS_SECRET}"}):
            if event["type"] in {"ADDED", "MODIFIED"}:
                self._take(event["object"])
            elif event["type"] == "DELETED":
                self._take({})

    def _take(self, secret: Object) -> None:
        entries = secret.get("data") or {}
        if entries != self._entries:  # what is malformed is told once
            self._entries, self._keys = entries, load_keys(entries)
        self._read_at = asyncio.get_running_loop().time()


@dataclass(frozen=True)
class Bearer:
    """Somebody whom Kubernetes knows. `digest` stands for the token, which is not kept."""

    digest: str
    user: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.user.get("username"))


class Reviews:
    """TokenReview and SubjectAccessReview; answers are kept for some seconds, by the token's hash."""

    def __init__(self, api: KubeClient, *, namespace: str, audience: str, seconds: float) -> None:
        self._api = api
        self._namespace = namespace
        self._audience = audience
        self._users: TTLCache[str, Mapping[str, Any]] = TTLCache(_CACHE_ENTRIES, _CACHE_SECONDS)
        self._allowed: TTLCache[tuple[str, Verb, str], bool] = TTLCache(_CACHE_ENTRIES, _CACHE_SECONDS)
        self._were_right: TTLCache[str, None] = TTLCache(_CACHE_ENTRIES, _TRUSTED_SECONDS)
        self._logins: Merged[str, Bearer | None] = Merged(seconds)
        self._questions: Merged[tuple[str, Verb, str], bool] = Merged(seconds)

    def known(self, token: str) -> Bearer | None:
        """Somebody who was there a moment ago."""
        digest = _digest(token)
        user = self._users.get(digest)
        return None if user is None else Bearer(digest, user)

    def was_right(self, token: str) -> bool:
        """Whether it was right within the last hour; by now it may be wrong."""
        return _digest(token) in self._were_right

    def asking(self, token: str) -> bool:
        """Whether Kubernetes is being asked about it already."""
        return _digest(token) in self._logins

    async def login(self, token: str) -> Bearer | None:
        return await self._logins.ask(_digest(token), lambda: self._login(token))

    async def _login(self, token: str) -> Bearer | None:
        digest = _digest(token)
        status = await self._ask("TokenReview", {"token": token, "audiences": [self._audience]})
        # Without our audience in the answer, the token was judged for the API server's own.
        if status.get("authenticated") is not True or self._audience not in status.get("audiences", ()):
            self._were_right.pop(digest, None)
            return None  # not kept: wrong tokens must not push out the right ones
        self._users[digest] = status["user"]
        self._were_right[digest] = None
        return Bearer(digest, status["user"])

    async def may(self, bearer: Bearer, verb: Verb, instance: str) -> bool:
        question = (bearer.digest, verb, instance)
        allowed = self._allowed.get(question)
        if allowed is None:
            allowed = await self._questions.ask(question, lambda: self._may(bearer, verb, instance))
            self._allowed[question] = allowed
        return allowed

    async def _may(self, bearer: Bearer, verb: Verb, instance: str) -> bool:
        return all(
            await asyncio.gather(*(self._allows(bearer.user, each, instance) for each in _KUBERNETES_VERBS[verb]))
        )

    async def _allows(self, user: Mapping[str, Any], verb: str, instance: str) -> bool:
        attributes = {
            "group": GROUP,
            "version": VERSION,
            "resource": PLURAL,
            "namespace": self._namespace,
            "name": instance,
            "verb": verb,
        }
        spec: Object = {"user": user.get("username", ""), "resourceAttributes": attributes}
        spec |= {key: user[key] for key in ("uid", "groups", "extra") if user.get(key)}
        status = await self._ask("SubjectAccessReview", spec)
        return status.get("allowed") is True and status.get("denied") is not True

    async def _ask(self, kind: str, spec: Object) -> Mapping[str, Any]:
        group_version = _REVIEWS[kind]
        body = {"apiVersion": group_version, "kind": kind, "spec": spec}
        review = await self._api.request("POST", f"/apis/{group_version}/{kind.lower()}s", body)
        status: Mapping[str, Any] = review.get("status", {})
        return status


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Caller:
    """Everybody a request came from: the holder of a key, somebody Kubernetes knows, or both in one."""

    key: tuple[str, ApiKey] | None
    bearer: Bearer | None

    def __str__(self) -> str:
        names = [f"api-key:{self.key[0]}"] if self.key else []
        return " ".join([*names, *([f"user:{self.bearer.name}"] if self.bearer else [])])


class LoginFailed(Refusal):
    """Somebody tried, and was wrong."""

    def __init__(self, detail: str) -> None:
        super().__init__(401, detail, **_CHALLENGE)


class Gate:
    """Raises `Refusal`: 401 for who cannot be told, 403 for what they may not, 503 where nobody can be asked.

    A client that was wrong too often gets 429 instead of 401, and Kubernetes is not asked about its tokens. A right
    key, or a token that was right within the hour, is never slowed: behind one proxy or NAT, a stranger must not lock
    out the others.
    """

    def __init__(self, keys: ApiKeys, reviews: Reviews, failed: FailedLogins) -> None:
        self._keys = keys
        self._reviews = reviews
        self._failed = failed

    async def identify(self, headers: CIMultiDictProxy[str], client: Callable[[], str]) -> Caller:
        presented, authorization = _only(headers, "X-Api-Key"), _only(headers, "Authorization")
        if presented is None and authorization is None:
            raise Refusal(401, "Send an X-Api-Key header, or Authorization: Bearer with a token.", **_CHALLENGE)
        key = None
        if presented is not None:
            key = self._keys.find(presented)
            if key is None:
                raise self._failure(client(), "The X-Api-Key is unknown, revoked or expired.")
        bearer = None
        if authorization is not None:
            token = _bearer_token(authorization)
            if not token:
                raise self._failure(client(), "This is no bearer token: send Authorization: Bearer TOKEN.")
            bearer = self._reviews.known(token) or await self._login(token, client())
        return Caller(key, bearer)

    async def _login(self, token: str, client: str) -> Bearer:
        """Whom Kubernetes is asked about counts as a failure until it answers, or many at once would not be slowed."""
        wrong = "The bearer token is expired, for another audience, or none."
        if self._reviews.asking(token):
            if bearer := await self._reviews.login(token):
                return bearer
            raise self._failure(client, wrong)
        if not self._reviews.was_right(token):
            self._slow_down(client)
        self._failed.add(client, asyncio.get_running_loop().time())
        try:
            bearer = await self._reviews.login(token)
        except Exception:
            self._failed.take_back(client)  # nobody knows
            raise
        if bearer is None:
            raise LoginFailed(wrong)
        self._failed.take_back(client)
        return bearer

    def _slow_down(self, client: str) -> None:
        seconds = self._failed.wait(client, asyncio.get_running_loop().time())
        if seconds > 0:
            detail = "Too many wrong keys or tokens came from your address. Try again later."
            raise Refusal(429, detail, Retry_After=f"{math.ceil(seconds)}")

    def _failure(self, client: str, detail: str) -> LoginFailed:
        self._slow_down(client)
        self._failed.add(client, asyncio.get_running_loop().time())
        return LoginFailed(detail)

    async def admit(self, caller: Caller, verb: Verb, instance: str) -> None:
        """The same answer whether or not the instance has a channel."""
        if caller.key and not caller.key[1].may(verb, instance):
            raise Refusal(403, f"This API key may not {verb.upper()} the SMS channel of this instance.")
        if caller.bearer and not await self._reviews.may(caller.bearer, verb, instance):
            needs = " and ".join(_KUBERNETES_VERBS[verb])
            raise Refusal(403, f"This needs the right to {needs} {PLURAL}.{GROUP} of this name, in Kubernetes RBAC.")


def _only(headers: CIMultiDictProxy[str], name: str) -> str | None:
    values = headers.getall(name, [])
    if len(values) > 1:  # which of them counts would be a guess
        raise Refusal(401, f"Send one {name} header.", **_CHALLENGE)
    return values[0].strip() if values else None


def _bearer_token(authorization: str) -> str:
    """The token, or "" for what cannot be one."""
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and token.isascii() and token.isprintable() else ""
