"""A client of the REST API in a pod: `client.py METHOD INSTANCE` makes one request, `client.py load INSTANCE...` many.

The key is in API_KEY. `load` reads the instances in turn, over a new connection each time, until its standard input
ends; then it prints how many requests it made, the slowest one in seconds, and what failed. Standard library only.
"""

import http.client
import json
import os
import socket
import ssl
import sys
import threading
import time
from functools import cache
from itertools import cycle

HOST = "sms-api-shim.sms-operator.svc"
PAUSE_SECONDS = 0.05
# A Service's address does not change. A drain moves the cluster's DNS as well, which does not answer for a moment.
socket.getaddrinfo = cache(socket.getaddrinfo)
TLS = ssl.create_default_context(cafile="/client/ca.crt")


def request(method: str, instance: str, body: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPSConnection(HOST, timeout=30, context=TLS)
    headers = {"X-Api-Key": os.environ["API_KEY"], "Content-Type": "application/json"}
    try:
        connection.request(method, f"/v1/instances/{instance}/channels/sms", body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def load(instances: list[str]) -> dict[str, object]:
    stop = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    made, slowest, failed, began = 0, 0.0, [], time.monotonic()
    for instance in cycle(instances):
        started = time.monotonic()
        try:
            status, body = request("GET", instance)
            problem = "" if status == 200 else f"{status} {body[:200]}"
        except (OSError, http.client.HTTPException) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            failed.append(f"begun at {started - began:.1f} s, ended at {time.monotonic() - began:.1f} s: {problem}")
        made, slowest = made + 1, max(slowest, time.monotonic() - started)
        if made == 1:
            print("started", flush=True)
        if stop.wait(PAUSE_SECONDS):
            return {"requests": made, "slowest": round(slowest, 2), "failed": failed}
    raise AssertionError("there are no instances")


if __name__ == "__main__":
    what, *names = sys.argv[1:]
    if what == "load":
        print(json.dumps(load(names)))
    else:
        print(json.dumps(request(what, names[0], None if what == "GET" else sys.stdin.read() or None)))
