"""A TCP proxy on loopback that does to connections what networks do, on demand or at random.

For tests of outages: put it between an application and its server, and let it delay, stall, cut
and refuse. It changes no byte and leaves out none but those behind a cut.
"""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Self, cast

from gridsession.testing.faults import DIRECTIONS, Direction, Fault

_MOST_HELD = 1 << 20  # bytes that a direction holds back before its sender is made to wait
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER for no time: closing sends RST, as a cut does


class FaultProxy:
    """Stands between clients and one server, and fails as it is told.

    `async with FaultProxy("127.0.0.1", 6379) as proxy:` listens, and cuts everything at the end.
    All of it belongs to the event loop that it was started on.

    Args:
        server_host, server_port: where it leads.

    Attributes:
        host, port: where it listens; the port stays the same until it is closed.
        delay: seconds that each piece of data spends on its way in each direction, or a function
            that is asked for them; no piece overtakes another. 0 at first.
        drops: cut each new connection as soon as it is there. False at first.
        connections: those that are open, the oldest first.
        accepted: how many there have been.
    """

    def __init__(self, server_host: str, server_port: int) -> None:
        self._to = (server_host, server_port)
        self.host = "127.0.0.1"
        self.port = 0
        self.delay: float | Callable[[], float] = 0.0
        self.drops = False
        self.connections: list[ProxiedConnection] = []
        self.accepted = 0
        self._frozen: set[Direction] = set()
        self._is_partitioned = False
        self._passable = asyncio.Event()  # for new connections
        self._passable.set()
        self._guard: socket.socket | None = None
        self._listener: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # -- life -----------------------------------------------------------------------------

    async def start(self) -> Self:
        """Begin to listen, on a port that was free.

        Raises:
            OSError: it cannot.
        """
        # Bound for as long as the proxy lives, so that nobody else is given the port meanwhile.
        self._guard = _bound(self.host, 0)
        self.port = self._guard.getsockname()[1]
        await self.admit()
        return self

    async def close(self) -> None:
        """Listen no more, and cut what is open. Closing twice: no error."""
        await self.refuse()
        self.cut()
        if self._guard is not None:
            self._guard.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.sleep(0)  # sockets are closed one turn of the loop after their cut

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- faults on demand -----------------------------------------------------------------

    def cut(self) -> None:
        """Reset every connection. What it held of them is lost."""
        for connection in list(self.connections):
            connection.cut()

    def freeze(self, *directions: Direction) -> None:
        """Stall data, that of new connections too, in both directions unless one is named.

        It is kept in order; after so much of it (a MiB, and what sockets hold) a sender waits.
        """
        self._frozen.update(directions or DIRECTIONS)
        for connection in self.connections:
            connection.freeze(*directions)

    def thaw(self) -> None:
        """Let what was frozen go on, and what waits first."""
        self._frozen.clear()
        for connection in self.connections:
            connection.thaw()

    def partition(self) -> None:
        """Let nothing through until `heal`, ends of connections neither.

        The connections of now are never heard of again, as after a firewall forgot them: neither
        end is told. New ones are made, and wait.
        """
        self._is_partitioned = True
        self._passable.clear()
        for connection in self.connections:
            connection.lose()

    def heal(self) -> None:
        """Let new connections through again. Those from before a partition stay lost."""
        self._is_partitioned = False
        self._passable.set()

    async def refuse(self) -> None:
        """Refuse new connections, as a machine does on which nobody listens."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
            await asyncio.sleep(0)  # the socket is closed one turn of the loop later

    async def admit(self) -> None:
        """Take new connections again."""
        if self._listener is None:
            loop = asyncio.get_running_loop()
            wire = _bound(self.host, self.port)
            self._listener = await loop.create_server(self._client, sock=wire)

    # -- faults at random -----------------------------------------------------------------

    @asynccontextmanager
    async def attacked(self, faults: Iterator[Fault]) -> AsyncIterator[list[Fault]]:
        """Carry out one fault after the other until the block ends; then everything is mended.

        Args:
            faults: as `random_faults` makes them.

        What `as` names lists those that were begun. Which bytes a fault hits is left to chance.
        """
        begun: list[Fault] = []
        attack = asyncio.create_task(self._attack(faults, begun))
        try:
            yield begun
        finally:
            attack.cancel()
            await asyncio.wait([attack])
            await self._mend()
            if not attack.cancelled() and (error := attack.exception()) is not None:
                raise error

    async def _attack(self, faults: Iterator[Fault], begun: list[Fault]) -> None:
        for fault in faults:
            await asyncio.sleep(fault.after)
            begun.append(fault)
            await self._begin(fault)
            if fault.kind not in ("cut", "cut within"):
                await asyncio.sleep(fault.seconds)
                await self._mend()

    async def _begin(self, fault: Fault) -> None:
        match fault.kind:
            case "delay":
                self.delay = partial(random.Random(fault.which).uniform, 0, fault.seconds / 10)
            case "freeze":
                self.freeze(*fault.directions)
            case "partition":
                self.partition()
            case "refuse":  # what is open is lost as well, or nobody would notice
                await self.refuse()
                self.cut()
            case "drop":
                self.drops = True
                self.cut()
            case _:
                alive = [one for one in self.connections if not one.is_lost]
                if not alive:
                    return
                one = alive[int(fault.which * len(alive))]
                if fault.kind == "cut":
                    one.cut()
                elif fault.kind == "freeze one":
                    one.freeze(*fault.directions)
                else:
                    one.cut_within(fault.directions[0])

    async def _mend(self) -> None:
        self.delay = 0.0
        self.drops = False
        self.thaw()
        self.heal()
        await self.admit()

    # -- connections ----------------------------------------------------------------------

    def _client(self) -> _Side:
        connection = ProxiedConnection(self)
        return connection.client

    def _came(self, connection: ProxiedConnection) -> None:
        self.accepted += 1
        self.connections.append(connection)
        if self.drops:
            connection.cut()
            return
        if self._frozen:
            connection.freeze(*self._frozen)
        task = asyncio.create_task(self._lead_on(connection))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _lead_on(self, connection: ProxiedConnection) -> None:
        try:
            await self._passable.wait()
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: connection.server, *self._to)
        except OSError:
            connection.cut()

    def _ended(self, connection: ProxiedConnection) -> None:
        if connection in self.connections:
            self.connections.remove(connection)


def _bound(host: str, port: int) -> socket.socket:
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    wire.bind((host, port))
    return wire


class ProxiedConnection:
    """One client's connection through a `FaultProxy`, to which something may happen alone.

    Attributes:
        source: host and port from which the server sees it come; None until it is led on.
        is_lost: a partition has swallowed it.
        is_cut: it was reset.
    """

    def __init__(self, proxy: FaultProxy) -> None:
        self.source: tuple[str, int] | None = None
        self.is_lost = False
        self.is_cut = False
        self._proxy = proxy
        self.client = _Side(self)
        self.server = _Side(self)
        self.client.other, self.server.other = self.server, self.client

    def cut(self) -> None:
        """Reset both ends."""
        self.is_cut = True
        self._proxy._ended(self)
        for side in (self.client, self.server):
            side.reset()

    def cut_within(self, direction: Direction) -> None:
        """Cut it in the midst of what passes next in this direction: its first half arrives."""
        self._to(direction).cuts_next = True

    def freeze(self, *directions: Direction) -> None:
        """As `FaultProxy.freeze`, for this connection alone."""
        for direction in directions or DIRECTIONS:
            self._to(direction).is_frozen = True

    def thaw(self) -> None:
        """Let it go on."""
        for side in (self.client, self.server):
            side.is_frozen = False
            side.pass_on()

    def lose(self) -> None:
        """Let nothing of it through any more, and tell neither end."""
        self.is_lost = True
        for side in (self.client, self.server):
            side.held.clear()

    def delay(self) -> float:
        delay = self._proxy.delay
        return delay() if callable(delay) else delay

    def came(self, side: _Side) -> None:
        """Told by a side whose socket is there."""
        if side is self.client:
            self._proxy._came(self)
        else:
            assert side.transport is not None
            self.source = side.transport.get_extra_info("sockname")[:2]
            self.client.was_held_up()
            side.pass_on()

    def ended(self) -> None:
        """Told by a side whose socket is closed."""
        if self.client.is_closed and (self.server.is_closed or self.server.transport is None):
            self._proxy._ended(self)

    def _to(self, direction: Direction) -> _Side:
        return self.server if direction == "up" else self.client


class _Side(asyncio.Protocol):
    """One of a connection's two sockets, and what is on its way to it.

    What `held` names are pieces with the loop's second at which each is due; `None` for the end.
    """

    other: _Side

    def __init__(self, connection: ProxiedConnection) -> None:
        self._connection = connection
        self.transport: asyncio.Transport | None = None
        self.held: deque[tuple[float, bytes | None]] = deque()
        self.held_bytes = 0
        self.is_frozen = False
        self.cuts_next = False
        self.is_closed = False
        self._is_full = False  # its socket takes no more for now
        self._heard_end = self._said_end = False
        self._timer: asyncio.TimerHandle | None = None

    def send(self, data: bytes | None) -> None:
        """Data for this side, or the end of it."""
        if self._connection.is_lost or self._connection.is_cut or self.is_closed:
            return
        now = asyncio.get_running_loop().time()
        due = now + self._connection.delay()
        if self.held:
            due = max(due, self.held[-1][0])
        self.held.append((due, data))
        self.held_bytes += len(data or b"")
        self.pass_on()
        if self.held_bytes > _MOST_HELD:
            self.other.hold_up()

    def pass_on(self) -> None:
        """Write what is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        loop = asyncio.get_running_loop()
        while self.held and self.transport is not None and not self.is_frozen and not self._is_full:
            due, data = self.held[0]
            if due > loop.time():
                self._timer = loop.call_at(due, self.pass_on)
                break
            self.held.popleft()
            self.held_bytes -= len(data or b"")
            if data is None:
                self._end()
            elif self.transport.is_closing():  # it failed, and its loss is about to be told
                continue
            elif self.cuts_next:
                self.transport.write(data[: len(data) // 2])
                # Closed first, so that the half leaves: a reset would take it back.
                self.transport.close()
                self._connection.cut()
                return
            else:
                self.transport.write(data)
        if self.held_bytes <= _MOST_HELD:
            self.other.was_held_up()

    def _end(self) -> None:
        assert self.transport is not None
        if self.other.is_closed:
            self.transport.close()
        else:
            self.transport.write_eof()
            self._said_end = True
            if self._heard_end:
                self.transport.close()

    def hold_up(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.pause_reading()

    def was_held_up(self) -> None:
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()

    def reset(self) -> None:
        self.held.clear()
        if self._timer is not None:
            self._timer.cancel()
        if self.transport is not None and not self.transport.is_closing():
            descriptor = self.transport.get_extra_info("socket").fileno()
            # By a descriptor of our own: uvloop hands out no socket that takes options.
            with socket.socket(fileno=os.dup(descriptor)) as wire:
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()

    # -- asyncio.Protocol -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self._connection.is_cut:  # while the server was reached
            self.reset()
            return
        self._connection.came(self)

    def data_received(self, data: bytes) -> None:
        self.other.send(data)

    def eof_received(self) -> bool:
        self._heard_end = True
        self.other.send(None)
        return not self._said_end  # the other direction may go on

    def connection_lost(self, error: Exception | None) -> None:
        self.is_closed = True
        self.held.clear()
        if self._timer is not None:
            self._timer.cancel()
        self.other.send(None)
        self._connection.ended()

    def pause_writing(self) -> None:
        self._is_full = True

    def resume_writing(self) -> None:
        self._is_full = False
        self.pass_on()
