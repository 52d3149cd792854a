"""Draws the dashboard with data: `make dashboard` plays minutes of an operator's life and asks a real Prometheus.

Grafana is not needed: the panels, their queries and their units are those of `dashboard.json`, drawn as an SVG.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlencode

from deploy.build import BuildError, Narrator
from deploy.local.stack import ROOT, Options, Stack, StackError, call, free_port
from deploy.monitoring.build import PROMETHEUS
from deploy.monitoring.dashboard import DASHBOARD
from deploy.monitoring.drawing import Series, draw

PICTURE = ROOT / "docs/site/dashboard.svg"
_SETTINGS = {
    "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "15",
    "SMSCHANNEL_RETRY_CEILING_SECONDS": "5",
    "SMSCHANNEL_DELETION_GRACE_SECONDS": "5",
}
_NUMBERS = 40
_VARIABLES = {"$__rate_interval": "20s", "[5m]": "[60s]", "$namespace": "sms-operator"}  # for so short a time
_STEP = 2  # seconds


def play(stack: Stack, say: Narrator) -> None:
    """Create channels, call the REST API, let Twilio fail, change webhooks as others would, delete some channels."""
    numbers = stack.twin["phone_numbers"]
    manifests = [stack.manifest(each) for each in numbers]
    names = [each["metadata"]["name"] for each in manifests]
    wrong = {**stack.twin, "auth_token": "0" * 32}
    say("Channels are created")
    for start in range(0, 24, 8):
        stack.apply(*manifests[start : start + 8])
        _pass(stack, names[:8], 8)
    say("Some have a wrong token")
    stack.apply(*(stack.manifest(each, account=wrong) for each in numbers[24:28]))
    _pass(stack, names, 20)
    say("Twilio fails")
    stack.twin_call("POST", "/faults", {"match": {"path": "IncomingPhoneNumbers"}, "action": {"kind": "status"}})
    stack.apply(*manifests[28:32])
    _pass(stack, names, 20)
    stack.twin_call("DELETE", "/faults")
    say("Webhooks are changed by others")
    for each in numbers[:6]:
        stack.twin_call("PATCH", f"/numbers/{each}", {"sms_url": "https://drift.example.com/"})
    _pass(stack, names, 30)
    say("Channels are deleted")
    stack.delete(*names[:10])
    _pass(stack, names, 30)


def _pass(stack: Stack, names: list[str], seconds: float) -> None:
    """Read channels by REST for so long, some of which do not exist."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for name in names:
            stack.rest("GET", name)
        time.sleep(0.5)


@contextmanager
def prometheus(home: Path, stack: Stack) -> Iterator[str]:
    """Run a Prometheus that reads operator and shim every second; yields its URL."""
    targets = {"sms-channel-operator-7d9c5b-x2x8q": stack.operator_url, "sms-api-shim-6b8f9d-k4tzn": stack.api_url}
    jobs = [
        {
            "job_name": pod,
            "static_configs": [
                {"targets": [url.removeprefix("http://")], "labels": {"namespace": "sms-operator", "pod": pod}}
            ],
        }
        for pod, url in targets.items()
    ]
    configuration = {"global": {"scrape_interval": "1s", "scrape_timeout": "1s"}, "scrape_configs": jobs}
    (home / "prometheus.json").write_text(json.dumps(configuration))
    address = f"127.0.0.1:{free_port()}"
    program = str(PROMETHEUS.ensure(Narrator(sys.stdout)))
    command = [program, "--config.file=prometheus.json", "--storage.tsdb.path=data", f"--web.listen-address={address}"]
    with (home / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, cwd=home, stdout=log, stderr=log)
    try:
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait()


def ask(url: str, query: str, start: float, end: float) -> list[dict[str, Any]]:
    """Return the series of a PromQL query from `start` to `end`, in Prometheus's own form."""
    for variable, value in _VARIABLES.items():
        query = query.replace(variable, value)
    asked = urlencode({"query": query, "start": start, "end": end, "step": _STEP})
    status, answer = call("GET", f"{url}/api/v1/query_range?{asked}")
    if status != 200:
        raise StackError(f"Prometheus answers {status} to {query}: {answer}")
    found: list[dict[str, Any]] = answer["data"]["result"]
    return found


def series(url: str, panel: dict[str, Any], start: float, end: float) -> list[Series]:
    """Return what a panel of the dashboard shows."""
    shown = []
    for target in panel["targets"]:
        for each in ask(url, target["expr"], start, end):
            legend = target["legendFormat"]
            for label, value in each["metric"].items():
                legend = legend.replace(f"{{{{{label}}}}}", value)
            shown.append(Series(legend, tuple((at - start, float(value)) for at, value in each["values"])))
    return shown


def main() -> None:
    """Play the story and write the picture."""
    say = Narrator(sys.stdout)
    options = Options(numbers=_NUMBERS, operator_settings=_SETTINGS)
    with (
        TemporaryDirectory() as folder,
        Stack(Path(folder), options, say) as stack,
        prometheus(Path(folder), stack) as url,
    ):
        start = time.time()
        play(stack, say)
        end = time.time()
        panels = json.loads(DASHBOARD.read_text())["panels"]
        PICTURE.write_text(draw([(each, series(url, each, start, end)) for each in panels], end - start))
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    try:
        main()
    except (BuildError, StackError) as error:
        sys.exit(str(error))
