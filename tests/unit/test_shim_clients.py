"""The client's address, and the limit of its authentication failures."""

from __future__ import annotations

import ipaddress

import pytest

from api_shim.clients import FailureLimiter, client_of

PROXIES = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        pytest.param("192.0.2.1", ["198.51.100.7"], "192.0.2.1", id="the header of an untrusted client is ignored"),
        pytest.param("10.0.0.1", ["198.51.100.7"], "198.51.100.7", id="the header of a trusted proxy counts"),
        pytest.param("10.0.0.1", ["198.51.100.7, 10.9.9.9"], "198.51.100.7", id="two proxies in a row"),
        pytest.param(
            "10.0.0.1", ["203.0.113.5, 198.51.100.7"], "198.51.100.7", id="addresses further left may be forged"
        ),
        pytest.param(
            "10.0.0.1", ["203.0.113.5", "198.51.100.7"], "198.51.100.7", id="several header lines are one list"
        ),
        pytest.param("10.0.0.1", [], "10.0.0.1", id="a proxy without the header"),
        pytest.param("10.0.0.1", ["nonsense"], "10.0.0.1", id="a proxy with an invalid header"),
        pytest.param("10.0.0.1", ["nonsense, 10.0.0.2"], "10.0.0.2", id="the chain ends at an invalid address"),
        pytest.param("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3", id="a client among the proxies"),
        pytest.param("fd00::1", ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64", id="IPv6 clients have a whole /64"),
        pytest.param("::ffff:192.0.2.1", [], "192.0.2.1", id="IPv4-mapped IPv6 address"),
        pytest.param(None, [], "unknown", id="no address at all"),
    ],
)
def test_client_is_the_last_address_that_cannot_be_forged(peer: str | None, forwarded: list[str], client: str) -> None:
    assert client_of(peer, forwarded, PROXIES) == client


def test_burst_is_allowed_and_then_the_rate() -> None:
    failures = FailureLimiter(6)
    for _ in range(6):
        assert failures.retry_after("a", 100) == 0
        failures.add("a", 100)
    assert failures.retry_after("a", 100) == 10, "six per minute are one every 10 seconds"
    assert failures.retry_after("b", 100) == 0, "other clients are not limited"
    assert failures.retry_after("a", 109) == pytest.approx(1)
    assert failures.retry_after("a", 110) == 0
    failures.add("a", 110)
    assert failures.retry_after("a", 110) == 10
    assert failures.retry_after("a", 1000) == 0


def test_number_of_clients_is_bounded() -> None:
    failures = FailureLimiter(1)
    for number in range(30_000):
        failures.add(str(number), 0)
    assert len(failures._empty_at) == 10_000
    assert failures.retry_after("29999", 0) > 0
