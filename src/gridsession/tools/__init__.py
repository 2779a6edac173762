"""The command line: `gridsession doctor`, `gridsession migrate`, `gridsession new-key`."""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import os
import sys
import threading
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_EXTRA = ("rich", "shellingham", "tomli_w", "typer")
_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it
_LAST_SECONDS = 5.0  # for what an application that we imported does at its exit


def main() -> NoReturn:
    """Run the command line on `sys.argv`, and end the process.

    Exit status: 0 done, 1 something is wrong, 2 wrong usage or packages missing, 130 interrupted.
    """
    _fill_closed_streams()
    if sys.stdout is None:
        _end(_cannot_write("it is closed"))
    raw = _Output(1, "w", closefd=False)
    out = io.TextIOWrapper(
        io.BufferedWriter(raw),
        sys.stdout.encoding,
        "backslashreplace",  # a path may hold what the terminal cannot show
        line_buffering=raw.isatty(),
    )
    sys.stdout = out
    try:
        status = _run()
    except KeyboardInterrupt:
        status = _INTERRUPTED
    except OSError:
        if raw.broken is None:
            raise
    with contextlib.suppress(OSError):  # it is remembered
        out.flush()
    # What an application that we imported says at its exit is no part of our answer; nor has any
    # more of that a place to go where it could not be written.
    os.dup2(2 if raw.broken is None else os.open(os.devnull, os.O_WRONLY), 1)
    if raw.broken is None:
        _end(status)
    # Who closes a pipe has read enough; that is worth a status, and no word.
    is_left = raw.broken.errno == errno.EPIPE
    _end(1 if is_left else _cannot_write(raw.broken.strerror or "it fails"))


class _Output(io.FileIO):
    """Standard output, which remembers that it failed: its callers may have forgotten it since.

    Attributes:
        broken: why not all could be written.
    """

    broken: OSError | None = None

    def write(self, data: ReadableBuffer) -> int | None:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError as error:
            self.broken = error
            raise


def _run() -> int:
    try:
        from gridsession.tools.cli import make_cli
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        print("the command line needs: pip install gridsession[cli]", file=sys.stderr)
        return 2
    try:
        make_cli()(prog_name="gridsession")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _cannot_write(why: str) -> int:
    with contextlib.suppress(OSError):
        print(f"error: standard output cannot be written: {why}", file=sys.stderr)
    return 1


def _fill_closed_streams() -> None:
    """Else a store's file gets the number of a closed stream, and what is written to that."""
    while (taken := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(taken)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


def _end(status: int) -> NoReturn:
    """Without waiting for threads of an application that we imported: they may never end."""
    try:
        patience = threading.Timer(_LAST_SECONDS, os._exit, (status,))
        patience.daemon = True
        patience.start()
        atexit._run_exitfuncs()  # of ours, too: they close a store that the application opened
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)
