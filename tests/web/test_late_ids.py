"""An id that changes late leaves with the headers, or does not change; no answer keeps it back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import fastapi
import pytest
from fastapi import Depends

from gridsession import GridUnavailable, Session, SessionClosed, SessionProvider
from gridsession.testing import ManualClock
from gridsession.web.starlette import CurrentSession, SessionMiddleware
from gridsession.web.types import ASGIApp, Receive, Scope, Send
from tests.provider.harness import (
    Hook,
    OnTheWay,
    Outage,
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
CHANGES = pytest.mark.parametrize("how", ["user", "id"])
WAYS = pytest.mark.parametrize("way", ["there", "back"])


def change(session: Session, how: str) -> None:
    """Change the session, and its id with it; or end it."""
    match how:
        case "user":
            session.user = "ann"
        case "id":
            session.regenerate_id()
        case _:
            session.clear()


async def found(provider: SessionProvider, session_id: str | None) -> tuple[str | None, Any]:
    """The user and the data of the session that a browser has."""
    async with provider.open(session_id, access="read_only") as session:
        return session.user, dict(session)


async def check_changed(browser: Browser, answer: Exchange, how: str, old: str | None) -> None:
    """Whether the browser has the session that the change has left."""
    assert answer.set_cookie
    assert browser.cookie != old
    await until(lambda: len(asyncio.all_tasks()) == 1)  # what was cancelled is finished beside
    assert (browser.cookie is None) is (how == "end")
    expected = {"user": ("ann", {"n": 0}), "id": (None, {"n": 0}), "end": (None, {})}
    assert await found(browser.provider, browser.cookie) == expected[how]


# -- after the headers ----------------------------------------------------------------------------


@ALL
@CHANGES
@pytest.mark.parametrize("changed", ["before", "after"])
@in_loop
async def test_a_block_that_ends_after_the_headers_changes_no_id(
    grid: Spy, clock: ManualClock, framework: str, changed: str, how: str
) -> None:
    tasks: list[asyncio.Task[None]] = []
    begun, answered = asyncio.Event(), asyncio.Event()

    async def handler(asked: Asked) -> Reply:
        async def work(session: Session) -> None:
            async with session.exclusive() as s:
                s["n"] = 1
                if changed == "before":
                    change(s, how)
                begun.set()
                await answered.wait()
                if changed == "after":
                    change(s, how)

        tasks.append(asyncio.create_task(work(asked.session)))
        await begun.wait()
        return Reply()

    async with browsing(framework, handler, grid, access="read_only") as browser:
        browser.cookie = await stored(browser.provider, n=0)
        answer = await browser.ask()
        assert (answer.status, answer.error, answer.set_cookie) == (200, None, None)
        answered.set()
        with pytest.raises(SessionClosed, match="headers have left"):
            await tasks[0]
        assert await is_free(grid, browser.cookie)
        clock.advance(11)  # longer than a replaced id is known
        assert await found(browser.provider, browser.cookie) == (None, {"n": 0})


async def locked(session: CurrentSession) -> AsyncIterator[Session]:
    async with session.exclusive() as s:
        yield s


@CHANGES
@in_loop
async def test_a_dependency_that_ends_after_the_headers_changes_no_id(
    grid: Spy, clock: ManualClock, how: str
) -> None:
    """FastAPI leaves a dependency with `yield` when the response has been sent."""
    app = fastapi.FastAPI(openapi_url=None)

    @app.get("/login")
    async def login(session: Annotated[Session, Depends(locked)]) -> str:
        session["n"] = 1
        change(session, how)
        return "welcome"

    async with provider_on(grid, access={"/login": "read_only"}) as provider:
        app.add_middleware(SessionMiddleware, provider=provider)
        browser = Browser(app, provider)
        browser.cookie = await stored(provider, n=0)
        answer = await browser.ask(path="/login")
        assert isinstance(answer.error, SessionClosed)
        assert "headers have left" in str(answer.error)
        assert answer.set_cookie is None
        assert await is_free(grid, browser.cookie)
        clock.advance(11)
        assert await found(provider, browser.cookie) == (None, {"n": 0})


@ALL
@CHANGES
@pytest.mark.parametrize("begun_before", [True, False], ids=["before", "after"])
@in_loop
async def test_a_task_that_a_failed_handler_left_changes_no_id(
    grid: Spy, clock: ManualClock, framework: str, begun_before: bool, how: str
) -> None:
    tasks: list[asyncio.Task[None]] = []
    begun, failed = asyncio.Event(), asyncio.Event()

    async def handler(asked: Asked) -> Reply:
        async def work(session: Session) -> None:
            if not begun_before:
                begun.set()
                await failed.wait()
            async with session.exclusive() as s:
                s["n"] = 1
                begun.set()
                await failed.wait()
                change(s, how)

        tasks.append(asyncio.create_task(work(asked.session)))
        await begun.wait()
        raise ZeroDivisionError

    async with browsing(framework, handler, grid, access="read_only") as browser:
        browser.cookie = await stored(browser.provider, n=0)
        answer = await browser.ask()
        assert isinstance(answer.error, ZeroDivisionError)
        failed.set()
        with pytest.raises(SessionClosed, match="headers have left"):
            await tasks[0]
        assert await is_free(grid, browser.cookie)
        clock.advance(11)
        assert await found(browser.provider, browser.cookie) == (None, {"n": 0})


# -- as the headers are about to leave ------------------------------------------------------------


@WAYS
@pytest.mark.parametrize("how", ["user", "id", "end"])
@pytest.mark.parametrize("stored_by", ["end of the block", "release"])
@in_loop
async def test_the_headers_wait_for_a_change_that_is_on_its_way(
    grid: Spy, stored_by: str, how: str, way: str
) -> None:
    tasks: list[asyncio.Task[None]] = []

    async def handler(asked: Asked) -> Reply:
        async def work(session: Session) -> None:
            async with session.exclusive() as s:
                change(s, how)
                if stored_by == "release":
                    await s.release()

        call = OnTheWay(grid, "remove" if how == "end" else "commit", way)
        tasks.append(asyncio.create_task(work(asked.session)))
        await call.reached.wait()
        return Reply()

    async with browsing("asgi", handler, grid, access="read_only") as browser:
        browser.cookie = old = await stored(browser.provider, n=0)
        answer = await browser.ask()
        await tasks[0]
        assert (answer.status, answer.error) == (200, None)
        await check_changed(browser, answer, how, old)


@CHANGES
@ALL
@in_loop
async def test_the_headers_wait_for_a_block_under_the_requests_lock(
    grid: Spy, framework: str, how: str
) -> None:
    tasks: list[asyncio.Task[None]] = []
    begun = asyncio.Event()

    async def handler(asked: Asked) -> Reply:
        async def work(session: Session) -> None:
            async with session.exclusive() as s:
                begun.set()
                await steps(50)
                change(s, how)

        tasks.append(asyncio.create_task(work(asked.session)))
        await begun.wait()
        return Reply()

    async with browsing(framework, handler, grid) as browser:
        browser.cookie = old = await stored(browser.provider, n=0)
        answer = await browser.ask()
        await tasks[0]
        assert (answer.status, answer.error) == (200, None)
        await check_changed(browser, answer, how, old)


# -- beside others --------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("last", ["the one that changes it", "the other"])
@in_loop
async def test_of_two_blocks_at_once_the_one_that_changes_the_id_is_heard(
    grid: Spy, clock: ManualClock, framework: str, last: str
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session

        async def count() -> None:
            async with session.exclusive() as s:
                await steps(20)
                s["n"] += 1

        async def change_id() -> None:
            async with session.exclusive() as s:
                await steps(20)
                s["n"] += 10
                s.regenerate_id()

        blocks = [change_id(), count()] if last == "the other" else [count(), change_id()]
        await asyncio.gather(*blocks)
        async with session.exclusive() as s:  # under the new id
            s["n"] += 100
        return Reply()

    async with browsing(framework, handler, grid, access="read_only") as browser:
        browser.cookie = old = await stored(browser.provider, n=0)
        answer = await browser.ask()
        assert (answer.status, answer.error) == (200, None)
        assert browser.cookie != old
        clock.advance(11)
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 111}
        assert await data_of(browser.provider, old) == {}


@ALL
@CHANGES
@in_loop
async def test_who_lost_the_lock_unnoticed_sends_no_cookie(
    grid: Spy, clock: ManualClock, framework: str, how: str
) -> None:
    """Its cookie would be the replaced one, and the browser has been given the new one."""

    async def handler(asked: Asked) -> Reply:
        assert asked.session["n"] == 0
        clock.advance(15.1)
        async with browser.provider.open(browser.cookie) as other:
            change(other, how)
        return Reply()

    options = {"rolling": True, "max_age": 60, "lock_lease": 15}
    async with browsing(framework, handler, grid, **options) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        answer = await browser.ask()
        assert (answer.status, answer.error, answer.set_cookie) == (200, None, None)


# -- what fails -----------------------------------------------------------------------------------


async def answer_200(send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"all right"})


async def log_in_and_fail(session: Session) -> None:
    async with session.exclusive() as s:
        s.user = "ann"
    session["cart"].append("changed where nothing is stored")


async def begin_and_fail(session: Session) -> None:
    session["cart"] = ["saved"]
    await session.save()
    session["bad"] = object()


@ALL
@pytest.mark.parametrize("fail", [log_in_and_fail, begin_and_fail], ids=lambda f: f.__name__)
@in_loop
async def test_our_500_carries_the_cookie_of_what_was_stored_before(
    grid: Spy, framework: str, fail: Callable[[Session], Awaitable[None]]
) -> None:
    async def handler(asked: Asked) -> Reply:
        await fail(asked.session)
        return Reply()

    access = "read_only" if fail is log_in_and_fail else "exclusive"
    async with browsing(framework, handler, grid, access=access) as browser:
        if fail is log_in_and_fail:
            browser.cookie = await stored(browser.provider, cart=[])
        before = browser.cookie
        answer = await browser.ask()
        assert (answer.status, answer.body) == (500, b"Internal Server Error\n")
        assert answer.header("cache-control") == ["no-store"]
        assert browser.cookie != before
        kept = ("ann", {"cart": []}) if fail is log_in_and_fail else (None, {"cart": ["saved"]})
        assert await found(browser.provider, browser.cookie) == kept


@in_loop
async def test_our_500_is_whole_when_it_is_given_after_the_application_has_returned(
    grid: Spy,
) -> None:
    """By a task that it left: what the task says from then on nobody hears, and it is told."""
    tasks: list[asyncio.Task[None]] = []
    ids: list[str] = []
    away = Outage("commit")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        session: Session = scope["session"]
        session["n"] = 1
        await session.save()
        ids.append(session.id)
        session["n"] = 2
        commit = OnTheWay(grid, "commit")

        async def fail(name: str) -> None:
            await commit(name)
            await away(name)

        grid.before = fail
        tasks.append(asyncio.create_task(answer_200(send)))
        await commit.reached.wait()

    async with provider_on(grid) as provider:
        browser = Browser(SessionMiddleware(app, provider=provider), provider)
        answer = await browser.start().answered()
        assert answer.sent == []
        with pytest.raises(OSError, match="the response was replaced"):
            await tasks[0]
        assert (answer.status, answer.body) == (500, b"Internal Server Error\n")
        assert str(answer.set_cookie).startswith(f"session={ids[0]};")
        away.over()
        assert await found(provider, ids[0]) == (None, {"n": 1})


@ALL
@pytest.mark.parametrize("how", ["user", "id", "end"])
@in_loop
async def test_a_failure_after_release_in_a_block_keeps_back_no_cookie(
    grid: Spy, framework: str, how: str
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session
        with contextlib.suppress(ZeroDivisionError):
            async with session.exclusive() as s:
                change(s, how)
                await s.release()
                raise ZeroDivisionError
        return Reply(repr((session.user, dict(session))).encode())

    async with browsing(framework, handler, grid, access="read_only") as browser:
        browser.cookie = old = await stored(browser.provider, n=0)
        answer = await browser.ask()
        assert (answer.status, answer.error) == (200, None)
        await check_changed(browser, answer, how, old)
        assert answer.body == repr(await found(browser.provider, browser.cookie)).encode()


class Strike:
    """A hook that lets a time limit strike while a call is on its way, which it never ends.

    Args:
        grid: whose call; the hook is set there.
        name: of the call.
        way: `there`, before the grid has carried it out, or `back`, with its answer.
        then: a hook for every other call.
    """

    def __init__(self, grid: Spy, name: str, way: str, then: Hook | None = None) -> None:
        self._name = name
        self._then = then
        self.limit: asyncio.Timeout | None = None
        if way == "there":
            grid.before = self
        else:
            grid.after = self

    def within(self) -> asyncio.Timeout:
        self.limit = asyncio.timeout(None)
        return self.limit

    async def __call__(self, name: str) -> None:
        if name == self._name and self.limit is not None:
            limit, self.limit = self.limit, None
            limit.reschedule(asyncio.get_running_loop().time())
            await asyncio.Event().wait()
        elif self._then is not None:
            await self._then(name)


async def change_within(strike: Strike, session: Session, how: str, at: str) -> Reply:
    """Change a session in a handler that has its own way with what comes too late."""
    try:
        async with strike.within():
            if at == "release":
                change(session, how)
                await session.release()
            else:
                async with session.exclusive() as s:
                    change(s, how)
                    if at == "release in a block":
                        await s.release()
    except TimeoutError:
        return Reply(b"too slow", 504)
    return Reply()


@WAYS
@pytest.mark.parametrize("how", ["user", "id", "end"])
@pytest.mark.parametrize("at", ["end of a block", "release in a block", "release"])
@in_loop
async def test_an_answer_after_a_cancelled_change_carries_its_cookie(
    grid: Spy, at: str, how: str, way: str
) -> None:
    async def handler(asked: Asked) -> Reply:
        strike = Strike(grid, "remove" if how == "end" else "commit", way)
        return await change_within(strike, asked.session, how, at)

    access = "exclusive" if at == "release" else "read_only"
    async with browsing("asgi", handler, grid, access=access) as browser:
        browser.cookie = old = await stored(browser.provider, n=0)
        answer = await browser.ask()
        assert (answer.status, answer.body, answer.error) == (504, b"too slow", None)
        await check_changed(browser, answer, how, old)


@pytest.mark.parametrize("how", ["user", "id", "end"])
@pytest.mark.parametrize("at", ["end of a block", "release in a block", "release"])
@in_loop
async def test_an_answer_after_a_cancelled_change_that_never_arrives_keeps_the_cookie(
    grid: Spy, at: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cookie would be one that nothing is stored under, or none while there is a session."""
    monkeypatch.setattr("gridsession.provider.loop.TICKET_SECONDS", 0.0)
    away = Outage("commit", "remove")

    async def handler(asked: Asked) -> Reply:
        strike = Strike(grid, "remove" if how == "end" else "commit", "there", away)
        return await change_within(strike, asked.session, how, at)

    access = "exclusive" if at == "release" else "read_only"
    async with browsing("asgi", handler, grid, access=access, lock_lease=0.05) as browser:
        browser.cookie = await stored(browser.provider, n=0)
        answer = await browser.ask()
        assert (answer.status, answer.error) == (500 if at == "release" else 504, None)
        assert answer.set_cookie is None
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert away.failed > 1
        away.over()
        assert await found(browser.provider, browser.cookie) == (None, {"n": 0})


@WAYS
@pytest.mark.parametrize("how", ["user", "id", "end"])
@in_loop
async def test_the_answer_after_a_cancelled_one_carries_the_cookie(
    grid: Spy, how: str, way: str
) -> None:
    strike = Strike(grid, "remove" if how == "end" else "commit", way)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        change(scope["session"], how)
        try:
            async with strike.within():
                await send({"type": "http.response.start", "status": 200, "headers": []})
        except TimeoutError:
            await send({"type": "http.response.start", "status": 504, "headers": []})
        await send({"type": "http.response.body", "body": b"too slow"})

    async with provider_on(grid) as provider:
        browser = Browser(SessionMiddleware(app, provider=provider), provider)
        browser.cookie = old = await stored(provider, n=0)
        answer = await browser.ask()
        assert (answer.status, answer.body, answer.error) == (504, b"too slow", None)
        await check_changed(browser, answer, how, old)


# -- our error in a framework's hands -------------------------------------------------------------


async def answer_badly(scope: Scope, send: Send) -> None:
    scope["session"]["n"] = object()
    await answer_200(send)


async def in_a_group(scope: Scope, receive: Receive, send: Send) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(answer_badly(scope, send))


async def in_a_group_of_a_group(scope: Scope, receive: Receive, send: Send) -> None:
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(in_a_group(scope, receive, send))


async def as_a_cause_in_a_group(scope: Scope, receive: Receive, send: Send) -> None:
    async def translate() -> None:
        try:
            await answer_badly(scope, send)
        except OSError as error:
            raise RuntimeError("the client is gone") from error

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(translate())


async def after_a_group(scope: Scope, receive: Receive, send: Send) -> None:
    try:
        await in_a_group(scope, receive, send)
    except BaseExceptionGroup as group:
        raise RuntimeError("the client is gone") from group


@pytest.mark.parametrize(
    "app",
    [in_a_group, in_a_group_of_a_group, as_a_cause_in_a_group, after_a_group],
    ids=lambda app: app.__name__,
)
@in_loop
async def test_our_error_does_not_reach_the_server_in_a_group(grid: Spy, app: ASGIApp) -> None:
    async with provider_on(grid) as provider:
        browser = Browser(SessionMiddleware(app, provider=provider), provider)
        answer = await browser.ask()
        assert (answer.status, answer.error) == (500, None)
        assert answer.body == b"Internal Server Error\n"


@in_loop
async def test_an_applications_own_error_in_a_group_with_ours_reaches_the_server(grid: Spy) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def fail_when_cancelled() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                _ = 1 // 0

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(fail_when_cancelled())
            tasks.create_task(answer_badly(scope, send))

    async with provider_on(grid) as provider:
        browser = Browser(SessionMiddleware(app, provider=provider), provider)
        answer = await browser.ask()
        assert (answer.status, answer.body) == (500, b"Internal Server Error\n")
        assert isinstance(answer.error, ExceptionGroup)
        assert answer.error.subgroup(ZeroDivisionError) is not None


# -- no headers of the application's --------------------------------------------------------------


@ALL
@pytest.mark.parametrize("how", ["release", "block"])
@pytest.mark.parametrize("begun", [True, False], ids=["had-one", "had-none"])
@in_loop
async def test_a_new_id_that_no_response_carries_is_told(
    grid: Spy, framework: str, how: str, begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The server's own 500 knows nothing of it. A browser that had no session loses none."""

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        if how == "block":
            async with session.exclusive() as s:
                s.user = "ann"
        else:
            session.user = "ann"
            await session.release()
        raise ZeroDivisionError

    access = "read_only" if how == "block" else "exclusive"
    async with browsing(framework, handler, grid, access=access) as browser:
        browser.cookie = await stored(browser.provider, n=1) if begun else None
        answer = await browser.ask()
        assert isinstance(answer.error, ZeroDivisionError)
        told = [r for r in caplog.records if "its new id was stored" in r.getMessage()]
        assert len(told) == begun


@ALL
@pytest.mark.parametrize("how", ["release", "block"])
@pytest.mark.parametrize("change_of", ["user", "id"])
@in_loop
async def test_an_id_that_may_have_changed_stays_where_the_server_answers(
    grid: Spy, framework: str, how: str, change_of: str
) -> None:
    """The framework's own 500 could not carry the new one."""

    async def handler(asked: Asked) -> Reply:
        session = asked.session
        grid.before = Outage("commit", times=1)
        if how == "block":
            async with session.exclusive() as s:
                change(s, change_of)
        else:
            change(session, change_of)
            await session.release()
        return Reply()

    access = "read_only" if how == "block" else "exclusive"
    async with browsing(framework, handler, grid, access=access) as browser:
        browser.cookie = old = await stored(browser.provider, n=0)
        answer = await browser.ask()
        assert isinstance(answer.error, GridUnavailable)
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert browser.cookie == old
        assert await is_free(grid, old)
        assert await found(browser.provider, old) == (None, {"n": 0})


@ALL
@pytest.mark.parametrize("page", [True, False], ids=["page", "plain"])
@in_loop
async def test_an_answer_of_ours_carries_an_id_that_is_being_stored(
    grid: Spy, framework: str, page: bool
) -> None:
    """The handler's own work cannot be stored, and a task of it logs somebody in meanwhile."""
    tasks: list[asyncio.Task[None]] = []
    failed = asyncio.Event()

    async def log_in(session: Session) -> None:
        await failed.wait()
        async with session.exclusive() as s:
            s.user = "ann"

    async def handler(asked: Asked) -> Reply:
        asked.session["bad"] = object()
        tasks.append(asyncio.create_task(log_in(asked.session)))
        return Reply()

    async def slowly(scope: Scope, receive: Receive, send: Send) -> None:
        await until(lambda: "commit" in grid.calls)
        await send({"type": "http.response.start", "status": 500, "headers": []})
        await send({"type": "http.response.body", "body": b"of ours"})

    def on_error(failure: object) -> ASGIApp:
        failed.set()
        return slowly

    async def after(name: str) -> None:
        if name == "commit":
            await steps(50)
        if name == "release" and not page:
            failed.set()
            await until(lambda: "commit" in grid.calls)

    async with provider_on(grid) as provider:
        options: dict[str, Any] = {"on_error": on_error} if page else {}
        browser = Browser(FRAMEWORKS[framework](handler, provider=provider, **options), provider)
        browser.cookie = old = await stored(provider, n=1)
        grid.after = after
        answer = await browser.ask()
        await asyncio.gather(*tasks)
        assert answer.status == 500
        assert browser.cookie != old
        grid.after = None
        assert await found(provider, browser.cookie) == ("ann", {"n": 1})
