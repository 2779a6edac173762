"""The grid contract, first part: records are born, read, changed, rotated, and end."""

from __future__ import annotations

from gridsession.grids.contract import (
    MAX_REPLACED,
    REMEMBERED_COMMITS,
    REPLACED_SECONDS,
    TICKET_SECONDS,
    Busy,
    Committed,
    Exists,
    Found,
    Gone,
    Granted,
    Grid,
    LockLost,
    Missing,
    Released,
    Removed,
    Replaced,
    Rotation,
    Version,
)
from gridsession.testing.contract_hooks import (
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
    rings,
)

_CLOSE = 0.01  # seconds: how exactly a grid must keep times


class RecordContract(GridHooks):
    # -- create, commit -------------------------------------------------------------------

    @contract_test()
    async def test_a_new_record_reads_as_it_was_written(self, grid: Grid) -> None:
        for payload in (b"", bytes(range(256)), b"\xff" * 100_000):
            visitor = Visitor(grid)
            new = a_new(visitor.secret, payload, timeout=900.0, user="ann")
            done = expect(Committed, await grid.create(visitor.key, new))
            there = await visitor.found()
            assert there.payload == payload
            assert there.version == done.version
            assert there.version.token == new.commit_token
            assert abs(there.deadline - (there.created + 900.0)) < _CLOSE
            assert abs(there.deadline - done.deadline) < _CLOSE
            assert (there.timeout, there.user) == (900.0, "ann")
            assert (there.replaced, there.slide_due) == (False, False)

    @contract_test()
    async def test_promise_3_create_never_overwrites(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create(b"first", user="ann")
        before = await visitor.found()
        other = a_new(a_secret(), b"second", user="bob")
        expect(Exists, await grid.create(visitor.key, other))
        expect(Exists, await grid.create(visitor.key, other, a_claim()))
        assert await visitor.found() == before
        expect(Missing, await visitor.read(other.secret))
        await visitor.locked(a_claim(queue_limit=0))  # the refused claim has not locked it

    @contract_test()
    async def test_promise_5_create_repeated_with_its_commit_token(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        new = a_new(visitor.secret, b"first")
        first = expect(Committed, await grid.create(visitor.key, new, claim))
        again = expect(Committed, await grid.create(visitor.key, new, claim))
        assert again.version == first.version
        later = await visitor.commit(claim, a_change(b"later"))
        again = expect(Committed, await grid.create(visitor.key, new, claim))
        assert again.version == first.version
        there = await visitor.found()
        assert (there.payload, there.version) == (b"later", later.version)

    @contract_test()
    async def test_create_with_a_claim_locks(self, grid: Grid) -> None:
        visitor, claim, other = Visitor(grid), a_claim("POST /login"), a_claim()
        await visitor.create(claim=claim)
        assert (await visitor.queued(other)).holder == "POST /login"
        await visitor.commit(claim, a_change(b"cart"), release=True)
        assert (await visitor.locked(other)).payload == b"cart"

    @contract_test()
    async def test_create_without_a_claim_does_not_lock(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create()
        await visitor.locked(a_claim(queue_limit=0))

    @contract_test()
    async def test_records_of_different_keys_are_independent(self, grid: Grid) -> None:
        ann, bob, claim = Visitor(grid), Visitor(grid), a_claim()
        await ann.create(b"ann's")
        await bob.create(b"bob's")
        await ann.locked(claim)
        await bob.locked(a_claim(queue_limit=0))
        expect(LockLost, await grid.commit(bob.key, claim.token, a_change(b"x"), release=True))
        expect(Removed, await grid.remove(ann.key))
        assert (await bob.found()).payload == b"bob's"

    @contract_test()
    async def test_promise_5_versions_are_handed_out_one_after_the_other(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        version = (await visitor.create()).version
        for number in range(6):
            claim, change = a_claim(), a_change(b"%d" % number)
            assert (await visitor.locked(claim)).version == version
            done = await visitor.commit(claim, change, release=number % 2 == 1)
            if number % 2 == 0:  # not released: the lock is kept
                await visitor.queued(waiter := a_claim())
                expect(Released, await visitor.release(waiter))
                expect(Released, await visitor.release(claim))
            assert done.version == Version(version.counter + 1, change.commit_token)
            there, version = await visitor.found(), done.version
            assert (there.payload, there.version) == (b"%d" % number, version)

    @contract_test()
    async def test_promise_5_a_repeated_commit_is_not_applied_again(self, grid: Grid) -> None:
        visitor, claim, other = Visitor(grid), a_claim(), a_claim()
        await visitor.create(claim=claim)
        change = a_change(b"one")
        first = await visitor.commit(claim, change)
        assert (await visitor.commit(claim, change)).version == first.version
        second = await visitor.commit(claim, a_change(b"two"))
        assert (await visitor.commit(claim, change)).version == first.version
        there = await visitor.found()
        assert (there.payload, there.version) == (b"two", second.version)
        # A repetition that releases does so, once; then it takes from nobody.
        assert (await visitor.commit(claim, change, release=True)).version == first.version
        await visitor.locked(other)
        assert (await visitor.commit(claim, change, release=True)).version == first.version
        third = await visitor.commit(other, a_change(b"three"))
        assert (await visitor.found()).version == third.version

    @contract_test()
    async def test_promise_5_the_last_commits_are_remembered(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        await visitor.create(claim=claim)
        changes = [a_change(b"%d" % n) for n in range(REMEMBERED_COMMITS)]
        versions = [(await visitor.commit(claim, change)).version for change in changes]
        for change, version in zip(changes, versions, strict=True):
            assert (await visitor.commit(claim, change)).version == version
        assert (await visitor.found()).version == versions[-1]

    @contract_test()
    async def test_commit_without_payload_leaves_it(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        created = await visitor.create(b"kept", claim=claim)
        done = await visitor.commit(claim, a_change(None, timeout=500.0, user="ann"))
        there = await visitor.found()
        assert (there.payload, there.user, there.timeout) == (b"kept", "ann", 500.0)
        assert there.version == done.version != created.version
        await visitor.commit(claim, a_change(b""))  # empty is not "leave it"
        there = await visitor.found()
        assert (there.payload, there.user) == (b"", None)

    @contract_test()
    async def test_promise_4_commit_under_a_foreign_token_changes_nothing(self, grid: Grid) -> None:
        visitor, holder, waiter = Visitor(grid), a_claim(), a_claim()
        await visitor.create(user="ann")
        change = a_change(b"stolen", timeout=5.0, rotation=Rotation(a_secret(), True))
        for release in (False, True):
            lost = await grid.commit(visitor.key, a_token(), change, release=release)
            expect(LockLost, lost)  # nobody holds it
            await visitor.locked(holder)
            await visitor.queued(waiter)
            before = await visitor.found()
            for token in (a_token(), waiter.token):
                lost = await grid.commit(visitor.key, token, change, release=release)
                expect(LockLost, lost)
            assert await visitor.found() == before
            await visitor.queued(waiter)  # still held, by the holder
            await visitor.commit(holder, a_change(None), release=True)
            expect(Released, await visitor.release(waiter))

    # -- the end --------------------------------------------------------------------------

    @contract_test()
    async def test_promise_2_nothing_but_create_creates(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await is_absent(visitor, a_token())
        await visitor.create()
        await visitor.found()

    @contract_test()
    async def test_promise_2_the_removed_stay_removed(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        await visitor.create(claim=claim)
        change = a_change(b"kept")
        await visitor.commit(claim, change)
        expect(Removed, await grid.remove(visitor.key))  # whoever holds it
        expect(Gone, await grid.commit(visitor.key, claim.token, change, release=True))
        await is_absent(visitor, claim.token)
        await visitor.create(b"anew")
        assert (await visitor.found()).payload == b"anew"
        await visitor.locked(a_claim(queue_limit=0))  # its lock and tickets are gone, too

    @contract_test()
    async def test_remove_with_a_token_only_under_its_lock(self, grid: Grid) -> None:
        visitor, holder, waiter = Visitor(grid), a_claim(), a_claim()
        await visitor.create()
        expect(LockLost, await grid.remove(visitor.key, holder.token))
        await visitor.locked(holder)
        await visitor.queued(waiter)
        before = await visitor.found()
        for token in (waiter.token, a_token()):
            expect(LockLost, await grid.remove(visitor.key, token))
        assert await visitor.found() == before
        await visitor.queued(waiter)
        expect(Removed, await grid.remove(visitor.key, holder.token))
        await is_absent(visitor, holder.token)

    @contract_test()
    async def test_those_who_wait_are_rung_at_remove_and_find_it_missing(self, grid: Grid) -> None:
        visitor, waiter, watcher = Visitor(grid), a_claim(), a_claim()
        await visitor.create(claim=a_claim())
        await visitor.queued(waiter)
        expect(Busy, await visitor.read(watch=watcher))
        expect(Removed, await grid.remove(visitor.key))
        await rings(visitor, waiter)
        await rings(visitor, watcher)
        expect(Missing, await visitor.acquire(waiter))
        expect(Missing, await visitor.read(watch=watcher))

    # -- secrets --------------------------------------------------------------------------

    @contract_test()
    async def test_a_wrong_secret_is_as_no_record_and_leaves_nothing(self, grid: Grid) -> None:
        visitor, holder, stranger = Visitor(grid), a_claim(), a_claim()
        await visitor.create()
        expect(Missing, await visitor.read(a_secret()))
        expect(Missing, await visitor.read(a_secret(), a_claim()))
        expect(Missing, await visitor.acquire(stranger, a_secret()))
        await visitor.locked(holder)  # free: the stranger has not got it
        expect(Missing, await visitor.acquire(stranger, a_secret()))
        expect(Missing, await visitor.read(a_secret(), a_claim()))
        assert (await visitor.queued(a_claim(queue_limit=1))).ahead == 0
        expect(LockLost, await visitor.release(stranger))

    @contract_test()
    async def test_a_rotated_secret_still_gives_access(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        await visitor.create(b"cart")
        old = await visitor.rotated()
        assert not (await visitor.found()).replaced
        assert expect(Found, await visitor.read(old)).snapshot.replaced
        there = expect(Granted, await visitor.acquire(claim, old)).snapshot
        assert (there.payload, there.replaced) == (b"cart", True)
        await visitor.commit(claim, a_change(b"more"), release=True)
        assert (await visitor.found()).payload == b"more"

    @contract_test(takes=REPLACED_SECONDS + 0.4)
    async def test_replaced_secrets_are_forgotten(self, grid: Grid) -> None:
        merely, user = Visitor(grid), Visitor(grid)
        await merely.create()
        await user.create()
        old = {merely: await merely.rotated(), user: await user.rotated(user_changed=True)}
        await self.advance(REPLACED_SECONDS - 0.5)
        assert expect(Found, await merely.read(old[merely])).snapshot.replaced
        expect(Replaced, await user.read(old[user]))
        await self.advance(0.7)
        for visitor, secret in old.items():
            expect(Missing, await visitor.read(secret))
            expect(Missing, await visitor.acquire(a_claim(), secret))
            expect(Found, await visitor.read())

    @contract_test()
    async def test_after_a_change_of_user_old_secrets_are_replaced(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create()
        older = await visitor.rotated()
        old = await visitor.rotated(user_changed=True)
        for secret in (older, old):
            expect(Replaced, await visitor.read(secret))
            expect(Replaced, await visitor.read(secret, a_claim()))
            refused = a_claim()
            expect(Replaced, await visitor.acquire(refused, secret))
            expect(LockLost, await visitor.release(refused))
        assert not (await visitor.locked(a_claim(queue_limit=0))).replaced
        again = a_claim()
        expect(Replaced, await visitor.acquire(again, old))
        assert (await visitor.queued(a_claim(queue_limit=1))).ahead == 0

    @contract_test()
    async def test_a_rotation_after_a_change_of_user_replaces_only_mildly(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create()
        old = await visitor.rotated(user_changed=True)
        between = await visitor.rotated()
        expect(Replaced, await visitor.read(old))
        assert expect(Found, await visitor.read(between)).snapshot.replaced

    @contract_test()
    async def test_a_change_of_user_turns_the_queue_away(self, grid: Grid) -> None:
        visitor, holder, waiter, watcher = Visitor(grid), a_claim(), a_claim(), a_claim()
        await visitor.create(claim=holder)
        await visitor.queued(waiter)
        expect(Busy, await visitor.read(watch=watcher))
        old, new = visitor.secret, a_secret()
        change = a_change(None, user="ann", rotation=Rotation(new, user_changed=True))
        await visitor.commit(holder, change, release=True)
        await rings(visitor, waiter)
        await rings(visitor, watcher)
        expect(Replaced, await visitor.acquire(waiter, old))
        expect(Replaced, await visitor.read(old, watcher))
        visitor.secret = new
        assert (await visitor.locked(a_claim(queue_limit=0))).user == "ann"

    @contract_test(takes=REPLACED_SECONDS + 2.6)
    async def test_a_ticket_outlasts_the_secret_that_it_was_entered_with(self, grid: Grid) -> None:
        visitor, holder, waiter = Visitor(grid), a_claim(), a_claim()
        await visitor.create(claim=holder)
        await visitor.queued(waiter)
        old, new = visitor.secret, a_secret()
        await visitor.commit(holder, a_change(b"x", rotation=Rotation(new, False)))
        passed = 0.0
        while passed < REPLACED_SECONDS:
            await self.advance(TICKET_SECONDS * 0.8)
            passed += TICKET_SECONDS * 0.8
            expect(Busy, await visitor.acquire(waiter, old))
        expect(Missing, await visitor.acquire(a_claim(), old))
        expect(Released, await visitor.release(holder))
        assert expect(Granted, await visitor.acquire(waiter, old)).snapshot.replaced

    @contract_test()
    async def test_so_many_replaced_secrets_are_remembered(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create()
        replaced = [await visitor.rotated() for _ in range(MAX_REPLACED + 1)]
        expect(Missing, await visitor.read(replaced[0]))
        for secret in replaced[1:]:
            assert expect(Found, await visitor.read(secret)).snapshot.replaced
        expect(Missing, await visitor.read(a_secret()))
