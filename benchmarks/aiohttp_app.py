"""The same application for aiohttp, on its own server.

`python -m benchmarks.aiohttp_app PORT LOOP`, a loop being `asyncio` or `uvloop`; `BENCH_APP` says
whether it is bare or has aiohttp-session's sessions in the Redis at `BENCH_GRID`.
"""

from __future__ import annotations

import asyncio
import os
import sys

import redis.asyncio
from aiohttp import web
from aiohttp_session import get_session
from aiohttp_session import setup as set_up_sessions
from aiohttp_session.redis_storage import RedisStorage

from benchmarks.apps import DAY, contents

_BACKLOG = 2048


async def new(request: web.Request) -> web.Response:
    session = await get_session(request)
    session.update(contents(int(request.query["size"])))
    return web.Response(text="ok")


async def count(request: web.Request) -> web.Response:
    session = await get_session(request)
    session["n"] = session["n"] + 1
    return web.Response(text="ok")


async def value(request: web.Request) -> web.Response:
    session = await get_session(request)
    return web.Response(text=str(session["n"]))


def bare() -> web.Application:
    """No sessions at all; the same handler, its number in the process."""
    kept = {"n": 0}

    async def count_in_process(_: web.Request) -> web.Response:
        kept["n"] = kept["n"] + 1
        return web.Response(text="ok")

    app = web.Application()
    app.router.add_get("/count", count_in_process)
    return app


def with_redis(url: str) -> web.Application:
    app = web.Application()
    set_up_sessions(app, RedisStorage(redis.asyncio.Redis.from_url(url), max_age=int(DAY)))
    app.router.add_get("/new", new)
    app.router.add_get("/count", count)
    app.router.add_get("/value", value)
    return app


def main(port: int, loop_name: str) -> None:
    app = bare() if os.environ["BENCH_APP"] == "aiohttp" else with_redis(os.environ["BENCH_GRID"])
    if loop_name == "uvloop":
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    else:
        loop = asyncio.new_event_loop()
    web.run_app(
        app,
        host="127.0.0.1",
        port=port,
        loop=loop,
        print=None,
        access_log=None,
        backlog=_BACKLOG,
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
