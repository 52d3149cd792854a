"""A kind cluster: made in a container engine, reachable from this machine, with images loaded from the engine."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from deploy.build import Progress
from deploy.kind import node, tools
from deploy.kind.engine import ROOT, Engine

API_SERVER_PORT = 6443
CREATE_SECONDS = 600.0
READY_SECONDS = 300.0
PATIENCE = {"kubernetesAPICall": "4m0s", "controlPlaneComponentHealthCheck": "6m0s", "kubeletHealthCheck": "6m0s"}


class KindCluster:
    """A cluster of a control plane and workers. Its files are in `home`; `kubeconfig` is the administrator's."""

    def __init__(self, engine: Engine, name: str, home: Path, say: Progress) -> None:
        self.engine = engine
        self.name = name
        self.home = home
        self.kubeconfig = home / "kubeconfig"
        self._say = say
        self._kind = tools.KIND.ensure(say)
        self._relay_process: subprocess.Popen[bytes] | None = None

    def create(self, workers: int) -> None:
        """Create it, and return when all nodes are Ready. Raises BuildError or EngineError."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        stock = self.engine.can_pull(stock_image(self._say))
        image = None if stock else node.ensure_node_image(self.engine, self._say)
        self._say(f"Creating a kind cluster of {workers + 1} nodes ({'stock' if stock else 'our own'} node image).")
        config = yaml.safe_dump(_configuration(self.name, workers, image, fixed_port=self.engine.private))
        draft = self.home / "engine.kubeconfig"
        create: list[str | Path] = ["create", "cluster", "--config", "-", "--kubeconfig", draft, "--retain"]
        self.engine.run(self._kind, *create, stdin=config.encode(), timeout=CREATE_SECONDS)
        content = yaml.safe_load(draft.read_text())
        if self.engine.private:
            content["clusters"][0]["cluster"]["server"] = f"https://127.0.0.1:{self._relay()}"
        self._write_kubeconfig(content)
        if not stock:
            self._connect_nodes()
        self._wait_for_nodes(workers + 1)

    def wait_until_gone(self) -> None:
        """Wait for what this object started in the private engine, after that was stopped."""
        if self._relay_process:
            self._relay_process.wait()

    def load(self, tag: str) -> None:
        """Make an image of the engine available to pods on every node."""
        nodes = self.nodes()
        self._say(f"Loading {tag} into {len(nodes)} nodes.")
        archive = self.home / "image.tar"
        self.engine.docker("save", "--output", archive, tag)
        try:
            self.engine.run(self._kind, "load", "image-archive", archive, "--name", self.name)
        finally:
            archive.unlink()

    def nodes(self) -> list[str]:
        """Return the names of the nodes, which are those of their containers."""
        return sorted(self.engine.run(self._kind, "get", "nodes", "--name", self.name).split())

    def kubectl(self, *arguments: str | Path, stdin: str | None = None) -> str:
        """Run kubectl on the control plane's node, as the administrator. Raises EngineError if it fails."""
        command = ["exec", "-i", f"{self.name}-control-plane", "kubectl", "--kubeconfig=/etc/kubernetes/admin.conf"]
        return self.engine.docker(*command, *arguments, stdin=(stdin or "").encode())

    def _relay(self) -> int:
        """Forward a free port of this machine's loopback to the API server, and return it."""
        with socket.create_server(("127.0.0.1", 0)) as listener, (self.home / "relay.log").open("ab") as log:
            enter = [
                "nsenter",
                f"--target={self.engine.init}",
                "--net",
                "--pid",
                "--",
                sys.executable,
                "-m",
                "deploy.kind.relay",
            ]
            self._relay_process = subprocess.Popen(
                [*enter, str(listener.fileno()), "127.0.0.1", str(API_SERVER_PORT)],
                cwd=ROOT,
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            return int(listener.getsockname()[1])

    def _write_kubeconfig(self, content: dict[str, Any]) -> None:
        self.kubeconfig.unlink(missing_ok=True)
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(yaml.safe_dump(content, sort_keys=False))

    def _connect_nodes(self) -> None:
        """Give every node the network of its pods, and routes to those of the others: what kindnet does elsewhere."""
        ranges = self._pod_ranges()
        for name, (_, pods) in ranges.items():
            command = "cat > /etc/cni/net.d/.draft && mv /etc/cni/net.d/.draft /etc/cni/net.d/10-pods.conflist"
            self.engine.docker("exec", "-i", name, "sh", "-c", command, stdin=_pod_network(pods).encode())
            for other, (address, other_pods) in ranges.items():
                if other != name:
                    self.engine.docker("exec", name, "ip", "route", "replace", other_pods, "via", address)

    def _pod_ranges(self) -> dict[str, tuple[str, str]]:
        """Return each node's address and the addresses of its pods, waiting until they are assigned."""
        for attempt in Retrying(
            retry=retry_if_exception_type(KeyError), wait=wait_fixed(0.5), stop=stop_after_delay(60), reraise=True
        ):
            with attempt:
                found = json.loads(self.kubectl("get", "nodes", "--output=json"))["items"]
                return {each["metadata"]["name"]: (_address(each), each["spec"]["podCIDR"]) for each in found}
        raise AssertionError("unreachable")

    def _wait_for_nodes(self, count: int) -> None:
        started = time.monotonic()
        self.kubectl("wait", "--for=condition=Ready", "nodes", "--all", f"--timeout={READY_SECONDS:.0f}s")
        wait = ["rollout", "status", "deployment/coredns", "--namespace=kube-system"]
        self.kubectl(*wait, f"--timeout={READY_SECONDS:.0f}s")
        self._say(f"{count} nodes are Ready, and the cluster's DNS, after {time.monotonic() - started:.0f} s more.")


def stock_image(progress: Progress) -> str:
    """Return the node image that this version of kind uses by default, from its sources."""
    sources = tools.KIND.source_dir(progress) / "pkg/apis/config/defaults/image.go"
    [image] = [line.split('"')[1] for line in sources.read_text().splitlines() if line.startswith("const Image = ")]
    return image


def _configuration(name: str, workers: int, image: str | None, *, fixed_port: bool) -> dict[str, Any]:
    """Return kind's configuration. `image` is our own node image, None for the one that kind uses by default."""
    roles = ["control-plane", *["worker"] * workers]
    networking: dict[str, Any] = {"ipFamily": "ipv4"}
    if fixed_port:
        networking["apiServerPort"] = API_SERVER_PORT
    config: dict[str, Any] = {"kind": "Cluster", "apiVersion": "kind.x-k8s.io/v1alpha4", "name": name}
    # The control plane takes pods, too: those of a worker that is drained.
    taints = {"kind": "InitConfiguration", "nodeRegistration": {"taints": []}}
    if image is None:
        nodes = [{"role": role} for role in roles]
        return config | {"networking": networking, "nodes": nodes, "kubeadmConfigPatches": [yaml.safe_dump(taints)]}
    images = {
        "kind": "ClusterConfiguration",
        "imageRepository": node.REPOSITORY,
        "dns": {"imageRepository": node.REPOSITORY, "imageTag": node.COREDNS_TAG},
        "etcd": {"local": {"imageRepository": node.REPOSITORY, "imageTag": node.ETCD_TAG}},
    }
    # The host may still have cgroup v1, and root may not be able to raise the limit of open files.
    kubelet = {"kind": "KubeletConfiguration", "failCgroupV1": False, "maxOpenFiles": 20000}
    # kubeadm gives up a call after a minute, in which a busy machine may not even have started the API server.
    init = taints | {"timeouts": PATIENCE}
    join = {"kind": "JoinConfiguration", "timeouts": PATIENCE}
    return config | {
        "networking": networking | {"disableDefaultCNI": True, "kubeProxyMode": "nftables"},
        "kubeadmConfigPatches": [yaml.safe_dump(each) for each in (init, join, images, kubelet)],
        "nodes": [{"role": role, "image": image} for role in roles],
    }


def _pod_network(pods: str) -> str:
    addresses = {
        "type": "host-local",
        "dataDir": "/run/cni-ipam-state",
        "routes": [{"dst": "0.0.0.0/0"}],
        "ranges": [[{"subnet": pods}]],
    }
    plugins = [
        {"type": "ptp", "ipMasq": True, "ipam": addresses, "mtu": 1500},
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    return json.dumps({"cniVersion": "0.3.1", "name": "pods", "plugins": plugins})


def _address(found: dict[str, Any]) -> str:
    addresses = {each["type"]: each["address"] for each in found["status"]["addresses"]}
    return str(addresses["InternalIP"])
