"""Several replicas of the shim, and a replica whose API server hangs or has no CRD."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import pytest

from deploy.local.stack import ROOT, Stack, call, free_port
from smschannel.api.resource import GROUP, PLURAL
from tests.cluster.test_shim import wait_until
from tests.contract.test_rest import NOT_CONFIGURED


class Replica:
    """Another shim process with the same API server and ServiceAccount."""

    def __init__(self, stack: Stack, port: int) -> None:
        self._stack = stack
        self._url = f"http://127.0.0.1:{port}"

    def get(self, path: str) -> tuple[int, Any]:
        try:
            return call("GET", f"{self._url}{path}")
        except ValueError:  # "ok" is not JSON
            return 200, None
        except OSError:
            return 0, None

    def rest(self, method: str, instance: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        url = f"{self._url}/v1/instances/{instance}/channels/sms"
        return call(method, url, body, {"X-Api-Key": self._stack.api_key, **headers})


@contextmanager
def replica(stack: Stack, **settings: str) -> Iterator[Replica]:
    port = free_port()
    environment = {
        **os.environ,
        "KUBECONFIG": str(stack.home / "sms-api-shim.kubeconfig"),
        "SMSSHIM_HTTP_PORT": str(port),
        "SMSSHIM_DRAIN_SECONDS": "0",
        **{f"SMSSHIM_{name.upper()}": value for name, value in settings.items()},
    }
    with (stack.logs / f"shim-{port}.log").open("ab") as log:
        process = subprocess.Popen([sys.executable, "-m", "api_shim"], cwd=ROOT, env=environment, stderr=log)
    try:
        new = Replica(stack, port)
        wait_until(lambda: new.get("/healthz")[0] == 200, seconds=30)
        yield new
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def impatient(stack: Stack) -> Iterator[Replica]:
    """A second shim, with a time limit of one second."""
    with replica(stack, request_seconds="1") as new:
        wait_until(lambda: new.get("/readyz")[0] == 200)
        yield new


def setup(stack: Stack, phone_number: str) -> dict[str, str]:
    twin = stack.twin
    return {"account_sid": twin["account_sid"], "auth_token": twin["auth_token"], "phone_number": phone_number}


def test_replicas_see_each_others_writes_at_once(
    stack: Stack, impatient: Replica, numbers: Callable[[int], list[str]]
) -> None:
    first, second = numbers(2)
    for _ in range(5):
        instance = str(uuid.uuid4())
        assert stack.rest("POST", instance, setup(stack, first))[0] == 201
        assert impatient.rest("GET", instance)[1]["phone_number"] == first
        assert impatient.rest("POST", instance, setup(stack, second))[0] == 200
        assert stack.rest("GET", instance)[1]["phone_number"] == second
        assert impatient.rest("DELETE", instance, Prefer="wait=30")[0] == 204
        assert stack.rest("GET", instance)[1] == NOT_CONFIGURED


def test_wait_sees_the_removal_by_another_replica(stack: Stack, impatient: Replica, number: str) -> None:
    """One replica deletes the channel while the other waits for the removal."""
    instance = str(uuid.uuid4())
    assert impatient.rest("POST", instance, setup(stack, number), Prefer="wait=30")[1]["status"] == "active"
    assert stack.rest("DELETE", instance)[0] == 204
    status, body = impatient.rest("POST", instance, setup(stack, number), Prefer="wait=30")
    assert (status, body["status"]) == (201, "active")
    stack.rest("DELETE", instance)


def test_hanging_api_server_is_503_without_partial_writes(stack: Stack, impatient: Replica, number: str) -> None:
    instance = str(uuid.uuid4())
    control_plane = psutil.Process(stack.pids()["controlplane"])
    control_plane.suspend()
    try:
        wait_until(lambda: impatient.get("/readyz")[0] == 503)  # its threads stop a moment later
        for method, body in (("GET", None), ("POST", setup(stack, number)), ("DELETE", None)):
            start = time.monotonic()
            status, answer = impatient.rest(method, instance, body)
            assert (status, answer["detail"]) == (503, "Kubernetes did not answer in time. Try again.")
            assert time.monotonic() - start < 3
        assert impatient.get("/healthz")[0] == 200
    finally:
        control_plane.resume()
    wait_until(lambda: impatient.get("/readyz")[0] == 200, seconds=30)
    wait_until(lambda: impatient.rest("GET", instance)[0] == 200, seconds=30)
    channel = impatient.rest("GET", instance)[1]
    assert channel == NOT_CONFIGURED or channel["phone_number"] == number, "the write was complete, or not made"
    assert impatient.rest("POST", instance, setup(stack, number), Prefer="wait=30")[1]["status"] == "active"
    assert impatient.rest("DELETE", instance, Prefer="wait=30")[0] == 204


def test_missing_crd_is_503_and_not_not_configured(installed: Stack) -> None:
    instance = str(uuid.uuid4())
    with replica(installed) as shim:
        wait_until(lambda: shim.rest("GET", instance)[0] == 200)
        assert shim.get("/readyz")[1] == {"detail": "The operator has not published its sealing key yet."}
        crds = installed.api.resources.get(api_version="apiextensions.k8s.io/v1", kind="CustomResourceDefinition")
        crds.delete(name=f"{PLURAL}.{GROUP}")
        wait_until(lambda: shim.rest("GET", instance)[0] == 503)
        for method, body in (("GET", None), ("DELETE", None)):
            status, answer = shim.rest(method, instance, body)
            assert status == 503
            assert "Kubernetes refuses this request" in answer["detail"]
        log = "".join(file.read_text() for file in installed.logs.glob("shim-*.log"))
        assert "is the CRD installed? kubectl apply -f crds/" in log
