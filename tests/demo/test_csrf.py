"""The CSRF example: whose forms it takes, and that it begins no session without need."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from starlette.testclient import TestClient

TOKEN = re.compile(r'name="csrf" value="([^"]*)"')
HEADER = re.compile(r'<meta name="csrf-token" content="([^"]*)">')
COOKIE = "csrf-example"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example's module, on a grid that is new for each test."""
    monkeypatch.setenv("GRID", "memory://")
    return importlib.reload(importlib.import_module("examples.csrf.app"))


@pytest.fixture
def client(example: ModuleType) -> Iterator[TestClient]:
    with TestClient(example.app, follow_redirects=False) as client:
        yield client


def other_browser(client: TestClient) -> TestClient:
    """At the same application, with cookies of its own."""
    return TestClient(client.app, follow_redirects=False)


def shown_token(client: TestClient) -> str:
    page = client.get("/account")
    assert page.status_code == 200
    tokens = {*TOKEN.findall(page.text), *HEADER.findall(page.text)}
    assert len(tokens) == 1  # the same in each form of the page, and for its scripts
    return str(tokens.pop())


def log_in(client: TestClient, name: str) -> None:
    answer = client.post("/login", data={"csrf": shown_token(client), "name": name})
    assert (answer.status_code, answer.headers["location"]) == (303, "/account")


def test_who_sees_no_form_has_no_session(client: TestClient) -> None:
    for _ in range(2):
        front = client.get("/")
        assert front.status_code == 200
        assert "set-cookie" not in front.headers
    assert COOKIE not in client.cookies
    token = shown_token(client)
    assert COOKIE in client.cookies
    assert shown_token(client) == token  # several open pages go on working
    assert "no-store" in client.get("/account").headers["cache-control"]


@pytest.mark.parametrize("sent", ["nothing", "empty", "another session's", "old", "not ASCII"])
@pytest.mark.parametrize("way", ["field", "header"])
def test_a_post_without_its_sessions_token_changes_nothing(
    client: TestClient, sent: str, way: str
) -> None:
    log_in(client, "ann")
    old = shown_token(client)
    log_in(client, "ann of another house")
    tokens = {
        "empty": "",
        "another session's": shown_token(other_browser(client)),
        "old": old,
        "not ASCII": "tökén",
    }
    form: dict[str, Any] = {"address": "1 Mallory Road"}
    headers: dict[str, Any] = {}
    if sent in tokens and way == "field":
        form["csrf"] = tokens[sent]
    elif sent in tokens:
        headers["x-csrf-token"] = tokens[sent].encode("latin-1")
        form["csrf"] = shown_token(client)  # it does not count: one of them decides
    refused = client.post("/address", data=form, headers=headers)
    assert refused.status_code == 403
    assert "reload the page" in refused.text
    assert "Mallory" not in client.get("/account").text


@pytest.mark.parametrize("way", ["field", "header"])
def test_a_post_with_its_sessions_token_is_taken(client: TestClient, way: str) -> None:
    log_in(client, "ann")
    token = shown_token(client)
    form, headers = {"address": "1 <b>Lane"}, {"x-csrf-token": token}
    if way == "field":
        form, headers = {**form, "csrf": token}, {}
    assert client.post("/address", data=form, headers=headers).status_code == 303
    assert "ann, 1 &lt;b&gt;Lane" in client.get("/account").text
    assert shown_token(client) == token


@pytest.mark.parametrize("path", ["/login", "/address"])
def test_without_a_session_every_post_is_refused_and_begins_none(
    client: TestClient, path: str
) -> None:
    for form in ({}, {"csrf": ""}, {"csrf": "x" * 43}):
        refused = client.post(path, data=form)
        assert refused.status_code == 403
        assert "set-cookie" not in refused.headers


def test_a_login_changes_the_token_and_the_id(client: TestClient) -> None:
    before, id_before = shown_token(client), client.cookies[COOKIE]
    log_in(client, "ann")
    assert client.cookies[COOKIE] != id_before
    assert shown_token(client) != before
    assert client.post("/login", data={"csrf": before, "name": "bob"}).status_code == 403
    assert "Welcome, ann" in client.get("/").text


def test_each_login_gives_a_new_id_to_the_same_user_too(client: TestClient) -> None:
    log_in(client, "ann")
    before, token = client.cookies[COOKIE], shown_token(client)
    log_in(client, "ann")
    assert client.cookies[COOKIE] != before
    assert shown_token(client) != token


@pytest.mark.parametrize("form", [{}, {"name": ""}])
def test_nobody_is_logged_in_without_a_name(client: TestClient, form: dict[str, str]) -> None:
    token = shown_token(client)
    assert client.post("/login", data=form | {"csrf": token}).status_code == 400
    assert shown_token(client) == token
    assert "Welcome</h1>" in client.get("/").text


@pytest.mark.parametrize(
    ("charset", "sent"),
    [
        ("raw_unicode_escape", rb"\ud800"),
        ("utf-7", b"+2AA-"),
        ("undefined", b"x"),
        ("idna", b"xn--a\xff.."),
        ("punycode", b"\xff-\xff"),
        ("none_such", b"\xff"),
    ],
)
@pytest.mark.parametrize("name", ["csrf", "name"])
def test_a_form_of_a_charset_that_gives_no_text_is_refused(
    client: TestClient, charset: str, sent: bytes, name: str
) -> None:
    token = shown_token(client)
    headers = {"content-type": f"multipart/form-data; boundary=B; charset={charset}"}
    if name == "name":
        headers["x-csrf-token"] = token
    part = f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode()
    answer = client.post("/login", content=part + sent + b"\r\n--B--\r\n", headers=headers)
    assert answer.status_code in ((400, 403) if name == "csrf" else (303, 400))
    assert shown_token(client) == token or answer.status_code == 303


def test_nobody_can_be_logged_in_by_another_site(client: TestClient) -> None:
    """Which has a token of its own session, and sends its visitor's browser with it."""
    attackers = shown_token(other_browser(client))
    shown_token(client)
    assert client.post("/login", data={"csrf": attackers, "name": "m"}).status_code == 403


def test_every_route_that_changes_something_is_checked(example: ModuleType) -> None:
    for route in example.app.routes:
        if route.methods - {"GET", "HEAD"}:
            assert route.endpoint.__qualname__ == "post.<locals>.checked"


def test_the_token_is_compared_in_constant_time(
    example: ModuleType, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(given: bytes, expected: bytes) -> bool:
        compared.append((given, expected))
        return given == expected

    monkeypatch.setattr(example.secrets, "compare_digest", compare)
    token = shown_token(client)
    for given, status in ((token, 303), (token[:-1], 403)):
        answer = client.post("/login", data={"csrf": given, "name": "ann"})
        assert answer.status_code == status
        if status == 303:
            token = shown_token(client)
    assert len(compared) == 2
