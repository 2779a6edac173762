"""Promise 9 under real servers: whatever goes wrong, nothing secret is written or answered.

Each logger says all that it has to say, the event loop is in debug mode and tells each callback
with its arguments. Secrets are planted wherever a client or an operator can put one.
"""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import urllib.parse
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from gridsession.grids import open_grid
from gridsession.grids.contract import NewRecord
from gridsession.identity import HANDLE_BYTES, ID_BYTES, new_id
from tests.farm.client import SECONDS, request_bytes, run, until
from tests.farm.servers import STOP_SECONDS, Farm, Server, farm_in

PAYLOAD = "pl4yl04d-m4rk3r"  # its user is this at example.com
PASSWORD = "p4ssw0rd-m4rk3r"
TOKEN = "t0k3n-m4rk3r"  # in a path, behind the first segment
QUERY = "qu3ry-m4rk3r"
INVENTED = "1nv3nt3d-m4rk3r"  # in a cookie that is no session id
UVICORN = (
    *("uvicorn", "tests.farm.attacked:app", "--port", "PORT"),
    *("--no-access-log", "--log-level", "debug"),
)
HYPERCORN = (
    *("hypercorn", "-b", "127.0.0.1:PORT", "--log-level", "DEBUG"),
    "tests.farm.attacked:app",
)
SERVERS = pytest.mark.parametrize(
    "command",
    [
        (*UVICORN, "--http", "h11", "--loop", "asyncio"),
        (*UVICORN, "--http", "httptools"),
        HYPERCORN,
    ],
    ids=["uvicorn-asyncio", "uvicorn-uvloop", "hypercorn"],
)


class Visitor:
    """Asks a server, and keeps all that is answered, but for the ids that are its own to know."""

    def __init__(self, farm: Farm, server: Server) -> None:
        self.farm = farm
        self.server = server
        self.ids: list[str] = []
        self.answers: list[str] = []

    async def ask(self, how: str, cookie: str = "", place: str = "reset") -> int:
        """The status. Args: `how` a request of `tests.farm.attacked` is to fail."""
        target = f"/{place}/{TOKEN}/{how}{'&' if '?' in how else '?'}q={QUERY}"
        async with asyncio.timeout(SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            writer.write(request_bytes("POST", target, cookie))
            raw = (await reader.read()).decode("latin-1")
            writer.close()
        for line in raw.partition("\r\n\r\n")[0].split("\r\n"):
            if line.lower().startswith("set-cookie: session="):
                self.ids.append(line.partition("=")[2].partition(";")[0])
            else:
                self.answers.append(line)
        self.answers.append(raw.partition("\r\n\r\n")[2])
        return int(raw.split()[1])

    async def session(self) -> str:
        assert await self.ask("store") == 200
        return self.ids[-1]

    async def damaged(self, payload: bytes) -> str:
        """A session whose stored bytes nobody can read."""
        self.ids.append(new_id(os.urandom(ID_BYTES)))
        handle, secret = halves(self.ids[-1])
        async with open_grid(f"embedded://{self.farm.grid}?max_size=16MiB") as grid:
            new = NewRecord(7, sha256(secret).digest(), payload, 100.0, None, PAYLOAD)
            await grid.create(sha256(handle).digest(), new)
        return self.ids[-1]


def halves(session_id: str) -> tuple[bytes, bytes]:
    raw = base64.urlsafe_b64decode(session_id)
    return raw[:HANDLE_BYTES], raw[HANDLE_BYTES:]


def spellings(secret: str) -> set[str]:
    return {secret, repr(secret)[1:-1], urllib.parse.quote(secret), secret.encode().hex()}


def spellings_of_id(session_id: str) -> Iterable[str]:
    handle, secret = halves(session_id)
    # Sixteen characters of the text: one of three bytes each begin at the same place.
    yield from (session_id, session_id[:20], session_id[-20:], session_id[24:44])
    for half in (handle, secret):
        yield from (half.hex(), repr(half)[2:-1], str(list(half))[1:-1])
        yield base64.b64encode(half).decode().rstrip("=")[:-1]


async def provoke(visitor: Visitor) -> None:
    """Each error that a client, a handler or a grid can bring about."""
    ask = visitor.ask
    for how, status in (("type", 500), ("large", 500), ("raise", 500), ("stream", 200)):
        assert await ask(how, await visitor.session()) == status
    assert await ask("shown", await visitor.session()) == 200
    assert await ask("task", await visitor.session()) == 200
    for how in ("nested", "stream", "other"):
        assert await ask(how, await visitor.session(), "ro") in (200, 500)
    assert await ask("shown", await visitor.session(), "none") == 500
    # Cookies: two of them, one with a slip, one of a stranger, one with the wrong secret.
    mine = await visitor.session()
    assert await ask("other", f"{mine}; session={INVENTED}") == 200
    assert await ask("other", mine[:-1] + "!") == 200
    assert await ask("other", INVENTED * 9) == 200
    assert await ask("other", mine[:22] + new_id(bytes(ID_BYTES))[22:]) == 200
    # What is stored cannot be read.
    for garbage in (PAYLOAD.encode(), b"\x01\x00" + PAYLOAD.encode(), b"\x09" + PAYLOAD.encode()):
        assert await ask("other", await visitor.damaged(garbage)) == 500


async def provoke_by_time(visitor: Visitor) -> None:
    """Queue full; execution timeout, and the lock lost by it; a wait that was too long."""
    farm, cookie = visitor.farm, await visitor.session()
    held = asyncio.create_task(visitor.ask("gated?name=held", cookie, f"{TOKEN}@{TOKEN}"))
    await until("the holder", (farm.marks / "in-held").exists)
    waiting: list[asyncio.Task[int]] = []
    while "wait for this session already" not in visitor.server.said:
        waiting.append(asyncio.create_task(visitor.ask("other", cookie)))
        await asyncio.sleep(0.01)
    assert {await x for x in waiting} <= {503, 200}
    while await visitor.ask("other", cookie) != 200:  # until the lease has run out
        assert not held.done()
    farm.mark("go-held")
    assert await held == 500


async def provoke_without_grid(visitor: Visitor) -> None:
    """The grid is away before the handler, and at its commit."""
    farm, cookie, other = visitor.farm, await visitor.session(), await visitor.session()
    held = asyncio.create_task(visitor.ask("gated?name=away", other))
    await until("the holder", (farm.marks / "in-away").exists)
    stuck = farm.run_helper("tests.farm.stuck", str(farm.grid))
    await until(
        "a process in the gate", lambda: psutil.Process(stuck.pid).status() == psutil.STATUS_STOPPED
    )
    assert await visitor.ask("other", cookie) == 503
    farm.mark("go-away")
    assert await held == 500
    assert await visitor.ask("store") == 500
    os.kill(stuck.pid, signal.SIGCONT)
    assert await asyncio.to_thread(stuck.wait, STOP_SECONDS) == 0


@SERVERS
def test_promise_9_nothing_secret_is_written_or_answered(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    options = {
        "access": {"/ro/*": "read_only", "/none/*": "none"},
        "max_payload_bytes": 2_000,
        "request_queue_limit_per_session": 2,
        "lock_wait_timeout": 0.3,
        "execution_timeout": 0.5,
        "lock_lease": 0.3,
        "grid_timeout": 0.3,
    }
    with farm_in(tmp_path, **options) as farm:
        server = farm.start(*command, env=debugging(PAYLOAD))
        visitor = Visitor(farm, server)

        async def main() -> None:
            await provoke(visitor)
            await provoke_by_time(visitor)
            await provoke_without_grid(visitor)

        run(main())
        server.stop()
        said = server.said
        for error in EXPECTED:  # what was to be looked through is there
            assert error in said, error
        texts = [said, *visitor.answers]
        for session_id in visitor.ids:
            for spelling in spellings_of_id(session_id):
                assert not [text for text in texts if spelling in text]
        for secret in (PAYLOAD, TOKEN, QUERY, INVENTED):
            for spelling in spellings(secret):
                assert not [line for line in said.splitlines() if spelling in line]
                assert not [answer for answer in visitor.answers if spelling in answer]
        check_disk(farm, visitor.ids)


EXPECTED = [
    "DEBUG:tests.farm.attacked:all is told",
    "Executing <",
    "gridsession.errors.SessionTypeError",
    "gridsession.errors.SessionTooLarge",
    "gridsession.errors.SessionReadOnly",
    "gridsession.errors.SessionNotAvailable",
    "gridsession.errors.SessionFormatError",
    "gridsession.errors.SessionLockLost",
    "a request's session was not stored: the embedded grid was busy",
    "ZeroDivisionError",
    "wait for this session already",
    "has held its lock for the execution_timeout",
    "is inside a transaction",
    "came 2 times",
    "gave up after",
    "and that is not stored",
]


def check_disk(farm: Farm, ids: list[str]) -> None:
    """No session id is stored, nor a half of one: only hashes are."""
    stored = b"".join(path.read_bytes() for path in farm.grid.rglob("*") if path.is_file())
    assert PAYLOAD.encode() in stored  # these are the files in which they would be
    assert any(sha256(halves(x)[0]).digest() in stored for x in ids)
    for session_id in ids:
        handle, secret = halves(session_id)
        for part in (handle, secret, session_id.encode()[:20], session_id.encode()[-20:]):
            assert part not in stored


def debugging(secret: str) -> dict[str, str]:
    return {"FARM_DEBUG": "1", "FARM_SECRET": secret}


@pytest.mark.parametrize(
    "connection_string",
    [
        f"unknown://ann:{PASSWORD}@host/0",
        f"embedded://ann:{PASSWORD}@/grid",
        f"unknown://host/0?password={PASSWORD}",
        f"bootstrapGateways=h1:1;db=x;password={PASSWORD}",
    ],
)
@pytest.mark.parametrize("lifespan", ["on", "off"])
def test_promise_9_no_password_of_a_refused_connection_string_is_shown(
    tmp_path: Path, connection_string: str, lifespan: str
) -> None:
    with farm_in(tmp_path, connection_string=connection_string) as farm:
        server = farm.launch(*UVICORN, "--lifespan", lifespan, env=debugging(PAYLOAD))
        visitor = Visitor(farm, server)
        if lifespan == "on":
            server.process.wait(STOP_SECONDS)
        else:
            server.wait_listening()
            assert run(visitor.ask("store", INVENTED)) == 500
            server.stop()
        assert "sessions cannot work as they are set: " in server.said
        for secret in (PASSWORD, TOKEN, INVENTED):
            for spelling in spellings(secret):
                assert spelling not in server.said
                assert not [answer for answer in visitor.answers if spelling in answer]
