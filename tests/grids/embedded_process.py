"""Other processes for the tests of the embedded grid: they say what they do, line by line."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 15.0  # seconds for a process that shares two cores with others; none needs one


@contextlib.contextmanager
def memory_folder() -> Iterator[Path]:
    """A folder in memory where there is one: flushing to a disk would take most of a test."""
    shared = Path("/dev/shm")
    parent = shared if shared.is_dir() and os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="gridsession-", dir=parent) as folder:
        yield Path(folder)


class Child:
    """A process that carries out one of the tasks in `embedded_tasks`.

    Args:
        task: the function's name.
        arguments: for it, by name; whatever JSON can carry.
        under: a command to run it under, as `unshare -m`.
        cwd: the process's working directory.
        environment: variables to add to this process's.
    """

    def __init__(
        self,
        task: str,
        *,
        under: Sequence[str] = (),
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        **arguments: Any,
    ) -> None:
        python = [sys.executable, "-u", "-m", "tests.grids.embedded_tasks"]
        given = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        self.process = subprocess.Popen(
            [*under, *python, task, json.dumps(given)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=cwd or ROOT,
            env={**os.environ, "PYTHONPATH": path, **(environment or {})},
        )
        self.pid = self.process.pid
        self._unread = b""
        # Who waits inside LMDB for a stopped process cannot be interrupted, only let go on.
        self._watchdog = threading.Timer(PATIENCE, self.process.kill)
        self._watchdog.daemon = True

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._watchdog.cancel()
        if self.process.poll() is None:
            self.process.kill()  # a stopped process, too
        self.process.wait(PATIENCE)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def line(self, seconds: float = PATIENCE) -> str:
        """The next line that it says; empty when it says no more."""
        assert self.process.stdout is not None
        out, end = self.process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([out], [], [], max(end - time.monotonic(), 0.0))
            assert ready, f"process {self.pid} says nothing for {seconds:g} s"
            more = os.read(out, 65536)
            if not more:
                break
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        return line.decode()

    def says(self, word: str) -> str:
        """What follows a word, which is due next."""
        line = self.line()
        assert line.split(" ")[0] == word, f"due: {word!r}, process {self.pid} said {line!r}"
        return line[len(word) + 1 :]

    def rest(self) -> list[str]:
        """All that it still says, until its end."""
        lines = []
        while line := self.line():
            lines.append(line)
        return lines

    def tell(self, word: str = "go on") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    def is_stopped(self) -> None:
        """Wait until it has been stopped, by itself or by `stop`."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"process {self.pid} ended: {status}"
        self._watchdog.start()

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        self.is_stopped()

    def go_on(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(PATIENCE)

    def ends(self, status: int = 0) -> None:
        assert self.process.wait(PATIENCE) == status
