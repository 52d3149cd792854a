"""Call the Kubernetes API: dictionaries in, dictionaries out, over keep-alive connections.

The generated API classes of the `kubernetes` package are not used: building and validating model objects costs more per
channel than everything else the operator does.
"""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from typing import Any, Protocol, Self
from urllib.parse import urlencode

import aiohttp
from aiohttp.http_exceptions import LineTooLong
from pydantic_core import from_json
from yarl import URL

from smschannel.api.causes import in_words
from smschannel.api.errors import (
    ChannelError,
    Conflict,
    Expired,
    Fenced,
    KubeconfigError,
    KubernetesRefused,
    KubernetesUnavailable,
    NoKindMatch,
    NotConnected,
    NotFound,
    retry_after_seconds,
)
from smschannel.api.http import Answer, AnswerTooLarge, Headers, HttpClient
from smschannel.api.kubeconfig import Access, load_access
from smschannel.api.names import FENCE
from smschannel.api.paging import MAX_ANSWER_BYTES, BoundedPages, BoundedResponse

Object = dict[str, Any]
"""One JSON object as the API server sends or accepts it: a resource, a list, a review, a watch event."""

MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
_CONNECT_SECONDS = 5.0  # with the answer of a proxy
_USER_AGENT = "sms-channel-operator"
_PAGE_SIZE = 500  # objects per list call, at most
_MAX_CONNECTIONS = 64  # further calls wait in this process instead of loading the API server
METADATA_OF_ONE = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
"""The value of `accept` for a GET or a watch of objects' metadata."""
METADATA_OF_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""The value of `accept` for a list of objects' metadata."""


class Server(Protocol):
    """Where an API server is; an `Access` says as whom to call it, too."""

    @property
    def host(self) -> str: ...


class _LoginFailed(aiohttp.ClientConnectionError):
    """The credentials expired and cannot be renewed; the message is for people."""


_NOT_CONNECTED = (
    ssl.SSLError,
    ssl.CertificateError,
    aiohttp.ClientSSLError,
    aiohttp.ClientHttpProxyError,
    aiohttp.ClientProxyConnectionError,
)


class KubeClient:
    """A client for one API server; use it with `async with`. It can be shared by any number of tasks.

    Every call raises the error that `kubernetes_error` returns for a status of 300 or above (redirects are not
    followed), and `KubernetesUnavailable` if there is no answer, it is not JSON, or it is larger than 12 MiB.
    """

    def __init__(self, configuration: Server, *, timeout: float = 20) -> None:
        """Call the server of `configuration`; each call may take `timeout` seconds (a watch may last longer)."""
        self.configuration = configuration
        self._access = configuration if isinstance(configuration, Access) else Access(configuration.host)
        self._server = configuration.host.rstrip("/")  # may have a path, if one proxy serves many clusters
        self._origin = URL(self._server).origin()
        self._timeout = timeout
        self._http = HttpClient(
            self._server,
            self._access.tls,
            timeout=timeout,
            limit=_MAX_CONNECTIONS,
            most_bytes=MAX_ANSWER_BYTES,
            proxy=self._access.proxy,
        )
        self._session: aiohttp.ClientSession | None = None

    @classmethod
    async def connect(cls, kubeconfig: str | None = None, context: str | None = None) -> Self:
        """Return a client with the rights of `kubeconfig`, or else $KUBECONFIG, ~/.kube/config, or the pod.

        `context` names a context of the kubeconfig; None means the current one. Sends nothing to the API server yet,
        but runs the kubeconfig's login program, if there is one. Raises `KubeconfigError`.
        """
        return cls(await load_access(kubeconfig, context))

    async def __aenter__(self) -> Self:
        self._session = self.new_session()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()
        if self._session:
            await self._session.close()

    def new_session(self, *middlewares: aiohttp.ClientMiddlewareType) -> aiohttp.ClientSession:
        """Return a session for lists and watches, which carry the credentials, to this API server only.

        It has any number of connections, since a watch needs one. `middlewares` are called before its own. The caller
        closes it.
        """
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=self._access.tls or True, limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=self._timeout, sock_connect=5),
            cookie_jar=aiohttp.DummyCookieJar(),
            proxy=self._access.proxy,
            response_class=BoundedResponse,
            middlewares=(*middlewares, BoundedPages(), self._authenticate),
        )

    async def _authenticate(
        self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType
    ) -> aiohttp.ClientResponse:
        """Add the credentials; log in again, once, if they are refused."""
        if request.url.origin() != self._origin:
            raise aiohttp.ClientConnectionError("a redirect to another server is not followed")
        try:
            request.headers.update(await self._access.identity.headers())
            response = await send(request)
            if response.status != 401 or not await self._access.identity.renewed():
                return response
            response.close()
            request.headers.update(await self._access.identity.headers())
        except KubeconfigError as error:
            raise _LoginFailed(str(error)) from None
        return await send(request)

    def _no_answer(self, what: str, error: BaseException) -> KubernetesUnavailable:
        if isinstance(error, _LoginFailed):
            return NotConnected(str(error))
        if isinstance(error, AnswerTooLarge):
            return KubernetesUnavailable(f"the API server's answer is refused: {error}")
        said = in_words(error, self._access.proxy)
        if isinstance(error, _NOT_CONNECTED):
            return NotConnected(f"cannot connect to the API server: {said}")
        return KubernetesUnavailable(f"{what}: {said}")

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
        """Send one request and return the body of the answer. `path` begins with `/api` or `/apis`."""
        headers = [("Accept", accept)]
        content = b""
        if body is not None:
            headers.append(("Content-Type", content_type))
            content = json.dumps(body, separators=(",", ":")).encode()
        return _object(await self._exchange(method, path, params, headers, content))

    async def text(self, path: str, params: Mapping[str, str] | None = None) -> str:
        """Read something that is no object, such as the log of a pod."""
        answer = await self._exchange("GET", path, params, [("Accept", "text/plain, */*")])
        return answer.decode(errors="replace")

    async def _exchange(
        self, method: str, path: str, params: Mapping[str, str] | None, headers: Headers, body: bytes = b""
    ) -> bytes:
        target = f"{path}?{urlencode(params)}" if params else path
        try:
            answer = await self._send(method, target, [*headers, ("User-Agent", _USER_AGENT)], body)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._no_answer("the API server does not answer", error) from None
        if answer.status < 300:
            return answer.body
        raise kubernetes_error(answer.status, answer.body, retry_after_seconds(answer.headers.get("retry-after")))

    async def _send(self, method: str, target: str, headers: Headers, body: bytes) -> Answer:
        """Send a request with the credentials; log in again, once, if they are refused."""
        identity = self._access.identity
        try:
            given = [*headers, *await identity.headers()]
            answer = await self._http.request(method, target, given, body)
            if answer.status != 401 or not await identity.renewed():
                return answer
            given = [*headers, *await identity.headers()]
        except KubeconfigError as error:
            raise _LoginFailed(str(error)) from None
        return await self._http.request(method, target, given, body)

    async def _list(self, path: str, query: Mapping[str, str], accept: str) -> Object:
        """Read a page of a list, which aiohttp's middlewares keep small."""
        assert self._session, "use 'async with'"
        try:
            async with self._session.get(
                self._server + path, params=query, headers={"Accept": accept}, allow_redirects=False
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._no_answer("the API server does not answer", error) from None
        if response.status < 300:
            return _object(answer)
        raise kubernetes_error(response.status, answer, _retry_after(response))

    async def pages(
        self,
        path: str,
        params: Mapping[str, str] | None = None,
        *,
        metadata_only: bool = False,
        on_version: Callable[[str], object] = lambda version: None,
    ) -> AsyncIterator[Object]:
        """Yield all objects of a list, page by page. Raises `Expired` if the list became too old halfway.

        With `metadata_only`, each object has nothing but its metadata. `on_version` is called with the list's
        resourceVersion, from which a watch can continue.
        """
        accept = METADATA_OF_LIST if metadata_only else "application/json"
        more: dict[str, str] = {}
        seen: set[str] = set()
        while True:
            query = {**(params or {}), "limit": str(_PAGE_SIZE), **more}
            page = await self._list(path, query, accept)
            items, meta = page.get("items", False), page.get("metadata")
            if not isinstance(items, list | None) or not isinstance(meta, dict):  # null: an empty list of metadata
                raise KubernetesUnavailable("the API server's answer is not a list")
            on_version(str(meta.get("resourceVersion", "")))
            for item in items or ():
                yield item
            if not meta.get("continue"):
                return
            if meta["continue"] in seen:
                raise KubernetesUnavailable("the API server's list does not end: its pages lead back to earlier ones")
            seen.add(meta["continue"])
            more = {"continue": meta["continue"]}

    async def watch(self, path: str, params: Mapping[str, str]) -> AsyncGenerator[Object]:
        """Yield watch events (`type`, `object`) until the server ends the stream. Raises the same errors as `request`.

        An ERROR event is raised as the error that it is. A stream that is silent for 90 seconds counts as broken:
        bookmarks arrive about once a minute.
        """
        assert self._session, "use 'async with'"
        query = {"watch": "true", "allowWatchBookmarks": "true", **params}
        timeout = aiohttp.ClientTimeout(total=None, connect=_CONNECT_SECONDS, sock_read=90)
        try:
            async with self._session.get(
                self._server + path,
                params=query,
                timeout=timeout,
                read_bufsize=MAX_ANSWER_BYTES // 2,  # a line may have twice as much: a whole event must fit
                allow_redirects=False,
            ) as response:
                if response.status >= 300:
                    raise kubernetes_error(response.status, await response.read(), _retry_after(response))
                async for line in response.content:
                    yield _event(line)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._no_answer("the watch broke", error) from None
        except LineTooLong:  # its message has the beginning of the line
            raise KubernetesUnavailable("the watch broke: an event is too large") from None


def _object(answer: bytes) -> Object:
    try:
        document = from_json(answer) if answer else {}
    except ValueError:
        raise KubernetesUnavailable("the API server's answer is not valid JSON, or was truncated") from None
    if not isinstance(document, dict):
        raise KubernetesUnavailable("the API server's answer is not a JSON object")
    return document


def _event(line: bytes) -> Object:
    event = _object(line)
    found = event.get("object")
    if event.get("type") == "ERROR" and isinstance(found, dict):
        code = found.get("code")
        raise kubernetes_error(code if isinstance(code, int) else 500, json.dumps(found).encode())
    meta = found.get("metadata") if isinstance(found, dict) else None
    if not isinstance(event.get("type"), str) or not isinstance(meta, dict) or not meta.get("resourceVersion"):
        raise KubernetesUnavailable("the API server's watch sends something else than events")
    return event


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    return retry_after_seconds(response.headers.get("Retry-After"))


def kubernetes_error(status: int, answer: bytes, retry_after: float | None = None) -> ChannelError:
    """Return the error for an answer with HTTP status 300 or above.

    Numbers are restored when a channel is gone, so a 404 counts only if the API server itself sent it: `NotFound` needs
    a `Status` that names the object, `NoKindMatch` any other `Status` or the API server's plain "404 page not found".
    A 404 of a gateway or proxy is `KubernetesUnavailable`.
    """
    try:
        document = json.loads(answer)
        message = str(document["message"])
        is_status = document.get("kind") == "Status"
        missing = str((document.get("details") or {}).get("name") or "")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_status, message, missing = False, f"HTTP {status}", ""
    if status == 404 and is_status and missing:
        return NotFound(message, missing)
    if status == 404 and (is_status or answer.strip() == b"404 page not found"):
        return NoKindMatch(status, message)
    if status < 400:
        return KubernetesRefused(
            status,
            f"the server URL answers with a redirect (HTTP {status}), which is not followed: correct the URL",
        )
    if status == 409:
        return Conflict(message)
    if status == 410:
        return Expired(message)
    if status in {404, 429} or status >= 500:
        return KubernetesUnavailable(f"the API server answers HTTP {status}: {message}", retry_after)
    if status in {403, 422} and f"'{FENCE}'" in message:
        return Fenced(message)
    return KubernetesRefused(status, message)
