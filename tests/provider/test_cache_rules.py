"""The client cache by itself: what it keeps, how long that is good, and for whom."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gridsession.grids.contract import Committed, Snapshot, Version
from gridsession.provider.client_cache import ClientCache
from gridsession.settings import ClientCacheType

KINDS: list[ClientCacheType] = ["LRU", "Random", "LRU-MaxMemory", "Random-MaxMemory"]
SECRET, OTHER = b"s" * 32, b"o" * 32


class Clock:
    """Steady seconds that a test sets."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def snapshot(
    payload: bytes | None, version: Version, expires_in: float = 100.0, **other: Any
) -> Snapshot:
    given_values: dict[str, Any] = {"user": None, "replaced": False, "slide_due": False, **other}
    return Snapshot(payload, version, 0.0, 100.0, 0.0, expires_in, **given_values)


def cache_of(
    kind: ClientCacheType = "LRU", capacity: int = 3, interval: float = 10.0
) -> tuple[ClientCache, Clock]:
    clock = Clock()
    return ClientCache(kind, capacity, interval, clock), clock


def keep(cache: ClientCache, key: bytes, payload: bytes = b"p", counter: int = 1) -> None:
    cache.read(key, SECRET, snapshot(payload, Version(counter, 7)), None, cache.steady())


def commit(
    cache: ClientCache, payload: bytes, as_of: float, counter: int, expires_in: float = 100.0
) -> None:
    committed = Committed(Version(counter, 7), 0.0, expires_in)
    cache.committed(b"k", SECRET, payload, committed, timeout=100.0, user=None, as_of=as_of)


# -- what is kept -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 700_000)), max_size=40),
    capacity=st.integers(1, 3),
)
def test_the_capacity_is_never_exceeded(
    kind: ClientCacheType, sizes: list[tuple[int, int]], capacity: int
) -> None:
    cache, clock = cache_of(kind, capacity)
    there: dict[bytes, int] = {}
    for number, (name, size) in enumerate(sizes):
        clock.now += 1
        keep(cache, bytes([name]), bytes(size), counter=number + 1)
        there[bytes([name])] = size
        counters = cache.counters
        kept = {key: it for key in there if (it := cache.get(key)) is not None}
        assert counters.sessions == len(kept)
        assert counters.bytes == sum(len(it.payload) for it in kept.values())
        assert all(len(it.payload) == there[key] for key, it in kept.items())
        if kind.endswith("MaxMemory"):
            assert counters.bytes <= capacity << 20
        else:
            assert counters.sessions <= capacity
        assert bytes([name]) in kept


@pytest.mark.parametrize("kind", ["LRU-MaxMemory", "Random-MaxMemory"])
def test_what_is_larger_than_the_cache_is_not_kept_nor_what_it_replaces(
    kind: ClientCacheType,
) -> None:
    cache, clock = cache_of(kind, 1)
    keep(cache, b"other")
    keep(cache, b"k", b"small")
    clock.now += 1
    keep(cache, b"k", bytes((1 << 20) + 1), counter=2)
    assert cache.get(b"k") is None
    assert cache.get(b"other") is not None
    assert cache.counters.evictions == 0


def test_lru_lets_go_what_was_not_used_for_longest() -> None:
    cache, _ = cache_of("LRU", 2)
    keep(cache, b"a")
    keep(cache, b"b")
    assert cache.fresh(b"a", SECRET) is not None
    keep(cache, b"c")
    assert [cache.get(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]
    assert cache.counters.evictions == 1


def test_random_lets_go_now_this_one_and_now_that_one() -> None:
    gone = set()
    for _ in range(60):
        cache, _ = cache_of("Random", 2)
        for key in (b"a", b"b", b"c"):
            keep(cache, key)
        gone |= {key for key in (b"a", b"b") if cache.get(key) is None}
    assert gone == {b"a", b"b"}


def test_threads_do_not_get_in_each_others_way() -> None:
    cache, _ = cache_of("LRU-MaxMemory", 1)
    failed: list[BaseException] = []

    def use(name: int) -> None:
        try:
            for number in range(3000):
                key = bytes([(name + number) % 40])
                keep(cache, key, bytes(50_000), counter=number)
                cache.fresh(key, SECRET)
                cache.drop(bytes([number % 40]))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=use, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    kept = [cache.get(bytes([name])) for name in range(40)]
    assert cache.counters.bytes == 50_000 * sum(it is not None for it in kept)


# -- which of two answers is kept -------------------------------------------------------------


def test_an_answer_to_an_earlier_question_does_not_replace_a_newer_version() -> None:
    cache, clock = cache_of()
    asked_at = clock.now
    clock.now += 1
    commit(cache, b"new", clock.now, 2)
    clock.now += 1
    old = snapshot(b"old", Version(1, 7))
    assert cache.read(b"k", SECRET, old, None, asked_at) == b"old"  # its own request sees it
    kept = cache.get(b"k")
    assert kept is not None
    assert (kept.payload, kept.version.counter) == (b"new", 2)


def test_a_commit_replaces_what_was_read_while_it_was_on_its_way() -> None:
    cache, clock = cache_of()
    asked_at = clock.now
    clock.now += 1
    keep(cache, b"k", b"old", counter=1)
    clock.now += 1
    commit(cache, b"new", asked_at, 2)
    kept = cache.get(b"k")
    assert kept is not None
    assert kept.payload == b"new"


def test_after_a_fail_over_a_smaller_counter_is_the_newer_version() -> None:
    cache, clock = cache_of()
    keep(cache, b"k", b"lost", counter=9)
    clock.now += 1
    keep(cache, b"k", b"there", counter=4)
    kept = cache.get(b"k")
    assert kept is not None
    assert kept.payload == b"there"


def test_where_the_order_of_two_answers_cannot_be_known_none_is_kept() -> None:
    cache, clock = cache_of()
    asked_at = clock.now
    clock.now += 1
    cache.read(b"k", SECRET, snapshot(b"a", Version(3, 1)), None, clock.now)
    cache.read(b"k", SECRET, snapshot(b"b", Version(3, 2)), None, asked_at)
    assert cache.get(b"k") is None


def test_the_same_version_told_twice_is_as_young_as_the_younger_answer() -> None:
    cache, clock = cache_of(interval=10.0)
    first = clock.now
    clock.now += 6
    keep(cache, b"k")
    cache.read(b"k", SECRET, snapshot(b"p", Version(1, 7)), None, first)
    clock.now += 9.9
    assert cache.fresh(b"k", SECRET) is not None


# -- how long it is good, and for whom ------------------------------------------------------


@pytest.mark.parametrize("by_commit", [False, True], ids=["read", "committed"])
def test_it_is_good_for_the_interval_from_when_the_grid_was_asked(by_commit: bool) -> None:
    cache, clock = cache_of(interval=10.0)
    asked_at = clock.now
    clock.now += 4  # the answer took its time
    if by_commit:
        commit(cache, b"p", asked_at, 1)
    else:
        cache.read(b"k", SECRET, snapshot(b"p", Version(1, 7)), None, asked_at)
    clock.now = asked_at + 9.9
    assert cache.fresh(b"k", SECRET) is not None
    clock.now = asked_at + 10.0
    assert cache.fresh(b"k", SECRET) is None
    assert cache.get(b"k") is not None  # to be asked about


def test_with_no_interval_nothing_is_good_without_asking() -> None:
    cache, _ = cache_of(interval=0.0)
    keep(cache, b"k")
    assert cache.fresh(b"k", SECRET) is None


@pytest.mark.parametrize("by_commit", [False, True], ids=["read", "committed"])
def test_it_is_not_good_past_the_deadline_that_the_grid_named(by_commit: bool) -> None:
    cache, clock = cache_of(interval=1000.0)
    if by_commit:
        commit(cache, b"p", clock.now, 1, 5.0)
    else:
        cache.read(b"k", SECRET, snapshot(b"p", Version(1, 7), 5.0), None, clock.now)
    clock.now += 4.9
    assert cache.fresh(b"k", SECRET) is not None
    assert cache.last_known(b"k", SECRET) is not None
    clock.now += 0.2
    assert cache.fresh(b"k", SECRET) is None
    assert cache.last_known(b"k", SECRET) is None


def test_it_is_good_only_for_the_secret_that_the_grid_let_in() -> None:
    cache, _ = cache_of()
    keep(cache, b"k")
    assert cache.fresh(b"k", OTHER) is None
    assert cache.last_known(b"k", OTHER) is None


def test_a_secret_that_was_replaced_is_let_in_by_the_grid_alone() -> None:
    cache, clock = cache_of()
    old = snapshot(b"p", Version(1, 7), replaced=True)
    cache.read(b"k", OTHER, old, None, clock.now)
    assert cache.get(b"k") is not None
    assert cache.fresh(b"k", OTHER) is None
    assert cache.last_known(b"k", OTHER) is None


def test_a_use_is_told_to_the_grid_once_a_hundredth_of_the_timeout() -> None:
    cache, clock = cache_of(interval=1000.0)
    keep(cache, b"k")  # 100 s of timeout
    told = []
    for _ in range(50):
        clock.now += 0.25
        found = cache.fresh(b"k", SECRET)
        assert found is not None
        told.append(found[1])
    assert sum(told) in (11, 12)


def test_what_is_dropped_is_gone() -> None:
    cache, _ = cache_of()
    keep(cache, b"k")
    cache.drop(b"k")
    cache.drop(b"k")
    assert cache.get(b"k") is None
    assert (cache.counters.sessions, cache.counters.bytes) == (0, 0)


def test_an_answer_that_was_under_way_does_not_bring_back_what_was_dropped() -> None:
    cache, clock = cache_of()
    keep(cache, b"k")
    asked_at = clock.now
    clock.now += 1
    cache.drop(b"k")
    clock.now += 1
    cache.read(b"k", SECRET, snapshot(b"p", Version(1, 7)), None, asked_at)
    assert cache.get(b"k") is None
    cache.read(b"k", SECRET, snapshot(b"p", Version(1, 7)), None, clock.now)
    assert cache.get(b"k") is not None


def test_what_was_dropped_is_not_remembered_without_end() -> None:
    cache, _ = cache_of()
    for number in range(5000):
        cache.drop(number.to_bytes(4, "big"))
    assert len(cache._dropped) <= 1000


def test_hits_and_misses_are_counted() -> None:
    cache, clock = cache_of()
    keep(cache, b"k")
    kept = cache.get(b"k")
    unchanged = snapshot(None, Version(1, 7))
    assert cache.read(b"k", SECRET, unchanged, kept, clock.now) == b"p"
    assert cache.fresh(b"k", SECRET) is not None
    assert cache.fresh(b"x", SECRET) is None
    counters = cache.counters
    assert (counters.hits, counters.misses) == (2, 1)
