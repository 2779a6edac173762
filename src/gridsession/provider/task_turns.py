"""Turns among the tasks of one request.

The lock in the grid sets requests apart, not the tasks that a request starts. What must not be
mixed among those is done in a turn: a block of `exclusive()`, a `save()`, the request's end.
"""

from __future__ import annotations

import asyncio
from collections import deque

from gridsession.errors import SessionLockTimeout


class TaskTurns:
    """One after the other, in the order of their coming. Costs nothing while nobody waits."""

    _taken = False
    _waiting: deque[asyncio.Future[None]] | None = None

    async def take_turn(self, timeout: float) -> None:
        """Wait until it is free, and take it; call `end_turn` afterwards.

        Raises:
            SessionLockTimeout: it was not free for `timeout` seconds.
        """
        if not self._taken:
            self._taken = True
            return
        if self._waiting is None:
            self._waiting = deque()
        mine = asyncio.get_running_loop().create_future()
        self._waiting.append(mine)
        try:
            async with asyncio.timeout(timeout):
                await mine
        except BaseException as error:
            if mine.done() and not mine.cancelled():  # it was given to us in the same moment
                self.end_turn()
            if isinstance(error, TimeoutError):
                raise SessionLockTimeout(
                    "Another task of this request is inside `session.exclusive()`; gave up after "
                    f"{timeout:.1f} s. (A FastAPI dependency that yields inside it, under a "
                    'middleware that runs the application in a task, needs scope="function".)'
                ) from None
            raise

    def end_turn(self) -> None:
        """Let the next one have it."""
        while self._waiting:
            following = self._waiting.popleft()
            if not following.done():  # not cancelled
                following.set_result(None)
                return
        self._taken = False

    def wake_all(self) -> None:
        """Let all who wait have it at once: nothing is left that they could mix up."""
        for waiting in self._waiting or ():
            if not waiting.done():
                waiting.set_result(None)
        self._waiting = None
