"""Workers that stand still: stopped with SIGSTOP, hung in a handler, stuck in a transaction."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil

from gridsession.grids.contract import HAND_OFF_SECONDS
from tests.farm.client import Pulse, Reply, new_session, post, run, stored, until
from tests.farm.peek import peek
from tests.farm.servers import Server, farm_in

LEASE = 0.5  # seconds
SLACK = 1.0  # seconds that two busy cores may cost
LONGEST_GAP = 0.5  # seconds without a heartbeat, on such cores


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


async def stop(server: Server) -> None:
    os.kill(server.pid, signal.SIGSTOP)
    await until("a stopped process", lambda: is_stopped(server.pid))


def check_told(server: Server, cookie: str, error: str) -> None:
    """The operator reads which error it was, and nothing that opens a session."""
    assert "a request's session was not stored: " in server.said
    assert error in server.said
    for part in (cookie, cookie[:16], cookie[-16:]):
        assert part not in server.said


def check_refused(reply: Reply) -> None:
    """A browser is not to repeat what a handler has done already."""
    assert (reply.status, reply.body) == (500, b"Internal Server Error\n")
    assert "retry-after" not in reply.headers


def test_promises_1_4_a_holder_stopped_past_its_lease_is_refused(tmp_path: Path) -> None:
    with farm_in(tmp_path, lock_lease=LEASE) as farm:
        stopped, other = farm.uvicorn(), farm.uvicorn()

        async def main() -> None:
            cookie = await new_session(other)
            async with Pulse(other) as pulse:
                held = asyncio.create_task(post(stopped, "/gated?name=held&n=1", cookie))
                await until("the holder", (farm.marks / "in-held").exists)
                await stop(stopped)
                began = time.monotonic()
                assert (await post(other, "/add?n=2", cookie)).status == 200
                assert time.monotonic() - began < LEASE + SLACK
                farm.mark("go-held")
                os.kill(stopped.pid, signal.SIGCONT)
                check_refused(await held)
                assert pulse.longest < LONGEST_GAP
            assert (await stored(other, cookie))["numbers"] == [0, 2]
            assert (await post(stopped, "/add?n=3", cookie)).status == 200
            assert (await stored(other, cookie))["numbers"] == [0, 2, 3]
            check_told(stopped, cookie, "gridsession.errors.SessionLockLost")

        run(main())
        assert other.trouble() == []


def test_promise_7_a_waiter_that_is_stopped_is_passed_over(tmp_path: Path) -> None:
    with farm_in(tmp_path, lock_lease=LEASE) as farm:
        stopped, other = farm.uvicorn(), farm.uvicorn()

        async def main() -> None:
            cookie = await new_session(other)
            with peek(farm.grid) as grid:
                held = asyncio.create_task(post(other, "/gated?name=held&n=1", cookie))
                await until("the holder", (farm.marks / "in-held").exists)
                late = asyncio.create_task(post(stopped, "/add?n=2", cookie))
                await until("a ticket", lambda: grid.tickets(cookie) == 1)
                prompt = [asyncio.create_task(post(other, f"/add?n={n}", cookie)) for n in (3, 4)]
                await until("three tickets", lambda: grid.tickets(cookie) == 3)
            await stop(stopped)
            async with Pulse(other) as pulse:
                farm.mark("go-held")
                assert (await held).status == 200
                released = time.monotonic()
                assert [(await x).status for x in prompt] == [200, 200]
                assert time.monotonic() - released < HAND_OFF_SECONDS + SLACK
                assert pulse.longest < LONGEST_GAP
            os.kill(stopped.pid, signal.SIGCONT)
            assert (await late).status == 200
            numbers = (await stored(other, cookie))["numbers"]
            assert sorted(numbers) == [0, 1, 2, 3, 4]
            assert [n for n in numbers if n != 2] == [0, 1, 3, 4]

        run(main())
        assert stopped.trouble() == other.trouble() == []


def test_promise_6_a_process_stuck_in_a_transaction_makes_nobody_wait_for_it(
    tmp_path: Path,
) -> None:
    timeout = 0.5
    with farm_in(tmp_path, grid_timeout=timeout, lock_lease=5) as farm:
        servers = [farm.uvicorn("--loop", "asyncio"), farm.uvicorn("--loop", "uvloop")]

        async def main() -> None:
            cookie = await new_session(servers[0])
            other = await new_session(servers[0])
            held = asyncio.create_task(post(servers[1], "/gated?name=held&n=1", other))
            await until("the holder", (farm.marks / "in-held").exists)
            stuck = farm.run_helper("tests.farm.stuck", str(farm.grid))
            await until("a process in the gate", lambda: is_stopped(stuck.pid))
            async with Pulse(servers[0]) as first, Pulse(servers[1]) as second:
                replies = await asyncio.gather(
                    *(post(server, "/add?n=9", cookie) for server in servers * 3)
                )
                for reply in replies:
                    assert (reply.status, reply.headers.get("retry-after")) == (503, "1")
                    assert timeout * 0.9 < reply.took < timeout + SLACK
                    assert "set-cookie" not in reply.headers
                farm.mark("go-held")
                check_refused(await held)
                assert max(first.longest, second.longest) < LONGEST_GAP
            os.kill(stuck.pid, signal.SIGCONT)
            assert await asyncio.to_thread(stuck.wait, 10) == 0
            began = time.monotonic()
            for n, server in enumerate(servers, 1):
                assert (await post(server, f"/add?n={n}", cookie)).status == 200
                # The commit that failed was withdrawn meanwhile, lock and all.
                assert (await post(server, f"/add?n={n + 10}", other)).status == 200
            assert time.monotonic() - began < SLACK
            assert (await stored(servers[0], cookie))["numbers"] == [0, 1, 2]
            assert (await stored(servers[0], other))["numbers"] == [0, 11, 12]
            for server in servers:
                assert f"process {stuck.pid} is inside a transaction" in server.said
            check_told(servers[1], other, "was busy for 0.5 s")

        run(main())


def test_promise_4_a_handler_past_its_execution_timeout_loses_the_lock(tmp_path: Path) -> None:
    execution, lease = 0.6, 0.4
    with farm_in(tmp_path, lock_lease=lease, execution_timeout=execution) as farm:
        server = farm.uvicorn()

        async def main() -> None:
            cookie = await new_session(server)
            held = asyncio.create_task(post(server, "/gated?name=hung&n=1", cookie))
            await until("the holder", (farm.marks / "in-hung").exists)
            began = time.monotonic()
            waited = await post(server, "/add?n=2", cookie)
            assert waited.status == 200
            assert execution * 0.9 < time.monotonic() - began < execution + 2 * lease + SLACK
            farm.mark("go-hung")
            check_refused(await held)
            assert (await stored(server, cookie))["numbers"] == [0, 2]
            check_told(server, cookie, "gridsession.errors.SessionLockLost")
            assert "has held its lock for the execution_timeout" in server.said

        run(main())


def test_a_lock_is_renewed_for_as_long_as_its_handler_works(tmp_path: Path) -> None:
    lease = 0.4
    with farm_in(tmp_path, lock_lease=lease, execution_timeout=20) as farm:
        holder, other = farm.uvicorn(), farm.uvicorn()

        async def main() -> None:
            cookie = await new_session(other)
            held = asyncio.create_task(post(holder, "/gated?name=held&n=1", cookie))
            await until("the holder", (farm.marks / "in-held").exists)
            waiting = asyncio.create_task(post(other, "/add?n=2", cookie))
            await asyncio.wait([waiting], timeout=3 * lease)
            assert not waiting.done()
            farm.mark("go-held")
            assert (await held).status == (await waiting).status == 200
            assert (await stored(other, cookie))["numbers"] == [0, 1, 2]

        run(main())
