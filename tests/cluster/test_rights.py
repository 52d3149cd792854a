"""RBAC is exactly what is used: a proxy records what operator and shim ask of the API server through a whole story.

That they have enough is shown by every test of tests/cluster, which run under these rights. Here none is left over.
"""

from __future__ import annotations

import base64
import ssl
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import yaml
from aiohttp import web
from kubernetes import client

from deploy.local.cluster import write_kubeconfig
from deploy.local.stack import CHANNELS, MANIFESTS, OPERATOR, Options, Stack
from smschannel.api.names import PUBLIC_KEY_CONFIGMAP, SETTINGS_CONFIGMAP
from smschannel.core.record import RECORD_LABEL
from tests.cluster.steps import (
    apply_secret,
    before,
    delete,
    name_of,
    remove_finalizers,
    rotate_token,
    wait_event,
    wait_for,
    wait_reason,
    webhook,
)
from tests.cluster.test_shim import Rest
from tests.faults.proxy import Call, Proxy, Upstream
from tests.twin.faults import Rule


class Right(NamedTuple):
    """May `verb` the `resource` of an API `group`, in a `namespace` and with a `name`; empty: in or with any."""

    group: str
    resource: str
    verb: str
    namespace: str = ""
    name: str = ""


class Recorder(Proxy):
    """Notes which rights the answered requests to the API server needed."""

    def __init__(self, kubernetes: Upstream, twilio: Upstream) -> None:
        super().__init__(kubernetes=kubernetes, twilio=twilio)
        self.used: set[Right] = set()

    def _note(self, side: Any, request: web.Request, body: bytes) -> tuple[Call, Rule | None]:
        if side == "kubernetes":
            self.used.update(_rights_for(request))
        return super()._note(side, request, body)


def _rights_for(request: web.Request) -> Iterator[Right]:
    """Return what the API server's authorizer checks for a request; nothing for API discovery."""
    match request.path.strip("/").split("/"):
        case ["api", _, *rest] if rest:
            group = ""
        case ["apis", group, _, *rest] if rest:
            pass
        case _:
            return
    namespace = ""
    if rest[0] == "namespaces" and len(rest) > 2:
        _, namespace, *rest = rest
    resource, name, subresource = [*rest, "", ""][:3]
    resource = f"{resource}/{subresource}" if subresource else resource
    if not name and "fieldSelector" in request.query:
        name = request.query["fieldSelector"].removeprefix("metadata.name=")
    is_watch = request.query.get("watch") in {"true", "1"}
    reads = "watch" if is_watch else "get" if rest[1:] else "list"
    verb = {"GET": reads, "POST": "create", "PATCH": "patch", "DELETE": "delete", "PUT": "update"}[request.method]
    yield Right(group, resource, verb, namespace, name)
    if request.content_type == "application/apply-patch+yaml":
        yield Right(group, resource, "create", namespace)  # of an object that does not exist


def granted(account: str) -> Iterator[Right]:
    """Yield each right of a ServiceAccount, one by one."""
    objects = [each for file in ("operator-rbac.yaml", "shim-rbac.yaml") for each in _load(file)]
    roles = {
        (each["kind"], each["metadata"]["name"], each["metadata"].get("namespace")): each["rules"]
        for each in objects
        if "rules" in each
    }
    for binding in objects:
        if "roleRef" not in binding or account not in {each["name"] for each in binding["subjects"]}:
            continue
        namespace = binding["metadata"].get("namespace")
        kind = binding["roleRef"]["kind"]
        for rule in roles[kind, binding["roleRef"]["name"], namespace if kind == "Role" else None]:
            [group] = rule["apiGroups"]
            for resource in rule["resources"]:
                for verb in rule["verbs"]:
                    for name in rule.get("resourceNames", [""]):
                        yield Right(group, resource, verb, namespace or "", name)


def _load(file: str) -> list[Any]:
    return list(yaml.safe_load_all((MANIFESTS / file).read_text()))


def covers(right: Right, request: Right) -> bool:
    return right[:3] == request[:3] and right.namespace in {"", request.namespace} and right.name in {"", request.name}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Recorder]]:
    """A running product whose calls to the API server pass through a recorder."""
    options = Options(
        finalizer_policy=False,
        operator_settings={
            "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "1",
            "SMSCHANNEL_RESYNC_INTERVAL_SECONDS": "1",
            "SMSCHANNEL_RETRY_FLOOR_SECONDS": "0.2",
            "SMSCHANNEL_RETRY_CEILING_SECONDS": "1",
        },
    )
    stack = Stack(home := tmp_path_factory.mktemp("rights"), options)
    stack.logs.mkdir()
    try:
        stack.start_control_plane()
        stack.install()
        stack.start_twin()
        authority = base64.b64decode(stack.cluster.ca_data).decode()
        upstream = Upstream(stack.cluster.url, ssl.create_default_context(cadata=authority))
        with Recorder(upstream, Upstream(stack.twilio_url)) as recorder:
            for program in ("operator", "sms-api-shim"):
                _send_through(recorder, home / f"{program}.kubeconfig")
            stack.start_operator()
            stack.start_shim()
            yield stack, recorder
            stack.stop()
    finally:
        stack.stop()


def _send_through(recorder: Recorder, kubeconfig: Path) -> None:
    token = yaml.safe_load(kubeconfig.read_text())["users"][0]["user"]["token"]
    write_kubeconfig(kubeconfig, url=recorder.urls["kubernetes"], ca_data="", token=token, namespace=CHANNELS)


def test_no_right_is_unused(recorded: tuple[Stack, Recorder]) -> None:
    stack, recorder = recorded
    numbers = iter(stack.twin["phone_numbers"])
    _git_story(stack, next(numbers))
    _orphan_story(stack, next(numbers))
    _foreign_change_story(stack)
    _rest_story(stack, next(numbers))
    allowed = {each for account in ("sms-channel-operator", "sms-api-shim") for each in granted(account)}
    readable_by_all = set(granted("system:authenticated"))
    assert {each for each in allowed if not any(covers(each, used) for used in recorder.used)} == set()
    beyond = {used for used in recorder.used if not any(covers(each, used) for each in allowed | readable_by_all)}
    assert {each for each in beyond if each.verb != "create"} == set(), "of applied objects, most exist"


def _git_story(stack: Stack, number: str) -> None:
    """A channel with a token in a Secret: made, drifted twice, its token rotated, deleted."""
    account = stack.twin
    apply_secret(stack, "twilio", {"auth_token": account["auth_token"]})
    credentials = {"secretKeyRef": {"name": "twilio", "key": "auth_token"}}
    manifest = stack.manifest(number, credentials=credentials)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    mine = webhook(stack, number)
    for _ in range(2):
        stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": "https://drifted.example.com"})
        wait_for(lambda: webhook(stack, number) == mine, "the drift is corrected")
    wait_for(lambda: bool(wait_event(stack, name_of(manifest), "DriftCorrected").series), "one Event for both drifts")
    before_rotation = _record_versions(stack)
    account["auth_token"] = rotate_token(stack, account)
    apply_secret(stack, "twilio", {"auth_token": account["auth_token"]})
    wait_for(lambda: _record_versions(stack) != before_rotation, "the record has the new token")
    delete(stack, name_of(manifest))


def _record_versions(stack: Stack) -> dict[str, str]:
    found: Any = client.CoreV1Api(stack.api.client).list_namespaced_secret(
        OPERATOR, label_selector=f"{RECORD_LABEL}=true"
    )
    return {each.metadata.name: each.metadata.resource_version for each in found.items}


def _orphan_story(stack: Stack, number: str) -> None:
    """A channel that is gone with its finalizer while the operator is away: it must look before it restores."""
    stack.twin_call("PATCH", f"/numbers/{number}", {"sms_url": before(number)})
    manifest = stack.manifest(number)
    stack.apply(manifest)
    wait_reason(stack, name_of(manifest), "Configured")
    stack.stop_process("operator")
    remove_finalizers(stack, name_of(manifest))
    stack.delete(name_of(manifest))
    stack.start_operator()
    wait_for(lambda: webhook(stack, number) == before(number), "the number of the record is restored")


def _foreign_change_story(stack: Stack) -> None:
    """An administrator edits the operator's ConfigMaps, one of them twice."""
    core = client.CoreV1Api(stack.api.client)
    events = client.EventsV1Api(stack.api.client)
    for change in ("one", "two"):
        core.patch_namespaced_config_map(PUBLIC_KEY_CONFIGMAP, OPERATOR, {"data": {"fingerprint": change}})

        def corrected(change: str = change) -> bool:
            found: Any = core.read_namespaced_config_map(PUBLIC_KEY_CONFIGMAP, OPERATOR)
            return bool(found.data["fingerprint"] != change)

        wait_for(corrected, "the operator writes it again")
    core.patch_namespaced_config_map(SETTINGS_CONFIGMAP, OPERATOR, {"data": {"edited": "yes"}})
    wait_for(
        lambda: "edited" not in cast(Any, core.read_namespaced_config_map(SETTINGS_CONFIGMAP, OPERATOR)).data,
        "the operator writes its settings again",
    )
    found: Any = events.list_namespaced_event(OPERATOR)
    assert [each.series.count for each in found.items if each.regarding.name == PUBLIC_KEY_CONFIGMAP] == [2]


def _rest_story(stack: Stack, number: str) -> None:
    """A channel made, waited for and removed by REST, with an API key and with a bearer token."""
    rest, instance = Rest(stack), str(uuid.uuid4())
    body = rest.setup(number)
    assert rest("POST", instance, body, Prefer="wait=30").body["status"] == "active"
    bearer = {"X_Api_Key": "", "Authorization": f"Bearer {stack.api_token}"}
    assert rest("GET", instance, **bearer).status == 200
    assert rest("DELETE", instance, Prefer="wait=30").status == 204
