"""A redis-server that a benchmark starts for itself, on a free loopback port."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import redis

from benchmarks.servers import BenchmarkFailed, Started

PROGRAM = os.environ.get("GRID_SERVER", "redis-server")
_START_SECONDS = 10.0
_LIBC = ctypes.CDLL(None)


def _end_with_parent() -> None:
    """In the child: a benchmark that is killed leaves no server behind."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)


class RedisServer(Started):
    """A server without persistence, which would only blur what is measured.

    Args:
        folder: for its configuration and its log.

    Attributes:
        url: as a connection string.
        admin: a client that asks it about itself, with redis-py.
    """

    def __init__(self, folder: Path) -> None:
        if shutil.which(PROGRAM) is None:
            raise BenchmarkFailed(f"{PROGRAM} is not on PATH; make bench installs redis-server")
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._log = folder / "redis.log"
        command = [PROGRAM, "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(folder)]
        command += ["--save", "", "--appendonly", "no", "--logfile", str(self._log)]
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,  # noqa: PLW1509 - it calls the kernel and nothing else
        )
        self.pid = self._process.pid
        self.admin: Any = redis.Redis(host="127.0.0.1", port=self.port, decode_responses=True)
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.admin.ping()
                return
            except redis.RedisError:
                if self._process.poll() is not None or time.monotonic() > end:
                    self.stop()
                    said = self._log.read_text(errors="replace") if self._log.exists() else ""
                    raise BenchmarkFailed(f"{PROGRAM} did not start:\n{said[-2000:]}") from None
                time.sleep(0.02)

    @property
    def version(self) -> str:
        """Its name and version, for a table's title."""
        told = self.admin.info("server")
        if told.get("server_name") == "valkey":
            return f"Valkey {told['valkey_version']}"
        return f"Redis {told['redis_version']}"

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Connections stay meanwhile, and nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.admin.close()
        super().stop()
