"""Every class of error at each call of a channel's life: the call is tried again, and nothing is lost."""

from __future__ import annotations

import pytest

from tests.faults.conftest import EVERYTHING
from tests.faults.life import ERRORS, SCENARIOS, Life, Trial

SAMPLE, HANGS = "one error at each call", "calls that hang"


@pytest.mark.parametrize("batch", [HANGS, *(each.name for each in SCENARIOS)] if EVERYTHING else [SAMPLE])
def test_error_at_any_call_is_retried(life: Life, batch: str) -> None:
    """One channel for each call and error, and all channels of a batch at the same time."""
    assert life.fail_at(_chosen(batch, list(life.trials(ERRORS)))) == {}


def _chosen(batch: str, trials: list[Trial]) -> list[Trial]:
    if batch == HANGS:
        return [trial for trial in trials if trial.action.kind == "hang"]
    quick = [trial for trial in trials if trial.action.kind != "hang"]
    if batch == SAMPLE:
        return quick[:: len(ERRORS)]
    return [trial for trial in quick if trial.scenario.name == batch]
