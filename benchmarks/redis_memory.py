"""`redis-memory`: what a session takes of the server's memory.

Sessions are made, and each is then locked and committed once, as by the request that follows: so
the records are as requests leave them, with the user, the last holder's traces and the commits
that a record remembers. Payloads are random bytes, which nothing makes smaller. Counted is
`used_memory`, what the server has of its allocator: records, their names, the table of all names
and the index of deadlines. What it had with connections open and scripts loaded is taken off.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from benchmarks.apps import DAY
from benchmarks.redis_server import RedisServer
from benchmarks.report import Check, Options, Result, Table
from gridsession.grids.contract import Change, Claim, Granted, NewRecord
from gridsession.grids.redis import RedisGrid
from gridsession.identity import ID_BYTES, new_id, parse_id

_NAMESPACE = "shop"  # it is in each record's name
_SIZES = (1024, 1200)  # bytes of payload
_AT_ONCE = 64
_SETTLES = 0.5  # seconds in which the server shrinks what clients' buffers took
_BESIDE = 600  # bytes that a record and its place in the index may take beside the payload
_GROWTH = 1.03  # of the bytes a session, from half of them to all
_HOLDER = "POST /cart · web-3 · pid 71"
_TIMEOUT = 10.0  # seconds for a call


async def _make(grid: RedisGrid, number: int, size: int) -> None:
    """One session, as its first two requests leave it."""
    identity = parse_id(new_id(os.urandom(ID_BYTES)).encode())
    assert identity is not None
    user = f"user-{number:06}"
    first, second = (int.from_bytes(os.urandom(8), "big") for _ in range(2))
    new = NewRecord(first, identity.secret, os.urandom(size), DAY, None, user)
    await grid.create(identity.key, new)
    claim = Claim(os.urandom(16), _HOLDER, 15.0, 50)
    assert type(await grid.acquire(identity.key, identity.secret, claim)) is Granted
    change = Change(second, os.urandom(size), DAY, user)
    await grid.commit(identity.key, claim.token, change, release=True)


async def _used(redis: RedisServer) -> int:
    await asyncio.sleep(_SETTLES)
    return int(redis.admin.info("memory")["used_memory"])


async def _fill(
    redis: RedisServer, size: int, counts: tuple[int, int], options: Options, done: float
) -> list[int]:
    """Bytes used at each number of sessions, more than with none."""
    grid = RedisGrid.from_connection_string(redis.url, namespace=_NAMESPACE, timeout=_TIMEOUT)
    await grid.open()
    await _make(grid, 0, size)  # loads the scripts
    redis.admin.flushdb()
    none = await _used(redis)
    used, made = [], 0
    for count in counts:
        while made < count:
            some = range(made, min(made + _AT_ONCE, count))
            await asyncio.gather(*(_make(grid, number, size) for number in some))
            made = some.stop
            share = done + made / counts[-1] / len(_SIZES)
            options.progress.at(share, f"{made:,} sessions of {size:,} bytes")
        assert redis.admin.dbsize() >= count
        used.append(await _used(redis) - none)
    await grid.close()
    return used


def redis_memory(options: Options) -> Result:
    """Server memory a session at Redis, index included, and whether it grows in proportion."""
    whole = options.pick(200_000, 20_000)
    counts = (whole // 2, whole)
    result, rows = Result(), []
    version = ""
    for place, size in enumerate(_SIZES):
        with RedisServer(Path(options.folder) / str(size)) as redis:
            used = asyncio.run(_fill(redis, size, counts, options, place / len(_SIZES)))
            version = redis.version
        half, all_of_them = (bytes_ / n for bytes_, n in zip(used, counts, strict=True))
        for count, bytes_ in zip(counts, used, strict=True):
            rows.append(
                [
                    f"{count:,} sessions of {size:,} bytes",
                    f"{bytes_ / (1 << 20):.1f}",
                    f"{bytes_ / count:,.0f}",
                    f"{bytes_ / count - size:,.0f}",
                ]
            )
        result.checks += [
            Check(
                f"Redis: bytes a session beside its payload of {size:,}",
                all_of_them - size,
                _BESIDE,
                "",
                f"{all_of_them - size:,.0f}",
            ),
            Check(
                f"Redis: bytes a session of {size:,}: of {counts[1]:,}, to those of {counts[0]:,}",
                all_of_them / half,
                _GROWTH,
                " ×",
                f"{all_of_them / half:.3f} ×",
            ),
        ]
        result.figures[str(size)] = dict(zip(map(str, counts), used, strict=True))
    result.tables.append(
        Table(
            f"redis-memory: used_memory of {version}, each session made, then written once more",
            ("", "MiB", "bytes each", "beside payload"),
            rows,
        )
    )
    return result
