"""`/docs`: the HTML page made from the OpenAPI document."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from api_shim.docs import page
from api_shim.openapi import document

VOID = {"meta", "link"}


class Page(HTMLParser):
    """Collects text, tags and URLs, and checks that every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: set[str] = set()
        self.urls: set[str] = set()
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.urls |= {value or "" for name, value in attrs if name in {"href", "src"}}
        assert not [name for name, _ in attrs if name.startswith("on") or name == "style"], "the policy forbids these"
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def shown() -> Page:
    return Page(page(document()))


def test_page_shows_every_call_and_answer(shown: Page) -> None:
    (path,) = document()["paths"]
    for method, call in document()["paths"][path].items():
        if method == "parameters":
            continue
        assert f"{method.upper()} {path}" in shown.text
        for status, answer in call["responses"].items():
            assert status in shown.text
            assert answer["description"] in shown.text


def test_page_shows_every_schema_and_status(shown: Page) -> None:
    for name, schema in document()["components"]["schemas"].items():
        assert name in shown.text
        for field in schema["properties"]:
            assert field in shown.text
    for status in document()["components"]["schemas"]["ChannelStatus"]["properties"]["status"]["enum"]:
        assert status in shown.text


def test_examples_are_complete_curl_commands(shown: Page) -> None:
    instance = "497f6eca-6276-4993-bfeb-53cbbbba6f08"
    assert f'curl -X POST "$API_URL/v1/instances/{instance}/channels/sms"' in shown.text
    assert "-H @api-key.txt" in shown.text
    assert '"phone_number": "+61400111222"' in shown.text


def test_markdown_is_rendered(shown: Page) -> None:
    assert {"strong", "code", "table"} <= shown.tags
    assert "**" not in shown.text
    assert "`" not in shown.text
    assert "|---" not in shown.text


def test_page_has_no_script_and_no_foreign_url(shown: Page) -> None:
    assert not {"script", "iframe", "form", "img"} & shown.tags
    assert shown.urls == {"data:,", "docs/style.css", "openapi.json"}


def test_text_of_the_document_is_escaped() -> None:
    described = document()
    described["info"]["description"] = "<script>alert(1)</script> **<b>** `<c>`\n\n| a |\n|---|\n| <d> |"
    described["info"]["title"] = "</title><script>"
    html = page(described)
    assert "<script" not in html
    assert "<strong>&lt;b&gt;</strong> <code>&lt;c&gt;</code>" in html
    assert "<td>&lt;d&gt;</td>" in html


def test_examples_have_no_secret_among_the_arguments(shown: Page) -> None:
    """Other users of the machine can read arguments; the key and the body come from files."""
    commands = [each for each in shown.text.split("curl ")[1:] if each.startswith("-X")]
    assert len(commands) == 3
    for command in commands:
        assert "-H @api-key.txt" in command
    assert "--data @setup.json" in commands[1]
    for leak in ("$API_KEY", "X-Api-Key: $", " -d ", "--data '", "--data-raw", "Bearer $"):
        assert leak not in shown.text, leak
    assert not [each for each in shown.text.splitlines() if "auth_token" in each and "curl" in each]
