"""One way to talk to the Kubernetes API: dictionaries in, dictionaries out, over one keep-alive session.

Configuration and authentication are the `kubernetes` package's; its generated API classes are not used, since
building and checking model objects costs more per channel than everything else the operator does.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.configuration import Configuration

from smschannel.api.errors import (
    ChannelError,
    Conflict,
    Expired,
    KubernetesRefused,
    KubernetesUnavailable,
    NoKindMatch,
    NotFound,
    retry_after_seconds,
)

Object = dict[str, Any]

MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
_PAGE = 500
_CONNECTIONS = 64  # what more callers ask for waits here, and not in the API server
_METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
METADATA_OF_ONE = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"


class KubeClient:
    """Every method raises what `kubernetes_error` makes of an answer, or `KubernetesUnavailable` if there is none."""

    def __init__(self, configuration: Configuration, *, timeout: float = 20) -> None:
        self.configuration = configuration
        self._server = configuration.host.rstrip("/")  # may have a path, where one server stands for many clusters
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=5)
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    async def connect(cls, kubeconfig: str | None = None, context: str | None = None) -> Self:
        """From `kubeconfig`, else $KUBECONFIG, else the pod's ServiceAccount, else ~/.kube/config.

        Raises `kubernetes.aio.config.ConfigException` where none of them can be used.
        """
        configuration = Configuration()
        in_pod = "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ
        if kubeconfig is None and in_pod:
            config.load_incluster_config(client_configuration=configuration)
        else:
            await config.load_kube_config(
                config_file=kubeconfig or os.environ.get("KUBECONFIG"),
                context=context,
                client_configuration=configuration,
                persist_config=False,
            )
        return cls(configuration)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls(self.configuration), limit=_CONNECTIONS, keepalive_timeout=60),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            json_serialize=lambda body: json.dumps(body, separators=(",", ":")),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Object | None = None,
        *,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Object:
        """One call; the answer's body. `path` begins with `/api` or `/apis`."""
        headers = {**await self._headers(), "Accept": accept}
        if body is not None:
            headers["Content-Type"] = content_type
        assert self._session, "use 'async with'"
        try:
            async with self._session.request(
                method, self._server + path, json=body, params=params, headers=headers
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise KubernetesUnavailable(f"the API server does not answer: {type(error).__name__}") from None
        if response.status < 300:
            return _json(answer)
        raise kubernetes_error(response.status, answer, _retry_after(response))

    async def pages(
        self, path: str, params: Mapping[str, str] | None = None, *, metadata_only: bool = False
    ) -> AsyncIterator[Object]:
        """Yield all objects of a list, 500 per call. Raises `Expired` if the list became too old halfway."""
        accept = _METADATA_ONLY if metadata_only else "application/json"
        more: dict[str, str] = {}
        while True:
            query = {**(params or {}), "limit": str(_PAGE), **more}
            page = await self.request("GET", path, params=query, accept=accept)
            try:
                items = page["items"] or ()  # null in an empty list of metadata
                token = page["metadata"].get("continue")
            except (KeyError, TypeError, AttributeError):
                raise KubernetesUnavailable("the API server answered something that is not a list") from None
            for item in items:
                yield item
            if not token:
                return
            more = {"continue": token}

    async def watch(self, path: str, params: Mapping[str, str]) -> AsyncIterator[Object]:
        """Watch events (`type`, `object`) until the server ends the stream. Same errors as `request`."""
        assert self._session, "use 'async with'"
        query = {"watch": "true", "allowWatchBookmarks": "true", **params}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=90)
        try:
            async with self._session.get(
                self._server + path, params=query, headers=await self._headers(), timeout=timeout, read_bufsize=2**21
            ) as response:
                if response.status >= 300:
                    raise kubernetes_error(response.status, await response.read(), _retry_after(response))
                async for line in response.content:
                    yield _json(line)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise KubernetesUnavailable(f"the watch broke: {type(error).__name__}") from None

    async def token(self) -> str | None:
        """The bearer token in force, refreshed by the `kubernetes` package where it rotates."""
        value: str | None = await self.configuration.get_api_key_with_prefix("BearerToken")
        return value.split(" ", 1)[-1] if value else None

    async def _headers(self) -> dict[str, str]:
        token = await self.token()
        return {"Authorization": f"Bearer {token}"} if token else {}


def tls(configuration: Configuration) -> ssl.SSLContext | bool:
    if not configuration.host.startswith("https"):
        return False
    context = ssl.create_default_context(cafile=configuration.ssl_ca_cert, cadata=configuration.ca_cert_data)
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, keyfile=configuration.key_file)
    if not configuration.verify_ssl:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _json(answer: bytes) -> Object:
    try:
        document = json.loads(answer) if answer else {}
    except ValueError:
        raise KubernetesUnavailable("the API server's answer was cut") from None
    if not isinstance(document, dict):
        raise KubernetesUnavailable("the API server answered something that is no object")
    return document


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    return retry_after_seconds(response.headers.get("Retry-After"))


def kubernetes_error(status: int, answer: bytes, retry_after: float | None = None) -> ChannelError:
    """Turn an answer with HTTP status 300 or above into an error.

    Numbers are restored when a channel is gone, so a 404 is believed only if it is the API server's own: `NotFound`
    is a `Status` that names the object. Gateways and proxies answer 404 with bodies of their own.
    """
    try:
        document = json.loads(answer)
        message = str(document["message"])
        is_status = document.get("kind") == "Status"
        missing = str((document.get("details") or {}).get("name") or "")
    except (ValueError, KeyError, TypeError, AttributeError):
        is_status, message, missing = False, f"HTTP {status}", ""
    if status == 404 and is_status and missing:
        return NotFound(message, missing)
    if status == 404 and (is_status or answer.strip() == b"404 page not found"):
        return NoKindMatch(status, message)
    if status == 409:
        return Conflict(message)
    if status == 410:
        return Expired(message)
    if status in {404, 429} or status >= 500:
        return KubernetesUnavailable(f"the API server answers HTTP {status}: {message}", retry_after)
    return KubernetesRefused(status, message)
