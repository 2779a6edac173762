"""A session that begins inside `session.exclusive()`, where nothing was stored before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from gridsession import GridUnavailable, Session, SessionClosed, SessionGone, SessionLockTimeout
from tests.provider.harness import (
    OnTheWay,
    Outage,
    Spy,
    data_of,
    identity_of,
    in_loop,
    is_free,
    provider_on,
    steps,
    stored,
    until,
)
from tests.web.driver import FRAMEWORKS, Asked, Reply, browsing

ALL = pytest.mark.parametrize("framework", FRAMEWORKS)
NOT_KNOWN = "A" * 64  # of the right shape; nothing is stored under it


async def add(session: Session, key: str = "n") -> None:
    """Add one, slowly enough for others to come in between where they can."""
    async with session.exclusive() as s:
        n = s.get(key, 0)
        await steps(3)
        s[key] = n + 1


# -- in a request ---------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("came_with", [None, NOT_KNOWN])
@in_loop
async def test_a_page_that_only_sometimes_writes_has_new_visitors_too(
    grid: Spy, framework: str, came_with: str | None
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session
        assert session.access == "read_only"
        if asked.path == "/write":
            await add(session)
        return Reply(session.id.encode())

    async with browsing(framework, handler, grid, access="read_only") as browser:
        browser.cookie = came_with
        assert (await browser.ask()).set_cookie is None
        answer = await browser.ask(path="/write")
        assert answer.set_cookie is not None
        assert answer.header("vary") == ["Cookie"]
        assert answer.body.decode() == browser.cookie != came_with
        assert (await browser.ask(path="/write")).set_cookie is None
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 2}


@ALL
@in_loop
async def test_an_early_release_does_not_keep_a_session_from_beginning(
    grid: Spy, framework: str
) -> None:
    async def handler(asked: Asked) -> Reply:
        session = asked.session
        early = session.id
        await session.release()
        await add(session)
        assert session.id == early
        return Reply()

    async with browsing(framework, handler, grid) as browser:
        assert (await browser.ask()).set_cookie is not None
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 1}


@ALL
@in_loop
async def test_nothing_begins_once_the_headers_have_left(grid: Spy, framework: str) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()
    tasks: list[asyncio.Task[None]] = []

    async def handler(asked: Asked) -> Reply:
        session = asked.session

        async def too_late() -> None:
            async with session.exclusive() as s:
                s["n"] = 1
                begun.set()
                await may_end.wait()

        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            may_end.set()
            with pytest.raises(SessionClosed, match="headers have left"):
                await tasks[0]
            with pytest.raises(SessionClosed, match=r"ahead of the response's start"):
                await add(session)
            yield b"two"

        tasks.append(asyncio.create_task(too_late()))
        await begun.wait()
        return Reply(chunks=chunks)

    async with browsing(framework, handler, grid, access="read_only") as browser:
        answer = await browser.ask()
        assert (answer.body, answer.error, answer.set_cookie) == (b"onetwo", None, None)
    assert grid.asked == []


@pytest.mark.parametrize("way", ["there", "back"])
@in_loop
async def test_headers_wait_for_a_beginning_that_is_being_stored(grid: Spy, way: str) -> None:
    on_the_way = OnTheWay(grid, "create", way)
    tasks: list[asyncio.Task[None]] = []

    async def handler(asked: Asked) -> Reply:
        tasks.append(asyncio.create_task(add(asked.session)))
        await on_the_way.reached.wait()
        return Reply()

    async with browsing("starlette", handler, grid, access="read_only") as browser:
        assert (await browser.ask()).set_cookie is not None
        await tasks[0]
        assert await data_of(browser.provider, str(browser.cookie)) == {"n": 1}


# -- tasks ----------------------------------------------------------------------------------------


@in_loop
async def test_tasks_begin_one_session_not_one_each(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None, access="read_only") as session:
            async with asyncio.TaskGroup() as tasks:
                for number in range(5):
                    tasks.create_task(add(session))
                    tasks.create_task(add(session, f"own {number}"))
            assert session["n"] == 5
        assert grid.asked.count("create") == 1
        data = await data_of(provider, session.id)
        assert data == {"n": 5} | {f"own {number}": 1 for number in range(5)}
        assert await is_free(grid, session.id)


@in_loop
async def test_the_next_task_begins_it_when_one_has_not(grid: Spy) -> None:
    async def fail(session: Session) -> None:
        async with session.exclusive() as s:
            await steps(3)
            s["n"] = 1 // 0

    async def look(session: Session) -> None:
        async with session.exclusive() as s:
            await steps(3)
            assert s.is_new

    inside = asyncio.Event()

    async def leave(session: Session) -> None:
        async with session.exclusive() as s:
            s["n"] = 9
            inside.set()
            await asyncio.Event().wait()

    async with provider_on(grid) as provider:
        async with provider.open(None, access="read_only") as session:
            failing = asyncio.create_task(fail(session))
            looking = asyncio.create_task(look(session))
            leaving = asyncio.create_task(leave(session))
            adding = [asyncio.create_task(add(session)) for _ in range(2)]
            await inside.wait()
            leaving.cancel()
            await asyncio.wait((failing, looking, leaving, *adding))
            assert isinstance(failing.exception(), ZeroDivisionError)
            assert looking.exception() is None
            assert leaving.cancelled()
            assert session["n"] == 2
        assert await data_of(provider, session.id) == {"n": 2}


@in_loop
async def test_who_waits_for_another_task_that_begins_it_gives_up_in_time(grid: Spy) -> None:
    async with provider_on(grid, lock_wait_timeout=0.02) as provider:
        async with provider.open(None, access="read_only") as session:
            inside, may_end = asyncio.Event(), asyncio.Event()

            async def hold() -> None:
                async with session.exclusive() as s:
                    s["n"] = 1
                    inside.set()
                    await may_end.wait()

            holding = asyncio.create_task(hold())
            await inside.wait()
            with pytest.raises(SessionLockTimeout, match="Another task of this request"):
                await add(session)
            may_end.set()
            await holding
            await add(session)
        assert await data_of(provider, session.id) == {"n": 2}


@pytest.mark.parametrize("stores", [True, False])
@in_loop
async def test_blocks_within_a_block_that_begins_a_session(grid: Spy, stores: bool) -> None:
    """Its own, that of a task it started, and one after it gave its lock back."""
    async with provider_on(grid, lock_wait_timeout=0.2) as provider:
        async with provider.open(None, access="read_only") as session:
            async with session.exclusive() as s:
                if stores:
                    await add(session)
                    await asyncio.create_task(add(session))
                    assert s["n"] == 2
                await s.release()
                await add(session)
                await add(s)
                assert s.id == session.id
            n = 4 if stores else 2
            assert (session["n"], session.is_new) == (n, False)
            await add(s)
        assert grid.asked.count("create") == 1
        assert await data_of(provider, session.id) == {"n": n + 1}
        assert await is_free(grid, session.id)


@in_loop
async def test_a_block_that_was_released_empty_learns_what_was_begun_after_it(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None, access="read_only") as session:
            early = session.id
            async with session.exclusive() as s:
                await s.release()
                grid.before = Outage("create", times=1)
                with pytest.raises(GridUnavailable):
                    await add(session)
                await add(session)  # under another id, since that of the first try may be taken
            assert (session["n"], session.is_new) == (1, False)
            assert session.id != early
            await add(s)
            assert s.id == session.id
        assert await data_of(provider, session.id) == {"n": 2}


@pytest.mark.parametrize("way", ["there", "back"])
@in_loop
async def test_promise_7_a_beginning_that_is_cancelled_leaves_nothing_in_the_way(
    grid: Spy, way: str
) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None, access="read_only") as session:
            early = session.id
            on_the_way = OnTheWay(grid, "create", way)
            beginning = asyncio.create_task(add(session))
            waiting = asyncio.create_task(add(session))
            await on_the_way.reached.wait()
            beginning.cancel()
            await asyncio.wait((beginning, waiting))
            assert beginning.cancelled()
            assert waiting.exception() is None
            # Whether the first one was written is not known: the second is another session.
            assert session.id != early
        assert await data_of(provider, session.id) == {"n": 1}
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert await is_free(grid, session.id)


@in_loop
async def test_promise_6_a_grid_that_is_away_is_told(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None, access="read_only") as session:
            grid.before = away = Outage("create")
            with pytest.raises(GridUnavailable):
                await add(session)
            assert session.is_new
            away.over()
            await add(session)
        assert await data_of(provider, session.id) == {"n": 1}


# -- where it was ---------------------------------------------------------------------------------


@in_loop
async def test_promise_2_a_session_that_ended_meanwhile_does_not_begin_anew(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=1)
        async with provider.open(session_id, access="read_only") as session:
            await grid.inner.remove(identity_of(session_id).key)
            for _ in range(2):
                with pytest.raises(SessionGone, match="meanwhile"):
                    await add(session)
        assert "create" not in grid.asked[1:]
