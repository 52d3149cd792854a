"""Bound what one answer of the API server may cost in memory: pages limited by bytes, and a cap on every answer.

Tenants decide how large their objects are: a page of 500 Secrets could have 500 MB. The number of objects per page
follows the size of the page before, and an answer above the cap is refused while it is read, without being held.
"""

from __future__ import annotations

import aiohttp
from cachetools import LRUCache
from yarl import URL

from smschannel.api.http import AnswerTooLarge

MAX_ANSWER_BYTES = 12 * 2**20
"""The cap. One object always fits: etcd stores at most 1.5 MiB, which escaped as JSON is at most six times as long."""

_PAGE_BYTES = 2 * 2**20  # what a page should have
_FIRST_PAGE = 20  # objects, while nothing is known of their size
_GROWTH = 5  # a page has at most so many times the objects of the page before
_SHRINK = 8
_MAX_LISTS = 1000  # remembered at once: one per resource, namespace and selector


class BoundedResponse(aiohttp.ClientResponse):
    """A response whose body is not read beyond `MAX_ANSWER_BYTES`. Watches read lines, which have a limit too."""

    async def read(self) -> bytes:
        """Return the body. Raises `AnswerTooLarge`."""
        if self._body is None:
            chunks: list[bytes] = []
            size = 0
            async for chunk in self.content.iter_any():
                size += len(chunk)
                if size > MAX_ANSWER_BYTES:
                    chunks.clear()
                    self.close()
                    raise AnswerTooLarge(MAX_ANSWER_BYTES)
                chunks.append(chunk)
            self._body = b"".join(chunks)
        return await super().read()


class BoundedPages:
    """A client middleware that lowers the `limit` of list requests, whoever sends them, so that pages stay small.

    The limit of a request is the most that is asked for. A page above the cap is asked for again with a lower limit,
    so that a list always comes to its end.
    """

    def __init__(self) -> None:
        self._next: LRUCache[URL, int] = LRUCache(_MAX_LISTS)

    async def __call__(self, request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
        query = request.url.query
        if request.method != "GET" or "limit" not in query:
            return await send(request)
        most = int(query["limit"])
        of_list = request.url.without_query_params("limit", "continue")
        limit = min(most, self._next.get(of_list, _FIRST_PAGE) if "continue" in query else _FIRST_PAGE)
        while True:
            request.url = request.url.update_query(limit=str(limit))
            response = await send(request)
            if response.status >= 300:
                return response
            try:
                size = len(await response.read())
            except AnswerTooLarge:
                if limit == 1:
                    raise
                limit = max(1, limit // _SHRINK)
            else:
                self._next[of_list] = next_limit(limit, size)
                return response


def next_limit(limit: int, size: int) -> int:
    """Return how many objects the page after one of `limit` objects and `size` bytes may have."""
    return max(1, min(limit * _GROWTH, limit * _PAGE_BYTES // max(size, 1)))
