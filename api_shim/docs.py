"""`/openapi.json`, and `/docs`, which shows it in the browser: Swagger UI, and nothing from elsewhere."""

from __future__ import annotations

import gzip
import importlib.resources
import json
from collections.abc import Awaitable, Callable
from functools import cache

from aiohttp import web

from api_shim.openapi import document

_PACKAGE = "mkdocs_swagger_ui_tag"  # what it is for is no matter here: it carries Swagger UI's files as they are
_ASSETS = {
    "swagger-ui-bundle.js": ("javascripts", "text/javascript"),
    "swagger-ui.css": ("stylesheets", "text/css"),
}
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>SMS channels</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<noscript>This page needs JavaScript. The same for machines: <a href="openapi.json">openapi.json</a></noscript>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
_START = """SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  persistAuthorization: false,
  validatorUrl: null,
  syntaxHighlight: false
});
"""
_POLICY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
}
_FOR_AN_HOUR = {"Cache-Control": "public, max-age=3600"}


@cache
def table() -> list[web.RouteDef]:
    """Relative URLs throughout: nobody has to say under which name this is reached."""
    served = {
        "/openapi.json": _fixed(json.dumps(document()), "application/json", {"Cache-Control": "no-cache"}),
        "/docs": _fixed(_PAGE, "text/html", {"Cache-Control": "no-cache", **_POLICY}),
        "/docs/start.js": _fixed(_START, "text/javascript", _FOR_AN_HOUR),
    }
    files = importlib.resources.files(_PACKAGE) / "swagger-ui"
    for name, (folder, content_type) in _ASSETS.items():
        served[f"/docs/{name}"] = _fixed((files / folder / name).read_text("utf-8"), content_type, _FOR_AN_HOUR)
    return [web.get(path, handler, allow_head=False) for path, handler in served.items()]


def _fixed(text: str, content_type: str, headers: dict[str, str]) -> Callable[[web.Request], Awaitable[web.Response]]:
    plain = text.encode()
    small = gzip.compress(plain, mtime=0)  # once, not for everybody who asks

    async def handler(request: web.Request) -> web.Response:
        zipped = "gzip" in request.headers.get("Accept-Encoding", "")
        encoding = {"Vary": "Accept-Encoding", **({"Content-Encoding": "gzip"} if zipped else {})}
        body = small if zipped else plain
        return web.Response(body=body, content_type=content_type, charset="utf-8", headers={**headers, **encoding})

    return handler
