"""Which client a request comes from, and how often it has failed to log in. No I/O."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from cachetools import LRUCache

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_MOST_CLIENTS = 10_000
_UNKNOWN = "unknown"
_SUBSCRIBER = 64  # an IPv6 client has as many addresses as it likes, within a network of this length


def client_of(peer: str | None, forwarded_for: Sequence[str], trusted: Sequence[Network]) -> str:
    """The address that connected, or, where that is a trusted proxy, the last one in X-Forwarded-For that is not.

    What stands further left was written by the client itself. IPv6 clients are told apart by their /64.
    """
    at = _address(peer or "")
    if at is None:
        return _UNKNOWN
    if trusted:
        hops = [hop for line in forwarded_for for hop in line.split(",")]
        while hops and _among(at, trusted):
            before = _address(hops.pop())
            if before is None:
                break
            at = before
    if isinstance(at, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((at, _SUBSCRIBER), strict=False))
    return str(at)


def _address(written: str) -> Address | None:
    try:
        address = ipaddress.ip_address(written.strip())
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def _among(address: Address, networks: Sequence[Network]) -> bool:
    return any(address in network for network in networks)


class FailedLogins:
    """A client may fail `per_minute` times at once, and then as often as that rate allows.

    For each client the time is kept at which all its failures are paid off (a leaky bucket). The least recent
    clients are forgotten first, so that strangers cannot fill the memory.
    """

    def __init__(self, per_minute: int) -> None:
        self._interval = 60 / per_minute
        self._paid_off: LRUCache[str, float] = LRUCache(_MOST_CLIENTS)

    def wait(self, client: str, now: float) -> float:
        """Seconds until `client` may fail again; 0 if it may now."""
        debt = self._paid_off.get(client, now) - now
        return max(0.0, debt + self._interval - 60)

    def add(self, client: str, now: float) -> None:
        self._paid_off[client] = max(self._paid_off.get(client, now), now) + self._interval

    def take_back(self, client: str) -> None:
        """Of what was added once: it was no failure."""
        if client in self._paid_off:
            self._paid_off[client] -= self._interval
