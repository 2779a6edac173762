"""The cookie goes out when it is new, rotated or removed; what comes in is never trusted."""

from __future__ import annotations

import logging
import re

import pytest

from gridsession.identity import new_id
from gridsession.testing import ManualClock
from tests.provider.harness import Outage, Spy, data_of, in_loop, stored
from tests.web.driver import FRAMEWORKS, Asked, Browser, Reply, browsing

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)


async def shop(asked: Asked) -> Reply:
    match asked.path.strip("/"):
        case "add":
            asked.session["n"] = asked.session.get("n", 0) + 1
        case "read":
            return Reply(str(asked.session.get("n")).encode())
        case "rotate":
            asked.session.regenerate_id()
        case "login":
            asked.session.user = "ann"
        case "logout":
            asked.session.clear()
        case "abandon":
            asked.session.abandon()
        case "save and clear":
            asked.session["n"] = 1
            await asked.session.save()
            asked.session.clear()
        case "vary":
            asked.session.get("n")
            return Reply(headers={"Vary": "Accept-Encoding, Accept"})
        case "vary all":
            asked.session.get("n")
            return Reply(headers={"vary": "*"})
        case "vary cookie":
            asked.session.get("n")
            return Reply(headers={"VARY": "accept,COOKIE"})
    return Reply()


@ALL
@in_loop
async def test_the_cookie_is_sent_when_it_is_new_and_not_again(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        first = await browser.ask(path="/add")
        assert re.fullmatch(
            r"session=[\w-]{64}; Path=/; HttpOnly; SameSite=Lax", first.set_cookie or ""
        )
        for path in ("/add", "/read", "/untouched", "/add"):
            assert (await browser.ask(path=path)).set_cookie is None
        assert (await browser.ask(path="/read")).body == b"3"


@ALL
@in_loop
async def test_nothing_stored_nothing_sent(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        for path in ("/", "/read", "/logout", "/abandon", "/rotate"):
            assert (await browser.ask(path=path)).set_cookie is None
    assert grid.asked == []


@ALL
@in_loop
async def test_a_rotated_id_is_sent_and_the_data_stays(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        await browser.ask(path="/add")
        for path in ("/rotate", "/login"):
            before = browser.cookie
            assert (await browser.ask(path=path)).set_cookie
            assert browser.cookie != before
            assert (await browser.ask(path="/read")).body == b"1"
        assert (await browser.ask(path="/login")).set_cookie is None


@ALL
@in_loop
async def test_a_replaced_id_is_never_answered_with_a_cookie(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid, rolling=True, max_age=60) as browser:
        await browser.ask(path="/add")
        old = browser.cookie
        await browser.ask(path="/rotate")
        new, browser.cookie = browser.cookie, old
        for path in ("/read", "/add", "/rotate"):
            answer = await browser.ask(path=path)
            assert (answer.status, answer.set_cookie) == (200, None)
        browser.cookie = new
        await browser.ask(path="/login")
        browser.cookie = new
        refused = await browser.ask(path="/read")
        assert (refused.status, refused.set_cookie) == (503, None)
        assert refused.header("retry-after") == ["1"]


@ALL
@pytest.mark.parametrize("path", ["/logout", "/abandon"])
@in_loop
async def test_the_cookie_is_removed_with_the_session(grid: Spy, framework: str, path: str) -> None:
    async with browsing(framework, shop, grid, path="/", domain="a.test") as browser:
        await browser.ask(path="/add")
        gone = await browser.ask(path=path)
        assert gone.set_cookie == (
            "session=; Path=/; Expires=Thu, 01 Jan 1970 00:00:00 GMT; Max-Age=0; "
            "HttpOnly; SameSite=Lax; Domain=a.test"
        )
        assert browser.cookie is None


@ALL
@in_loop
async def test_rolling_sends_the_cookie_whenever_the_session_was_used(
    grid: Spy, framework: str
) -> None:
    async with browsing(framework, shop, grid, rolling=True, max_age=60) as browser:
        assert (await browser.ask(path="/read")).set_cookie is None  # nothing is stored
        await browser.ask(path="/add")
        before = browser.cookie
        rolled = await browser.ask(path="/read")
        assert browser.cookie == before
        assert "; Max-Age=60;" in (rolled.set_cookie or "")
        assert (await browser.ask(path="/untouched")).set_cookie is None
        assert "Max-Age=0" in ((await browser.ask(path="/logout")).set_cookie or "")


@in_loop
async def test_rolling_without_max_age_rolls_nothing(grid: Spy) -> None:
    async with browsing("asgi", shop, grid, rolling=True) as browser:
        await browser.ask(path="/add")
        assert (await browser.ask(path="/read")).set_cookie is None


@ALL
@in_loop
async def test_what_used_the_session_varies_by_the_cookie(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        for _ in range(2):  # without a cookie, and with one
            assert (await browser.ask(path="/untouched")).header("vary") == []
            assert (await browser.ask(path="/read")).header("vary") == ["Cookie"]
            assert (await browser.ask(path="/add")).header("vary") == ["Cookie"]
            merged = (await browser.ask(path="/vary")).header("vary")
            assert merged == ["Accept-Encoding, Accept, Cookie"]
            assert (await browser.ask(path="/vary all")).header("vary") == ["*"]
            assert (await browser.ask(path="/vary cookie")).header("vary") == ["accept,COOKIE"]
        assert (await browser.ask(path="/abandon")).header("vary") == ["Cookie"]


@in_loop
async def test_several_vary_headers_become_one_and_others_stay(grid: Spy) -> None:
    async with browsing("asgi", shop, grid) as browser:
        headers = [
            (b"Vary", b"accept"),
            (b"x", b"1"),
            (b"vary", b"origin"),
            (b"Set-Cookie", b"a=b"),
        ]

        async def app(scope, receive, send):  # type: ignore[no-untyped-def]
            scope["session"].get("n")
            await send({"type": "http.response.start", "status": 200, "headers": iter(headers)})
            await send({"type": "http.response.body"})

        browser.app.app = app  # type: ignore[attr-defined]
        answer = await browser.start().answered()
        assert answer.sent[0]["headers"] == [
            (b"x", b"1"),
            (b"Set-Cookie", b"a=b"),
            (b"vary", b"accept, origin, Cookie"),
        ]


# -- hostile cookies ------------------------------------------------------------------------------


@ALL
@in_loop
async def test_a_cookie_that_came_twice_is_none(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with browsing(framework, shop, grid) as browser:
        await browser.ask(path="/add")
        mine, browser.cookie = browser.cookie, None
        planted = await stored(browser.provider, n=666)
        for headers in (
            [(b"cookie", f"session={planted}; session={mine}".encode())],
            [(b"cookie", f"session={mine}".encode()), (b"cookie", b"session=x")],
        ):
            grid.calls.clear()
            answer = await browser.start(path="/read", headers=headers).answered()
            assert answer.body == b"None"
            assert grid.asked == []
        (record,) = [r for r in caplog.records if "came 2 times" in r.getMessage()]
        assert record.levelno == logging.WARNING  # one for both: any client can cause it
        assert mine not in record.getMessage()  # type: ignore[operator]
        two = [(b"cookie", f"session={mine}; session=".encode())]
        answer = await browser.start(path="/add", headers=two).answered()
        assert answer.set_cookie
        assert mine not in answer.set_cookie  # type: ignore[operator]
        assert await data_of(browser.provider, str(mine)) == {"n": 1}


BAD_COOKIES = [
    "",
    "x",
    '"' + "A" * 64 + '"',
    "A" * 63,
    "A" * 65,
    "A" * 20_000,
    "A" * 63 + "%",
    "../../../etc/passwd",
    "\x00" * 64,
    "é" * 32,
]


@ALL
@pytest.mark.parametrize("cookie", BAD_COOKIES, ids=lambda c: repr(c)[:20])
@in_loop
async def test_a_malformed_cookie_costs_no_call(grid: Spy, framework: str, cookie: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        browser.cookie = cookie
        answer = await browser.ask(path="/read")
        assert (answer.status, answer.body, answer.set_cookie) == (200, b"None", None)
        assert grid.asked == []
        assert (await browser.ask(path="/add")).set_cookie
        assert browser.cookie != cookie
        assert grid.asked == ["create"]


@ALL
@in_loop
async def test_an_unknown_id_is_never_adopted(grid: Spy, framework: str) -> None:
    async with browsing(framework, shop, grid) as browser:
        invented = browser.cookie = new_id(bytes(48))
        assert (await browser.ask(path="/read")).set_cookie is None
        assert grid.asked == ["acquire"]
        await browser.ask(path="/add")
        assert browser.cookie != invented
        mine, browser.cookie = browser.cookie, invented
        assert (await browser.ask(path="/read")).body == b"None"
        browser.cookie = mine
        assert (await browser.ask(path="/read")).body == b"1"


@ALL
@in_loop
async def test_an_outage_deletes_no_cookie(grid: Spy, framework: str, clock: ManualClock) -> None:
    async with browsing(framework, shop, grid) as browser:
        await browser.ask(path="/add")
        grid.before = away = Outage()
        for path in ("/add", "/read", "/logout", "/untouched"):
            answer = await browser.ask(path=path)
            assert (answer.status, answer.set_cookie) == (503, None)
        away.over()
        assert (await browser.ask(path="/read")).body == b"1"


async def _cookie_line(browser: Browser) -> str | None:
    return (await browser.ask(path="/add")).set_cookie


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_age": 60}, "session=ID; Path=/; Max-Age=60; HttpOnly; SameSite=Lax"),
        ({"https_only": True}, "__Host-session=ID; Path=/; HttpOnly; SameSite=Lax; Secure"),
        (
            {"session_cookie": "sid", "path": "/shop", "same_site": "strict", "domain": "a.b"},
            "sid=ID; Path=/shop; HttpOnly; SameSite=Strict; Domain=a.b",
        ),
        (
            {"https_only": True, "same_site": "none", "partitioned": True},
            "__Host-session=ID; Path=/; HttpOnly; SameSite=None; Secure; Partitioned",
        ),
    ],
)
@in_loop
async def test_settings_reach_the_cookie(grid: Spy, options: dict[str, object], line: str) -> None:
    async with browsing("asgi", shop, grid, **options) as browser:
        assert re.sub(r"[\w-]{64}", "ID", await _cookie_line(browser) or "") == line
        assert await _cookie_line(browser) is None
