"""Promise 7 at the middleware: cancelled at any await, a request leaves a whole record and no lock.

Each request is made again and again, cancelled one step later each time, until it comes to its end.
The grid suspends before and after each of its calls, the server in each `receive` and `send`; what
the server was given counts as acknowledged, and has to be stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

from gridsession import SessionClosed, SessionProvider, SessionSettings
from gridsession.grids.memory import MemoryGrid
from gridsession.web.types import ASGIApp, Message, Receive, Scope, Send
from tests.provider.harness import (
    Spy,
    in_loop,
    is_free,
    make_grid,
    provider_on,
    steps,
    stored,
)
from tests.web.driver import FRAMEWORKS, Asked, Browser, Exchange, Handler, Reply

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)
OLD: dict[str, Any] = {"a": [1], "b": "old"}
NEW: dict[str, Any] = {"a": [1, 2], "b": "new"}
MORE: dict[str, Any] = NEW | {"c": 3}
GONE: dict[str, Any] = {}
MOST_STEPS = 400


async def changes(asked: Asked) -> Reply:
    await asked.body()
    asked.session["a"].append(2)
    asked.session["b"] = "new"
    return Reply()


async def rotates(asked: Asked) -> Reply:
    asked.session.regenerate_id()
    return await changes(asked)


async def saves(asked: Asked) -> Reply:
    await changes(asked)
    await asked.session.save()
    asked.session["c"] = 3
    return Reply()


async def releases(asked: Asked) -> Reply:
    await changes(asked)
    await asked.session.release()
    async with asked.session.exclusive() as s:
        s["c"] = 3
    return Reply()


async def streams(asked: Asked) -> Reply:
    session = asked.session

    async def chunks() -> AsyncIterator[bytes]:
        yield b"begun"
        async with session.exclusive() as s:
            s["c"] = 3
        yield b"done"

    reply = await changes(asked)
    reply.chunks = chunks
    return reply


async def works_on(asked: Asked) -> Reply:
    session = asked.session

    async def work() -> None:
        async with session.exclusive() as s:
            s["c"] = 3

    reply = await changes(asked)
    reply.background = work
    return reply


async def works_beside(asked: Asked) -> Reply:
    session, entered = asked.session, asyncio.Event()

    async def work() -> None:
        with contextlib.suppress(SessionClosed):  # the request was given up
            async with session.exclusive() as s:
                entered.set()
                await steps(5)
                s["c"] = 3

    reply = await changes(asked)
    task = asyncio.create_task(work())
    task.add_done_callback(asyncio.Task.result)
    await entered.wait()
    return reply  # its headers wait for the block


async def ends(asked: Asked) -> Reply:
    asked.session.clear()
    return Reply()


async def reads(asked: Asked) -> Reply:
    assert asked.session["b"] == "old"
    return Reply()


async def fails(asked: Asked) -> Reply:
    asked.session["b"] = "never"
    raise ZeroDivisionError


async def cannot_be_stored(asked: Asked) -> Reply:
    asked.session["a"].append(object())
    return Reply()


async def creates(asked: Asked) -> Reply:
    asked.session.update(NEW)
    return Reply()


async def creates_and_saves(asked: Asked) -> Reply:
    asked.session.update(NEW)
    await asked.session.save()
    asked.session["c"] = 3
    return Reply()


@dataclass
class Case:
    """A handler, and what may be stored in the end.

    Attributes:
        states: from what there was, to what there is when nothing is cancelled.
        begun: how many of them are out of the question once the response has begun.
    """

    handler: Handler
    states: list[dict[str, Any]]
    begun: int
    access: str = "exclusive"


CASES = {
    case.handler.__name__: case
    for case in (
        Case(changes, [OLD, NEW], 1),
        Case(rotates, [OLD, NEW], 1),
        Case(saves, [OLD, NEW, MORE], 2),
        Case(releases, [OLD, NEW, MORE], 2),
        Case(streams, [OLD, NEW, MORE], 1),
        Case(works_on, [OLD, NEW, MORE], 1),
        Case(works_beside, [OLD, MORE], 1),
        Case(ends, [OLD, GONE], 1),
        Case(reads, [OLD], 0, "read_only wait_for_writer"),
        Case(fails, [OLD], 0),
        Case(cannot_be_stored, [OLD], 0),
        Case(creates, [GONE, NEW], 1),
        Case(creates_and_saves, [GONE, MORE], 1),
    )
}
EACH_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


async def suspend(name: str) -> None:
    await asyncio.sleep(0)


class Suspending:
    """A server each of whose `receive` and `send` may be cancelled, before and after its effect."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def slow_receive() -> Message:
            await asyncio.sleep(0)
            return await receive()

        async def slow_send(message: Message) -> None:
            await asyncio.sleep(0)
            await send(message)
            await asyncio.sleep(0)

        await self._app(scope, slow_receive, slow_send)


# -- ways of being cancelled --------------------------------------------------------------------

Stop = Callable[[Browser, int], Awaitable[tuple[Exchange, bool]]]


async def _go_on(exchange: Exchange, number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)
        if exchange.task.done():
            break


def once(*, again: int | None = None) -> Stop:
    """`Task.cancel` after some steps of the event loop, and once more after some others."""

    async def stop(browser: Browser, step: int) -> tuple[Exchange, bool]:
        exchange = browser.start("POST", body=[b"x", b"y"])
        await _go_on(exchange, step)
        stopped = exchange.task.cancel()
        if again is not None:
            await _go_on(exchange, again)
            exchange.task.cancel()
        await asyncio.wait([exchange.task])
        return exchange, stopped

    return stop


async def for_good(browser: Browser, step: int) -> tuple[Exchange, bool]:
    """Anyio's cancel scope, as Starlette uses it: from now on, each await is cancelled."""
    scopes: list[anyio.CancelScope] = []
    app = browser.app

    async def scoped(scope: Scope, receive: Receive, send: Send) -> None:
        with anyio.CancelScope() as cancel_scope:
            scopes.append(cancel_scope)
            await app(scope, receive, send)

    browser.app = scoped
    exchange = browser.start("POST", body=[b"x", b"y"])
    await asyncio.sleep(0)
    await _go_on(exchange, step)
    stopped = not exchange.task.done()
    scopes[0].cancel()
    await asyncio.wait([exchange.task])
    return exchange, stopped


class _CancelledAt:
    """Awaits a coroutine; the task is cancelled while it is suspended for the nth time."""

    def __init__(self, main: Coroutine[Any, Any, None], at: int) -> None:
        self._main = main
        self.left = at

    def __await__(self) -> Generator[Any, None, None]:
        raised: BaseException | None = None
        while True:
            try:
                waits_for = self._main.throw(raised) if raised else self._main.send(None)
            except StopIteration:
                return
            if self.left == 0:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            self.left -= 1
            try:
                yield waits_for
                raised = None
            except BaseException as error:
                raised = error


async def at_suspension(browser: Browser, step: int) -> tuple[Exchange, bool]:
    """At the request's own nth suspension, whoever goes on meanwhile: other tasks, or threads."""
    app = browser.app
    cancelling: list[_CancelledAt] = []

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        cancelling.append(_CancelledAt(_as_coroutine(app(scope, receive, send)), step))
        await cancelling[0]

    browser.app = counted
    exchange = browser.start("POST", body=[b"x", b"y"])
    await asyncio.wait([exchange.task])
    return exchange, cancelling[0].left < 0


async def _as_coroutine(awaitable: Awaitable[None]) -> None:
    await awaitable


# -- each request, cancelled at each await ------------------------------------------------------


def sent_id(exchange: Exchange) -> str | None:
    line = exchange.set_cookie
    return None if line is None else line.partition("=")[2].partition(";")[0] or None


async def what_is_stored(provider: SessionProvider, session_id: str) -> dict[str, Any]:
    async with provider.open(session_id) as session:
        return dict(session)


def nothing_is_held(grid: Spy) -> bool:
    """Of no record at all, also of those whose id nobody was given."""
    if not isinstance(grid.inner, MemoryGrid):
        return True
    records = grid.inner._table._records.values()
    return all(record.lock_token is None and not record.tickets for record in records)


async def at_each_await(
    grid: Spy, framework: str, case: Case, stop: Stop, *, held: bool = False, slow: bool = True
) -> int:
    """How many awaits there were."""
    new = case.states[0] is GONE
    step, stopped = 0, True
    while stopped:
        async with provider_on(grid, access=case.access) as provider:
            app = FRAMEWORKS[framework](case.handler, provider=provider)
            browser = Browser(Suspending(app), provider)
            if not new:
                browser.cookie = await stored(provider, **OLD)
            grid.calls.clear()
            grid.step(suspend if slow else None)
            holding = asyncio.create_task(_hold(provider, browser.cookie, step)) if held else None
            for _ in range(4 if held else 0):
                await asyncio.sleep(0)
            exchange, stopped = await stop(browser, step)
            if holding is not None:
                await holding
            grid.step(None)
        # The provider is closed: what it had to withdraw or to finish is withdrawn and finished.
        assert nothing_is_held(grid)
        begun = [m["status"] for m in exchange.sent if m["type"] == "http.response.start"]
        complete = [m for m in exchange.sent if m.get("more_body") is False] and not stopped
        session_id = sent_id(exchange) or browser.cookie
        if session_id is not None:
            assert await is_free(grid, session_id)
            async with provider_on(grid) as provider:
                data = await what_is_stored(provider, session_id)
            possible = case.states
            if begun == [200]:
                possible = possible[case.begun :]
            if complete:
                possible = possible[-1:]
            assert data in possible, (step, begun)
        elif begun == [200]:
            raise AssertionError("a new session was acknowledged without its id")
        step += 1
        assert step < MOST_STEPS
    return step


async def _hold(provider: SessionProvider, session_id: str | None, step: int) -> None:
    async with provider.open(session_id, holder="another"):
        for _ in range(5 + step // 2):  # let go earlier and later, seen from the other's await
            await asyncio.sleep(0)


@EACH_CASE
@ALL
@in_loop
async def test_cancelled_at_each_await(
    grid: Spy, framework: str, case: Case, caplog: pytest.LogCaptureFixture
) -> None:
    assert await at_each_await(grid, framework, case, once()) >= 5
    if case.handler not in (cannot_be_stored, creates):  # what is told is not stored
        told = {
            r.getMessage().partition(": ")[2] for r in caplog.records if r.levelno > logging.INFO
        }
        # Of a session that was cancelled while it was made, nobody has the id.
        made = case.states[0] is GONE
        assert told <= ({"the work of a cancelled request was not stored"} if made else set())


@EACH_CASE
@in_loop
async def test_cancelled_at_each_await_and_once_more(grid: Spy, case: Case) -> None:
    assert await at_each_await(grid, "asgi", case, once(again=1)) >= 5


@EACH_CASE
@ALL
@in_loop
async def test_cancelled_for_good_at_each_await(grid: Spy, framework: str, case: Case) -> None:
    assert await at_each_await(grid, framework, case, for_good) >= 5


@pytest.mark.parametrize(
    "stop", [once(), once(again=1), for_good], ids=["once", "twice", "for good"]
)
@pytest.mark.parametrize("case", [changes, rotates, ends, reads], ids=lambda h: h.__name__)
@in_loop
async def test_cancelled_at_each_await_of_a_request_that_waits(
    grid: Spy, case: Handler, stop: Stop
) -> None:
    assert await at_each_await(grid, "asgi", CASES[case.__name__], stop, held=True) >= 10


@EACH_CASE
@in_loop
async def test_cancelled_at_each_await_of_a_grid_with_a_thread(tmp_path: Path, case: Case) -> None:
    grid = Spy(make_grid("durable", tmp_path))
    await grid.open()
    try:
        assert await at_each_await(grid, "asgi", case, at_suspension, slow=False) >= 3
    finally:
        await grid.inner.close()


@pytest.mark.parametrize("stop", [once(), for_good], ids=["once", "for good"])
@in_loop
async def test_cancelled_at_each_await_of_the_first_request_of_all(grid: Spy, stop: Stop) -> None:
    """Without lifespan it opens the grid; the next one finds it open, or opens it."""
    step, stopped = 0, True
    while stopped:
        provider = SessionProvider(SessionSettings(sweep_interval=3600), grid=grid)
        browser = Browser(Suspending(FRAMEWORKS["asgi"](creates, provider=provider)), provider)
        grid.step(suspend)
        app = browser.app
        _, stopped = await stop(browser, step)
        grid.step(None)
        browser.app = app
        assert (await browser.ask("POST")).status == 200
        await provider.close()
        async with provider_on(grid) as other:
            assert await what_is_stored(other, str(browser.cookie)) == NEW
        step += 1
        assert step < MOST_STEPS


# -- clients that go ----------------------------------------------------------------------------


class Older:
    """A server of an ASGI before 2.4: Starlette listens beside a stream, and cancels it."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app({**scope, "asgi": {"version": "3.0", "spec_version": "2.3"}}, receive, send)


class Raising:
    """A server of ASGI 2.4, whose `send` says that the client is gone."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def raising_send(message: Message) -> None:
            await send(message)
            raise ConnectionResetError("the client is gone")

        await self._app(scope, receive, raising_send)


@pytest.mark.parametrize("server", [Older, Raising], ids=lambda s: s.__name__)
@pytest.mark.parametrize("case", [changes, rotates, streams, ends], ids=lambda h: h.__name__)
@ALL
@in_loop
async def test_a_client_that_goes_at_any_step_of_the_handler_or_the_commit_undoes_nothing(
    grid: Spy, framework: str, case: Handler, server: Callable[[ASGIApp], ASGIApp]
) -> None:
    states = CASES[case.__name__].states
    entered: list[bool] = []

    async def handler(asked: Asked) -> Reply:
        reply = await case(asked)
        entered.append(True)
        return reply

    for step in range(25):
        entered.clear()
        async with provider_on(grid) as provider:
            browser = Browser(server(FRAMEWORKS[framework](handler, provider=provider)), provider)
            browser.cookie = await stored(provider, **OLD)
            grid.step(suspend)
            exchange = browser.start("POST")
            await _go_on(exchange, step)
            exchange.leave()
            await exchange.answered()
            grid.step(None)
        assert entered  # nobody was in its way, so that it never waited
        assert nothing_is_held(grid)
        # An id that has not reached anybody's browser: the one that it has is good as well.
        assert await is_free(grid, browser.cookie)
        async with provider_on(grid) as provider:
            assert await what_is_stored(provider, browser.cookie) in states[1:]


@pytest.mark.parametrize("case", [changes, streams], ids=lambda h: h.__name__)
@ALL
@in_loop
async def test_a_client_that_went_before_the_answer_is_answered_in_vain(
    grid: Spy, framework: str, case: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """Starlette hears of the going before it lets the stream begin."""
    reached, go_on = asyncio.Event(), asyncio.Event()

    async def handler(asked: Asked) -> Reply:
        reply = await case(asked)
        reached.set()
        await go_on.wait()
        return reply

    async with provider_on(grid) as provider:
        app = FRAMEWORKS[framework](handler, provider=provider)
        browser = Browser(Older(Suspending(app)), provider)
        browser.cookie = await stored(provider, **OLD)
        grid.step(suspend)
        exchange = browser.start("POST")
        await reached.wait()
        exchange.leave()
        await _go_on(exchange, 10)
        go_on.set()
        await exchange.answered()
        grid.step(None)
    async with provider_on(grid) as provider:
        assert await what_is_stored(provider, browser.cookie) in (NEW, MORE)
    assert await is_free(grid, browser.cookie)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
