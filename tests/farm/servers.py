"""Starting servers, and ending them whatever happens: by process group, never by name."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 20.0  # several workers import everything on two busy cores
STOP_SECONDS = 15.0
TROUBLE = re.compile(
    r"Traceback|ERROR|CRITICAL|Exception|never awaited|was destroyed|never retrieved"
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for(what: str, is_so: Callable[[], Any], seconds: float = 10.0) -> None:
    """Look again each few milliseconds, until it is so.

    Raises:
        TimeoutError: it never was.
    """
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:g} s")
        time.sleep(0.005)


@dataclass
class Server:
    """A server's leading process, and all that it started."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        """Everything that it wrote to stdout and stderr."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def trouble(self) -> list[str]:
        return [line for line in self.said.splitlines() if TROUBLE.search(line)]

    def workers(self) -> list[int]:
        """The pids of the processes below, which may have ended meanwhile."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]
        return []

    def answers(self) -> bool:
        """Whether a request is answered now."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                connection.sendall(
                    b"GET /heartbeat HTTP/1.1\r\nHost: farm\r\nConnection: close\r\n\r\n"
                )
                return bool(connection.recv(64))
        except OSError:
            return False

    def wait_ready(self) -> None:
        def ready() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server ended with {self.process.returncode}:\n{self.said}")
            return self.answers()

        wait_for("a server that answers", ready, START_SECONDS)

    def wait_listening(self) -> None:
        """For a server whose every answer is an error, and is counted."""

        def listens() -> bool:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), timeout=2).close()
                return True
            return False

        wait_for("a server that listens", listens, START_SECONDS)

    def stop(self) -> int:
        """Ask it to end, as an operator does; answers its exit code."""
        self.process.terminate()
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """What `kill -9` does to all of it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait(STOP_SECONDS)


@dataclass
class Farm:
    """Servers over one embedded grid."""

    folder: Path
    options: dict[str, Any]

    def __post_init__(self) -> None:
        self.grid = self.folder / "grid"
        self.marks = self.folder / "marks"
        self.marks.mkdir(exist_ok=True)
        self._servers: list[Server] = []
        self._helpers: list[subprocess.Popen[bytes]] = []

    def environment(self, app: str = "starlette") -> dict[str, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WEB_", "PYTEST"))}
        given = {"connection_string": f"embedded://{self.grid}?max_size=16MiB"} | self.options
        return environment | {
            "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
            "PYTHONUNBUFFERED": "1",
            "FARM_APP": app,
            "FARM_OPTIONS": json.dumps(given),
            "FARM_MARKS": str(self.marks),
        }

    def launch(
        self, *command: str, app: str = "starlette", env: Mapping[str, str] | None = None
    ) -> Server:
        """Start a server; `PORT` in its command line stands for a free port."""
        port = free_port()
        log = self.folder / f"server-{len(self._servers)}.log"
        words = [word.replace("PORT", str(port)) for word in command]
        with open(log, "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self.folder,
                env=self.environment(app) | dict(env or {}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        server = Server(process, port, log)
        self._servers.append(server)
        return server

    def start(
        self, *command: str, app: str = "starlette", env: Mapping[str, str] | None = None
    ) -> Server:
        """Start a server, and wait until it answers."""
        server = self.launch(*command, app=app, env=env)
        server.wait_ready()
        return server

    def uvicorn(self, *args: str, app: str = "starlette") -> Server:
        return self.start(*UVICORN, *args, app=app)

    def run_helper(self, module: str, *args: str) -> subprocess.Popen[bytes]:
        """Start a module that is no server."""
        process = subprocess.Popen(
            [sys.executable, "-m", module, *args],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._helpers.append(process)
        return process

    def end(self) -> None:
        """End whatever is left of all of them."""
        for helper in self._helpers:
            helper.kill()
            helper.wait(STOP_SECONDS)
        for server in self._servers:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGCONT)
            server.kill()

    def mark(self, name: str) -> None:
        (self.marks / name).touch()

    def wait_mark(self, name: str, seconds: float = 10.0) -> None:
        wait_for(name, (self.marks / name).exists, seconds)

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.grid / "state.json").read_text(encoding="utf-8"))
        return state

    def bells(self) -> list[str]:
        return sorted(os.listdir(self.grid / "bells"))


UVICORN = ("uvicorn", "tests.farm.app:app", "--port", "PORT")


@contextlib.contextmanager
def farm_in(folder: Path, **options: Any) -> Iterator[Farm]:
    """A farm whose servers are gone when the block ends."""
    farm = Farm(folder, options)
    try:
        yield farm
    finally:
        farm.end()
