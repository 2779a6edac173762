"""`python -m benchmarks`: run them, print tables, keep the figures."""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    cached,
    calls,
    concurrent,
    handoff,
    increments,
    link,
    million,
    plot,
    redis_calls,
    redis_memory,
    redis_request,
    request,
)
from benchmarks.report import Options, Progress, Result, Table
from benchmarks.servers import BenchmarkFailed

BENCHMARKS: dict[str, Callable[[Options], Result]] = {
    "increments": increments.increments,
    "handoff": handoff.handoff,
    "request": request.request,
    "payload": request.payload,
    "million": million.million,
    "calls": calls.calls,
    "link": link.link,
    "redis-request": redis_request.redis_request,
    "redis-calls": redis_calls.redis_calls,
    "redis-increments": increments.redis_increments,
    "redis-handoff": handoff.redis_handoff,
    "redis-memory": redis_memory.redis_memory,
    "concurrent": concurrent.concurrent,
    "cached": cached.cached,
}
_RESULTS = Path(__file__).parent / "results"
_FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "benchmarks.svg"


def parse(arguments: list[str]) -> argparse.Namespace:
    lines = [f"  {name:16} {benchmark.__doc__}" for name, benchmark in BENCHMARKS.items()]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure what the project promises of speed, as ratios within one run.",
        epilog="benchmarks:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="BENCHMARK", help="which; default: all")
    parser.add_argument(
        "--quick", action="store_true", help="fewer and smaller: to try, not to judge by"
    )
    parser.add_argument(
        "--dir", type=Path, help="where stores lie meanwhile; needs up to 8 GB (default: $TMPDIR)"
    )
    parser.add_argument(
        "--docs", action="store_true", help="write the figure to docs/figures as well"
    )
    parsed = parser.parse_args(arguments)
    if unknown := [name for name in parsed.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    return parsed


def main() -> int:
    """Exit status: 0 when all bounds are kept, 1 when one is not, 2 when something failed."""
    arguments = parse(sys.argv[1:])
    # What it warns of, servers that keep nothing on disk, is meant so here.
    logging.getLogger("gridsession").setLevel(logging.ERROR)
    names = [name for name in BENCHMARKS if not arguments.names or name in arguments.names]
    results: dict[str, Result] = {}
    status = 0
    for name in names:
        progress = Progress(name)
        try:
            with tempfile.TemporaryDirectory(prefix="gridsession-", dir=arguments.dir) as folder:
                options = Options(arguments.quick, Path(folder), progress)
                results[name] = BENCHMARKS[name](options)
        except BenchmarkFailed as error:
            progress.done()
            print(f"\n{name} failed: {error}", file=sys.stderr)
            status = 2
            continue
        progress.done()
        for table in results[name].tables:
            table.print(sys.stdout)
    checks = [check for result in results.values() for check in result.checks]
    if checks:
        columns = ("what", "measured", "bound", "ok?")
        notes = ["measured with --quick: to try, not to judge by"] if arguments.quick else []
        Table("summary", columns, [check.row for check in checks], notes).print(sys.stdout)
    keep(results, quick=arguments.quick, docs=arguments.docs)
    return status or int(not all(check.ok for check in checks))


def keep(results: dict[str, Result], *, quick: bool, docs: bool) -> None:
    """Write the raw figures and the plot."""
    when = time.strftime("%Y%m%dT%H%M%S")
    _RESULTS.mkdir(exist_ok=True)
    file = _RESULTS / f"{when}.json"
    written = {
        "when": when,
        "quick": quick,
        "python": platform.python_version(),
        "system": platform.platform(),
        "checks": [check.row for result in results.values() for check in result.checks],
        "figures": {name: result.figures for name, result in results.items()},
    }
    file.write_text(json.dumps(written, indent=1), encoding="utf-8")
    plots = [_RESULTS / f"{when}.png", _RESULTS / f"{when}.svg"]
    plot.draw(results, plots + ([_FIGURE] if docs else []))
    print(f"\nfigures and plot: {file.with_suffix('')}.*", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
