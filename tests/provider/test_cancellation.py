"""Promise 7: cancelled at any await, a session is whole, and its lock and tickets are gone.

Each scenario is run again and again, cancelled one step later each time, until it runs to its end;
the grid suspends before and after each of its calls, so that there is an await to be cancelled at.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from gridsession import GridUnavailable, SessionProvider
from gridsession.grids.memory import MemoryGrid
from gridsession.session import Session
from tests.provider.harness import (
    Outage,
    Spy,
    identity_of,
    in_loop,
    is_free,
    provider_on,
    stored,
    until,
)

OLD: dict[str, Any] = {"a": [1], "b": "old"}
NEW: dict[str, Any] = {"a": [1, 2], "b": "new"}

Scenario = Callable[[SessionProvider, str], Coroutine[Any, Any, None]]


def change(session: Session) -> None:
    session["a"].append(2)
    session["b"] = "new"


async def commits(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id) as session:
        change(session)


async def reads(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id) as session:
        assert session["b"] in ("old", "new")


async def reads_only(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id, access="read_only", wait_for_writer=True) as session:
        assert session["b"] in ("old", "new")


async def saves(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id) as session:
        change(session)
        await session.save()
        await session.save()


async def releases(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id) as session:
        change(session)
        await session.release()


async def locks_in_between(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id, access="read_only") as session:
        async with session.exclusive() as s:
            if s["b"] == "old":
                change(s)
        async with session.exclusive() as s:
            assert s["b"] == "new"


async def fails(provider: SessionProvider, session_id: str) -> None:
    with contextlib.suppress(ZeroDivisionError):
        async with provider.open(session_id) as session:
            session["b"] = "never"
            raise ZeroDivisionError


async def cannot_be_stored(provider: SessionProvider, session_id: str) -> None:
    with contextlib.suppress(TypeError):
        async with provider.open(session_id) as session:
            session["b"] = object()


async def rotates(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id) as session:
        change(session)
        session.regenerate_id()


async def creates(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(None) as session:
        session["new"] = 1
        await session.save()
        session["new"] = 2


SCENARIOS = [
    commits,
    reads,
    reads_only,
    saves,
    releases,
    locks_in_between,
    fails,
    cannot_be_stored,
    rotates,
    creates,
]


async def suspend(name: str) -> None:
    await asyncio.sleep(0)


async def cancel_at(step: int, running: asyncio.Task[None], again: int | None) -> bool:
    """Cancel a task after some steps, and perhaps once more. False: it was done before."""
    for _ in range(step):
        await asyncio.sleep(0)
        if running.done():
            break
    stopped = running.cancel()
    if stopped and again is not None:
        for _ in range(again):
            await asyncio.sleep(0)
        running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    return stopped


async def _hold(provider: SessionProvider, session_id: str, step: int) -> None:
    async with provider.open(session_id, holder="another"):
        for _ in range(5 + step // 2):  # let go earlier and later, seen from the other's await
            await asyncio.sleep(0)


async def at_each_await(
    grid: Spy,
    scenario: Scenario,
    check: Callable[[SessionProvider, str], Awaitable[None]],
    *,
    again: int | None = None,
    holder: bool = False,
) -> int:
    """Cancel a scenario at each of its awaits in turn; how many there were."""
    step = waits = 0
    while True:
        async with provider_on(grid) as provider:
            session_id = await stored(provider, **OLD)
            grid.calls.clear()
            grid.step(suspend)

            other = asyncio.create_task(_hold(provider, session_id, step)) if holder else None
            for _ in range(4 if holder else 0):
                await asyncio.sleep(0)
            running = asyncio.create_task(scenario(provider, session_id))
            stopped = await cancel_at(step, running, again)
            waits += grid.calls.count("wait")
            if other is not None:
                await other
            grid.step(None)
        # The provider is closed: what it had to withdraw it has withdrawn.
        assert await is_free(grid, session_id)
        if isinstance(grid.inner, MemoryGrid):
            record = grid.inner._table.load(identity_of(session_id).key)
            assert record is None or not record.tickets
        async with provider_on(grid) as provider:
            await check(provider, session_id)
        if not stopped:
            assert bool(waits) is holder
            return step
        step += 1
        assert step < 300


def whole(grid: Spy, scenario: Scenario) -> Callable[[SessionProvider, str], Awaitable[None]]:
    async def check(provider: SessionProvider, session_id: str) -> None:
        committed = "commit" in grid.calls
        async with provider.open(session_id) as session:
            assert session == (NEW if session["b"] == "new" else OLD)
            if committed and scenario not in (saves, creates):  # what was asked for stands
                assert session == NEW

    return check


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
@in_loop
async def test_cancelled_at_each_await(grid: Spy, scenario: Scenario, loop: str) -> None:
    steps = await at_each_await(grid, scenario, whole(grid, scenario))
    assert steps >= 2  # there was something to cancel at


@pytest.mark.parametrize(
    "scenario", [commits, reads_only, locks_in_between], ids=lambda s: s.__name__
)
@in_loop
async def test_cancelled_at_each_await_of_waiting(grid: Spy, scenario: Scenario) -> None:
    steps = await at_each_await(grid, scenario, whole(grid, scenario), holder=True)
    assert steps >= 4


@pytest.mark.parametrize("again", [0, 1, 2])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda s: s.__name__)
@in_loop
async def test_cancelled_at_each_await_and_once_more(
    grid: Spy, scenario: Scenario, again: int
) -> None:
    await at_each_await(grid, scenario, whole(grid, scenario), again=again)


@pytest.mark.parametrize("ending", ["abandon", "clear"])
@in_loop
async def test_an_end_that_was_asked_for_stands(grid: Spy, ending: str) -> None:
    async def ends(provider: SessionProvider, session_id: str) -> None:
        async with provider.open(session_id) as session:
            getattr(session, ending)()

    async def check(provider: SessionProvider, session_id: str) -> None:
        removed = "remove" in grid.calls
        async with provider.open(session_id) as session:
            assert session.is_new is removed
            assert session.is_new or session == OLD

    await at_each_await(grid, ends, check)


@in_loop
async def test_a_cancelled_commit_is_finished_when_the_grid_is_back(
    grid: Spy, caplog: pytest.LogCaptureFixture
) -> None:
    async with provider_on(grid) as provider:
        for finishing in (commits, _abandons):
            session_id = await stored(provider, **OLD)
            reached = asyncio.Event()

            async def hang(name: str, reached: asyncio.Event = reached) -> None:
                if name in ("commit", "remove"):
                    reached.set()
                    await asyncio.Event().wait()

            grid.before = hang
            running = asyncio.create_task(finishing(provider, session_id))
            await reached.wait()
            running.cancel()
            grid.before = away = Outage("commit", "remove", times=3)
            with contextlib.suppress(asyncio.CancelledError):
                await running
            await until(lambda away=away: away.failed == 3)  # type: ignore[misc]
            await until(lambda: len(asyncio.all_tasks()) == 1)
            async with provider.open(session_id, access="read_only") as session:
                assert session == (NEW if finishing is commits else {})
            assert await is_free(grid, session_id)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


async def _abandons(provider: SessionProvider, session_id: str) -> None:
    async with provider.open(session_id) as session:
        session.abandon()


@in_loop
async def test_a_cancelled_commit_that_never_arrives_is_reported(
    grid: Spy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gridsession.provider.loop.TICKET_SECONDS", 0.0)
    async with provider_on(grid, lock_lease=0.05) as provider:
        session_id = await stored(provider, **OLD)
        reached = asyncio.Event()

        async def away(name: str) -> None:
            if name == "commit":
                reached.set()
                await asyncio.sleep(0)
                raise GridUnavailable("the grid is away")

        grid.before = away
        running = asyncio.create_task(commits(provider, session_id))
        await reached.wait()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
        await until(lambda: len(asyncio.all_tasks()) == 1)
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "the work of a cancelled request was not stored" in record.getMessage()
    assert identity_of(session_id).key.hex()[:12] in record.getMessage()
