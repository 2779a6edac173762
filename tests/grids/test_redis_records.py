"""What the Redis grid leaves at the server: names, times to live, index of deadlines, scripts."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any

import pytest

from gridsession.errors import GridUnavailable
from gridsession.grids.contract import Committed, Found, LockLost, Missing
from gridsession.grids.redis import RedisGrid
from gridsession.grids.redis.names import PARTS
from gridsession.testing import ManualClock
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim, a_new, expect
from tests.clocked_redis import ClockedRedisGrid
from tests.provider.harness import in_loop
from tests.redis_server import a_namespace, shared_server

LUA = files("gridsession.grids.redis") / "lua"
MARGIN = 60.0  # seconds that the server keeps a record past its end
# Those that make room, or only move a time: a full server runs them.
RUN_WHEN_FULL = {"release", "renew", "touch", "remove", "sweep", "index"}


def admin() -> Any:
    return shared_server().admin


@contextlib.asynccontextmanager
async def opened(namespace: str) -> AsyncIterator[RedisGrid]:
    url = shared_server().url
    grid = RedisGrid.from_connection_string(url, namespace=namespace, timeout=2.0)
    await grid.open()
    yield grid
    await grid.close()


def name_of(namespace: str, key: bytes) -> bytes:
    return b"gs:%b:%b" % (namespace.encode(), entry_of(key))


def entry_of(key: bytes) -> bytes:
    """What the server knows of a key."""
    return key[:16]


def part_of(namespace: str, key: bytes) -> str:
    return f"gs:{namespace}:due:{key[0] % PARTS}"


def lasts(namespace: str, key: bytes) -> float:
    """The second at which the server forgets a record by itself."""
    milliseconds: int = admin().pexpiretime(name_of(namespace, key))
    return milliseconds / 1000


# -- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ["/", "shop/eu", "{shop}", "a*b?[c]", "Tür zu", "a:b", "%41"])
@in_loop
async def test_a_namespace_is_spelt_so_that_it_means_nothing_to_a_pattern(namespace: str) -> None:
    async with opened(namespace) as grid:
        visitor = Visitor(grid)
        await visitor.create(b"mine")
        entry = entry_of(visitor.key)
        pattern = b"*" + re.sub(rb"([\\*?\[\]])", rb"\\\1", entry)
        (found,) = admin().scan_iter(match=pattern)
        before = found.removesuffix(entry)
        assert re.fullmatch(rb"gs:[A-Za-z0-9/_.~%-]+:", before)
        await grid.remove(visitor.key)


@in_loop
async def test_namespaces_do_not_see_each_other() -> None:
    async with opened(a_namespace()) as one, opened(a_namespace()) as other:
        visitor = Visitor(one)
        await visitor.create(b"one")
        expect(Missing, await visitor.at(other).read())
        await visitor.at(other).create(b"other")
        assert (await visitor.found()).payload == b"one"


# -- times to live -------------------------------------------------------------------------------


@in_loop
async def test_the_server_forgets_a_record_a_minute_after_its_end() -> None:
    namespace = a_namespace()
    async with opened(namespace) as grid:
        visitor, holder = Visitor(grid), a_claim(lease=500.0)
        deadline = (await visitor.create(timeout=100.0)).deadline
        assert lasts(namespace, visitor.key) == pytest.approx(deadline + MARGIN, abs=0.002)
        await visitor.locked(holder)  # no session expires while its lock lives
        held_until = admin().time()[0] + 500.0
        assert lasts(namespace, visitor.key) == pytest.approx(held_until + MARGIN, abs=2.0)
        assert await grid.renew([(visitor.key, holder.token)], 900.0) == [True]
        held_until += 400.0
        assert lasts(namespace, visitor.key) == pytest.approx(held_until + MARGIN, abs=2.0)
        done = await visitor.commit(holder, a_change(b"x", timeout=50.0), release=True)
        assert lasts(namespace, visitor.key) == pytest.approx(done.deadline + MARGIN, abs=0.002)
        await visitor.locked(holder)
        await visitor.release(holder)
        await grid.touch(visitor.key)
        deadline = (await visitor.found()).deadline
        assert lasts(namespace, visitor.key) == pytest.approx(deadline + MARGIN, abs=0.002)


@in_loop
async def test_where_ends_are_kept_a_record_lasts_as_long_as_they() -> None:
    namespace = a_namespace()
    admin().set(f"gs:{namespace}:ends", "86400")
    async with opened(namespace) as grid:
        visitor, holder = Visitor(grid), a_claim(lease=5.0)
        deadline = (await visitor.create(timeout=100.0, claim=holder)).deadline
        assert lasts(namespace, visitor.key) == pytest.approx(deadline + 86400, abs=0.002)
        for timeout in (100.0, 50.0):
            done = await visitor.commit(holder, a_change(b"x", timeout=timeout))
            assert lasts(namespace, visitor.key) == pytest.approx(done.deadline + 86400, abs=0.002)


@pytest.mark.parametrize("flag", ["86400", "1.5", "a newer release's"])
@in_loop
async def test_a_sweep_takes_no_ends_from_those_who_keep_them(flag: str) -> None:
    """The flag is read before each batch, by a worker that has no handlers, too."""
    namespace = a_namespace()
    async with opened(namespace) as grid:
        visitors = [Visitor(grid) for _ in range(3)]
        for visitor in visitors:
            await visitor.create(timeout=0.01)
        await asyncio.sleep(0.05)
        admin().set(f"gs:{namespace}:ends", flag)
        assert await grid.sweep(10) == 0
        assert all(admin().exists(name_of(namespace, v.key)) for v in visitors)
        later = Visitor(grid)
        done = await later.create(timeout=100.0)
        assert lasts(namespace, later.key) >= done.deadline + MARGIN - 0.002
        admin().delete(f"gs:{namespace}:ends")
        assert await grid.sweep(10) == 3
        assert not any(admin().exists(name_of(namespace, v.key)) for v in visitors)


# -- the index of deadlines ----------------------------------------------------------------------


@in_loop
async def test_the_index_has_an_entry_that_a_touch_does_not_write() -> None:
    namespace = a_namespace()
    async with opened(namespace) as grid:
        visitor, holder = Visitor(grid), a_claim()
        made = await visitor.create(timeout=100.0)
        score = admin().zscore(part_of(namespace, visitor.key), entry_of(visitor.key))
        assert score == pytest.approx(made.deadline, abs=1.0)
        await asyncio.sleep(0.05)
        assert await grid.touch(visitor.key)
        await visitor.locked(holder)
        later = await visitor.commit(holder, a_change(b"x", timeout=200.0), release=True)
        assert later.deadline > made.deadline + 50
        assert admin().zscore(part_of(namespace, visitor.key), entry_of(visitor.key)) == score


@in_loop
async def test_an_earlier_deadline_is_in_the_index_before_it_is_in_the_record() -> None:
    namespace = a_namespace()
    async with opened(namespace) as grid:
        visitor, holder = Visitor(grid), a_claim()
        made = await visitor.create(timeout=1000.0, claim=holder)
        part = part_of(namespace, visitor.key)
        # A worker that dies between the two leaves the earlier entry and the record as it was.
        real = grid._enter

        def die(key: bytes, due: float, *, repeats: bool) -> Any:
            real(key, due, repeats=repeats)
            raise GridUnavailable("died")

        grid._enter = die  # type: ignore[method-assign]
        with pytest.raises(GridUnavailable, match="died"):
            await visitor.commit(holder, a_change(b"shorter", timeout=10.0))
        grid._enter = real  # type: ignore[method-assign]
        found = await visitor.found()
        assert (found.payload, found.deadline) == (b"new", made.deadline)
        assert admin().zscore(part, entry_of(visitor.key)) < made.deadline - 900
        done = await visitor.commit(holder, a_change(b"shorter", timeout=10.0))
        assert done.version.counter == 2
        assert admin().zscore(part, entry_of(visitor.key)) <= done.deadline + 0.5
        # Again as short: the index has it, and one call is enough.
        before = admin().info("commandstats")["cmdstat_evalsha"]["calls"]
        await visitor.commit(holder, a_change(b"again", timeout=10.0))
        assert admin().info("commandstats")["cmdstat_evalsha"]["calls"] == before + 1


@in_loop
async def test_a_sweep_mends_entries_that_are_wrong() -> None:
    namespace = a_namespace()
    async with opened(namespace) as grid:
        alive, gone = Visitor(grid), Visitor(grid)
        made = await alive.create(timeout=100.0)
        admin().zadd(part_of(namespace, alive.key), {entry_of(alive.key): 1.5})  # too early
        admin().zadd(part_of(namespace, gone.key), {entry_of(gone.key): 2.5})  # of no record
        assert await grid.sweep(10) == 2
        score = admin().zscore(part_of(namespace, alive.key), entry_of(alive.key))
        assert score == pytest.approx(made.deadline, abs=0.001)
        assert admin().zscore(part_of(namespace, gone.key), entry_of(gone.key)) is None
        assert await grid.sweep(10) == 0
        expect(Found, await alive.read())


@in_loop
async def test_a_sweep_leaves_an_entry_that_was_moved_meanwhile() -> None:
    namespace = a_namespace()
    async with opened(namespace) as grid:
        visitor = Visitor(grid)
        await visitor.create(timeout=0.01)
        await asyncio.sleep(0.05)
        part = part_of(namespace, visitor.key)
        real = grid._run

        async def moved(*arguments: Any) -> Any:
            answer = await real(*arguments)
            admin().zadd(part, {entry_of(visitor.key): 4e9})
            return answer

        grid._run = moved  # type: ignore[method-assign,assignment]
        assert await grid.sweep(1) == 1
        assert admin().zscore(part, entry_of(visitor.key)) == 4e9


@pytest.mark.parametrize("ahead", [-7200.0, 7200.0])
@in_loop
async def test_a_wrong_clock_of_a_worker_decides_nothing(ahead: float) -> None:
    """Deadlines are the server's; a worker's clock is only where a sweep looks first."""
    namespace = a_namespace()
    async with opened(namespace) as grid:
        grid._wall = lambda: time.time() + ahead
        visitor, brief = Visitor(grid), Visitor(grid)
        made = await visitor.create(timeout=100.0)
        assert made.deadline == pytest.approx(admin().time()[0] + 100.0, abs=2.0)
        await brief.create(timeout=0.01)
        await asyncio.sleep(0.05)
        expect(Missing, await brief.read())
        assert lasts(namespace, brief.key) < admin().time()[0] + MARGIN + 1
        await grid.sweep(10)
        swept = not admin().exists(name_of(namespace, brief.key))
        assert swept is (ahead < 0)  # else a backstop takes it
        expect(Found, await visitor.read())


@in_loop
async def test_a_record_that_only_its_lock_keeps_is_swept_soon_after_the_lock() -> None:
    clock, namespace = ManualClock(), a_namespace()
    grid = ClockedRedisGrid(shared_server().url, clock, namespace=namespace)
    await grid.open()
    visitor, holder = Visitor(grid), a_claim(lease=50.0)
    await visitor.create(timeout=1.0, claim=holder)
    clock.advance(10.0)
    assert await grid.sweep(10) == 1
    expect(Found, await visitor.read())
    assert await grid.sweep(10) == 0  # not at once again
    clock.advance(50.0)
    assert await grid.sweep(10) == 1
    assert not admin().exists(name_of(namespace, visitor.key))
    await grid.close()


@in_loop
async def test_a_sweeper_does_not_put_off_what_was_shortened_meanwhile() -> None:
    """It has asked the record, and is about to write what it was told."""
    namespace = a_namespace()
    async with opened(namespace) as grid, opened(namespace) as sweeper:
        visitor, holder = Visitor(grid), a_claim()
        await visitor.create(timeout=1000.0, claim=holder)
        part = part_of(namespace, visitor.key)
        admin().zadd(part, {entry_of(visitor.key): 1.5})
        asked, goes_on = asyncio.Event(), asyncio.Event()
        real = sweeper._run

        async def slowly(*arguments: Any) -> Any:
            answer = await real(*arguments)
            asked.set()
            await goes_on.wait()
            return answer

        sweeper._run = slowly  # type: ignore[method-assign,assignment]
        sweeping = asyncio.create_task(sweeper.sweep(1))
        await asked.wait()
        done = await visitor.commit(holder, a_change(b"x", timeout=10.0), release=True)
        goes_on.set()
        assert await sweeping == 1
        assert admin().zscore(part, entry_of(visitor.key)) == pytest.approx(done.deadline, abs=0.5)


@pytest.mark.parametrize("damage", [b"\x02newer", b"\x01\x00\x00\x00\x09garbage", None])
@in_loop
async def test_a_record_that_cannot_be_read_keeps_nobody_else_waiting(
    damage: bytes | None,
) -> None:
    namespace = a_namespace()
    async with opened(namespace) as grid:
        damaged, others = Visitor(grid), [Visitor(grid) for _ in range(70)]
        holders = [a_claim() for _ in others]
        await damaged.create(timeout=0.01)
        for visitor, holder in zip(others, holders, strict=True):
            await visitor.create(timeout=0.01, claim=holder)
        name = name_of(namespace, damaged.key)
        admin().delete(name)
        if damage is None:
            admin().hset(name, "h", "another's")
        else:
            admin().set(name, damage)
        pairs = [(damaged.key, bytes(16))]
        pairs += [(x.key, holder.token) for x, holder in zip(others, holders, strict=True)]
        assert (await grid.renew(pairs, 0.01))[1:] == [True] * len(others)
        with pytest.raises(GridUnavailable):
            await grid.renew(pairs[:1], 5.0)
        await asyncio.sleep(0.1)
        with pytest.raises(GridUnavailable):
            await grid.sweep(1000)
        assert not any(admin().exists(name_of(namespace, x.key)) for x in others)
        assert admin().exists(name)  # left as it is
        expect(Committed, await grid.create(others[0].key, a_new(others[0].secret)))


@in_loop
async def test_a_server_whose_clock_is_set_back_keeps_nothing_for_longer() -> None:
    """Leases, hand-offs and places in the queue end with a step of more than a second."""
    clock, namespace = ManualClock(), a_namespace()
    grid = ClockedRedisGrid(shared_server().url, clock, namespace=namespace)
    await grid.open()
    visitor, dead, waiting, late = Visitor(grid), a_claim(lease=15.0), a_claim(), a_claim()
    await visitor.create(timeout=10_000.0)
    old = await visitor.rotated()
    await visitor.locked(dead)
    await visitor.queued(waiting)
    clock.step_wall(-0.5)  # as those who keep clocks right do: nobody loses anything
    expect(Found, await visitor.read(secret=old))
    assert (await visitor.queued(late)).ahead == 1
    await visitor.release(late)
    clock.step_wall(-3600.0)
    await visitor.locked(late)  # neither the holder nor who waited is heard of any more
    expect(LockLost, await grid.commit(visitor.key, dead.token, a_change(b"x"), release=True))
    await visitor.commit(late, a_change(b"y"), release=True)
    await grid.close()


@in_loop
async def test_a_holder_of_any_text_is_told() -> None:
    async with opened(a_namespace()) as grid:
        visitor, holder = Visitor(grid), a_claim("GET /\udcff · café")
        await visitor.create(claim=holder)
        assert (await visitor.queued(a_claim())).holder == "GET /? · café"


@in_loop
async def test_a_create_that_is_repeated_has_one_entry_and_one_record() -> None:
    namespace = a_namespace()
    async with opened(namespace) as grid:
        visitor = Visitor(grid)
        new = a_new(visitor.secret)
        first = expect(Committed, await grid.create(visitor.key, new))
        again = expect(Committed, await grid.create(visitor.key, new))
        assert (first.version, first.deadline) == (again.version, again.deadline)
        assert admin().zcard(part_of(namespace, visitor.key)) == 1


# -- scripts -------------------------------------------------------------------------------------

SCRIPTS = sorted(
    path.name.removesuffix(".lua") for path in LUA.iterdir() if path.name != "record.lua"
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_says_what_it_takes_and_touches_one_key(name: str) -> None:
    source = (LUA / f"{name}.lua").read_text(encoding="utf-8")
    first, _, rest = source.partition("\n")
    assert first.startswith("#!lua")
    header = rest[: re.search(r"^(?!--)", rest, re.MULTILINE).start()]  # type: ignore[union-attr]
    assert "KEYS[1]" in header
    assert "Returns" in header
    assert "KEYS[2]" not in source
    named = {int(number) for number in re.findall(r"\[(\d+)\]  ?\S", header)}
    used = {int(number) for number in re.findall(r"ARGV\[(\d+)\]", rest.replace(header, ""))}
    assert used <= named | {1}
    assert ("allow-oom" in first) is (name in RUN_WHEN_FULL)


def test_every_script_is_in_use() -> None:
    folder = files("gridsession.grids.redis")
    used = "".join((folder / f"{name}.py").read_text("utf-8") for name in ("grid", "permissions"))
    for name in SCRIPTS:
        assert re.search(rf"\b{name.upper()}\b", used), name
