"""The Twilio twin in a pod: HTTPS for the operator, and the instances' webhook server on the pod's loopback.

Accounts are made with the control API (`/_twin/seed`), whose answer has their tokens. The log has what the webhook
server receives.
"""

import asyncio
import json
import signal
import ssl
import sys

from aiohttp import web

from tests.twin.app import create_app
from tests.twin.state import Twin

TWIN_PORT, WEBHOOK_PORT = 8443, 8080
CERTIFICATE, KEY = "/tls/tls.crt", "/tls/tls.key"


async def receive(request: web.Request) -> web.Response:
    """Print a message as one line of JSON: path, signature and form."""
    form = {name: str(value) for name, value in (await request.post()).items()}
    line = {"path": request.path, "signature": request.headers.get("X-Twilio-Signature"), "form": form}
    print(json.dumps({"received": line}), flush=True)
    return web.Response(status=204)


async def main() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    webhooks = web.Application()
    webhooks.router.add_post("/{path:.*}", receive)
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(CERTIFICATE, KEY)
    runners = [web.AppRunner(create_app(Twin()), access_log=None, handler_cancellation=True), web.AppRunner(webhooks)]
    for runner in runners:
        await runner.setup()
    await web.TCPSite(runners[0], "0.0.0.0", TWIN_PORT, ssl_context=tls).start()  # noqa: S104  (a pod's own network)
    await web.TCPSite(runners[1], "127.0.0.1", WEBHOOK_PORT).start()
    print(json.dumps({"listening": TWIN_PORT}), file=sys.stderr, flush=True)
    await stop.wait()
    for runner in runners:
        await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
