"""The HTTP client of single requests: what it sends, and what becomes of answers of every kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any, cast

import aiohttp
import pytest
import uvloop

from smschannel.api.http import AnswerTooLarge, HttpClient, NotHttp, UnknownHost, _Connection

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
TRAILERS = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X:\r\n" * 201 + b"\r\n"
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """Read one request; empty at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, ConnectionError):
        return b""
    length = next((int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: ")), 0)
    return head + await reader.readexactly(length)


class Server:
    """Answers each request with the next of `answers`, the last one again and again; b"" closes the connection."""

    def __init__(self, *answers: bytes, pieces: bool = False, closes: bool = False) -> None:
        self._answers = list(answers)
        self._pieces, self._closes = pieces, closes
        self.requests: list[bytes] = []
        self.connections = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        while request := await read_request(reader):
            self.requests.append(request)
            answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
            if not answer:
                break
            for piece in [answer[i : i + 1] for i in range(len(answer))] if self._pieces else [answer]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0)
            if self._closes:
                break


@asynccontextmanager
async def client_of(
    talk: Talk,
    *,
    seconds: float = 10,
    limit: int = 8,
    most_bytes: int = 2000,
    path: str = "",
    is_proxy: bool = False,
) -> AsyncIterator[HttpClient]:
    """Yield a client of a server that talks so; `is_proxy`: the client reaches an API through it."""
    talking: set[asyncio.Task[None]] = set()

    async def until_over(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talking.add(cast("asyncio.Task[None]", asyncio.current_task()))
        try:
            with suppress(asyncio.CancelledError):  # at the end
                await talk(reader, writer)
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    server = await asyncio.start_server(until_over, "127.0.0.1", 0)
    here = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    url, proxy = ("http://api.example.com", here) if is_proxy else (here, None)
    client = HttpClient(f"{url}{path}", None, timeout=seconds, limit=limit, most_bytes=most_bytes, proxy=proxy)
    try:
        yield client
    finally:
        await client.close()
        server.close()
        for task in talking:
            task.cancel()
        await asyncio.gather(*talking, return_exceptions=True)


async def test_request_is_sent_as_given() -> None:
    server = Server(OK)
    async with client_of(server.talk, path="/proxy/") as client:
        answer = await client.request("PATCH", "/a b?x=1%20", [("X-Group", "a"), ("X-Group", "b")], b"{}")
    assert (answer.status, answer.headers, answer.body) == (200, {"content-length": "2"}, b"ok")
    lines = server.requests[0].split(b"\r\n")
    assert lines[0] == b"PATCH /proxy/a%20b?x=1%20 HTTP/1.1"
    assert lines[1].startswith(b"Host: 127.0.0.1:")
    assert lines[2:] == [b"X-Group: a", b"X-Group: b", b"Content-Length: 2", b"", b"{}"]


async def test_proxy_gets_the_request_with_the_whole_url() -> None:
    server = Server(OK)
    async with client_of(server.talk, path="/base", is_proxy=True) as client:
        answer = await client.request("PATCH", "/a b?x=1", [("X-Group", "a"), ("X-Group", "b")], b"{}")
    assert (answer.status, answer.headers["content-length"], answer.body) == (200, "2", b"ok")
    lines = server.requests[0].split(b"\r\n")
    assert lines[0] == b"PATCH http://api.example.com/base/a%20b?x=1 HTTP/1.1"
    assert [line for line in lines if line.startswith(b"X-Group")] == [b"X-Group: a", b"X-Group: b"]
    assert lines[-1] == b"{}"


async def test_answer_through_a_proxy_is_bounded_too() -> None:
    server = Server(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n" + b"x" * 5000)
    async with client_of(server.talk, is_proxy=True) as client:
        with pytest.raises(AnswerTooLarge):
            await client.request("GET", "/", [])


async def test_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server may be about to end it, and a write that meets the end cannot be sent again."""
    server = Server(OK)
    async with client_of(server.talk) as client:
        await client.request("GET", "/", [])
        monkeypatch.setattr("smschannel.api.http._KEEP_ALIVE_SECONDS", 0)
        await client.request("POST", "/", [], b"x")
    assert server.connections == 2


async def test_connection_is_used_again() -> None:
    server = Server(OK)
    async with client_of(server.talk) as client:
        for _ in range(3):
            assert (await client.request("GET", "/", [])).body == b"ok"
    assert server.connections == 1


@pytest.mark.parametrize(
    ("answer", "status", "body", "why"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n2\r\nbc\r\n0\r\n\r\n", 200, b"abc", "chunks"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", "nothing follows 204"),
        (b"HTTP/1.1 304 Not Modified\r\n\r\n", 304, b"", "nothing follows 304"),
        (b"HTTP/1.1 100 Continue\r\nX-Not: this\r\n\r\n" + OK, 200, b"ok", "100 comes before the answer"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + OK, 200, b"ok", "so do early hints"),
        (b"HTTP/1.1 503 Busy\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n", 503, b"", "errors are answers, too"),
    ],
)
@pytest.mark.parametrize("pieces", [False, True])
async def test_answers(answer: bytes, status: int, body: bytes, why: str, pieces: bool) -> None:
    server = Server(answer, pieces=pieces)
    async with client_of(server.talk) as client:
        for _ in range(2):
            found = await client.request("GET", "/", [])
            assert (found.status, found.body) == (status, body), why
            assert "x-not" not in found.headers
            assert "link" not in found.headers
    assert server.connections == 1, "the connection is used again"


async def test_answer_may_end_with_its_connection() -> None:
    server = Server(b"HTTP/1.0 200 OK\r\n\r\nall of it", closes=True)
    async with client_of(server.talk) as client:
        assert (await client.request("GET", "/", [])).body == b"all of it"
        assert (await client.request("GET", "/", [])).body == b"all of it"
    assert server.connections == 2


@pytest.mark.parametrize(
    ("answer", "error", "why"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nok", aiohttp.ClientPayloadError, "cut off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nok", aiohttp.ClientPayloadError, "cut off"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", aiohttp.ClientPayloadError, "cut off in a header"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", NotHttp, "another protocol"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", NotHttp, "nobody asked for it"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 5\r\n\r\nok", NotHttp, "two lengths"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\nok", NotHttp, "two framings"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 3000, AnswerTooLarge, "larger than the bound"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 3000, AnswerTooLarge, "headers count, too"),
        (b"HTTP/1.1 200 OK\r\n" + b"X:\r\n" * 201 + b"Content-Length: 0\r\n\r\n", NotHttp, "too many headers"),
        (TRAILERS, NotHttp, "too many headers, after the body"),
        (b"", aiohttp.ServerDisconnectedError, "closed without an answer"),
    ],
)
async def test_what_is_no_answer(answer: bytes, error: type[Exception], why: str) -> None:
    server = Server(answer, closes=True)
    async with client_of(server.talk) as client:
        with pytest.raises(error):
            await client.request("POST", "/", [], b"x")
    assert len(server.requests) == 1, f"not sent again: {why}"


async def test_what_follows_an_answer_is_not_the_next_answer() -> None:
    """A server, or somebody before it, that sends two answers to one request would answer the next request wrongly."""
    server = Server(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    async with client_of(server.talk) as client:
        for _ in range(3):
            assert (await client.request("GET", "/", [])).body == b"ok"
    assert server.connections == 3


async def test_headers_of_a_second_answer_are_not_those_of_the_first() -> None:
    """Else whoever adds an answer could let the operator wait for hours."""
    server = Server(OK + b"HTTP/1.1 429 Busy\r\nRetry-After: 9000\r\nContent-Length: 0\r\n\r\n")
    async with client_of(server.talk) as client:
        assert (await client.request("GET", "/", [])).headers == {"content-length": "2"}


async def test_headers_have_a_bound_of_their_own() -> None:
    """Lists are large; no header is."""
    server = Server(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 300_000)
    async with client_of(server.talk, most_bytes=2**24) as client:
        with pytest.raises(AnswerTooLarge):
            await client.request("GET", "/", [])


async def test_what_comes_while_nothing_is_asked_ends_the_connection() -> None:
    first = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK)
        if not first.is_set():
            first.set()
            await asyncio.sleep(0.05)  # in a segment of its own
            writer.write(OK.replace(b"ok", b"no"))
            await reader.read()

    async with client_of(talk) as client:
        assert (await client.request("GET", "/", [])).body == b"ok"
        await asyncio.sleep(0.2)
        assert (await client.request("GET", "/", [])).body == b"ok"


@pytest.mark.parametrize(
    ("method", "is_repeated"), [("GET", True), ("DELETE", True), ("PATCH", False), ("POST", False)]
)
async def test_request_that_meets_the_end_of_an_idle_connection(method: str, is_repeated: bool) -> None:
    """The server may have handled it, so only a request that does the same when it comes twice is repeated."""
    server = Server(OK, b"", OK)
    async with client_of(server.talk) as client:
        await client.request("GET", "/", [])
        if is_repeated:
            assert (await client.request(method, "/", [])).body == b"ok"
        else:
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await client.request(method, "/", [], b"x")
    assert len(server.requests) == (3 if is_repeated else 2)


async def test_request_that_may_be_repeated_is_sent_twice_at_most() -> None:
    """A server that ends all idle connections at once would get it as often as there are any."""
    together, deletions = asyncio.Barrier(5), 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal deletions
        while not (request := await read_request(reader)).startswith(b"DELETE"):
            if not request:
                return
            await together.wait()
            writer.write(OK)
        deletions += 1

    async with client_of(talk) as client:
        await asyncio.gather(*(client.request("GET", "/", []) for _ in range(5)))
        with pytest.raises(aiohttp.ServerDisconnectedError):
            await client.request("DELETE", "/", [])
    assert deletions == 2


async def test_closed_client_sends_nothing() -> None:
    """What was in flight fails, instead of being sent again over a new connection that is never closed."""
    asked, connections, requests = asyncio.Event(), 0, 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections, requests
        connections += 1
        while await read_request(reader):
            requests += 1
            if requests == 1:
                writer.write(OK)
            asked.set()

    async with client_of(talk) as client:
        await client.request("GET", "/", [])
        asked.clear()
        in_flight = asyncio.create_task(client.request("GET", "/", []))
        await asked.wait()
        await client.close()
        for each in (in_flight, client.request("GET", "/", [])):
            with pytest.raises(aiohttp.ServerDisconnectedError):
                await each
        await asyncio.sleep(0.1)
    assert (connections, requests) == (1, 2)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_connection_whose_making_was_cancelled_does_not_stop_the_end(
    run: Callable[[Coroutine[Any, Any, None]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop does not report the end of such a connection, for which `close` would wait."""

    async def story() -> None:
        async with asyncio.timeout(30), client_of(Server(OK).talk) as client:
            request = asyncio.create_task(client.request("GET", "/", []))
            made = _Connection.connection_made

            def connection_made(self: _Connection, transport: asyncio.BaseTransport) -> None:
                made(self, transport)
                request.cancel()

            monkeypatch.setattr(_Connection, "connection_made", connection_made)
            with pytest.raises(asyncio.CancelledError):
                await request
            await client.close()

    run(story())


async def test_answer_to_a_cancelled_request_is_not_given_to_the_next() -> None:
    asked, answered = asyncio.Event(), 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal answered
        while request := await read_request(reader):
            asked.set()
            if b"/slow" in request:
                await asyncio.sleep(0.1)
            answered += 1
            writer.write(OK if b"/slow" not in request else OK.replace(b"ok", b"no"))

    async with client_of(talk, limit=1) as client:
        slow = asyncio.create_task(client.request("GET", "/slow", []))
        await asked.wait()
        slow.cancel()
        assert (await client.request("GET", "/", [])).body == b"ok"


async def test_limit_and_timeout() -> None:
    """A request that waits for others counts its time, too."""
    begun = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal begun
        if await read_request(reader):
            begun += 1
        await reader.read()

    async with client_of(talk, limit=2, seconds=0.3) as client:
        requests = [asyncio.ensure_future(client.request("GET", "/", [])) for _ in range(5)]
        await asyncio.sleep(0.15)
        assert begun == 2
        ended = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(each) for each in ended] == [TimeoutError] * 5


@pytest.mark.parametrize("value", ["a\r\nX: b", "a\nX: b", "a\rX: b"])
async def test_header_cannot_add_another(value: str) -> None:
    server = Server(OK)
    async with client_of(server.talk) as client:
        with pytest.raises(NotHttp, match="line break"):
            await client.request("GET", "/", [("X-Name", value)])
        await client.request("GET", "/a\r\nX: b", [])
    assert server.requests[0].startswith(b"GET /a%0D%0AX:%20b HTTP/1.1\r\n")


async def test_unknown_host_is_named() -> None:
    client = HttpClient("http://nobody.invalid", None, timeout=10, limit=1, most_bytes=1000)
    with pytest.raises(UnknownHost, match=r"nobody\.invalid"):
        await client.request("GET", "/", [])
