"""Grids: where records live, found by the scheme of a connection string."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import entry_points

from gridsession.errors import SettingsError
from gridsession.grids.contract import Grid

__all__ = ["Grid", "make_grid", "open_grid"]

ENTRY_POINTS = "gridsession.grids"  # the group under which other packages offer grids


def make_grid(connection_string: str, *, namespace: str = "/", timeout: float = 1.0) -> Grid:
    """The grid that a connection string names, not yet opened.

    Args:
        connection_string: `memory://`, `embedded:`, `embedded:///path?max_size=…&durable=…`, or
            a scheme that an installed package offers in the entry-point group
            `gridsession.grids`: a callable `(connection_string, *, namespace, timeout)`.
        namespace: sets the records of several applications apart.
        timeout: seconds within which a call must have been answered.

    Raises:
        SettingsError: the scheme is unknown, or the rest of the string wrong.
    """
    scheme = connection_string.partition(":")[0]
    make = _OURS.get(scheme)
    if make is None:
        offered = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
        if scheme not in offered:
            raise SettingsError(
                f"connection_string: there is no grid for the scheme {_shown(scheme)}; "
                f"there are: {', '.join(sorted({*_OURS, *offered}))}"
            )
        make = offered[scheme].load()
    grid: Grid = make(connection_string, namespace=namespace, timeout=timeout)
    return grid


def _shown(scheme: str) -> str:
    """A scheme for an error; anything that can be none may be a part of a password."""
    return repr(scheme) if re.fullmatch(r"[a-z][a-z0-9+.-]{0,20}", scheme) else "that it names"


def _memory(connection_string: str, *, namespace: str, timeout: float) -> Grid:
    from gridsession.grids.memory import MemoryGrid

    return MemoryGrid.from_connection_string(connection_string)


def _embedded(connection_string: str, *, namespace: str, timeout: float) -> Grid:
    from gridsession.grids.embedded import EmbeddedGrid

    return EmbeddedGrid.from_connection_string(
        connection_string, namespace=namespace, timeout=timeout
    )


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
