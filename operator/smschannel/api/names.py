"""Names and API paths of the Kubernetes objects that operator, shim and command line share. No I/O."""

from __future__ import annotations

from smschannel.api.resource import GROUP, PLURAL, VERSION

KEYRING_SECRET = "smschannel-keyring"  # noqa: S105  (a name)
API_KEYS_SECRET = "smschannel-api-keys"  # noqa: S105  (a name)
PUBLIC_KEY_CONFIGMAP = "smschannel-sealing-key"
PUBLIC_KEY = "public-key"
"""The key of the public sealing key in the ConfigMap's `data`."""
FINGERPRINT = "fingerprint"
"""The key beside it for the first bytes of the key's SHA-256, in hexadecimal: sealed values begin with them."""
NAMESPACES = "namespaces"
"""The key beside it for the namespaces that the operator watches, separated by spaces."""
SETTINGS_CONFIGMAP = "smschannel-settings"
RELEASE = "version"
"""The key in its `data` for the operator's release, beside the settings by environment variable."""
PACKAGE = "sms-channel-operator"
"""The Python distribution, whose version is the release's."""
OPERATOR = "sms-channel-operator"
"""The operator's ServiceAccount and Deployment, and the `app.kubernetes.io/managed-by` label of what it writes."""
MANAGED = {"app.kubernetes.io/managed-by": OPERATOR}
"""The label of what the operator writes."""
LEASE = "sms-channel-operator"
"""The Lease of the operator that works while others stand by, in the operator's namespace. See `lease_of`."""
FENCE = "sms-channel-operator-fence"
"""The admission policy of `deploy/manifests/operator-fence.yaml`; refusals of the API server name it."""
FENCE_PROBE = "smschannel-fence-probe"
"""The name of a record that the fence never admits: a dry run shows whether it is installed."""


def lease_of(shard: str) -> str:
    """Return the name of a shard's Lease, ServiceAccount and Deployment; `shard` is empty if there are no shards."""
    return f"{LEASE}-{shard}" if shard else LEASE


def is_lease(name: str) -> bool:
    """Return whether a Lease of the operator's namespace is that of an operator, of whatever shard."""
    return name == LEASE or name.startswith(f"{LEASE}-")


def channels_path(namespace: str, name: str = "", subresource: str = "") -> str:
    """Return the path of all SmsChannels of a namespace (if empty: of all), of one, or of its subresource."""
    where = f"namespaces/{namespace}/" if namespace else ""
    path = f"/apis/{GROUP}/{VERSION}/{where}{PLURAL}"
    return "/".join(part for part in (path, name, subresource) if part)


def core_path(namespace: str, plural: str, name: str = "") -> str:
    """Return the path of the Secrets, ConfigMaps or Pods (`plural`) of a namespace, or of one of them."""
    path = f"/api/v1/namespaces/{namespace}/{plural}"
    return f"{path}/{name}" if name else path


def leases_path(namespace: str) -> str:
    """Return the path of the Leases of a namespace."""
    return f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases"
