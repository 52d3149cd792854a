"""Test how kopf is started; that its watches work is tested on a real API server, by every test of tests/cluster."""

from __future__ import annotations

import asyncio
import getpass
from typing import Any, NoReturn, cast

import pytest

from smschannel.watch import watch


async def test_kopf_starts_for_a_user_id_that_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container the user's id has no entry in /etc/passwd, and asking for the user's name raises `KeyError`."""

    def no_name() -> NoReturn:
        raise KeyError("getpwuid(): uid not found: 65532")

    monkeypatch.setattr(getpass, "getuser", no_name)
    over = asyncio.Event()
    over.set()  # before kopf asks anything of API server or controller
    await asyncio.wait_for(
        watch(cast(Any, None), cast(Any, None), ["sms-channels"], stop=asyncio.Event(), over=over), 30
    )
