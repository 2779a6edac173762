"""The grid contract, fourth part: versions that callers know, and commits without a lock."""

from __future__ import annotations

import asyncio

from gridsession.grids.contract import (
    HAND_OFF_SECONDS,
    Busy,
    Committed,
    Conflict,
    Found,
    Gone,
    Granted,
    Grid,
    Locked,
    LockLost,
    Missing,
    QueueFull,
    Released,
    Removed,
    Replaced,
    Rotation,
    Snapshot,
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
    a_secret,
    contract_test,
    expect,
    payload_of,
    rings,
)

_CLOSE = 0.01  # seconds: how exactly a grid must keep times


async def _seen(visitor: Visitor, known: Version | None) -> list[Snapshot]:
    """The record, by each of the calls that bring it; it is free afterwards."""
    seen = [
        expect(Found, await visitor.read(known=known)).snapshot,
        expect(Found, await visitor.read(watch=a_claim(), known=known)).snapshot,
    ]
    claim = a_claim()
    for _ in range(2):  # the second time it holds the lock already
        seen.append(expect(Granted, await visitor.acquire(claim, known=known)).snapshot)
    expect(Released, await visitor.release(claim))
    return seen


async def _added(visitor: Visitor, word: bytes) -> None:
    """Add a word to a session as a concurrent request does: again, upon what others made of it."""
    there = await visitor.found()
    while True:
        change = a_change(payload_of(there) + word)
        outcome = await visitor.commit_if(there.version, change)
        if isinstance(outcome, Committed):
            return
        there = expect(Conflict, outcome).snapshot


class ConcurrentContract(GridHooks):
    # -- what the caller knows --------------------------------------------------------------

    @contract_test()
    async def test_a_payload_that_is_known_is_not_sent(self, grid: Grid) -> None:
        for payload in (b"", b"cart", b"x" * 100_000):
            visitor = Visitor(grid)
            await visitor.create(payload, user="ann")
            there = await visitor.found()
            assert there.payload == payload
            for one in await _seen(visitor, there.version):
                assert one.payload is None
                assert (one.version, one.user) == (there.version, "ann")
                assert (one.created, one.timeout) == (there.created, there.timeout)

    @contract_test()
    async def test_promise_8_another_version_is_sent(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        first = (await visitor.create(b"first", claim=claim)).version
        second = (await visitor.commit(claim, a_change(b"second"), release=True)).version
        others = [
            first,
            second._replace(counter=second.counter + 1),
            second._replace(token=second.token ^ 1),
            second._replace(token=second.token ^ (1 << 63)),
            Version(0, 0),
        ]
        for known in others:
            assert [one.payload for one in await _seen(visitor, known)] == [b"second"] * 4
        assert [one.payload for one in await _seen(visitor, second)] == [None] * 4

    @contract_test()
    async def test_promise_8_a_counter_that_repeats_is_another_version(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        for number in range(2):  # as after a fail-over that has lost the first one's commit
            made = (await visitor.create(b"made")).version
            change = a_change(b"%d" % number)
            done = expect(Committed, await visitor.commit_if(made, change))
            if number == 0:
                lost = done.version
                expect(Removed, await grid.remove(visitor.key))
        assert (done.version.counter, done.version == lost) == (lost.counter, False)
        assert [one.payload for one in await _seen(visitor, lost)] == [b"1"] * 4
        conflict = expect(Conflict, await visitor.commit_if(lost, a_change(b"stale")))
        assert conflict.snapshot.version == done.version
        assert (await visitor.found()).payload == b"1"

    @contract_test()
    async def test_who_has_waited_is_told_what_changed_meanwhile(self, grid: Grid) -> None:
        visitor, holder, waiter, next_one = Visitor(grid), a_claim(), a_claim(), a_claim()
        known = (await visitor.create(b"old", claim=holder)).version
        expect(Busy, await visitor.acquire(waiter, known=known))
        known = (await visitor.commit(holder, a_change(b"new"), release=True)).version
        got = expect(Granted, await visitor.acquire(waiter, known=Version(1, 1)))
        assert got.snapshot.payload == b"new"
        await visitor.queued(next_one)
        expect(Released, await visitor.release(waiter))
        assert (
            expect(Granted, await visitor.acquire(next_one, known=known)).snapshot.payload is None
        )

    @contract_test()
    async def test_a_deadline_is_also_told_from_now_on(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        made = await visitor.create(timeout=100.0)
        assert abs(made.expires_in - 100.0) < _CLOSE
        await self.advance(0.5)
        there = await visitor.found()
        assert 50.0 < there.expires_in < 99.6
        assert abs(there.deadline - made.deadline) < _CLOSE
        held = await visitor.locked(claim)
        assert abs(held.expires_in - 100.0) < _CLOSE
        change = a_change(None, timeout=200.0)
        assert abs((await visitor.commit(claim, change)).expires_in - 200.0) < _CLOSE
        await self.advance(0.5)
        again = await visitor.commit(claim, change, release=True)
        assert 100.0 < again.expires_in < 199.6

    @contract_test()
    async def test_what_only_a_lock_keeps_expires_in_less_than_nothing(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create(timeout=SHORT, claim=a_claim())
        await self.advance(PAST_SHORT)
        assert -10.0 < (await visitor.found()).expires_in < 0.0

    # -- commits without a lock -------------------------------------------------------------

    @contract_test()
    async def test_commit_if_stores_and_locks_nothing(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        made = await visitor.create(b"old", timeout=1000.0)
        change = a_change(b"new", timeout=500.0, user="ann")
        done = expect(Committed, await visitor.commit_if(made.version, change))
        assert done.version == Version(made.version.counter + 1, change.commit_token)
        assert abs(done.expires_in - 500.0) < _CLOSE
        there = await visitor.found()
        assert (there.payload, there.user, there.timeout) == (b"new", "ann", 500.0)
        assert (there.version, there.deadline) == (done.version, done.deadline)
        merely = a_change(None, timeout=600.0)
        done = expect(Committed, await visitor.commit_if(done.version, merely))
        there = await visitor.locked(a_claim(queue_limit=0))
        assert (there.payload, there.user, there.timeout) == (b"new", None, 600.0)
        assert there.version == done.version

    @contract_test()
    async def test_promise_5_commit_if_upon_another_version_is_a_conflict(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        base = (await visitor.create(b"base", claim=claim)).version
        await visitor.commit(claim, a_change(b"theirs", user="ann", timeout=900.0), release=True)
        await self.advance(0.05)
        there = await visitor.found()
        rotation = Rotation(a_secret(), user_changed=True)
        stale = a_change(b"stale", timeout=5.0, user="bob", rotation=rotation)
        others = [
            base,
            there.version._replace(counter=base.counter),
            there.version._replace(token=base.token),
            Version(0, 0),
        ]
        for known in others:
            conflict = expect(Conflict, await visitor.commit_if(known, stale))
            assert conflict.snapshot == there
            assert abs(conflict.snapshot.expires_in - there.expires_in) < 5.0
        assert await visitor.found() == there
        expect(Missing, await visitor.read(rotation.secret))
        expect(Committed, await visitor.commit_if(conflict.snapshot.version, stale))
        assert expect(Found, await visitor.read(rotation.secret)).snapshot.payload == b"stale"

    @contract_test()
    async def test_a_conflict_says_when_a_touch_is_due(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create(timeout=100.0)
        await self.advance(1.2)
        conflict = expect(Conflict, await visitor.commit_if(Version(0, 0), a_change(b"x")))
        assert conflict.snapshot.slide_due
        assert await grid.touch(visitor.key)
        conflict = expect(Conflict, await visitor.commit_if(Version(0, 0), a_change(b"x")))
        assert not conflict.snapshot.slide_due

    @contract_test()
    async def test_promise_5_commits_without_a_lock_lose_no_update(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        made = (await visitor.create(b"")).version
        words = [b"<%d>" % number for number in range(8)]
        async with self.second_client(grid) as other:
            places = (visitor, visitor.at(other))
            await asyncio.gather(*[_added(places[n % 2], word) for n, word in enumerate(words)])
        there = await visitor.found()
        assert sorted(payload_of(there).replace(b">", b"> ").split()) == words
        assert there.version.counter == made.counter + len(words)

    @contract_test()
    async def test_promise_5_commit_if_repeated_with_its_commit_token(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        base = (await visitor.create()).version
        old, new = visitor.secret, a_secret()
        change = a_change(b"one", user="ann", rotation=Rotation(new, user_changed=True))
        first = expect(Committed, await visitor.commit_if(base, change))
        # Also with the secret that it has replaced itself.
        again = expect(Committed, await visitor.commit_if(base, change, old))
        assert again.version == first.version
        visitor.secret = new
        await visitor.locked(claim)
        second = await visitor.commit(claim, a_change(b"two"))
        again = expect(Committed, await visitor.commit_if(base, change))  # under another's lock
        assert again.version == first.version
        expect(Released, await visitor.release(claim))
        again = expect(Committed, await visitor.commit_if(base, change))
        assert again.version == first.version
        there = await visitor.found()
        assert (there.payload, there.version) == (b"two", second.version)

    @contract_test()
    async def test_promise_1_commit_if_does_not_pass_a_lock_by(self, grid: Grid) -> None:
        visitor, holder, waiter = Visitor(grid), a_claim(), a_claim(queue_limit=1)
        base = (await visitor.create(claim=holder)).version
        before = await visitor.found()
        await self.advance(0.05)
        for known in (base, Version(0, 0)):
            expect(Locked, await visitor.commit_if(known, a_change(b"mine")))
        after = await visitor.found()
        assert (after.payload, after.version) == (before.payload, before.version)
        assert after.deadline == before.deadline
        assert (await visitor.queued(waiter)).ahead == 0  # no ticket was entered
        done = await visitor.commit(holder, a_change(b"theirs"), release=True)
        # It is the waiter's, though it has not confirmed it.
        expect(Locked, await visitor.commit_if(done.version, a_change(b"mine")))
        assert (await visitor.locked(waiter)).payload == b"theirs"

    @contract_test()
    async def test_commit_if_wants_a_secret_that_gives_access(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        base = (await visitor.create(b"old")).version
        expect(Gone, await visitor.commit_if(base, a_change(b"stolen"), a_secret()))
        merely = await visitor.rotated()
        there = await visitor.found()
        assert there.payload == b"old"
        conflict = expect(Conflict, await visitor.commit_if(base, a_change(b"x"), merely))
        assert conflict.snapshot.replaced
        done = expect(Committed, await visitor.commit_if(there.version, a_change(b"new"), merely))
        old = await visitor.rotated(user_changed=True)
        there = await visitor.found()
        assert there.payload == b"new"
        for locked in (False, True):
            if locked:
                await visitor.locked(a_claim())
            for secret in (old, merely):
                for known in (there.version, done.version):
                    expect(Replaced, await visitor.commit_if(known, a_change(b"x"), secret))
            expect(Gone, await visitor.commit_if(base, a_change(b"stolen"), a_secret()))
        assert (await visitor.found()).version == there.version

    @contract_test()
    async def test_promise_1_a_lapsed_lock_ends_with_a_commit_if(self, grid: Grid) -> None:
        for conflicts in (False, True):
            visitor, late, watcher = Visitor(grid), a_claim(lease=SHORT), a_claim()
            base = (await visitor.create(b"old", claim=late)).version
            expect(Busy, await visitor.read(watch=watcher))
            await self.advance(PAST_SHORT)
            if conflicts:
                base = base._replace(token=base.token ^ 1)
            expect(
                Conflict if conflicts else Committed,
                await visitor.commit_if(base, a_change(b"new")),
            )
            await rings(visitor, watcher)
            there = await visitor.found()
            for release in (False, True):
                lost = await grid.commit(
                    visitor.key, late.token, a_change(b"late"), release=release
                )
                expect(LockLost, lost)
            assert await grid.renew([(visitor.key, late.token)], LONG) == [False]
            expect(LockLost, await visitor.release(late))
            expect(LockLost, await grid.remove(visitor.key, late.token))
            after = await visitor.found()
            assert (after.payload, after.version) == (there.payload, there.version)
            assert after.payload == (b"old" if conflicts else b"new")
            # The watcher's ticket is gone with the holding that it watched.
            holder = a_claim()
            await visitor.locked(holder)
            await visitor.queued(a_claim(queue_limit=1))

    @contract_test(takes=HAND_OFF_SECONDS + 0.6)
    async def test_a_lapsed_lock_goes_to_who_waits_not_to_a_commit_if(self, grid: Grid) -> None:
        visitor, first, second = Visitor(grid), a_claim("first"), a_claim("second")
        base = (await visitor.create(b"old", claim=a_claim(lease=SHORT))).version
        await visitor.queued(first)
        await visitor.queued(second)
        await self.advance(PAST_SHORT)
        expect(Locked, await visitor.commit_if(base, a_change(b"mine")))
        looks = a_claim()  # which hands nothing over itself
        assert expect(Busy, await visitor.read(watch=looks)).holder == "first"
        expect(Released, await visitor.release(looks))
        await rings(visitor, first)
        assert (await visitor.queued(second)).holder == "first"
        await self.advance(HAND_OFF_SECONDS + 0.1)  # not confirmed: the next one's
        expect(Locked, await visitor.commit_if(base, a_change(b"mine")))
        await rings(visitor, second)
        assert (await visitor.locked(second)).payload == b"old"
        assert (await visitor.found()).version == base

    @contract_test()
    async def test_a_deadline_that_commit_if_shortens_is_kept_and_swept(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        base = (await visitor.create(timeout=1000.0)).version
        change = a_change(b"brief", timeout=SHORT)
        done = expect(Committed, await visitor.commit_if(base, change))
        assert abs(done.expires_in - SHORT) < _CLOSE
        await self.advance(PAST_SHORT)
        expect(Missing, await visitor.read())
        expect(Gone, await visitor.commit_if(done.version, a_change(b"back")))
        expect(Gone, await visitor.commit_if(base, change))  # nor does a repetition revive it
        assert await grid.sweep(10) == 1
        await visitor.create(b"anew")

    @contract_test()
    async def test_commit_if_does_not_outlast_the_absolute_timeout(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        made = await visitor.create(timeout=1000.0, absolute=50.0)
        change = a_change(b"x", timeout=2000.0)
        done = expect(Committed, await visitor.commit_if(made.version, change))
        assert abs(done.deadline - made.deadline) < _CLOSE
        assert done.expires_in < 50.0 + _CLOSE

    # -- a commit's place in the queue ------------------------------------------------------

    @contract_test()
    async def test_tickets_of_commits_are_outside_the_queue_limit(self, grid: Grid) -> None:
        visitor, holder = Visitor(grid), a_claim()
        await visitor.create(claim=holder)
        commits = [a_claim(str(number), queue_limit=None) for number in range(10)]
        for number, commit in enumerate(commits):
            assert (await visitor.queued(commit)).ahead == number
        waiter, refused = a_claim("waiter", queue_limit=1), a_claim(queue_limit=1)
        assert (await visitor.queued(waiter)).ahead == 10
        expect(QueueFull, await visitor.acquire(refused))
        expect(QueueFull, await visitor.read(watch=refused))
        last = a_claim("last", queue_limit=None)
        assert (await visitor.queued(last)).ahead == 11
        for turn in (*commits, waiter, last):  # each in its turn, whatever it counts
            expect(Released, await visitor.release(holder))
            assert (await visitor.queued(a_claim(queue_limit=None))).holder == turn.holder
            await visitor.locked(turn)
            holder = turn

    @contract_test()
    async def test_a_commit_s_ticket_can_be_withdrawn_and_merges(self, grid: Grid) -> None:
        visitor, holder = Visitor(grid), a_claim()
        gone, commit = a_claim(queue_limit=None), a_claim(queue_limit=None)
        base = (await visitor.create(b"base", claim=holder)).version
        await visitor.queued(gone)
        expect(Locked, await visitor.commit_if(base, a_change(b"mine")))
        assert (await visitor.queued(commit)).ahead == 1
        expect(Released, await visitor.release(gone))
        await visitor.commit(holder, a_change(b"theirs"), release=True)
        got = expect(Granted, await visitor.acquire(commit, known=base)).snapshot
        await visitor.commit(commit, a_change(payload_of(got) + b" and mine"), release=True)
        assert (await visitor.found()).payload == b"theirs and mine"
