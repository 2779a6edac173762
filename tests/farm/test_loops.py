"""Event loops: one for each request, two in two threads, and a request cancelled at any step."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import warnings
from collections.abc import MutableMapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from gridsession import SessionProvider, SessionSettings
from gridsession.grids.embedded.mailbox import SocketBells
from gridsession.grids.embedded.place import Place
from gridsession.grids.embedded.store import close_store, open_store
from gridsession.web.asgi import SessionMiddleware
from gridsession.web.starlette import CurrentSession
from gridsession.web.starlette import SessionMiddleware as StarletteMiddleware
from tests.farm.client import run

HAND_OFFS = 20  # between two event loops
HAND_OFFS_SECONDS = 3.0  # each by the safety poll would make it twenty


def settings(folder: Path, **options: Any) -> SessionSettings:
    place = f"embedded://{folder / 'grid'}?max_size=4MiB"
    return SessionSettings(connection_string=place, **options)


def counting_app(provider: SessionProvider) -> FastAPI:
    app = FastAPI()

    @app.post("/add")
    async def add(session: CurrentSession) -> int:
        count = int(session.get("count", 0))
        await asyncio.sleep(0)
        session["count"] = count + 1
        return count + 1

    app.add_middleware(StarletteMiddleware, provider=provider)
    return app


def test_a_loop_for_each_request_leaves_nothing_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    provider = SessionProvider(settings(tmp_path))
    client = TestClient(counting_app(provider))
    process = psutil.Process()
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        assert client.post("/add").json() == 1
        gc.collect()
        files = process.num_fds()
        for n in range(2, 202):
            assert client.post("/add").json() == n
        gc.collect()
        assert process.num_fds() <= files
    assert caplog.records == []
    run(provider.close())
    assert list((tmp_path / "grid" / "bells").iterdir()) == []


def test_promise_5_a_loop_for_each_request_in_several_threads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    each = 25
    provider = SessionProvider(settings(tmp_path))
    app = counting_app(provider)
    first = TestClient(app)
    assert first.post("/add").json() == 1
    answers: list[int] = []
    gc.collect()
    files = psutil.Process().num_fds()

    def work() -> None:
        client = TestClient(app, cookies=dict(first.cookies))
        answers.extend(client.post("/add").json() for _ in range(each))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(answers) == list(range(2, 2 + 4 * each))
    gc.collect()
    # Each loop that had to wait made a bell. The next to make one puts those of the dead away.
    assert psutil.Process().num_fds() <= files + len(threads)
    assert caplog.records == []
    run(provider.close())
    assert list((tmp_path / "grid" / "bells").iterdir()) == []


def test_promise_5_two_loops_hand_one_session_to_each_other(tmp_path: Path) -> None:
    provider = SessionProvider(settings(tmp_path))

    async def make() -> str:
        async with provider.open(None) as session:
            session["turns"] = []
        return session.id

    session_id = run(make())
    began = threading.Barrier(2)
    took: list[float] = []

    async def take_turns(me: int) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(began.wait, 10)
        start = loop.time()
        for _ in range(HAND_OFFS):
            async with provider.open(session_id) as session:
                turns = session["turns"]
                # Until the other one waits, so that each turn is a hand-off between the loops.
                await asyncio.sleep(0.002)
                session["turns"] = [*turns, me]
        took.append(loop.time() - start)

    threads = [threading.Thread(target=run, args=(take_turns(me),)) for me in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    async def read() -> list[int]:
        async with provider.open(session_id, access="read_only") as session:
            return list(session["turns"])

    turns = run(read())
    run(provider.close())
    assert sorted(turns) == [1] * HAND_OFFS + [2] * HAND_OFFS
    assert sum(a != b for a, b in pairwise(turns)) > HAND_OFFS
    assert max(took) < HAND_OFFS_SECONDS


def test_loops_of_several_threads_make_and_lose_their_bells_at_once(tmp_path: Path) -> None:
    bells = SocketBells(tmp_path)
    failures: list[Exception] = []

    async def have_one() -> None:
        bells.address()

    def work() -> None:
        try:
            for _ in range(100):
                run(have_one())
        except Exception as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds; threads take turns at nearly every step
    try:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    bells.close()
    assert failures == []
    assert list(tmp_path.iterdir()) == []


class Steps:
    """A request for a session that is held; cancelled after some turns of the event loop."""

    def __init__(self, provider: SessionProvider, session_id: str) -> None:
        self._provider = provider
        self._id = session_id
        self.ran = False
        self._middleware = SessionMiddleware(self._app, provider=provider)

    async def _app(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        self.ran = True
        scope["session"]["touched"] = True
        await asyncio.sleep(0)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def _request(self) -> None:
        async def receive() -> MutableMapping[str, Any]:
            await asyncio.get_running_loop().create_future()
            raise AssertionError

        async def send(message: MutableMapping[str, Any]) -> None:
            pass

        await self._middleware(
            {
                "type": "http",
                "method": "POST",
                "path": "/",
                "headers": [(b"cookie", b"session=" + self._id.encode())],
            },
            receive,
            send,
        )

    async def cancel_after(self, turns: int) -> bool:
        """Whether the request was cancelled before it was done."""
        async with self._provider.open(self._id):
            request = asyncio.create_task(self._request())
            for _ in range(5):
                await asyncio.sleep(0)
            assert not request.done()
        for _ in range(turns):
            await asyncio.sleep(0)
        request.cancel()
        await asyncio.wait([request])
        return request.cancelled()


@pytest.mark.parametrize("grid", ["memory", "embedded"])
def test_promise_7_a_request_cancelled_at_any_step_leaves_no_lock(
    tmp_path: Path, grid: str
) -> None:
    options = settings(tmp_path, lock_wait_timeout=1)
    if grid == "memory":
        options = SessionSettings(connection_string="memory://", lock_wait_timeout=1)

    async def main() -> None:
        async with SessionProvider(options) as provider:
            async with provider.open(None) as session:
                session["made"] = True
            for turns in range(60):
                steps = Steps(provider, session.id)
                was_cancelled = await steps.cancel_after(turns)
                # Had the lock been left behind, this would not get it: it is renewed for ever.
                async with provider.open(session.id):
                    pass
                if not was_cancelled:
                    assert steps.ran
                    return
            raise AssertionError("the request never ended")

    run(main())


def test_promise_7_a_call_cancelled_on_its_way_to_the_disk_leaves_no_lock(tmp_path: Path) -> None:
    place = Place(tmp_path / "grid", 4 << 20, durable=True)
    options = SessionSettings(
        connection_string=f"embedded://{place.path}?max_size=4MiB&durable=true",
        lock_wait_timeout=1,
    )

    async def main() -> None:
        async with SessionProvider(options) as provider:
            async with provider.open(None) as session:
                session["made"] = True

            async def request() -> None:
                async with provider.open(session.id):
                    raise AssertionError("it was cancelled before")

            store = open_store(place, 1.0)
            assert store.gate.try_enter()  # as a neighbour that waits for the disk
            task = asyncio.create_task(request())
            await asyncio.sleep(0.05)  # it is on the writer's thread, which nothing tells
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            store.gate.leave()
            close_store(store)
            async with provider.open(session.id):
                pass

    run(main())
