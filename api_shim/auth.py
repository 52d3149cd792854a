"""Authenticate the caller of a request, and authorize what it asks for. Every check fails closed.

`X-Api-Key: smsch_ID_SECRET` is looked up by its ID in the Secret `smschannel-api-keys` (`smschannel.api.api_keys` has
the format). `Authorization: Bearer TOKEN` is left to Kubernetes: a TokenReview with our audience authenticates the
user, a SubjectAccessReview on the SmsChannel authorizes it. If a request has both headers, both must be valid.
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

from api_shim.clients import FailureLimiter
from api_shim.schemas import HttpError
from api_shim.single_flight import SingleFlight
from smschannel.api.api_keys import ApiKey, Verb, decode_key, find_key
from smschannel.api.errors import ChannelError, NotFound
from smschannel.api.kube_client import KubeClient, Object
from smschannel.api.names import API_KEYS_SECRET, core_path
from smschannel.api.resource import GROUP, PLURAL, VERSION

_RELIST_SECONDS = 30  # the longest that a watch which broke unnoticed can hide a change
_STALE_SECONDS = 120  # keys that were not read for this long may have been revoked, and are rejected
_CACHE_SECONDS = 10
_CACHE_ENTRIES = 4096
_RECENTLY_VALID_SECONDS = 3600  # tokens that were valid within this time are exempt from the failure limit
_CHALLENGE = {"WWW_Authenticate": 'Bearer realm="sms-channels", ApiKey realm="sms-channels"'}
_REVIEWS = {"TokenReview": "authentication.k8s.io/v1", "SubjectAccessReview": "authorization.k8s.io/v1"}
_KUBERNETES_VERBS = {Verb.GET: ("get",), Verb.POST: ("create", "update"), Verb.DELETE: ("delete",)}

log = structlog.get_logger()


def decode_keys(entries: Mapping[str, str]) -> dict[str, ApiKey]:
    """Parse a Secret's `data`. A malformed entry is logged with its ID and disables only that key."""
    keys = {}
    for key_id, encoded in entries.items():
        try:
            keys[key_id] = decode_key(encoded)
        except ValueError as error:
            log.error("cannot use API key", key_id=key_id, error=str(error))  # noqa: TRY400
    return keys


class ApiKeys:
    """The API keys in the Secret, kept up to date by a watch: a revoked key stops working within seconds."""

    def __init__(self, api: KubeClient, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._entries: Mapping[str, str] = {}
        self._keys: dict[str, ApiKey] = {}
        self._read_at: float | None = None

    @property
    def is_current(self) -> bool:
        """Return whether the Secret was read within the last two minutes."""
        return self._read_at is not None and asyncio.get_running_loop().time() - self._read_at < _STALE_SECONDS

    def find(self, presented: str) -> tuple[str, ApiKey] | None:
        """Return the ID and entry of a key, or None if it is not valid. Raises `HttpError` (503) if keys are stale."""
        if not self.is_current:
            raise HttpError(503, "The API keys cannot be read at the moment. Try again.", Retry_After="5")
        return find_key(self._keys, presented, datetime.now(UTC))

    async def follow(self) -> None:
        """Watch the Secret until cancelled, and read it again every 30 seconds in case the watch is broken."""
        while True:
            try:
                async with asyncio.timeout(_RELIST_SECONDS):
                    await self._read()
                    await self._watch()
            except TimeoutError:
                continue
            except ChannelError as error:
                log.warning("cannot read API keys, retrying", namespace=self._namespace, error=str(error))
            except Exception:
                log.exception("cannot read API keys, retrying", namespace=self._namespace)
            await asyncio.sleep(random.uniform(0.5, 2))  # noqa: S311

    async def _read(self) -> None:
        try:
            self._replace(await self._api.request("GET", core_path(self._namespace, "secrets", API_KEYS_SECRET)))
        except NotFound:
            self._replace({})

    async def _watch(self) -> None:
        # Without a resourceVersion: that of a Secret that rarely changes soon is too old to start from.
        selector = {"fieldSelector": f"metadata.name={API_KEYS_SECRET}"}
        async for event in self._api.watch(core_path(self._namespace, "secrets"), selector):
            if event["type"] in {"ADDED", "MODIFIED"}:
                self._replace(event["object"])
            elif event["type"] == "DELETED":
                self._replace({})

    def _replace(self, secret: Object) -> None:
        entries = secret.get("data") or {}
        if entries != self._entries:  # decode only what changed, so that a malformed entry is logged once
            self._entries, self._keys = entries, decode_keys(entries)
        self._read_at = asyncio.get_running_loop().time()


@dataclass(frozen=True)
class User:
    """A user that Kubernetes authenticated. `digest` identifies the token, which is not stored."""

    digest: str
    info: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.info.get("username"))


class Reviews:
    """Sends TokenReviews and SubjectAccessReviews; each may take `seconds`, and concurrent equal ones are sent once.

    Caches valid tokens (by their hash) and all access decisions for 10 seconds.
    """

    def __init__(self, api: KubeClient, *, namespace: str, audience: str, seconds: float) -> None:
        self._api = api
        self._namespace = namespace
        self._audience = audience
        self._users: TTLCache[str, Mapping[str, Any]] = TTLCache(_CACHE_ENTRIES, _CACHE_SECONDS)
        self._allowed: TTLCache[tuple[str, Verb, str], bool] = TTLCache(_CACHE_ENTRIES, _CACHE_SECONDS)
        self._recently_valid: TTLCache[str, None] = TTLCache(_CACHE_ENTRIES, _RECENTLY_VALID_SECONDS)
        self._token_reviews: SingleFlight[str, User | None] = SingleFlight(seconds)
        self._access_reviews: SingleFlight[tuple[str, Verb, str], bool] = SingleFlight(seconds)

    def cached_user(self, token: str) -> User | None:
        """Return the user of a token that was reviewed within the last 10 seconds, else None."""
        digest = _digest(token)
        info = self._users.get(digest)
        return None if info is None else User(digest, info)

    def was_recently_valid(self, token: str) -> bool:
        """Return whether the token was valid within the last hour. It may have been revoked since."""
        return _digest(token) in self._recently_valid

    def is_in_flight(self, token: str) -> bool:
        """Return whether a TokenReview of this token is in flight."""
        return _digest(token) in self._token_reviews

    async def authenticate(self, token: str) -> User | None:
        """Send a TokenReview, or join the one in flight. Return None for a token that is not valid."""
        return await self._token_reviews.run(_digest(token), lambda: self._review_token(token))

    async def _review_token(self, token: str) -> User | None:
        digest = _digest(token)
        status = await self._review("TokenReview", {"token": token, "audiences": [self._audience]})
        # Without our audience in the answer, the token was only checked for the API server's own audience.
        if status.get("authenticated") is not True or self._audience not in status.get("audiences", ()):
            self._recently_valid.pop(digest, None)
            return None  # not cached: invalid tokens must not push valid ones out of the cache
        self._users[digest] = status["user"]
        self._recently_valid[digest] = None
        return User(digest, status["user"])

    async def is_allowed(self, user: User, verb: Verb, instance: str) -> bool:
        """Return whether RBAC allows `user` everything that the REST call `verb` needs."""
        key = (user.digest, verb, instance)
        allowed = self._allowed.get(key)
        if allowed is None:
            allowed = await self._access_reviews.run(key, lambda: self._review_access(user, verb, instance))
            self._allowed[key] = allowed
        return allowed

    async def _review_access(self, user: User, verb: Verb, instance: str) -> bool:
        verbs = _KUBERNETES_VERBS[verb]
        return all(await asyncio.gather(*(self._review_verb(user.info, each, instance) for each in verbs)))

    async def _review_verb(self, info: Mapping[str, Any], verb: str, instance: str) -> bool:
        attributes = {
            "group": GROUP,
            "version": VERSION,
            "resource": PLURAL,
            "namespace": self._namespace,
            "name": instance,
            "verb": verb,
        }
        spec: Object = {"user": info.get("username", ""), "resourceAttributes": attributes}
        spec |= {key: info[key] for key in ("uid", "groups", "extra") if info.get(key)}
        status = await self._review("SubjectAccessReview", spec)
        return status.get("allowed") is True and status.get("denied") is not True

    async def _review(self, kind: str, spec: Object) -> Mapping[str, Any]:
        group_version = _REVIEWS[kind]
        body = {"apiVersion": group_version, "kind": kind, "spec": spec}
        review = await self._api.request("POST", f"/apis/{group_version}/{kind.lower()}s", body)
        status: Mapping[str, Any] = review.get("status", {})
        return status


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


@dataclass(frozen=True)
class Caller:
    """The authenticated caller of a request: an API key (with its ID), a Kubernetes user, or both."""

    key: tuple[str, ApiKey] | None
    user: User | None

    @property
    def share(self) -> str:
        """Who has a share of the service: the key if there is one, so that nobody has several with more tokens."""
        return f"api-key:{self.key[0]}" if self.key else str(self)

    def __str__(self) -> str:
        names = [f"api-key:{self.key[0]}"] if self.key else []
        return " ".join([*names, *([f"user:{self.user.name}"] if self.user else [])])


class Unauthenticated(HttpError):
    """401: the credentials that were sent are not valid. Counted against the client, unlike missing ones."""

    def __init__(self, reason: str) -> None:
        super().__init__(401, f"Not authenticated: {reason}", **_CHALLENGE)


class Auth:
    """Authenticate callers (401) and authorize their calls (403). Raises `HttpError`, and what `KubeClient` raises.

    A client with too many failures gets 429 instead of 401, and no TokenReview is sent for its tokens. A valid API key,
    or a token that was valid within the hour, is exempt: behind a shared proxy or NAT, one client must not lock out the
    others.
    """

    def __init__(self, keys: ApiKeys, reviews: Reviews, failures: FailureLimiter) -> None:
        self._keys = keys
        self._reviews = reviews
        self._failures = failures

    async def authenticate(self, headers: CIMultiDictProxy[str], client: Callable[[], str]) -> Caller:
        """Return the caller. `client` returns the client's address, and is only called if it is needed."""
        presented, authorization = _single(headers, "X-Api-Key"), _single(headers, "Authorization")
        if presented is None and authorization is None:
            raise HttpError(
                401, "Not authenticated: send an X-Api-Key header, or Authorization: Bearer TOKEN.", **_CHALLENGE
            )
        key = None
        if presented is not None:
            key = self._keys.find(presented)
            if key is None:
                raise self._failure(client(), "the API key is unknown, revoked or expired.")
        user = None
        if authorization is not None:
            token = _bearer_token(authorization)
            if not token:
                raise self._failure(client(), "the Authorization header is not 'Bearer TOKEN'.")
            user = self._reviews.cached_user(token) or await self._authenticate_token(token, client())
        return Caller(key, user)

    async def _authenticate_token(self, token: str, client: str) -> User:
        """Return the user of a token that is not cached. Raises `HttpError` (401, 429).

        A failure is counted before the review and taken back after success, so that concurrent attempts are limited.
        """
        invalid = "the bearer token is invalid, expired, or for another audience."
        if self._reviews.is_in_flight(token):
            if user := await self._reviews.authenticate(token):
                return user
            raise self._failure(client, invalid)
        if not self._reviews.was_recently_valid(token):
            self._check_limit(client)
        self._failures.add(client, asyncio.get_running_loop().time())
        try:
            user = await self._reviews.authenticate(token)
        except Exception:
            self._failures.remove(client)  # Kubernetes failed, not the client
            raise
        if user is None:
            raise Unauthenticated(invalid)
        self._failures.remove(client)
        return user

    def _check_limit(self, client: str) -> None:
        seconds = self._failures.retry_after(client, asyncio.get_running_loop().time())
        if seconds > 0:
            detail = "Too many authentication failures from your address. Try again later."
            raise HttpError(429, detail, Retry_After=f"{math.ceil(seconds)}")

    def _failure(self, client: str, reason: str) -> Unauthenticated:
        self._check_limit(client)
        self._failures.add(client, asyncio.get_running_loop().time())
        return Unauthenticated(reason)

    async def authorize(self, caller: Caller, verb: Verb, instance: str) -> None:
        """Raise `HttpError` (403) unless all of the caller's credentials allow `verb` on `instance`.

        The answer does not depend on whether the instance has a channel.
        """
        if caller.key and not caller.key[1].allows(verb, instance):
            raise HttpError(403, f"This API key does not allow {verb.upper()} for the SMS channel of this instance.")
        if caller.user and not await self._reviews.is_allowed(caller.user, verb, instance):
            verbs = " and ".join(_KUBERNETES_VERBS[verb])
            raise HttpError(403, f"Kubernetes RBAC does not allow you to {verbs} {PLURAL}.{GROUP} with this name.")


def _single(headers: CIMultiDictProxy[str], name: str) -> str | None:
    values = headers.getall(name, [])
    if len(values) > 1:  # it would be unclear which one counts
        raise HttpError(401, f"Not authenticated: send only one {name} header.", **_CHALLENGE)
    return values[0].strip() if values else None


def _bearer_token(authorization: str) -> str:
    """Return the token, or "" if the header has another scheme or characters that no token has."""
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    return token if scheme.lower() == "bearer" and token.isascii() and token.isprintable() else ""
