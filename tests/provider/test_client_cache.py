"""The client cache at a grid: what travels, what is asked, how old an answer may be."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
from typing import Any, cast

import pytest

from gridsession import GridUnavailable, SessionProvider, SessionReadOnly, SessionReplaced
from gridsession.grids.contract import Found, Granted, Grid
from gridsession.grids.memory import MemoryGrid
from gridsession.testing import ManualClock
from tests.provider.harness import (
    OnTheWay,
    Outage,
    Spy,
    data_of,
    identity_of,
    in_loop,
    provider_on,
    run,
    steps,
    stored,
)

# -- at a grid ----------------------------------------------------------------------------------


def payloads(grid: Spy) -> list[bytes | None]:
    """What travelled, read by read."""
    return [
        outcome.snapshot.payload
        for _, outcome in grid.outcomes
        if isinstance(outcome, Granted | Found)
    ]


async def cached(provider: SessionProvider, **values: Any) -> str:
    """Store a session and read it, so that it is in the cache as a read leaves it."""
    session_id = await stored(provider, **values)
    await data_of(provider, session_id)
    return session_id


@pytest.mark.parametrize("access", ["exclusive", "read_only", "concurrent"])
@in_loop
async def test_an_unchanged_payload_does_not_travel(grid: Spy, access: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await cached(provider, a=1, pad="x" * 3000)
        grid.outcomes.clear()
        for _ in range(3):
            async with provider.open(session_id, access=access) as session:
                assert session["a"] == 1
        assert payloads(grid) == [None] * 3
        assert provider.client_cache is not None
        assert provider.client_cache.counters.hits >= 3


@in_loop
async def test_what_a_worker_committed_is_in_its_cache(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            session["a"] = 2
        async with provider.open(session_id, access="concurrent") as session:
            session["a"] += 1
        grid.outcomes.clear()
        assert await data_of(provider, session_id) == {"a": 3}
        assert payloads(grid) == [None]


@in_loop
async def test_what_another_worker_committed_travels(grid: Spy) -> None:
    async with provider_on(grid) as provider, provider_on(grid) as other:
        session_id = await cached(provider, a=1)
        async with other.open(session_id) as session:
            session["a"] = 2
        grid.outcomes.clear()
        async with provider.open(session_id) as session:
            assert session["a"] == 2
        assert payloads(grid)[0] is not None


@in_loop
async def test_promise_8_an_exclusive_access_sees_what_was_committed_last(grid: Spy) -> None:
    options = {"client_cache_coherency_interval": 1000.0}
    async with provider_on(grid, **options) as provider, provider_on(grid) as other:
        session_id = await cached(provider, a=1)
        async with other.open(session_id) as session:
            session["a"] = 2
        assert await data_of(provider, session_id) == {"a": 1}  # older by less than the interval
        async with provider.open(session_id, access="concurrent") as session:
            assert session["a"] == 2
        async with other.open(session_id) as session:
            session["a"] = 3
        async with provider.open(session_id) as session:
            assert session["a"] == 3
        assert await data_of(provider, session_id) == {"a": 3}


@in_loop
async def test_a_read_within_the_interval_asks_nothing(grid: Spy) -> None:
    async with provider_on(grid, client_cache_coherency_interval=1000.0) as provider:
        session_id = await cached(provider, a=[1])
        grid.calls.clear()
        for _ in range(3):
            async with provider.open(session_id, access="read_only") as session:
                assert session["a"] == [1]
                assert not session.is_stale
                with pytest.raises(SessionReadOnly):
                    session["a"] = 2
        assert grid.asked == []


@in_loop
async def test_a_read_that_waits_for_a_writer_asks_the_grid(grid: Spy) -> None:
    async with provider_on(grid, client_cache_coherency_interval=1000.0) as provider:
        session_id = await cached(provider, a=1)
        grid.calls.clear()
        async with provider.open(session_id, access="read_only", wait_for_writer=True) as session:
            assert session["a"] == 1
        assert grid.asked == ["read"]


@in_loop
async def test_values_of_two_requests_are_not_the_same_object(grid: Spy) -> None:
    async with provider_on(grid, client_cache_coherency_interval=1000.0) as provider:
        session_id = await cached(provider, a=[1])
        async with (
            provider.open(session_id, access="read_only") as one,
            provider.open(session_id, access="read_only") as two,
        ):
            assert one["a"] == two["a"] == [1]
            assert one["a"] is not two["a"]


@in_loop
async def test_a_pure_read_never_writes(grid: Spy) -> None:
    async with provider_on(grid, client_cache_coherency_interval=0.0) as provider:
        session_id = await cached(provider, a=[1, {"b": 2}])
        grid.calls.clear()
        for access in ("read_only", "concurrent", "exclusive"):
            async with provider.open(session_id, access=access) as session:
                assert session["a"][1]["b"] == 2
        assert grid.asked == ["read", "read", "acquire", "release"]


@in_loop
async def test_reads_from_the_cache_keep_the_session_alive(grid: Spy, clock: ManualClock) -> None:
    options = {"client_cache_coherency_interval": 1000.0, "timeout": 1.2}
    async with provider_on(grid, **options) as provider:
        session_id = await cached(provider, a=1)
        assert provider.client_cache is not None
        for _ in range(4):
            clock.advance(1.1)
            await asyncio.sleep(1.05)  # the cache counts this machine's seconds
            async with provider.open(session_id, access="read_only") as session:
                assert session["a"] == 1
            await grid.settle()
        assert grid.calls.count("touch") >= 3


@in_loop
async def test_a_session_that_has_ended_is_forgotten_when_its_use_is_told(
    grid: Spy, clock: ManualClock
) -> None:
    options = {"client_cache_coherency_interval": 1000.0}
    async with provider_on(grid, **options) as provider, provider_on(grid) as other:
        session_id = await cached(provider, a=1)
        async with other.open(session_id) as session:
            session.abandon()
        assert provider.client_cache is not None
        kept = provider.client_cache.get(identity_of(session_id).key)
        assert kept is not None
        kept.slide_at = 0.0
        assert await data_of(provider, session_id) == {"a": 1}
        await grid.settle()
        async with provider.open(session_id, access="read_only") as session:
            assert session.is_new


@pytest.mark.parametrize("how", ["abandon", "clear", "user", "regenerate_id"])
@in_loop
async def test_an_id_that_has_ended_here_is_not_good_here(grid: Spy, how: str) -> None:
    async with provider_on(grid, client_cache_coherency_interval=1000.0) as provider:
        session_id = await cached(provider, a=1)
        async with provider.open(session_id) as session:
            if how == "user":
                session.user = "ann"
            else:
                getattr(session, how)()
        grid.calls.clear()
        with contextlib.suppress(SessionReplaced):
            await data_of(provider, session_id)
        assert grid.asked == ["read"]


@in_loop
async def test_a_commit_that_fails_leaves_nothing_in_the_cache(grid: Spy) -> None:
    async with provider_on(grid, client_cache_coherency_interval=1000.0) as provider:
        session_id = await cached(provider, a=1)
        grid.after = Outage("commit", times=1)  # it was carried out, and nobody knows
        with pytest.raises(GridUnavailable):
            async with provider.open(session_id) as session:
                session["a"] = 2
        assert await data_of(provider, session_id) == {"a": 2}


@in_loop
async def test_a_slow_read_does_not_bring_an_older_version_back(grid: Spy) -> None:
    async with provider_on(grid, client_cache_coherency_interval=1000.0) as provider:
        session_id = await stored(provider, a=1)
        assert provider.client_cache is not None
        provider.client_cache.drop(identity_of(session_id).key)
        way = OnTheWay(grid, "read", "back")
        slow = asyncio.create_task(data_of(provider, session_id))
        await way.reached.wait()
        async with provider.open(session_id) as session:
            session["a"] = 2
        assert await slow == {"a": 1}
        assert await data_of(provider, session_id) == {"a": 2}


@in_loop
async def test_without_capacity_nothing_is_kept(grid: Spy) -> None:
    async with provider_on(grid, client_cache_capacity=0) as provider:
        assert provider.client_cache is None
        session_id = await cached(provider, a=1)
        grid.outcomes.clear()
        assert await data_of(provider, session_id) == {"a": 1}
        assert None not in payloads(grid)


def test_a_grid_of_this_machine_needs_no_cache() -> None:
    async def main() -> None:
        async with provider_on(MemoryGrid(), client_cache_coherency_interval=5.0) as provider:
            assert provider.client_cache is None
            session_id = await stored(provider, a=1)
            assert await data_of(provider, session_id) == {"a": 1}

    run(main())


# -- in an outage -------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["read_only", "read_only wait_for_writer"])
@in_loop
async def test_the_last_known_version_is_read_in_an_outage(grid: Spy, access: str) -> None:
    async with provider_on(grid, if_grid_unavailable="read_cached") as provider:
        session_id = await cached(provider, a=1)
        grid.before = away = Outage()
        name, *flags = access.split()
        wait = bool(flags)
        async with provider.open(session_id, access=name, wait_for_writer=wait) as session:
            assert session.is_stale
            assert dict(session) == {"a": 1}
            with pytest.raises(SessionReadOnly):
                session["a"] = 2
            with pytest.raises(GridUnavailable):
                async with session.exclusive():
                    raise AssertionError("the block ran")
        away.over()
        async with provider.open(session_id, access="read_only") as session:
            assert not session.is_stale


@pytest.mark.parametrize("access", ["exclusive", "concurrent"])
@in_loop
async def test_who_may_write_gets_nothing_stale(grid: Spy, access: str) -> None:
    async with provider_on(grid, if_grid_unavailable="read_cached") as provider:
        session_id = await cached(provider, a=1)
        grid.before = Outage()
        with pytest.raises(GridUnavailable):
            async with provider.open(session_id, access=access):
                raise AssertionError("the block ran")
        grid.before = None


@in_loop
async def test_by_default_an_outage_is_told(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await cached(provider, a=1)
        grid.before = Outage()
        with pytest.raises(GridUnavailable):
            await data_of(provider, session_id)
        grid.before = None


@in_loop
async def test_nothing_is_read_for_another_secret_in_an_outage(grid: Spy) -> None:
    async with provider_on(grid, if_grid_unavailable="read_cached") as provider:
        session_id = await cached(provider, a=1)
        grid.before = Outage()
        forged = session_id[:-8] + ("A" * 8 if session_id[-8:] != "A" * 8 else "B" * 8)
        assert identity_of(forged).key == identity_of(session_id).key
        with pytest.raises(GridUnavailable):
            await data_of(provider, forged)
        grid.before = None


@in_loop
async def test_what_has_expired_is_not_read_in_an_outage(grid: Spy) -> None:
    async with provider_on(grid, if_grid_unavailable="read_cached", timeout=0.05) as provider:
        session_id = await cached(provider, a=1)
        await asyncio.sleep(0.06)
        grid.before = Outage()
        with pytest.raises(GridUnavailable):
            await data_of(provider, session_id)
        grid.before = None


@in_loop
async def test_an_outage_while_it_waits_for_a_writer(grid: Spy) -> None:
    async with provider_on(grid, if_grid_unavailable="read_cached") as provider:
        session_id = await cached(provider, a=1)
        async with provider.open(session_id):
            waiting = asyncio.create_task(_read_after_writer(provider, session_id))
            while not grid.in_line(1):
                await steps(1)
                await asyncio.sleep(0.001)
            grid.before = Outage("read")
            assert await waiting == {"a": 1, "is_stale": True}
            grid.before = None


async def _read_after_writer(provider: SessionProvider, session_id: str) -> dict[str, Any]:
    async with provider.open(session_id, access="read_only", wait_for_writer=True) as session:
        return {**session, "is_stale": session.is_stale}


def test_the_spy_is_a_grid() -> None:
    """What all of this is tested behind offers whatever a provider asks for."""
    assert cast(Grid, Spy(MemoryGrid())).is_local is False


# -- in a forked process ------------------------------------------------------------------------


def test_a_forked_process_has_locks_of_its_own() -> None:
    """Another thread may have held its parent's at that moment, and would hold them for ever."""

    async def main() -> None:
        async with provider_on(Spy(MemoryGrid()), compression_enabled=True) as provider:
            before = provider.client_cache, provider.envelope

            def child() -> None:
                after = provider.client_cache, provider.envelope
                alike = [one is other for one, other in zip(before, after, strict=True)]
                os._exit(0 if alike == [False, False] and None not in after else 1)

            process = multiprocessing.get_context("fork").Process(target=child)
            process.start()
            process.join(10)
            assert process.exitcode == 0

    run(main())
