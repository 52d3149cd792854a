"""One running product per test worker: control plane, twin, operator and shim as real processes."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from kubernetes import client, watch

from deploy.build import Narrator
from deploy.local.stack import Options, Stack
from smschannel.api.resource import GROUP, PLURAL, VERSION
from smschannel.core.conditions import violations

_FIRST_OF_ACCOUNT = itertools.count(61_490_000_000, 100)


_UNCACHED = {"cache_logger_on_first_use": False}
_LONGEST_FIRST = ("faults", "cluster")
"""The folders whose files take minutes: a worker that began one last would keep the others waiting."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folders = {name: rank for rank, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: folders.get(item.path.parent.name, len(folders)))


@pytest.fixture(autouse=True)
def _logging_stays_with_its_test(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program that runs in the test's own process configures structlog, whose loggers would keep that for good."""
    configure = structlog.configure
    monkeypatch.setattr(structlog, "configure", lambda **given: configure(**{**given, **_UNCACHED}))
    yield
    structlog.reset_defaults()


@contextmanager
def running(home: Path, options: Options) -> Iterator[Stack]:
    """Start a stack. At its end Twilio must have seen no write to anything but SmsUrl and SmsMethod."""
    with Stack(home, options, Narrator(sys.stderr)) as started:
        started.fresh_numbers = itertools.count()  # type: ignore[attr-defined]
        yield started
        assert started.twin_call("GET", "/violations")["violations"] == [], "only SmsUrl and SmsMethod are ever written"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack that most tests share. Retries come after seconds; drift checks and resyncs do not come at all."""
    options = Options(
        numbers=400,
        more_namespaces=("team-b", "team-c"),
        webhook_url_template="https://sms.example.com/{namespace}/instances/{instance_id}/channels/sms/webhook",
        operator_settings={
            "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "3600",
            "SMSCHANNEL_SLOW_INTERVAL_SECONDS": "3600",
            "SMSCHANNEL_RETRY_FLOOR_SECONDS": "0.2",
            "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
            "SMSCHANNEL_DELETION_GRACE_SECONDS": "2",
        },
        shim_settings={"SMSSHIM_AUTHENTICATION_FAILURES_PER_MINUTE": "100000"},  # tests fail to log in on purpose
    )
    with running(tmp_path_factory.mktemp("stack"), options) as started, every_status_checked(started):
        yield started


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """An API server with everything of `deploy/manifests` applied that needs no pods, and no process beside it."""
    stack = Stack(tmp_path_factory.mktemp("installed"))
    try:
        stack.start_control_plane()
        stack.install()
        yield stack
    finally:
        stack.stop()


@pytest.fixture
def number(stack: Stack) -> str:
    """A number that no other test uses. It points at `steps.before(number)`."""
    return take_number(stack)


@pytest.fixture
def numbers(stack: Stack) -> Callable[[int], list[str]]:
    return lambda count: [take_number(stack) for _ in range(count)]


@pytest.fixture
def account(stack: Stack) -> dict[str, Any]:
    """A Twilio account that no other test uses, with three numbers: nothing is cached of it."""
    seeded = stack.twin_call("POST", "/seed", {"accounts": 1, "numbers": 3, "first": f"+{next(_FIRST_OF_ACCOUNT)}"})
    return dict(seeded["accounts"][0])


def take_number(stack: Stack) -> str:
    phone_number: str = stack.twin["phone_numbers"][next(stack.fresh_numbers)]  # type: ignore[attr-defined]
    stack.twin_call("PATCH", f"/numbers/{phone_number}", {"sms_url": f"https://before.example.com/{phone_number[1:]}"})
    return phone_number


@pytest.fixture(autouse=True)
def _no_faults_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "stack" in request.fixturenames:
        request.getfixturevalue("stack").twin_call("DELETE", "/faults")


@contextmanager
def every_status_checked(stack: Stack) -> Iterator[None]:
    """Follow all channels of the cluster: each written status must be a valid successor of the last."""
    broken: list[str] = []
    over = threading.Event()
    lists, watching = client.CustomObjectsApi(stack.api.client), watch.Watch()  # in this thread: it reads $KUBECONFIG

    def follow() -> None:
        before: dict[str, dict[str, Any]] = {}
        while not over.is_set():
            for event in watching.stream(
                lists.list_cluster_custom_object, GROUP, VERSION, PLURAL, timeout_seconds=1, _request_timeout=30
            ):
                channel = event["object"]
                uid, status = channel["metadata"]["uid"], channel.get("status", {})
                if "conditions" in status:
                    wrong = violations(before.get(uid, {}), status)
                    broken.extend(f"{each}: {before.get(uid)} -> {status}" for each in wrong)
                    before[uid] = status

    following = threading.Thread(target=follow, name="check every status")
    following.start()
    try:
        yield
    finally:
        over.set()
        following.join(60)
    assert not broken, "\n".join(broken)


def check_status(status: dict[str, Any]) -> None:
    """Fail if the status breaks a rule that holds for all of them."""
    assert violations({}, status) == []
