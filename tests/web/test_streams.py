"""Nothing is locked while a stream or a background task lives, nor after the response."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from gridsession import (
    Session,
    SessionClosed,
)
from tests.provider.harness import (
    Spy,
    data_of,
    in_loop,
    is_free,
    steps,
    stored,
)
from tests.web.driver import FRAMEWORKS, Asked, Reply, browsing
from tests.web.live import serving

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)


@ALL
@in_loop
async def test_a_stream_runs_unlocked_and_may_lock_in_between(grid: Spy, framework: str) -> None:
    notes: list[Any] = []

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        session["n"] = 1

        async def chunks() -> AsyncIterator[bytes]:
            notes.append(await is_free(grid, session.id))
            async with browser.provider.open(session.id) as other:
                other["n"] += 10
            notes.append(session["n"])
            with pytest.raises(SessionClosed, match=r"session\.exclusive\(\)"):
                session["n"] = 5
            with pytest.raises(SessionClosed, match=r"session\.exclusive\(\)"):
                session.abandon()
            yield b"one "
            async with session.exclusive() as s:
                s["n"] += 100
                with pytest.raises(SessionClosed, match="headers have left"):
                    s.user = "ann"
                with pytest.raises(SessionClosed, match="headers have left"):
                    s.regenerate_id()
            yield str(session["n"]).encode()

        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid) as browser:
        answer = await browser.ask()
        assert answer.error is None
        assert answer.body == b"one 111"
        assert notes == [True, 1]
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 111}


@ALL
@in_loop
async def test_a_background_task_runs_unlocked(grid: Spy, framework: str) -> None:
    notes: list[Any] = []

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        session["n"] = 1

        async def work() -> None:
            notes.append(await is_free(grid, session.id))
            with pytest.raises(SessionClosed):
                session["n"] = 2
            with pytest.raises(SessionClosed):
                await session.save()
            async with session.exclusive() as s:
                s["n"] += 1
            async with browser.provider.open(session.id, holder="mail") as own:
                own["n"] += 10

        return Reply(background=work)

    async with browsing(framework, handler, grid) as browser:
        assert (await browser.ask()).error is None
        assert notes == [True]
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 12}


@ALL
@in_loop
async def test_a_new_session_cannot_begin_once_the_headers_have_left(
    grid: Spy, framework: str
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session
        _ = session.get("n")

        async def chunks() -> AsyncIterator[bytes]:
            with pytest.raises(SessionClosed, match="nothing to lock"):
                async with session.exclusive():
                    pass
            yield b"done"

        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid) as browser:
        answer = await browser.ask()
        assert (answer.body, answer.error, answer.set_cookie) == (b"done", None, None)
    assert grid.asked == []


@ALL
@pytest.mark.parametrize("changed_before", [False, True])
@pytest.mark.parametrize("access", ["exclusive", "read_only"])
@in_loop
async def test_a_nested_change_after_the_end_is_logged_with_its_key(
    grid: Spy,
    framework: str,
    changed_before: bool,
    access: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session
        cart = session["cart"]
        if changed_before and access == "exclusive":
            cart.append("before")

        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            cart.append("m4rk3r")
            yield b"two"

        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid, access=access) as browser:
        browser.cookie = await stored(browser.provider, cart=[], other=1)
        answer = await browser.ask()
        assert (answer.status, answer.body) == (200, b"onetwo")
        (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
        assert "'cart'" in record.getMessage()
        assert "exclusive()" in record.getMessage()
        assert "m4rk3r" not in record.getMessage()
        kept = ["before"] if changed_before and access == "exclusive" else []
        assert (await data_of(browser.provider, browser.cookie))["cart"] == kept


@ALL
@in_loop
async def test_a_stream_that_changes_nothing_logs_nothing(
    grid: Spy, framework: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session

        async def chunks() -> AsyncIterator[bytes]:
            for key, value in session.items():
                yield f"{key}={value} ".encode()

        session["cart"].append(1)
        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, cart=[], b=2)
        assert (await browser.ask()).body == b"cart=[1] b=2 "
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


@ALL
@in_loop
async def test_a_stream_begun_before_the_end_goes_on_after_it(grid: Spy, framework: str) -> None:
    async def handler(asked: Asked) -> Reply:
        items = iter(asked.session.items())

        async def chunks() -> AsyncIterator[bytes]:
            for key, value in items:
                yield f"{key}={value} ".encode()

        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, a=[1], b=2)
        assert (await browser.ask()).body == b"a=[1] b=2 "


@in_loop
async def test_an_exception_in_a_stream_undoes_nothing(grid: Spy) -> None:
    async def handler(asked: Asked) -> Reply:
        asked.session["n"] = 2

        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            raise ZeroDivisionError

        return Reply(chunks=chunks)

    async with browsing("asgi", handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        assert isinstance((await browser.ask()).error, ZeroDivisionError)
        assert await data_of(browser.provider, browser.cookie) == {"n": 2}


@pytest.mark.parametrize("waits", [False, True], ids=["inside", "waits"])
@pytest.mark.parametrize("outcome", ["answers", "fails"])
@ALL
@in_loop
async def test_a_task_that_outlives_its_request_keeps_its_lock(
    grid: Spy, framework: str, outcome: str, waits: bool
) -> None:
    started: list[asyncio.Task[None]] = []
    request_ended = asyncio.Event()

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        await session.release()

        async def count() -> None:
            async with session.exclusive() as s:
                s["n"] += 1
                await request_ended.wait()
                s["n"] += 1

        if waits:
            await holding.__aenter__()
        started.append(asyncio.create_task(count()))
        await steps(10)
        if outcome == "fails":
            raise ZeroDivisionError
        return Reply()

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        holding = browser.provider.open(browser.cookie)
        answer = await browser.ask()
        assert (answer.error is None) is (outcome == "answers")
        assert await data_of(browser.provider, browser.cookie) == {"n": 1}  # no half of a block
        assert not await is_free(grid, browser.cookie)
        request_ended.set()
        if waits:
            await holding.__aexit__(None, None, None)
        await started[0]
        assert await data_of(browser.provider, browser.cookie) == {"n": 3}
        assert await is_free(grid, browser.cookie)


@ALL
@in_loop
async def test_a_task_that_outlives_its_request_opens_the_session_itself(
    grid: Spy, framework: str
) -> None:
    started: list[asyncio.Task[None]] = []
    request_ended = asyncio.Event()

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        session["n"] = 1

        async def work() -> None:
            await request_ended.wait()
            assert session["n"] == 1  # what the request left can still be read
            with pytest.raises(SessionClosed, match=r"session\.exclusive\(\)"):
                session["n"] = 2
            async with browser.provider.open(session.id, holder="import") as own:
                own["n"] += 1

        started.append(asyncio.create_task(work()))
        return Reply()

    async with browsing(framework, handler, grid) as browser:
        assert (await browser.ask()).error is None
        request_ended.set()
        await started[0]
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 2}


@in_loop
async def test_a_session_can_be_locked_long_after_its_request(grid: Spy) -> None:
    kept: list[Session] = []

    async def handler(asked: Asked) -> Reply:
        kept.append(asked.session)
        return Reply()

    async with browsing("asgi", handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=1)
        await browser.ask()
        for _ in range(2):
            async with kept[0].exclusive() as s:
                s["n"] += 1
        assert kept[0]["n"] == 3
        assert await data_of(browser.provider, browser.cookie) == {"n": 3}


# -- over the wire --------------------------------------------------------------------------------


@in_loop
async def test_a_slow_reader_holds_no_lock(real_grid: Spy) -> None:
    sending = 0

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        session["n"] += 1

        async def chunks() -> AsyncIterator[bytes]:
            nonlocal sending
            while sending < 64:  # MiB: more than any buffer takes
                async with session.exclusive() as s:
                    s["chunks"] = sending = sending + 1
                yield bytes(1 << 20)

        return Reply(chunks=chunks if asked.path == "/stream" else None)

    async with browsing("starlette", handler, real_grid) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        async with serving(browser.app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            asked = (
                f"GET /stream HTTP/1.1\r\nhost: test\r\ncookie: session={browser.cookie}\r\n\r\n"
            )
            writer.write(asked.encode())
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            before = -1
            while before != sending:  # until the server waits for the client
                before = sending
                await asyncio.sleep(0.1)
            assert await is_free(real_grid, browser.cookie)
            real_grid.calls.clear()
            assert (await browser.ask()).status == 200
            assert real_grid.asked == ["acquire", "commit"]  # at once
            data = await data_of(browser.provider, browser.cookie)
            assert data == {"n": 2, "chunks": before}
            writer.transport.abort()


@in_loop
async def test_server_sent_events(real_grid: Spy) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session
        if asked.path == "/add":
            session["n"] = session.get("n", 0) + 1
            return Reply()
        session.setdefault("n", 0)

        async def chunks() -> AsyncIterator[bytes]:
            for number in range(3):
                await may_send.acquire()
                async with session.exclusive() as s:
                    s["sent"] = number + 1
                yield f"id: {number}\ndata: {session['n']}\n\n".encode()

        return Reply(headers={"content-type": "text/event-stream"}, chunks=chunks)

    may_send = asyncio.Semaphore(1)
    async with browsing("starlette", handler, real_grid) as browser, serving(browser.app) as port:
        async with (
            httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
            client.stream("GET", "/events") as answer,
        ):
            assert answer.headers["vary"] == "Cookie"
            browser.cookie = answer.cookies["session"]  # a new one, with the first headers
            lines = answer.aiter_lines()
            for number in range(3):
                assert await anext(lines) == f"id: {number}"
                assert await anext(lines) == f"data: {number}"
                assert await anext(lines) == ""
                assert await is_free(real_grid, browser.cookie)
                assert (await browser.ask("POST", "/add")).status == 200
                may_send.release()
        assert await data_of(browser.provider, browser.cookie) == {"n": 3, "sent": 3}
