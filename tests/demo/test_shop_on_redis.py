"""The shop on Redis: two servers, as two machines would run them, and one set of sessions."""

from __future__ import annotations

import http.client
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.demo.test_shop import Shop, complaint, serve
from tests.farm.servers import wait_for
from tests.redis_server import RedisServer, free_port

SECRET = "hunter2-of-the-shop"
BUSY_SECONDS = 20.0  # what an answer may take on a busy machine


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    options = {"requirepass": SECRET, "appendonly": "yes", "appendfsync": "always"}
    with RedisServer(tmp_path / "redis", **options) as running:
        yield running


@pytest.fixture
def shops(tmp_path: Path, server: RedisServer) -> Iterator[list[Shop]]:
    grid = f"redis://:{SECRET}@127.0.0.1:{server.port}/0"
    with ExitStack() as stack:
        running = []
        for name in ("web1", "web2"):
            (tmp_path / name).mkdir()
            running.append(stack.enter_context(serve(tmp_path / name, WORKERS="1", GRID=grid)))
        yield running
        for shop in running:
            assert shop.stop(signal.SIGTERM) == 0


class Browser:
    """What one browser knows: a cookie, which it shows to both servers."""

    def __init__(self) -> None:
        self.cookie = ""

    def ask(
        self, shop: Shop, method: str, path: str, body: str = ""
    ) -> tuple[int, dict[str, str], str]:
        """Status, headers in small letters, text."""
        connection = http.client.HTTPConnection(urlsplit(shop.url).netloc, timeout=BUSY_SECONDS)
        try:
            kind = "application/x-www-form-urlencoded"
            headers = {"accept": "application/json", "content-type": kind, "cookie": self.cookie}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        if "set-cookie" in found:
            self.cookie = found["set-cookie"].split(";")[0]
        return answer.status, found, text

    def buy(self, shop: Shop) -> int:
        """The status of one click."""
        return self.ask(shop, "POST", "/cart", "sku=lemon")[0]

    def cart(self, shop: Shop) -> dict[str, int]:
        status, _, text = self.ask(shop, "GET", "/cart")
        assert status == 200
        cart: dict[str, int] = json.loads(text)["cart"]
        return cart


def test_two_servers_share_their_sessions(shops: list[Shop], server: RedisServer) -> None:
    one, other = shops
    browser = Browser()
    status, _, page = browser.ask(one, "GET", "/")
    assert status == 200
    shown = f"redis://***@127.0.0.1:{server.port}/0"
    assert f"sessions in {shown} " in one.said
    assert f'<code id="grid">{shown}</code>' in page
    assert SECRET not in page + one.said
    cookie = browser.cookie

    with ThreadPoolExecutor(16) as pool:
        clicks = [pool.submit(browser.buy, shops[n % 2]) for n in range(16)]
        assert [click.result() for click in clicks] == [200] * 16
    assert browser.cart(one) == browser.cart(other) == {"lemon": 16}
    _, _, page = browser.ask(other, "GET", "/")
    assert page.count('class="of-worker"') == 2
    assert browser.cookie == cookie  # nobody had to begin anew
    assert one.complaints == other.complaints == ""


def test_an_outage_empties_no_cart(shops: list[Shop], server: RedisServer) -> None:
    one, other = shops
    browser = Browser()
    browser.ask(one, "GET", "/")
    assert browser.buy(one) == 200
    cookie = browser.cookie

    server.stop()
    for shop in shops:
        status, headers, text = browser.ask(shop, "POST", "/cart", "sku=lemon")
        assert (status, headers["retry-after"]) == (503, "1")
        assert "Please try again" in text
        assert Browser().ask(shop, "GET", "/static/shop.css")[0] == 200
    assert browser.cookie == cookie

    server.start()  # with what it wrote to disk
    wait_for("both shops", lambda: all(browser.ask(it, "GET", "/cart")[0] == 200 for it in shops))
    assert browser.cart(other) == {"lemon": 1}
    assert browser.buy(other) == 200
    assert browser.cart(one) == {"lemon": 2}
    for shop in shops:
        assert "sessions cannot be reached" in shop.complaints
        assert SECRET not in shop.complaints


def test_a_server_that_is_not_there() -> None:
    said = complaint(GRID=f"redis://127.0.0.1:{free_port()}", WORKERS="1")
    assert said.startswith("serve.py: GRID: redis://127.0.0.1:")
    assert "refuses connections: no server listens there; start it, or leave GRID out" in said
    assert said.count("\n") == 1


def test_a_wrong_password(server: RedisServer) -> None:
    said = complaint(GRID=f"redis://:{SECRET}x@127.0.0.1:{server.port}", WORKERS="1")
    assert "refused user and password" in said
    assert SECRET not in said
    assert said.count("\n") == 1
