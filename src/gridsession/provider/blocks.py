"""The open blocks of `session.exclusive()`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Self

from gridsession.access import Access
from gridsession.errors import SessionClosed
from gridsession.provider.task_turns import TaskTurns
from gridsession.session import Phase, Session

if TYPE_CHECKING:
    from gridsession.provider.bearer import Bearer
    from gridsession.provider.visit import Visit


_GIVEN_UP = (
    "The request was given up while this block of `session.exclusive()` was open; "
    "what was done in it is not stored."
)


class Block(TaskTurns):
    """An open `session.exclusive()`, known to the code within it and to the tasks it starts.

    Its own turns are for what is done within it: blocks of those tasks, and `save` or `release`.

    Args:
        root: the visit of the request.
        session: what is used in the block.
        turns: what it is a turn of, already taken; given back when the block ends, or when its
            session's lock is given back within it.

    Attributes:
        root, session: as given.
        task: which entered it.
        is_open: it has not been left.
        within: the block that has its turn.
    """

    within: Block | None = None

    def __init__(self, root: Bearer, session: Session, turns: TaskTurns) -> None:
        self.root = root
        self.session = session
        self.task = asyncio.current_task()
        self.is_open = True
        self._turns: TaskTurns | None = turns

    def __enter__(self) -> Self:
        _open_blocks.set((*_open_blocks.get(), self))
        if isinstance(self._turns, Block):
            self._turns.within = self
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
        _open_blocks.set(tuple(block for block in _open_blocks.get() if block.is_open))
        # The context of a task begun within keeps this.
        del self.root, self.session
        self.task = None
        if not self._taken:
            self.give_turn_back()

    def end_turn(self) -> None:
        super().end_turn()
        if not self.is_open and not self._taken:  # left by an exception, with a block within it
            self.give_turn_back()

    def give_turn_back(self) -> None:
        """Let others have it; a second call does nothing."""
        turns, self._turns = self._turns, None
        if isinstance(turns, Block):
            turns.within = None
        if turns is not None:
            turns.end_turn()

    async def end(self, timeout: float) -> None:
        """Call it before leaving, unless by an exception.

        Raises:
            SessionLockTimeout: a task is still inside a block within this one.
            SessionClosed: what was done in it is not stored: its request was given up meanwhile,
                or the session's lock was given back before.
        """
        # Not for a block of this very task: it may leave the outer one first.
        if self._taken and (self.within is None or self.within.task is not asyncio.current_task()):
            await self.take_turn(timeout)
            self.end_turn()
        if self.session._phase is Phase.DISCARDED:
            raise SessionClosed(_GIVEN_UP)
        if self.session.is_read_only and self.session._delta().changes:
            raise SessionClosed(
                "The session's lock was given back inside this block of `session.exclusive()`; "
                "what was changed since is not stored."
            )


@asynccontextmanager
async def exclusive(visit: Visit, session: Session) -> AsyncIterator[Session]:
    """`session.exclusive()`, for a session of this visit.

    Inside a block already: a turn in that block, also for the task that entered it, since others
    may be in a block within it. Under the request's own lock: a turn there. Anywhere else: a
    visit, a session and a lock of its own, so that nothing can be in its way.

    An exception undoes what was done under a lock of its own. Elsewhere that is a part of what the
    one who has the lock does, and is stored or not with it: handlers hold references to values,
    and nothing that was put back behind their backs would be what they believe to have.
    """
    root, timeout = visit.root(), visit.lock_wait_timeout
    while blocks := blocks_around(root):
        around = blocks[0]
        await around.take_turn(timeout)
        if around.is_open and around.session._phase is Phase.WRITABLE:
            with Block(root, around.session, around) as block:
                yield around.session
                await block.end(timeout)
            return
        around.end_turn()
    if any(block.session._phase is Phase.DISCARDED for block in open_blocks(root)):
        raise SessionClosed(_GIVEN_UP)  # else a part of what is not stored would be
    if session._phase is not Phase.DISCARDED:  # else what has the turn has nothing to guard
        await visit.take_turn(timeout)
        if session._phase is Phase.WRITABLE and visit.use.access is not Access.CONCURRENT:
            with Block(root, session, visit) as block:
                yield session
                await block.end(timeout)
            return
        visit.end_turn()
    own = await visit.visit_of_its_own()
    fresh = own.session
    try:
        await own.take_turn(timeout)  # free
        with Block(root, fresh, own) as block:
            yield fresh
            await block.end(timeout)
        await own.end()
    except BaseException:
        await own.discard()
        raise
    finally:
        visit.adopt(own, session)
        own.let_session_go()


def blocks_around(root: Bearer, session: Session | None = None) -> list[Block]:
    """The open blocks that the running code is in, the innermost first.

    Args:
        root: of which request.
        session: of which session of it; None: of any that can still be written in.
    """
    return [
        block
        for block in open_blocks(root)
        if (block.session._phase is Phase.WRITABLE if session is None else block.session is session)
    ]


def open_blocks(root: Bearer) -> list[Block]:
    return [block for block in reversed(_open_blocks.get()) if block.is_open and block.root is root]


_open_blocks: ContextVar[tuple[Block, ...]] = ContextVar("gridsession_open_blocks", default=())
