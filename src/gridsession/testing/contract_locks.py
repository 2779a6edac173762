"""The grid contract, third part: the lock and its queue."""

from __future__ import annotations

import asyncio

from gridsession.grids.contract import (
    HAND_OFF_SECONDS,
    SAFETY_POLL_SECONDS,
    TICKET_SECONDS,
    Busy,
    Committed,
    Granted,
    Grid,
    LockLost,
    QueueFull,
    Released,
)
from gridsession.testing.contract_hooks import (
    LONG,
    PAST_SHORT,
    SHORT,
    GridHooks,
    Visitor,
    a_change,
    a_claim,
    a_token,
    contract_test,
    expect,
    rings,
)


class LockContract(GridHooks):
    # -- one holder, and its lease ---------------------------------------------------------

    @contract_test()
    async def test_promise_1_one_exclusive_holder(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create()
        claims = [a_claim(str(n)) for n in range(8)]
        outcomes = await asyncio.gather(*[visitor.acquire(claim) for claim in claims])
        granted = [c for c, o in zip(claims, outcomes, strict=True) if isinstance(o, Granted)]
        assert len(granted) == 1
        for claim, outcome in zip(claims, outcomes, strict=True):
            change = a_change(claim.holder.encode())
            done = await grid.commit(visitor.key, claim.token, change, release=False)
            if claim in granted:
                expect(Committed, done)
            else:
                assert expect(Busy, outcome).holder == granted[0].holder
                expect(LockLost, done)
        assert (await visitor.found()).payload == granted[0].holder.encode()

    @contract_test()
    async def test_promise_1_a_lock_taken_over_is_lost(self, grid: Grid) -> None:
        visitor, late, waiter = Visitor(grid), a_claim("late", lease=SHORT), a_claim("waiter")
        await visitor.create()
        await visitor.locked(late)
        await visitor.queued(waiter)
        await self.advance(PAST_SHORT)
        await visitor.locked(waiter)
        for release in (False, True):
            change = a_change(b"too late")
            lost = await grid.commit(visitor.key, late.token, change, release=release)
            expect(LockLost, lost)
        expect(LockLost, await visitor.release(late))
        expect(LockLost, await grid.remove(visitor.key, late.token))
        assert await grid.renew([(visitor.key, late.token)], LONG) == [False]
        await visitor.commit(waiter, a_change(b"in time"))
        assert (await visitor.found()).payload == b"in time"

    @contract_test()
    async def test_promise_7_a_lock_ends_with_its_lease(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        await visitor.create(claim=a_claim(lease=SHORT))
        await visitor.queued(claim)
        expect(Released, await visitor.release(claim))
        await self.advance(PAST_SHORT)
        await visitor.locked(a_claim(queue_limit=0))  # a newcomer needs no ticket

    @contract_test()
    async def test_a_lapsed_lease_that_nobody_took_still_counts(self, grid: Grid) -> None:
        committed, released, renewed = claims = [a_claim(lease=SHORT) for _ in range(3)]
        visitors = [Visitor(grid) for _ in claims]
        for visitor, claim in zip(visitors, claims, strict=True):
            await visitor.create(claim=claim)
        await self.advance(PAST_SHORT)
        await visitors[0].commit(committed, a_change(b"x"), release=True)
        expect(Released, await visitors[1].release(released))
        assert await grid.renew([(visitors[2].key, renewed.token)], LONG) == [True]
        await visitors[2].queued(a_claim())
        await visitors[0].locked(a_claim(queue_limit=0))
        await visitors[1].locked(a_claim(queue_limit=0))

    @contract_test()
    async def test_acquire_again_confirms_and_renews(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim(lease=SHORT)
        await visitor.create(b"first", claim=claim)
        claim.lease = LONG
        assert (await visitor.locked(claim)).payload == b"first"
        await self.advance(PAST_SHORT)
        await visitor.queued(a_claim())
        await visitor.commit(claim, a_change(b"second"))
        assert (await visitor.locked(claim)).payload == b"second"

    @contract_test()
    async def test_renew_answers_for_each_and_lengthens(self, grid: Grid) -> None:
        mine, lost, gone = Visitor(grid), Visitor(grid), Visitor(grid)
        claim, waiter = a_claim(lease=SHORT), a_claim()
        for visitor in (mine, lost):
            await visitor.create()
        await mine.locked(claim)
        await lost.locked(a_claim())
        await lost.queued(waiter)
        pairs = [
            (lost.key, a_token()),
            (mine.key, claim.token),
            (gone.key, a_token()),
            (lost.key, waiter.token),
        ]
        assert await grid.renew(pairs, LONG) == [False, True, False, False]
        assert await grid.renew([], LONG) == []
        await self.advance(PAST_SHORT)
        await mine.queued(a_claim())

    @contract_test()
    async def test_promise_4_release_of_a_foreign_token_changes_nothing(self, grid: Grid) -> None:
        visitor, holder, waiter = Visitor(grid), a_claim("holder"), a_claim()
        await visitor.create()
        expect(LockLost, await visitor.release(holder))
        await visitor.locked(holder)
        await visitor.queued(waiter)
        before = await visitor.found()
        expect(LockLost, await visitor.release(a_claim()))
        assert await visitor.found() == before
        still = await visitor.queued(waiter)
        assert (still.holder, still.ahead) == ("holder", 0)

    # -- the queue --------------------------------------------------------------------------

    @contract_test()
    async def test_tickets_are_served_in_order(self, grid: Grid) -> None:
        visitor, holder = Visitor(grid), a_claim()
        await visitor.create(claim=holder)
        waiters = [a_claim(str(n)) for n in range(5)]
        for place, waiter in enumerate(waiters):
            assert (await visitor.queued(waiter)).ahead == place
        for place, waiter in enumerate(waiters):  # asking again keeps the place
            assert (await visitor.queued(waiter)).ahead == place
        for place, waiter in enumerate(waiters):
            if place % 2:
                expect(Released, await visitor.release(holder))
            else:
                await visitor.commit(holder, a_change(b"%d" % place), release=True)
            for behind, other in enumerate(waiters[place + 1 :]):
                answer = await visitor.queued(other)
                assert (answer.holder, answer.ahead) == (waiter.holder, behind)
            await visitor.locked(waiter)
            holder = waiter

    @contract_test()
    async def test_a_lock_handed_over_is_for_nobody_else(self, grid: Grid) -> None:
        visitor, holder, waiter = Visitor(grid), a_claim(), a_claim("waiter")
        await visitor.create(claim=holder)
        await visitor.queued(waiter)
        expect(Released, await visitor.release(holder))
        assert (await visitor.queued(a_claim())).holder == "waiter"
        assert (await visitor.queued(holder)).holder == "waiter"
        # Also unconfirmed it is the waiter's lock.
        assert await grid.renew([(visitor.key, waiter.token)], LONG) == [True]
        await visitor.commit(waiter, a_change(b"x"))

    @contract_test(takes=HAND_OFF_SECONDS + 0.2)
    async def test_a_hand_over_has_to_be_confirmed_in_time(self, grid: Grid) -> None:
        lazy, eager = Visitor(grid), Visitor(grid)
        first, second = a_claim("first"), a_claim("second")
        for visitor in (lazy, eager):
            holder = a_claim()
            await visitor.create(claim=holder)
            await visitor.queued(first)
            await visitor.queued(second)
            expect(Released, await visitor.release(holder))
        await eager.locked(first)
        await self.advance(HAND_OFF_SECONDS - 0.4)
        assert (await lazy.queued(second)).holder == "first"
        await self.advance(0.6)
        assert (await eager.queued(second)).holder == "first"
        await lazy.locked(second)
        late = await lazy.queued(first)  # passed over: at the end of the queue
        assert (late.holder, late.ahead) == ("second", 0)

    @contract_test()
    async def test_after_a_lapsed_lease_the_first_ticket_is_next(self, grid: Grid) -> None:
        visitor, first, second = Visitor(grid), a_claim("first"), a_claim("second")
        await visitor.create(claim=a_claim(lease=SHORT))
        await visitor.queued(first)
        await visitor.queued(second)
        await self.advance(PAST_SHORT)
        newcomer = await visitor.queued(a_claim("newcomer"))
        assert (newcomer.holder, newcomer.ahead) == ("first", 1)
        await rings(visitor, first)
        assert (await visitor.queued(second)).holder == "first"
        await visitor.locked(first)

    @contract_test(takes=TICKET_SECONDS + 0.6)
    async def test_tickets_not_heard_of_are_dropped(self, grid: Grid) -> None:
        visitor, holder = Visitor(grid), a_claim()
        dead, alive = a_claim("dead"), a_claim("alive")
        await visitor.create(claim=holder)
        await visitor.queued(dead)
        await visitor.queued(alive)
        await self.advance(TICKET_SECONDS * 0.6)
        await visitor.queued(alive)
        await self.advance(TICKET_SECONDS * 0.6)
        # One ticket is left, so two may be entered within a limit of three.
        newcomer = a_claim("newcomer", queue_limit=2)
        assert (await visitor.queued(newcomer)).ahead == 1
        # Who comes back after all is entered again, at the end.
        assert (await visitor.queued(dead)).ahead == 2
        expect(Released, await visitor.release(holder))
        assert (await visitor.queued(newcomer)).holder == "alive"
        await visitor.locked(alive)
        expect(Released, await visitor.release(alive))
        await visitor.locked(newcomer)
        expect(Released, await visitor.release(newcomer))
        await visitor.locked(dead)

    @contract_test(takes=TICKET_SECONDS + 0.4)
    async def test_the_dead_are_skipped_at_a_release(self, grid: Grid) -> None:
        visitor, holder, dead = Visitor(grid), a_claim(), a_claim("dead")
        await visitor.create(claim=holder)
        await visitor.queued(dead)
        await self.advance(TICKET_SECONDS + 0.2)
        expect(Released, await visitor.release(holder))
        await visitor.locked(a_claim(queue_limit=0))

    @contract_test()
    async def test_the_queue_has_a_limit_and_watchers_count(self, grid: Grid) -> None:
        visitor, holder = Visitor(grid), a_claim("holder")
        await visitor.create(claim=holder)
        waiter, watcher, refused = a_claim(), a_claim(), a_claim(queue_limit=2)
        await visitor.queued(waiter)
        expect(Busy, await visitor.read(watch=watcher))
        for outcome in (await visitor.acquire(refused), await visitor.read(watch=refused)):
            full = expect(QueueFull, outcome)
            assert full.holder == "holder"
            assert 0.0 <= full.held_for < 10.0
        expect(LockLost, await visitor.release(refused))  # no ticket is left
        waiter.queue_limit = watcher.queue_limit = 0
        await visitor.queued(waiter)  # a ticket that is in stays in
        expect(Busy, await visitor.read(watch=watcher))
        expect(Released, await visitor.release(watcher))
        assert (await visitor.queued(refused)).ahead == 1
        expect(QueueFull, await visitor.acquire(a_claim(queue_limit=0)))
        expect(Released, await visitor.release(holder))
        await visitor.locked(waiter)
        expect(Released, await visitor.release(waiter))
        await visitor.locked(refused)

    @contract_test()
    async def test_busy_names_the_holder_and_for_how_long(self, grid: Grid) -> None:
        visitor, holder = Visitor(grid), a_claim("POST /cart · web-3 · pid 71")
        await visitor.create(claim=holder)
        await self.advance(0.2)
        await visitor.locked(holder)  # a renewal is no new holding
        busy = await visitor.queued(a_claim())
        assert busy.holder == "POST /cart · web-3 · pid 71"
        assert 0.15 <= busy.held_for < 10.0
        full = expect(QueueFull, await visitor.acquire(a_claim(queue_limit=0)))
        assert (full.holder, full.held_for >= 0.15) == (holder.holder, True)

    @contract_test()
    async def test_retry_in_is_the_safety_poll_or_the_end_of_the_lease(self, grid: Grid) -> None:
        visitor, waiter = Visitor(grid), a_claim()
        holder = a_claim()
        await visitor.create(claim=holder)
        assert abs((await visitor.queued(waiter)).retry_in - SAFETY_POLL_SECONDS) < 0.01
        expect(Released, await visitor.release(waiter))
        expect(Released, await visitor.release(holder))
        await visitor.locked(a_claim(lease=SHORT))
        busy = await visitor.queued(waiter)
        assert 0.0 < busy.retry_in <= SHORT
        await self.advance(busy.retry_in + 0.02)
        await visitor.locked(waiter)

    @contract_test()
    async def test_a_ticket_can_be_withdrawn(self, grid: Grid) -> None:
        visitor, holder, first, second = Visitor(grid), a_claim(), a_claim(), a_claim()
        await visitor.create(claim=holder)
        await visitor.queued(first)
        assert (await visitor.queued(second)).ahead == 1
        expect(Released, await visitor.release(first))
        expect(LockLost, await visitor.release(first))
        assert (await visitor.queued(second)).ahead == 0
        expect(Released, await visitor.release(holder))
        await visitor.locked(second)

    @contract_test()
    async def test_a_granted_hand_over_can_be_withdrawn(self, grid: Grid) -> None:
        visitor, holder, first, second = Visitor(grid), a_claim(), a_claim(), a_claim()
        await visitor.create(claim=holder)
        await visitor.queued(first)
        await visitor.queued(second)
        expect(Released, await visitor.release(holder))
        expect(Released, await visitor.release(first))
        await rings(visitor, second)
        await visitor.locked(second)
