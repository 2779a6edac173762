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

from gridsession import GridUnavailable, Session, SessionClosed, SessionProvider
from tests.provider.harness import (
    OnTheWay,
    Outage,
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


@in_loop
async def test_the_keys_of_a_session_that_was_given_up_are_those_a_late_save_has_stored(
    grid: Spy,
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1, b=2)
        commit = OnTheWay(grid, "commit", "back")
        with pytest.raises(ZeroDivisionError):
            async with provider.open(session_id) as session:
                del session["b"]
                session["c"] = 3
                saving = asyncio.create_task(session.save())
                await commit.reached.wait()
                raise ZeroDivisionError
        await saving
        assert dict(session) == {"a": 1, "c": 3}
        with pytest.raises(KeyError):
            session["b"]


@BOTH
@in_loop
async def test_who_waits_for_a_turn_as_the_request_is_given_up_has_a_lock_of_its_own(
    grid: Spy, access: str
) -> None:
    async with provider_on(grid, lock_wait_timeout=0.2) as provider:
        session_id = await stored(provider, n=0)
        begun = asyncio.Event()

        async def never_end(session: Session) -> None:
            async with session.exclusive():
                begun.set()
                await asyncio.Event().wait()

        with contextlib.suppress(ZeroDivisionError):
            async with provider.open(session_id, access=access) as session:
                stuck = asyncio.create_task(never_end(session))
                await begun.wait()
                waiting = [asyncio.create_task(count(session)) for _ in range(3)]
                await steps(5)
                raise ZeroDivisionError
        if access == "read_only":  # each of them waits for a lock, and that one is held
            stuck.cancel()
        await asyncio.gather(*waiting)
        assert await data_of(provider, session_id) == {"n": 3}
        assert await is_free(grid, session_id)
        stuck.cancel()


# -- a new session's save that is on its way as its block fails ------------------------------------


async def fail_while_it_is_saved(
    session: Session, create: OnTheWay, member: str
) -> asyncio.Task[None]:
    with contextlib.suppress(ZeroDivisionError):
        async with session.exclusive() as s:
            s["first"] = 1
            saving = asyncio.create_task(getattr(s, member)())
            await create.reached.wait()
            raise ZeroDivisionError
    return saving


@WAYS
@in_loop
async def test_the_next_block_begins_a_session_of_another_id(grid: Spy, way: str) -> None:
    async with provider_on(grid) as provider:
        create = OnTheWay(grid, "create", way)
        async with provider.open(None, access="read_only") as session:
            saving = await fail_while_it_is_saved(session, create, "save")
            async with session.exclusive() as s:
                s["second"] = 1
            with pytest.raises(SessionClosed):
                await saving
            assert dict(session) == {"second": 1}
        assert await data_of(provider, session.id) == {"second": 1}
        assert await is_free(grid, session.id)


@in_loop
async def test_a_save_that_fails_late_leaves_the_id_that_was_given_meanwhile(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        gate, reached = asyncio.Event(), asyncio.Event()

        async def fail_late(name: str) -> None:
            if name == "create" and not reached.is_set():
                reached.set()
                await gate.wait()
                raise GridUnavailable("no answer")

        grid.before = fail_late
        async with provider.open(None, access="read_only") as session:
            with contextlib.suppress(ZeroDivisionError):
                async with session.exclusive() as s:
                    s["first"] = 1
                    saving = asyncio.create_task(s.save())
                    await reached.wait()
                    raise ZeroDivisionError
            async with session.exclusive() as s:
                s["second"] = 1
            session_id = session.id
            gate.set()
            with pytest.raises(GridUnavailable):
                await saving
            assert session.id == session_id
            await session_is_whole(session)
        assert await data_of(provider, session_id) == {"second": 1, "third": 1}


async def session_is_whole(session: Session) -> None:
    async with session.exclusive() as s:
        s["third"] = 1


@WAYS
@in_loop
async def test_a_block_waits_for_a_release_that_begins_the_session(grid: Spy, way: str) -> None:
    """What it was asked to store stands, although its block has failed since."""
    async with provider_on(grid) as provider:
        create = OnTheWay(grid, "create", way)
        async with provider.open(None, access="read_only") as session:
            saving = await fail_while_it_is_saved(session, create, "release")
            async with session.exclusive() as s:
                s["second"] = 1
            await saving
        assert grid.asked.count("create") == 1
        assert await data_of(provider, session.id) == {"first": 1, "second": 1}
        assert await is_free(grid, session.id)


# -- what release() could not store, and who is told -----------------------------------------------


@in_loop
async def test_a_release_after_its_request_was_given_up_is_told(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        with contextlib.suppress(ZeroDivisionError):
            async with provider.open(session_id) as session:
                session["n"] = 1
                raise ZeroDivisionError
        with pytest.raises(SessionClosed, match="is not stored"):
            await session.release()
        assert await data_of(provider, session_id) == {"n": 0}


@in_loop
async def test_a_release_that_waits_as_its_request_is_given_up_is_told(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        begun = asyncio.Event()

        async def never_end(session: Session) -> None:
            async with session.exclusive():
                begun.set()
                await asyncio.Event().wait()

        with contextlib.suppress(ZeroDivisionError):
            async with provider.open(session_id) as session:
                stuck = asyncio.create_task(never_end(session))
                await begun.wait()
                session["n"] = 1
                releasing = asyncio.create_task(session.release())
                await steps(5)
                raise ZeroDivisionError
        with pytest.raises(SessionClosed, match="is not stored"):
            await releasing
        stuck.cancel()


@in_loop
async def test_a_release_that_failed_is_told_by_each_later_one_and_by_the_end(grid: Spy) -> None:
    """Whoever thinks that it only was to let others in sooner has lost all that was done."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        with pytest.raises(SessionClosed, match="is not stored"):
            async with provider.open(session_id) as session:
                await count(session)
                grid.before = Outage("commit", times=1)
                with pytest.raises(GridUnavailable):
                    await session.release()
                with pytest.raises(SessionClosed, match="is not stored"):
                    await session.release()
        assert await data_of(provider, session_id) == {"n": 0}
        await until(lambda: len(asyncio.all_tasks()) == 1)
        assert await is_free(grid, session_id)


@WAYS
@pytest.mark.parametrize("lock", ["the request's", "its own"])
@in_loop
async def test_a_new_session_whose_release_was_cut_off_is_told_by_the_end(
    grid: Spy, lock: str, way: str
) -> None:
    async with provider_on(grid) as provider:
        create = OnTheWay(grid, "create", way)

        async def cut_off(session: Session) -> None:
            session["n"] = 1
            releasing = asyncio.create_task(session.release())
            await create.reached.wait()
            releasing.cancel()
            await asyncio.wait((releasing,))

        if lock == "the request's":
            with pytest.raises(SessionClosed, match="is not stored"):
                async with provider.open(None) as session:
                    await cut_off(session)
        else:
            async with provider.open(None, access="read_only") as session:
                with pytest.raises(SessionClosed, match="is not stored"):
                    async with session.exclusive() as s:
                        await cut_off(s)
                await session_is_whole(session)  # another one, of another id
            assert await data_of(provider, session.id) == {"third": 1}


@WAYS
@in_loop
async def test_a_release_that_was_cut_off_and_finished_beside_is_no_loss(
    grid: Spy, way: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        commit = OnTheWay(grid, "commit", way)
        async with provider.open(session_id) as session:
            session["n"] = 1
            releasing = asyncio.create_task(session.release())
            await commit.reached.wait()
            releasing.cancel()
            await asyncio.wait((releasing,))
            await session.release()
        assert await data_of(provider, session_id) == {"n": 1}


@in_loop
async def test_a_release_of_nothing_that_was_cut_off_is_no_loss(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        release = OnTheWay(grid, "release")
        async with provider.open(session_id) as session:
            releasing = asyncio.create_task(session.release())
            await release.reached.wait()
            releasing.cancel()
            await asyncio.wait((releasing,))
        assert await is_free(grid, session_id)


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
