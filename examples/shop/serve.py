"""Serve the example shop: `python examples/shop/serve.py`, from any directory.

The environment sets:
    PORT     where to listen (8000); 0 takes a free port
    WORKERS  how many processes serve (2)
    GRID     the connection string of the session grid (embedded:); with redis://… shops on several
             machines, or at several ports, share their sessions
    HOST     the address to listen at (127.0.0.1: this machine only)
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import sys
import tempfile
from pathlib import Path

import uvicorn
from uvicorn.config import LOGGING_CONFIG, STARTUP_FAILURE
from uvicorn.supervisors import Multiprocess

from gridsession import GridUnavailable, SettingsError
from gridsession.grids import open_grid

ROOT = Path(__file__).resolve().parents[2]
MAX_WORKERS = 64  # each is a process


def number(name: str, default: str, least: int, most: int) -> int:
    """An environment variable as a whole number; exits with a message where it is none."""
    text = os.environ.get(name) or default
    value = int(text) if text.isascii() and text.isdigit() else -1
    if not least <= value <= most:
        sys.exit(f"serve.py: {name}={text!r}: must be a whole number from {least} to {most}")
    return value


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens, so that the address is known, and ours, before workers start."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            sys.exit(f"serve.py: PORT={port}: another program listens there; try another port")
        sys.exit(f"serve.py: cannot listen at HOST={host!r} PORT={port}: {error.strerror}")


async def try_grid(connection_string: str) -> str:
    """Open the grid once, so that what is wrong with it is said once, not by each worker."""
    logging.getLogger("gridsession").addHandler(logging.NullHandler())  # workers log, this ends
    async with open_grid(connection_string, namespace="shop") as grid:
        return grid.where


def main() -> None:
    """Start the workers and stay until Ctrl-C or SIGTERM."""
    host = os.environ.get("HOST") or "127.0.0.1"
    port = number("PORT", "8000", 0, 65535)
    workers = number("WORKERS", "2", 1, MAX_WORKERS)
    grid = os.environ["GRID"] = os.environ.get("GRID") or "embedded:"
    os.environ["WEB_CONCURRENCY"] = str(workers)  # memory:// refuses to be used by several
    try:
        where = asyncio.run(try_grid(grid))
    except GridUnavailable as error:
        sys.exit(f"serve.py: GRID: {error}; start it, or leave GRID out to use a file")
    except SettingsError as error:
        sys.exit(f"serve.py: GRID: {error}")
    os.environ["GRID_SHOWN"] = where  # without password; the page names it

    log_config = {
        **LOGGING_CONFIG,
        "loggers": {
            **LOGGING_CONFIG["loggers"],
            "gridsession": {"handlers": ["default"], "level": "WARNING"},
        },
    }
    sys.path.insert(0, str(ROOT))  # the workers inherit it, and import examples.shop.app
    with (
        listen(host, port) as listener,
        tempfile.TemporaryDirectory(prefix="shop-unlocked-") as unlocked,
    ):
        os.environ["UNLOCKED_DIRECTORY"] = unlocked
        config = uvicorn.Config(
            "examples.shop.app:app",
            workers=workers,
            log_config=log_config,
            log_level="warning",
            access_log=False,
            server_header=False,
        )
        # With one worker as well, so that signals and exit codes are always the same.
        supervisor = Multiprocess(config, [listener])
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listener.getsockname()[1]}/"
        served = f"{workers} worker{'s' if workers > 1 else ''}"
        print(f"The shop is open at {address} · {served}, sessions in {where} · Ctrl-C stops it")
        sys.stdout.flush()
        supervisor.run()
    if any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes):
        sys.exit("serve.py: a worker could not start; the reason is above")


if __name__ == "__main__":
    main()
