"""What runs beside the requests: touching and sweeping. It keeps nothing of them."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import threading
import weakref
from contextvars import ContextVar

import pytest

from gridsession import GridUnavailable, Session, SessionProvider, SessionSettings
from gridsession.testing import ManualClock
from tests.provider.harness import (
    Outage,
    Spy,
    data_of,
    in_loop,
    provider_on,
    steps,
    stored,
    until,
)


@in_loop
async def test_readers_slide_the_deadline_once_in_a_hundredth_of_the_timeout(
    grid: Spy, clock: ManualClock
) -> None:
    async with provider_on(grid, timeout=1000) as provider:
        session_id = await stored(provider, a=1)
        for _ in range(3):
            await data_of(provider, session_id)
        await grid.settle()
        assert "touch" not in grid.calls  # written a moment ago
        for _ in range(30):
            clock.advance(9)
            await data_of(provider, session_id)
            await grid.settle()
        assert grid.calls.count("touch") == 15
        clock.advance(995)
        assert await data_of(provider, session_id) == {"a": 1}


@in_loop
async def test_a_touch_is_off_the_path_and_its_failure_harms_nobody(
    grid: Spy, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    grid_is_back = asyncio.Event()

    async def hold(name: str) -> None:
        if name == "touch":
            await grid_is_back.wait()
            raise GridUnavailable("the grid is away")

    async with provider_on(grid, timeout=100) as provider:
        session_id = await stored(provider, a=1)
        clock.advance(2)
        grid.before = hold
        assert await data_of(provider, session_id) == {"a": 1}
        await steps(3)
        assert grid.calls.count("touch") == 1
        grid_is_back.set()
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "its expiry could not be put off" in record.getMessage()


@in_loop
async def test_expired_sessions_leave_without_being_asked_for(
    grid: Spy, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.0)
    async with provider_on(grid, timeout=10) as provider:
        for number in range(150):
            await stored(provider, n=number)
        kept = await stored(provider, n="kept")
        async with provider.open(kept) as session:
            session.timeout = 1000
        clock.advance(11)
    async with provider_on(grid, sweep_interval=3600) as provider:
        # In batches, so that requests come in between; one soon after the other while more is due.
        await until(lambda: sum(_swept(grid)) >= 151)
        assert max(_swept(grid)) <= 64
        assert await data_of(provider, kept) == {"n": "kept"}


def _swept(grid: Spy) -> list[int]:
    """How many records each sweep looked at."""
    return [n for name, n in grid.outcomes if name == "sweep" and isinstance(n, int)]


@in_loop
async def test_a_worker_with_requests_in_hand_lets_others_sweep_for_a_while(
    grid: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.5)
    loop = asyncio.get_running_loop()
    async with provider_on(grid, sweep_interval=0.12) as provider:
        began = loop.time()
        async with provider.open(await stored(provider, a=1)):
            await until(lambda: "sweep" in grid.calls)
        # Due at 0.06 seconds, put off six times by 0.02; then made all the same.
        assert loop.time() - began >= 0.17
        grid.calls.clear()
        began = loop.time()
        await until(lambda: "sweep" in grid.calls)
        assert loop.time() - began >= 0.08


@in_loop
async def test_sweeping_outlives_an_outage(grid: Spy, caplog: pytest.LogCaptureFixture) -> None:
    async with provider_on(grid, sweep_interval=0.01):
        grid.before = away = Outage("sweep", times=3)
        await until(lambda: away.failed == 3 and _swept(grid) != [])
    warned = [r for r in caplog.records if "could not be removed just now" in r.getMessage()]
    assert [r.levelno for r in warned] == [logging.WARNING] * 3


@in_loop
async def test_nothing_sweeps_once_the_provider_is_closed(grid: Spy) -> None:
    async with provider_on(grid, sweep_interval=0.005):
        await until(lambda: "sweep" in grid.calls)
    grid.calls.clear()
    await asyncio.sleep(0.05)
    assert grid.calls == []


@in_loop
async def test_closing_stops_what_runs_beside_the_requests_of_other_loops(grid: Spy) -> None:
    """Or another loop's sweep would open the closed grid again."""
    async with provider_on(grid, sweep_interval=0.01) as provider:
        session_id = await stored(provider, a=1)
        swept, closed, later = threading.Event(), threading.Event(), threading.Event()

        async def elsewhere() -> None:
            assert await data_of(provider, session_id) == {"a": 1}
            swept.set()
            await asyncio.to_thread(closed.wait, 10)
            await asyncio.sleep(0.05)
            later.set()

        thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
        thread.start()
        await asyncio.to_thread(swept.wait, 10)
    grid.calls.clear()
    closed.set()
    await asyncio.to_thread(later.wait, 10)
    thread.join()
    assert "sweep" not in grid.calls


# -- what is left of a request --------------------------------------------------------------------


class Held:
    """What an application keeps in the context of a request."""

    session: Session


held_in_context: ContextVar[Held] = ContextVar("held_in_context")


async def request(provider: SessionProvider, session_id: str | None) -> weakref.ref[Held]:
    held = Held()
    held_in_context.set(held)
    async with provider.open(session_id) as held.session:
        held.session["n"] = 1
        await held.session.save()  # its lock is to be renewed from now on
    return weakref.ref(held)


async def is_gone(task: asyncio.Task[weakref.ref[Held]]) -> bool:
    """Whether nothing is left of a request, at the latest when a call's time is over: asyncio
    keeps the context of a timer that was cancelled until then.
    """
    held = await task
    del task
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(2.0):
            while held() is not None:
                await asyncio.sleep(0.01)
                gc.collect()
    return held() is None


@pytest.mark.parametrize("timer", ["sweep", "renewal"])
@in_loop
async def test_no_timer_keeps_the_context_of_a_request(grid: Spy, timer: str) -> None:
    """Each of them is set for the first time by a request, and for long."""
    provider = SessionProvider(SessionSettings(sweep_interval=3600.0), grid=grid)
    if timer == "renewal":
        await provider.start()
    assert await is_gone(asyncio.create_task(request(provider, None)))
    await provider.close()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@in_loop
async def test_no_bell_keeps_the_context_of_the_request_that_waited_first(
    grid: Spy, loop: str
) -> None:
    """A grid may have to make something to be rung by, for all who wait from then on."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, n=0)
        async with provider.open(session_id):
            waiting = [asyncio.create_task(request(provider, session_id))]
            await until(lambda: "wait" in grid.calls)
        assert await is_gone(waiting.pop())
