"""Identify the client of a request by its address, and limit what one client may use. No I/O."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Sequence

from cachetools import LRUCache

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAX_CLIENTS = 10_000
_UNKNOWN = "unknown"
_IPV6_PREFIX = 64  # one IPv6 client can use every address of a network of this prefix length
_BURST_SECONDS = 60  # a client may use the failures of this many seconds at once


def client_of(peer: str | None, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """Return the client's address; an IPv6 client is represented by its /64 network.

    That is the address of the connection (`peer`), or if this is a `trusted` proxy, the last address in the
    X-Forwarded-For lines that is not one. Addresses further left may be forged by the client.
    """
    client = _address(peer or "")
    if client is None:
        return _UNKNOWN
    if trusted:
        hops = [hop for line in forwarded_for for hop in line.split(",")]
        while hops and _is_in(client, trusted):
            previous = _address(hops.pop())
            if previous is None:
                break
            client = previous
    if isinstance(client, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((client, _IPV6_PREFIX), strict=False))
    return str(client)


def _address(text: str) -> Address | None:
    try:
        address = ipaddress.ip_address(text.strip())
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def _is_in(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


def is_trusted(peer: str | None, trusted: Sequence[Network]) -> bool:
    """Return whether `peer` is a trusted proxy, whose connections carry the requests of many clients."""
    address = _address(peer or "")
    return address is not None and _is_in(address, trusted)


class Shares:
    """Limit how many places each holder has at the same time: an address, an API key or a user.

    Forgets holders without places, so that it needs no more memory than there are places in all.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._taken: Counter[str] = Counter()

    def take(self, holder: str) -> bool:
        """Take a place; return False if the holder has all of its share already."""
        if self._taken[holder] >= self._limit:
            return False
        self._taken[holder] += 1
        return True

    def give_back(self, holder: str) -> None:
        """Give back a place that `take` returned True for."""
        self._taken[holder] -= 1
        if not self._taken[holder]:
            del self._taken[holder]


class FailureLimiter:
    """A rate limit (a leaky bucket) for each client: `per_minute` failures at once, and then at that rate.

    Keeps for each client the time at which its bucket is empty. Forgets the least recent of more than 10,000 clients,
    so that attackers cannot use up the memory. All times are those of the event loop, in seconds.
    """

    def __init__(self, per_minute: int) -> None:
        self._interval = 60 / per_minute
        self._empty_at: LRUCache[str, float] = LRUCache(_MAX_CLIENTS)

    def retry_after(self, client: str, now: float) -> float:
        """Return the seconds until `client` may fail again; 0 if it may now."""
        level = self._empty_at.get(client, now) - now
        return max(0.0, level + self._interval - _BURST_SECONDS)

    def add(self, client: str, now: float) -> None:
        """Count one failure."""
        self._empty_at[client] = max(self._empty_at.get(client, now), now) + self._interval

    def remove(self, client: str) -> None:
        """Take back one failure that `add` counted."""
        if client in self._empty_at:
            self._empty_at[client] -= self._interval
