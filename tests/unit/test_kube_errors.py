"""The API server's refusals become ours; a number is given back when a channel is gone, so 404 is looked at closely."""

from __future__ import annotations

import json

import pytest

from smschannel.api.errors import (
    ChannelError,
    Conflict,
    KubernetesRefused,
    KubernetesUnavailable,
    NoKindMatch,
    NotFound,
)
from smschannel.api.kube_client import kubernetes_error


def status(**details: str) -> bytes:
    return json.dumps({"kind": "Status", "message": "the server says so", "details": details}).encode()


@pytest.mark.parametrize(
    ("code", "answer", "becomes", "reason"),
    [
        (404, status(name="x", kind="secrets"), NotFound, "the API server names what is not there"),
        (404, status(), NoKindMatch, "the group is served, the kind is not"),
        (404, b"404 page not found\n", NoKindMatch, "a group that is not served at all"),
        (
            404,
            b"<html>",
            KubernetesUnavailable,
            "a proxy's 404 is not the API server's: nothing is given back",
        ),
        (404, b"[]", KubernetesUnavailable, "JSON of another shape is a proxy's, too"),
        (409, status(name="x"), Conflict, "somebody wrote first"),
        (410, status(), Conflict, "a list that expired halfway begins again"),
        (429, status(), KubernetesUnavailable, "too many requests is a matter of time"),
        (500, b"", KubernetesUnavailable, "an internal error is a matter of time"),
        (503, b"upstream connect error", KubernetesUnavailable, "a proxy's words are not the API server's"),
        (401, status(), KubernetesRefused, "a token that is not accepted"),
        (403, status(name="x"), KubernetesRefused, "a missing right"),
        (422, status(name="x"), KubernetesRefused, "an object that the API server does not take"),
        (302, b"", KubernetesRefused, "a redirect is not followed"),
    ],
)
def test_the_table(code: int, answer: bytes, becomes: type[ChannelError], reason: str) -> None:
    assert type(kubernetes_error(code, answer)) is becomes, reason


def test_it_is_told_when_to_come_back() -> None:
    error = kubernetes_error(429, status(), 7.0)
    assert isinstance(error, KubernetesUnavailable)
    assert error.retry_after == 7.0
