"""Concurrent requests: they write without waiting, and what they change is merged."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gridsession import (
    SessionGone,
    SessionReplaced,
    SessionTypeError,
)
from gridsession.changes import ABSENT
from tests.provider.harness import (
    OnTheWay,
    Spy,
    change,
    data_of,
    in_loop,
    is_free,
    provider_on,
    stored,
)

# -- merging --------------------------------------------------------------------------------------


@in_loop
async def test_promise_5_different_keys_both_survive(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0, b=0)
        async with (
            provider.open(session_id, access="concurrent") as one,
            provider.open(session_id, access="concurrent") as two,
        ):
            one["a"] += 1
            two["b"] += 1
            two["c"] = [1]
        assert await data_of(provider, session_id) == {"a": 1, "b": 1, "c": [1]}
        assert (provider.merges, provider.key_conflicts) == (1, 0)


@pytest.mark.parametrize("same_worker", [True, False])
@in_loop
async def test_a_request_asks_twice_and_once_more_for_another_workers_commit(
    grid: Spy, same_worker: bool
) -> None:
    async with provider_on(grid) as provider, provider_on(grid) as other:
        session_id = await stored(provider, a=0, b=0)
        grid.calls.clear()
        second = provider if same_worker else other
        async with (
            provider.open(session_id, access="concurrent") as one,
            second.open(session_id, access="concurrent") as two,
        ):
            one["a"], two["b"] = 1, 1
        once_more = [] if same_worker else ["commit_if"]
        assert grid.asked == ["read", "read", "commit_if", "commit_if", *once_more]
        assert await data_of(provider, session_id) == {"a": 1, "b": 1}
        assert provider.merges == 1


@pytest.mark.parametrize("capacity", [0, 100])
@in_loop
async def test_many_at_once_in_one_worker_are_not_in_one_anothers_way(
    real_grid: Spy, capacity: int
) -> None:
    async with provider_on(real_grid, client_cache_capacity=capacity) as provider:
        session_id = await stored(provider, a=0)
        ready = asyncio.Barrier(20)

        async def one(number: int) -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session[f"k{number}"] = number
                await ready.wait()

        real_grid.calls.clear()
        await asyncio.gather(*map(one, range(20)))
        assert "acquire" not in real_grid.calls
        data = await data_of(provider, session_id)
        assert data == {"a": 0} | {f"k{number}": number for number in range(20)}


@in_loop
async def test_on_the_same_key_the_later_commit_stands_and_is_counted(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0)
        async with provider.open(session_id, access="concurrent") as one:
            one["a"] = "one"
            async with provider.open(session_id, access="concurrent") as two:
                two["a"] = "two"
        assert await data_of(provider, session_id) == {"a": "one"}
        assert (provider.merges, provider.key_conflicts) == (1, 1)


@in_loop
async def test_a_resolver_decides_between_the_two(grid: Spy) -> None:
    asked: list[tuple[object, ...]] = []

    def add(key: str, base: Any, theirs: Any, mine: Any) -> Any:
        asked.append((key, base, theirs, mine))
        return theirs + mine - base

    async with provider_on(grid, on_conflict=add) as provider:
        session_id = await stored(provider, n=10)
        async with provider.open(session_id, access="concurrent") as one:
            one["n"] += 1
            await change(provider, session_id, n=15)
        assert await data_of(provider, session_id) == {"n": 16}
    assert asked == [("n", 10, 15, 11)]


@in_loop
async def test_a_resolver_that_fails_stores_nothing_and_leaves_nothing(grid: Spy) -> None:
    async with provider_on(grid, on_conflict=lambda *_: 1 // 0) as provider:
        session_id = await stored(provider, n=10)

        async def write() -> None:
            async with provider.open(session_id, access="concurrent") as one:
                one["n"] += 1
                await change(provider, session_id, n=15)

        with pytest.raises(ZeroDivisionError):
            await write()
        assert await data_of(provider, session_id) == {"n": 15}
    assert await is_free(grid, session_id)


@in_loop
async def test_a_save_whose_resolver_failed_overwrites_nothing_later(grid: Spy) -> None:
    fails = True

    def on_conflict(key: str, base: Any, theirs: Any, mine: Any) -> Any:
        if fails:
            raise ZeroDivisionError
        return [theirs, mine]

    async with provider_on(grid, on_conflict=on_conflict) as provider:
        session_id = await stored(provider, n=10, other=0)
        async with provider.open(session_id, access="concurrent") as one:
            one["n"] = 11
            await change(provider, session_id, n=15, other=1)
            with pytest.raises(ZeroDivisionError):
                await one.save()
            fails = False
        assert await data_of(provider, session_id) == {"n": [15, 11], "other": 1}
    assert await is_free(grid, session_id)


@in_loop
async def test_what_another_removed_or_added_is_so(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1, b=1)
        async with provider.open(session_id, access="concurrent") as session:
            assert session["a"] == 1
            session["mine"] = 1
            await change(provider, session_id, a=ABSENT, c=[2])
        assert await data_of(provider, session_id) == {"b": 1, "c": [2], "mine": 1}


@in_loop
async def test_a_nested_value_in_hand_is_not_stored_over_a_newer_one(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, cart=[1], n=0)
        async with provider.open(session_id, access="concurrent") as session:
            assert session["cart"] == [1]
            session["n"] = 1
            await change(provider, session_id, cart=[1, 2])
        assert await data_of(provider, session_id) == {"cart": [1, 2], "n": 1}


@in_loop
async def test_save_shows_what_it_was_merged_with(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0, b=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 1
            await change(provider, session_id, b=5)
            await session.save()
            assert dict(session) == {"a": 1, "b": 5}
            assert await data_of(provider, session_id) == {"a": 1, "b": 5}
            await change(provider, session_id, a=7)
            session["b"] += 1
        assert await data_of(provider, session_id) == {"a": 7, "b": 6}
        assert provider.key_conflicts == 0


@in_loop
async def test_what_is_changed_while_a_save_is_on_its_way_is_kept(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0, b=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 1
            await change(provider, session_id, b=5)
            way = OnTheWay(grid, "commit_if", "back")
            saving = asyncio.create_task(session.save())
            await way.reached.wait()
            session["b"] = 9
            await saving
            assert dict(session) == {"a": 1, "b": 9}
        assert await data_of(provider, session_id) == {"a": 1, "b": 9}


@in_loop
async def test_a_new_timeout_is_merged_too(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0)
        async with provider.open(session_id, access="concurrent") as one:
            one["a"] = 1
            async with provider.open(session_id, access="concurrent") as two:
                two.timeout = 77.0
        async with provider.open(session_id, access="read_only") as session:
            assert (session["a"], session.timeout) == (1, 77.0)


@in_loop
async def test_a_concurrent_request_that_changes_nothing_writes_nothing(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=[1])
        grid.calls.clear()
        async with provider.open(session_id, access="concurrent") as session:
            assert session["a"] == [1]
            session["a"] = [1]
        assert grid.asked == ["read"]


@in_loop
async def test_a_value_that_cannot_be_stored_stores_nothing(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0)

        async def write() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 1
                session["b"] = object()

        with pytest.raises(SessionTypeError):
            await write()
        assert await data_of(provider, session_id) == {"a": 0}


# -- beginning and ending -------------------------------------------------------------------------


@pytest.mark.parametrize("saves", [False, True])
@in_loop
async def test_a_new_session_is_stored_without_a_lock(grid: Spy, saves: bool) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None, access="concurrent") as session:
            session["a"] = 1
            if saves:
                await session.save()
                assert await is_free(grid, session.id)
                await change(provider, session.id, b=2)
                session["a"] = 3
            session_id = session.id
        assert await data_of(provider, session_id) == ({"a": 3, "b": 2} if saves else {"a": 1})
    assert await is_free(grid, session_id)


@in_loop
async def test_nothing_comes_back_after_it_was_removed(grid: Spy) -> None:
    """Promise 2."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)

        async def write() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 2
                async with provider.open(session_id) as other:
                    other.abandon()

        with pytest.raises(SessionGone):
            await write()
        async with provider.open(session_id, access="read_only") as session:
            assert session.is_new


@in_loop
async def test_who_came_before_another_user_logged_in_stores_nothing(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)

        async def write() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 2
                async with provider.open(session_id) as other:
                    other.user = "ann"
                    await other.release()
                    new_ids.append(other.id)

        new_ids: list[str] = []
        with pytest.raises(SessionReplaced):
            await write()
        assert await data_of(provider, new_ids[0]) == {"a": 1}


@in_loop
async def test_who_came_before_the_id_was_replaced_still_stores(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 2
            async with provider.open(session_id) as other:
                other.regenerate_id()
                await other.release()
                new_id = other.id
        assert new_id != session_id
        assert await data_of(provider, new_id) == {"a": 2}


@pytest.mark.parametrize("how", ["user", "regenerate_id"])
@in_loop
async def test_a_new_id_is_given_under_the_lock_and_merged(grid: Spy, how: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=0, b=0)
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] = 1
            if how == "user":
                session.user = "ann"
            else:
                session.regenerate_id()
            await change(provider, session_id, b=5)
            await session.release()
            new_id = session.id
        assert new_id != session_id
        assert await data_of(provider, new_id) == {"a": 1, "b": 5}
    assert await is_free(grid, new_id)


@pytest.mark.parametrize("how", ["abandon", "clear"])
@in_loop
async def test_a_concurrent_request_may_end_the_session(grid: Spy, how: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id, access="concurrent") as session:
            getattr(session, how)()
        async with provider.open(session_id, access="read_only") as session:
            assert session.is_new


@in_loop
async def test_clearing_leaves_what_another_added_meanwhile(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id, access="concurrent") as session:
            session.clear()
            await change(provider, session_id, b=2)
        assert await data_of(provider, session_id) == {"b": 2}
    assert await is_free(grid, session_id)


@in_loop
async def test_an_exception_stores_nothing(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)

        async def write() -> None:
            async with provider.open(session_id, access="concurrent") as session:
                session["a"] = 2
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await write()
        assert await data_of(provider, session_id) == {"a": 1}
