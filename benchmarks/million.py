"""`million`: a store with a million sessions against one with a thousand.

The stores are filled through the grid's own `create`, under ids of the kind that cookies carry; a
sample over all of them makes the load. Both files have the same size, so that only what is in them
differs. A million takes about 3 GiB of disk twice over, in `--dir`.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from benchmarks.apps import DAY, contents
from benchmarks.report import Check, Options, Result, Table, median, micro, spread
from benchmarks.request import raw
from benchmarks.servers import BenchmarkFailed, Load, Server, Wrk
from gridsession import payload
from gridsession.grids.contract import NewRecord
from gridsession.grids.embedded import EmbeddedGrid
from gridsession.identity import ID_BYTES, new_id, parse_id

_SAMPLE = 20_000
_BYTES_A_SESSION = 3600  # of the file, with room to spare
_BATCH = 2000

# Run in a process of its own, which has nothing open and nothing cached.
_OPEN = """
import asyncio, sys, time
from gridsession.grids.embedded import EmbeddedGrid
async def main():
    grid = EmbeddedGrid.from_connection_string(sys.argv[1], namespace="/", timeout=1.0)
    began = time.perf_counter()
    await grid.open()
    print(time.perf_counter() - began)
asyncio.run(main())
"""


def _stored() -> bytes:
    segments = {key: payload.encode(key, value) for key, value in contents(1).items()}
    return payload.join(segments, 1 << 20)


async def _fill(url: str, count: int, options: Options, whole: int) -> list[str]:
    """Make so many sessions; a sample of their ids."""
    grid = EmbeddedGrid.from_connection_string(url, namespace="/", timeout=1.0)
    await grid.open()
    stored = _stored()
    sample: list[str] = []
    every = max(count // _SAMPLE, 1)
    for number in range(count):
        session_id = new_id(os.urandom(ID_BYTES))
        identity = parse_id(session_id.encode())
        assert identity is not None
        new = NewRecord(number + 1, identity.secret, stored, DAY, None, None)
        await grid.create(identity.key, new)
        if number % every == 0:
            sample.append(session_id)
        if number % _BATCH == 0:
            options.progress.at(0.6 * number / whole, f"filling: {number:,} of {count:,}")
    options.progress.at(0.6 * count / whole, "writing to disk")
    await grid.close()
    random.shuffle(sample)
    return sample


def _opening_seconds(url: str) -> float:
    command = [sys.executable, "-c", _OPEN, url]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def million(options: Options) -> Result:
    """A whole request's CPU time, and opening, with a million sessions and with a thousand."""
    counts = (1000, options.pick(1_000_000, 100_000))
    size = counts[1] * _BYTES_A_SESSION >> 20
    _check_room(options.folder, 2 * size)
    urls = [f"embedded://{options.folder}/{n}?max_size={size}MiB" for n in counts]
    samples = [
        asyncio.run(_fill(url, count, options, counts[1]))
        for url, count in zip(urls, counts, strict=True)
    ]
    names = [f"{count:,} sessions" for count in counts]
    opening: dict[str, list[float]] = {name: [] for name in names}
    rounds = options.pick(9, 3)
    os.sync()  # what filling left to be written would slow down whoever comes first
    for number in range(4 * rounds):
        for name, url in list(zip(names, urls, strict=True))[:: (-1) ** number]:
            opening[name].append(_opening_seconds(url) * 1000)
        options.progress.at(0.65, "opening")
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        options.progress.at(0.65 + 0.35 * done / (2 * rounds + 2), "requests")

    with ExitStack() as stack:
        loads = []
        for name, url, sample in zip(names, urls, samples, strict=True):
            log = options.folder / f"{name}.log"
            server = stack.enter_context(Server("ours", grid=url, log=log))
            cookies = [f"session={session_id}" for session_id in sample]
            loads.append(Load.of(name, server, "/count", cookies, options.folder))
        costs = Wrk(options.folder).in_turns(
            loads, connections=1, rounds=rounds, seconds=options.pick(2, 1), tick=tick
        )
    result = Result(figures={"requests": raw(costs), "opening, ms": opening})
    cpu = {name: [cost.cpu for cost in costs[name]] for name in names}
    result.tables.append(
        Table(
            f"million: whole requests, of random sessions, and opening; file of {size} MiB",
            ("", "CPU µs a request", "", "opening ms", ""),
            [
                [
                    name,
                    micro(median(cpu[name])),
                    f"± {spread(cpu[name]):.1f}",
                    f"{median(opening[name]):.2f}",
                    f"± {spread(opening[name]):.2f}",
                ]
                for name in names
            ],
        )
    )
    few, many = (median(cpu[name]) for name in names)
    opened, opened_many = (median(opening[name]) for name in names)
    result.checks += [
        Check(
            f"CPU of a request among {names[1]}, of that among {names[0]}",
            many / few,
            1.5,
            " ×",
            f"{many / few:.2f} × ({many:.0f} / {few:.0f} µs)",
        ),
        Check(
            f"opening a store of {names[1]}, of one of {names[0]}",
            opened_many / opened,
            1.25,  # what noise alone makes of two equal things; a scan would make it a hundred
            " ×",
            f"{opened_many / opened:.2f} × ({opened_many:.2f} / {opened:.2f} ms)",
        ),
    ]
    return result


def _check_room(folder: Path, mib: int) -> None:
    free = shutil.disk_usage(folder).free >> 20
    if free < mib + 512:
        raise BenchmarkFailed(
            f"million needs {mib + 512:,} MiB in {folder}, where {free:,} are free: --dir, --quick"
        )
