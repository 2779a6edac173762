"""The grid contract, second part: deadlines slide, pass, and are swept."""

from __future__ import annotations

from gridsession.grids.contract import (
    HAND_OFF_SECONDS,
    Committed,
    Exists,
    Found,
    Gone,
    Grid,
    Missing,
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
    a_new,
    a_secret,
    a_token,
    contract_test,
    expect,
    is_absent,
)

_CLOSE = 0.01  # seconds: how exactly a grid must keep times


class ExpiryContract(GridHooks):
    @contract_test()
    async def test_acquire_touch_and_commit_slide_and_read_does_not(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        last = (await visitor.create(timeout=100.0)).deadline
        for call in ("acquire", "touch", "commit"):
            await self.advance(0.05)
            await visitor.read()
            assert (await visitor.found()).deadline == last
            if call == "acquire":
                await visitor.locked(claim)
            elif call == "touch":
                assert await grid.touch(visitor.key) is True
            else:
                await visitor.commit(claim, a_change(None, timeout=100.0))
            there = await visitor.found()
            assert there.deadline >= last + 0.04, call
            assert there.deadline < last + 50.0, call
            last = there.deadline

    @contract_test(takes=1.5)
    async def test_slide_is_due_after_a_hundredth_of_the_timeout(self, grid: Grid) -> None:
        visitor, brief = Visitor(grid), Visitor(grid)
        await visitor.create(timeout=60.0)
        await brief.create(timeout=10.0)
        await self.advance(0.1)
        assert not (await visitor.found()).slide_due
        await self.advance(0.1)
        assert not (await brief.found()).slide_due  # a second is the least
        await self.advance(1.2)
        assert (await visitor.found()).slide_due
        assert not (await visitor.locked(a_claim(lease=SHORT))).slide_due
        await self.advance(0.05)
        assert await grid.touch(visitor.key)
        assert not (await visitor.found()).slide_due

    @contract_test()
    async def test_promise_2_an_expired_record_is_absent_before_any_sweep(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim(lease=SHORT)
        await visitor.create(timeout=SHORT, claim=claim)
        other = Visitor(grid)
        await other.create(timeout=SHORT)
        await self.advance(PAST_SHORT)
        await is_absent(visitor, claim.token)
        await is_absent(other, a_token())
        assert await grid.sweep(10) <= 10
        await is_absent(visitor, claim.token)

    @contract_test()
    async def test_promise_2_release_does_not_revive_the_expired(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim(lease=SHORT)
        await visitor.create(timeout=SHORT, claim=claim)
        await self.advance(PAST_SHORT)
        expect(Gone, await visitor.release(claim))
        await is_absent(visitor, claim.token)

    @contract_test()
    async def test_promise_2_a_repeated_commit_does_not_revive_the_expired(
        self, grid: Grid
    ) -> None:
        visitor, claim, waiter = Visitor(grid), a_claim(lease=SHORT), a_claim()
        await visitor.create(timeout=SHORT, claim=claim)
        change = a_change(b"last", timeout=SHORT)
        await visitor.commit(claim, change)
        await visitor.queued(waiter)
        await self.advance(PAST_SHORT)
        expect(Gone, await grid.commit(visitor.key, claim.token, change, release=True))
        await is_absent(visitor, claim.token)

    @contract_test()
    async def test_an_expired_record_can_be_created_again(self, grid: Grid) -> None:
        old = Visitor(grid)
        new = a_new(old.secret, b"old", timeout=SHORT)
        expect(Committed, await grid.create(old.key, new))
        await self.advance(PAST_SHORT)
        fresh = old.at(grid)
        fresh.secret = a_secret()
        await fresh.create(b"fresh")
        there = await fresh.found()
        assert there.payload == b"fresh"
        expect(Missing, await old.read())
        await grid.sweep(10)
        assert await fresh.found() == there

    @contract_test()
    async def test_create_repeated_after_expiry_creates_again(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        new = a_new(visitor.secret, b"again", timeout=SHORT)
        expect(Committed, await grid.create(visitor.key, new))
        await self.advance(PAST_SHORT)
        expect(Committed, await grid.create(visitor.key, new))
        assert (await visitor.found()).payload == b"again"

    @contract_test()
    async def test_absolute_timeout_is_never_slid_over(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim(lease=SHORT)
        await visitor.create(timeout=1000.0, absolute=SHORT)
        end = (await visitor.found()).created + SHORT
        there = await visitor.locked(claim)
        assert abs(there.deadline - end) < _CLOSE
        assert await grid.touch(visitor.key)
        done = await visitor.commit(claim, a_change(b"late", timeout=2000.0), release=True)
        assert abs(done.deadline - end) < _CLOSE
        there = await visitor.found()
        assert abs(there.deadline - end) < _CLOSE
        assert not there.slide_due
        await self.advance(PAST_SHORT)
        await is_absent(visitor, claim.token)

    @contract_test()
    async def test_a_shortened_deadline_ends_on_time_and_is_swept(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        await visitor.create(timeout=1000.0, claim=claim)
        done = await visitor.commit(claim, a_change(b"x", timeout=SHORT), release=True)
        there = await visitor.found()
        assert (there.timeout, there.deadline) == (SHORT, done.deadline)
        assert done.deadline < there.created + SHORT + 10.0
        await self.advance(PAST_SHORT)
        expect(Missing, await visitor.read())
        assert await grid.sweep(10) >= 1
        assert await grid.sweep(10) == 0

    @contract_test()
    async def test_no_session_expires_while_its_lock_lives(self, grid: Grid) -> None:
        visitor, claim, waiter = Visitor(grid), a_claim(), a_claim()
        await visitor.create(b"kept", timeout=SHORT, claim=claim)
        await self.advance(PAST_SHORT)
        assert (await visitor.found()).payload == b"kept"
        await visitor.queued(waiter)
        await grid.sweep(10)
        new = a_new(a_secret())
        expect(Exists, await grid.create(visitor.key, new))
        assert await grid.renew([(visitor.key, claim.token)], LONG) == [True]
        await visitor.commit(claim, a_change(b"more", timeout=1000.0), release=True)
        assert (await visitor.locked(waiter)).payload == b"more"

    @contract_test()
    async def test_a_release_after_the_deadline_is_a_use_of_the_session(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        await visitor.create(timeout=SHORT, claim=claim)
        await self.advance(PAST_SHORT)
        expect(Released, await visitor.release(claim))
        expect(Found, await visitor.read())
        await self.advance(PAST_SHORT)
        expect(Missing, await visitor.read())

    @contract_test()
    async def test_sweep_goes_in_batches_and_spares_the_living(self, grid: Grid) -> None:
        living, locked, claim = Visitor(grid), Visitor(grid), a_claim()
        await living.create(timeout=1000.0)
        await locked.create(timeout=SHORT, claim=claim)
        dead = [Visitor(grid) for _ in range(5)]
        for visitor in dead:
            await visitor.create(timeout=SHORT)
        assert await grid.sweep(100) == 0
        await self.advance(PAST_SHORT)
        answers = [await grid.sweep(2)]
        while answers[-1] == 2 and len(answers) < 10:
            answers.append(await grid.sweep(2))
        assert all(answer <= 2 for answer in answers)
        assert answers[-1] < 2, "sweep() never says that it is done"
        assert sum(answers) >= len(dead)
        assert await grid.sweep(100) == 0, "sweep() said that nothing more is due"
        expect(Found, await living.read())
        await locked.commit(claim, a_change(b"alive", timeout=SHORT), release=True)
        await self.advance(PAST_SHORT)
        assert await grid.sweep(100) >= 1  # put off while it was locked, not forgotten
        for visitor in [*dead, locked]:
            await is_absent(visitor, claim.token)
            await visitor.create(b"anew")

    @contract_test()
    async def test_what_a_lock_put_off_is_due_on_time_after_its_release(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim(lease=LONG)
        await visitor.create(timeout=SHORT, claim=claim)
        await self.advance(PAST_SHORT)
        await grid.sweep(10)  # not yet: it is locked
        expect(Released, await visitor.release(claim))
        await self.advance(PAST_SHORT)
        expect(Missing, await visitor.read())
        assert await grid.sweep(10) >= 1
        assert await grid.sweep(10) == 0

    @contract_test()
    async def test_what_a_lock_put_off_is_due_on_time_after_a_shorter_lease(
        self, grid: Grid
    ) -> None:
        visitor, claim = Visitor(grid), a_claim(lease=LONG)
        await visitor.create(timeout=SHORT, claim=claim)
        await self.advance(PAST_SHORT)
        await grid.sweep(10)  # not before the lease's end
        assert await grid.renew([(visitor.key, claim.token)], SHORT) == [True]
        await self.advance(PAST_SHORT)
        expect(Missing, await visitor.read())
        assert await grid.sweep(10) >= 1
        assert await grid.sweep(10) == 0

    @contract_test(takes=2 * PAST_SHORT + HAND_OFF_SECONDS)
    async def test_what_a_lock_put_off_is_due_on_time_after_a_hand_off_in_vain(
        self, grid: Grid
    ) -> None:
        visitor, claim = Visitor(grid), a_claim(lease=LONG)
        await visitor.create(timeout=SHORT, claim=claim)
        await visitor.queued(a_claim())  # never comes again
        await self.advance(PAST_SHORT)
        await grid.sweep(10)  # not before the lease's end
        expect(Released, await visitor.release(claim))
        await self.advance(HAND_OFF_SECONDS + PAST_SHORT)
        expect(Missing, await visitor.read())
        assert await grid.sweep(10) >= 1
        assert await grid.sweep(10) == 0
