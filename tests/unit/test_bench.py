"""The benchmarks' aims and figures. What they measure with is tested on a cluster: tests/cluster/test_bench.py."""

import pytest

from smschannel.api.resource import FINALIZER, GROUP
from smschannel.core.record import RECORD_LABEL
from tests.bench import aims, gopeer
from tests.bench.aims import Aim, Result
from tests.bench.case import Case, Phase, percentile
from tests.documents import ROOT, table


def constants() -> str:
    return (gopeer.PEER.module / "reconciler.go").read_text()


@pytest.mark.parametrize(
    ("aim", "value", "met"),
    [
        (Aim("ratio", 1.0), 1.0, True),  # the bound itself is met
        (Aim("ratio", 1.0), 0.99, False),
        (Aim("cost", 3.0, at_most=True), 3.0, True),
        (Aim("cost", 3.0, at_most=True), 3.01, False),
        (Aim("writes", 0, at_most=True), 0, True),
    ],
)
def test_aim_is_met_at_its_bound_and_on_one_side(aim: Aim, value: float, met: bool) -> None:
    assert Result(aim, value).met is met


def test_result_that_misses_its_bound_by_little_does_not_look_like_it() -> None:
    assert Aim("writes", 3, at_most=True).written(3) == "3"
    assert Aim("writes", 3, at_most=True).written(3.0004) == "3.0004"
    assert Aim("ratio", 1.2, at_most=True).written(1.2004) == "1.2004"


def test_documented_aims_are_those_of_the_code() -> None:
    documented = {row[0]: row[1] for row in table("What", "Aim")}
    every = [each for each in vars(aims).values() if isinstance(each, Aim)]
    assert documented == {
        each.what: f"{'at most' if each.at_most else 'at least'} {each.written(each.value)}" for each in every
    }


def test_percentile_is_a_time_that_occurred() -> None:
    times = tuple(float(each) for each in range(1, 101))
    assert percentile(times, 50) == 51
    assert percentile(times, 99) == 100
    assert percentile((7.0,), 99) == 7.0


def test_cpu_and_rate_are_per_channel() -> None:
    phase = Phase(2.0, (1.0,) * 4, {"POST secrets": 1.0, "GET secrets": 2.0}, {}, {"subject": 0.008, "twin": 1}, 0.0)
    assert phase.per_second == 2
    assert phase.cpu_milliseconds("subject") == 2
    assert (phase.writes, phase.reads) == (1, 2)


def test_ratio_to_the_floor_compares_equal_writes() -> None:
    """With the finalizer at birth a channel needs two writes instead of three: the floor must have them too."""
    assert Case("ours", at_birth=True).floor == Case("floor", at_birth=True).name
    assert Case("ours").floor == "floor"


def test_edited_peer_is_another_code() -> None:
    assert Case("peer").code() != Case("floor").code()


@pytest.mark.parametrize("name", [FINALIZER, RECORD_LABEL, f"{GROUP}/channel-uid", f"{GROUP}/account-sid"])
def test_peer_uses_the_names_of_the_operator(name: str) -> None:
    """The admission policy adds the operator's finalizer: under another name the peer would make one write more."""
    assert f'"{name}"' in constants()


def test_peer_is_built_with_the_control_planes_libraries() -> None:
    """The same versions of k8s.io, so that most packages are compiled once."""

    def versions(module: str) -> dict[str, str]:
        words = [line.split() for line in (ROOT / module / "go.mod").read_text().splitlines()]
        return {line[0]: line[1] for line in words if line[1:] and line[1][0] == "v" and line[0].startswith("k8s.io/")}

    ours, theirs = versions("tests/bench/peer"), versions("deploy/local/controlplane")
    for name in ("k8s.io/api", "k8s.io/apimachinery", "k8s.io/client-go"):
        assert ours[name] == theirs[name]
