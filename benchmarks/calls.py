"""`calls`: what single calls cost in this process, in microseconds of CPU time.

Nothing is bound here: it is for those who make them faster.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

from benchmarks.apps import DAY, contents
from benchmarks.report import Options, Result, Table, median, micro, spread
from gridsession import payload
from gridsession.grids.contract import Change, Claim, Granted, Grid, NewRecord
from gridsession.identity import CookieReader, Identity, new_id, parse_id
from gridsession.provider import SessionProvider
from gridsession.settings import SessionSettings

Call = Callable[[int], Awaitable[None]]  # so many times


async def _cpu(call: Call, times: int) -> float:
    began = time.process_time()
    await call(times)
    return (time.process_time() - began) / times * 1e6


async def _pair_of(grid: Grid, stored: bytes) -> Call:
    identity = await _made(grid, stored)

    async def pairs(times: int) -> None:
        for number in range(times):
            claim = Claim(os.urandom(16), "benchmark", 15.0, 50)
            outcome = await grid.acquire(identity.key, identity.secret, claim)
            assert type(outcome) is Granted
            change = Change(number + 1, stored, DAY, None)
            await grid.commit(identity.key, claim.token, change, release=True)

    return pairs


async def _made(grid: Grid, stored: bytes) -> Identity:
    identity = parse_id(new_id(os.urandom(48)).encode())
    assert identity is not None
    await grid.create(identity.key, NewRecord(1, identity.secret, stored, DAY, None, None))
    return identity


async def _read_of(grid: Grid, stored: bytes) -> Call:
    identity = await _made(grid, stored)

    async def reads(times: int) -> None:
        for _ in range(times):
            await grid.read(identity.key, identity.secret)

    return reads


async def _open_of(provider: SessionProvider, kib: int, access: str) -> Call:
    async with provider.open(None) as session:
        session.update(contents(kib))
        session_id = session.id

    async def count(times: int) -> None:
        for _ in range(times):
            async with provider.open(session_id) as session:
                session["n"] = session["n"] + 1

    async def read(times: int) -> None:
        for _ in range(times):
            async with provider.open(session_id, access="read_only") as session:
                assert session["n"] >= 0

    return count if access == "exclusive" else read


def _of(call: Callable[[], Any]) -> Call:
    async def repeat(times: int) -> None:
        for _ in range(times):
            call()

    return repeat


async def _calls(options: Options, stack: AsyncExitStack) -> dict[str, Call]:
    calls: dict[str, Call] = {}
    stored: dict[int, bytes] = {}
    for kib in (1, 100):
        segments = {key: payload.encode(key, value) for key, value in contents(kib).items()}
        stored[kib] = payload.join(segments, 1 << 20)
    for scheme, url in (
        ("embedded", f"embedded://{options.folder}/grid?max_size=64MiB"),
        ("memory", "memory://"),
    ):
        settings = SessionSettings(connection_string=url, timeout=DAY)
        provider = await stack.enter_async_context(SessionProvider(settings))
        for kib in (1, 100):
            size = f"{scheme}, {kib} KiB"
            calls[f"grid: acquire + commit, {size}"] = await _pair_of(provider.grid, stored[kib])
            calls[f"grid: read, {size}"] = await _read_of(provider.grid, stored[kib])
            for access in ("exclusive", "read_only"):
                name = f"provider.open {access}, {size}"
                calls[name] = await _open_of(provider, kib, access)
    for kib in (1, 100):
        segments = payload.split(stored[kib])
        content = contents(kib)["basket00"]
        segment = payload.encode("x", content)
        calls[f"payload.split, {kib} KiB"] = _of(lambda p=stored[kib]: payload.split(p))  # type: ignore[misc]
        calls[f"payload.join, {kib} KiB"] = _of(lambda s=segments: payload.join(s, 1 << 20))  # type: ignore[misc]
        calls[f"payload.decode + encode, {len(segment)} bytes"] = _of(
            lambda s=segment: payload.encode("x", payload.decode(s))  # type: ignore[misc]
        )
    some_id = new_id(os.urandom(48)).encode()
    headers = [(b"host", b"localhost"), (b"cookie", b"session=" + some_id)]
    reader = CookieReader("session")
    calls["identity.parse_id"] = _of(lambda: parse_id(some_id))
    calls["CookieReader.values"] = _of(lambda: reader.values(headers))
    return calls


async def _measure(options: Options) -> dict[str, list[float]]:
    rounds, times = options.pick(9, 3), options.pick(1000, 200)
    async with AsyncExitStack() as stack:
        calls = await _calls(options, stack)
        figures: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + 1):
            for name, call in calls.items():
                cost = await _cpu(call, times)
                if number:
                    figures[name].append(cost)
            options.progress.at((number + 1) / (rounds + 1))
    return figures


def calls(options: Options) -> Result:
    """Microseconds of CPU time of single calls, in process; nothing is bound."""
    figures = asyncio.run(_measure(options))
    rows = [[name, micro(median(x)), f"± {spread(x):.1f}"] for name, x in figures.items()]
    table = Table("calls: in this process", ("", "CPU µs a call", ""), rows)
    return Result([table], [], dict(figures))
