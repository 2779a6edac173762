"""Bells through the server: a channel for each record that somebody waits for.

On a connection of its own, since a server cuts off who does not take his notices in time, and
only while somebody waits. A notice says nothing but "ask again", and a lost one costs a safety
poll: whatever fails here is answered by waiting without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import suppress
from contextvars import Context
from typing import Any, cast

import hiredis

from gridsession.errors import GridUnavailable
from gridsession.grids.bells import Bells
from gridsession.grids.redis.replies import ConnectionLost, ServerReply
from gridsession.grids.redis.server import INCOMPLETE, Asker, Server, Word, pack_command

TOKEN_BYTES = 16
_LINGER_SECONDS = 1.0  # for which a channel is listened to after its last waiter has gone
_IDLE_SECONDS = 10.0  # without anybody who waits, before the connection is closed


class Notices:
    """Who waits on this event loop, and for which channels.

    Args:
        server: where the connection leads.
        timeout: seconds within which a subscription must have been confirmed.
    """

    def __init__(self, server: Server, *, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = server
        self.timeout = timeout
        self._bells = Bells()
        self._channels: dict[bytes, set[bytes]] = {}  # tokens, by channel
        self._channel_of: dict[bytes, bytes] = {}
        self._ears: _Ears | None = None
        self._connecting: asyncio.Task[_Ears] | None = None
        self._closing: asyncio.TimerHandle | None = None
        self._tidying: asyncio.TimerHandle | None = None

    async def wait(self, channel: bytes, token: bytes, seconds: float) -> None:
        """Return at a notice for `token`, or after `seconds`; at once where it begins to listen:
        what was told before then was told to nobody.
        """
        begins = token not in self._channel_of
        if begins:
            self._channel_of[token] = channel
            self._channels.setdefault(channel, set()).add(token)
            self._bells.listen(token)
            if self._closing is not None:
                self._closing.cancel()
                self._closing = None
        ears = self._ears
        if ears is None or not ears.hears(channel):
            end = self._loop.time() + seconds
            with suppress(GridUnavailable, TimeoutError, ServerReply):
                async with asyncio.timeout(min(seconds, self.timeout)):
                    ears = await self._listening()
                    await ears.subscribe(channel)
                return
            seconds = end - self._loop.time()  # or who was handed the lock is passed over
        if not begins and seconds > 0:
            await self._bells.wait(token, seconds)

    def forget(self, token: bytes) -> None:
        """Nobody waits under this token any more."""
        channel = self._channel_of.pop(token, None)
        if channel is None:
            return
        self._bells.forget(token)
        tokens = self._channels[channel]
        tokens.discard(token)
        if not tokens:
            del self._channels[channel]
            if self._tidying is None:  # not now: who has just been given a lock wants to work
                self._tidying = self._loop.call_later(
                    _LINGER_SECONDS, self._tidy, context=Context()
                )

    def _tidy(self) -> None:
        """Listen no more for what nobody waits for."""
        self._tidying = None
        if self._ears is None:
            return
        self._ears.unsubscribe_but(self._channels)
        if not self._channels and self._closing is None:
            self._closing = self._loop.call_later(_IDLE_SECONDS, self._hang_up, context=Context())

    def close(self) -> None:
        for timer in (self._closing, self._tidying):
            if timer is not None:
                timer.cancel()
        if self._connecting is not None:
            self._connecting.cancel()
        self._hang_up()
        self._bells.ring_all()

    async def _listening(self) -> _Ears:
        if self._ears is not None:
            return self._ears
        if self._connecting is None:
            self._connecting = self._loop.create_task(self._open(), context=Context())
            self._connecting.add_done_callback(self._opened)
        connecting = self._connecting
        await asyncio.wait([connecting])  # whoever is cancelled here leaves it to the others
        if connecting.cancelled():  # by `close`; who waits was not
            raise ConnectionLost("the connection was given up")
        return connecting.result()

    async def _open(self) -> _Ears:
        self._ears = ears = await self._server.reach(lambda: _Ears(self), timeout=self.timeout)
        if not self._channels:  # who wanted it has gone meanwhile
            self._tidy()
        return ears

    def _opened(self, task: asyncio.Task[_Ears]) -> None:
        self._connecting = None
        if not task.cancelled():
            task.exception()  # whoever waits for it is told; nobody else has to be

    def _hang_up(self) -> None:
        self._closing = None
        if self._ears is not None:
            self._ears.hang_up()

    def is_waited_for(self, channel: bytes) -> bool:
        return channel in self._channels

    def lost(self, ears: _Ears) -> None:
        """Told by a connection that has ended: whoever waits asks, and then listens anew."""
        if ears is self._ears:
            self._ears = None
            if ears.has_listened:  # else nobody relied on it, and to ask at once would be to spin
                self._bells.ring_all()

    def heard(self, tokens: bytes) -> None:
        for start in range(0, len(tokens), TOKEN_BYTES):
            self._bells.ring(tokens[start : start + TOKEN_BYTES])


class _Ears(Asker):
    """One connection that is told of notices."""

    def __init__(self, notices: Notices) -> None:
        self._notices = notices
        self._reader = hiredis.Reader(notEnoughData=INCOMPLETE)
        self._transport: asyncio.Transport | None = None
        self._replies: list[asyncio.Future[Any]] = []
        self._subscribed: set[bytes] = set()
        self._asked: dict[bytes, asyncio.Future[None]] = {}
        self._is_lost = False
        self.has_listened = False

    @property
    def loss(self) -> GridUnavailable | None:
        return ConnectionLost("the connection was lost") if self._is_lost else None

    def hears(self, channel: bytes) -> bool:
        return channel in self._subscribed

    def ask(self, *words: Word) -> asyncio.Future[Any]:
        future = asyncio.get_running_loop().create_future()
        if self._is_lost or self._transport is None:
            future.set_exception(ConnectionLost("the connection was lost"))
        else:
            self._replies.append(future)
            self._transport.write(pack_command(words))
        return future

    def lose(self, error: GridUnavailable) -> None:
        self.hang_up()

    async def subscribe(self, channel: bytes) -> None:
        asked = self._asked.get(channel)
        if asked is None:
            if self._is_lost or self._transport is None:
                raise ConnectionLost("the connection was lost")
            asked = self._asked[channel] = asyncio.get_running_loop().create_future()
            self._transport.write(pack_command((b"SSUBSCRIBE", channel)))
            asyncio.get_running_loop().call_later(
                self._notices.timeout, self._look, asked, context=Context()
            )
        await asyncio.shield(asked)

    def _look(self, asked: asyncio.Future[None]) -> None:
        if not asked.done():  # a firewall forgot the connection: nobody would tell us for minutes
            self.hang_up()

    def unsubscribe(self, channel: bytes) -> None:
        if channel not in self._subscribed:  # not yet; it is given up when it is confirmed
            return
        self._subscribed.discard(channel)
        self._asked.pop(channel, None)
        if self._transport is not None and not self._is_lost:
            self._transport.write(pack_command((b"SUNSUBSCRIBE", channel)))

    def unsubscribe_but(self, channels: Collection[bytes]) -> None:
        """Keep only these."""
        for channel in [x for x in self._subscribed if x not in channels]:
            self.unsubscribe(channel)

    def hang_up(self) -> None:
        self._lose()
        if self._transport is not None:
            self._transport.abort()

    # -- asyncio.Protocol -----------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        if self._is_lost:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (message := self._reader.gets()) is not INCOMPLETE:
                if type(message) is hiredis.PushNotification:
                    self._pushed(message)
                elif type(message) is hiredis.ReplyError:
                    self._refused(message)
                elif self._replies and not (future := self._replies.pop(0)).done():
                    future.set_result(message)
        except (hiredis.ProtocolError, TypeError):
            self.hang_up()

    def connection_lost(self, error: Exception | None) -> None:
        self._lose()

    def _pushed(self, message: list[Any]) -> None:
        kind, channel, *rest = message
        if kind == b"smessage":
            self._notices.heard(*rest)
        elif kind == b"ssubscribe" and (asked := self._asked.get(channel)) is not None:
            self._subscribed.add(channel)
            self.has_listened = True
            if not asked.done():
                asked.set_result(None)
            if not self._notices.is_waited_for(channel):
                self.unsubscribe(channel)
        elif kind == b"sunsubscribe" and channel in self._subscribed:
            # Unasked: a cluster has moved the slot. Whoever waits listens anew.
            self.hang_up()

    def _refused(self, error: hiredis.ReplyError) -> None:
        # To a command of the greeting; or to a subscription, and which one is not said. Whoever
        # was refused asks again at the next poll: to end the connection would ring everybody.
        refused: list[asyncio.Future[Any]] = self._replies[:1]
        if refused:
            del self._replies[0]
        else:
            unheard = [channel for channel in self._asked if channel not in self._subscribed]
            refused = [self._asked.pop(channel) for channel in unheard]
        for future in refused:
            if not future.done():
                future.set_exception(ServerReply(str(error)))
                future.exception()

    def _lose(self) -> None:
        if self._is_lost:
            return
        self._is_lost = True
        for future in (*self._replies, *self._asked.values()):
            if not future.done():
                future.set_exception(ConnectionLost("the connection was lost"))
                future.exception()
        self._notices.lost(self)
