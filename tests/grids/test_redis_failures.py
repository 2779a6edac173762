"""What a server may answer, or fail to: what callers are told, at the start and in operation."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import logging
import socket
import subprocess
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from gridsession import GridUnavailable, SettingsError
from gridsession.grids.contract import (
    Claim,
    Committed,
    Conflict,
    Found,
    Granted,
    Locked,
    NewRecord,
    Released,
    Version,
)
from gridsession.grids.redis import RedisGrid
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim, expect, payload_of
from tests.grids.redis_troubles import ALL, PASSWORD, TROUBLES, USER, Trouble, cut_all
from tests.grids.resp_server import Answer, RespServer, hello
from tests.provider.harness import in_loop
from tests.redis_server import PROGRAM, RedisServer, free_port

KEY, SECRET, TOKEN = b"key-never-shown!" * 2, b"secret-not-shown" * 2, b"token-not-shown!"
PAYLOAD = b"payload-never-shown" * 60
HIDDEN = (PASSWORD, "key-never", "secret-not", "token-not", "payload-never")
COMES_BACK_IN = 1.5  # seconds; a second is promised, and this machine may be busy
TIMEOUT = 0.5  # seconds: grid_timeout of the grids here


def grid_at(url: str, *, password: str = "") -> RedisGrid:
    if password:
        url = url.replace("redis://", f"redis://{USER}:{password}@")
    return RedisGrid.from_connection_string(url, timeout=TIMEOUT)


def check_hidden(error: BaseException, logged: str) -> None:
    """Neither an error, however it is shown, nor the log tells what nobody may see."""
    shown = "".join(traceback.format_exception(error)) + repr(error) + logged
    assert [word for word in HIDDEN if word in shown] == [], shown


class Caller:
    """One session, whose every byte would be seen in a text that repeats what was asked."""

    def __init__(self, grid: RedisGrid) -> None:
        self.grid = grid
        self.claim = Claim(TOKEN, "GET /cart", 30.0, 50)

    async def create(self) -> None:
        new = NewRecord(7, SECRET, PAYLOAD, 1000.0, None, None)
        expect(Committed, await self.grid.create(KEY, new, self.claim))

    async def read(self) -> bytes:
        return payload_of(expect(Found, await self.grid.read(KEY, SECRET)).snapshot)

    async def acquire(self) -> None:
        expect(Granted, await self.grid.acquire(KEY, SECRET, self.claim))

    async def commit(self) -> None:
        change = a_change(PAYLOAD)
        expect(Committed, await self.grid.commit(KEY, TOKEN, change, release=False))

    async def commit_if(self) -> None:
        outcome = await self.grid.commit_if(KEY, SECRET, Version(1, 7), a_change(PAYLOAD))
        assert isinstance(outcome, (Committed, Conflict, Locked))

    async def known(self) -> None:
        expect(Found, await self.grid.read(KEY, SECRET, known=Version(1, 7)))

    async def renew(self) -> None:
        assert await self.grid.renew([(KEY, TOKEN)], 30.0) == [True]

    async def touch(self) -> None:
        assert await self.grid.touch(KEY)

    async def release(self) -> None:
        expect(Released, await self.grid.release(KEY, TOKEN))

    async def sweep(self) -> None:
        await self.grid.sweep(10)

    async def another(self) -> None:
        new = NewRecord(8, SECRET, PAYLOAD, 1000.0, None, None)
        await self.grid.create(KEY[::-1], new)


async def told(call: Callable[[], Awaitable[object]], kind: type[Exception]) -> Exception:
    """The error of a call that has to fail, and not with more than it may take."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(kind) as raised:
        await call()
    assert loop.time() - began < 1.25 * TIMEOUT + 0.25  # for a busy machine
    return raised.value


async def well_again(call: Callable[[], Awaitable[object]]) -> None:
    """Whatever was wrong is over: the same grid works again by itself."""
    loop = asyncio.get_running_loop()
    over_at = loop.time()
    while True:
        try:
            await call()
        except (GridUnavailable, SettingsError):  # as long as nobody has tried again
            assert loop.time() - over_at < COMES_BACK_IN
            await asyncio.sleep(0.01)
        else:
            return


BY_NAME = pytest.mark.parametrize("name", TROUBLES)


@contextlib.asynccontextmanager
async def server_for(
    trouble: Trouble, folder: Path
) -> AsyncIterator[tuple[RedisServer, RedisGrid]]:
    """A server without trouble yet, and a grid that is not opened."""
    with RedisServer(folder, **trouble.options) as server:
        rules = ("on", f">{PASSWORD}", "+@all", "~*", "allchannels")
        server.admin.execute_command("ACL", "SETUSER", USER, *rules)
        grid = grid_at(server.url, password=PASSWORD if trouble.as_user else "")
        yield server, grid
        await grid.close()


@BY_NAME
@in_loop
async def test_at_the_start(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trouble = TROUBLES[name]
    async with server_for(trouble, tmp_path) as (server, grid):
        with trouble.on(server):
            if trouble.at_start is None:
                await grid.open()
            else:
                error = await told(grid.open, trouble.at_start)
                assert f"{grid.where} {trouble.start_words or trouble.words}" in str(error)
                check_hidden(error, caplog.text)
        await well_again(grid.open)
        await Caller(grid).create()


@BY_NAME
@in_loop
async def test_in_operation(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trouble = TROUBLES[name]
    for logger in ("gridsession", "asyncio"):
        caplog.set_level(logging.DEBUG, logger)
    texts = []
    async with server_for(trouble, tmp_path) as (server, grid):
        await grid.open()
        caller = Caller(grid)
        await caller.create()
        with trouble.on(server):
            for call in ALL:
                if call in trouble.fails:
                    error = await told(getattr(caller, call), trouble.kind)
                    check_hidden(error, caplog.text)
                    texts.append(str(error))
                elif call != "release":  # the lock is wanted below
                    await getattr(caller, call)()
        assert all(text.startswith(grid.where) for text in texts)
        said = [text for text in texts if text.startswith(f"{grid.where} {trouble.words}")]
        assert said or not trouble.fails
        await well_again(caller.renew)
        assert await caller.read() == PAYLOAD
        await caller.commit()
        await caller.release()


# -- what is wrong from the start ---------------------------------------------------------------


async def refused_at_start(grid: RedisGrid, kind: type[Exception], words: str) -> None:
    error = await told(grid.open, kind)
    assert grid.where in str(error)
    assert words in str(error)
    check_hidden(error, repr(grid))
    await grid.close()


@in_loop
async def test_a_database_that_is_not_there(tmp_path: Path) -> None:
    with RedisServer(tmp_path, databases="4") as server:
        grid = grid_at(server.url.replace("/0", "/4"))
        await refused_at_start(grid, SettingsError, "has no database of that number: correct db")


@in_loop
async def test_a_node_of_a_cluster(tmp_path: Path) -> None:
    options = {"cluster_enabled": "yes", "cluster_port": str(free_port())}
    with RedisServer(tmp_path, **options) as server:
        grid = grid_at(server.url)
        await refused_at_start(
            grid, SettingsError, "is a node of a Cluster, for which this release"
        )


@pytest.fixture
def sentinel(tmp_path: Path) -> Iterator[str]:
    port = free_port()
    settings = f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nlogfile {tmp_path}/log\n"
    (tmp_path / "sentinel.conf").write_text(settings)
    process = subprocess.Popen(
        [PROGRAM, str(tmp_path / "sentinel.conf"), "--sentinel"], stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(1000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            threading.Event().wait(0.01)
        yield f"redis://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@in_loop
async def test_a_sentinel(sentinel: str) -> None:
    words = "is a Sentinel, not a server that keeps data"
    await refused_at_start(grid_at(sentinel), SettingsError, words)


@in_loop
async def test_a_server_of_something_else() -> None:
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    ) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            grid = grid_at(f"redis://127.0.0.1:{server.server_port}", password=PASSWORD)
            await refused_at_start(grid, GridUnavailable, "does not speak Redis's protocol")
        finally:
            server.shutdown()
            serving.join()


@in_loop
async def test_a_machine_that_takes_connections_and_never_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        grid = grid_at(f"redis://127.0.0.1:{listener.getsockname()[1]}")
        await refused_at_start(grid, GridUnavailable, f"did not answer within {TIMEOUT:g} s")


@in_loop
async def test_a_host_that_has_no_address() -> None:
    grid = grid_at("redis://nowhere.invalid:6379", password=PASSWORD)
    await refused_at_start(grid, GridUnavailable, "the name of the host cannot be resolved")


@in_loop
async def test_a_host_whose_name_is_too_long_to_be_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    grid = grid_at(f"redis://{'a' * 64}.invalid:6379", password=PASSWORD)
    await refused_at_start(grid, GridUnavailable, "the name of the host cannot be resolved")
    assert "Traceback" not in caplog.text


@in_loop
async def test_a_socket_that_is_not_there(tmp_path: Path) -> None:
    grid = grid_at(f"redis+unix://{tmp_path}/none")
    await refused_at_start(grid, GridUnavailable, "there is no such socket")


# What a server says that is none of ours: Redis 5 repeats the password that it was given.
WHOM_NOBODY_CAN_USE = {
    "Redis 6": ({b"HELLO": hello("6.2.14")}, "is Redis 6.2.14; gridsession needs 7.0 or newer"),
    "a version of words": ({b"HELLO": hello("unstable")}, "is Redis unstable; gridsession needs"),
    "no RESP3": (
        {b"HELLO": b"-NOPROTO unsupported protocol version\r\n"},
        "does not speak RESP3; gridsession needs Redis 7.0 or newer",
    ),
}


@pytest.mark.parametrize("name", WHOM_NOBODY_CAN_USE)
@in_loop
async def test_a_server_that_nobody_can_use(name: str) -> None:
    replies, words = WHOM_NOBODY_CAN_USE[name]
    async with RespServer(replies) as server:
        await refused_at_start(grid_at(server.url, password=PASSWORD), SettingsError, words)


@in_loop
async def test_a_server_that_does_not_know_hello_repeats_the_password_and_we_do_not() -> None:
    async with RespServer() as server:
        del server.replies[b"HELLO"]
        grid = grid_at(server.url, password=PASSWORD)
        await refused_at_start(grid, SettingsError, "is Redis 6 or older; gridsession needs 7.0")
        assert PASSWORD.encode() in server.received[0]


DENIED = b"-DENIED Redis is running in protected mode because protected mode is enabled\r\n"


@in_loop
async def test_protected_mode() -> None:
    async with RespServer(greeting=DENIED, hangs_up=True) as server:
        words = "is in protected mode and answers only its own machine: set a password or bind it"
        await refused_at_start(grid_at(server.url), SettingsError, words)


@pytest.mark.parametrize(
    "reply",
    [b"+OK\r\n", b"*2\r\n$6\r\nserver\r\n$5\r\nredis\r\n", b"_\r\n", b"%0\r\n", b"#f\r\n"],
    ids=["OK", "a list", "nothing", "an empty map", "false"],
)
@in_loop
async def test_a_greeting_that_makes_no_sense(
    reply: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with RespServer({b"HELLO": reply}) as server:
        await refused_at_start(grid_at(server.url), GridUnavailable, "")
    assert "Traceback" not in caplog.text


# -- what a server may answer in operation ------------------------------------------------------

ODD: dict[str, tuple[Answer, str]] = {
    "UNBLOCKED": (
        b"-UNBLOCKED force unblock from blocking operation, instance state changed\r\n",
        "was made a replica meanwhile",
    ),
    "DENIED": (DENIED, "is in protected mode and answers only its own machine"),
    "MOVED": (b"-MOVED 3999 127.0.0.1:6381\r\n", "belongs to a Cluster"),
    "CLUSTERDOWN": (b"-CLUSTERDOWN The cluster is down\r\n", "belongs to a Cluster that is down"),
    "WRONGTYPE": (b"-WRONGTYPE Operation against a key\r\n", "holds something else under a name"),
    "NOSCRIPT": (b"-NOSCRIPT No matching script.\r\n", "forgets scripts as soon as it has them"),
    "a code of tomorrow": (b"-TOMORROW what " + PAYLOAD + b"\r\n", "answered: TOMORROW"),
    "a code without words": (b"-TOMORROW\r\n", "answered: TOMORROW"),
    "no code": (b"-\r\n", "answered an error without a code"),
    "a secret for a code": (b"-" + SECRET + b"\r\n", "answered an error without a code"),
    "bytes that are no text": (b"-ERR \xff\xfe\r\n", "answered: ERR"),
    "an error that repeats": (
        lambda words: b"-ERR value is not '" + words[-1] + b"' nor a float\r\n",
        "answered: ERR value is not",
    ),
}


@pytest.mark.parametrize("name", ODD)
@in_loop
async def test_an_error_reply(name: str, caplog: pytest.LogCaptureFixture) -> None:
    answer, words = ODD[name]
    async with RespServer() as server:
        grid = grid_at(server.url)
        await grid.open()
        caller = Caller(grid)
        server.replies |= {b"EVALSHA": answer, b"EVAL": answer}
        for call in ("read", "known", "acquire", "commit", "commit_if", "release", "another"):
            error = await told(getattr(caller, call), GridUnavailable)
            assert str(error).startswith(f"{grid.where} {words}")
            check_hidden(error, caplog.text)
        server.replies |= {b"EVALSHA": b":0\r\n", b"EVAL": b":0\r\n"}  # OK
        await well_again(caller.release)
        await grid.close()


@pytest.mark.parametrize(
    "reply",
    [b"_\r\n", b"+OK\r\n", b":77\r\n", b"*0\r\n", b"*2\r\n:1\r\n+OK\r\n", b"$0\r\n\r\n", b"#f\r\n"],
    ids=["nothing", "OK", "a number", "an empty list", "a short list", "no text", "false"],
)
@pytest.mark.parametrize(
    "call", ["read", "known", "acquire", "create", "commit", "commit_if", "release", "touch"]
)
@in_loop
async def test_a_reply_that_no_script_of_ours_gives_is_a_failure_and_no_session_is_lost(
    call: str, reply: bytes
) -> None:
    # A proxy that answers in the server's stead, or whatever stands where it stood.
    async with RespServer() as server:
        grid = grid_at(server.url)
        await grid.open()
        server.replies |= {b"EVALSHA": reply, b"EVAL": reply}
        error = await told(getattr(Caller(grid), call), GridUnavailable)
        check_hidden(error, "")
        await grid.close()


@in_loop
async def test_a_connection_cut_within_a_reply_is_made_again_and_the_call_repeated() -> None:
    async with RespServer() as server:
        grid = grid_at(server.url)
        await grid.open()

        def cut(words: list[bytes]) -> bytes:
            asyncio.get_running_loop().call_soon(server.cut)
            server.replies[b"EVALSHA"] = b":0\r\n"
            return b"*10\r\n:1\r\n$9999\r\nthe first half"

        server.replies |= {b"EVALSHA": cut}
        await Caller(grid).release()
        assert [words[0] for words in server.received[-3:]] == [b"EVALSHA", b"HELLO", b"EVALSHA"]
        await grid.close()


@pytest.mark.parametrize("garbage", [b"HTTP/1.1 200 OK\r\n\r\n", b"%1\r\n*0\r\n+x\r\n", b"*-9\r\n"])
@in_loop
async def test_garbage_ends_the_connection_and_another_is_made(
    garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with RespServer() as server:
        grid = grid_at(server.url)
        await grid.open()
        server.replies |= {b"EVALSHA": garbage, b"EVAL": garbage}
        error = await told(Caller(grid).read, GridUnavailable)
        assert "does not speak Redis's protocol" in str(error)
        server.replies |= {b"EVALSHA": b":0\r\n", b"EVAL": b":0\r\n"}
        await well_again(Caller(grid).release)
        assert "Traceback" not in caplog.text
        await grid.close()


# -- what nobody notices ------------------------------------------------------------------------


@in_loop
async def test_connections_that_are_killed_and_scripts_that_are_flushed_are_not_noticed(
    tmp_path: Path,
) -> None:
    with RedisServer(tmp_path) as server:
        grid = grid_at(server.url)
        await grid.open()
        sessions = [Visitor(grid) for _ in range(100)]
        claims = [a_claim() for _ in sessions]
        for session, claim in zip(sessions, claims, strict=True):
            await session.create(claim=claim)
        admin = server.admin
        for number in range(20):
            calls = [
                asyncio.create_task(session.commit(claim, a_change(b"%d" % number)))
                for session, claim in zip(sessions, claims, strict=True)
            ]
            await asyncio.sleep(0)  # they have been sent, or are about to be
            if number % 2:
                cut_all(server)
            else:
                admin.script_flush()
            done = await asyncio.gather(*calls)
            assert [one.version.counter for one in done] == [number + 2] * 100  # none of them twice
        assert admin.info("errorstats")["errorstat_NOSCRIPT"]["count"] >= 10
        await grid.close()
