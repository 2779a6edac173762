"""One connection to a server: commands out, replies in, in order.

What is asked within one turn of the event loop leaves in one write. Where calls come one by one,
each leaves at once. No call has a task or a timer of its own: either doubles what it costs.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
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
    Word,
    pack_command,
    unavailable,
    unreachable,
)

MOST_PENDING = 20_000  # calls; a worker with so many under way is not helped by another one
MOST_UNSENT = 64 << 20  # bytes that the server has not taken yet
LOOKS_PER_TIMEOUT = 8  # how often within a timeout is looked for calls that are overdue


@dataclass(slots=True)
class Call:
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


OnLost = Callable[["Wire", GridUnavailable, deque[Call]], None]


class Wire(Asker):
    """One connection, from its making to its loss.

    Args:
        name: the server in words.
        timeout: seconds after whose silence it is given up.
        on_lost: told of its end, with the calls that got no answer.
    """

    def __init__(self, name: str, timeout: float, on_lost: OnLost) -> None:
        self._name = name
        self._timeout = timeout
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._context = Context()
        self._reader = hiredis.Reader(notEnoughData=INCOMPLETE)
        self._transport: asyncio.Transport | None = None
        self._pending: deque[Call] = deque()
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
        self.send(Call(future, float("inf"), words, pack_command(words)))
        return future

    @property
    def loss(self) -> GridUnavailable | None:
        return self._lost

    def send(self, call: Call) -> None:
        packed = call.packed
        if self._lost is not None:
            call.future.set_exception(type(self._lost)(str(self._lost)))
            return
        if len(self._pending) >= MOST_PENDING or self._unsent_bytes > MOST_UNSENT:
            error = GridUnavailable(f"{self._name} does not keep up with what it is asked")
            call.future.set_exception(unsent(call, error))
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
                    self.lose(unavailable(self._name, ServerReply(str(reply))))
                    return
                call = pending.popleft()
                self.has_answered = True
                if type(reply) is hiredis.ReplyError:
                    self._refused(call, str(reply))
                elif not call.future.done():  # else its caller has gone: the reply is dropped here
                    call.future.set_result(reply)
        except (hiredis.ProtocolError, IndexError, TypeError):  # of a map with a list for a key
            self.lose(GridUnavailable(f"{self._name} does not speak Redis's protocol"))

    def eof_received(self) -> None:
        self.lose(ConnectionLost(f"{self._name} closed the connection"))

    def connection_lost(self, error: Exception | None) -> None:
        lost = ConnectionLost(f"{self._name}: the connection was lost")
        # A certificate of ours that it does not accept comes to light only now.
        self.lose(unreachable(self._name, error) if isinstance(error, SSLError) else lost)

    def _refused(self, call: Call, reply: str) -> None:
        if not call.future.done():
            script = call.script
            if script is None:
                call.future.set_exception(ServerReply(reply))
            elif reply.startswith("NOSCRIPT") and call.words[0] != b"EVAL":
                call.words = (b"EVAL", script.source, *call.words[2:])
                call.packed = pack_command(call.words)
                self.send(call)
            else:
                error = failure(self._name, ServerReply(reply))
                if call.was_sent and isinstance(error, GridUnavailable):
                    error.never_asked = False
                call.future.set_exception(error)
        meaning = meaning_of(reply)
        if meaning.ends:
            self.lose(ConnectionLost(f"{self._name} {meaning.text}"))

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
        self._on_lost(self, error, pending)

    # -- calls that are overdue -----------------------------------------------------------

    def _look_later(self) -> None:
        self._look_at = self._loop.time() + self._timeout / LOOKS_PER_TIMEOUT
        self._looking = self._loop.call_at(self._look_at, self._look, context=self._context)

    def _look(self) -> None:
        """One timer for all calls: a time-out of its own would double what a call costs."""
        self._looking = None
        now = self._loop.time()
        lost = held_up(now - self._look_at, self._timeout)
        self._heard_at += lost
        late = False
        for call in self._pending:
            call.deadline += lost
            if call.deadline <= now:
                late = True
                if not call.future.done():
                    call.future.set_exception(overdue(self._name, self._timeout))
        if late and now - self._heard_at >= self._timeout:
            self.lose(GridUnavailable(f"{self._name} has stopped answering"))
        elif self._pending:
            self._look_later()


def unsent(call: Call, error: GridUnavailable) -> GridUnavailable:
    """For a call that waits; it may have been sent on an earlier connection."""
    return type(error)(str(error)) if call.was_sent else never_asked(error)


def never_asked(error: GridUnavailable) -> GridUnavailable:
    """The same, for one more caller whose call did not leave."""
    copy = type(error)(str(error))
    copy.never_asked = True
    return copy


def held_up(late: float, timeout: float) -> float:
    """Seconds that count for nobody, since a look was so much too late: replies may lie ready, and
    calls not have left yet. What a busy event loop is always late by counts, or it would never
    judge.
    """
    return max(0.0, late - timeout / LOOKS_PER_TIMEOUT)


def overdue(name: str, timeout: float) -> GridUnavailable:
    return GridUnavailable(f"{name} did not answer within {timeout:g} s")
