"""Who a client is, and how often it may fail."""

from __future__ import annotations

import ipaddress

import pytest

from api_shim.clients import FailedLogins, client_of

PROXIES = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))


@pytest.mark.parametrize(
    ("peer", "forwarded", "client"),
    [
        pytest.param("192.0.2.1", ["198.51.100.7"], "192.0.2.1", id="a stranger's header is not believed"),
        pytest.param("10.0.0.1", ["198.51.100.7"], "198.51.100.7", id="a proxy's is"),
        pytest.param("10.0.0.1", ["198.51.100.7, 10.9.9.9"], "198.51.100.7", id="two proxies, one after the other"),
        pytest.param("10.0.0.1", ["203.0.113.5, 198.51.100.7"], "198.51.100.7", id="what stands left of it is a claim"),
        pytest.param("10.0.0.1", ["203.0.113.5", "198.51.100.7"], "198.51.100.7", id="several lines are one list"),
        pytest.param("10.0.0.1", [], "10.0.0.1", id="a proxy that says nothing"),
        pytest.param("10.0.0.1", ["nonsense"], "10.0.0.1", id="a proxy that says nonsense"),
        pytest.param("10.0.0.1", ["nonsense, 10.0.0.2"], "10.0.0.2", id="as far as it can be followed"),
        pytest.param("10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3", id="a client among the proxies"),
        pytest.param("fd00::1", ["2001:db8:1:2:3:4:5:6"], "2001:db8:1:2::/64", id="IPv6 clients have a whole /64"),
        pytest.param("::ffff:192.0.2.1", [], "192.0.2.1", id="IPv4 on a socket for both"),
        pytest.param(None, [], "unknown", id="no address at all"),
    ],
)
def test_the_client_is_the_last_address_that_nobody_could_invent(
    peer: str | None, forwarded: list[str], client: str
) -> None:
    assert client_of(peer, forwarded, PROXIES) == client


def test_a_burst_and_then_the_rate() -> None:
    failed = FailedLogins(6)
    for _ in range(6):
        assert failed.wait("a", 100) == 0
        failed.add("a", 100)
    assert failed.wait("a", 100) == 10, "six a minute are one every 10 seconds"
    assert failed.wait("b", 100) == 0, "others are not slowed"
    assert failed.wait("a", 109) == pytest.approx(1)
    assert failed.wait("a", 110) == 0
    failed.add("a", 110)
    assert failed.wait("a", 110) == 10
    assert failed.wait("a", 1000) == 0


def test_strangers_do_not_fill_the_memory() -> None:
    failed = FailedLogins(1)
    for number in range(30_000):
        failed.add(str(number), 0)
    assert len(failed._paid_off) == 10_000
    assert failed.wait("29999", 0) > 0
