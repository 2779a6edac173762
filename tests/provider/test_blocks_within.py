"""Blocks of `exclusive()` under a lock that is there already, a request's or an outer block's."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest

from gridsession import Session, SessionProvider
from tests.provider.harness import (
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
    """Take from one, and fail before the other is given it."""
    async with session.exclusive() as s:
        s["a"] -= 10
        raise ZeroDivisionError


@LOCKS
@pytest.mark.parametrize("copes", [True, False])
@in_loop
async def test_what_a_failed_block_did_goes_with_the_lock_that_it_was_under(
    grid: Spy, lock: str, copes: bool
) -> None:
    """Its session is the same, and so are the values that the handler holds."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=100, b=0, cart=["x"])
        with contextlib.suppress(ZeroDivisionError):
            async with locked(provider, session_id, lock) as session:
                cart = session["cart"]
                try:
                    await half(session)
                except ZeroDivisionError:
                    if not copes:
                        raise
                cart.append("y")
        kept = {"a": 90, "b": 0, "cart": ["x", "y"]}
        expected = kept if copes else {"a": 100, "b": 0, "cart": ["x"]}
        assert await data_of(provider, session_id) == expected
        assert await is_free(grid, session_id)


@in_loop
async def test_what_a_block_did_that_failed_under_a_lock_of_its_own_is_discarded(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=100, b=0)
        async with provider.open(session_id, access="read_only") as session:
            with pytest.raises(ZeroDivisionError):
                await half(session)
            assert dict(session) == {"a": 100, "b": 0}
        assert await data_of(provider, session_id) == {"a": 100, "b": 0}
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
