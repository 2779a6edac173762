"""The same application for Litestar: bare, and with its sessions in Redis."""

from typing import Any

from litestar import Litestar, MediaType, Request, get
from litestar.middleware.session.server_side import ServerSideSessionConfig
from litestar.stores.redis import RedisStore

from benchmarks.apps import DAY, contents


def bare() -> Any:
    """No sessions at all; the same handler, its number in the process."""
    kept = {"n": 0}

    async def count() -> str:
        kept["n"] = kept["n"] + 1
        return "ok"

    return Litestar(route_handlers=_handlers({"/count": count}))


def _handlers(routes: dict[str, Any]) -> list[Any]:
    return [get(path, media_type=MediaType.TEXT)(handler) for path, handler in routes.items()]


async def new(request: Request[Any, Any, Any], size: int) -> str:
    request.session.update(contents(size))
    return "ok"


async def count(request: Request[Any, Any, Any]) -> str:
    session = request.session
    session["n"] = session["n"] + 1
    return "ok"


async def value(request: Request[Any, Any, Any]) -> str:
    return str(request.session["n"])


def with_redis(url: str) -> Any:
    sessions = ServerSideSessionConfig(max_age=int(DAY))
    return Litestar(
        route_handlers=_handlers({"/new": new, "/count": count, "/value": value}),
        middleware=[sessions.middleware],
        stores={sessions.store: RedisStore.with_client(url)},
    )
