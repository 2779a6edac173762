"""A real redis-server on a free loopback port, for one test run.

`GRID_SERVER=valkey-server make test` runs the suite against another server that speaks the same.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Self

import redis

PROGRAM = os.environ.get("GRID_SERVER", "redis-server")
STARTS_IN = 10.0  # seconds
_numbers = itertools.count()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _die_with_parent() -> None:
    """In the child: a test run that is killed leaves no server behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


@cache
def shared_server() -> RedisServer:
    """The server of this test process, for whoever does not stop it or count its calls."""
    folder = Path(tempfile.mkdtemp(prefix="gridsession-redis-"))
    # What it keeps matters to nobody; without it each start is warned of what a restart loses.
    server = RedisServer(folder, appendonly="yes", appendfsync="no").start()

    def end() -> None:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)

    atexit.register(end)
    return server


def a_namespace() -> str:
    """One that no other test has."""
    return f"n{next(_numbers)}"


class RedisServer:
    """A server process, which a test may stop, freeze, kill and start again.

    Args:
        folder: where it keeps what it stores.
        options: of its configuration, by name; they overrule those here.

    Attributes:
        port: where it listens, also after it was started again.
        admin: a client that may do everything, with redis-py.
    """

    def __init__(self, folder: Path, **options: str) -> None:
        self.folder = folder
        self.options = options
        self.port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.admin: Any = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> Self:
        """Start it, and wait until it answers."""
        if shutil.which(PROGRAM) is None:
            raise RuntimeError(f"{PROGRAM} is not on PATH; make test installs redis-server")
        for _ in range(5):  # another may take the port before it does
            self.process = self._spawn()
            if self._is_up():
                return self
            self.stop()
            self.port = free_port()
        raise RuntimeError(f"{PROGRAM} does not start: {self._log()[-2000:]}")

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.folder.mkdir(parents=True, exist_ok=True)
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.folder),
            "save": "",
            "appendonly": "no",
            "logfile": str(self.folder / "log"),
            "daemonize": "no",
            "enable-debug-command": "local",
        }
        for name, value in self.options.items():
            options[name.replace("_", "-")] = value
        lines = [
            f'{name} "{value}"' if value == "" else f"{name} {value}"
            for name, value in options.items()
        ]
        (self.folder / "conf").write_text("\n".join(lines) + "\n")
        return subprocess.Popen(
            [PROGRAM, str(self.folder / "conf")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - it calls the kernel and nothing else
        )

    def _is_up(self) -> bool:
        self.admin = self._admin()
        until = time.monotonic() + STARTS_IN
        while time.monotonic() < until and self.process is not None:
            if self.process.poll() is not None:
                return False
            try:
                self.admin.ping()
            except redis.AuthenticationError:
                return True
            except redis.RedisError:
                time.sleep(0.01)
            else:
                return True
        return False

    def _admin(self) -> Any:
        return redis.Redis(host="127.0.0.1", port=self.port, socket_timeout=10.0, protocol=3)

    def _log(self) -> str:
        log = self.folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def stop(self) -> None:
        """End it in order: what it stores it keeps as its configuration says."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self.admin is not None:
            self.admin.close()
        process, self.process = self.process, None
        if process is not None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(how)
            process.wait(20.0)

    def freeze(self) -> None:
        """Stop it as `SIGSTOP` does: connections stay, and nothing is answered."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    @contextmanager
    def frozen(self) -> Iterator[None]:
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
