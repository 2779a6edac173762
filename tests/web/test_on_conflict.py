"""`on_conflict`: who decides where two requests at once changed the same key; and its page."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import re
from pathlib import Path
from typing import Any

import fastapi
import pytest
from starlette.applications import Starlette
from starlette.requests import Request

from gridsession import ABSENT, SessionProvider, SessionSettings, SettingsError
from gridsession.web import access as declarations
from gridsession.web import asgi
from gridsession.web.starlette import SessionMiddleware, session_of
from tests.provider.harness import Spy, change, data_of, in_loop, is_free, provider_on, stored
from tests.web.driver import FRAMEWORKS, Asked, Browser, Reply, start_of_lifespan
from tests.web.test_concurrent_requests import Meeting, both, errors

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)


async def _in_memory(framework: str, **options: Any) -> tuple[Browser, Meeting, Any]:
    """A browser at an application that makes its provider itself; how to stop it."""
    meeting = Meeting()
    app = FRAMEWORKS[framework](
        meeting.handler, connection_string="memory:", access="concurrent", **options
    )
    answer, stop = await start_of_lifespan(app)
    assert answer["type"] == "lifespan.startup.complete", answer
    nobodys: Any = None
    return Browser(app, nobodys), meeting, stop


@ALL
@pytest.mark.parametrize("namespace", ["shop", None])
@in_loop
async def test_the_middlewares_on_conflict_decides(framework: str, namespace: str | None) -> None:
    asked: list[Any] = []

    def on_conflict(key: str, base: Any, theirs: Any, mine: Any) -> Any:
        asked.append((key, base, theirs, mine))
        return [*theirs, *mine]

    options: dict[str, Any] = {"namespace": namespace, "on_conflict": on_conflict}
    browser, _, stop = await _in_memory(framework, **options)
    browser.cookie = None
    first, other = await both(browser, "/cart/a", "/cart/b")  # a session each
    assert first.set_cookie
    assert other.set_cookie
    browser.cookie = first.set_cookie.partition("=")[2].partition(";")[0]
    answers = await both(browser, "/cart/c/tea", "/cart/c/milk")
    assert [x.status for x in answers] == [200, 200]
    ((key, base, theirs, mine),) = asked
    assert (key, base, sorted([theirs, mine])) == ("c", ABSENT, [["milk"], ["tea"]])
    assert (await browser.ask()).body == repr({"a": ["mine"], "c": [*theirs, *mine]}).encode()
    await stop()


@in_loop
async def test_it_also_decides_where_the_mount_path_names_the_sessions() -> None:
    barrier = asyncio.Barrier(2)
    app = fastapi.FastAPI()
    app.root_path = "/shop"  # a deprecated option
    options: dict[str, Any] = {"connection_string": "memory:", "access": "concurrent"}
    app.add_middleware(SessionMiddleware, on_conflict=lambda *values: sum(values[1:]), **options)

    @app.post("/set/{n}")
    async def set_it(request: Request, n: int) -> None:
        session = session_of(request)
        if not session.is_new:
            await barrier.wait()
        session["n"] = n

    @app.get("/")
    async def get(request: Request) -> int:
        return int(session_of(request)["n"])

    _, stop = await start_of_lifespan(app)
    nobodys: Any = None
    browser = Browser(app, nobodys)
    await browser.ask("POST", "/set/1")
    assert [x.status for x in await both(browser, "/set/10", "/set/100")] == [200, 200]
    assert (await browser.ask()).body == b"111"
    await stop()


@ALL
@in_loop
async def test_one_that_raises_is_a_500_with_its_record_and_nothing_stored(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    def on_conflict(*_: Any) -> Any:
        raise ZeroDivisionError("in on_conflict")

    async def handler(asked: Asked) -> Reply:
        asked.session.update(n=2, other=1)
        await change(provider, session_id, n=3)
        return Reply(b"stored")

    async with provider_on(grid, on_conflict=on_conflict, access="concurrent") as provider:
        browser = Browser(FRAMEWORKS[framework](handler, provider=provider), provider)
        session_id = browser.cookie = await stored(provider, n=1)
        caplog.clear()
        answer = await browser.ask("POST")
        assert (answer.status, answer.error) == (500, None)
        assert answer.body == b"Internal Server Error\n"
        assert answer.set_cookie is None
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert record.name == "gridsession"
        assert record.exc_info
        assert isinstance(record.exc_info[1], ZeroDivisionError)
        assert await data_of(provider, session_id) == {"n": 3}
        assert await is_free(grid, session_id)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"on_conflict": "theirs"}, "it must be a function"),
        ({"on_conflict": 0}, "it must be a function"),
        ({"provider": True, "on_conflict": max}, "it is the provider's"),
    ],
)
@pytest.mark.parametrize("middleware", [asgi.SessionMiddleware, SessionMiddleware])
@in_loop
async def test_one_that_cannot_be_used_is_a_settings_error(
    middleware: Any, options: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"connection_string": "memory:"} | options
    if "provider" in options:
        options = {"provider": SessionProvider(), "on_conflict": max}
    app = middleware(Starlette(), **options)  # never raises
    assert isinstance(app.error, SettingsError)
    assert says in str(app.error)
    answer, _ = await start_of_lifespan(app)
    assert answer["type"] == "lifespan.startup.failed"
    assert "on_conflict" in answer["message"]
    assert len(errors(caplog)) == 1


# -- the page about it ----------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs" / "concurrent-requests.md").read_text("utf-8")


@in_loop
async def test_the_pages_cart(monkeypatch: pytest.MonkeyPatch, grid: Spy) -> None:
    monkeypatch.setattr(declarations, "in_use", False)
    monkeypatch.setenv("GRIDSESSION_CONNECTION_STRING", "memory:")
    meet: asyncio.Barrier | None = None

    async def sku_of(name: str) -> str:
        if meet is not None:
            await meet.wait()
        return f"sku of {name}"

    install, cart, with_provider = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    names: dict[str, Any] = {
        "SessionMiddleware": SessionMiddleware,
        "SessionProvider": functools.partial(SessionProvider, grid=grid),
        "SessionSettings": SessionSettings,
        "sku_of": sku_of,
    }
    exec(compile(install, "docs", "exec"), names | {"app": Starlette()})
    exec(compile(cart, "docs", "exec"), names)
    app: Any = names["app"]
    other_app = Starlette(routes=app.routes)
    exec(compile(with_provider, "docs", "exec"), names | {"app": other_app})
    for one in (app, other_app):
        _, stop = await start_of_lifespan(one)
        nobodys: Any = None
        browser = Browser(one, nobodys)
        meet = None
        assert (await browser.ask("POST", "/cart/milk")).status == 200
        meet = asyncio.Barrier(3)
        answers = await both(browser, "/cart/tea", "/cart/tea", "/cart/jam")
        assert [x.status for x in answers] == [200] * 3
        meet = None
        lines = json.loads((await browser.ask("POST", "/cart/salt")).body)
        assert sorted(lines.values()) == [
            f"sku of {name}" for name in ("jam", "milk", "salt", "tea", "tea")
        ]
        await stop()
    on_conflict = names["on_conflict"]
    removed_here, removed_there = {"b": 2, "c": 3}, {"a": 1, "c": 3}
    both_had = {"a": 1, "b": 2, "c": 3}
    assert on_conflict("cart", both_had, removed_there, removed_here | {"d": 4}) == {"c": 3, "d": 4}
    assert on_conflict("else", 1, 2, 3) == 3
