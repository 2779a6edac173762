"""Grids: where records live, found by the scheme of a connection string."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gridsession.grids.contract import Grid
from gridsession.sources.address_parts import wrong
from gridsession.sources.connection_string import RedisAddress, parse
from gridsession.sources.installed import installed_grids

__all__ = ["Grid", "make_grid", "open_grid"]


def make_grid(connection_string: str, *, namespace: str = "/", timeout: float = 1.0) -> Grid:
    """The grid that a connection string names, not yet opened.

    Args:
        connection_string: `memory://`, `embedded:`, `embedded:///path?max_size=…&durable=…`,
            `redis://host:6379/0`, `rediss://…`, `redis+unix://…`, `bootstrapGateways=…`, or a
            scheme that an installed package offers in the entry-point group `gridsession.grids`:
            a callable `(connection_string, *, namespace, timeout)`.
        namespace: sets the records of several applications apart.
        timeout: seconds within which a call must have been answered.

    Raises:
        SettingsError: the scheme is unknown, or the rest of the string wrong.
    """
    address = parse(connection_string, offered=installed_grids)
    scheme, _, rest = connection_string.partition(":")
    scheme = scheme.lower()
    make = _redis if isinstance(address, RedisAddress) else _OURS.get(scheme)
    if make is None:
        offered = installed_grids()
        if scheme in offered:
            make = offered[scheme].load()
        else:
            # Without the slashes it may be a user's name, before a password.
            shown = repr(scheme) if rest.startswith("//") else "that it names"
            raise wrong(
                f"there is no grid for the scheme {shown}; "
                f"there are: {', '.join(sorted({*_OURS, 'redis', *offered}))}"
            )
    grid: Grid = make(connection_string, namespace=namespace, timeout=timeout)
    return grid


def _memory(connection_string: str, *, namespace: str, timeout: float) -> Grid:
    from gridsession.grids.memory import MemoryGrid

    return MemoryGrid.from_connection_string(connection_string)


def _embedded(connection_string: str, *, namespace: str, timeout: float) -> Grid:
    try:
        from gridsession.grids.embedded import EmbeddedGrid
    except ImportError as error:
        if error.name != "fcntl":
            raise
        raise wrong(
            "embedded: needs Linux (or macOS, for development), for it locks files as they do; "
            "use memory:// here"
        ) from None
    return EmbeddedGrid.from_connection_string(
        connection_string, namespace=namespace, timeout=timeout
    )


def _redis(connection_string: str, *, namespace: str, timeout: float) -> Grid:
    try:
        from gridsession.grids.redis import RedisGrid
    except ImportError as error:
        if error.name != "hiredis":
            raise
        raise wrong("for Redis, run: pip install 'gridsession[redis]'") from None
    return RedisGrid.from_connection_string(connection_string, namespace=namespace, timeout=timeout)


# Imported when asked for: who keeps sessions elsewhere needs no LMDB in memory.
_OURS: dict[str, Callable[..., Grid]] = {"memory": _memory, "embedded": _embedded}


@asynccontextmanager
async def open_grid(
    connection_string: str, *, namespace: str = "/", timeout: float = 1.0
) -> AsyncIterator[Grid]:
    """`async with open_grid("embedded:", namespace="shop") as grid:` a grid, opened.

    Args, raises: as `make_grid`, and as `Grid.open`.
    """
    grid = make_grid(connection_string, namespace=namespace, timeout=timeout)
    await grid.open()
    try:
        yield grid
    finally:
        await grid.close()
