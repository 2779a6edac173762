"""A grid's connections to its server, for each event loop, and how its scripts are run on them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, NamedTuple

from gridsession.grids.redis.link import Link
from gridsession.grids.redis.notices import Notices
from gridsession.grids.redis.replies import ServerReply, failure
from gridsession.grids.redis.scripts import Script
from gridsession.grids.redis.server import Server, Word


class Ends(NamedTuple):
    """One event loop's connections, and what closes them with it."""

    link: Link
    notices: Notices
    until_loop_ends: AsyncGenerator[None]


class Connections:
    """Those of one grid, made when they are needed.

    Args:
        server: where it is and how to get in.
        timeout: seconds within which a call must have been answered.
    """

    def __init__(self, server: Server, *, timeout: float) -> None:
        self.server = server
        self._timeout = timeout
        self._by_loop: dict[asyncio.AbstractEventLoop, Ends] = {}
        self._of_parents: list[object] = []
        self._pid = os.getpid()

    def ends(self) -> Ends:
        """Those of the running event loop."""
        loop = asyncio.get_running_loop()
        ends = self._by_loop.get(loop)
        if ends is None:
            for dead in [x for x in list(self._by_loop) if x.is_closed()]:
                self._by_loop.pop(dead, None)
            link = Link(self.server, timeout=self._timeout)
            notices = Notices(self.server, timeout=self._timeout)
            closing = _until_loop_ends(link, notices)
            with suppress(StopIteration):  # to its yield: from here on the loop knows of it
                closing.asend(None).send(None)
            ends = self._by_loop[loop] = Ends(link, notices, closing)
        return ends

    def leave_parent(self) -> None:
        """In a process that was forked from one that had connections: they are that one's."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            # Kept, not dropped: to collect them would be to close them.
            self._of_parents.append(self._by_loop)
            self._by_loop = {}

    async def close(self) -> None:
        """Close those of the running event loop."""
        loop = asyncio.get_running_loop()
        ends = self._by_loop.get(loop)
        if ends is not None:
            await ends.link.settle()  # a request that was cancelled may be giving its lock back
            self._by_loop.pop(loop, None)
            await ends.until_loop_ends.aclose()

    def run(self, script: Script, name: bytes, *arguments: Word) -> asyncio.Future[Any]:
        """Run a script on the key of a name; as `Link.run`."""
        return self.ends().link.run(script, name, *arguments)

    async def ask(self, *words: Word) -> Any:
        """Send a command; its reply.

        Raises:
            GridUnavailable, GridFull: as the contract has them.
        """
        try:
            return await self.ends().link.call(*words)
        except ServerReply as error:
            raise failure(self.server.where, error) from None


async def _until_loop_ends(link: Link, notices: Notices) -> AsyncGenerator[None]:
    """Closes both when it is closed, at the latest by its event loop when that ends.

    Test clients make a loop for each request, and nobody tells us of its end.
    """
    try:
        yield
    finally:
        notices.close()
        link.close()
