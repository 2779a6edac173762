"""Grids against the model: Hypothesis makes up histories of calls, every outcome is compared."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from gridsession.grids.contract import Busy, Change, Claim, Grid, NewRecord, Rotation, Version
from gridsession.grids.embedded import EmbeddedGrid
from gridsession.grids.embedded.place import Place
from gridsession.grids.memory import MemoryGrid
from gridsession.sources.connection_string import MIN_SIZE
from gridsession.testing import ManualClock
from tests.clocked_redis import ClockedRedisGrid
from tests.grids.model import Model, difference
from tests.redis_server import a_namespace, shared_server

Close = Callable[[], Awaitable[None]]
Factory = Callable[[ManualClock], Awaitable[tuple[Grid, Close]]]
Answer = TypeVar("Answer")


async def open_memory(clock: ManualClock) -> tuple[Grid, Close]:
    grid = MemoryGrid(clock)
    await grid.open()
    return grid, grid.close


async def open_embedded(clock: ManualClock) -> tuple[Grid, Close]:
    folder = Path(tempfile.mkdtemp())
    grid = EmbeddedGrid(Place(folder, MIN_SIZE), clock=clock)
    await grid.open()

    async def close() -> None:
        await grid.close()
        shutil.rmtree(folder)

    return grid, close


async def open_redis(clock: ManualClock) -> tuple[Grid, Close]:
    grid = ClockedRedisGrid(shared_server().url, clock, namespace=a_namespace())
    await grid.open()
    return grid, grid.close


GRIDS: dict[str, Factory] = {
    "memory": open_memory,
    "embedded": open_embedded,
    "redis": open_redis,
}

# Durations are such that no sum of a few of them comes near another: which of two things happens
# first is then never a question of rounding.
STEPS = (0.0713, 0.3179, 1.1313, 1.7321, 2.2367, 3.3171, 10.4411, 101.991)
LEASES = (0.7071, 6.1649, 33.1667)
TIMEOUTS = (0.9133, 5.0993, 104.8817, 1004.9881)
ABSOLUTE = (None, None, None, 7.0719, 150.3331)

KEYS = [bytes([number]) * 32 for number in range(2)]
SECRETS = [b"secret %d" % number + b"." * 24 for number in range(6)]
PAYLOADS = [b"", b"cart", b"basket"]
USERS = [None, "ann", "bob"]

keys = st.sampled_from(KEYS)
commit_tokens = st.integers(0, 15)  # few: repetitions, also of those long past
tokens = st.integers(0, 4)
watch_tokens = st.integers(0, 2)
secrets = st.sampled_from(["its own"] * 6 + [*range(len(SECRETS))])
leases = st.sampled_from(LEASES)
queue_limits = st.sampled_from([50, 50, 50, 2, 1, 0, None])
# What a caller takes a record for. After a fail-over a number may be another commit's, too.
OTHERS = ["of another token", "of another number", "the one before"]
versions = st.sampled_from(["its own"] * 4 + OTHERS + ["of no record"])
known_versions = st.sampled_from(["its own", *OTHERS, *[None] * 4])
timeouts = st.sampled_from(TIMEOUTS[1:] * 2 + TIMEOUTS[:1])
whose = st.sampled_from(["holder"] * 4 + [*range(5)])
rotations = st.sampled_from([None] * 6 + [(n, u) for n in range(6) for u in (False, True)])


class GridMachine(RuleBasedStateMachine):
    factory: Factory
    has_two_clocks: bool  # one for deadlines and one for leases: each can be set alone

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.model = Model(self.clock)
        self.grid, self.close_grid = self.run(self.factory(self.clock))
        self.met: dict[tuple[bytes, bytes], tuple[bytes, bytes]] = {}
        self.perhaps_swept: set[bytes] = set()
        self.clock_was_set = False

    def run(self, call: Coroutine[Any, Any, Answer] | Awaitable[Answer]) -> Answer:
        async def bounded() -> Answer:
            async with asyncio.timeout(3.0):
                return await call

        return self.loop.run_until_complete(bounded())

    def teardown(self) -> None:
        try:
            self.run(self.close_grid())
        finally:
            self.loop.close()

    # -- words ----------------------------------------------------------------------------

    def secret(self, key: bytes, which: str | int) -> bytes:
        if isinstance(which, int):
            return SECRETS[which]
        entry = self.model.entries.get(key)
        return SECRETS[0] if entry is None else entry.secret

    def token(self, key: bytes, which: str | int) -> bytes:
        if isinstance(which, int):
            return (b"token %d of %d" % (which, key[0])).ljust(16, b".")
        entry = self.model.entries.get(key)
        if entry is None or entry.lock is None:
            return (b"token 0 of %d" % key[0]).ljust(16, b".")
        return entry.lock.token

    def version(self, key: bytes, which: str) -> Version:
        entry = self.model.entries.get(key)
        if entry is None or which == "of no record":
            return Version(7, 7)
        version = entry.history[-1]
        if which == "of another token":
            return version._replace(token=version.token ^ 1)
        if which == "of another number":
            return version._replace(counter=version.counter + 1)
        return version if which == "its own" else entry.history[-2:][0]

    def known(self, key: bytes, which: str | None) -> Version | None:
        return None if which is None else self.version(key, which)

    def claim(self, key: bytes, number: int, lease: float, queue_limit: int | None) -> Claim:
        return Claim(self.token(key, number), f"holder {number}", lease, queue_limit)

    def change(
        self,
        key: bytes,
        *,
        commit_token: int,
        payload: bytes | None,
        timeout: float,
        user: str | None,
        rotation: tuple[int, bool] | None,
    ) -> Change:
        turn = None if rotation is None else Rotation(SECRETS[rotation[0]], rotation[1])
        if turn is not None and self.secret(key, "its own") == turn.secret:
            turn = None  # no secret is replaced by itself
        return Change(commit_token, payload, timeout, user, turn)

    def same(self, expected: object, actual: object) -> None:
        found = difference(expected, actual)
        assert found is None, found

    # -- calls ----------------------------------------------------------------------------

    @initialize(claim=st.booleans())
    def begin(self, claim: bool) -> None:
        """Most histories are about sessions that are there."""
        for key in KEYS:
            new = NewRecord(100, SECRETS[0], b"first", TIMEOUTS[2], None, None)
            first = self.claim(key, 0, LEASES[1], 50) if claim else None
            self.same(
                self.model.create(key, new, first), self.run(self.grid.create(key, new, first))
            )

    @rule(
        key=keys,
        commit_token=commit_tokens,
        secret=st.integers(0, 5),
        payload=st.sampled_from(PAYLOADS),
        timeout=timeouts,
        absolute=st.sampled_from(ABSOLUTE),
        user=st.sampled_from(USERS),
        number=st.sampled_from([None, 0, 1, 2]),
        lease=leases,
    )
    def create(
        self,
        *,
        key: bytes,
        commit_token: int,
        secret: int,
        payload: bytes,
        timeout: float,
        absolute: float | None,
        user: str | None,
        number: int | None,
        lease: float,
    ) -> None:
        new = NewRecord(commit_token, SECRETS[secret], payload, timeout, absolute, user)
        claim = None if number is None else self.claim(key, number, lease, 50)
        expected = self.model.create(key, new, claim)
        self.same(expected, self.run(self.grid.create(key, new, claim)))

    @rule(
        key=keys,
        secret=secrets,
        number=tokens,
        lease=leases,
        queue_limit=queue_limits,
        known=known_versions,
    )
    def acquire(
        self,
        key: bytes,
        secret: str | int,
        number: int,
        lease: float,
        queue_limit: int | None,
        *,
        known: str | None = None,
    ) -> None:
        claim, which = self.claim(key, number, lease, queue_limit), self.secret(key, secret)
        version = self.known(key, known)
        expected = self.model.acquire(key, which, claim, version)
        self.same(expected, self.run(self.grid.acquire(key, which, claim, version)))

    @rule(key=keys, lease=leases)
    def crowd(self, key: bytes, lease: float) -> None:
        """All ask, in order."""
        for number in range(5):
            self.acquire(key, "its own", number, lease, 50)

    @rule(
        key=keys,
        secret=secrets,
        number=watch_tokens,
        queue_limit=queue_limits,
        says_whom_it_met=st.booleans(),
        known=known_versions,
    )
    def watch(
        self,
        key: bytes,
        secret: str | int,
        number: int,
        queue_limit: int | None,
        says_whom_it_met: bool,
        *,
        known: str | None = None,
    ) -> None:
        # A token is for waiting or for watching.
        token = (b"watch %d of %d" % (number, key[0])).ljust(16, b".")
        claim = Claim(token, f"reader {number}", 1.0, queue_limit)
        which = self.secret(key, secret)
        met = self.met.get((key, token)) if says_whom_it_met else None
        mine, its = (None, None) if met is None else met
        version = self.known(key, known)
        expected = self.model.read(key, which, claim, mine, version)
        actual = self.run(self.grid.read(key, which, claim, its, version))
        self.same(expected, actual)
        if not isinstance(expected, Busy):
            self.met.pop((key, token), None)
        elif isinstance(actual, Busy) and met is None:
            self.met[key, token] = (expected.lock, actual.lock)

    @rule(
        key=keys,
        queue_limit=st.sampled_from([0, 1, 2, 50]),
        ending=st.sampled_from(["release", "lapse", "polls"]),
        next_lease=leases,
    )
    def readers_meet_a_writer(
        self, key: bytes, queue_limit: int, ending: str, next_lease: float
    ) -> None:
        self.acquire(key, "its own", 0, LEASES[0], 50)
        for number in range(2):
            self.watch(key, "its own", number, 50, False)
        self.acquire(key, "its own", 1, next_lease, queue_limit)
        if ending == "release":
            self.release(key, "holder")
        elif ending == "lapse":
            self.clock.advance(STEPS[2])
        else:
            for _ in range(3):
                self.acquire(key, "its own", 0, LEASES[1], 50)
                self.clock.advance(STEPS[3])
                self.watch(key, "its own", 0, 50, True)
            self.release(key, 0)
        self.acquire(key, "its own", 2, next_lease, queue_limit)
        for number in range(2):
            self.watch(key, "its own", number, queue_limit, True)
        self.hear_the_bells()

    @rule(
        key=keys,
        by=whose,
        commit_token=commit_tokens,
        payload=st.sampled_from([None, *PAYLOADS]),
        timeout=timeouts,
        user=st.sampled_from(USERS),
        rotation=rotations,
        release=st.booleans(),
    )
    def commit(
        self,
        *,
        key: bytes,
        by: str | int,
        commit_token: int,
        payload: bytes | None,
        timeout: float,
        user: str | None,
        rotation: tuple[int, bool] | None,
        release: bool,
    ) -> None:
        change = self.change(
            key,
            commit_token=commit_token,
            payload=payload,
            timeout=timeout,
            user=user,
            rotation=rotation,
        )
        token = self.token(key, by)
        expected = self.model.commit(key, token, change, release)
        self.same(expected, self.run(self.grid.commit(key, token, change, release=release)))

    @rule(
        key=keys,
        secret=secrets,
        base=versions,
        commit_token=commit_tokens,
        payload=st.sampled_from([None, *PAYLOADS]),
        timeout=timeouts,
        user=st.sampled_from(USERS),
        rotation=rotations,
    )
    def commit_if(
        self,
        *,
        key: bytes,
        secret: str | int,
        base: str,
        commit_token: int,
        payload: bytes | None,
        timeout: float,
        user: str | None,
        rotation: tuple[int, bool] | None,
    ) -> None:
        change = self.change(
            key,
            commit_token=commit_token,
            payload=payload,
            timeout=timeout,
            user=user,
            rotation=rotation,
        )
        which, version = self.secret(key, secret), self.version(key, base)
        expected = self.model.commit_if(key, which, version, change)
        self.same(expected, self.run(self.grid.commit_if(key, which, version, change)))

    @rule(
        key=keys,
        waits=st.sampled_from([None, "its turn", "for the writer"]),
        lease=leases,
        base=versions,
        commit_token=commit_tokens,
    )
    def commit_where_a_lock_ran_out(
        self, key: bytes, waits: str | None, lease: float, base: str, commit_token: int
    ) -> None:
        self.acquire(key, "its own", 0, LEASES[0], None)
        if waits == "its turn":
            self.acquire(key, "its own", 1, lease, None)
        elif waits is not None:
            self.watch(key, "its own", 0, None, False)
        self.clock.advance(STEPS[2])
        self.commit_if(
            key=key,
            secret="its own",
            base=base,
            commit_token=commit_token,
            payload=b"merged",
            timeout=TIMEOUTS[2],
            user=None,
            rotation=None,
        )
        self._commit(key, 300 + commit_token, b"late", None)
        self.hear_the_bells()

    @rule(key=keys, count=st.integers(1, 10), first=commit_tokens)
    def commit_many(self, key: bytes, count: int, first: int) -> None:
        for number in range(count):
            token = (first + number) % 16
            self._commit(key, token, b"%d" % number, None)

    @rule(key=keys, count=st.integers(1, 6), user_changed=st.booleans())
    def rotate_many(self, key: bytes, count: int, user_changed: bool) -> None:
        for number in range(count):
            rotation = (number, user_changed and number == 0)
            self._commit(key, 200 + number, None, rotation)

    def _commit(
        self,
        key: bytes,
        commit_token: int,
        payload: bytes | None,
        rotation: tuple[int, bool] | None,
    ) -> None:
        self.commit(
            key=key,
            by="holder",
            commit_token=commit_token,
            payload=payload,
            timeout=TIMEOUTS[2],
            user=None,
            rotation=rotation,
            release=False,
        )

    @rule(pairs=st.lists(st.tuples(keys, whose), max_size=4), lease=leases)
    def renew(self, pairs: list[tuple[bytes, str | int]], lease: float) -> None:
        asked = [(key, self.token(key, which)) for key, which in pairs]
        expected = self.model.renew(asked, lease)
        self.same(expected, self.run(self.grid.renew(asked, lease)))

    @rule(key=keys, by=whose)
    def release(self, key: bytes, by: str | int) -> None:
        token = self.token(key, by)
        expected = self.model.release(key, token)
        self.same(expected, self.run(self.grid.release(key, token)))

    @rule(key=keys, number=watch_tokens)
    def stop_watching(self, key: bytes, number: int) -> None:
        token = (b"watch %d of %d" % (number, key[0])).ljust(16, b".")
        self.met.pop((key, token), None)
        expected = self.model.release(key, token)
        self.same(expected, self.run(self.grid.release(key, token)))

    @rule(key=keys)
    def touch(self, key: bytes) -> None:
        self.same(self.model.touch(key), self.run(self.grid.touch(key)))

    @rule(key=keys, by=st.sampled_from([None, "holder", "holder", 0, 1]))
    def remove(self, key: bytes, by: str | int | None) -> None:
        token = None if by is None else self.token(key, by)
        self.same(self.model.remove(key, token), self.run(self.grid.remove(key, token)))

    @rule(limit=st.integers(1, 4))
    def sweep(self, limit: int) -> None:
        dead = self.model.expired()
        answer = self.run(self.grid.sweep(limit))
        certain = 0 if self.clock_was_set else len(dead - self.perhaps_swept)
        assert min(certain, limit) <= answer <= limit, (answer, certain, limit)
        if answer == limit:  # which of them are gone cannot be seen from here
            self.perhaps_swept |= dead
            return
        self.model.swept()
        self.perhaps_swept.clear()
        assert self.run(self.grid.sweep(1)) == 0, "less than the limit, and yet more was due"

    @rule()
    def hear_the_bells(self) -> None:
        """A bell that was rung is heard; `wait` may return for other reasons, too."""
        for key, token in sorted(self.model.rung):
            self.run(self.grid.wait(key, token, 60.0))
        self.model.rung.clear()

    # -- time -----------------------------------------------------------------------------

    @rule(seconds=st.sampled_from(STEPS))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(key=keys, count=st.integers(1, 6), lease=leases)
    def wait_for_long(self, key: bytes, count: int, lease: float) -> None:
        """Several poll for the lock, others fall silent."""
        for _ in range(count):
            self.clock.advance(STEPS[3])
            for number in (1, 3):
                self.acquire(key, "its own", number, lease, 50)

    @precondition(lambda self: self.has_two_clocks)
    @rule(seconds=st.sampled_from([-40.0007, 40.0009]))
    def set_the_wall_clock(self, seconds: float) -> None:
        # Set back, it would bring back what has expired, unless that is gone for good; and what
        # was put off by the old time comes late into a sweep.
        for key in KEYS:
            if self.model.living(key) is None:
                new = NewRecord(300, SECRETS[0], b"", TIMEOUTS[2], None, None)
                self.same(self.model.create(key, new, None), self.run(self.grid.create(key, new)))
                self.remove(key, None)
        self.clock_was_set = True
        self.clock.step_wall(seconds)

    # -- what is there --------------------------------------------------------------------

    @invariant()
    def reads_are_the_same(self) -> None:
        async def read_all() -> list[object]:
            return [await self.grid.read(key, secret) for key in KEYS for secret in SECRETS]

        expected = [self.model.read(key, secret) for key in KEYS for secret in SECRETS]
        for mine, its in zip(expected, self.run(read_all()), strict=True):
            self.same(mine, its)


def compare(name: str, examples: int, steps: int) -> None:
    class Machine(GridMachine):
        factory = staticmethod(GRIDS[name])
        has_two_clocks = name != "redis"

    run_state_machine_as_test(
        Machine,
        settings=settings(
            deadline=None,
            max_examples=examples,
            stateful_step_count=steps,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_does_as_the_model(name: str) -> None:
    compare(name, examples=500, steps=50)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_does_as_the_model_for_long(name: str) -> None:
    compare(name, examples=5_000, steps=100)
