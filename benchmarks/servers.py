"""Servers under load, and what they cost: uvicorn, wrk, CPU time."""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

_START_SECONDS = 20.0

# Requests take turns over many cookies, so that no two at once are of one session.
_SCRIPT = """
local requests, at = {}, 0
function init(args)
  at = tonumber(args[3])
  for cookie in io.lines(args[2]) do
    local headers = {}
    if cookie ~= "-" then headers["Cookie"] = cookie end
    requests[#requests + 1] = wrk.format("GET", args[1], headers)
  end
end
function request()
  at = at % #requests + 1
  return requests[at]
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\\n{"requests": %d, "failed": %d, "seconds": %f, "median": %f}\\n',
    summary.requests, e.status + e.read + e.write + e.timeout + e.connect,
    summary.duration / 1e6, latency:percentile(50)))
end
"""


class BenchmarkFailed(Exception):
    """What was to be measured did not work."""


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, all threads, user and system."""
    if platform.system() == "Linux":
        return time.clock_gettime((~pid << 3) | 2)  # clock_getcpuclockid(3): in nanoseconds
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


class Started:
    """A process that was started to be measured: `with` ends it."""

    _process: subprocess.Popen[bytes]

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class Server(Started):
    """uvicorn with one of `apps.py`'s applications, or aiohttp's server with its own.

    Args:
        kind: which.
        grid: the connection string of where its sessions lie.
        workers: processes; CPU time is measured of a single one only.
        loop: `asyncio` or `uvloop`.
        log: the file that its output goes to.
        announce: see `apps.Announcing`.
    """

    def __init__(
        self,
        kind: str,
        *,
        log: Path,
        grid: str = "",
        workers: int = 1,
        loop: str = "asyncio",
        announce: str = "",
    ) -> None:
        self.kind = kind
        self.workers = workers
        self._log = log
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        if kind.startswith("aiohttp"):
            command = [sys.executable, "-m", "benchmarks.aiohttp_app", str(self.port), loop]
        else:
            command = [sys.executable, "-m", "uvicorn", "--factory", "benchmarks.apps:make"]
            command += ["--host", "127.0.0.1", "--port", str(self.port), "--workers", str(workers)]
            command += ["--loop", loop, "--http", "httptools", "--no-access-log"]
            command += ["--log-level", "warning", "--backlog", "2048"]
        bench = {"BENCH_APP": kind, "BENCH_GRID": grid, "BENCH_ANNOUNCE": announce}
        with open(log, "wb") as out:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **bench},
                cwd=Path(__file__).parent.parent,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid
        self._wait_until_up()

    def _wait_until_up(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while True:
            try:
                self.get("/")
                return
            except (OSError, http.client.HTTPException):
                if self._process.poll() is not None or time.monotonic() > end:
                    self.stop()
                    said = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise BenchmarkFailed(f"{self.kind} did not start:\n{said}") from None
                time.sleep(0.05)

    def get(self, path: str, cookie: str = "") -> tuple[int, bytes, str]:
        """One request: status, body, and the cookie that came, as it is to be sent back."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=40)
        try:
            connection.request("GET", path, headers={"Cookie": cookie} if cookie else {})
            response = connection.getresponse()
            body = response.read()
            came = (response.getheader("set-cookie") or "").partition(";")[0]
            return response.status, body, came
        finally:
            connection.close()

    def cookies(self, path: str, count: int) -> list[str]:
        """Cookies of so many new sessions."""
        answers = [self.get(path) for _ in range(count)]
        if any(status != 200 or not cookie for status, _, cookie in answers):
            raise BenchmarkFailed(f"{self.kind}{path} answered {answers[0][0]} without a session")
        return [cookie for _, _, cookie in answers]


@dataclass(frozen=True)
class Load:
    """One kind of request to one server.

    Attributes:
        name: for tables.
        path: what is asked for.
        cookies: a file with a cookie a line, used in turns; a line "-" is none.
        size: how many lines it has.
    """

    name: str
    server: Server
    path: str
    cookies: Path
    size: int

    @classmethod
    def of(cls, name: str, server: Server, path: str, cookies: Iterable[str], folder: Path) -> Load:
        lines = list(cookies) or ["-"]
        file = folder / (re.sub(r"\W+", "-", name) + f".{server.port}.cookies")
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return cls(name, server, path, file, len(lines))


@dataclass(frozen=True)
class Cost:
    """Of one round.

    Attributes:
        cpu: microseconds of the server's CPU time a request.
        wall: microseconds between request and answer, median.
        rate: requests a second.
        store: microseconds of CPU time a request in another process that keeps the sessions.
    """

    cpu: float
    wall: float
    rate: float
    store: float = 0.0


class Wrk:
    """wrk beside a server; the server's CPU time over a counted number of requests.

    Args:
        store: process id of the server that keeps the sessions, whose CPU time is to be told too.
    """

    def __init__(self, folder: Path, *, store: int | None = None) -> None:
        self._store = store
        found = shutil.which("wrk")
        if found is None:
            raise BenchmarkFailed("wrk is not on PATH; make bench installs it")
        self._wrk = found
        self._script = folder / "load.lua"
        self._script.write_text(_SCRIPT, encoding="utf-8")
        self._runs = 0

    def run(self, load: Load, *, connections: int, seconds: float) -> Cost:
        self._runs += 1
        start = self._runs * 7919 % load.size  # not the same few sessions in each round
        url = f"http://127.0.0.1:{load.server.port}/"
        command = [self._wrk, "-t1", f"-c{connections}", f"-d{seconds:g}s", "--latency"]
        command += ["-s", str(self._script), url, "--", load.path, str(load.cookies), str(start)]
        pids = [load.server.pid, *([self._store] if self._store else [])]
        before = [cpu_seconds(pid) for pid in pids]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        used = [cpu_seconds(pid) - at for pid, at in zip(pids, before, strict=True)]
        said = json.loads(output.splitlines()[-1])
        if said["failed"] or said["requests"] < 10:
            raise BenchmarkFailed(f"{load.name}: {said['failed']} of {said['requests']} failed")
        cpu, *store = [seconds / said["requests"] * 1e6 for seconds in used]
        return Cost(cpu, said["median"], said["requests"] / said["seconds"], *store)

    def in_turns(
        self,
        loads: Sequence[Load],
        *,
        connections: int,
        rounds: int,
        seconds: int,
        tick: Callable[[], None],
    ) -> dict[str, list[Cost]]:
        """Rounds of all loads in turns, after one that does not count."""
        costs: dict[str, list[Cost]] = {load.name: [] for load in loads}
        for number in range(rounds + 1):
            for load in loads:
                cost = self.run(load, connections=connections, seconds=seconds)
                if number:
                    costs[load.name].append(cost)
                tick()
        return costs
