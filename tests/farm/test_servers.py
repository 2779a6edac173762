"""The servers that people use, as they start, serve, recycle, reload and stop."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from gridsession.grids import open_grid
from tests.farm.client import ask, new_session, post, run, stored, until
from tests.farm.peek import peek
from tests.farm.servers import Farm, Server, farm_in, wait_for

BURST = 40  # increments at once
LINE = 12  # increments that arrive one after the other
APP = "tests.farm.app:app"
GUNICORN = (
    "gunicorn",
    "--no-control-socket",
    "-k",
    "uvicorn_worker.UvicornWorker",
    "-b",
    "127.0.0.1:PORT",
)


async def burst(server: Server, cookie: str, numbers: range) -> set[int]:
    """Increments at once; answers the pids that served them."""
    replies = await asyncio.gather(*(post(server, f"/add?n={n}", cookie) for n in numbers))
    assert [reply.status for reply in replies] == [200] * len(numbers)
    return {reply.json["pid"] for reply in replies}


async def line(farm: Farm, server: Server, cookie: str, numbers: range) -> set[int]:
    """Increments that come while the lock is held, each after the one before it has its ticket."""
    with peek(farm.grid) as grid:
        first = asyncio.create_task(post(server, f"/gated?name=line&n={numbers[0]}", cookie))
        await until("the holder", (farm.marks / "in-line").exists)
        waiting = []
        for n in numbers[1:]:
            waiting.append(asyncio.create_task(post(server, f"/add?n={n}", cookie)))
            await until("a ticket", lambda: grid.tickets(cookie) == len(waiting))
        farm.mark("go-line")
        replies = await asyncio.gather(first, *waiting)
    assert [reply.status for reply in replies] == [200] * len(numbers)
    return {reply.json["pid"] for reply in replies}


async def serve_all(farm: Farm, server: Server, workers: int) -> None:
    """None of 53 increments is lost, the queue is FIFO over all workers, and each worker works."""
    await all_answer(server, workers)
    cookie = await new_session(server)
    pids = await burst(server, cookie, range(1, BURST + 1))
    pids |= await line(farm, server, cookie, range(BURST + 1, BURST + 1 + LINE))
    session = await stored(server, cookie)
    total = 1 + BURST + LINE
    assert sorted(session["numbers"]) == list(range(total))
    assert session["numbers"][1 + BURST :] == list(range(BURST + 1, total))
    assert session["count"] == total
    assert len(pids) <= workers


async def all_answer(server: Server, workers: int) -> None:
    """Wait until each worker has answered: they do not come up all at once."""
    pids: set[int] = set()
    async with asyncio.timeout(30):
        while len(pids) < workers:
            beats = await asyncio.gather(*(ask(server, "GET", "/heartbeat") for _ in range(10)))
            pids |= {int(beat.body) for beat in beats}


def check_clean(farm: Farm, server: Server, code: int = 0) -> None:
    """It ends with the code that is expected, with nothing left open and nothing to complain of."""
    assert server.stop() == code, server.said
    assert server.trouble() == []
    assert farm.bells() == []
    assert farm.state()["clean"] is True


@pytest.mark.parametrize(
    ("app", "workers", "arguments"),
    [
        ("starlette", 1, ("--loop", "asyncio", "--http", "h11")),
        ("fastapi", 1, ("--loop", "uvloop", "--http", "httptools")),
        ("starlette", 4, ("--loop", "uvloop", "--http", "httptools")),
        ("fastapi", 4, ("--loop", "asyncio", "--http", "h11")),
    ],
)
def test_promise_5_no_update_is_lost_under_uvicorn(
    tmp_path: Path, app: str, workers: int, arguments: tuple[str, ...]
) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.uvicorn("--workers", str(workers), *arguments, app=app)
        run(serve_all(farm, server, workers))
        check_clean(farm, server, 0 if workers > 1 else -signal.SIGTERM)


def test_promise_5_no_update_is_lost_without_lifespan(tmp_path: Path) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.uvicorn("--workers", "2", "--lifespan", "off")
        run(serve_all(farm, server, 2))
        cookie = run(new_session(server))
        assert server.stop() == 0
        assert server.trouble() == []
        # uvicorn's workers end by their signal: nobody is told, so the grid is not marked clean,
        # and what a worker left lying is cleared away by the next one.
        again = farm.uvicorn("--lifespan", "off")
        assert run(stored(again, cookie))["numbers"] == [0]
        assert farm.bells() == []


def test_promise_5_no_update_is_lost_under_gunicorn(tmp_path: Path) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.start(*GUNICORN, "-w", "2", APP)
        run(serve_all(farm, server, 2))
        check_clean(farm, server)


def test_promise_5_no_update_is_lost_under_gunicorns_own_asgi_workers(tmp_path: Path) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.start(
            *("gunicorn", "--no-control-socket", "-k", "asgi", "-b", "127.0.0.1:PORT"),
            *("-w", "2", APP),
        )
        run(serve_all(farm, server, 2))
        check_clean(farm, server)


def test_promise_5_no_update_is_lost_by_workers_forked_from_an_open_grid(tmp_path: Path) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.start(*GUNICORN, "-w", "2", "--preload", "tests.farm.preloaded:app")
        run(serve_all(farm, server, 2))
        check_clean(farm, server)


def test_promise_5_no_update_is_lost_under_hypercorn(tmp_path: Path) -> None:
    with farm_in(tmp_path) as farm:
        server = farm.start("hypercorn", "-b", "127.0.0.1:PORT", "-w", "2", APP)
        run(serve_all(farm, server, 2))
        # As soon as one of its workers is out, hypercorn ends the others with SIGTERM, in the midst
        # of their lifespan's shutdown. What such a worker leaves is cleared at the next opening.
        assert server.stop() == 0, server.said
        assert server.trouble() == []

        async def open_again() -> None:
            async with open_grid(f"embedded://{farm.grid}?max_size=16MiB"):
                assert farm.bells() == []

        asyncio.run(open_again())
        assert farm.state()["clean"] is True


async def add_through_recycling(server: Server, cookie: str) -> set[int]:
    """Increments from a few clients until four workers have answered; answers their pids."""
    pids: set[int] = set()
    numbers = iter(range(1, 5000))
    acknowledged: set[int] = {0}

    async def client() -> None:
        for n in numbers:
            try:
                reply = await post(server, f"/add?n={n}", cookie)
            except OSError:
                continue  # the server closed a connection that it had not read from
            assert reply.status == 200, reply
            acknowledged.add(n)
            pids.add(reply.json["pid"])
            if len(pids) >= 4:
                return

    await asyncio.gather(*(client() for _ in range(4)))
    kept = (await stored(server, cookie))["numbers"]
    assert len(kept) == len(set(kept))
    assert acknowledged <= set(kept)
    return pids


@pytest.mark.parametrize("server_name", ["uvicorn", "gunicorn"])
def test_promise_5_recycled_workers_lose_nothing(tmp_path: Path, server_name: str) -> None:
    with farm_in(tmp_path) as farm:
        if server_name == "uvicorn":
            server = farm.uvicorn("--workers", "2", "--limit-max-requests", "25")
        else:
            server = farm.start(*GUNICORN, "-w", "2", "--max-requests", "25", APP)

        async def main() -> None:
            cookie = await new_session(server)
            assert len(await add_through_recycling(server, cookie)) >= 4

        run(main())
        wait_for("an answer", server.answers, 20)
        check_clean(farm, server)


def test_sessions_survive_a_reload(tmp_path: Path) -> None:
    package = tmp_path / "code"
    package.mkdir()
    module = package / "reloaded.py"
    module.write_text("from tests.farm.app import app\n", encoding="utf-8")
    with farm_in(tmp_path) as farm:
        server = farm.start(
            *("uvicorn", "reloaded:app", "--port", "PORT", "--app-dir", str(package)),
            *("--reload", "--reload-dir", str(package), "--reload-delay", "0.1"),
        )

        async def add(cookie: str, n: int) -> int:
            pid: int = (await post(server, f"/add?n={n}", cookie)).json["pid"]
            return pid

        cookie = run(new_session(server))
        before = run(add(cookie, 1))
        os.utime(module, (2_000_000_000, 2_000_000_000))

        def is_new() -> bool:
            try:
                return run(add(cookie, 2)) != before
            except OSError:
                return False

        wait_for("a new process", is_new, 20)
        kept = run(stored(server, cookie))["numbers"]
        assert kept[:2] == [0, 1]
        assert set(kept) == {0, 1, 2}
        code = server.stop()
        assert code in (0, -signal.SIGTERM)
        assert server.trouble() == []
        assert farm.bells() == []
        assert farm.state()["clean"] is True


@pytest.mark.parametrize("workers", [2, 4])
def test_promise_5_two_hundred_increments_at_once_survive(tmp_path: Path, workers: int) -> None:
    limits = {"request_queue_limit_per_session": 300, "lock_wait_timeout": 60}
    with farm_in(tmp_path, **limits) as farm:
        server = farm.uvicorn("--workers", str(workers), "--backlog", "512")

        async def main() -> None:
            cookie = await new_session(server)
            replies = await asyncio.gather(
                *(post(server, f"/add?hold=0.005&n={n}", cookie) for n in range(1, 201))
            )
            assert {reply.status for reply in replies} == {200}
            session = await stored(server, cookie)
            assert sorted(session["numbers"]) == list(range(201))
            assert session["count"] == 201

        run(main())
        assert server.trouble() == []
