"""Names of the objects that operator, shim and command line share, and the paths to them. No I/O."""

from __future__ import annotations

from smschannel.api.resource import GROUP, PLURAL, VERSION

KEYRING_SECRET = "smschannel-keyring"  # noqa: S105  (a name)
API_KEYS_SECRET = "smschannel-api-keys"  # noqa: S105  (a name)
PUBLIC_KEY_CONFIGMAP = "smschannel-sealing-key"
PUBLIC_KEY = "public-key"
"""The key within `PUBLIC_KEY_CONFIGMAP`."""
SETTINGS_CONFIGMAP = "smschannel-settings"
OPERATOR = "sms-channel-operator"
"""The operator's ServiceAccount, its Deployment, and `app.kubernetes.io/managed-by` of what it writes."""


def channels_path(namespace: str, name: str = "", subresource: str = "") -> str:
    """The path of the SmsChannels of a namespace (of all, where it is empty), of one of them, or of its subresource."""
    where = f"namespaces/{namespace}/" if namespace else ""
    path = f"/apis/{GROUP}/{VERSION}/{where}{PLURAL}"
    return "/".join(part for part in (path, name, subresource) if part)


def core_path(namespace: str, plural: str, name: str = "") -> str:
    """The path of the Secrets, ConfigMaps or Pods of a namespace, or of one of them."""
    path = f"/api/v1/namespaces/{namespace}/{plural}"
    return f"{path}/{name}" if name else path
