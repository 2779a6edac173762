"""Requests of one session wait their turn; a client that leaves the queue costs nobody anything."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from gridsession import SessionProvider
from gridsession.web.starlette import SessionMiddleware
from tests.provider.harness import (
    Spy,
    data_of,
    in_loop,
    is_free,
    provider_on,
    steps,
    stored,
    until,
)
from tests.web.driver import FRAMEWORKS, Asked, Browser, Exchange, Reply, browsing

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)
BIG = [os.urandom(50_000) for _ in range(8)]  # more than is kept while waiting


class Holder:
    """Somebody who holds a session's lock until told to let go."""

    def __init__(self, provider: SessionProvider, session_id: str) -> None:
        self._open = provider.open(session_id, holder="the holder")

    async def __aenter__(self) -> Holder:
        await self._open.__aenter__()
        self.has_let_go = False
        return self

    async def let_go(self) -> None:
        if not self.has_let_go:
            self.has_let_go = True
            await self._open.__aexit__(None, None, None)

    async def __aexit__(self, *_: object) -> None:
        await self.let_go()


async def echo(asked: Asked) -> Reply:
    body = await asked.body()
    asked.session["n"] = asked.session.get("n", 0) + 1
    return Reply(body)


@ALL
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@in_loop
async def test_requests_of_one_session_run_one_after_the_other(
    grid: Spy, framework: str, loop: str
) -> None:
    running = 0
    order: list[str] = []

    async def handler(asked: Asked) -> Reply:
        nonlocal running
        running += 1
        assert running == 1
        n = asked.session["n"]
        await asyncio.sleep(0.001)
        asked.session["n"] = n + 1
        order.append(asked.path)
        running -= 1
        return Reply()

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        async with Holder(browser.provider, browser.cookie):
            exchanges = []
            for number in range(8):
                exchanges.append(browser.start(path=f"/{number}"))
                await until(lambda number=number: grid.in_line(number + 1))  # type: ignore[misc]
        for exchange in exchanges:
            assert (await exchange.answered()).status == 200
        assert order == [f"/{number}" for number in range(8)]
        assert await data_of(browser.provider, browser.cookie) == {"n": 8}


@ALL
@in_loop
async def test_a_client_that_leaves_the_queue_is_forgotten(grid: Spy, framework: str) -> None:
    ran: list[str] = []

    async def handler(asked: Asked) -> Reply:
        ran.append(asked.path)
        return Reply()

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        async with Holder(browser.provider, browser.cookie) as holder:
            leaving, staying = browser.start(path="/leaving"), browser.start(path="/staying")
            late = browser.start("POST", "/late", body=None)
            late.upload(b"x" * 1000, more=True)
            await until(lambda: grid.in_line(3))
            leaving.leave()
            late.leave()
            for exchange in (leaving, late):
                await exchange.answered()
                assert (exchange.sent, exchange.error) == ([], None)
            assert not staying.task.done()
            await until(lambda: grid.calls.count("release") >= 2)
            await holder.let_go()
            assert (await staying.answered()).status == 200
        assert ran == ["/staying"]
        assert await is_free(grid, browser.cookie)


@ALL
@pytest.mark.parametrize("reader", ["exclusive", "read_only wait_for_writer"])
@pytest.mark.parametrize(
    "body", [[b""], [b"abc"], [b"a", b"", b"b" * 100, b"c"], BIG], ids=["no", "one", "some", "big"]
)
@in_loop
async def test_a_body_that_came_while_waiting_is_read_whole(
    grid: Spy, framework: str, body: list[bytes], reader: str
) -> None:
    async def handler(asked: Asked) -> Reply:
        return Reply(await asked.body())

    async with browsing(framework, handler, grid, access=reader) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        for whole_first in (True, False):
            grid.calls.clear()
            async with Holder(browser.provider, browser.cookie):
                exchange = browser.start("POST", body=body if whole_first else None)
                await until(lambda: "wait" in grid.calls)
                await steps(20)
                if body is BIG and whole_first:
                    assert exchange.received == 2  # no more than is kept: the server holds it back
                if not whole_first:
                    exchange.upload(body[0], more=len(body) > 1)
                    await steps(5)
            for number, chunk in enumerate(body[1:], 2):
                if not whole_first:
                    exchange.upload(chunk, more=number < len(body))
            assert (await exchange.answered()).body == b"".join(body)


@in_loop
async def test_a_client_that_leaves_as_its_turn_comes_is_noticed_by_the_handler(grid: Spy) -> None:
    async def handler(asked: Asked) -> Reply:
        await asked.body()
        return Reply()

    async with browsing("asgi", handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        async with Holder(browser.provider, browser.cookie):
            exchange = browser.start("POST", body=None)
            exchange.upload(b"half", more=True)
            await until(lambda: "wait" in grid.calls)
        exchange.leave()
        await exchange.answered()
        assert exchange.error is None or "the client is gone" in str(exchange.error)
        assert await is_free(grid, browser.cookie)


@in_loop
async def test_a_slow_upload_survives_waiting_in_a_client_that_streams(grid: Spy) -> None:
    """What receives may be a generator, which cancelling it would end."""

    async def handler(asked: Asked) -> Reply:
        return Reply(await asked.body())

    async with browsing("starlette", handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        more = asyncio.Event()

        async def chunks() -> AsyncIterator[bytes]:
            yield b"first "
            await more.wait()
            yield b"second"

        async with httpx2.AsyncClient(
            transport=httpx2.ASGITransport(browser.app),
            base_url="http://test",
            cookies={"session": browser.cookie},
        ) as client:
            async with Holder(browser.provider, browser.cookie):
                asking = asyncio.create_task(client.post("/", content=chunks()))
                await until(lambda: "wait" in grid.calls)
                await steps(10)
            await steps(10)
            more.set()
            assert (await asking).content == b"first second"


@in_loop
async def test_a_body_passes_a_starlette_middleware_outside_of_ours(grid: Spy) -> None:
    class Outside(BaseHTTPMiddleware):
        async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
            return await call_next(request)

    async def endpoint(request: Request) -> Response:
        return PlainTextResponse(await request.body())

    async with provider_on(grid) as provider:
        app = Starlette(
            routes=[Route("/", endpoint, methods=["POST"])],
            middleware=[Middleware(Outside), Middleware(SessionMiddleware, provider=provider)],
        )
        browser = Browser(app, provider)
        browser.cookie = await stored(provider, n=0)
        async with Holder(provider, browser.cookie):
            exchange = browser.start("POST", body=None)
            exchange.upload(b"first ", more=True)
            await until(lambda: "wait" in grid.calls)
            await steps(10)
        await steps(10)
        exchange.upload(b"second", more=False)
        assert (await exchange.answered()).body == b"first second"


# -- cancelled ------------------------------------------------------------------------------------


async def _suspend(name: str) -> None:
    await asyncio.sleep(0)


@pytest.mark.parametrize("held", [False, True], ids=["free", "held"])
@pytest.mark.parametrize("streams", [False, True], ids=["whole", "streams"])
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@in_loop
async def test_a_request_cancelled_at_any_await_leaves_nothing(
    grid: Spy, held: bool, streams: bool, loop: str
) -> None:
    """A server that shuts down, or a time limit, cancels wherever a request happens to be."""

    async def chunks() -> AsyncIterator[bytes]:
        await asyncio.sleep(0)
        yield b"chunk"

    async def handler(asked: Asked) -> Reply:
        await asked.body()
        asked.session["n"] += 1
        return Reply(chunks=chunks if streams else None)

    step, finished = 0, False
    while not finished:
        async with browsing("asgi", handler, grid) as browser:
            browser.cookie = await stored(browser.provider, n=0)
            grid.calls.clear()
            grid.step(_suspend)
            holder = Holder(browser.provider, browser.cookie)
            if held:
                await holder.__aenter__()
            exchange = browser.start("POST", body=[b"a", b"b"])
            for number in range(step):
                await asyncio.sleep(0)
                if held and number == 12:
                    await holder.let_go()
            finished = not exchange.task.cancel()
            await asyncio.wait([exchange.task])
            if held:
                await holder.let_go()
            grid.step(None)
        assert await is_free(grid, browser.cookie)
        async with provider_on(grid) as provider:
            committed = "commit" in grid.calls
            assert await data_of(provider, browser.cookie) == {"n": int(committed)}
        step += 1
        assert step < 200
    assert step >= (12 if held else 5)


@in_loop
async def test_two_waiters_of_which_one_leaves_at_each_moment(grid: Spy) -> None:
    async with browsing("asgi", echo, grid) as browser:
        for step in range(25):
            browser.cookie = await stored(browser.provider, n=0)
            grid.calls.clear()
            grid.step(_suspend)
            exchanges: list[Exchange] = []
            async with Holder(browser.provider, browser.cookie):
                exchanges += (browser.start(path="/1"), browser.start(path="/2"))
                await steps(step)
                exchanges[0].leave()
            for exchange in exchanges:
                await exchange.answered()
            grid.step(None)
            assert exchanges[1].status == 200
            await until(lambda: len(asyncio.all_tasks()) == 1)
            assert await is_free(grid, browser.cookie)
            n = (await data_of(browser.provider, browser.cookie))["n"]
            assert n == 1 + bool(exchanges[0].sent)


@ALL
@pytest.mark.parametrize("size", [1_000, 65_537, 1_000_000])
@in_loop
async def test_a_client_that_leaves_the_queue_after_a_whole_body_is_forgotten(
    grid: Spy, framework: str, size: int
) -> None:
    async def handler(asked: Asked) -> Reply:
        raise AssertionError("the handler ran")

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        async with Holder(browser.provider, browser.cookie):
            exchange = browser.start("POST", body=[b"x" * size])
            await until(lambda: "wait" in grid.calls)
            exchange.leave()
            for _ in range(20):
                await asyncio.sleep(0)
            assert exchange.task.done()


# -- at the end of the server -------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("cancelled", [False, True], ids=["running", "cancelled"])
@in_loop
async def test_the_end_of_the_server_sends_away_who_waits(
    grid: Spy, framework: str, cancelled: bool
) -> None:
    """Before the grid closes: a ticket, or a lock that was just handed over, would stay behind.

    Some servers cancel what is under way in the moment in which they end the lifespan, some let
    it run.
    """

    async def handler(asked: Asked) -> Reply:
        raise AssertionError("the handler ran")

    async with provider_on(grid) as elsewhere:
        cookie = await stored(elsewhere, n=0)
        async with Holder(elsewhere, cookie) as holder:
            async with browsing(framework, handler, grid) as browser:
                browser.cookie = cookie
                exchange = browser.start("POST")
                await until(lambda: "wait" in grid.calls)
                grid.calls.clear()
                if cancelled:
                    exchange.task.cancel()
            assert grid.calls.count("release") == 1  # all is told when the provider has closed
            if not cancelled:
                assert (await exchange.answered()).status == 503
                assert exchange.header("retry-after")
            await asyncio.wait([exchange.task])
            await holder.let_go()
        assert await is_free(grid, cookie)
