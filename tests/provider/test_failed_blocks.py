"""A block of `exclusive()` that an exception leaves: what was done in it is undone.

Under a lock of its own that goes without saying; here it is under one that is kept: the request's,
or that of the block around it.
"""

# ruff: noqa: PT012 - what is raised comes from the end of a block, after the statements in it

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest

from gridsession import GridUnavailable, Session, SessionClosed, SessionProvider, SessionTypeError
from gridsession.session import Phase
from tests.provider.harness import (
    Outage,
    Spy,
    count,
    data_of,
    in_loop,
    is_free,
    provider_on,
    steps,
    stored,
)

LOCKS = pytest.mark.parametrize("lock", ["the request's", "a block's"])


@contextlib.asynccontextmanager
async def locked(provider: SessionProvider, session_id: str | None, lock: str) -> Any:
    """A session under a lock that a block in it does not give back."""
    if lock == "the request's":
        async with provider.open(session_id) as session:
            yield session
    else:
        async with (
            provider.open(session_id, access="read_only") as session,
            session.exclusive() as s,
        ):
            yield s


async def half(session: Session) -> None:
    async with session.exclusive() as s:
        s["a"] -= 10
        raise ZeroDivisionError


@LOCKS
@pytest.mark.parametrize("cause", ["exception", "in a task", "time-out"])
@in_loop
async def test_nothing_is_stored_of_a_block_that_failed(grid: Spy, lock: str, cause: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=100, b=0)
        async with locked(provider, session_id, lock) as session:
            session["before"] = 1
            match cause:
                case "exception":
                    with pytest.raises(ZeroDivisionError):
                        await half(session)
                case "in a task":
                    with pytest.raises(ZeroDivisionError):
                        await asyncio.create_task(half(session))
                case _:
                    with pytest.raises(TimeoutError):
                        async with asyncio.timeout(0.01), session.exclusive() as s:
                            s["a"] -= 10
                            await asyncio.Event().wait()
            assert dict(session) == {"a": 100, "b": 0, "before": 1}
            session["after"] = 1
        assert await data_of(provider, session_id) == {"a": 100, "b": 0, "before": 1, "after": 1}
        assert await is_free(grid, session_id)


def delete_and_set(session: Session) -> None:
    del session["b"]
    session["b"] = 7


CHANGES: dict[str, Callable[[Session], object]] = {
    "a value": lambda s: s.update(a=1),
    "a value that was changed": lambda s: s.update(changed=3),
    "inside a value that nobody had read": lambda s: s["list"].append(2),
    "inside a value that was read": lambda s: s["read"].append(2),
    "inside a value that was set": lambda s: s["set"].append(2),
    "a value in the place of one that was read": lambda s: s.update(read=0),
    "a new key": lambda s: s.update(new=1),
    "a key less": lambda s: s.pop("a"),
    "a key that was removed": lambda s: s.update(removed=2),
    "the order": delete_and_set,
    "the user": lambda s: setattr(s, "user", "bob"),
    "the timeout": lambda s: setattr(s, "timeout", 77.0),
    "the id": lambda s: s.regenerate_id(),
    "all": lambda s: s.clear(),
    "the end": lambda s: s.abandon(),
}


@LOCKS
@pytest.mark.parametrize("change", CHANGES)
@in_loop
async def test_a_block_that_failed_leaves_the_session_as_it_was(
    grid: Spy, lock: str, change: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(
            provider, a=0, b=0, list=[1], read=[1], set=0, changed=1, removed=1, user="ann"
        )
        async with locked(provider, session_id, lock) as session:
            read = session["read"]
            session["set"] = [1]
            session["changed"] = 2
            del session["removed"]
            with pytest.raises(ZeroDivisionError):
                async with session.exclusive() as s:
                    CHANGES[change](s)
                    raise ZeroDivisionError
            kept = {"a": 0, "b": 0, "list": [1], "read": [1], "set": [1], "changed": 2}
            assert list(session.items()) == list(kept.items())
            assert (session.user, session.timeout) == ("ann", provider.timeout)
            if change != "inside a value that was read":
                read.append("later")  # it is the session's still
                kept["read"] = [1, "later"]
        async with provider.open(session.id) as again:
            assert list(again.items()) == list(kept.items())
            assert (again.user, again.timeout) == ("ann", provider.timeout)
        assert session.id == session_id


@LOCKS
@in_loop
async def test_what_was_asked_for_before_a_block_that_failed_stands(grid: Spy, lock: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with locked(provider, session_id, lock) as session:
            session.user = "ann"
            session.timeout = 55.0
            with pytest.raises(ZeroDivisionError):
                async with session.exclusive() as s:
                    s.user = None
                    s.timeout = 77.0
                    raise ZeroDivisionError
        async with provider.open(session.id) as again:
            assert (again.user, again.timeout) == ("ann", 55.0)
        async with locked(provider, session.id, lock) as session:
            before = session.id
            session.regenerate_id()
            with pytest.raises(ZeroDivisionError):
                await half_of_nothing(session)
        assert session.id != before
        async with locked(provider, session.id, lock) as session:
            session.abandon()
            with pytest.raises(ZeroDivisionError):
                await half_of_nothing(session)
        assert await data_of(provider, session_id) == {}


async def half_of_nothing(session: Session) -> None:
    async with session.exclusive():
        raise ZeroDivisionError


@LOCKS
@pytest.mark.parametrize("is_new", [True, False], ids=["new", "stored"])
@in_loop
async def test_what_a_block_that_failed_has_saved_stands(
    grid: Spy, lock: str, is_new: bool
) -> None:
    async with provider_on(grid) as provider:
        session_id = None if is_new else await stored(provider, a=[1])
        async with locked(provider, session_id, lock) as session:
            session["before"] = 1
            session.user = "ann"
            with pytest.raises(ZeroDivisionError):
                async with session.exclusive() as s:
                    s["a"] = [1, 2]
                    s.timeout = 77.0
                    await s.save()
                    s["a"].append(3)
                    s["never"] = 1
                    s.timeout = 78.0
                    raise ZeroDivisionError
            assert dict(session) == {"a": [1, 2], "before": 1}
        async with provider.open(session.id) as again:
            assert dict(again) == {"a": [1, 2], "before": 1}
            assert (again.user, again.timeout) == ("ann", 77.0)


@in_loop
async def test_what_a_save_that_failed_in_a_block_may_have_stored_is_undone(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            grid.after = Outage("commit", times=1)
            with pytest.raises(GridUnavailable):
                async with session.exclusive() as s:
                    s["a"] = 2
                    await s.save()
            assert session["a"] == 1
        assert await data_of(provider, session_id) == {"a": 1}


@in_loop
async def test_a_value_that_cannot_be_stored_is_told_where_it_is_to_be_stored(grid: Spy) -> None:
    """Not at the beginning, nor at the end, of a block that has nothing to do with it."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        with pytest.raises(SessionTypeError, match="bad"):
            async with provider.open(session_id) as session:
                bad = session["bad"] = object()
                with pytest.raises(ZeroDivisionError):
                    await half(session)
                assert session["bad"] is bad


# -- tasks inside ---------------------------------------------------------------------------------


@LOCKS
@in_loop
async def test_what_tasks_do_in_a_block_that_fails_is_a_part_of_it(grid: Spy, lock: str) -> None:
    """And is told: the one that is inside as it fails would take its work for done."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        tasks: list[asyncio.Task[None]] = []

        async def be_slow(session: Session) -> None:
            async with session.exclusive() as s:
                s["n"] += 1
                await steps(20)
                s["n"] += 1

        async def fail() -> None:
            await steps(1)
            raise ZeroDivisionError

        async with locked(provider, session_id, lock) as session:
            with pytest.raises(ZeroDivisionError):
                async with session.exclusive():
                    tasks.append(asyncio.create_task(be_slow(session)))
                    await asyncio.gather(fail(), *tasks)
            session["after"] = session["n"]
            with pytest.raises(SessionClosed, match="given up while this block"):
                await tasks[0]
        assert await data_of(provider, session_id) == {"n": 0, "after": 0}
        assert await is_free(grid, session_id)


@pytest.mark.parametrize("cause", ["exception", "cancelled"])
@in_loop
async def test_a_block_that_fails_with_a_task_that_stays_in_it_takes_the_request_with_it(
    grid: Spy, cause: str
) -> None:
    """Else what the task does from then on would be stored, without what it did before."""
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, n=0)
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def stay(session: Session) -> None:
            async with session.exclusive() as s:
                s["half"] = 1
                inside.set()
                await go_on.wait()
                s["other half"] = 1

        async def start_and_fail(session: Session) -> None:
            async with session.exclusive():
                tasks.append(asyncio.create_task(stay(session)))
                await inside.wait()
                if cause == "exception":
                    raise ZeroDivisionError
                await asyncio.Event().wait()

        tasks: list[asyncio.Task[None]] = []
        with pytest.raises(SessionClosed, match="failed with a task inside it"):
            async with provider.open(session_id) as session:
                session["n"] = 1
                failing = asyncio.create_task(start_and_fail(session))
                await inside.wait()
                if cause == "cancelled":
                    failing.cancel()
                await asyncio.wait((failing,))
                assert failing.cancelled() or isinstance(failing.exception(), ZeroDivisionError)
                assert session._phase is Phase.DISCARDED
                go_on.set()
                with pytest.raises(SessionClosed):
                    await tasks[0]
        assert await data_of(provider, session_id) == {"n": 0}
        assert await is_free(grid, session_id)


# -- who entered it goes in again -----------------------------------------------------------------


@pytest.mark.parametrize("first", ["the task", "its child"])
@LOCKS
@in_loop
async def test_promise_5_who_entered_a_block_takes_turns_in_it_too(
    grid: Spy, lock: str, first: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with (
            locked(provider, session_id, lock) as session,
            session.exclusive(),
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(count(session))
            if first == "its child":
                await steps(1)
            await count(session)
        assert await data_of(provider, session_id) == {"n": 2}


@LOCKS
@in_loop
async def test_who_entered_a_block_waits_in_it_for_a_task_that_is_in_one_within(
    grid: Spy, lock: str
) -> None:
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, n=0)
        async with locked(provider, session_id, lock) as session, session.exclusive():
            await asyncio.create_task(count(session))
            async with session.exclusive():
                await asyncio.create_task(count(session))
                await asyncio.wait_for(count(session), 5)
        assert await data_of(provider, session_id) == {"n": 3}


@pytest.mark.parametrize("access", ["exclusive", "read_only"])
@in_loop
async def test_one_task_may_leave_its_blocks_in_the_order_of_their_coming(
    grid: Spy, access: str
) -> None:
    """As a generator that yields in one does, which a block of its consumer outlives."""
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access=access) as session:
            outer, inner = session.exclusive(), session.exclusive()
            (await outer.__aenter__())["n"] += 1
            (await inner.__aenter__())["n"] += 1
            await outer.__aexit__(None, None, None)
            await inner.__aexit__(None, None, None)
            await count(session)
        assert await data_of(provider, session_id) == {"n": 3}
        assert await is_free(grid, session_id)
