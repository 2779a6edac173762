"""What other processes do in the tests of the embedded grid: `python -m` this, with a task."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gridsession.errors import GridFull, SessionError, SettingsError
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim
from tests.grids.embedded_words import MIB, boot, counted, inside, opened, store_of, visitor

_TASKS: dict[str, Callable[..., None]] = {}


def task(function: Callable[..., None]) -> Callable[..., None]:
    _TASKS[function.__name__] = function
    return function


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def hear() -> str:
    return sys.stdin.readline().strip()


@task
def hold_open(
    path: str, size: int | None = 4 * MIB, durable: bool = False, boot_id: int | None = None
) -> None:
    """Have the store open; go when told."""

    async def run() -> None:
        async with opened(Path(path), size=size, durable=durable) as grid:
            say(f"open {store_of(grid).state.max_size}")
            await asyncio.to_thread(hear)
        say("closed")

    try:
        if boot_id is None:
            asyncio.run(run())
        else:
            with boot(boot_id):
                asyncio.run(run())
    except (SessionError, SettingsError) as error:
        say(f"refused {type(error).__name__}: {error}")


@task
def stop_in_write(
    path: str, size: int | None = 4 * MIB, dirty: int = 0, durable: bool = False
) -> None:
    """Stop inside a write transaction, with some of it written already."""

    async def run() -> None:
        async with opened(Path(path), size=size, durable=durable) as grid:
            say("open")
            hear()
            with inside(grid) as transaction:
                for number in range(dirty):
                    transaction.put(b"r torn %d" % number, b"torn" * 500)
                os.kill(os.getpid(), signal.SIGSTOP)
                transaction.abort()
            say("out")
            hear()

    asyncio.run(run())


@task
def fork_and_stop_in_write(path: str) -> None:
    """Leave a child behind that does nothing, and stop inside a write transaction."""

    async def run() -> None:
        async with opened(Path(path)) as grid:
            say("open")
            child = os.fork()
            if child == 0:
                signal.pause()
                os._exit(0)
            say(f"forked {child}")
            with inside(grid):
                os.kill(os.getpid(), signal.SIGSTOP)

    asyncio.run(run())


@task
def wait_for_bell(path: str, number: int, uvloop: bool = False) -> None:
    """Queue for a session's lock, and say for how long the bell was waited for."""

    async def run() -> None:
        async with opened(Path(path)) as grid:
            there, claim = visitor(grid, number), a_claim()
            await there.queued(claim)
            say("queued")
            loop = asyncio.get_running_loop()
            hears = grid.wait(there.key, claim.token, 15.0)
            began = loop.time()
            await hears
            say(f"rung {0.0 if loop.time() - began < 14.0 else 15.0}")
            await there.locked(claim)

    if uvloop:
        import uvloop as another

        another.run(run())
    else:
        asyncio.run(run())


@task
def stop_in_read(path: str, size: int | None = 4 * MIB) -> None:
    """Stop inside a read transaction."""

    async def run() -> None:
        async with opened(Path(path), size=size) as grid:
            with store_of(grid).env.begin() as transaction:
                transaction.get(b"something")
                os.kill(os.getpid(), signal.SIGSTOP)
            say("out")
            hear()

    asyncio.run(run())


@task
def count(
    *,
    path: str,
    numbers: list[int],
    times: int,
    size: int | None = 4 * MIB,
    durable: bool = False,
    lease: float = 30.0,
) -> None:
    """Count up in some sessions, in turn; say each number once it is acknowledged."""

    async def run() -> None:
        async with opened(Path(path), size=size, durable=durable) as grid:
            say("open")
            for turn in range(times):
                number = numbers[turn % len(numbers)]
                say(f"{number} {await counted(visitor(grid, number), lease)}")

    asyncio.run(run())


@task
def hammer(path: str, size: int, seed: int, rounds: int) -> None:
    """Create, change and remove sessions at random; compare them with what was acknowledged."""
    chance = random.Random(seed)

    async def run() -> None:
        kept: dict[bytes, tuple[Visitor, bytes]] = {}
        refused = lost = 0
        async with opened(Path(path), size=size) as grid:
            for number in range(rounds):
                payload = b"%d " % number + b"x" * chance.choice((10, 500, 3000, 20_000))
                there = chance.choice(list(kept.values()))[0] if kept else Visitor(grid)
                try:
                    if not kept or chance.random() < 0.5:
                        there = Visitor(grid)
                        await there.create(payload)
                        kept[there.key] = (there, payload)
                    elif chance.random() < 0.5:
                        claim = a_claim()
                        await there.locked(claim)
                        try:
                            await there.commit(claim, a_change(payload))
                            kept[there.key] = (there, payload)
                        finally:
                            await there.release(claim)
                    elif chance.random() < 0.3:
                        await grid.remove(there.key)
                        del kept[there.key]
                except GridFull:
                    refused += 1
            for there, payload in kept.values():
                lost += (await there.found()).payload != payload
        say(f"done {refused} {lost}")

    asyncio.run(run())


@task
def resident(path: str, size: int) -> None:
    """How much of the data is in this process's memory: after opening, and after a scan."""

    def kib() -> int:
        blocks = Path("/proc/self/smaps").read_text().split("VmFlags")
        (mine,) = [block for block in blocks if "data.mdb" in block]
        return int(mine.partition("Rss:")[2].split()[0])

    async def run() -> None:
        async with opened(Path(path), size=size) as grid:
            before = kib()
            with store_of(grid).env.begin() as transaction, transaction.cursor() as cursor:
                assert sum(1 for _ in cursor) >= 20_000
            say(f"kib {before} {kib()}")

    asyncio.run(run())


if __name__ == "__main__":
    name, given = sys.argv[1:]
    arguments: dict[str, Any] = json.loads(given)
    _TASKS[name](**arguments)
