"""Workers that increment sessions on a Redis through whatever is between, and what must come of it.

As a module it is one worker process: it reads what to do as JSON from its command line, and prints
what was acknowledged, refused and left open as JSON at its end.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gridsession import (
    GridUnavailable,
    SessionGone,
    SessionLockLost,
    SessionLockTimeout,
    SessionProvider,
    SessionSettings,
)
from gridsession.grids.contract import HAND_OFF_SECONDS, Claim, Found, Granted
from gridsession.grids.redis import RedisGrid
from gridsession.testing import FaultProxy, random_faults
from tests.provider.harness import NO_SWEEP, identity_of
from tests.redis_server import RedisServer

ROOT = Path(__file__).parents[2]
TROUBLE = re.compile(r"Traceback|never retrieved|never awaited|was destroyed")
LEASE = 1.0  # seconds
SLACK = 1.0  # seconds that a lock may be late to become free
# A dead worker's lock ends with its lease. Where dead ones wait for it as well, they may be handed
# it twice before their tickets, heard of for the last time 3 s ago, are dropped.
DEAD_IN_LINE = LEASE + 2 * HAND_OFF_SECONDS
GRID_TIMEOUT = 0.4  # seconds
CANCELLED = 0.03  # share of the increments that are given up at some moment
SLOW = 0.01  # share of them that take up to two leases, in which their lock has to be renewed
OPTIONS = {
    **NO_SWEEP,
    "lock_lease": LEASE,
    "grid_timeout": GRID_TIMEOUT,
    "lock_wait_timeout": 20.0,
    "request_queue_limit_per_session": 500,
}


def settings(url: str, namespace: str, **options: Any) -> SessionSettings:
    return SessionSettings(connection_string=url, namespace=namespace, **OPTIONS | options)


@asynccontextmanager
async def a_provider(url: str, namespace: str, **options: Any) -> AsyncIterator[SessionProvider]:
    async with SessionProvider(settings(url, namespace, **options)) as provider:
        yield provider


async def make_sessions(provider: SessionProvider, number: int) -> list[str]:
    """Sessions that carry their own name and the increments they were given."""

    async def make(name: int) -> str:
        async with provider.open(None) as session:
            session["name"] = name
            session["done"] = []
        return session.id

    return await asyncio.gather(*(make(name) for name in range(number)))


@dataclass
class Told:
    """What the callers of one worker were told.

    Attributes:
        acknowledged: session, increment, how many there were then.
        unknown: session and increment of those whose end nobody knows.
        refused: of those that were told that nothing was stored.
        before: how many were turned away before they did anything, by error.
        wrong: replies that belonged to another, in words.
    """

    acknowledged: list[tuple[int, str, int]] = field(default_factory=list)
    unknown: list[tuple[int, str]] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    before: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Told) -> None:
        for name, value in vars(other).items():
            if name == "before":
                self.before.update(value)
            else:
                getattr(self, name).extend(value)


class Worker:
    """Increments sessions until so many were acknowledged.

    Args:
        name: which of all workers.
        ids: of the sessions, by their names.
    """

    def __init__(self, name: str, ids: list[str], provider: SessionProvider) -> None:
        self._name = name
        self._ids = ids
        self._provider = provider
        self._numbers = iter(range(1_000_000))
        self._chance = random.Random(name)
        self.told = Told()
        self.is_stopped = False  # set it to stop before that

    async def run(self, number: int, callers: int) -> None:
        """Args: how many are to be acknowledged; how many callers at once."""
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(self._caller(number))

    async def _caller(self, number: int) -> None:
        while len(self.told.acknowledged) < number and not self.is_stopped:
            session = self._chance.randrange(len(self._ids))
            if self._chance.random() < CANCELLED:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._chance.uniform(0, 0.02)):
                        await self._increment(session)
            else:
                await self._increment(session)

    async def _increment(self, which: int) -> None:
        increment = f"{self._name}-{next(self._numbers)}"
        ran, count = False, 0
        try:
            async with self._provider.open(self._ids[which], holder=self._name) as session:
                if session.get("name") != which:
                    self.told.wrong.append(f"{which} got {session.get('name')}")
                    return
                done = session["done"]
                slow = self._chance.random() < SLOW
                await asyncio.sleep(self._chance.uniform(0, 2 * LEASE) if slow else 0)
                session["done"] = [*done, increment]
                ran, count = True, len(done) + 1
        except (SessionLockLost, SessionGone):
            self.told.refused.append((which, increment))
        except (GridUnavailable, SessionLockTimeout) as error:
            if ran:
                self.told.unknown.append((which, increment))
            else:
                self.told.before[type(error).__name__] += 1
                await asyncio.sleep(self._chance.uniform(0, 0.05))
        except asyncio.CancelledError:
            if ran:
                self.told.unknown.append((which, increment))
            raise
        else:
            self.told.acknowledged.append((which, increment, count))


def hold(url: str, namespace: str, ids: list[str]) -> None:
    """Hold the locks of all sessions, until killed."""

    async def one(provider: SessionProvider, session_id: str) -> None:
        async with provider.open(session_id, holder="killed"):
            await asyncio.sleep(3600)

    async def main() -> None:
        async with SessionProvider(settings(url, namespace)) as provider:
            await asyncio.gather(*(one(provider, x) for x in ids))

    asyncio.run(main())


def work(
    *, url: str, namespace: str, name: str, ids: list[str], number: int, callers: int, loops: int
) -> Told:
    """Several event loops in one process, each with its own connections.

    Args:
        name: of the process.
        ids: of the sessions.
        number: how many increments are to be acknowledged.
        callers: at once, in each loop.
    """
    provider = SessionProvider(settings(url, namespace))
    workers = [Worker(f"{name}.{loop}", ids, provider) for loop in range(loops)]
    failures: list[BaseException] = []

    async def run_one(worker: Worker) -> None:
        while True:
            with suppress(GridUnavailable):
                await provider.start()
                break
            await asyncio.sleep(0.05)
        await worker.run(number // loops, callers)
        await asyncio.sleep(0.1)  # what was withdrawn or is finished off the path
        await provider.work().close()
        await provider.grid.close()

    def run_in_thread(worker: Worker) -> None:
        try:
            asyncio.run(run_one(worker))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run_in_thread, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    told = Told()
    for worker in workers:
        told.add(worker.told)
    return told


class Process:
    """A worker process."""

    def __init__(self, folder: Path, name: str, **what: Any) -> None:
        self._output = folder / f"{name}.json"
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        with open(folder / f"{name}.in", "w", encoding="utf-8") as file:
            json.dump({"name": name, **what}, file)
        with open(self._output, "wb") as output, open(folder / f"{name}.log", "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.grids.redis_attack", file.name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=log,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": path},
            )
        self._log = Path(log.name)

    async def ends(self) -> Told:
        """What it was told."""
        code = await asyncio.to_thread(self.process.wait)
        log = self._log.read_text(encoding="utf-8", errors="replace")
        assert code == 0, log[-3000:]
        assert [line for line in log.splitlines() if TROUBLE.search(line)] == []
        raw: Mapping[str, Any] = json.loads(self._output.read_bytes())
        return Told(
            [(a, b, c) for a, b, c in raw["acknowledged"]],
            [(a, b) for a, b in raw["unknown"]],
            [(a, b) for a, b in raw["refused"]],
            Counter(raw["before"]),
            raw["wrong"],
        )

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """It stands still in the block, as a process on a machine that swaps does."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10.0)


# -- what must hold -----------------------------------------------------------------------------


async def check_sessions(url: str, namespace: str, ids: list[str], told: Told) -> int:
    """Nothing acknowledged is lost, nothing is there twice, in the order that was told.

    Answers how many of those are kept whose end nobody had been told.
    """
    assert told.wrong == []
    by_place: dict[int, dict[int, str]] = {}
    for which, increment, count in told.acknowledged:
        at = by_place.setdefault(which, {})
        assert count not in at, f"session {which}: two were told to be number {count}"
        at[count] = increment
    unknown, refused = set(told.unknown), set(told.refused)
    known = {(which, increment) for which, increment, _ in told.acknowledged}
    found_out = 0
    async with a_grid(url, namespace) as grid:
        provider = SessionProvider(settings(url, namespace), grid=grid)
        for which, session_id in enumerate(ids):
            async with provider.open(session_id, access="read_only") as session:
                assert session["name"] == which
                done: list[str] = session["done"]
            assert len(set(done)) == len(done), f"session {which}: twice"
            for count, increment in by_place.get(which, {}).items():
                assert count <= len(done)
                assert done[count - 1] == increment, f"session {which}: lost, or out of order"
            there = {(which, increment) for increment in done}
            assert not there & refused, f"session {which}: refused, and yet stored"
            assert there - known <= unknown, f"session {which}: told of nobody"
            found_out += len(there - known)
            _, key, secret = identity_of(session_id)
            found = await grid.read(key, secret)
            assert isinstance(found, Found)
            # Its making is one commit; each increment is one, and there is no other.
            assert found.snapshot.version.counter == 1 + len(done)
        await provider.close()
    return found_out


async def longest_lock(url: str, namespace: str, ids: list[str], since: float) -> float:
    """Seconds from a moment, in `time.monotonic`, until the last of the sessions could be locked.

    Each is asked for every few milliseconds, without a place in line.
    """
    longest = 0.0
    async with a_grid(url, namespace) as grid:

        async def free(session_id: str) -> float:
            _, key, secret = identity_of(session_id)
            while True:
                claim = Claim(os.urandom(16), "a look", 30.0, 0)  # 0: it enters no ticket
                outcome = await grid.acquire(key, secret, claim)
                if isinstance(outcome, Granted):
                    await grid.release(key, claim.token)
                    return time.monotonic() - since
                await asyncio.sleep(0.02)

        for some in range(0, len(ids), 100):
            took = await asyncio.gather(*(free(x) for x in ids[some : some + 100]))
            longest = max(longest, *took)
    return longest


@asynccontextmanager
async def a_grid(url: str, namespace: str) -> AsyncIterator[RedisGrid]:
    """An open one, which is patient."""
    grid = RedisGrid.from_connection_string(url, namespace=namespace, timeout=5.0)
    await grid.open()
    try:
        yield grid
    finally:
        await grid.close()


# -- attacks ------------------------------------------------------------------------------------


async def attack(
    server: RedisServer,
    folder: Path,
    *,
    sessions: int,
    increments: int,
    processes: int,
    seed: int,
    pause: float = 0.1,
    longest: float = 0.4,
    progress: float = 0.0,
) -> str:
    """Increments from several processes of two loops each, through a proxy that fails at random.

    Processes stop for a while, and scripts are flushed, too.

    Args:
        seed: of the faults.
        pause, longest: as `random_faults`.
        progress: seconds between two lines that say how far it is; 0: none.

    Answers what happened, in words. What is left is checked.
    """
    namespace = f"attack{seed}"
    async with AsyncExitStack() as stack:
        provider = SessionProvider(settings(server.url, namespace))
        async with provider:
            ids = await make_sessions(provider, sessions)
        proxy = await stack.enter_async_context(FaultProxy("127.0.0.1", server.port))
        faults = random_faults(seed, pause=pause, longest=longest)
        begun = await stack.enter_async_context(proxy.attacked(faults))
        began = time.monotonic()
        workers = [
            Process(
                folder,
                f"w{number}",
                url=f"redis://127.0.0.1:{proxy.port}/0",
                namespace=namespace,
                ids=ids,
                number=increments // processes,
                callers=max(8, sessions // 20),
                loops=2,
            )
            for number in range(processes)
        ]
        for worker in workers:
            stack.callback(worker.kill)
        disturbing = asyncio.create_task(_disturb(server, workers, seed))
        stack.callback(disturbing.cancel)
        ends = asyncio.gather(*(worker.ends() for worker in workers))
        while progress and not ends.done():
            await asyncio.wait([ends], timeout=progress)
            stored = server.admin.info("stats")["total_commands_processed"]
            print(
                f"{time.monotonic() - began:5.0f} s: {len(begun)} faults, "
                f"{proxy.accepted} connections, {stored} commands at the server",
                flush=True,
            )
        told = Told()
        for one in await ends:
            told.add(one)
        ended = time.monotonic()
        assert not disturbing.done()
    free_after = await longest_lock(server.url, namespace, ids, ended)
    assert free_after <= DEAD_IN_LINE + SLACK
    found_out = await check_sessions(server.url, namespace, ids, told)
    kinds = Counter(fault.kind for fault in begun)
    assert len(told.acknowledged) >= increments - 2 * processes
    # Those whose worker stood still past its lease; a lock that lives is taken from nobody.
    assert len(told.refused) < len(told.acknowledged) / 50
    return (
        f"{sessions} sessions, {len(told.acknowledged)} acknowledged in {ended - began:.1f} s, 0 "
        f"lost, 0 twice; {len(told.unknown)} without an answer ({found_out} of them stored), "
        f"{len(told.refused)} refused, before: {dict(told.before)}; {len(begun)} faults "
        f"{dict(kinds)}, {proxy.accepted} connections; all free {free_after:.2f} s after"
    )


async def _disturb(server: RedisServer, workers: list[Process], seed: int) -> None:
    """Beside a network that fails: workers stop past their lease, and scripts are forgotten."""
    chance = random.Random(seed)
    while True:
        await asyncio.sleep(chance.uniform(0.5, 3.0))
        with chance.choice(workers).stopped():
            await asyncio.sleep(chance.uniform(LEASE / 2, 2 * LEASE))
        server.admin.script_flush()


def main() -> None:
    what = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "number" in what:
        json.dump(vars(work(**what)), sys.stdout)
    else:
        hold(what["url"], what["namespace"], what["ids"])


if __name__ == "__main__":
    main()
