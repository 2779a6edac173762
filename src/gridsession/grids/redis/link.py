"""What all coroutines of an event loop share to reach a server: a connection, and then the next.

Nobody waits for a connection longer than for an answer, and while the server is known to be away
nobody waits at all. Written here, and not left to a client library, because these calls are what
every request pays for.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from contextlib import suppress
from contextvars import Context
from typing import Any

from gridsession.errors import GridUnavailable
from gridsession.grids.redis import wire as limits
from gridsession.grids.redis.replies import ConnectionLost, ServerReply
from gridsession.grids.redis.scripts import Script
from gridsession.grids.redis.server import Server, Word, pack_command
from gridsession.grids.redis.wire import (
    LOOKS_PER_TIMEOUT,
    Call,
    Wire,
    held_up,
    never_asked,
    overdue,
    unsent,
)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5  # seconds between two tries to connect

log = logging.getLogger("gridsession")


class Link:
    """A multiplexed connection to one server, made when it is needed and again when it is lost.

    All of it belongs to the event loop that it was made on.

    Args:
        server: where it leads.
        timeout: seconds within which a call must have been answered.
    """

    def __init__(self, server: Server, *, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self.timeout = timeout
        self.name = server.where
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._waiting: deque[Call] = deque()  # until there is a connection
        self._waiting_bytes = 0
        self._looking: asyncio.TimerHandle | None = None  # for calls that wait too long
        self._look_at = 0.0  # the loop's second at which it is due
        self._why: GridUnavailable | None = None  # why there is none; None while unknown
        self._pause = 0.0  # seconds before the next try, where the last connection was of no use
        self._is_told = False  # that the connection was lost
        self._closed = False
        self._context = Context()

    def call(self, *words: Word, repeats: bool = False) -> asyncio.Future[Any]:
        """Send a command; a future of its reply.

        Args:
            repeats: send it once more where the connection is lost, as `run` does.

        Raises (from the future, or at once):
            GridUnavailable: there was no answer in time; it may have been carried out.
            ServerReply: the server refused it.
        """
        future = self._loop.create_future()
        deadline = self._loop.time() + self.timeout
        self._send(Call(future, deadline, words, pack_command(words), None, repeats))
        return future

    def run(self, script: Script, name: bytes, *arguments: Word) -> asyncio.Future[Any]:
        """Run a script on the key of a name; a future of its reply.

        Where the server does not know it, it is sent whole. Where the connection is lost, and
        nobody knows whether it was carried out, it is sent once more, within the time that it had,
        if it may be: its tokens say that it is the same.

        Raises (from the future, or at once):
            GridUnavailable, GridFull: as the contract has them.
        """
        future = self._loop.create_future()
        words = (b"EVALSHA", script.sha, b"1", name, *arguments)
        deadline = self._loop.time() + self.timeout
        self._send(Call(future, deadline, words, pack_command(words), script, script.repeats))
        return future

    def _send(self, call: Call) -> None:
        """Now, or when there is a connection."""
        if self._wire is not None:
            self._wire.send(call)
            return
        if self._closed:
            raise GridUnavailable(f"{self.name}: the connection was closed")
        if self._why is not None:  # known to be away, and somebody is trying already
            raise never_asked(self._why)
        if len(self._waiting) >= limits.MOST_PENDING or self._waiting_bytes > limits.MOST_UNSENT:
            raise never_asked(GridUnavailable(f"{self.name}: too many calls wait for a connection"))
        self._put(call)

    def _put(self, call: Call) -> None:
        self._waiting.append(call)
        self._waiting_bytes += len(call.packed)
        if self._looking is None:
            self._look_later()
        self._begin_to_connect()

    async def open(self) -> None:
        """Connect, unless that is done. While the server is known to be away: fail at once.

        Raises:
            GridUnavailable: it cannot be reached, or is not ready.
            Misset: it refused us, and will.
        """
        await self.call(b"PING")

    async def settle(self) -> None:
        """Let what is under way be answered, within the time that a call has."""
        if self._wire is not None:
            with suppress(GridUnavailable, ServerReply):
                await self.call(b"PING")  # replies come in order: this one's last
                await self.call(b"PING")  # and behind those of what had to be asked again

    def close(self) -> None:
        """Give the connection up; what is under way fails."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._looking is not None:
            self._looking.cancel()
        error = GridUnavailable(f"{self.name}: the connection was closed")
        if self._wire is not None:
            self._wire.lose(error)
        self._fail_waiting(error)

    # -- connecting -------------------------------------------------------------------------

    def _begin_to_connect(self) -> None:
        if self._connecting is None and not self._closed:
            # A context of its own: the request's that comes first would be kept, with its session.
            self._connecting = self._loop.create_task(self._keep_connecting(), context=Context())
            self._connecting.add_done_callback(self._connected)

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting = None
        if self._closed or self._wire is not None:
            return
        # It was cancelled by whoever cancels all tasks, or a credential provider broke it; or the
        # connection was lost again before we were told of it. Whoever asks next begins anew.
        self._why = None
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail_waiting(GridUnavailable(f"{self.name}: {type(error).__name__}"))
            raise error
        if self._waiting and not self._loop.is_closed():
            self._begin_to_connect()

    async def _keep_connecting(self) -> None:
        pause = self._pause
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # a farm comes back in turn
            try:
                await self._connect_once()
            except GridUnavailable as error:
                self._why = error
                self._tell(error)
                self._fail_waiting(error)
            else:
                return
            pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)

    async def _connect_once(self) -> None:
        wire = await self._server.reach(
            lambda: Wire(self.name, self.timeout, self._lost), timeout=self.timeout
        )
        self._wire, self._why = wire, None
        wire.has_answered = False
        if self._is_told:
            self._is_told = False
            log.info("%s answers again", self.name)
        while self._waiting:
            call = self._next_waiting()
            if not call.future.done():
                wire.send(call)

    def _next_waiting(self) -> Call:
        call = self._waiting.popleft()
        self._waiting_bytes -= len(call.packed)
        return call

    def _lost(self, wire: Wire, error: GridUnavailable, under_way: deque[Call]) -> None:
        """Told by a connection that has ended, with the calls that got no answer."""
        is_ours = wire is self._wire and not self._closed and not self._loop.is_closed()
        for call in under_way:
            if call.future.done():
                continue
            if is_ours and isinstance(error, ConnectionLost) and call.repeats and not call.was_sent:
                call.was_sent = True
                self._put(call)
            else:
                call.future.set_exception(type(error)(str(error)))
        if wire is not self._wire:
            return
        self._wire = None
        if self._closed or self._loop.is_closed():
            return
        if wire.has_answered:
            self._pause = 0.0
        else:  # greeted and gone: who keeps the server from serving is not to be run against
            self._pause = min(max(2 * self._pause, _FIRST_PAUSE), _LONGEST_PAUSE)
        if isinstance(error, ConnectionLost) and not self._waiting:
            return  # nobody was asking; whoever does will connect
        self._tell(error)
        if not isinstance(error, ConnectionLost):  # silence: until it is heard of, nobody waits
            self._why = error
        self._begin_to_connect()

    def _tell(self, error: GridUnavailable) -> None:
        if not self._is_told:
            self._is_told = True
            log.warning("sessions cannot be reached: %s", error)

    def _fail_waiting(self, error: GridUnavailable) -> None:
        waiting, self._waiting, self._waiting_bytes = self._waiting, deque(), 0
        for call in waiting:
            if not call.future.done():
                call.future.set_exception(unsent(call, error))

    def _look(self) -> None:
        self._looking = None
        now = self._loop.time()
        lost = held_up(now - self._look_at, self.timeout)
        for call in self._waiting:
            call.deadline += lost
        while self._waiting and self._waiting[0].deadline <= now:
            call = self._next_waiting()
            if not call.future.done():
                call.future.set_exception(unsent(call, overdue(self.name, self.timeout)))
        if self._waiting:
            self._look_later()

    def _look_later(self) -> None:
        self._look_at = self._loop.time() + self.timeout / LOOKS_PER_TIMEOUT
        self._looking = self._loop.call_at(self._look_at, self._look, context=self._context)
