"""What runs beside the requests: touching and sweeping."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest

from gridsession import GridUnavailable
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
        await steps(3)
        assert "touch" not in grid.calls  # written a moment ago
        for _ in range(30):
            clock.advance(9)
            await data_of(provider, session_id)
            await steps(3)
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
