"""Every class of error at each outside call of a channel's life: it is tried again, and nothing is lost."""

from __future__ import annotations

import pytest

from tests.faults.conftest import EVERYTHING
from tests.faults.life import ERRORS, SCENARIOS, Life, Trial

SAMPLE, HANGS = "one error at each call, another one at the next", "hangs, which only time ends"


@pytest.mark.parametrize("batch", [HANGS, *(each.name for each in SCENARIOS)] if EVERYTHING else [SAMPLE])
def test_an_error_at_any_call_is_survived(life: Life, batch: str) -> None:
    """One channel for each call and error; those of a batch all at once."""
    assert life.fail_at(_chosen(batch, list(life.trials(ERRORS)))) == {}


def _chosen(batch: str, trials: list[Trial]) -> list[Trial]:
    if batch == HANGS:
        return [trial for trial in trials if trial.action.kind == "hang"]
    quick = [trial for trial in trials if trial.action.kind != "hang"]
    if batch == SAMPLE:
        return quick[:: len(ERRORS)]
    return [trial for trial in quick if trial.scenario.name == batch]
