"""A first installation on an account in use: the operator only observes, and Twilio sees no write."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.local.stack import Options, Stack
from tests.cluster.steps import check_now, configured, metric, name_of, wait_checked, wait_reason, webhook
from tests.conftest import running


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    options = Options(operator_settings={"SMSCHANNEL_OBSERVE_ONLY": "true"})
    with running(tmp_path_factory.mktemp("observe"), options) as started:
        yield started


def writes(stack: Stack) -> list[Any]:
    return list(stack.twin_call("GET", "/journal?method=POST")["entries"])


def test_nothing_is_written_until_the_mode_ends(stack: Stack, account: dict[str, Any]) -> None:
    numbers = account["phone_numbers"]
    manifests = [stack.manifest(each, account=account) for each in numbers[:2]]
    before = [webhook(stack, each) for each in numbers]
    stack.apply(*manifests)
    for each in manifests:
        wait_reason(stack, name_of(each), "ObserveOnly")
        wait_checked(stack, each)
    assert stack.records() == []
    assert [webhook(stack, each) for each in numbers] == before
    assert stack.twin_call("GET", "/journal?method=GET")["entries"], "the plan is made from what Twilio says"
    assert writes(stack) == []
    assert metric(stack, "smschannel_channels", reason="ObserveOnly") == 2
    assert metric(stack, "smschannel_observe_only") == 1
    status, answer = stack.rest("GET", name_of(manifests[0]))
    assert (status, answer["status"]) == (200, "observe_only")

    stack.delete(name_of(manifests[1]))
    stack.wait_gone(name_of(manifests[1]))
    assert stack.stop_process("operator") == 0
    stack.start_operator(settings={"SMSCHANNEL_OBSERVE_ONLY": "false"})
    wait_reason(stack, name_of(manifests[0]), "Configured")
    assert len(writes(stack)) == 1
    assert metric(stack, "smschannel_observe_only") == 0

    stack.stop_process("operator")
    stack.start_operator()
    check_now(stack, manifests[0])
    configured(stack, manifests[0])
    stack.delete(name_of(manifests[0]))
    channel = wait_reason(stack, name_of(manifests[0]), "Restoring")
    assert "only observes" in channel["status"]["conditions"][0]["message"]
    assert len(writes(stack)) == 1

    stack.stop_process("operator")
    stack.start_operator(settings={"SMSCHANNEL_OBSERVE_ONLY": "false"})
    stack.wait_gone(name_of(manifests[0]))
    assert webhook(stack, numbers[0]) == before[0]


def test_operator_is_alive_and_its_watch_fresh(stack: Stack) -> None:
    with urllib.request.urlopen(f"{stack.operator_url}/healthz", timeout=10) as answer:  # noqa: S310  (loopback)
        assert answer.status == 200
    assert 0 < metric(stack, "smschannel_watch_age_seconds") < 300
    assert metric(stack, "smschannel_resync_failures_total") == 0
