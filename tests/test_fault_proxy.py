"""The proxy fails as it is told, changes no byte, and is mended when told so."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from itertools import islice

import pytest

from gridsession.testing import Fault, FaultProxy, random_faults
from gridsession.testing.fault_proxy import ProxiedConnection
from gridsession.testing.faults import KINDS, Direction, Kind
from tests.provider.harness import in_loop, until

LOOPS = pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
SILENCE = 0.05  # seconds for which nothing comes


class Echo:
    """A server that answers what it hears, and says `bye` where a client has said all it had to."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended: list[type[Exception] | None] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                self.heard += data
                writer.write(data)
                await writer.drain()
            writer.write(b"bye")
            await writer.drain()
            self.ended.append(None)
        except OSError as error:
            self.ended.append(type(error))
        finally:
            writer.close()


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def says(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def hears(self, number: int) -> bytes:
        return await self.reader.readexactly(number)

    async def hears_nothing(self) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(SILENCE):
                await self.reader.read(1)


class Place:
    """A server, a proxy before it, and clients."""

    def __init__(self, echo: Echo, proxy: FaultProxy, stack: contextlib.AsyncExitStack) -> None:
        self.echo, self.proxy, self._stack = echo, proxy, stack

    async def client(self) -> Client:
        reader, writer = await asyncio.open_connection(self.proxy.host, self.proxy.port)
        self._stack.callback(writer.close)
        return Client(reader, writer)

    async def talking(self) -> tuple[Client, ProxiedConnection]:
        """A client that was answered once, and its connection."""
        client = await self.client()
        await client.says(b"hello")
        assert await client.hears(5) == b"hello"
        return client, self.proxy.connections[-1]


@contextlib.asynccontextmanager
async def a_place() -> AsyncIterator[Place]:
    async with contextlib.AsyncExitStack() as stack:
        echo = Echo()
        server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
        stack.callback(server.close)
        port = server.sockets[0].getsockname()[1]
        proxy = await stack.enter_async_context(FaultProxy("127.0.0.1", port))
        yield Place(echo, proxy, stack)


@LOOPS
@in_loop
async def test_bytes_pass_unchanged_and_ends_too(loop: str) -> None:
    async with a_place() as place:
        client, connection = await place.talking()
        assert connection.source is not None
        sent = os.urandom(3 << 20)
        heard, _ = await asyncio.gather(client.hears(len(sent)), client.says(sent))
        assert heard == sent
        client.writer.write_eof()
        assert await client.reader.read() == b"bye"  # the other direction went on, then ended
        await until(lambda: not place.proxy.connections)
        assert place.echo.ended == [None]
        assert place.proxy.accepted == 1


@in_loop
async def test_a_delay_counts_each_way_and_keeps_the_order() -> None:
    async with a_place() as place:
        client, _ = await place.talking()
        delays = iter([0.06, 0.0, 0.0, 0.06, 0.0, 0.0, *[0.0] * 20])
        place.proxy.delay = lambda: next(delays)
        loop = asyncio.get_running_loop()
        began = loop.time()
        for part in (b"one", b"two", b"three"):
            await client.says(part)
            await asyncio.sleep(0.005)
        assert await client.hears(11) == b"onetwothree"
        assert loop.time() - began >= 0.06


@LOOPS
@in_loop
async def test_a_cut_resets_both_ends(loop: str) -> None:
    async with a_place() as place:
        client, _ = await place.talking()
        other, _ = await place.talking()
        place.proxy.connections[0].cut()
        with pytest.raises(ConnectionResetError):
            await client.hears(1)
        await until(lambda: place.echo.ended == [ConnectionResetError])
        await other.says(b"still")
        assert await other.hears(5) == b"still"
        place.proxy.cut()
        with pytest.raises(ConnectionResetError):
            await other.hears(1)
        assert place.proxy.connections == []


@pytest.mark.parametrize("direction", ["up", "down"])
@in_loop
async def test_a_cut_within_lets_half_of_a_piece_through(direction: Direction) -> None:
    async with a_place() as place:
        client, connection = await place.talking()
        connection.cut_within(direction)
        await client.says(b"12345678")
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)) as told:
            await client.hears(8)
        await until(lambda: len(place.echo.ended) == 1)
        if direction == "up":
            assert place.echo.heard == b"hello1234"
        else:
            assert place.echo.heard == b"hello12345678"
            assert isinstance(told.value, asyncio.IncompleteReadError)
            assert told.value.partial == b"1234"


@pytest.mark.parametrize("direction", ["up", "down"])
@in_loop
async def test_one_direction_frozen_is_thawed_with_nothing_lost(direction: Direction) -> None:
    async with a_place() as place:
        client, _ = await place.talking()
        place.proxy.freeze(direction)
        await client.says(b"one")
        await client.hears_nothing()
        assert place.echo.heard == (b"hello" if direction == "up" else b"helloone")
        late = await place.client()  # new connections are frozen, too
        await late.says(b"late")
        await late.hears_nothing()
        place.proxy.thaw()
        await client.says(b"two")
        assert await client.hears(6) == b"onetwo"
        assert await late.hears(4) == b"late"


@in_loop
async def test_one_connection_frozen_leaves_the_others_alone() -> None:
    async with a_place() as place:
        frozen, connection = await place.talking()
        other, _ = await place.talking()
        connection.freeze()
        await frozen.says(b"kept")
        await other.says(b"passes")
        assert await other.hears(6) == b"passes"
        await frozen.hears_nothing()
        connection.thaw()
        assert await frozen.hears(4) == b"kept"


@LOOPS
@in_loop
async def test_a_sender_into_what_is_frozen_has_to_wait(loop: str) -> None:
    async with a_place() as place:
        client, _ = await place.talking()
        place.proxy.freeze("up")
        sent = os.urandom(16 << 20)
        saying = asyncio.create_task(client.says(sent))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await asyncio.shield(saying)
        place.proxy.thaw()
        heard, _ = await asyncio.gather(client.hears(len(sent)), saying)
        assert heard == sent


@in_loop
async def test_a_partition_swallows_what_was_there_and_holds_up_what_comes() -> None:
    async with a_place() as place:
        before, connection = await place.talking()
        place.proxy.partition()
        await before.says(b"lost")
        during = await place.client()
        await during.says(b"waits")
        await during.hears_nothing()
        place.proxy.heal()
        assert await during.hears(5) == b"waits"
        await before.hears_nothing()
        assert connection.is_lost
        before.writer.close()
        await asyncio.sleep(SILENCE)
        assert place.echo.heard == b"hellowaits"
        assert place.echo.ended == []  # nobody told the server of its end


@LOOPS
@in_loop
async def test_refused_and_dropped_connections(loop: str) -> None:
    async with a_place() as place:
        client, _ = await place.talking()
        port = place.proxy.port
        await place.proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await place.client()
        await client.says(b"open")  # what is open stays so
        assert await client.hears(4) == b"open"
        await place.proxy.admit()
        assert place.proxy.port == port
        place.proxy.drops = True
        dropped = await place.client()
        with pytest.raises(ConnectionResetError):
            await dropped.hears(1)
        place.proxy.drops = False
        await place.talking()


@in_loop
async def test_a_server_that_is_away_resets_its_clients() -> None:
    async with a_place() as place:
        server = await asyncio.start_server(place.echo.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        async with FaultProxy("127.0.0.1", port) as proxy:
            reader, writer = await asyncio.open_connection(proxy.host, proxy.port)
            with pytest.raises(ConnectionResetError):
                await reader.readexactly(1)
            writer.close()


@LOOPS
@in_loop
async def test_closed_twice_and_nothing_is_left(loop: str) -> None:
    async with a_place() as place:
        client, _ = await place.talking()
        place.proxy.partition()
        await place.client()  # it waits to be led on
        await place.proxy.close()
        await place.proxy.close()
        assert place.proxy.connections == []
        with pytest.raises(ConnectionResetError):
            await client.hears(1)
        with pytest.raises(ConnectionRefusedError):
            await place.client()


def test_one_seed_one_series_of_faults() -> None:
    first = list(islice(random_faults(7, pause=0.5, longest=2.0), 500))
    assert first == list(islice(random_faults(7, pause=0.5, longest=2.0), 500))
    assert first != list(islice(random_faults(8, pause=0.5, longest=2.0), 500))
    assert {fault.kind for fault in first} == set(KINDS)
    assert {fault.directions for fault in first} == {("up",), ("down",), ("up", "down")}
    assert all(0 <= fault.seconds <= 2.0 and 0 <= fault.after <= 5.0 for fault in first)
    assert 0.4 < sum(fault.after for fault in first) / len(first) < 0.6
    assert {x.kind for x in islice(random_faults(7, kinds=("cut",)), 50)} == {"cut"}


@pytest.mark.parametrize("kind", KINDS)
@in_loop
async def test_an_attack_disturbs_and_is_mended_at_its_end(kind: Kind) -> None:
    """A client that keeps asking is disturbed by each kind of fault, and works after it."""
    async with a_place() as place:
        loop = asyncio.get_running_loop()
        client, _ = await place.talking()
        slow = 0
        # One after the other, without pause and without end: the first is never over.
        fault = Fault(0.02, kind, 30.0, ("up",), 0.0)
        async with place.proxy.attacked(iter([fault])) as begun:
            await until(lambda: begun == [fault])
            began = loop.time()
            try:
                async with asyncio.timeout(0.3):
                    for _ in range(5):
                        await client.says(b"more")
                        await client.hears(4)
            except (OSError, TimeoutError, asyncio.IncompleteReadError):
                slow += 1
            slow += loop.time() - began > 0.1
        assert slow
        await place.talking()
