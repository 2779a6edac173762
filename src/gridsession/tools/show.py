"""A report for people, on a terminal and in a pipe, and for programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gridsession.tools.report import Finding, Report, Timing, in_words

_COLOURS = {"ok": "green", "warning": "yellow", "error": "bold red"}
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def as_json(report: Report) -> str:
    """One JSON object, of ASCII only."""
    return json.dumps(
        {
            "version": report.version,
            "settings": [vars(setting) for setting in report.settings],
            "grid": report.grid,
            "measurements": {
                "ping": _timing(report.ping),
                "round_trip": _timing(report.round_trip),
                "hand_off": _timing(report.hand_off),
            },
            "findings": [vars(finding) for finding in report.findings],
        },
        indent=2,
    )


def _timing(timing: Timing | None) -> dict[str, Any] | None:
    if timing is None:
        return None
    return {
        "count": timing.count,
        "median_ms": round(timing.median * 1000, 3),
        "p99_ms": round(timing.p99 * 1000, 3),
    }


def as_text(report: Report) -> str:
    """Plain text, without colours and lines, for pipes and files."""
    lines = [f"gridsession {report.version}"]
    for title, rows in _parts(report):
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["", title]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
    lines += ["", "Findings"]
    for finding in report.findings:
        lines.append(f"  {finding.severity:<7}  {_line(finding.what)}")
        if finding.do:
            lines.append(f"           -> {_line(finding.do)}")
    return "\n".join([*lines, "", summary(report)])


def print_rich(report: Report) -> None:
    """Tables and colours, for a terminal."""
    console = terminal()
    console.print(Text(f"gridsession {report.version}", style="bold"))
    for title, rows in _parts(report):
        table = Table(
            title=title, title_justify="left", show_header=False, box=box.SIMPLE, pad_edge=False
        )
        for row in rows:
            # As Text: brackets in a value are no markup.
            style = "dim" if row[-1] == "default" else ""
            table.add_row(*(Text(cell, style, overflow="fold") for cell in row))
        console.print(table)
    table = Table(
        title="Findings", title_justify="left", show_header=False, box=box.SIMPLE, pad_edge=False
    )
    for finding in report.findings:
        table.add_row(Text(finding.severity, style=_COLOURS[finding.severity]), _cell(finding))
    console.print(table)
    worst = max((f.severity for f in report.findings), key=tuple(_COLOURS).index, default="ok")
    console.print(Text(summary(report), style=_COLOURS[worst]))


def summary(report: Report) -> str:
    """How many findings of which kind there are."""
    errors = sum(finding.severity == "error" for finding in report.findings)
    warnings = sum(finding.severity == "warning" for finding in report.findings)
    return f"{_count(errors, 'error')}, {_count(warnings, 'warning')}"


def terminal(*, stderr: bool = False) -> Console:
    """Rich's console; with NO_COLOR it writes no escape sequence into a text."""
    return Console(
        stderr=stderr,
        color_system=None if os.environ.get("NO_COLOR") else "auto",
        highlight=False,
        soft_wrap=False,
    )


def is_terminal() -> bool:
    """Whether standard output is one."""
    return sys.stdout.isatty()


def _parts(report: Report) -> Iterator[tuple[str, Sequence[tuple[str, ...]]]]:
    if report.settings:
        yield (
            "Settings",
            [(one.name, _value(one.value), _line(one.source)) for one in report.settings],
        )
    if report.grid:
        yield "Grid", [_fact(name, value) for name, value in report.grid.items()]
    times = {"ping": report.ping, "round trip": report.round_trip, "hand-off": report.hand_off}
    rows = [
        (
            name,
            f"median {in_words(time.median)}",
            f"p99 {in_words(time.p99)}",
            f"of {time.count}",
        )
        for name, time in times.items()
        if time is not None
    ]
    if rows:
        yield "Measurements", rows


def _fact(name: str, value: object) -> tuple[str, str]:
    if name.endswith("_bytes"):
        name = name.removesuffix("_bytes")
        value = "unknown" if value is None else _size(value)
    return name.replace("_", " "), _value(value)


def _size(size: object) -> str:
    number, unit = float(str(size)), 0
    while number >= 1024 and unit < len(_UNITS) - 1:
        number, unit = number / 1024, unit + 1
    return f"{number:.{0 if not unit else 1}f} {_UNITS[unit]}"


def _value(value: object) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case str():
            return _line(value) or '""'
        case dict():
            return ", ".join(f"{_line(str(key))}: {_value(entry)}" for key, entry in value.items())
        case list():
            return ", ".join(map(_value, value)) or "none"
        case _:
            return str(value)


def _line(text: str) -> str:
    """Without what a terminal would take for an order."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _cell(finding: Finding) -> Text:
    cell = Text(_line(finding.what), overflow="fold")
    if finding.do:
        cell.append(f"\n→ {_line(finding.do)}", style="dim")
    return cell


def _count(number: int, of: str) -> str:
    return f"{number or 'no'} {of}{'' if number == 1 else 's'}"
