"""Running ahead of an application that waits for its session's lock."""

from __future__ import annotations

import asyncio

from gridsession.web.types import Message, Receive

_REPLAYED_BYTES = 64 * 1024  # of a request's body, kept for a handler that waits for its lock


class Replay:
    """A `receive` that can run ahead of the application, and gives it first what came meanwhile.

    A receiving that is under way is handed over, never cancelled: a `receive` that wraps another
    (Starlette's BaseHTTPMiddleware makes such) may not survive that.
    """

    __slots__ = ("_came", "_kept", "_pending", "_receive", "_whole")

    def __init__(self, came: list[Message], receive: Receive) -> None:
        self._came = came
        self._kept = 0
        self._whole = False  # the body has come: all that is left to come is the client's going
        self._pending: asyncio.Future[Message] | None = None
        self._receive = receive

    def ahead(self) -> list[asyncio.Future[Message]]:
        """The receiving that is under way; none where enough is kept already."""
        if self._pending is None and (self._whole or self._kept <= _REPLAYED_BYTES):
            self._pending = asyncio.ensure_future(self._receive())
        return [] if self._pending is None else [self._pending]

    def client_has_left(self) -> bool:
        """Keep what has come, if something has; whether it says so."""
        if self._pending is None or not self._pending.done():
            return False
        message = self._pending.result()
        self._pending = None
        self._came.append(message)
        self._kept += len(message.get("body", b""))
        self._whole = not message.get("more_body")
        return bool(message["type"] == "http.disconnect")

    def drop(self) -> None:
        """Nobody will ask any more."""
        if self._pending is not None:
            self._pending.cancel()

    async def __call__(self) -> Message:
        if self._came:
            return self._came.pop(0)
        if self._pending is not None:
            pending, self._pending = self._pending, None
            return await pending
        return await self._receive()
