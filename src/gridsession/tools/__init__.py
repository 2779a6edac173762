"""The command line: `gridsession doctor`, `gridsession migrate`."""

from __future__ import annotations

import os
import sys

_EXTRA = ("rich", "shellingham", "tomli_w", "typer")
_INTERRUPTED = 130  # 128 and the number of SIGINT, as shells have it


def main() -> None:
    """Run the command line on `sys.argv`.

    Raises:
        SystemExit: always; 0 done, 1 something is wrong, 2 wrong usage or packages missing,
            130 interrupted.
    """
    try:
        try:
            from gridsession.tools.cli import make_cli
        except ImportError as error:
            if (error.name or "").partition(".")[0] not in _EXTRA:
                raise
            print("the command line needs: pip install gridsession[cli]", file=sys.stderr)
            raise SystemExit(2) from None
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a path may hold what the terminal cannot show
                stream.reconfigure(errors="backslashreplace")
        make_cli()(prog_name="gridsession")
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED) from None
    finally:
        _close_stdout()


def _close_stdout() -> None:
    """What an application that we imported says at its exit is no part of our answer."""
    try:
        sys.stdout.flush()
        os.dup2(2, 1)
    except (OSError, ValueError):  # nobody reads any more
        pass
