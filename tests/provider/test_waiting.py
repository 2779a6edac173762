"""Turns: who waits for a session's lock, for how long, and what keeps it."""

# ruff: noqa: PT012 - what is raised comes from the end of a block, after the statements in it

from __future__ import annotations

import asyncio
import logging
import re

import pytest

from gridsession import SessionLockLost, SessionLockTimeout, SessionProvider, SessionQueueFull
from gridsession.testing import ManualClock
from tests.provider.harness import (
    Outage,
    Spy,
    data_of,
    identity_of,
    in_loop,
    is_free,
    provider_on,
    stored,
    until,
)

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])


@LOOPS
@in_loop
async def test_turns_come_in_the_order_of_asking(grid: Spy, loop: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, turns=[])

        async def take_turn(number: int) -> float:
            async with provider.open(session_id) as session:
                turns = session["turns"]
                await asyncio.sleep(0)
                session["turns"] = [*turns, number]
                return session.waited

        async with provider.open(session_id) as session, asyncio.TaskGroup() as tasks:
            waiting = []
            for number in range(20):
                waiting.append(tasks.create_task(take_turn(number)))
                await until(lambda number=number: grid.in_line(number + 1))  # type: ignore[misc]
            grid.calls.clear()
            await asyncio.sleep(0.005)  # uvloop counts whole milliseconds
            await session.release()
        assert await data_of(provider, session_id) == {"turns": list(range(20))}
        assert all(task.result() > 0 for task in waiting)
        assert session.waited == 0
        # Each was rung once, and asked once again: a turn costs nobody else a call.
        assert grid.asked.count("acquire") == 20
        assert await is_free(grid, session_id)


@LOOPS
@in_loop
async def test_no_update_is_lost_between_two_providers(grid: Spy, loop: str) -> None:
    async with provider_on(grid) as one, provider_on(grid) as two:
        session_id = await stored(one, count=0)

        async def count(provider: SessionProvider) -> None:
            for _ in range(10):
                async with provider.open(session_id) as session:
                    before = session["count"]
                    await asyncio.sleep(0)
                    session["count"] = before + 1

        async with asyncio.TaskGroup() as tasks:
            for provider in (one, two) * 3:
                tasks.create_task(count(provider))
        assert await data_of(one, session_id) == {"count": 60}


@in_loop
async def test_read_only_waits_for_a_writer_if_asked_to(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)

        async def read(*, wait: bool) -> int:
            async with provider.open(session_id, access="read_only", wait_for_writer=wait) as s:
                value: int = s["a"]
                return value

        async with provider.open(session_id) as writer, asyncio.TaskGroup() as tasks:
            patient = tasks.create_task(read(wait=True))
            assert await read(wait=False) == 1
            await until(lambda: "wait" in grid.calls)
            writer["a"] = 2
            await writer.save()
            assert not patient.done()
            await writer.release()
        assert patient.result() == 2
        assert await read(wait=True) == 2
        assert await is_free(grid, session_id)


@pytest.mark.parametrize("access", ["exclusive", "read_only wait_for_writer"])
@in_loop
async def test_waiting_ends_with_a_word_on_the_holder(
    grid: Spy, clock: ManualClock, access: str
) -> None:
    async with provider_on(grid, lock_wait_timeout=0.05, lock_lease=30) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id, holder="POST /cart · web-3 · pid 71"):
            clock.advance(7.3)
            with pytest.raises(SessionLockTimeout) as raised:
                async with provider.open(session_id, access=access):
                    raise AssertionError("the block ran")
        assert re.fullmatch(
            r"POST /cart · web-3 · pid 71 has held this session's lock for 7\.3 s; "
            r"gave up after 0\.\d s\.",
            str(raised.value),
        )
        await until(lambda: grid.calls[-1] == "release")
    assert await is_free(grid, session_id)


@in_loop
async def test_exclusive_blocks_wait_no_longer_than_requests(grid: Spy) -> None:
    async with provider_on(grid, lock_wait_timeout=0.05) as provider:
        session_id = await stored(provider, a=1)
        async with (
            provider.open(session_id, holder="the holder") as other,
            provider.open(session_id, access="read_only") as session,
        ):
            with pytest.raises(SessionLockTimeout, match="the holder"):
                async with session.exclusive():
                    raise AssertionError("the block ran")
            assert session.is_read_only
            await other.release()
            async with session.exclusive() as s:
                s["a"] = 2
        assert await data_of(provider, session_id) == {"a": 2}


@in_loop
async def test_a_queue_is_only_so_long(grid: Spy) -> None:
    async with provider_on(grid, request_queue_limit_per_session=2) as provider:
        session_id = await stored(provider, a=1)

        async def wait() -> None:
            async with provider.open(session_id):
                pass

        async with (
            provider.open(session_id, holder="job 7") as session,
            asyncio.TaskGroup() as tasks,
        ):
            tasks.create_task(wait())
            tasks.create_task(wait())
            await until(lambda: grid.in_line(2))
            full = r"2 requests wait .*; job 7 has held its lock for 0\.0 s"
            with pytest.raises(SessionQueueFull, match=full):
                async with provider.open(session_id):
                    raise AssertionError("the block ran")
            assert await data_of(provider, session_id) == {"a": 1}
            await session.release()
        assert await is_free(grid, session_id)


@in_loop
async def test_who_waits_for_a_session_that_ends_gets_a_new_one(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)

        async def wait() -> tuple[bool, bool]:
            async with provider.open(session_id) as session:
                return session.is_new, session.id == session_id

        async with provider.open(session_id) as session, asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(wait())
            await until(lambda: "wait" in grid.calls)
            session.abandon()
            await session.release()
        assert waiting.result() == (True, False)


# -- leases -------------------------------------------------------------------------------------


@LOOPS
@in_loop
async def test_a_lock_is_kept_while_its_holder_works(real_grid: Spy, loop: str) -> None:
    async with provider_on(real_grid, lock_lease=0.3) as provider:
        ids = [await stored(provider, a=n) for n in range(3)]

        async def work(session_id: str) -> None:
            async with provider.open(session_id) as session:
                await asyncio.sleep(0.7)
                session["a"] = "worked"

        async def intrude(session_id: str) -> object:
            async with provider.open(session_id) as session:
                return session["a"]

        async with asyncio.TaskGroup() as tasks:
            for session_id in ids:
                tasks.create_task(work(session_id))
            await asyncio.sleep(0.01)
            intruders = [tasks.create_task(intrude(session_id)) for session_id in ids]
        assert [task.result() for task in intruders] == ["worked"] * 3
        # One task renews for all of them, at a third of the lease.
        assert 2 <= real_grid.calls.count("renew") <= 8
        real_grid.calls.clear()
        await asyncio.sleep(0.15)
        assert "renew" not in real_grid.calls  # nothing is held


@in_loop
async def test_a_lock_outlives_renewals_that_fail(
    real_grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(real_grid, lock_lease=0.6) as provider:
        session_id = await stored(provider, a=1)
        real_grid.before = away = Outage("renew", times=3)
        async with provider.open(session_id) as session:
            await asyncio.sleep(0.8)
            assert away.failed == 3
            assert not await is_free(real_grid, session_id)
            session["a"] = 2
        assert await data_of(provider, session_id) == {"a": 2}
    records = [r for r in caplog.records if "could not be renewed" in r.getMessage()]
    assert [r.levelno for r in records] == [logging.WARNING] * 3


@in_loop
async def test_a_hung_handler_loses_the_lock_and_is_told(
    real_grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(real_grid, lock_lease=0.15, execution_timeout=0.2) as provider:
        session_id = await stored(provider, a=1)
        with pytest.raises(SessionLockLost):
            async with provider.open(session_id, holder="GET /slow") as hung:
                async with provider.open(session_id) as other:  # waits, and gets it
                    other["a"] = 2
                hung["a"] = 3
        assert await data_of(provider, session_id) == {"a": 2}
    (record,) = [r for r in caplog.records if "execution_timeout" in r.getMessage()]
    assert record.levelno == logging.ERROR
    assert "GET /slow" in record.getMessage()
    assert identity_of(session_id).key.hex()[:12] in record.getMessage()


@in_loop
async def test_a_lock_that_was_lost_is_renewed_no_more(real_grid: Spy) -> None:
    async with provider_on(real_grid, lock_lease=0.09) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id):
            await real_grid.inner.remove(identity_of(session_id).key)
            await until(lambda: ("renew", [False]) in real_grid.outcomes)
            real_grid.calls.clear()
            await asyncio.sleep(0.1)
            assert "renew" not in real_grid.calls
