"""The grid contract, sixth part: a call cancelled at any await happened whole or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any

from gridsession.grids.contract import (
    Claim,
    Committed,
    Found,
    Gone,
    Grid,
    Locked,
    LockLost,
    Missing,
    Released,
    Removed,
    Rotation,
    Version,
)
from gridsession.testing.contract_hooks import (
    LONG,
    PAST_SHORT,
    SHORT,
    GridHooks,
    Visitor,
    a_change,
    a_claim,
    a_new,
    a_secret,
    contract_test,
    expect,
    rings,
)

_Call = Coroutine[Any, Any, object]
_Scene = tuple[Visitor, _Call, Callable[[], Awaitable[None]]]


class _CancelledAt:
    """Await a call, and cancel its task at the call's n-th suspension.

    Args:
        late: not at once, but when what it waits for is there already: the call has been
            carried out elsewhere, and the caller never learns of it.
    """

    def __init__(self, call: _Call, step: int, *, late: bool) -> None:
        self._call, self._step, self._late = call, step, late
        self.was_cancelled = False

    def __await__(self) -> Generator[Any, Any, object]:
        task = asyncio.current_task()
        assert task is not None
        inner = self._call.__await__()
        thrown: BaseException | None = None
        suspensions = 0
        while True:
            try:
                awaited = inner.send(None) if thrown is None else inner.throw(thrown)
            except StopIteration as done:
                return done.value
            if suspensions == self._step:
                self.was_cancelled = True
                if self._late and isinstance(awaited, asyncio.Future):
                    # Runs before the task's own callback, which is added after this yield.
                    awaited.add_done_callback(lambda _: task.cancel())
                else:
                    task.cancel()
            suspensions += 1
            try:
                yield awaited
                thrown = None
            except BaseException as error:
                thrown = error


async def _was_cancelled(call: _Call, step: int, *, late: bool) -> bool:
    """Run a call, cancelled at its n-th suspension; False when it ended before that."""
    cancelled = _CancelledAt(call, step, late=late)

    async def run() -> object:
        return await cancelled

    task = asyncio.create_task(run())
    await asyncio.wait([task])
    if not cancelled.was_cancelled:
        task.result()
    else:
        assert task.cancelled(), f"the call swallowed its cancellation: {task}"
    return cancelled.was_cancelled


async def _each_cancellation(attempt: Callable[[], Awaitable[_Scene]]) -> None:
    """Make the call, cancelled at each of its suspensions in turn, and check what it left.

    Args:
        attempt: prepares a scene of its own; answers whose, the call and the check.
    """
    for late in (False, True):
        step, more = 0, True
        while more:
            visitor, call, check = await attempt()
            more = await _was_cancelled(call, step, late=late)
            # It may be under way yet, in a thread or on a wire: what is asked next comes after.
            await visitor.grid.touch(visitor.key)
            await check()
            step += 1


async def _queue_moves(visitor: Visitor, token: bytes, waiter: Claim) -> None:
    """Withdrawn by its token, a call leaves nothing in the way of the next."""
    await visitor.grid.release(visitor.key, token)
    await visitor.locked(waiter)
    expect(LockLost, await visitor.grid.release(visitor.key, token))


class CancellationContract(GridHooks):
    @contract_test()
    async def test_promise_7_create_cancelled(self, grid: Grid) -> None:
        async def attempt() -> _Scene:
            visitor, claim, waiter = Visitor(grid), a_claim("creator"), a_claim()
            new = a_new(visitor.secret, b"whole")

            async def check() -> None:
                if isinstance(there := await visitor.read(), Missing):
                    expect(Gone, await visitor.release(claim))
                    expect(Committed, await grid.create(visitor.key, new))
                else:
                    assert expect(Found, there).snapshot.payload == b"whole"
                    expect(Committed, await grid.create(visitor.key, new, claim))
                    assert (await visitor.queued(waiter)).holder == "creator"
                await _queue_moves(visitor, claim.token, waiter)

            return visitor, grid.create(visitor.key, new, claim), check

        await _each_cancellation(attempt)

    @contract_test()
    async def test_promise_7_acquire_cancelled(self, grid: Grid) -> None:
        async def free() -> _Scene:
            visitor, claim = Visitor(grid), a_claim()
            await visitor.create()
            return (
                visitor,
                visitor.acquire(claim),
                lambda: _queue_moves(visitor, claim.token, a_claim()),
            )

        async def queued() -> _Scene:
            visitor, holder, claim, waiter = Visitor(grid), a_claim(), a_claim(), a_claim()
            await visitor.create(claim=holder)

            async def check() -> None:
                await visitor.queued(waiter)
                expect(Released, await visitor.release(holder))
                await _queue_moves(visitor, claim.token, waiter)

            return visitor, visitor.acquire(claim), check

        async def handed_over() -> _Scene:
            visitor, holder, claim, waiter = Visitor(grid), a_claim(), a_claim(), a_claim()
            await visitor.create(claim=holder)
            await visitor.queued(claim)
            await visitor.queued(waiter)
            expect(Released, await visitor.release(holder))
            return (
                visitor,
                visitor.acquire(claim),
                lambda: _queue_moves(visitor, claim.token, waiter),
            )

        for attempt in (free, queued, handed_over):
            await _each_cancellation(attempt)

    @contract_test()
    async def test_promise_7_a_cancelled_call_s_lock_ends_with_its_lease(self, grid: Grid) -> None:
        left: list[Visitor] = []

        async def attempt() -> _Scene:
            visitor = Visitor(grid)
            await visitor.create()
            left.append(visitor)

            async def check() -> None:
                pass

            return visitor, visitor.acquire(a_claim(lease=SHORT)), check

        await _each_cancellation(attempt)
        await self.advance(PAST_SHORT)
        for visitor in left:
            await visitor.locked(a_claim(queue_limit=0))

    @contract_test()
    async def test_promise_7_commit_cancelled(self, grid: Grid) -> None:
        for release in (False, True):

            async def attempt(release: bool = release) -> _Scene:
                visitor, claim, waiter = Visitor(grid), a_claim(), a_claim()
                created = await visitor.create(b"old", user="old", claim=claim)
                await visitor.queued(waiter)
                old, new = visitor.secret, a_secret()
                change = a_change(b"new", timeout=9.0, user="new", rotation=Rotation(new, False))

                async def check() -> None:
                    there = await visitor.found()  # with the old secret: it was merely rotated
                    changed = there.version != created.version
                    assert (there.payload, there.user, there.timeout, there.replaced) == (
                        (b"new", "new", 9.0, True) if changed else (b"old", "old", 1000.0, False)
                    )
                    visitor.secret = new
                    expect(Found if changed else Missing, await visitor.read())
                    if not changed:
                        await visitor.commit(claim, change, release=release)
                    done = await visitor.commit(claim, change, release=release)
                    assert done.version.counter == created.version.counter + 1
                    visitor.secret = old
                    await _queue_moves(visitor, claim.token, waiter)

                call = grid.commit(visitor.key, claim.token, change, release=release)
                return visitor, call, check

            await _each_cancellation(attempt)

    @contract_test()
    async def test_promise_7_commit_if_cancelled(self, grid: Grid) -> None:
        for lapsed in (False, True):

            async def attempt(lapsed: bool = lapsed) -> _Scene:
                visitor, late, waiter = Visitor(grid), a_claim(lease=SHORT), a_claim()
                base = (await visitor.create(b"old", user="old", claim=late)).version
                if lapsed:
                    await self.advance(PAST_SHORT)
                else:
                    expect(Released, await visitor.release(late))
                old, new = visitor.secret, a_secret()
                change = a_change(b"new", timeout=9.0, user="new", rotation=Rotation(new, False))

                async def check() -> None:
                    there = await visitor.found()  # with the old secret: it was merely rotated
                    assert (there.payload, there.user, there.timeout, there.replaced) == (
                        (b"new", "new", 9.0, True)
                        if there.version != base
                        else (b"old", "old", 1000.0, False)
                    )
                    for _ in range(2):
                        done = expect(Committed, await visitor.commit_if(base, change))
                        assert done.version == Version(base.counter + 1, change.commit_token)
                    expect(Found, await visitor.read(new))
                    visitor.secret = old
                    await _queue_moves(visitor, late.token, waiter)

                return visitor, visitor.commit_if(base, change), check

            await _each_cancellation(attempt)

    @contract_test(takes=3.0)
    async def test_promise_7_commit_if_cancelled_while_it_hands_over(self, grid: Grid) -> None:
        async def attempt() -> _Scene:
            visitor, waiter, after = Visitor(grid), a_claim(), a_claim()
            base = (await visitor.create(b"old", claim=a_claim(lease=SHORT))).version
            await visitor.queued(waiter)
            await self.advance(PAST_SHORT)

            async def check() -> None:
                expect(Locked, await visitor.commit_if(base, a_change(b"new")))
                assert (await visitor.locked(waiter)).payload == b"old"
                await visitor.queued(after)
                await _queue_moves(visitor, waiter.token, after)

            return visitor, visitor.commit_if(base, a_change(b"new")), check

        await _each_cancellation(attempt)

    @contract_test()
    async def test_promise_7_renew_and_touch_cancelled(self, grid: Grid) -> None:
        for name in ("renew", "touch"):

            async def attempt(name: str = name) -> _Scene:
                visitor, claim, waiter = Visitor(grid), a_claim(), a_claim()
                await visitor.create(claim=claim)
                await visitor.queued(waiter)

                async def check() -> None:
                    await visitor.commit(claim, a_change(b"mine"))
                    await _queue_moves(visitor, claim.token, waiter)

                if name == "touch":
                    return visitor, grid.touch(visitor.key), check
                return visitor, grid.renew([(visitor.key, claim.token)], LONG), check

            await _each_cancellation(attempt)

    @contract_test()
    async def test_promise_7_release_cancelled(self, grid: Grid) -> None:
        async def of_the_lock() -> _Scene:
            visitor, claim, waiter = Visitor(grid), a_claim(), a_claim()
            await visitor.create(claim=claim)
            await visitor.queued(waiter)
            return (
                visitor,
                visitor.release(claim),
                lambda: _queue_moves(visitor, claim.token, waiter),
            )

        async def of_a_ticket() -> _Scene:
            visitor, holder, claim, waiter = Visitor(grid), a_claim(), a_claim(), a_claim()
            await visitor.create(claim=holder)
            await visitor.queued(claim)
            await visitor.queued(waiter)

            async def check() -> None:
                expect(Released, await visitor.release(holder))
                await _queue_moves(visitor, claim.token, waiter)

            return visitor, visitor.release(claim), check

        for attempt in (of_the_lock, of_a_ticket):
            await _each_cancellation(attempt)

    @contract_test()
    async def test_promise_7_remove_cancelled(self, grid: Grid) -> None:
        async def attempt() -> _Scene:
            visitor, claim, waiter = Visitor(grid), a_claim(), a_claim()
            await visitor.create(b"whole", claim=claim)
            await visitor.queued(waiter)

            async def check() -> None:
                if isinstance(there := await visitor.read(), Missing):
                    expect(Gone, await grid.remove(visitor.key, claim.token))
                else:
                    assert expect(Found, there).snapshot.payload == b"whole"
                    await visitor.queued(waiter)
                    expect(Removed, await grid.remove(visitor.key, claim.token))
                await rings(visitor, waiter)
                expect(Missing, await visitor.acquire(waiter))
                await visitor.create(b"anew")

            return visitor, grid.remove(visitor.key, claim.token), check

        await _each_cancellation(attempt)

    @contract_test()
    async def test_promise_7_read_cancelled(self, grid: Grid) -> None:
        async def attempt() -> _Scene:
            visitor, holder, watcher, waiter = Visitor(grid), a_claim(), a_claim(), a_claim()
            await visitor.create(claim=holder)

            async def check() -> None:
                await grid.release(visitor.key, watcher.token)
                waiter.queue_limit = 1
                await visitor.queued(waiter)
                await _queue_moves(visitor, holder.token, waiter)

            return visitor, visitor.read(watch=watcher), check

        await _each_cancellation(attempt)

    @contract_test()
    async def test_promise_7_wait_cancelled(self, grid: Grid) -> None:
        async def attempt() -> _Scene:
            visitor, holder, claim = Visitor(grid), a_claim(), a_claim()
            await visitor.create(claim=holder)
            await visitor.queued(claim)

            async def check() -> None:
                expect(Released, await visitor.release(holder))
                await rings(visitor, claim)
                await visitor.locked(claim)

            return visitor, visitor.wait(claim, 0.02), check

        await _each_cancellation(attempt)

    @contract_test()
    async def test_promise_7_sweep_cancelled(self, grid: Grid) -> None:
        dead = [Visitor(grid) for _ in range(3)]
        for visitor in dead:
            await visitor.create(timeout=SHORT)
        await self.advance(PAST_SHORT)

        async def attempt() -> _Scene:
            async def check() -> None:
                for visitor in dead:
                    expect(Missing, await visitor.read())

            return dead[0], grid.sweep(2), check

        await _each_cancellation(attempt)
        while await grid.sweep(2) == 2:
            pass
        for visitor in dead:
            await visitor.create(b"anew")
