"""Grids that other packages bring, in the entry-point group `gridsession.grids`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

ENTRY_POINTS = "gridsession.grids"


def installed_grids() -> Mapping[str, EntryPoint]:
    """What makes a grid, by the scheme of its connection strings; ours are among them."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
