"""The grid contract, fifth part: bells, many at once, and those who only read."""

from __future__ import annotations

import asyncio
import threading

from gridsession.grids.contract import (
    SAFETY_POLL_SECONDS,
    TICKET_SECONDS,
    Busy,
    Claim,
    Found,
    Grid,
    LockLost,
    QueueFull,
    Released,
)
from gridsession.testing.contract_hooks import (
    PAST_SHORT,
    SHORT,
    GridHooks,
    Visitor,
    a_change,
    a_claim,
    contract_test,
    expect,
    payload_of,
    rings,
)


async def _count_up(visitor: Visitor, times: int) -> None:
    """Read, add one, write; other tasks get their turn in between."""
    for _ in range(times):
        claim = a_claim(queue_limit=1000)
        there = await visitor.taken(claim)
        await asyncio.sleep(0)
        await visitor.commit(claim, a_change(b"%d" % (int(payload_of(there)) + 1)), release=True)


class BellContract(GridHooks):
    # -- bells ------------------------------------------------------------------------------

    @contract_test()
    async def test_a_bell_wakes_who_waits(self, grid: Grid) -> None:
        async with self.second_client(grid) as other:
            for client in (grid, other):
                for commits in (False, True):
                    visitor, holder, waiter = Visitor(grid), a_claim(), a_claim()
                    await visitor.create(claim=holder)
                    there = visitor.at(client)
                    await there.queued(waiter)
                    waiting = asyncio.create_task(rings(there, waiter))
                    await asyncio.sleep(0.02)
                    if commits:
                        await visitor.commit(holder, a_change(b"x"), release=True)
                    else:
                        expect(Released, await visitor.release(holder))
                    await waiting
                    await there.locked(waiter)

    @contract_test()
    async def test_a_bell_rung_before_wait_is_not_lost(self, grid: Grid) -> None:
        async with self.second_client(grid) as other:
            for client in (grid, other):
                visitor, holder, waiter = Visitor(grid), a_claim(), a_claim()
                await visitor.create(claim=holder)
                there = visitor.at(client)
                await there.queued(waiter)
                expect(Released, await visitor.release(holder))
                await rings(there, waiter)
                await there.locked(waiter)

    @contract_test()
    async def test_a_bell_is_heard_on_another_event_loop(self, grid: Grid) -> None:
        visitor, holder, waiter = Visitor(grid), a_claim(), a_claim()
        await visitor.create(claim=holder)
        entered = threading.Event()

        async def elsewhere() -> None:
            async with asyncio.timeout(15.0), self.second_client(grid) as other:
                there = visitor.at(other)
                await there.queued(waiter)
                entered.set()
                await rings(there, waiter)
                while isinstance(await there.acquire(waiter), Busy):  # it rang for nothing
                    await rings(there, waiter)
                await there.commit(waiter, a_change(b"from afar"), release=True)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(asyncio.to_thread(lambda: asyncio.run(elsewhere())))
            assert await asyncio.to_thread(entered.wait, 10.0)
            await asyncio.sleep(0.02)
            expect(Released, await visitor.release(holder))
        assert (await visitor.found()).payload == b"from afar"

    @contract_test()
    async def test_wait_returns_without_a_bell(self, grid: Grid) -> None:
        visitor, waiter = Visitor(grid), a_claim()
        await visitor.create(claim=a_claim())
        await visitor.queued(waiter)
        for claim in (waiter, a_claim()):  # a ticket, and none
            async with asyncio.timeout(5.0):
                await visitor.wait(claim, 0.02)

    # -- many at once -----------------------------------------------------------------------

    @contract_test()
    async def test_promise_5_no_update_is_lost(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create(b"0")
        async with self.second_client(grid) as other, asyncio.TaskGroup() as tasks:
            for number in range(10):
                tasks.create_task(_count_up(visitor.at((grid, other)[number % 2]), 4))
        assert (await visitor.found()).payload == b"40"

    @contract_test()
    async def test_promise_5_no_update_is_lost_between_event_loops(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create(b"0")

        async def elsewhere() -> None:
            async with asyncio.timeout(20.0), self.second_client(grid) as other:
                await _count_up(visitor.at(other), 8)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(2):
                tasks.create_task(asyncio.to_thread(lambda: asyncio.run(elsewhere())))
            tasks.create_task(_count_up(visitor, 8))
        assert (await visitor.found()).payload == b"24"

    @contract_test()
    async def test_waiters_get_their_turn_in_order_of_arrival(self, grid: Grid) -> None:
        visitor, holder = Visitor(grid), a_claim()
        await visitor.create(claim=holder)
        served: list[str] = []

        async def turn(claim: Claim) -> None:
            await visitor.taken(claim)
            served.append(claim.holder)
            await visitor.commit(claim, a_change(b"x"), release=True)

        claims = [a_claim(str(n)) for n in range(10)]
        for claim in claims:
            await visitor.queued(claim)
        async with asyncio.TaskGroup() as tasks:
            for claim in reversed(claims):
                tasks.create_task(turn(claim))
            await asyncio.sleep(0.02)
            expect(Released, await visitor.release(holder))
        assert served == [claim.holder for claim in claims]

    # -- readers ----------------------------------------------------------------------------

    @contract_test()
    async def test_a_read_meets_the_last_commit_and_no_lock(self, grid: Grid) -> None:
        visitor, holder = Visitor(grid), a_claim()
        await visitor.create(b"first")
        await visitor.locked(holder)
        assert (await visitor.found()).payload == b"first"
        await visitor.commit(holder, a_change(b"second"))
        assert (await visitor.found()).payload == b"second"
        await visitor.queued(a_claim(queue_limit=1))  # the reads entered no ticket

    @contract_test()
    async def test_a_watch_is_answered_at_once_where_nobody_writes(self, grid: Grid) -> None:
        visitor, watcher = Visitor(grid), a_claim(queue_limit=0)
        await visitor.create(b"calm")
        there = expect(Found, await visitor.read(watch=watcher)).snapshot
        assert there.payload == b"calm"
        expect(LockLost, await visitor.release(watcher))  # neither lock nor ticket
        await visitor.locked(a_claim(queue_limit=0))

    @contract_test()
    async def test_a_watcher_is_rung_and_gets_no_lock(self, grid: Grid) -> None:
        visitor, holder, watcher = Visitor(grid), a_claim("writer"), a_claim()
        await visitor.create(b"old", claim=holder)
        busy = expect(Busy, await visitor.read(watch=watcher))
        assert (busy.holder, busy.ahead) == ("writer", 0)
        again = expect(Busy, await visitor.read(watch=watcher, seen=busy.lock))
        assert again.lock == busy.lock
        assert 0.0 < again.retry_in <= SAFETY_POLL_SECONDS
        assert (await visitor.queued(a_claim(queue_limit=2))).ahead == 0  # refreshed, not doubled
        await visitor.commit(holder, a_change(b"new"), release=True)
        await rings(visitor, watcher)
        there = expect(Found, await visitor.read(watch=watcher, seen=busy.lock)).snapshot
        assert there.payload == b"new"

    @contract_test()
    async def test_watchers_hold_nobody_up(self, grid: Grid) -> None:
        visitor, holder, writer = Visitor(grid), a_claim(), a_claim()
        await visitor.create(claim=holder)
        watchers = [a_claim(), a_claim()]
        expect(Busy, await visitor.read(watch=watchers[0]))
        assert (await visitor.queued(writer)).ahead == 0
        expect(Busy, await visitor.read(watch=watchers[1]))
        expect(Released, await visitor.release(holder))
        for bell in (writer, *watchers):
            await rings(visitor, bell)
        await visitor.locked(writer)
        expect(Released, await visitor.release(writer))
        await visitor.locked(a_claim(queue_limit=0))  # their tickets are gone with the ring

    @contract_test()
    async def test_a_reader_waits_only_for_the_writer_that_it_met(self, grid: Grid) -> None:
        visitor, reader, newcomer = Visitor(grid), a_claim(), a_claim()
        writers = [a_claim(f"writer {n}") for n in range(4)]
        await visitor.create(b"0", claim=writers[0])
        for writer in writers[1:]:
            await visitor.queued(writer)
        met = expect(Busy, await visitor.read(watch=reader))
        seen = {met.lock}
        for number, writer in enumerate(writers[:-1], start=1):
            payload = b"%d" % number
            await visitor.commit(writer, a_change(payload), release=True)
            if number == 1:
                await rings(visitor, reader)
            else:  # it makes no difference whether the next one has confirmed
                await visitor.locked(writers[number])
            there = expect(Found, await visitor.read(watch=reader, seen=met.lock)).snapshot
            assert there.payload == payload
            other = expect(Busy, await visitor.read(watch=newcomer))
            assert other.holder == f"writer {number}"
            assert other.lock not in seen
            seen.add(other.lock)

    @contract_test()
    async def test_a_watch_ends_with_the_lease(self, grid: Grid) -> None:
        visitor, watcher = Visitor(grid), a_claim()
        await visitor.create(claim=a_claim(lease=SHORT))
        met = expect(Busy, await visitor.read(watch=watcher))
        assert met.retry_in <= SHORT
        await self.advance(PAST_SHORT)
        expect(Found, await visitor.read(watch=watcher, seen=met.lock))
        expect(LockLost, await visitor.release(watcher))

    @contract_test()
    async def test_after_a_lapsed_lease_a_watcher_is_not_next(self, grid: Grid) -> None:
        visitor, watcher = Visitor(grid), a_claim()
        await visitor.create(claim=a_claim(lease=SHORT))
        expect(Busy, await visitor.read(watch=watcher))
        await self.advance(PAST_SHORT)
        await visitor.locked(a_claim())

    @contract_test(takes=TICKET_SECONDS + 0.6)
    async def test_watchers_are_heard_of_and_forgotten_as_waiters_are(self, grid: Grid) -> None:
        visitor, holder, alive, dead = Visitor(grid), a_claim(), a_claim(), a_claim()
        await visitor.create(claim=holder)
        for watcher in (alive, dead):
            expect(Busy, await visitor.read(watch=watcher))
        await self.advance(TICKET_SECONDS * 0.6)
        expect(Busy, await visitor.read(watch=alive))
        await self.advance(TICKET_SECONDS * 0.6)
        await visitor.queued(a_claim(queue_limit=2))
        expect(QueueFull, await visitor.acquire(a_claim(queue_limit=2)))
        expect(Released, await visitor.release(alive))
        expect(LockLost, await visitor.release(dead))
