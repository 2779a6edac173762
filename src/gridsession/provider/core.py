"""`SessionProvider`: settings, a grid, and the sessions opened on them."""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self
from weakref import WeakSet

from gridsession.access import Access, Use
from gridsession.changes import OnConflict
from gridsession.envelope import Envelope
from gridsession.errors import SettingsError
from gridsession.grids import make_grid
from gridsession.grids.clock import steady
from gridsession.grids.contract import Grid
from gridsession.provider.client_cache import ClientCache
from gridsession.provider.log import log
from gridsession.provider.loop import LoopWork
from gridsession.provider.visit import Visit
from gridsession.session import Session
from gridsession.settings import SessionSettings, seconds

_started: WeakSet[SessionProvider] = WeakSet()


def _in_child() -> None:
    for provider in _started:
        provider.is_started = False
        provider._make_locks_anew()
    _started.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


_ON_CONFLICT = "it must be a plain function of four arguments, and no coroutine function"


class SessionProvider:
    """Opens sessions; one for each application and process, for all of its event loops.

    `async with SessionProvider(settings) as provider:` opens and closes it. Middleware does so
    with the server's lifespan, or opens it at the first request where there is none.

    Args:
        settings: what an operator can set; `SessionSettings.load()` by default.
        grid: a ready grid instead of the one that `settings.connection_string` names. It is the
            caller's to close.
        mount_path: where the application knows to be mounted; the namespace, where the settings
            name none.
        on_conflict: decides between two values where two concurrent requests changed the same
            key: called with the key, the value that both began with, the one that is stored and
            this request's, each its own copy or `ABSENT`; returns the value to store. Without it
            the later commit's stands. It may be called more than once for one request.

    Attributes:
        namespace: which sets this application's sessions apart on the grid.
        owns_grid: the grid was made here, and is closed with the provider.
        is_started: opened, by this very process: one forked from it opens, and closes, for itself.
        client_cache: what this worker keeps; None where nothing is to be kept, or where a look at
            the grid costs less than one at a cache.
        merges: commits that were put upon one that came before them, in this process.
        key_conflicts: keys that both of two such commits had changed.

    Raises:
        SettingsError: the connection string names no grid that is there.
    """

    def __init__(
        self,
        settings: SessionSettings | None = None,
        *,
        grid: Grid | None = None,
        mount_path: str = "/",
        on_conflict: OnConflict | None = None,
    ) -> None:
        self.settings = settings = SessionSettings.load() if settings is None else settings
        self.owns_grid = grid is None
        self.namespace = settings.namespace or mount_path
        self.grid: Grid = grid or make_grid(
            settings.connection_string,
            namespace=self.namespace,
            timeout=seconds(settings.grid_timeout),
        )
        self.lease = seconds(settings.lock_lease)
        self.lock_wait_timeout = seconds(settings.lock_wait_timeout)
        self.queue_limit = settings.request_queue_limit_per_session
        self.timeout = seconds(settings.timeout)
        absolute = settings.absolute_timeout
        self.absolute_timeout = None if absolute is None else seconds(absolute)
        self._make_locks_anew()
        self.reads_cached_in_outage = settings.if_grid_unavailable == "read_cached"
        if on_conflict is not None and (
            not callable(on_conflict) or inspect.iscoroutinefunction(on_conflict)
        ):
            raise SettingsError(f"on_conflict={on_conflict!r} cannot be used: {_ON_CONFLICT}")
        self.on_conflict = on_conflict
        self.merges = self.key_conflicts = 0
        self.is_started = False
        self._notes = settings.notes  # to be told at the first start
        self._work: dict[asyncio.AbstractEventLoop, LoopWork] = {}

    async def start(self) -> None:
        """Open the grid. A second call does nothing.

        Raises:
            SettingsError: the grid cannot be used as it is set, and will not heal by itself.
            GridUnavailable: it cannot be reached now; calling again later may succeed.
        """
        if not self.is_started:
            notes, self._notes = self._notes, []
            for note in notes:
                log.warning("%s", note)
            await self.grid.open()
            self.is_started = True
            _started.add(self)
            log.info("sessions are kept in %s", self.grid.where)
            files = ", ".join(self.settings.files)
            log.info("settings are read from %s", files or "no file")
        self.work()  # it sweeps from now on, also where no request ever takes a lock

    async def close(self) -> None:
        """Finish what is under way on this event loop, and close the grid that we opened."""
        work = self._work.pop(asyncio.get_running_loop(), None)
        for elsewhere in self._work.values():
            elsewhere.stop_from_outside()
        self._work.clear()
        if work is not None:
            await work.close()
        self.is_started = False
        if self.owns_grid:
            await self.grid.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    @asynccontextmanager
    async def open(
        self,
        session_id: str | None,
        *,
        access: Access | str = Access.EXCLUSIVE,
        wait_for_writer: bool = False,
        holder: str = "provider.open",
    ) -> AsyncIterator[Session]:
        """`async with provider.open(id) as session:` a session outside of a request.

        Commits when the block ends; an exception that leaves the block discards.

        Args:
            session_id: a `session.id`; None, or one that the grid does not know, for a new
                session, whose `id` is then another.
            access: `exclusive`, `concurrent`, `read_only` or `none`.
            wait_for_writer: with `read_only`, wait for a writer that is at work.
            holder: who this is, for the errors of those who wait for the lock.

        Raises:
            GridUnavailable, GridFull, SessionLockTimeout, SessionQueueFull, SessionReplaced,
            SessionFormatError: before the block ran.
            SessionLockLost, SessionGone, SessionTooLarge, SessionTypeError, GridUnavailable,
            GridFull: at its end; nothing was stored.
        """
        flags = " wait_for_writer" if wait_for_writer else ""
        await self.start()
        visit = Visit(
            self,
            session_id.encode("ascii", "replace") if session_id is not None else None,
            Use.parse(f"{access}{flags}"),
            holder,
        )
        await visit.begin()
        try:
            yield visit.session
            await visit.end()
        except BaseException:
            await visit.discard()
            raise
        finally:
            visit.let_session_go()

    def _make_locks_anew(self) -> None:
        """What has a lock of its own. In a forked process another thread's may be taken for ever:
        the client cache's, the compressor's.
        """
        settings = self.settings
        self.envelope = Envelope(
            namespace=self.namespace,
            max_bytes=settings.max_payload_bytes,
            compress=settings.compression_enabled,
            keys=settings.encryption_keys,
        )
        self.client_cache = self._make_cache()

    def _make_cache(self) -> ClientCache | None:
        settings = self.settings
        if settings.client_cache_capacity == 0 or self.grid.is_local:
            return None
        return ClientCache(
            settings.client_cache_type,
            settings.client_cache_capacity,
            seconds(settings.client_cache_coherency_interval),
            steady,
        )

    def _has_ended(self, key: bytes) -> None:
        if self.client_cache is not None:
            self.client_cache.drop(key)

    # -- for visits -------------------------------------------------------------------

    def work(self) -> LoopWork:
        """What runs beside the requests of the running event loop."""
        loop = asyncio.get_running_loop()
        work = self._work.get(loop)
        if work is None:
            for dead in [x for x, there in list(self._work.items()) if there.is_dead]:
                self._work.pop(dead, None)
            work = self._work[loop] = LoopWork(
                self.grid,
                lease=self.lease,
                execution_timeout=seconds(self.settings.execution_timeout),
                sweep_interval=seconds(self.settings.sweep_interval),
                on_gone=self._has_ended,
            )
        return work
