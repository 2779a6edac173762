"""One connection that all coroutines of an event loop share: commands out, replies in, in order.

What is asked within one turn of the event loop leaves in one write. Where calls come one by one,
each leaves at once. Nobody waits for a connection longer than for an answer, and while the server
is known to be away nobody waits at all. Written here, and not left to a client library, because
these calls are what every request pays for.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from ssl import SSLError
from typing import Any, cast

import hiredis

from gridsession.errors import GridUnavailable
from gridsession.grids.redis.replies import ConnectionLost, ServerReply, failure, meaning_of
from gridsession.grids.redis.scripts import Script
from gridsession.grids.redis.server import (
    INCOMPLETE,
    Asker,
    Server,
    Word,
    pack_command,
    unavailable,
    unreachable,
)

MOST_PENDING = 20_000  # calls; a worker with so many under way is not helped by another one
MOST_UNSENT = 64 << 20  # bytes that the server has not taken yet
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 0.5  # seconds between two tries to connect
_LOOKS_PER_TIMEOUT = 8  # how often within a timeout is looked for calls that are overdue

log = logging.getLogger("gridsession")


@dataclass(slots=True)
class _Call:
    """One command under way.

    Attributes:
        future: its caller's; done before the reply where the caller has gone or waited too long.
        deadline: the loop's second at which the caller has waited too long.
        words: of the command.
        packed: the same, as the server wants it.
        script: which it runs; None for a plain command.
        repeats: it is sent once more where the connection is lost.
        was_sent: on a connection that was lost; it may have arrived there.
    """

    future: asyncio.Future[Any]
    deadline: float
    words: tuple[Word, ...]
    packed: bytes
    script: Script | None = None
    repeats: bool = False
    was_sent: bool = False


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
        self._wire: _Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._waiting: deque[_Call] = deque()  # until there is a connection
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
        call = _Call(future, deadline, words, pack_command(words), None, repeats)
        if self._wire is not None:
            self._wire.send(call)
        else:
            self._wait(call)
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
        call = _Call(
            future,
            self._loop.time() + self.timeout,
            words,
            pack_command(words),
            script,
            script.repeats,
        )
        if self._wire is not None:
            self._wire.send(call)
        else:
            self._wait(call)
        return future

    def _wait(self, call: _Call) -> None:
        """For a connection."""
        if self._closed:
            raise GridUnavailable(f"{self.name}: the connection was closed")
        if self._why is not None:  # known to be away, and somebody is trying already
            raise _never_asked(self._why)
        if len(self._waiting) >= MOST_PENDING or self._waiting_bytes > MOST_UNSENT:
            raise _never_asked(
                GridUnavailable(f"{self.name}: too many calls wait for a connection")
            )
        self._put(call)

    def _put(self, call: _Call) -> None:
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
        wire = await self._server.reach(lambda: _Wire(self), timeout=self.timeout)
        self._wire, self._why = wire, None
        wire.has_answered = False
        if self._is_told:
            self._is_told = False
            log.info("%s answers again", self.name)
        while self._waiting:
            call = self._next_waiting()
            if not call.future.done():
                wire.send(call)

    def _next_waiting(self) -> _Call:
        call = self._waiting.popleft()
        self._waiting_bytes -= len(call.packed)
        return call

    def lost(self, wire: _Wire, error: GridUnavailable, under_way: deque[_Call]) -> None:
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
                call.future.set_exception(_unsent(call, error))

    def _look(self) -> None:
        self._looking = None
        now = self._loop.time()
        held_up = _held_up(now - self._look_at, self.timeout)
        for call in self._waiting:
            call.deadline += held_up
        while self._waiting and self._waiting[0].deadline <= now:
            call = self._next_waiting()
            if not call.future.done():
                call.future.set_exception(_unsent(call, _overdue(self)))
        if self._waiting:
            self._look_later()

    def _look_later(self) -> None:
        self._look_at = self._loop.time() + self.timeout / _LOOKS_PER_TIMEOUT
        self._looking = self._loop.call_at(self._look_at, self._look, context=self._context)


class _Wire(Asker):
    """One connection, from its making to its loss."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._context = Context()
        self._reader = hiredis.Reader(notEnoughData=INCOMPLETE)
        self._transport: asyncio.Transport | None = None
        self._pending: deque[_Call] = deque()
        self._unsent: list[bytes] = []
        self._unsent_bytes = 0
        self._is_paused = False
        self.has_answered = False  # also the greeting's commands, until the link has it
        self._is_alone = True  # what left last had nothing beside it
        self._lost: GridUnavailable | None = None
        self._looking: asyncio.TimerHandle | None = None
        self._look_at = 0.0  # the loop's second at which it is due
        self._heard_at = 0.0  # the loop's second at which something came

    def ask(self, *words: Word) -> asyncio.Future[Any]:
        """A command of the greeting; its caller bounds the time."""
        future = self._loop.create_future()
        self.send(_Call(future, float("inf"), words, pack_command(words)))
        return future

    @property
    def loss(self) -> GridUnavailable | None:
        return self._lost

    def send(self, call: _Call) -> None:
        packed = call.packed
        if self._lost is not None:
            call.future.set_exception(type(self._lost)(str(self._lost)))
            return
        if len(self._pending) >= MOST_PENDING or self._unsent_bytes > MOST_UNSENT:
            error = GridUnavailable(f"{self._link.name} does not keep up with what it is asked")
            call.future.set_exception(_unsent(call, error))
            return
        if (
            self._is_alone
            and not self._pending
            and self._transport is not None
            and not self._is_paused
        ):
            # A turn of the loop, to gather what others ask, would only cost.
            self._transport.write(packed)
        else:
            if not self._unsent and not self._is_paused:
                self._loop.call_soon(self._flush)
            self._unsent.append(packed)
            self._unsent_bytes += len(packed)
        self._pending.append(call)
        if self._looking is None:
            self._look_later()

    def _flush(self) -> None:
        unsent = self._unsent
        if self._transport is None or self._is_paused or not unsent:
            return
        self._unsent = []
        self._unsent_bytes = 0
        self._is_alone = len(unsent) == 1
        self._transport.write(unsent[0] if len(unsent) == 1 else b"".join(unsent))

    # -- asyncio.Protocol -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        if self._lost is not None:
            self._transport.abort()
        self._flush()

    def pause_writing(self) -> None:
        self._is_paused = True

    def resume_writing(self) -> None:
        self._is_paused = False
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        reader, pending = self._reader, self._pending
        reader.feed(data)
        try:
            while (reply := reader.gets()) is not INCOMPLETE:
                if type(reply) is hiredis.PushNotification:  # never a reply to anything
                    continue
                if not pending and type(reply) is hiredis.ReplyError:  # told before it was asked
                    self.lose(unavailable(self._link.name, ServerReply(str(reply))))
                    return
                call = pending.popleft()
                self.has_answered = True
                if type(reply) is hiredis.ReplyError:
                    self._refused(call, str(reply))
                elif not call.future.done():  # else its caller has gone: the reply is dropped here
                    call.future.set_result(reply)
        except (hiredis.ProtocolError, IndexError, TypeError):  # of a map with a list for a key
            self.lose(GridUnavailable(f"{self._link.name} does not speak Redis's protocol"))

    def eof_received(self) -> None:
        self.lose(ConnectionLost(f"{self._link.name} closed the connection"))

    def connection_lost(self, error: Exception | None) -> None:
        lost = ConnectionLost(f"{self._link.name}: the connection was lost")
        # A certificate of ours that it does not accept comes to light only now.
        self.lose(unreachable(self._link.name, error) if isinstance(error, SSLError) else lost)

    def _refused(self, call: _Call, reply: str) -> None:
        if not call.future.done():
            script = call.script
            if script is None:
                call.future.set_exception(ServerReply(reply))
            elif reply.startswith("NOSCRIPT") and call.words[0] != b"EVAL":
                call.words = (b"EVAL", script.source, *call.words[2:])
                call.packed = pack_command(call.words)
                self.send(call)
            else:
                error = failure(self._link.name, ServerReply(reply))
                if call.was_sent and isinstance(error, GridUnavailable):
                    error.never_asked = False
                call.future.set_exception(error)
        meaning = meaning_of(reply)
        if meaning.ends:
            self.lose(ConnectionLost(f"{self._link.name} {meaning.text}"))

    def lose(self, error: GridUnavailable) -> None:
        """End it: what is under way fails, and may have been carried out."""
        if self._lost is not None:
            return
        self._lost = error
        if self._looking is not None:
            self._looking.cancel()
        if self._transport is not None:
            self._transport.abort()
        pending, self._pending = self._pending, deque()
        self._unsent.clear()
        self._link.lost(self, error, pending)

    # -- calls that are overdue -----------------------------------------------------------

    def _look_later(self) -> None:
        self._look_at = self._loop.time() + self._link.timeout / _LOOKS_PER_TIMEOUT
        self._looking = self._loop.call_at(self._look_at, self._look, context=self._context)

    def _look(self) -> None:
        """One timer for all calls: a time-out of its own would double what a call costs."""
        self._looking = None
        now = self._loop.time()
        held_up = _held_up(now - self._look_at, self._link.timeout)
        self._heard_at += held_up
        overdue = False
        for call in self._pending:
            call.deadline += held_up
            if call.deadline <= now:
                overdue = True
                if not call.future.done():
                    call.future.set_exception(_overdue(self._link))
        if overdue and now - self._heard_at >= self._link.timeout:
            self.lose(GridUnavailable(f"{self._link.name} has stopped answering"))
        elif self._pending:
            self._look_later()


def _unsent(call: _Call, error: GridUnavailable) -> GridUnavailable:
    """For a call that waits; it may have been sent on an earlier connection."""
    return type(error)(str(error)) if call.was_sent else _never_asked(error)


def _never_asked(error: GridUnavailable) -> GridUnavailable:
    """The same, for one more caller whose call did not leave."""
    copy = type(error)(str(error))
    copy.never_asked = True
    return copy


def _held_up(late: float, timeout: float) -> float:
    """Seconds that count for nobody, since a look was so much too late: replies may lie ready, and
    calls not have left yet. What a busy event loop is always late by counts, or it would never
    judge.
    """
    return max(0.0, late - timeout / _LOOKS_PER_TIMEOUT)


def _overdue(link: Link) -> GridUnavailable:
    return GridUnavailable(f"{link.name} did not answer within {link.timeout:g} s")
