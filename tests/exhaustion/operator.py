"""What large objects of tenants cost the operator: its peak memory from its start until everything is listed."""

from __future__ import annotations

import base64
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import sleep
from typing import Any

from kubernetes import client

from deploy.local.stack import CHANNELS, Options, Stack
from smschannel.api.resource import CREDENTIALS_LABEL, GROUP, PLURAL, VERSION

OBJECTS = 200
SECRET_BYTES = 1_000_000
ANNOTATION_BYTES = 250_000
_SETTLED_SECONDS = 10  # after it is ready: kopf's first lists, and the reconciles that they cause


@dataclass(frozen=True)
class Peak:
    """`peak` is the most resident memory of the operator's process, in MB."""

    name: str
    peak: float


def secrets(stack: Stack) -> None:
    """Create labelled Secrets of 1 MB."""
    core = client.CoreV1Api(stack.api.client)
    content = base64.b64encode(b"x" * SECRET_BYTES).decode()

    def one(number: int) -> None:
        meta = client.V1ObjectMeta(name=f"large-{number}", labels={CREDENTIALS_LABEL: "true"})
        core.create_namespaced_secret(CHANNELS, client.V1Secret(metadata=meta, data={"token": content}))

    _each(one)


def annotated_channels(stack: Stack) -> None:
    """Create channels with annotations of 250 KB, whose numbers are not in the account: each start reconciles them."""
    channels = client.CustomObjectsApi(stack.api.client)

    def one(number: int) -> None:
        manifest = stack.manifest(f"+6149999{number:04d}")
        manifest["metadata"]["annotations"] = {"example.com/note": "x" * ANNOTATION_BYTES}
        channels.create_namespaced_custom_object(GROUP, VERSION, CHANNELS, PLURAL, manifest)

    _each(one)


def _each(one: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(OBJECTS)))


def measure(operator: Path) -> Iterator[Peak]:
    """Yield the peak memory of the operator of a checkout (its root): without objects, and with large ones."""
    with _stack(operator) as stack:
        yield Peak("nothing", _restarted(stack, operator))
        secrets(stack)
        yield Peak(f"{OBJECTS} labelled Secrets of 1 MB", _restarted(stack, operator))
    with _stack(operator) as stack:
        annotated_channels(stack)
        yield Peak(f"{OBJECTS} channels with 250 KB annotations", _restarted(stack, operator))


@contextmanager
def _stack(operator: Path) -> Iterator[Stack]:
    """Run a cluster and a twin. The operator ran once: so there is a public key."""
    with tempfile.TemporaryDirectory(prefix="smschannel-exhaustion-") as home:
        stack = Stack(Path(home), Options(numbers=1))
        stack.logs.mkdir(parents=True)
        try:
            stack.start_control_plane()
            stack.install()
            stack.start_twin()
            _restarted(stack, operator, seconds=0)
            yield stack
        finally:
            stack.stop()


def _restarted(stack: Stack, operator: Path, seconds: float = _SETTLED_SECONDS) -> float:
    """Start the operator, let it take in what is there, and stop it. Return its peak memory in MB."""
    stack.start_operator(settings={"PYTHONPATH": str(operator / "operator")})
    sleep(seconds)
    process = stack.process("operator")
    assert str(operator) in json.dumps(process.environ()), "it must be the operator that was asked for"
    status: dict[str, Any] = dict(
        line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
    )
    stack.stop_process("operator")
    return int(status["VmHWM"].split()[0]) / 1024
