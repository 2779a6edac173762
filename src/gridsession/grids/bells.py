"""Bells: how a waiter inside this process is woken.

A bell tells nothing but "ask again": whoever is woken asks the grid what it was granted. So a
bell may ring for nothing, and a lost one costs a safety poll.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class _Waiter:
    loop: asyncio.AbstractEventLoop
    rung: bool = False
    future: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """On the waiter's own loop."""
        self.rung = True
        self.stop()

    def stop(self) -> None:
        if self.future is not None and not self.future.done():
            self.future.set_result(None)


class Bells:
    """Who waits in this process, by token. Safe to ring from any thread."""

    def __init__(self) -> None:
        self._waiters: dict[bytes, _Waiter] = {}
        self._guard = threading.Lock()

    @property
    def listeners(self) -> Mapping[bytes, object]:
        """Those who listen, by token, as they come and go."""
        return self._waiters

    def listen(self, token: bytes) -> None:
        """From now on a ring for `token` is remembered, until `forget`."""
        loop = asyncio.get_running_loop()
        with self._guard:
            waiter = self._waiters.get(token)
            if waiter is None or waiter.loop is not loop:
                self._waiters[token] = _Waiter(loop)

    def forget(self, token: bytes) -> None:
        self._waiters.pop(token, None)

    def ring(self, token: bytes) -> None:
        with self._guard:
            waiter = self._waiters.get(token)
        if waiter is None:
            return
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if waiter.loop is running:
            waiter.ring()
            return
        try:
            waiter.loop.call_soon_threadsafe(waiter.ring)
        except RuntimeError:  # its loop is closed: nobody waits there any more
            self.forget(token)

    def ring_all(self) -> None:
        for token in list(self._waiters):
            self.ring(token)

    async def wait(self, token: bytes, seconds: float) -> None:
        """Return at a ring for `token`, at once if it rang already, or after `seconds`."""
        waiter = self._waiters.get(token)
        if waiter is None:
            # Nobody listened here: all that is left is the poll that follows a lost bell.
            await asyncio.sleep(seconds)
            return
        if not waiter.rung:
            waiter.future = waiter.loop.create_future()
            timer = waiter.loop.call_later(seconds, waiter.stop)
            try:
                await waiter.future
            finally:
                timer.cancel()
                waiter.future = None
        waiter.rung = False
