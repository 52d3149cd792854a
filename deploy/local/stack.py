"""Everything at once on this machine: control plane, Twilio twin, operator and shim, as separate processes.

`make up`, `make demo`, `make bench` and the cluster tests all start it through `Stack`. Operator and shim run under
the ServiceAccounts and the RBAC of `deploy/manifests`, as they would in a cluster.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import yaml
from kubernetes import client, config, dynamic, watch
from pydantic import SecretStr
from tenacity import Retrying, retry_if_exception, retry_if_exception_type, stop_after_delay, wait_fixed

from deploy.build import Progress
from deploy.local.build import CONTROLPLANE
from deploy.local.cluster import Cluster, ControlPlane, write_kubeconfig
from smschannel.api.api_keys import make_key, secret_of
from smschannel.api.resource import API_VERSION, KIND
from smschannel.api.sealing import Binding, PublicKey
from smschannel.core.record import WebhookTemplate

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "deploy/manifests"
_ELSEWHERE = {"crd.yaml", "operator.yaml", "shim.yaml", "network-policies.yaml"}
"""What `Stack.install` does not apply: the CRD comes first, and there are no pods."""
CHANNELS, OPERATOR = "sms-channels", "sms-operator"
OPERATOR_ACCOUNT = "sms-channel-operator"
AUDIENCE = "sms-channels-api"
EXAMPLE_TEMPLATE = "https://sms.example.com/v1/instances/{instance_id}/channels/sms/webhook"
_YEAR = 365 * 24 * 3600


class StackError(Exception):
    """Something did not start or did not happen in time; the text says what, and where to look."""


class _NotYet(Exception):
    """The API server does not know yet what was installed just now."""

    status = 503


def _until_served() -> Retrying:
    """Retry what the API server does not serve yet: a new kind (404), or its admission policies (503)."""
    not_yet = retry_if_exception(lambda error: getattr(error, "status", None) in {404, 503})
    return Retrying(retry=not_yet, wait=wait_fixed(0.1), stop=stop_after_delay(60), reraise=True)


@dataclass(frozen=True)
class Options:
    """What differs between uses.

    `twilio_url` names a server that is already running; "real" is the real Twilio. `more_namespaces` are watched beside
    the default one: then the webhook URL template must contain {namespace}. `manifests` is what `deploy/manifests` is
    otherwise: the chart rendered with other values.
    """

    twilio_url: str | None = None
    webhook_url_template: str = EXAMPLE_TEMPLATE
    accounts: int = 1
    numbers: int = 40
    cluster_dir: Path | None = None
    finalizer_policy: bool = True
    more_namespaces: tuple[str, ...] = ()
    manifests: Path = MANIFESTS
    operator_settings: Mapping[str, str] = field(default_factory=dict)
    shim_settings: Mapping[str, str] = field(default_factory=dict)


def _no_progress(text: str, fraction: float | None = None, /) -> None:
    pass


class Stack:
    """`start` returns when everything is ready; `stop` stops exactly what was started."""

    def __init__(self, home: Path, options: Options = Options(), say: Progress = _no_progress) -> None:
        self.home = home
        self.options = options
        self.logs = home / "logs"
        self._say = say
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._control_plane: ControlPlane | None = None
        self.cluster: Cluster
        self.api: dynamic.DynamicClient
        self.api_key = ""
        self.api_token = ""
        self.twin: dict[str, Any] = {}
        self.operator_port = free_port()
        self.shim_port = free_port()

    @property
    def kubeconfig(self) -> Path:
        """The administrator's, with the channels' namespace as its default."""
        return self.home / "admin.kubeconfig"

    @property
    def api_url(self) -> str:
        return f"http://127.0.0.1:{self.shim_port}"

    @property
    def operator_url(self) -> str:
        return f"http://127.0.0.1:{self.operator_port}"

    @property
    def twilio_url(self) -> str:
        return str(self.twin.get("url") or self.options.twilio_url)

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.stop()
            raise

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> Self:
        self.logs.mkdir(parents=True, exist_ok=True)
        self.start_control_plane()
        self.install()
        if self.options.twilio_url is None:
            self.start_twin()
        self.start_operator()
        self.start_shim()
        return self

    def start_control_plane(self) -> None:
        binary = CONTROLPLANE.ensure(self._say)
        home = self.options.cluster_dir or self.home / "cluster"
        self._control_plane = ControlPlane(binary, home=home, log=self.logs / "controlplane.log")
        self.cluster = self._control_plane.start()
        configuration = client.Configuration()
        config.load_kube_config(str(self.cluster.kubeconfig), client_configuration=configuration)
        discovered = str(self.home / "discovery.json")
        self.api = dynamic.DynamicClient(client.ApiClient(configuration), cache_file=discovered)
        self._say(f"control plane  {self.cluster.url}")

    def restart_control_plane(self, meanwhile: Callable[[Path], object] = lambda etcd_dir: None) -> None:
        """Stop the control plane, call `meanwhile` with the database's directory, and start it again."""
        assert self._control_plane
        self._control_plane.stop()
        meanwhile(self.cluster.etcd_dir)
        self._control_plane.start()

    def install(self) -> None:
        """Apply the CRD, namespaces, RBAC and admission policies, and make credentials for the shim."""
        self.install_crd(wait_for_admission=False)
        names: list[str] = yaml.safe_load((self.options.manifests / "kustomization.yaml").read_text())["resources"]
        if self.options.finalizer_policy:
            names.append("finalizer-policy.yaml")
        for name in names:
            if name not in _ELSEWHERE:
                self._apply(yaml.safe_load_all((self.options.manifests / name).read_text()))
        for namespace in self.options.more_namespaces:
            self.add_namespace(namespace)
        self._wait_for_admission()
        write_kubeconfig(
            self.kubeconfig,
            url=self.cluster.url,
            ca_data=self.cluster.ca_data,
            token=self.cluster.token,
            namespace=CHANNELS,
        )
        self._apply(_api_user())
        if OPERATOR_ACCOUNT in self._deployments():  # with shards each operator is called otherwise
            self.make_pod("operator")
        self._write_kubeconfig("sms-api-shim", self._token("sms-api-shim", OPERATOR, []))
        self.api_token = self._token("sms-api-user", CHANNELS, [AUDIENCE])
        self.api_key = self.make_api_key(["*"], ["get", "post", "delete"])

    def install_crd(self, *, wait_for_admission: bool = True) -> None:
        self._apply(yaml.safe_load_all((self.options.manifests / "crd.yaml").read_text()))
        self._wait_for_crd()
        if wait_for_admission:
            self._wait_for_admission()

    def add_namespace(self, name: str) -> None:
        """Make a namespace for channels, with the RoleBinding that `deploy/manifests` has for the default one."""
        rbac = yaml.safe_load_all((self.options.manifests / "operator-rbac.yaml").read_text())
        [binding] = [
            each for each in rbac if each["kind"] == "RoleBinding" and each["metadata"]["namespace"] == CHANNELS
        ]
        binding["metadata"]["namespace"] = name
        self._apply([{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}, binding])

    def make_api_key(self, instances: list[str], verbs: list[str], key_id: str | None = None) -> str:
        """Make an API key as `kubectl sms key create` does; returns what clients send."""
        made = make_key(instances, verbs, key_id=key_id)
        self._apply([secret_of(made, OPERATOR)], field_manager=f"key-{made.key_id}")
        return made.key.get_secret_value()

    def start_twin(self) -> None:
        state = self.home / "twin.json"
        command = [sys.executable, "-m", "tests.twin", "--state", str(state)]
        command += ["--accounts", str(self.options.accounts), "--numbers", str(self.options.numbers)]
        process = self._spawn("twin", command, stdout=subprocess.PIPE)
        assert process.stdout
        with process.stdout:
            line = process.stdout.readline()
        if not line:
            raise StackError(f"the Twilio twin did not start: see {self.logs / 'twin.log'}")
        self.twin = {**json.loads(state.read_text()), "url": json.loads(line)["url"]}
        self._say(f"twilio twin    {self.twin['url']}")

    def make_pod(self, name: str, account: str = OPERATOR_ACCOUNT) -> Path:
        """Make the Pod of an operator, which no kubelet runs. Return a kubeconfig with a token that is bound to it.

        `account` is the ServiceAccount, which has the name of the Deployment.
        """
        core = client.CoreV1Api(self.api.client)
        spec = self._deployments()[account]["spec"]["template"]["spec"]
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": OPERATOR}, "spec": spec}
        self._apply([pod])
        meta = core.read_namespaced_pod(name, OPERATOR).metadata
        assert meta
        bound = client.V1BoundObjectReference(api_version="v1", kind="Pod", name=name, uid=meta.uid)
        return self._write_kubeconfig(name, self._token(account, OPERATOR, [], bound))

    def _deployments(self) -> dict[str, Any]:
        """The Deployments of the operators by name."""
        deployed = yaml.safe_load_all((self.options.manifests / "operator.yaml").read_text())
        return {each["metadata"]["name"]: each for each in deployed if each["kind"] == "Deployment"}

    def operator_kubeconfig(self, name: str = "operator") -> Path:
        """A kubeconfig with the operator's rights, as the Pod of this name; the Pod is made at the first call."""
        path = self.home / f"{name}.kubeconfig"
        return path if path.exists() else self.make_pod(name)

    def start_operator(
        self, name: str = "operator", port: int | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        """Start the operator; with another name and port, a second one that stands by. `settings` override the options.

        As in a cluster, a process that is started again is the same pod.
        """
        url = f"http://127.0.0.1:{port}" if port else self.operator_url
        environment = {
            "KUBECONFIG": str(self.operator_kubeconfig(name)),
            "SMSCHANNEL_WEBHOOK_URL_TEMPLATE": self.options.webhook_url_template,
            "SMSCHANNEL_HTTP_PORT": str(port or self.operator_port),
            "SMSCHANNEL_DRIFT_INTERVAL_SECONDS": "15",
            "SMSCHANNEL_CHANNEL_NAMESPACES": " ".join((CHANNELS, *self.options.more_namespaces)),
        }
        if self.options.twilio_url != "real":
            environment["SMSCHANNEL_TWILIO_URL"] = self.twilio_url
        environment |= {**self.options.operator_settings, **(settings or {})}
        self._spawn(name, [sys.executable, "-m", "smschannel"], environment)
        self._wait_ready(name, f"{url}/readyz")

    def start_shim(self) -> None:
        environment = {
            "KUBECONFIG": str(self.home / "sms-api-shim.kubeconfig"),
            "SMSSHIM_HTTP_PORT": str(self.shim_port),
            "SMSSHIM_DRAIN_SECONDS": "0",
            **self.options.shim_settings,
        }
        self._spawn("shim", [sys.executable, "-m", "api_shim"], environment)
        self._wait_ready("shim", f"{self.api_url}/readyz")

    def stop(self) -> None:
        for name in reversed(list(self._processes)):  # the twin is the first of them
            self.stop_process(name)
        if self._control_plane:
            self._control_plane.stop()
            self._control_plane = None

    def stop_process(self, name: str, *, kill: bool = False) -> int:
        """Send SIGTERM, or SIGKILL; returns the exit status."""
        process = self._processes.pop(name)
        process.kill() if kill else process.terminate()
        try:
            return process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def process(self, name: str) -> psutil.Process:
        return psutil.Process(self._processes[name].pid)

    def pids(self) -> dict[str, int]:
        assert self._control_plane
        return {name: each.pid for name, each in self._processes.items()} | {"controlplane": self._control_plane.pid}

    def environment(self) -> dict[str, str]:
        """What `.local/env` holds."""
        known = {
            "KUBECONFIG": str(self.kubeconfig),
            "CHANNEL_NAMESPACE": CHANNELS,
            "OPERATOR_NAMESPACE": OPERATOR,
            "API_URL": self.api_url,
            "API_KEY": self.api_key,
            "API_TOKEN": self.api_token,
            "WEBHOOK_URL_TEMPLATE": self.options.webhook_url_template,
            "METRICS_URL": f"{self.operator_url}/metrics",
        }
        if self.options.twilio_url != "real":
            known["TWILIO_URL"] = known["SMSCHANNEL_TWILIO_URL"] = self.twilio_url  # kubectl sms plan needs the second
        if self.twin:
            known["TWILIO_ACCOUNT_SID"] = self.twin["account_sid"]
            known["TWILIO_AUTH_TOKEN"] = self.twin["auth_token"]
            known["TWILIO_PHONE_NUMBERS"] = " ".join(self.twin["phone_numbers"])
        known["ETCD_DIR"] = str(self.cluster.etcd_dir)
        known["LOG_DIR"] = str(self.logs)
        return known

    def write_environment(self, path: Path) -> None:
        lines = [f"{name}='{value}'" for name, value in self.environment().items()]  # no value has a quote in it
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("\n".join(lines) + "\n")

    # For users, tests and the demo

    @property
    def channels(self) -> Any:
        return self.api.resources.get(api_version=API_VERSION, kind=KIND)

    def public_key(self) -> PublicKey:
        configmaps = self.api.resources.get(api_version="v1", kind="ConfigMap")
        return PublicKey.decode(configmaps.get(name="smschannel-sealing-key", namespace=OPERATOR).data["public-key"])

    def manifest(
        self,
        phone_number: str,
        *,
        name: str = "",
        namespace: str = CHANNELS,
        account: Mapping[str, Any] | None = None,
        **spec: Any,
    ) -> Any:
        """A manifest with the account's token sealed for it; `spec` replaces other fields."""
        account = account or self.twin
        name = name or str(uuid.uuid4())
        binding = Binding(namespace, name, account["account_sid"])
        sealed = self.public_key().seal(SecretStr(account["auth_token"]), binding)
        content = {
            "accountSid": account["account_sid"],
            "phoneNumber": phone_number,
            "credentials": {"sealed": sealed},
            **spec,
        }
        return {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": name, "namespace": namespace},
            "spec": content,
        }

    def apply(self, *manifests: Any) -> None:
        self._apply(manifests, field_manager="kubectl")

    def delete(self, *names: str, namespace: str = CHANNELS) -> None:
        for name in names:
            self.channels.delete(name=name, namespace=namespace)

    def wait_until(
        self,
        condition: Callable[[dict[str, Any]], bool],
        *names: str,
        namespace: str = CHANNELS,
        timeout: int = 60,
        enough: int | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Watch until all of `names`, or `enough` of them, fulfil the condition; returns them as they were then.

        Raises `StackError` after `timeout` seconds.
        """
        fulfilled: dict[str, dict[str, Any]] = {}
        latest: dict[str, dict[str, Any]] = {}
        listed = self.channels.get(namespace=namespace)  # a watch alone may begin with what was there before
        begin = ({"type": "ADDED", "raw_object": each} for each in listed.to_dict()["items"])
        version = listed.metadata.resourceVersion
        later = self.channels.watch(namespace=namespace, timeout=timeout, resource_version=version)
        for event in itertools.chain(begin, later):
            channel = event["raw_object"]
            name = channel["metadata"]["name"]
            if name in names:
                latest[name] = channel.get("status", {})
                if event["type"] != "DELETED" and condition(channel):
                    fulfilled[name] = channel
                if len(fulfilled) >= (enough or len(names)):
                    return fulfilled
        raise StackError(
            f"after {timeout} s these are not as expected: { {n: latest.get(n) for n in names if n not in fulfilled} }"
        )

    def wait_ready(
        self, *names: str, namespace: str = CHANNELS, timeout: int = 60, enough: int | None = None
    ) -> dict[str, dict[str, Any]]:
        def ready(channel: dict[str, Any]) -> bool:
            return ready_reason(channel)[0] == "True"

        return self.wait_until(ready, *names, namespace=namespace, timeout=timeout, enough=enough)

    def wait_gone(self, *names: str, namespace: str = CHANNELS, timeout: int = 60) -> None:
        left = set(names)
        version = self.channels.get(namespace=namespace)
        left &= {each["metadata"]["name"] for each in version.to_dict()["items"]}
        if not left:
            return
        for event in self.channels.watch(
            namespace=namespace, timeout=timeout, resource_version=version.metadata.resourceVersion
        ):
            if event["type"] == "DELETED":
                left.discard(event["raw_object"]["metadata"]["name"])
            if not left:
                return
        raise StackError(f"after {timeout} s these are not gone: {sorted(left)}")

    def webhook_url(self, name: str, namespace: str = CHANNELS) -> str:
        """The webhook of a channel, by the template that the operator was started with."""
        return WebhookTemplate(self.options.webhook_url_template).url(namespace, name)

    def records(self) -> list[str]:
        """The uids of the channels that hold a number: one for each of the operator's records."""
        core = client.CoreV1Api(self.api.client)
        found = core.list_namespaced_secret(OPERATOR, label_selector="channels.hydracore.io/record=true")
        notes = (each.metadata.annotations or {} for each in found.items if each.metadata)
        return [each.get("channels.hydracore.io/channel-uid", "") for each in notes]

    def record_name(self, phone_number: str) -> str:
        """The Secret that is the operator's record of a number, if a channel holds it."""
        return str(self.number(phone_number)["sid"]).lower()

    def rest(self, method: str, instance: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Call the REST API as its clients do; returns status and body."""
        url = f"{self.api_url}/v1/instances/{instance}/channels/sms"
        return call(method, url, body, {"X-Api-Key": self.api_key, **headers})

    def twin_call(self, method: str, path: str, body: Any = None) -> Any:
        """Call the twin's control API; `path` as in `/numbers/+61400111222`. Raises `StackError` if it is refused."""
        status, answer = call(method, f"{self.twilio_url}/_twin{path}", body)
        if status >= 400:
            raise StackError(f"the twin answers {status}: {answer}")
        return answer

    def number(self, phone_number: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.twin_call("GET", f"/numbers/{phone_number}")
        return answer

    # Processes and objects

    def _spawn(
        self, name: str, command: list[str], environment: Mapping[str, str] | None = None, stdout: int | None = None
    ) -> subprocess.Popen[bytes]:
        with (self.logs / f"{name}.log").open("ab") as log:
            self._processes[name] = process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**_plain_environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                start_new_session=True,
            )
        return process

    def _wait_ready(self, name: str, url: str) -> None:
        process = self._processes[name]
        for attempt in Retrying(
            retry=retry_if_exception_type(OSError), wait=wait_fixed(0.05), stop=stop_after_delay(60), reraise=True
        ):
            with attempt:
                if process.poll() is not None:
                    raise StackError(f"the {name} ended with status {process.returncode}: see {self.logs / name}.log")
                with urllib.request.urlopen(url, timeout=5):  # noqa: S310  (a loopback URL of ours)
                    pass
        self._say(f"{name:<14} {url.removesuffix('/readyz')}")

    def _apply(self, manifests: Any, field_manager: str = "local-stack") -> None:
        for manifest in manifests:
            resource = self.api.resources.get(api_version=manifest["apiVersion"], kind=manifest["kind"])
            for attempt in _until_served():
                with attempt:
                    self.api.server_side_apply(
                        resource,
                        body=manifest,
                        name=manifest["metadata"]["name"],
                        namespace=manifest["metadata"].get("namespace"),
                        field_manager=field_manager,
                        force_conflicts=True,
                    )

    def _wait_for_crd(self) -> None:
        crds = client.ApiextensionsV1Api(self.api.client)
        name = "smschannels.channels.hydracore.io"
        for event in watch.Watch().stream(
            crds.list_custom_resource_definition, field_selector=f"metadata.name={name}", timeout_seconds=30
        ):
            if any(
                each.type == "Established" and each.status == "True" for each in event["object"].status.conditions or ()
            ):
                break
        else:
            raise StackError("the CRD was not established within 30 s")
        self.api.resources.invalidate_cache()

    def _wait_for_admission(self) -> None:
        """Wait until new channels are admitted, from now on: other clients do not retry as `_apply` does.

        The API server picks up a mutating policy within a second, and every five seconds the kinds to which it can
        apply one: in between it answers 503. So an admitted channel proves nothing until the policy has changed it, nor
        while the kind is missing in the schema, from which these kinds are read.
        """
        credentials = {"sealed": "A" * 2048}
        probe = {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "metadata": {"name": str(uuid.uuid4()), "namespace": CHANNELS},
            "spec": {"accountSid": f"AC{'0' * 32}", "phoneNumber": "+61400111222", "credentials": credentials},
        }
        for attempt in _until_served():
            with attempt:
                schema = json.loads(self.api.request("get", "/openapi/v3", serialize=False).data)
                admitted = self.channels.create(body=probe, namespace=CHANNELS, dry_run="All")
                if f"apis/{API_VERSION}" not in schema["paths"]:
                    raise _NotYet(f"the schema at /openapi/v3 lacks {API_VERSION}")
                if self.options.finalizer_policy and not admitted.metadata.finalizers:
                    raise _NotYet("the policy that adds the finalizer has no effect")

    def _write_kubeconfig(self, name: str, token: str) -> Path:
        path = self.home / f"{name}.kubeconfig"
        write_kubeconfig(path, url=self.cluster.url, ca_data=self.cluster.ca_data, token=token, namespace=CHANNELS)
        return path

    def _token(
        self,
        account: str,
        namespace: str,
        audiences: list[str],
        bound: client.V1BoundObjectReference | None = None,
    ) -> str:
        spec = client.V1TokenRequestSpec(audiences=audiences, expiration_seconds=_YEAR, bound_object_ref=bound)
        answer = client.CoreV1Api(self.api.client).create_namespaced_service_account_token(
            account, namespace, client.AuthenticationV1TokenRequest(spec=spec)
        )
        assert answer.status
        assert answer.status.token
        return answer.status.token


def ready_reason(channel: Mapping[str, Any]) -> tuple[str, str, str]:
    """Status, reason and message of `Ready` for the channel's current generation; all empty if it has none."""
    status = channel.get("status") or {}
    if status.get("observedGeneration") != channel["metadata"]["generation"]:
        return "", "", ""
    ready = next((each for each in status.get("conditions", ()) if each["type"] == "Ready"), None)
    return (ready["status"], ready["reason"], ready["message"]) if ready else ("", "", "")


def call(method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """Make an HTTP request; returns the status, whatever it is, and the JSON body, None if there is none."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(  # noqa: S310  (loopback URLs of ours)
        url, content, {"Content-Type": "application/json", **(headers or {})}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            answer = response.read()
            return response.status, json.loads(answer) if answer else None
    except urllib.error.HTTPError as error:
        with error:
            answer = error.read()
        return error.code, json.loads(answer) if answer else None


def wipe(home: Path) -> None:
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True, mode=0o700)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _plain_environment() -> dict[str, str]:
    """This process's environment without variables that change what the programs do, such as their settings."""
    ignored = ("SMSCHANNEL_", "SMSSHIM_", "TWILIO_", "KUBERNETES_", "KUBECONFIG")
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(ignored)}


def _api_user() -> list[dict[str, Any]]:
    """A ServiceAccount that may use channels: with its tokens, RBAC decides what a bearer may do."""
    name = "sms-api-user"
    rbac = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": CHANNELS}},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "Role",
            "metadata": {"name": name, "namespace": CHANNELS},
            "rules": [
                {
                    "apiGroups": ["channels.hydracore.io"],
                    "resources": ["smschannels"],
                    "verbs": ["get", "list", "watch", "create", "update", "patch", "delete"],
                }
            ],
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": name, "namespace": CHANNELS},
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": CHANNELS}],
        },
    ]
