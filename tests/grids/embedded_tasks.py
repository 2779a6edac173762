"""What other processes do in the tests of the embedded grid: `python -m` this, with a task."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gridsession.errors import GridFull, SessionError, SettingsError
from gridsession.grids.embedded import EmbeddedGrid
from gridsession.grids.embedded.place import Place
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim
from tests.grids.embedded_process import memory_folder
from tests.grids.embedded_words import (
    MIB,
    PAGE,
    boot,
    counted,
    fill,
    inside,
    opened,
    store_of,
    visitor,
)

_TASKS: dict[str, Callable[..., None]] = {}


def task(function: Callable[..., None]) -> Callable[..., None]:
    _TASKS[function.__name__] = function
    return function


def say(word: str) -> None:
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


def hear() -> str:
    return sys.stdin.readline().strip()


async def open_once(path: Path) -> None:
    async with opened(path):
        pass


@task
def hold_open(
    path: str,
    size: int | None = 4 * MIB,
    durable: bool = False,
    boot_id: int | None = None,
    user: int | None = None,
) -> None:
    """Have the store open; go when told."""
    if user is not None:
        with memory_folder() as other:  # that user may not be able to read modules
            asyncio.run(open_once(other))
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)

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
def end_beside_a_thread(path: str, inside_for: float | None = None, durable: bool = False) -> None:
    """End in order, while an event loop on another thread goes on: as sync frameworks are served.

    Args:
        inside_for: seconds that the thread stays in one transaction; if None, it makes one after
            the other.
    """
    busy = threading.Event()

    async def run() -> None:
        grid = EmbeddedGrid(Place(Path(path), 4 * MIB, durable), timeout=5.0)
        await grid.open()  # and close it never
        await visitor(grid, 1).create(b"kept")
        if inside_for is not None:
            with inside(grid):
                busy.set()
                threading.Event().wait(inside_for)
        there = visitor(grid, 2)
        await there.create()
        busy.set()
        for number in itertools.count():
            claim = a_claim()
            await grid.acquire(there.key, there.secret, claim)
            change = a_change(b"%d" % number * 30_000)
            await grid.commit(there.key, claim.token, change, release=True)

    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    busy.wait()
    threading.Event().wait(random.uniform(0.02, 0.1))
    say("ending")


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
def wait_for_bell(path: str, number: int, uvloop: bool = False, durable: bool = False) -> None:
    """Queue for a session's lock, and say for how long the bell was waited for."""

    async def run() -> None:
        async with opened(Path(path), durable=durable) as grid:
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
        starved: list[str] = []
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
                            try:
                                await there.release(claim)
                            except GridFull as error:
                                starved.append(str(error))
                    elif chance.random() < 0.3:
                        await grid.remove(there.key)
                        del kept[there.key]
                except GridFull:
                    refused += 1
            for there, payload in kept.values():
                lost += (await there.found()).payload != payload
        say(f"done {refused} {lost} {starved}")

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


def mount_memory(path: str, size: int) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)


def free(path: str) -> int:
    there = os.statvfs(path)
    return there.f_bavail * there.f_frsize


def fill_up(path: Path, leaving: int = 0) -> Path:
    """A file that takes all room but `leaving`."""
    stuffing = path / "stuffing"
    with open(stuffing, "wb") as file:
        for piece in (1 << 16, PAGE):
            with contextlib.suppress(OSError):
                while free(str(path)) > leaving:
                    file.write(b"x" * piece)
                    file.flush()
        file.truncate(max(file.tell() // PAGE * PAGE - max(leaving - free(str(path)), 0), 0))
    return stuffing


@task
def on_small_disk(mount: str, mib: int, size: int) -> None:
    """Open what does not fit, then what does; where this process alone sees the disk."""
    mount_memory(mount, mib * MIB)
    folder = Path(mount, "store")

    async def run() -> None:
        try:
            async with opened(folder, size=size):
                say("opened")
        except SettingsError as error:
            say(f"refused {error}")
        say(f"left {' '.join(os.listdir(folder))}")
        async with opened(folder, size=mib * MIB // 2) as grid:
            await Visitor(grid).create(b"x")
        say("smaller works")

    asyncio.run(run())


@task
def on_tight_disk(mount: str, spare: int) -> None:
    """Open a store of 1 MiB with some KiB to spare; then again with room."""
    mount_memory(mount, 8 * MIB)
    folder = Path(mount, "store")
    stuffing = fill_up(Path(mount), leaving=MIB + spare * 1024)

    async def run() -> None:
        outcome = "opened"
        try:
            async with opened(folder, size=MIB):
                pass
        except SettingsError:
            outcome = "SettingsError"
        say(f"outcome {outcome} {' '.join(os.listdir(folder))}")
        stuffing.unlink()
        async with opened(folder, size=MIB) as grid:
            await Visitor(grid).create(b"x")
            say("then opened")
        say(f"left {' '.join(os.listdir(folder))}")

    asyncio.run(run())


@task
def on_full_disk(mount: str) -> None:
    """Write to each page of an open store when the disk has no block left."""
    mount_memory(mount, 8 * MIB)

    async def run() -> None:
        async with opened(Path(mount, "store"), size=4 * MIB) as grid:
            fill_up(Path(mount))
            say(f"filled {free(mount)}")
            there = visitor(grid, 1)
            await there.create(b"0")
            for _ in range(2999):
                number = await counted(there)
            say(f"commits {number + 1}")
            kept = await fill(grid, 100_000, 5000, 100)
            holder = a_claim()
            await kept[0].locked(holder)
            await kept[0].queued(a_claim())
            await kept[0].release(holder)
            say("largest works")
        say("closed")

    asyncio.run(run())


if __name__ == "__main__":
    name, given = sys.argv[1:]
    arguments: dict[str, Any] = json.loads(given)
    _TASKS[name](**arguments)
