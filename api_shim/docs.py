"""Serve `/openapi.json`, and `/docs`: the same document as an HTML page, without scripts and without other hosts."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from functools import cache
from html import escape

from aiohttp import web

from api_shim.openapi import document
from smschannel.api.kube_client import Object

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.9em; }
pre { overflow-x: auto; padding: 0.75rem 1rem; border: 1px solid #8886; border-radius: 4px; }
table { border-collapse: collapse; width: 100%; margin: 0.5rem 0 1.5rem; }
th, td { text-align: left; vertical-align: top; padding: 0.3rem 0.8rem 0.3rem 0; border-bottom: 1px solid #8884; }
h2 { margin-top: 2.5rem; border-bottom: 2px solid #8886; }
"""
_POLICY = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
_INLINE = re.compile(r"\*\*(?P<bold>.+?)\*\*|`(?P<code>.+?)`")


@cache
def table() -> list[web.RouteDef]:
    """Return the routes. The page has relative URLs only, so that it works below any path."""
    no_cache, an_hour = {"Cache-Control": "no-cache"}, {"Cache-Control": "public, max-age=3600"}
    described = document()
    served = {
        "/openapi.json": _static(json.dumps(described), "application/json", no_cache),
        "/docs": _static(page(described), "text/html", {**no_cache, **_POLICY}),
        "/docs/style.css": _static(_STYLE, "text/css", an_hour),
    }
    return [web.get(path, handler, allow_head=False) for path, handler in served.items()]


def _static(text: str, content_type: str, headers: dict[str, str]) -> Callable[[web.Request], Awaitable[web.Response]]:
    """Return a handler that answers `text`, compressed if the client accepts gzip."""
    plain = text.encode()
    compressed = gzip.compress(plain, mtime=0)

    async def handler(request: web.Request) -> web.Response:
        accepts_gzip = "gzip" in request.headers.get("Accept-Encoding", "")
        encoding = {"Vary": "Accept-Encoding", **({"Content-Encoding": "gzip"} if accepts_gzip else {})}
        body = compressed if accepts_gzip else plain
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers={**headers, **encoding})

    return handler


def page(described: Object) -> str:
    """Render an OpenAPI document as an HTML page: its description, every call and every schema."""
    title = escape(described["info"]["title"])
    calls = [
        "\n".join(_call(path, method, item, described))
        for path, item in described["paths"].items()
        for method in item
        if method in {"get", "post", "delete"}
    ]
    schemas = ["\n".join(_schema(name, schema)) for name, schema in described["components"]["schemas"].items()]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/style.css">
</head>
<body>
<h1>{title}</h1>
<p>Version {escape(described["info"]["version"])}. The OpenAPI document: <a href="openapi.json">openapi.json</a></p>
{_markdown(described["info"]["description"])}
{"".join(calls)}
<h2>Schemas</h2>
{"".join(schemas)}
</body>
</html>
"""


def _call(path: str, method: str, item: Object, described: Object) -> Iterator[str]:
    call = item[method]
    yield f'<h2 id="{escape(call["operationId"])}">{escape(call["summary"])}</h2>'
    yield f"<pre>{method.upper()} {escape(path)}</pre>"
    yield _markdown(call.get("description", ""))
    yield _table(
        ("parameter", "in", "description"),
        (
            (f"`{each['name']}`", each["in"] + (", required" if each["required"] else ""), each["description"])
            for each in [*item.get("parameters", ()), *call.get("parameters", ())]
        ),
    )
    yield "<p>Example:</p>"
    yield f"<pre>{escape(_example(path, method, item, described))}</pre>"
    yield _table(
        ("answer", "description", "headers", "body"),
        (
            (f"`{status}`", answer["description"], ", ".join(answer["headers"]), _body(answer))
            for status, answer in call["responses"].items()
        ),
    )


def _example(path: str, method: str, item: Object, described: Object) -> str:
    """Return a curl command for the call, with the examples of its parameters and of its body's required fields.

    Other users of a machine can read the arguments of programs, so the key and the body come from files.
    """
    for parameter in item.get("parameters", ()):
        path = path.replace("{" + parameter["name"] + "}", parameter["example"])
    lines = [f'curl -X {method.upper()} "$API_URL{path}"', "-H @api-key.txt"]
    body = ""
    if content := item[method].get("requestBody", {}).get("content"):
        schema = _resolve(content["application/json"]["schema"], described)
        example = {name: schema["properties"][name]["examples"][0] for name in schema["required"]}
        lines += ['-H "Content-Type: application/json"', "--data @setup.json"]
        body = f"setup.json: {json.dumps(example)}\n\n"
    return body + " \\\n  ".join(lines)


def _resolve(schema: Object, described: Object) -> Object:
    found: Object = described["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    return found


def _body(answer: Object) -> str:
    return _type(answer["content"]["application/json"]["schema"]) if "content" in answer else ""


def _schema(name: str, schema: Object) -> Iterator[str]:
    yield f'<h3 id="{escape(name)}">{escape(name)}</h3>'
    yield _markdown(schema.get("description", ""))
    required = schema.get("required", ())
    yield _table(
        ("field", "type", "description"),
        (
            (f"`{field}`" + (", required" if field in required else ""), _type(each), each.get("description", ""))
            for field, each in schema["properties"].items()
        ),
    )


def _type(schema: Object) -> str:
    """Describe a JSON schema in one line of Markdown."""
    if "$ref" in schema:
        return f"`{schema['$ref'].rsplit('/', 1)[1]}`"
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"array of {_type(schema['items'])}"
    return str(schema.get("type", "any"))


def _table(columns: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>\n" for row in rows)
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def _markdown(text: str) -> str:
    """Render the Markdown that the document uses: paragraphs, tables, bold text and code. All else is escaped."""
    return "\n".join(_block(block) for block in text.strip().split("\n\n") if block)


def _block(block: str) -> str:
    if not block.startswith("|"):
        return f"<p>{_inline(block)}</p>"
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines())
    return _table(tuple(head), (tuple(row) for row in rows))


def _inline(text: str) -> str:
    def element(match: re.Match[str]) -> str:
        bold, code = match["bold"], match["code"]
        return f"<strong>{bold}</strong>" if bold else f"<code>{code}</code>"

    return _INLINE.sub(element, escape(text))
