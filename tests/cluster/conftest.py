"""What several files here need of the stack that they share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from deploy.local.cluster import write_kubeconfig
from deploy.local.stack import CHANNELS, Stack


@pytest.fixture(scope="session")
def tenant(stack: Stack) -> Path:
    """A kubeconfig with the rights of an ordinary tenant: SmsChannels of one namespace, and nothing else."""
    core: Any = client.CoreV1Api(stack.api.client)
    rbac: Any = client.RbacAuthorizationV1Api(stack.api.client)
    meta = {"name": "tenant", "namespace": CHANNELS}
    rule = {"apiGroups": ["channels.hydracore.io"], "resources": ["smschannels"], "verbs": ["*"]}
    core.create_namespaced_service_account(CHANNELS, {"metadata": meta})
    rbac.create_namespaced_role(CHANNELS, {"metadata": meta, "rules": [rule]})
    subject = {"kind": "ServiceAccount", "name": "tenant", "namespace": CHANNELS}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "tenant"}
    rbac.create_namespaced_role_binding(CHANNELS, {"metadata": meta, "roleRef": reference, "subjects": [subject]})
    request = {"spec": {"expirationSeconds": 86_400, "audiences": []}}
    token = core.create_namespaced_service_account_token("tenant", CHANNELS, request).status.token
    cluster, path = stack.cluster, stack.home / "tenant.kubeconfig"
    return write_kubeconfig(path, url=cluster.url, ca_data=cluster.ca_data, token=token, namespace=CHANNELS)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Programs that are started can be interrupted, also where the tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
