"""Following channels: lists, watches that end, and deletions in between. And the way to a cluster that is none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from smschannel.api.errors import Expired, KubernetesUnavailable, NotConnected
from smschannel.cli.channels import changes
from smschannel.cli.main import cli
from smschannel.cli.wait import _Ending, _Gone, _until
from tests.manifests import INSTANCE


def channel(uid: str = "u1", version: int = 1, **status: Any) -> dict[str, Any]:
    meta = {"uid": uid, "namespace": "a", "name": INSTANCE, "resourceVersion": str(version)}
    return {"metadata": meta, "status": status}


class Api:
    """An API server whose lists and watches are given in advance; an exception is raised where it stands."""

    def __init__(self, *rounds: tuple[list[dict[str, Any]], list[Any]]) -> None:
        self._rounds = list(rounds)
        self._events: list[Any] = []

    async def pages(self, path: str, params: Any, *, on_version: Any) -> AsyncIterator[Any]:
        assert params == {"fieldSelector": f"metadata.name={INSTANCE}"}
        if not self._rounds:
            raise NotConnected("no more is given")
        items, self._events = self._rounds.pop(0)
        on_version("9")
        for each in items:
            yield each

    async def watch(self, path: str, params: Any) -> AsyncIterator[Any]:
        assert params["resourceVersion"] == "9"
        for each in self._events:
            if isinstance(each, Exception):
                raise each
            yield each


def event(kind: str, body: Any) -> dict[str, Any]:
    return {"type": kind, "object": body}


async def seen(*rounds: Any, known: Any = None) -> list[tuple[str, str, str]]:
    api: Any = Api(*rounds)
    found = []
    try:
        async for kind, body in changes(api, "a", INSTANCE, known):
            found.append((kind, body["metadata"]["uid"], body["metadata"]["resourceVersion"]))
    except NotConnected:
        return found
    raise AssertionError("it never ends by itself")


async def test_watch_that_ends_is_continued_without_repetition() -> None:
    two = channel(version=2)
    assert await seen(([channel()], [event("MODIFIED", two)]), ([two], [event("BOOKMARK", channel(version=3))])) == [
        ("ADDED", "u1", "1"),
        ("MODIFIED", "u1", "2"),
    ]


@pytest.mark.parametrize("end", [Expired("old"), KubernetesUnavailable("cut")])
async def test_deletion_between_two_watches_is_noticed(end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smschannel.cli.channels._PAUSE", 0)
    assert await seen(([channel()], [end]), ([], [])) == [("ADDED", "u1", "1"), ("DELETED", "u1", "1")]


async def test_channel_that_was_created_again_is_another_one() -> None:
    assert await seen(([channel()], []), ([channel("u2")], [])) == [
        ("ADDED", "u1", "1"),
        ("DELETED", "u1", "1"),
        ("ADDED", "u2", "1"),
    ]


async def test_known_channel_comes_when_it_changes() -> None:
    assert await seen(([channel()], [event("DELETED", channel(version=2))]), known=channel()) == [
        ("DELETED", "u1", "2")
    ]


async def test_waiting_sees_what_was_so_already() -> None:
    api: Any = Api()
    assert await _until(api, channel(), lambda each: True, 1) == _Ending(channel(), True)


async def test_waiting_ends_with_the_change_or_the_deletion() -> None:
    done = channel(version=2, ready=True)
    api: Any = Api(([channel()], [event("MODIFIED", done)]))
    assert await _until(api, channel(), lambda each: bool(each["status"]), 5) == _Ending(done, True)
    api = Api(([], []))
    with pytest.raises(_Gone):
        await _until(api, channel(), lambda each: False, 5)


COMMANDS = [
    ["status", INSTANCE],
    ["status", "-A", "--watch"],
    ["wait", INSTANCE],
    ["check", INSTANCE],
    ["test", INSTANCE],
    ["doctor"],
    ["report"],
    ["export", INSTANCE],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\0garbage: [", "Name another with --kubeconfig or --context."),
        ("", "there is no kubeconfig, or it is empty"),
        (
            "{clusters: [{name: c, cluster: {server: 'http://127.0.0.1:1'}}],"
            " contexts: [{name: x, context: {cluster: c}}], current-context: x}",
            "The cluster at http://127.0.0.1:1 cannot be reached",
        ),
    ],
)
def test_way_to_the_cluster_is_explained(
    command: list[str], content: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(content)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    result = CliRunner().invoke(cli, command)
    assert result.exit_code == 1, result.output
    assert expected in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == [kubeconfig], "no half of a report is left"
