"""kill -9 before and after each outside call of a channel's life."""

from __future__ import annotations

from tests.faults.life import KILLS, Life


def test_a_crash_at_any_call_loses_nothing(life: Life) -> None:
    """Held at the call, killed, started again: everything converges, and nothing is written twice too often."""
    assert life.kill_at(list(life.trials(KILLS))) == {}
