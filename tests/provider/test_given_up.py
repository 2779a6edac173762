"""A request, a block or a call that was given up: what is told of it, and what it leaves behind."""

# ruff: noqa: PT012 - what is raised comes from the end of a block, after the statements in it

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import weakref
from typing import Any

import pytest

from gridsession import Session, SessionClosed, SessionProvider
from tests.provider.harness import (
    OnTheWay,
    Spy,
    count,
    data_of,
    in_loop,
    is_free,
    provider_on,
    steps,
    stored,
    until,
)

BOTH = pytest.mark.parametrize("access", ["exclusive", "read_only"])
WAYS = pytest.mark.parametrize("way", ["there", "back"])


# -- blocks that are still open -------------------------------------------------------------------


@in_loop
async def test_a_block_in_one_whose_request_was_given_up_is_refused_at_once(grid: Spy) -> None:
    """It does not wait for the turn that the block around it has: that would be for itself."""
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, n=0)
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def work(session: Session) -> None:
            async with session.exclusive():
                begun.set()
                await go_on.wait()
                with pytest.raises(SessionClosed, match="given up while this block"):
                    await count(session)
                assert grid.asked == []

        with pytest.raises(ZeroDivisionError):
            async with provider.open(session_id) as session:
                task = asyncio.create_task(work(session))
                await begun.wait()
                raise ZeroDivisionError
        grid.calls.clear()
        go_on.set()
        with pytest.raises(SessionClosed, match="given up while this block"):
            await task
        assert await data_of(provider, session_id) == {"n": 0}
        assert await is_free(grid, session_id)


@in_loop
async def test_a_task_beside_a_block_whose_request_was_given_up_has_a_lock_of_its_own_at_once(
    grid: Spy,
) -> None:
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, n=0)
        begun = asyncio.Event()

        async def never_end(session: Session) -> None:
            async with session.exclusive():
                begun.set()
                await asyncio.Event().wait()

        with pytest.raises(ZeroDivisionError):
            async with provider.open(session_id) as session:
                stuck = asyncio.create_task(never_end(session))
                await begun.wait()
                raise ZeroDivisionError
        async with session.exclusive() as s:
            assert s is not session
            s["n"] += 1
        assert not stuck.done()
        assert await data_of(provider, session_id) == {"n": 1}
        assert await is_free(grid, session_id)
        stuck.cancel()


@pytest.mark.parametrize("lock", ["the request's", "its own", "its own, after release"])
@in_loop
async def test_nothing_is_stored_of_half_a_block_that_goes_on_in_one_that_failed(
    grid: Spy, lock: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=100, b=0)
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def transfer(session: Session) -> None:
            async with session.exclusive() as s:
                s["a"] -= 10
                begun.set()
                await go_on.wait()
                async with session.exclusive() as inner:
                    inner["b"] += 10

        access = "read_only" if lock == "its own" else "exclusive"
        async with provider.open(session_id, access=access) as session:
            if lock == "its own, after release":
                await session.release()
            with contextlib.suppress(ZeroDivisionError):
                async with session.exclusive():
                    task = asyncio.create_task(transfer(session))
                    await begun.wait()
                    raise ZeroDivisionError
            go_on.set()
            if lock == "the request's":  # which has not failed
                await task
            else:
                with pytest.raises(SessionClosed, match="given up while this block"):
                    await task
        whole = {"a": 90, "b": 10} if lock == "the request's" else {"a": 100, "b": 0}
        assert await data_of(provider, session_id) == whole
        assert await is_free(grid, session_id)


# -- calls that are on their way ------------------------------------------------------------------


@in_loop
async def test_a_save_that_is_on_its_way_as_its_request_fails_is_told_what_happened(
    grid: Spy,
) -> None:
    """Nobody else took the lock: the request gave it back."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        commit = OnTheWay(grid, "commit")
        with pytest.raises(ZeroDivisionError):
            async with provider.open(session_id) as session:
                session["n"] = 1
                saving = asyncio.create_task(session.save())
                await commit.reached.wait()
                raise ZeroDivisionError
        with pytest.raises(SessionClosed):
            await saving
        assert await data_of(provider, session_id) == {"n": 0}
        assert await is_free(grid, session_id)


@WAYS
@pytest.mark.parametrize("at", ["end", "release"])
@in_loop
async def test_a_new_session_is_told_in_the_log_when_its_request_was_cancelled_at_its_end(
    grid: Spy, at: str, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As one whose commit was cancelled and could not be finished: nobody has been given its id."""
    async with provider_on(grid) as provider:
        create = OnTheWay(grid, "create", way)

        async def request() -> None:
            async with provider.open(None) as session:
                session["n"] = 1
                if at == "release":
                    await session.release()

        task = asyncio.create_task(request())
        await create.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert record.name == "gridsession"
    assert "the work of a cancelled request was not stored" in record.getMessage()


@WAYS
@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "answered"])
@in_loop
async def test_a_task_beside_a_login_that_is_being_stored_comes_with_the_new_id(
    grid: Spy, cancelled: bool, way: str
) -> None:
    """A cancelled one is finished beside. The other learns first that its own id is replaced."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access="read_only") as session:

            async def log_in() -> None:
                async with session.exclusive() as s:
                    await until(lambda: "wait" in grid.calls)
                    s.user = "ann"

            commit = OnTheWay(grid, "commit", way)
            logging_in = asyncio.create_task(log_in())
            counting = asyncio.create_task(count(session))
            await commit.reached.wait()
            if cancelled:
                logging_in.cancel()
            await asyncio.wait((logging_in,))
            assert logging_in.cancelled() is cancelled
            await counting
            assert (session.user, session["n"]) == ("ann", 1)
        assert session.id != session_id
        assert await data_of(provider, session.id) == {"n": 1}
        assert await is_free(grid, session.id)


# -- what is left of a request --------------------------------------------------------------------


async def work_in_a_block(
    provider: SessionProvider, session_id: str, access: str, workers: list[asyncio.Task[Any]]
) -> dict[str, weakref.ref[Any]]:
    """A request whose block starts a task that outlives it, as clients of other services do."""
    async with provider.open(session_id, access=access) as session, session.exclusive() as s:
        s["n"] += 1
        workers.append(asyncio.create_task(asyncio.Event().wait()))
        return {  # each session knows its visit: who keeps the one keeps the other
            "the request's visit": weakref.ref(session._bound),
            "the block's visit": weakref.ref(s._bound),
            "the task": weakref.ref(asyncio.current_task()),
        }


@BOTH
@in_loop
async def test_a_task_that_a_block_started_keeps_no_session_no_visit_and_no_task(
    grid: Spy, access: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        workers: list[asyncio.Task[Any]] = []
        request = asyncio.create_task(work_in_a_block(provider, session_id, access, workers))
        left = await request
        del request
        await steps(1)  # the loop forgets the task that has ended
        gc.collect()
        assert [name for name, thing in left.items() if thing() is not None] == []
        assert not workers[0].done()
        workers[0].cancel()
