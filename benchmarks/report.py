"""What a benchmark hands back, and how it is shown."""

from __future__ import annotations

import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO


@dataclass(frozen=True)
class Check:
    """One of the project's bounds.

    Attributes:
        what: the bound in words.
        value, limit: what was measured, and the most that it may be, in `unit`.
        shown: the measured value in words, where number and unit do not say all.
    """

    what: str
    value: float
    limit: float
    unit: str = ""
    shown: str = ""
    exact: bool = False  # it must be `limit`, not only at most

    @property
    def ok(self) -> bool:
        return self.value == self.limit if self.exact else self.value <= self.limit

    @property
    def row(self) -> tuple[str, str, str, str]:
        sign = "=" if self.exact else "≤"
        measured = self.shown or f"{self.value:.3g}{self.unit}"
        bound = f"{sign} {self.limit:g}{self.unit}"
        return self.what, measured, bound, "yes" if self.ok else "NO"


@dataclass(frozen=True)
class Table:
    """A table to print: the first column is left-aligned, the others right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def print(self, out: TextIO) -> None:
        widths = [max(map(len, column)) for column in zip(self.columns, *self.rows, strict=True)]

        def line(cells: Sequence[str]) -> str:
            rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
            return "  ".join([cells[0].ljust(widths[0]), *rest]).rstrip()

        print(f"\n{self.title}", file=out)
        print(line(self.columns), file=out)
        print("  ".join("─" * width for width in widths), file=out)
        for row in self.rows:
            print(line(row), file=out)
        for note in self.notes:
            print(f"  {note}", file=out)
        out.flush()


@dataclass
class Result:
    """Of one benchmark. `figures` go to the JSON file as they are."""

    tables: list[Table] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


class Progress:
    """A bar on a terminal, nothing but a first line elsewhere."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = time.monotonic()
        self._drawn = 0.0
        self._terminal = sys.stderr.isatty()
        if not self._terminal:
            print(f"{title} …", file=sys.stderr, flush=True)

    def at(self, share: float, doing: str = "") -> None:
        """`share` of the work is done, 0 to 1; `doing` is what comes now."""
        now = time.monotonic()
        if not self._terminal or (now - self._drawn < 0.1 and share < 1):
            return
        self._drawn = now
        full = int(24 * share)
        left = (now - self._began) * (1 - share) / share if share > 0.02 else None
        shown = f"{self._title} {'█' * full}{'░' * (24 - full)} {share:4.0%}"
        if left is not None:
            shown += f"  {left:3.0f} s left"
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{f'{shown}  {doing}'[:width]}", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        if self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Options:
    """How a benchmark is to run.

    Attributes:
        quick: smaller counts, fewer rounds: to see whether it works, not to judge by.
        folder: for its files, removed afterwards.
        progress: to be told how far it is.
    """

    quick: bool
    folder: Path
    progress: Progress

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Half of what lies between the quartiles: how far a round is from the median, usually."""
    if len(values) < 3:
        return (max(values) - min(values)) / 2
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return (third - first) / 2


def micro(value: float) -> str:
    return f"{value:.1f}"
