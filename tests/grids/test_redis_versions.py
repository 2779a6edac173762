"""Versions at a Redis: what is sent of a session that is known, and fail-overs that repeat one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from gridsession.errors import GridFull, GridUnavailable
from gridsession.grids.contract import (
    Committed,
    Conflict,
    Found,
    Granted,
    QueueFull,
    Released,
    Version,
)
from gridsession.grids.redis import RedisGrid
from gridsession.testing import FaultProxy
from gridsession.testing.contract_hooks import (
    Visitor,
    a_change,
    a_claim,
    expect,
)
from tests.grids.redis_ways import opened
from tests.provider.harness import in_loop, until
from tests.redis_server import RedisServer, a_namespace, shared_server

SMALL = 1024  # bytes on the wire, both ways, for one request that finds its session unchanged
LARGE = bytes(100 * 1024)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with RedisServer(tmp_path) as alone:  # whose bytes and commands are counted
        yield alone


@contextlib.asynccontextmanager
async def grid_on(server: RedisServer, namespace: str = "shop") -> AsyncIterator[RedisGrid]:
    url = f"redis://127.0.0.1:{server.port}/0"
    grid = RedisGrid.from_connection_string(url, namespace=namespace, timeout=2.0)
    async with opened(grid):
        yield grid


def net_bytes(server: RedisServer) -> int:
    stats = server.admin.info("stats")
    return int(stats["total_net_input_bytes"]) + int(stats["total_net_output_bytes"])


def own_bytes(server: RedisServer) -> int:
    """What asking costs."""
    before = net_bytes(server)
    return net_bytes(server) - before


def name_of(grid: RedisGrid, there: Visitor) -> bytes:
    return grid.names.record(there.key)


@contextlib.contextmanager
def commands(server: RedisServer) -> Iterator[list[str]]:
    """Those that scripts gave meanwhile, in order, with their arguments."""
    given: list[str] = []
    with server.admin.monitor() as monitor:
        yield given
        server.admin.echo("over")
        while (said := monitor.next_command())["command"] != "ECHO over":
            if said["client_type"] == "lua":
                given.append(said["command"])


# -- what is sent --------------------------------------------------------------------------------


@in_loop
async def test_a_session_of_100_kib_that_is_known_takes_less_than_a_kib(
    server: RedisServer,
) -> None:
    async with grid_on(server) as grid:
        there = Visitor(grid)
        known = (await there.create(LARGE, timeout=1200.0, user="ann@example.com")).version
        claim = a_claim("POST /cart · web-3 · pid 71")
        for size, has in ((len(LARGE), None), (0, known)):
            await there.read()  # scripts are known to the server
            for _ in range(2):  # the first time it may have to learn the scripts
                before = net_bytes(server)
                got = expect(Granted, await there.acquire(claim, known=has)).snapshot
                expect(Released, await there.release(claim))
                spent = net_bytes(server) - before - own_bytes(server)
            assert len(got.payload or b"") == size
            assert size <= spent < size + SMALL
        before = net_bytes(server)
        assert expect(Found, await there.read(known=known)).snapshot.payload is None
        assert net_bytes(server) - before - own_bytes(server) < SMALL


@in_loop
async def test_a_payload_that_is_known_is_not_read_and_one_that_is_not_is_read_at_once(
    server: RedisServer,
) -> None:
    async with grid_on(server) as grid:
        there, claim = Visitor(grid), a_claim()
        there.key = b"k" * 32  # which is shown as it is
        known = (await there.create(LARGE)).version
        name = name_of(grid, there).decode()
        for has, reads in ((known, f"GETRANGE {name} 0 511"), (None, f"GET {name}")):
            for watch in (None, a_claim()):
                with commands(server) as given:
                    await there.read(watch=watch, known=has)
                assert given == ["TIME", reads]
            with commands(server) as given:
                await there.acquire(claim, known=has)
            assert given[:2] == ["TIME", reads]
            assert [words.split()[0] for words in given[2:]] == ["SETRANGE", "PEXPIREAT"]
            await there.release(claim)


# -- what is stored ------------------------------------------------------------------------------


@in_loop
async def test_promise_8_a_record_of_before_whose_counter_repeats_is_another_version() -> None:
    """A replica that had not got the last commit yet has become the primary."""
    server, namespace = shared_server(), a_namespace()
    async with grid_on(server, namespace) as grid:
        there = Visitor(grid)
        base = (await there.create(b"base")).version
        kept = server.admin.dump(name_of(grid, there))
        lost = expect(Committed, await there.commit_if(base, a_change(b"lost"))).version
        server.admin.restore(name_of(grid, there), 60_000, kept, replace=True)
        done = expect(Committed, await there.commit_if(base, a_change(b"stored"))).version
        assert (done.counter, done.token == lost.token) == (lost.counter, False)
        claim = a_claim()
        for read in (there.read(known=lost), there.acquire(claim, known=lost)):
            outcome = await read
            assert isinstance(outcome, (Found, Granted))
            assert (outcome.snapshot.payload, outcome.snapshot.version) == (b"stored", done)
        await there.release(claim)
        conflict = expect(Conflict, await there.commit_if(lost, a_change(b"upon what was lost")))
        assert (conflict.snapshot.payload, conflict.snapshot.version) == (b"stored", done)
        assert (await there.found()).payload == b"stored"


@in_loop
async def test_a_large_counter_is_compared_whole() -> None:
    server, namespace = shared_server(), a_namespace()
    async with grid_on(server, namespace) as grid:
        there = Visitor(grid)
        version = (await there.create(b"x")).version
        counter = 10**13
        set_in_head(server, name_of(grid, there), f"record[1] = {counter}")
        there_now = version._replace(counter=counter)
        assert (await there.found()).version == there_now
        for off in (-1, 1):
            near = there_now._replace(counter=counter + off)
            assert expect(Found, await there.read(known=near)).snapshot.payload == b"x"
            expect(Conflict, await there.commit_if(near, a_change(b"y")))
        assert expect(Found, await there.read(known=there_now)).snapshot.payload is None
        done = expect(Committed, await there.commit_if(there_now, a_change(b"y")))
        assert done.version.counter == counter + 1


@in_loop
async def test_a_ticket_without_a_word_on_limits_counts() -> None:
    """As those were stored before commits had tickets of their own."""
    server, namespace = shared_server(), a_namespace()
    async with grid_on(server, namespace) as grid:
        there, holder, old, commit = Visitor(grid), a_claim(), a_claim("old"), a_claim()
        commit.queue_limit = None
        await there.create(claim=holder)
        await there.queued(old)
        await there.queued(commit)
        assert head_of(server, name_of(grid, there), "#record[16][1]") == 4
        assert head_of(server, name_of(grid, there), "#record[16][2]") == 5
        expect(QueueFull, await there.acquire(a_claim(queue_limit=1)))
        assert (await there.queued(a_claim(queue_limit=2))).ahead == 2
        expect(Released, await there.release(holder))
        await there.locked(old)


@in_loop
async def test_a_shorter_deadline_is_in_the_index_before_commit_if_is_in_the_record() -> None:
    server, namespace = shared_server(), a_namespace()
    async with grid_on(server, namespace) as grid:
        there, late, watcher = Visitor(grid), a_claim(lease=0.01), a_claim()
        base = (await there.create(timeout=1000.0, claim=late)).version
        await there.read(watch=watcher)
        await asyncio.sleep(0.05)
        part, entry = grid.names.part(there.key), grid.names.entry(there.key)
        made = server.admin.zscore(part, entry)
        entered: list[float] = []
        real = grid._enter

        def enter(key: bytes, due: float, *, repeats: bool) -> Any:
            # Nothing was done yet: neither is the lapsed lock over, nor its watcher gone.
            entered.append(head_of(server, name_of(grid, there), "#record[16]"))
            assert server.admin.zscore(part, entry) == made
            return real(key, due, repeats=repeats)

        grid._enter = enter  # type: ignore[method-assign]
        done = expect(Committed, await there.commit_if(base, a_change(b"brief", timeout=10.0)))
        assert entered == [1]
        assert server.admin.zscore(part, entry) == pytest.approx(done.deadline, abs=0.5)
        assert head_of(server, name_of(grid, there), "#record[16]") == 0
        done = expect(Committed, await there.commit_if(done.version, a_change(b"x", timeout=10.0)))
        assert entered == [1]  # the index has it: one call is enough


def head_of(server: RedisServer, name: bytes, expression: str) -> Any:
    return server.admin.eval(
        "local raw = redis.call('GET', KEYS[1]) "
        f"local _, record = cmsgpack.unpack_one(raw, 5) return {expression}",
        1,
        name,
    )


def set_in_head(server: RedisServer, name: bytes, statement: str) -> None:
    server.admin.eval(
        "local raw = redis.call('GET', KEYS[1]) "
        f"local _, record = cmsgpack.unpack_one(raw, 5) {statement} "
        "redis.call('SETRANGE', KEYS[1], 5, cmsgpack.pack(record))",
        1,
        name,
    )


@in_loop
async def test_who_loses_to_a_shorter_deadline_leaves_the_index_as_it_was() -> None:
    server, namespace = shared_server(), a_namespace()
    async with grid_on(server, namespace) as grid:
        there = Visitor(grid)
        base = (await there.create(timeout=1000.0)).version
        outcomes = await asyncio.gather(
            there.commit_if(base, a_change(b"short", timeout=0.3)),
            there.commit_if(base, a_change(b"long", timeout=600.0)),
        )
        assert [type(outcome) for outcome in outcomes] == [Committed, Conflict]
        await asyncio.sleep(0.4)
        assert await grid.sweep(64) > 0
        assert server.admin.get(name_of(grid, there)) is None


# -- failures ------------------------------------------------------------------------------------


@in_loop
async def test_a_commit_if_whose_answer_is_lost_is_told_at_its_repetition() -> None:
    """By its caller: only that one can tell whether too many others have come after it."""
    server, namespace = shared_server(), a_namespace()
    async with FaultProxy("127.0.0.1", server.port) as proxy:
        url = f"redis://127.0.0.1:{proxy.port}/0"
        grid = RedisGrid.from_connection_string(url, namespace=namespace, timeout=2.0)
        async with opened(grid):
            there = Visitor(grid)
            base = (await there.create(b"old")).version
            name = name_of(grid, there)
            proxy.freeze("down")
            change = a_change(b"new")
            asked = asyncio.create_task(there.commit_if(base, change))
            await until(lambda: server.admin.get(name).endswith(b"new"))
            proxy.cut()
            proxy.thaw()
            with pytest.raises(GridUnavailable):
                await asked
            done = expect(Committed, await there.commit_if(base, change))
            assert done.version == Version(2, change.commit_token)
            assert (await there.found()).version == done.version


@in_loop
async def test_a_full_server_stores_no_commit_if(server: RedisServer) -> None:
    async with grid_on(server) as grid:
        there = Visitor(grid)
        base = (await there.create(b"old")).version
        server.admin.config_set("maxmemory", "1")
        with pytest.raises(GridFull):
            await there.commit_if(base, a_change(b"new"))
        server.admin.config_set("maxmemory", "0")
        assert (await there.found()).payload == b"old"
        expect(Committed, await there.commit_if(base, a_change(b"new")))
