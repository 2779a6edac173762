"""`request` and `payload`: the CPU time that sessions add to a request.

What uvicorn and Starlette take without sessions, measured in the same turns, is taken off. All
variants run the same handler under the same load. `1` and `8` are connections: with one, the
server waits between requests; with eight, of distinct sessions so that nobody waits for a lock,
it is busy all the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from benchmarks.report import Check, Options, Result, Table, median, micro, spread
from benchmarks.servers import Cost, Load, Server, Wrk

_SESSIONS = 64  # in turns: far more than connections, so that no two requests meet
_NO_COOKIE = ["-"]
COOKIE_OF_NOBODY = ["session=" + "x" * 64]  # so that all servers parse as many bytes

OURS, READ_ONLY = "gridsession, exclusive", "gridsession, read_only"
UNTOUCHED = "gridsession, no cookie, nothing stored"
STARSESSIONS, COOKIE = "starsessions in memory (locks nothing)", "Starlette's signed cookie"
BARE, BARE_NO_COOKIE = "bare Starlette", "bare Starlette, no cookie"
_BASES = {UNTOUCHED: BARE_NO_COOKIE}  # all others: BARE


class Stand:
    """Servers, and loads for them, in one event loop implementation.

    Args:
        grid: the connection string of the grid that they share; by default each has an embedded
            one of its own.
    """

    def __init__(self, options: Options, stack: ExitStack, loop: str, grid: str = "") -> None:
        self.folder = options.folder / f"stand-{loop}"
        self.folder.mkdir()
        self._stack = stack
        self._loop = loop
        self._grid = grid

    def server(self, kind: str) -> Server:
        grid = self._grid or f"embedded://{self.folder}/grid-{kind}?max_size=64MiB"
        log = self.folder / f"{kind}.log"
        return self._stack.enter_context(Server(kind, grid=grid, loop=self._loop, log=log))

    def load(self, name: str, server: Server, path: str, kib: int = 1) -> Load:
        cookies = server.cookies(f"/new?size={kib}", _SESSIONS)
        return self.load_with(name, server, path, cookies)

    def load_with(self, name: str, server: Server, path: str, cookies: list[str]) -> Load:
        return Load.of(name, server, path, cookies, self.folder)


def added(
    costs: dict[str, list[Cost]], name: str, bases: Mapping[str, str] = _BASES
) -> list[float]:
    """CPU microseconds more than without sessions, for each round."""
    base = costs[bases.get(name, BARE)]
    return [cost.cpu - bare.cpu for cost, bare in zip(costs[name], base, strict=True)]


def raw(costs: dict[str, list[Cost]]) -> dict[str, Any]:
    return {name: [asdict(cost) for cost in rounds] for name, rounds in costs.items()}


def rows(
    costs: dict[str, list[Cost]], unit: float, bases: Mapping[str, str] = _BASES
) -> list[list[str]]:
    """What a table shows of each load; `unit` is what counts as 1 in the column of ratios."""
    shown = []
    for name, rounds in costs.items():
        more = added(costs, name, bases)
        is_base = name in (BARE, *bases.values())
        shown.append(
            [
                name,
                micro(median([cost.cpu for cost in rounds])),
                "" if is_base else micro(median(more)),
                "" if is_base else f"± {spread(more):.1f}",
                "" if is_base else f"{median(more) / unit:.2f}",
                micro(median([cost.wall for cost in rounds])),
            ]
        )
    return shown


COLUMNS = ("", "CPU µs a request", "added", "", "ratio", "latency µs, median")


def request(options: Options) -> Result:
    """Added CPU a request over bare Starlette, and beside what others add."""
    result = Result()
    setups = [(loop, connections) for loop in ("asyncio", "uvloop") for connections in (1, 8)]
    rounds, done = options.pick(7, 2), 0
    total = len(setups) * 7 * (rounds + 1)

    def tick() -> None:
        nonlocal done
        done += 1
        options.progress.at(done / total)

    for loop, connections in setups:
        with ExitStack() as stack:
            folder = options.folder / f"{loop}-{connections}"
            folder.mkdir()
            there = replace(options, folder=folder)
            costs = _request(Stand(there, stack, loop), connections, rounds, tick)
        ours, theirs = median(added(costs, OURS)), median(added(costs, STARSESSIONS))
        wires = f"{connections} connection{'s'[: connections - 1]}"
        result.tables.append(
            Table(
                f"request: 1 KiB session, one number counted up; {loop}, {wires}",
                COLUMNS,
                rows(costs, theirs),
                ["ratio: to what starsessions in memory adds"],
            )
        )
        result.checks.append(
            Check(
                f"CPU added to a request, of starsessions': {loop}, {wires}",
                ours / theirs,
                1.0,
                " ×",
                f"{ours / theirs:.2f} × ({ours:.0f} / {theirs:.0f} µs)",
            )
        )
        result.figures[f"{loop} {connections}"] = raw(costs)
    return result


def _request(
    stand: Stand, connections: int, rounds: int, tick: Callable[[], None]
) -> dict[str, list[Cost]]:
    bare, ours = stand.server("bare"), stand.server("ours")
    loads = [
        stand.load_with(BARE, bare, "/count", COOKIE_OF_NOBODY),
        stand.load_with(BARE_NO_COOKIE, bare, "/plain", _NO_COOKIE),
        stand.load(OURS, ours, "/count"),
        stand.load(READ_ONLY, stand.server("read_only"), "/read"),
        stand.load_with(UNTOUCHED, ours, "/plain", _NO_COOKIE),
        stand.load(STARSESSIONS, stand.server("starsessions"), "/count"),
        stand.load(COOKIE, stand.server("cookie"), "/count"),
    ]
    return Wrk(stand.folder).in_turns(
        loads, connections=connections, rounds=rounds, seconds=1, tick=tick
    )


def payload(options: Options) -> Result:
    """A large session of which a request touches one key, against a small one."""
    rounds, done = options.pick(9, 2), 0
    small, counted, changed = "1 KiB, number", "100 KiB, number", "100 KiB, 2 KiB value"
    small_changed = "1 KiB, one value"
    theirs, theirs_large = "starsessions, 1 KiB, number", "starsessions, 100 KiB, number"

    def tick() -> None:
        nonlocal done
        done += 1
        options.progress.at(done / (7 * (rounds + 1)))

    with ExitStack() as stack:
        stand = Stand(options, stack, "asyncio")
        bare, ours = stand.server("bare"), stand.server("ours")
        other = stand.server("starsessions")
        loads = [
            stand.load_with(BARE, bare, "/count", COOKIE_OF_NOBODY),
            stand.load(small, ours, "/count"),
            stand.load(counted, ours, "/count", 100),
            stand.load(small_changed, ours, "/change"),
            stand.load(changed, ours, "/change", 100),
            stand.load(theirs, other, "/count"),
            stand.load(theirs_large, other, "/count", 100),
        ]
        costs = Wrk(stand.folder).in_turns(
            loads, connections=1, rounds=rounds, seconds=1, tick=tick
        )
    unit = median(added(costs, small))
    result = Result(figures=raw(costs))
    result.tables.append(
        Table(
            "payload: a session of 50 keys of 2 KiB, one of them changed; asyncio, 1 connection",
            COLUMNS,
            rows(costs, unit),
            [
                "number: a small value is counted up; value: a nested value is changed in place,",
                "which decodes and encodes the 2 KiB under its key. ratio: to 1 KiB, number",
            ],
        )
    )
    for name, base in ((counted, small), (changed, small)):
        large, little = median(added(costs, name)), median(added(costs, base))
        result.checks.append(
            Check(
                f"CPU added by a session of {name} changed, of 1 KiB's",
                large / little,
                2.0,
                " ×",
                f"{large / little:.2f} × ({large:.0f} / {little:.0f} µs)",
            )
        )
    return result
