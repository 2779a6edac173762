"""The command line as a process of its own: in a pipe, and on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SECONDS = 60.0  # more than any command takes on a busy machine
COMMAND = (sys.executable, "-m", "gridsession.tools")
# What would make an answer another one here than elsewhere.
_LEFT_OUT = ("GRIDSESSION_", "PYTEST", "COV_", "NO_COLOR", "FORCE_COLOR", "WEB_", "GITHUB_")


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str = ""

    @property
    def said(self) -> str:
        return self.out + self.err


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LEFT_OUT)}
    return {**kept, "TERM": "xterm-256color", "PYTHONWARNINGS": "error", **(more or {})}


def piped(*args: str, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    """Run `gridsession …` with its output in pipes."""
    done = subprocess.run(
        [*COMMAND, *args],
        cwd=cwd,
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def on_terminal(*args: str, cwd: Path, env: Mapping[str, str] | None = None) -> Done:
    """Run `gridsession …` on a terminal of 100 columns."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 100, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *args],
        cwd=cwd,
        env=environment(env),
        stdin=its,
        stdout=its,
        stderr=its,
        start_new_session=True,
    )
    os.close(its)
    read = b""
    try:
        with contextlib.suppress(OSError):  # Linux says so when the other end is closed
            while part := os.read(ours, 65536):
                read += part
        return Done(process.wait(SECONDS), read.decode())
    finally:
        process.kill()
        process.wait()
        os.close(ours)
