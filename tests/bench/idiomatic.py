"""An SMS channel operator written as kopf's documentation recommends. `python -m tests.bench.idiomatic`.

Handlers are plain functions in kopf's thread pool. They use the API classes of the kubernetes package, and
twilio-python; finalizer, progress and Events are kopf's. It does only what the benchmark measures: no crash safety,
drift checks, conflicts, token rotation or rate limits.
"""

from __future__ import annotations

import base64
import logging
import os
from datetime import UTC, datetime
from typing import Any

import kopf
from kubernetes import client, config
from requests.adapters import HTTPAdapter
from twilio.http.http_client import TwilioHttpClient
from twilio.rest import Client

from smschannel.api.sealing import Binding, Keyring

CHANNELS, OPERATOR = "sms-channels", "sms-operator"
URL = "https://sms.example.com/v1/instances/{}/channels/sms/webhook"


class Transport(TwilioHttpClient):  # type: ignore[misc]  # twilio-python has no types
    def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        return super().request(method, url.replace("https://api.twilio.com", os.environ["TWILIO_URL"]), *args, **kwargs)


@kopf.on.startup()
def start(settings: kopf.OperatorSettings, memo: kopf.Memo, **_: Any) -> None:
    workers = settings.execution.max_workers = int(os.environ["WORKERS"])
    settings.persistence.finalizer = "channels.hydracore.io/idiomatic"
    configuration = client.Configuration()
    config.load_kube_config(client_configuration=configuration)
    configuration.connection_pool_maxsize = workers
    memo.core = client.CoreV1Api(client.ApiClient(configuration))
    memo.transport = Transport()
    memo.transport.session.mount("http://", HTTPAdapter(pool_maxsize=workers))
    keyring = memo.core.read_namespaced_secret("smschannel-keyring", OPERATOR)
    memo.keyring = Keyring.load(base64.b64decode(keyring.data["keyring"]).decode())


def find(memo: kopf.Memo, spec: kopf.Spec, name: str) -> Any:
    sid = spec["accountSid"]
    token = memo.keyring.unseal(spec["credentials"]["sealed"], Binding(CHANNELS, name, sid)).get_secret_value()
    twilio = Client(sid, token, http_client=memo.transport)
    [number] = twilio.incoming_phone_numbers.list(phone_number=spec["phoneNumber"])
    return number


@kopf.on.create("smschannels")
@kopf.on.update("smschannels", field="spec")
def configure(memo: kopf.Memo, spec: kopf.Spec, meta: kopf.Meta, patch: kopf.Patch, **_: Any) -> None:
    name, uid = str(meta["name"]), str(meta["uid"])
    number = find(memo, spec, name)
    record = client.V1Secret(
        metadata=client.V1ObjectMeta(name=uid), string_data={"url": number.sms_url, "method": number.sms_method}
    )
    try:
        memo.core.create_namespaced_secret(OPERATOR, record)
    except client.ApiException as error:
        if error.status != 409:
            raise
    number.update(sms_url=URL.format(name), sms_method="POST")
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Configured",
        "message": "Twilio delivers this number's messages to the instance's webhook.",
        "lastTransitionTime": datetime.now(UTC).isoformat(),
    }
    patch.status.update(observedGeneration=meta["generation"], phoneNumberSid=number.sid, conditions=[ready])


@kopf.on.delete("smschannels")
def restore(memo: kopf.Memo, spec: kopf.Spec, meta: kopf.Meta, **_: Any) -> None:
    uid = str(meta["uid"])
    record = memo.core.read_namespaced_secret(uid, OPERATOR).data
    url, method = (base64.b64decode(record[key]).decode() for key in ("url", "method"))
    find(memo, spec, str(meta["name"])).update(sms_url=url, sms_method=method)
    memo.core.delete_namespaced_secret(uid, OPERATOR)


if __name__ == "__main__":
    kopf.configure()
    logging.getLogger("twilio").setLevel(logging.WARNING)  # it prints every request and its headers
    kopf.run(namespaces=[CHANNELS], standalone=True)
