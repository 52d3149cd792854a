"""What the tools' own code says of channels: kstatus as its Go module, Argo CD's health check in a Lua interpreter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lupa import lua51

from deploy.build import GoProgram, Narrator
from tests.gitops import HEALTH_LUA, Health, Object

KSTATUS = GoProgram(
    name="kstatus",
    title="kstatus",
    module=Path(__file__).parent / "kstatus",
    announcement="Building kstatus: about a minute on 2 cores.",
)
_ARGO_LIBRARIES = {
    "assert",
    "error",
    "getmetatable",
    "ipairs",
    "next",
    "pairs",
    "pcall",
    "rawequal",
    "rawget",
    "rawset",
}
_ARGO_LIBRARIES |= {"select", "setmetatable", "table", "tonumber", "tostring", "type", "unpack"}


def kstatus(objects: Iterable[Object]) -> list[str]:
    """Return what kstatus says of each object. The first call on a machine compiles it: about a minute on 2 cores."""
    lines = "".join(f"{json.dumps(each)}\n" for each in objects)
    program = KSTATUS.ensure(Narrator(sys.stderr))
    output = subprocess.run([program], input=lines, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line)["status"] for line in output.splitlines()]


def argo_health(channel: Object) -> Health:
    """Run the health check as Argo CD does: Lua 5.1 with the libraries base and table, the object as `obj`."""
    lua = lua51.LuaRuntime(unpack_returned_tuples=True, register_eval=False, register_builtins=False)
    names = lua.globals()
    for name in list(names):
        if name not in _ARGO_LIBRARIES and name != "_G":
            del names[name]
    names["obj"] = _as_lua(lua, channel)
    result = lua.execute(HEALTH_LUA.read_text())
    return Health(str(result["status"]), str(result["message"]))


def _as_lua(lua: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return lua.table_from({key: _as_lua(lua, each) for key, each in value.items()})
    if isinstance(value, list):
        return lua.table_from([_as_lua(lua, each) for each in value])
    return value
