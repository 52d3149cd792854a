"""The REST API over the network: real shim under its own ServiceAccount, real API server, real operator."""

from __future__ import annotations

import base64
import functools
import json
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from kubernetes import client

from deploy.local.stack import AUDIENCE, CHANNELS, OPERATOR, Stack
from tests.contract.test_rest import NOT_CONFIGURED

Numbers = Callable[[int], list[str]]
MERGE = "application/merge-patch+json"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Any
    body: Any


class Rest:
    """A client that sends the given headers and body, and adds only the API key and the media type of JSON."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack

    def __call__(self, method: str, instance: str, body: Any = None, **headers: str) -> Answer:
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        sent = {"X-Api-Key": self.stack.api_key, **{name.replace("_", "-"): each for name, each in headers.items()}}
        if content is not None:
            sent = {"Content-Type": "application/json", **sent}
        url = f"{self.stack.api_url}/v1/instances/{instance}/channels/sms"
        request = urllib.request.Request(  # noqa: S310
            url, content, {name: each for name, each in sent.items() if each}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
                return self._answer(response)
        except urllib.error.HTTPError as error:
            with error:
                return self._answer(error)

    @staticmethod
    def _answer(response: Any) -> Answer:
        content = response.read()
        return Answer(response.status, response.headers, json.loads(content) if content else None)

    def setup(self, phone_number: str) -> dict[str, str]:
        twin = self.stack.twin
        return {
            "account_sid": twin["account_sid"],
            "auth_token": twin["auth_token"],
            "phone_number": phone_number,
        }


@pytest.fixture
def rest(stack: Stack) -> Rest:
    return Rest(stack)


@pytest.fixture
def instance() -> str:
    return str(uuid.uuid4())


@pytest.fixture
def twilio_unavailable(stack: Stack) -> Iterator[None]:
    """Make Twilio unavailable, so that no new channel settles."""
    stack.twin_call("POST", "/faults", {"match": {}, "action": {"kind": "status", "status": 503, "code": 20503}})
    yield
    stack.twin_call("DELETE", "/faults")


def resource(stack: Stack, instance: str) -> Any:
    return stack.channels.get(name=instance, namespace=CHANNELS).to_dict()


def patch(stack: Stack, instance: str, body: Any, manager: str = "tests") -> None:
    stack.channels.patch(name=instance, namespace=CHANNELS, body=body, content_type=MERGE, field_manager=manager)


def webhook(stack: Stack, instance: str) -> str:
    return stack.options.webhook_url_template.format(namespace=CHANNELS, instance_id=instance)


# -- the three calls -----------------------------------------------------------------------------------------


def test_channel_lifecycle(stack: Stack, rest: Rest, number: str, instance: str) -> None:
    assert (rest("GET", instance).status, rest("GET", instance).body) == (200, NOT_CONFIGURED)

    created = rest("POST", instance, rest.setup(number), Prefer="wait=30")
    active = {
        "enabled": True,
        "phone_number": number,
        "status": "active",
        "webhook_url": webhook(stack, instance),
    }
    assert (created.status, created.body) == (201, active)
    assert created.headers["Preference-Applied"] == "wait=30"
    assert rest("GET", instance).body == active
    assert stack.number(number)["sms_url"] == active["webhook_url"]

    assert rest("DELETE", instance, Prefer="wait=30").status == 204
    assert rest("GET", instance).body == NOT_CONFIGURED
    assert stack.number(number)["sms_url"] == f"https://before.example.com/{number[1:]}"
    assert rest("DELETE", instance).status == 204, "also without a channel"


def test_answer_without_wait_is_pending(stack: Stack, rest: Rest, number: str, instance: str) -> None:
    created = rest("POST", instance, rest.setup(number))
    assert (created.status, created.body) == (
        201,
        {"enabled": True, "phone_number": number, "status": "pending", "webhook_url": None},
    )
    assert "Preference-Applied" not in created.headers
    stack.wait_ready(instance)
    assert rest("GET", instance).body["status"] == "active"
    assert rest("DELETE", instance).status == 204
    stack.wait_gone(instance)


def test_every_form_of_the_uuid_is_the_same_channel(rest: Rest, number: str, instance: str) -> None:
    rest("POST", instance.upper(), rest.setup(number), Prefer="wait=30")
    for written in (instance, instance.replace("-", ""), f"%7B{instance}%7D", f"urn:uuid:{instance}"):
        assert rest("GET", written).body["status"] == "active"


def test_shim_writes_its_fields_only(stack: Stack, rest: Rest, number: str, instance: str) -> None:
    rest("POST", instance, rest.setup(number))
    channel = resource(stack, instance)
    assert set(channel["spec"]) >= {"accountSid", "phoneNumber", "credentials"}
    assert channel["metadata"]["labels"] == {"app.kubernetes.io/created-by": "sms-api-shim"}
    assert channel["metadata"]["finalizers"] == ["channels.hydracore.io/restore"]
    assert stack.twin["auth_token"] not in json.dumps(channel)
    (owner,) = [each["manager"] for each in channel["metadata"]["managedFields"] if "f:spec" in each["fieldsV1"]]
    assert owner == "sms-api-shim"


def test_repeated_post_changes_nothing(stack: Stack, rest: Rest, number: str, instance: str) -> None:
    rest("POST", instance, rest.setup(number), Prefer="wait=30")
    before = resource(stack, instance)["metadata"]
    stack.twin_call("DELETE", "/journal")
    again = rest("POST", instance, rest.setup(number), Prefer="wait=30")
    assert (again.status, again.body["status"]) == (200, "active")
    after = resource(stack, instance)["metadata"]
    assert after["uid"] == before["uid"]
    assert after["labels"] == before["labels"]
    (ours,) = [each["fieldsV1"] for each in after["managedFields"] if each["manager"] == "sms-api-shim"]
    assert "f:finalizers" in ours["f:metadata"], "an apply removes what it leaves out"
    assert stack.number(number)["sms_url"] == webhook(stack, instance)
    assert "POST number" not in stack.twin_call("GET", "/journal")["counts"], "nothing is written to Twilio"


def test_post_changes_the_number(stack: Stack, rest: Rest, numbers: Numbers, instance: str) -> None:
    old, new = numbers(2)
    rest("POST", instance, rest.setup(old), Prefer="wait=30")
    changed = rest("POST", instance, rest.setup(new), Prefer="wait=30")
    assert (changed.status, changed.body["phone_number"], changed.body["status"]) == (200, new, "active")
    assert stack.number(new)["sms_url"] == webhook(stack, instance)
    assert stack.number(old)["sms_url"] == f"https://before.example.com/{old[1:]}"


def test_wrong_token_is_a_status_and_not_an_error(rest: Rest, number: str, instance: str) -> None:
    setup = {**rest.setup(number), "auth_token": "0" * 32}
    answer = rest("POST", instance, setup, Prefer="wait=30")
    assert (answer.status, answer.body["status"], answer.body["enabled"]) == (201, "authentication_failed", True)
    assert rest("POST", instance, rest.setup(number), Prefer="wait=30").body["status"] == "active"


def test_unknown_number_is_a_status_and_not_an_error(rest: Rest, instance: str) -> None:
    answer = rest("POST", instance, rest.setup("+19995550123"), Prefer="wait=30")
    assert (answer.status, answer.body["status"]) == (201, "number_not_found")


@pytest.mark.usefixtures("twilio_unavailable")
def test_wait_ends_after_its_seconds(rest: Rest, number: str, instance: str) -> None:
    start = time.monotonic()
    answer = rest("POST", instance, rest.setup(number), Prefer="respond-async, wait=1")
    assert (answer.status, answer.body["status"]) == (201, "pending")
    assert answer.headers["Preference-Applied"] == "wait=1"
    assert 0.9 < time.monotonic() - start < 5


# -- concurrency ---------------------------------------------------------------------------------------------


def test_concurrent_posts_leave_one_complete_result(stack: Stack, rest: Rest, numbers: Numbers) -> None:
    for _ in range(4):
        instance = str(uuid.uuid4())
        setups = [rest.setup(number) for number in numbers(4)]
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(functools.partial(rest, "POST", instance), setups))
        statuses = sorted(each.status for each in answers)
        assert statuses.count(201) == 1, "one created it, the others changed it"
        assert set(statuses) <= {200, 201, 409}
        for setup, each in zip(setups, answers, strict=True):
            assert each.status == 409 or each.body["phone_number"] == setup["phone_number"]
        stack.wait_ready(instance)
        final = rest("GET", instance).body
        assert final["status"] == "active"
        claimed = [setup["phone_number"] for setup in setups if webhook_of(stack, setup) == webhook(stack, instance)]
        assert claimed == [final["phone_number"]]


def webhook_of(stack: Stack, setup: dict[str, str]) -> str:
    return str(stack.number(setup["phone_number"])["sms_url"])


def test_many_requests_wait_at_once(stack: Stack, rest: Rest, numbers: Numbers) -> None:
    with ThreadPoolExecutor(20) as pool:
        answers = list(
            pool.map(lambda number: rest("POST", str(uuid.uuid4()), rest.setup(number), Prefer="wait=30"), numbers(20))
        )
    assert [(each.status, each.body["status"]) for each in answers] == [(201, "active")] * 20


@pytest.fixture
def removal_blocked(stack: Stack, rest: Rest, number: str, instance: str) -> Iterator[None]:
    """A channel with a foreign finalizer, so that its removal waits for `remove_foreign_finalizer`."""
    rest("POST", instance, rest.setup(number), Prefer="wait=30")
    finalizers = resource(stack, instance)["metadata"]["finalizers"]
    patch(stack, instance, {"metadata": {"finalizers": [*finalizers, "example.com/hold"]}})
    yield
    remove_foreign_finalizer(stack, instance)


def remove_foreign_finalizer(stack: Stack, instance: str) -> None:
    try:
        kept = [each for each in resource(stack, instance)["metadata"].get("finalizers", []) if "example" not in each]
        patch(stack, instance, {"metadata": {"finalizers": kept}})
    except client.ApiException as error:
        assert error.status == 404  # noqa: PT017


@pytest.mark.usefixtures("removal_blocked")
def test_calls_during_removal(stack: Stack, rest: Rest, number: str, instance: str) -> None:
    assert rest("DELETE", instance, Prefer="wait=1").status == 202
    shown = rest("GET", instance).body
    assert (shown["status"], shown["enabled"], shown["phone_number"]) == ("removing", False, number)
    answer = rest("POST", instance, rest.setup(number))
    assert (answer.status, answer.headers["Retry-After"]) == (409, "5")
    assert "being removed" in answer.body["detail"]
    assert rest("DELETE", instance).status == 204

    with ThreadPoolExecutor(1) as pool:
        follows = pool.submit(rest, "POST", instance, rest.setup(number), Prefer="wait=30")
        time.sleep(0.5)
        remove_foreign_finalizer(stack, instance)
        answer = follows.result()
    assert (answer.status, answer.body["status"]) == (201, "active")


# -- ownership -----------------------------------------------------------------------------------------------


def test_channel_of_kubectl_can_be_read_and_not_written(stack: Stack, rest: Rest, number: str) -> None:
    manifest = stack.manifest(number)
    instance = str(manifest["metadata"]["name"])
    stack.apply(manifest)
    stack.wait_ready(instance)
    assert rest("GET", instance).body["status"] == "active"
    version = resource(stack, instance)["metadata"]["resourceVersion"]
    for method, body in (("POST", rest.setup(number)), ("DELETE", None)):
        answer = rest(method, instance, body)
        assert answer.status == 409
        assert "managed in Kubernetes, by kubectl:" in answer.body["detail"]
        assert f"kubectl sms adopt {instance} --for rest -n {CHANNELS}" in answer.body["detail"]
    assert resource(stack, instance)["metadata"]["resourceVersion"] == version


@pytest.mark.parametrize(
    ("field", "value", "back"),
    [("suspend", True, False), ("driftPolicy", "Report", "Correct")],
    ids=["suspend", "policy"],
)
def test_other_fields_of_spec_may_belong_to_anybody(
    stack: Stack, rest: Rest, number: str, instance: str, field: str, value: Any, back: Any
) -> None:
    """On-call suspends a channel or changes a policy, and back: REST keeps that, and is not locked out."""
    rest("POST", instance, rest.setup(number), Prefer="wait=30")
    patch(stack, instance, {"spec": {field: value}}, manager="kubectl-patch")
    for each in (value, back):
        patch(stack, instance, {"spec": {field: each}}, manager="kubectl-edit")
        answer = rest("POST", instance, rest.setup(number), Prefer="wait=30")
        assert (answer.status, answer.body["enabled"]) == (200, each is not True)
        assert resource(stack, instance)["spec"][field] == each
    assert rest("DELETE", instance, Prefer="wait=30").status == 204


@pytest.mark.parametrize(
    "change", [{"phoneNumber": "+61400111999"}, {"credentials": {"sid": "SK" + "0" * 32}}], ids=["number", "login"]
)
def test_one_owned_field_of_another_manager_is_409(
    stack: Stack, rest: Rest, number: str, instance: str, change: Any
) -> None:
    """The answer names the owner and the command that hands the channel over."""
    rest("POST", instance, rest.setup(number), Prefer="wait=30")
    patch(stack, instance, {"spec": change}, manager="kubectl-edit")
    for method, body in (("POST", rest.setup(number)), ("DELETE", None)):
        answer = rest(method, instance, body)
        assert answer.status == 409
        assert "by kubectl-edit:" in answer.body["detail"]
        assert f"kubectl sms adopt {instance} --for rest -n {CHANNELS}" in answer.body["detail"]


def test_labels_annotations_and_status_do_not_make_an_owner(
    stack: Stack, rest: Rest, number: str, instance: str
) -> None:
    rest("POST", instance, rest.setup(number), Prefer="wait=30")
    patch(stack, instance, {"metadata": {"annotations": {"example.com/note": "x"}}}, manager="kubectl-annotate")
    assert rest("POST", instance, rest.setup(number), Prefer="wait=30").status == 200
    assert resource(stack, instance)["metadata"]["annotations"] == {"example.com/note": "x"}


# -- authentication and authorization ------------------------------------------------------------------------


def test_order_of_the_checks(stack: Stack, rest: Rest, instance: str) -> None:
    other_key = stack.make_api_key([str(uuid.uuid4())], ["get", "post", "delete"])
    wait_until(lambda: rest("GET", instance, X_Api_Key=other_key).status == 403)
    for headers, path, body, status in (
        ({"X_Api_Key": ""}, "nope", b"{", 401),
        ({"X_Api_Key": other_key}, "nope", b"{", 422),
        ({"X_Api_Key": other_key, "Content_Type": "text/plain"}, instance, b"{", 403),
        ({"Content_Type": "text/plain"}, instance, b"{", 415),
        ({}, instance, b"{", 422),
        ({}, instance, b" " * 70_000, 413),
    ):
        answer = rest("POST", path, body, **headers)
        assert answer.status == status
        assert set(answer.body) == {"detail"}
    assert rest("PUT", instance, {}).headers["Allow"] == "DELETE,GET,POST"


@pytest.mark.parametrize("sent_as", ["application/json; charset=utf-8", "Application/Vnd.api+JSON", "application/json"])
def test_json_media_types_are_accepted(rest: Rest, instance: str, sent_as: str) -> None:
    answer = rest("POST", instance, b"{}", Content_Type=sent_as)
    assert [each["loc"] for each in answer.body["detail"]] == [
        ["body", "account_sid"],
        ["body", "auth_token"],
        ["body", "phone_number"],
    ]


def test_key_allows_its_verbs_and_instances_only(stack: Stack, rest: Rest, number: str, instance: str) -> None:
    reader = stack.make_api_key([instance], ["get"])
    wait_until(lambda: rest("GET", instance, X_Api_Key=reader).status == 200)
    assert rest("POST", instance, rest.setup(number), X_Api_Key=reader).status == 403
    assert rest("DELETE", instance, X_Api_Key=reader).status == 403
    other = str(uuid.uuid4())
    without = rest("GET", other, X_Api_Key=reader)
    rest("POST", other, rest.setup(number))
    assert without.status == 403
    assert rest("GET", other, X_Api_Key=reader).body == without.body, (
        "the answer does not reveal whether there is a channel"
    )


def test_revoked_key_stops_working_within_seconds(stack: Stack, rest: Rest, instance: str) -> None:
    key = stack.make_api_key(["*"], ["get"], key_id="revoked")
    wait_until(lambda: rest("GET", instance, X_Api_Key=key).status == 200)
    core = client.CoreV1Api(stack.api.client)
    core.patch_namespaced_secret("smschannel-api-keys", OPERATOR, {"data": {"revoked": None}})
    wait_until(lambda: rest("GET", instance, X_Api_Key=key).status == 401, seconds=3)
    assert rest("GET", instance).status == 200, "other keys still work"


def test_malformed_entry_disables_only_that_key(stack: Stack, rest: Rest, instance: str) -> None:
    core = client.CoreV1Api(stack.api.client)
    broken = base64.b64encode(b'{"sha256": "x"}').decode()
    core.patch_namespaced_secret("smschannel-api-keys", OPERATOR, {"data": {"broken": broken}})
    log = stack.logs / "shim.log"
    wait_until(lambda: '"key_id": "broken"' in log.read_text())
    assert rest("GET", instance).status == 200
    core.patch_namespaced_secret("smschannel-api-keys", OPERATOR, {"data": {"broken": None}})


def test_bearer_token_alone_is_enough(stack: Stack, rest: Rest, number: str, instance: str) -> None:
    headers = {"X_Api_Key": "", "Authorization": f"Bearer {stack.api_token}"}
    assert rest("GET", instance, **headers).body == NOT_CONFIGURED
    assert rest("POST", instance, rest.setup(number), Prefer="wait=30", **headers).status == 201
    assert rest("DELETE", instance, Prefer="wait=30", **headers).status == 204


def test_both_headers_must_be_valid(stack: Stack, rest: Rest, instance: str) -> None:
    bearer = f"Bearer {stack.api_token}"
    assert rest("GET", instance, Authorization=bearer).status == 200
    assert rest("GET", instance, Authorization=bearer[:-4] + "AAAA").status == 401
    assert rest("GET", instance, Authorization=bearer, X_Api_Key=stack.api_key[:-1] + "!").status == 401


def test_token_for_another_audience_is_401(stack: Stack, rest: Rest, instance: str) -> None:
    for token in (service_token(stack, "sms-api-user", []), service_token(stack, "sms-api-user", ["another"])):
        assert rest("GET", instance, X_Api_Key="", Authorization=f"Bearer {token}").status == 401


def test_kubernetes_rbac_authorizes_bearer_tokens(stack: Stack, rest: Rest, number: str, instance: str) -> None:
    """A ServiceAccount that may create but not update, and get one instance only."""
    name = f"limited-{instance[:8]}"
    core, rbac = client.CoreV1Api(stack.api.client), client.RbacAuthorizationV1Api(stack.api.client)
    core.create_namespaced_service_account(CHANNELS, {"metadata": {"name": name}})  # type: ignore[arg-type]
    group = {"apiGroups": ["channels.hydracore.io"], "resources": ["smschannels"]}
    rules = [{**group, "verbs": ["create"]}, {**group, "verbs": ["get"], "resourceNames": [instance]}]
    rbac.create_namespaced_role(CHANNELS, {"metadata": {"name": name}, "rules": rules})  # type: ignore[arg-type]
    binding = {
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": CHANNELS}],
    }
    rbac.create_namespaced_role_binding(CHANNELS, binding)  # type: ignore[arg-type]
    headers = {"X_Api_Key": "", "Authorization": f"Bearer {service_token(stack, name, [AUDIENCE])}"}
    time.sleep(1)  # the API server's authorizer follows bindings with a watch
    assert rest("GET", instance, **headers).status == 200
    assert rest("GET", str(uuid.uuid4()), **headers).status == 403
    answer = rest("POST", instance, rest.setup(number), **headers)
    assert answer.status == 403
    assert "create and update smschannels" in answer.body["detail"]
    assert rest("DELETE", instance, **headers).status == 403


def service_token(stack: Stack, account: str, audiences: list[str]) -> str:
    spec = client.V1TokenRequestSpec(audiences=audiences, expiration_seconds=3600)
    answer = client.CoreV1Api(stack.api.client).create_namespaced_service_account_token(
        account, CHANNELS, client.AuthenticationV1TokenRequest(spec=spec)
    )
    assert answer.status
    return str(answer.status.token)


# -- the process ---------------------------------------------------------------------------------------------


def test_every_write_is_logged_with_its_caller_and_without_secrets(
    stack: Stack, rest: Rest, number: str, instance: str
) -> None:
    rest("POST", instance, rest.setup(number), X_Request_Id="find-me-1", Authorization=f"Bearer {stack.api_token}")
    log = (stack.logs / "shim.log").read_text()
    (line,) = [json.loads(each) for each in log.splitlines() if "find-me-1" in each]
    key_id = stack.api_key.split("_")[1]
    assert line["caller"] == f"api-key:{key_id} user:system:serviceaccount:{CHANNELS}:sms-api-user"
    assert (line["method"], line["namespace"], line["name"], line["status"]) == ("POST", CHANNELS, instance, 201)
    for secret in (stack.twin["auth_token"], stack.api_key, stack.api_token):
        assert secret not in log


@pytest.mark.usefixtures("twilio_unavailable")
def test_sigterm_answers_waiting_requests(stack: Stack, rest: Rest, number: str, instance: str) -> None:
    try:
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(rest, "POST", instance, rest.setup(number), Prefer="wait=50")
            wait_until(lambda: rest("GET", instance).body["status"] == "pending")
            start = time.monotonic()
            assert stack.stop_process("shim") == 0
            answer = waiting.result()
        assert time.monotonic() - start < 5
        assert (answer.status, answer.body["status"]) == (201, "pending")
    finally:
        stack.start_shim()


def wait_until(fulfilled: Callable[[], bool], seconds: float = 10) -> None:
    """Wait until `fulfilled()` is true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while not fulfilled():
        assert time.monotonic() < end, f"not fulfilled after {seconds} s"
        time.sleep(0.05)
