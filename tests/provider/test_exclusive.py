"""`session.exclusive()`: what a block sees, what it stores, and what is left after it."""

# ruff: noqa: PT012 - what is raised comes from the end of a block, after the statements in it

from __future__ import annotations

import pytest

from gridsession import SessionClosed, SessionGone, SessionReadOnly
from tests.provider.harness import (
    Spy,
    count,
    data_of,
    in_loop,
    is_free,
    provider_on,
    stored,
)

BOTH = pytest.mark.parametrize("access", ["exclusive", "read_only"])


@in_loop
async def test_exclusive_in_read_only_has_fresh_values_and_the_lock(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id, access="read_only") as session:
            assert session["a"] == 1
            async with provider.open(session_id) as other:
                other["a"] = 2
            assert session["a"] == 1
            async with session.exclusive() as s:
                assert s["a"] == 2
                assert session["a"] == 1  # what it has is a snapshot, until the block has stored
                assert session.is_read_only
                assert not s.is_read_only
                assert not await is_free(grid, session_id)
                s["a"] += 1
                async with session.exclusive() as inner:  # the same lock
                    inner["a"] += 1
                assert not await is_free(grid, session_id)
                assert grid.asked.count("commit") == 1  # the other's
            assert await is_free(grid, session_id)
            assert session["a"] == 4
            with pytest.raises(SessionReadOnly):
                session["a"] = 5
        assert await data_of(provider, session_id) == {"a": 4}


@in_loop
async def test_exclusive_in_a_request_that_holds_the_lock_commits_nothing_early(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            grid.calls.clear()
            async with session.exclusive() as s:
                s["a"] = 2
            assert grid.asked == []
            session["a"] = 3
        assert await data_of(provider, session_id) == {"a": 3}


@in_loop
async def test_exclusive_after_release(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            session["a"] = 2
            await session.release()
            async with session.exclusive() as s:
                s["a"] += 1
            with pytest.raises(SessionClosed):
                session["a"] = 9
            async with session.exclusive() as s:
                s["a"] += 1
                await s.release()
                with pytest.raises(SessionClosed):
                    s["a"] = 9
        assert await data_of(provider, session_id) == {"a": 4}
        assert await is_free(grid, session_id)


@in_loop
async def test_an_exception_in_exclusive_discards_and_unlocks(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=[1])
        async with provider.open(session_id, access="read_only") as session:
            with pytest.raises(ZeroDivisionError):
                async with session.exclusive() as s:
                    s["a"].append(2)
                    s["b"] = 1 // 0
            assert session == {"a": [1]}
            assert await is_free(grid, session_id)
        assert await data_of(provider, session_id) == {"a": [1]}


@in_loop
async def test_exclusive_needs_a_session_that_has_not_ended(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id, access="read_only") as session:
            async with provider.open(session_id) as other:
                other.abandon()
            with pytest.raises(SessionGone, match="meanwhile"):
                async with session.exclusive():
                    pass
            with pytest.raises(SessionReadOnly):
                session["a"] = 2


@BOTH
@in_loop
async def test_a_block_in_one_that_gave_its_lock_back_has_a_lock_of_its_own(
    grid: Spy, access: str
) -> None:
    async with provider_on(grid, lock_wait_timeout=0.2) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id, access=access) as session:
            async with session.exclusive() as s:
                s["n"] += 1
                await s.release()
                async with session.exclusive() as again:
                    assert again is not s
                    assert not await is_free(grid, session_id)
                    again["n"] += 1
                assert s.is_read_only
            assert await is_free(grid, session_id)
        assert await data_of(provider, session_id) == {"n": 2}


@pytest.mark.parametrize("lock", ["the request's", "its own", "its own, after release"])
@in_loop
async def test_promise_4_what_is_changed_after_a_block_gave_its_lock_back_is_told(
    grid: Spy, lock: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, log=[])
        access = "read_only" if lock == "its own" else "exclusive"
        async with provider.open(session_id, access=access) as session:
            if lock == "its own, after release":
                await session.release()
            with pytest.raises(SessionClosed, match="given back inside this block"):
                async with session.exclusive() as s:
                    assert (s is session) is (lock == "the request's")
                    log = s["log"]
                    log.append("in time")
                    await s.release()
                    log.append("late")
        assert await data_of(provider, session_id) == {"log": ["in time"]}
        assert await is_free(grid, session_id)


@pytest.mark.parametrize("ending", ["clear", "abandon"])
@in_loop
async def test_after_a_block_ended_the_session_its_request_has_none(grid: Spy, ending: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, user="ann", cart=[1])
        async with provider.open(session_id, access="read_only") as session:
            assert (session.user, dict(session)) == ("ann", {"cart": [1]})
            async with session.exclusive() as s:
                getattr(s, ending)()
            assert (session.user, dict(session), session.is_new) == (None, {}, True)
            with pytest.raises(SessionClosed, match="Nothing is stored"):
                async with session.exclusive():
                    pass
        assert await data_of(provider, session_id) == {}


@pytest.mark.parametrize("member", ["save", "release"])
@pytest.mark.parametrize("ending", ["clear", "abandon"])
@BOTH
@in_loop
async def test_an_end_that_is_stored_inside_a_block_is_no_late_change(
    grid: Spy, access: str, ending: str, member: str
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id, access=access) as session:
            async with session.exclusive() as s:
                s["b"] = 1
                getattr(s, ending)()
                await getattr(s, member)()
            assert dict(session) == {}
        assert await data_of(provider, session_id) == {}


@in_loop
async def test_of_two_sessions_blocks_the_one_still_open_is_known(grid: Spy) -> None:
    """They are left in the order of their coming, as two objects that hold one each may do."""
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        first_id, second_id = await stored(provider, n=0), await stored(provider, n=0)
        async with (
            provider.open(first_id, access="read_only") as one,
            provider.open(second_id, access="read_only") as two,
        ):
            first, second = one.exclusive(), two.exclusive()
            (await first.__aenter__())["n"] += 1
            fresh = await second.__aenter__()
            await first.__aexit__(None, None, None)
            async with two.exclusive() as inner:
                assert inner is fresh
                inner["n"] += 2
            await second.__aexit__(None, None, None)
            await count(one)  # neither is taken for open any more
            await count(two)
        assert await data_of(provider, first_id) == {"n": 2}
        assert await data_of(provider, second_id) == {"n": 3}
