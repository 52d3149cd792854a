"""Installs the product in a cluster as its users do, with helm, and the Twilio twin with a certificate of its own."""

from __future__ import annotations

import base64
import datetime
from pathlib import Path
from typing import Any

import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from deploy.kind.access import TWIN_NAMESPACE, Access

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy/helm"
RELEASE, OPERATOR, CHANNELS = "sms", "sms-operator", "sms-channels"
IMAGE, TWIN_IMAGE = "localhost/sms-channel-operator", "localhost/sms-twin:latest"
TEMPLATE = (
    "http://127.0.0.1:8080/v1/instances/{instance_id}/channels/sms/webhook"  # the webhook server in the twin's pod
)
RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
SHIM_SECRET, TWIN_SECRET = "sms-api-shim-tls", "twin-tls"


def install_twin(access: Access) -> str:
    """Install the twin and return the certificate (PEM) that its clients trust: that of a twin that runs already."""
    namespace, *objects = yaml.safe_load_all((Path(__file__).parent / "twin/twin.yaml").read_text())
    access.apply(namespace)
    place = ("secrets", f"--namespace={TWIN_NAMESPACE}", f"--field-selector=metadata.name={TWIN_SECRET}")
    if found := access.get(*place)["items"]:
        certificate = base64.b64decode(found[0]["data"]["tls.crt"]).decode()
    else:
        certificate, key = make_certificate(f"twin.{TWIN_NAMESPACE}.svc", "localhost")
        access.apply(tls_secret(TWIN_SECRET, TWIN_NAMESPACE, certificate, key))
    access.apply(*objects)
    access.kubectl("rollout", "status", "deployment/twin", f"--namespace={TWIN_NAMESPACE}", "--timeout=180s")
    return certificate


def prepare_namespace(access: Access, twin_certificate: str) -> str:
    """Make the operator's namespace with what the chart refers to; return the certificate of the shim (PEM)."""
    certificate, key = make_certificate(f"sms-api-shim.{OPERATOR}.svc", "localhost")
    access.apply(
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": OPERATOR, "labels": RESTRICTED}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "twin-ca", "namespace": OPERATOR},
            "data": {"ca.crt": twin_certificate},
        },
        tls_secret(SHIM_SECRET, OPERATOR, certificate, key),
    )
    return certificate


def install_product(access: Access, tag: str, values: dict[str, Any] | None = None) -> None:
    """Install or upgrade the release, and return when all its pods are ready. `values` are merged over ours."""
    given = yaml.safe_dump(merged(product_values(tag), values or {}))
    upgrade: list[str | Path] = ["upgrade", "--install", RELEASE, CHART, f"--namespace={OPERATOR}", "--values=-"]
    access.helm(*upgrade, "--wait", "--timeout=5m", stdin=given)


def product_values(tag: str) -> dict[str, Any]:
    return {
        "webhookUrlTemplate": TEMPLATE,
        "image": {"repository": IMAGE, "tag": tag, "pullPolicy": "Never"},
        "caBundle": {"configMap": "twin-ca"},
        "operator": {"settings": {"twilioUrl": f"https://twin.{TWIN_NAMESPACE}.svc"}},
        "shim": {"tls": {"mode": "secret", "secretName": SHIM_SECRET}},
    }


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Return values of a chart with others merged over them, as helm does."""
    result = dict(below)
    for name, value in above.items():
        old = result.get(name)
        result[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def tls_secret(name: str, namespace: str, certificate: str, key: str) -> dict[str, Any]:
    data = {"tls.crt": certificate, "tls.key": key}
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "namespace": namespace},
        "type": "kubernetes.io/tls",
        "data": {field: base64.b64encode(value.encode()).decode() for field, value in data.items()},
    }


def make_certificate(*names: str) -> tuple[str, str]:
    """Make a self-signed certificate for a server with these names, valid for 30 days; return it and its key (PEM)."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0])])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM).decode(), private.decode()
