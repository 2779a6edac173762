"""Merging what two requests changed: key by key, by what is stored."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gridsession import SessionTypeError, payload
from gridsession.changes import ABSENT, find_delta, rebase
from gridsession.undecoded import UNDECODED

KEYS = st.sampled_from("abcdef")
VALUES = st.one_of(st.integers(0, 3), st.lists(st.integers(0, 2), max_size=2))
DATA = st.dictionaries(KEYS, VALUES, max_size=5)
CHANGES = st.dictionaries(KEYS, st.one_of(st.just(ABSENT), VALUES), max_size=5)


def segments_of(data: dict[str, Any]) -> dict[str, bytes]:
    return {key: payload.encode(key, value) for key, value in data.items()}


def data_of(segments: dict[str, bytes]) -> dict[str, Any]:
    return {key: payload.decode(segment) for key, segment in segments.items()}


def changed(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """What one request alone makes of it."""
    after = {**data, **changes}
    return {key: value for key, value in after.items() if value is not ABSENT}


class Work:
    """One request: what it began with, and what it changed."""

    def __init__(self, data: dict[str, Any], changes: dict[str, Any]) -> None:
        self.base = segments_of(data)
        self.values: dict[str, Any] = dict.fromkeys(self.base, UNDECODED)
        self.touched: dict[str, None] = dict.fromkeys(changes)
        for key, value in changes.items():
            if value is ABSENT:
                self.values.pop(key, None)
            else:
                self.values[key] = value

    def rebased(self, theirs: dict[str, bytes], on_conflict: Any = None) -> int:
        both = rebase(self.values, self.touched, self.base, theirs, on_conflict)
        self.base = theirs
        return both

    def segments(self) -> dict[str, bytes]:
        """What it would store now."""
        delta = find_delta(self.values, self.touched, self.base)
        after = {**self.base, **delta.set}
        return {key: after[key] for key in self.values}


def one_after_the_other(
    data: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> dict[str, Any]:
    """Two requests began with the same data; the second commits upon the first."""
    work = Work(data, second)
    work.rebased(segments_of(changed(data, first)))
    return data_of(work.segments())


def really(data: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The changes without those that set a value to itself or remove what is not there."""
    before = segments_of(data)
    after = segments_of({key: value for key, value in changes.items() if value is not ABSENT})
    return {key: changes[key] for key in changes if before.get(key) != after.get(key)}


@given(DATA, CHANGES, CHANGES)
def test_promise_5_the_merge_is_one_serial_order_for_each_key(
    data: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    in_order = changed(changed(data, really(data, first)), really(data, second))
    assert one_after_the_other(data, first, second) == in_order


@given(DATA, CHANGES, CHANGES)
def test_promise_5_on_different_keys_the_order_does_not_matter(
    data: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    second = {key: value for key, value in second.items() if key not in first}
    there = one_after_the_other(data, first, second)
    assert there == one_after_the_other(data, second, first)
    for key, value in {**first, **second}.items():
        assert there.get(key, ABSENT) == value or (value is ABSENT and key not in there)


@given(DATA, st.lists(CHANGES, min_size=1, max_size=4), CHANGES)
def test_any_number_of_rebases_equals_one_upon_the_last(
    data: dict[str, Any], others: list[dict[str, Any]], mine: dict[str, Any]
) -> None:
    step_by_step, theirs = Work(data, mine), data
    for other in others:
        theirs = changed(theirs, other)
        step_by_step.rebased(segments_of(theirs))
    # A key that another sets to this one's value is not this one's change any more.
    for key, value in data_of(step_by_step.segments()).items():
        assert value in (theirs.get(key, ABSENT), mine.get(key, ABSENT))
    assert {k: v for k, v in theirs.items() if k not in mine} == {
        k: v for k, v in data_of(step_by_step.segments()).items() if k not in mine
    }


@given(DATA, CHANGES, CHANGES)
def test_only_keys_that_both_changed_are_conflicts(
    data: dict[str, Any], first: dict[str, Any], second: dict[str, Any]
) -> None:
    asked: list[str] = []

    def on_conflict(key: str, base: Any, theirs: Any, mine: Any) -> Any:
        assert (base, theirs, mine) == (data.get(key, ABSENT), first[key], second[key])
        asked.append(key)
        return ["resolved", key]

    both = really(data, first).keys() & really(data, second).keys()
    work = Work(data, second)
    assert work.rebased(segments_of(changed(data, first)), on_conflict) == len(both)
    assert sorted(asked) == sorted(both)
    for key in both:
        assert payload.decode(work.segments()[key]) == ["resolved", key]


def test_two_that_count_to_the_same_number_are_both_counted() -> None:
    work = Work({"n": 10}, {"n": 11})
    assert work.rebased(segments_of({"n": 11}), lambda _, base, a, b: a + b - base) == 1
    assert data_of(work.segments()) == {"n": 12}


def test_a_resolver_may_remove_the_key() -> None:
    work = Work({"a": 1, "b": 1}, {"a": 2})
    assert work.rebased(segments_of({"a": 3, "b": 1}), lambda *_: ABSENT) == 1
    assert data_of(work.segments()) == {"b": 1}


def test_a_resolver_has_copies_of_its_own() -> None:
    given_to: list[Any] = []

    def on_conflict(key: str, base: Any, theirs: Any, mine: Any) -> Any:
        given_to.extend((base, theirs, mine))
        return [*theirs, *mine]

    mine = [2]
    work = Work({"a": [0]}, {"a": mine})
    work.rebased(segments_of({"a": [1]}), on_conflict)
    assert given_to == [[0], [1], [2]]
    assert given_to[2] is not mine
    assert data_of(work.segments()) == {"a": [1, 2]}


@pytest.mark.parametrize("gives", [object(), {1: object()}], ids=["object", "nested"])
def test_what_a_resolver_returns_is_checked_as_any_value(gives: object) -> None:
    work = Work({"a": 0}, {"a": 1})
    work.rebased(segments_of({"a": 2}), lambda *_: gives)
    with pytest.raises(SessionTypeError):
        work.segments()


def test_a_resolver_that_raises_has_changed_nothing() -> None:
    work = Work({"a": 0, "b": 0, "c": 0}, {"a": 1, "b": ABSENT})
    before = dict(work.values), dict(work.touched)
    with pytest.raises(ZeroDivisionError):
        rebase(
            work.values,
            work.touched,
            work.base,
            segments_of({"a": 2, "b": 2, "c": 2}),
            lambda *_: 1 // 0,
        )
    assert (work.values, work.touched) == before


def test_a_value_in_hand_that_another_changed_is_not_taken_for_a_change() -> None:
    """Read, not changed, and older than what is stored: to store it would undo the other's."""
    work = Work({"cart": [1], "n": 0}, {"cart": [1], "n": 1})
    assert work.rebased(segments_of({"cart": [1, 2], "n": 0})) == 0
    assert work.values["cart"] is UNDECODED
    assert data_of(work.segments()) == {"cart": [1, 2], "n": 1}
    assert find_delta(work.values, work.touched, work.base).set.keys() == {"n"}


def test_a_value_that_another_removed_goes_and_one_that_this_request_changed_stays() -> None:
    work = Work({"a": 1, "b": 1}, {"a": 2, "b": 1})
    assert work.rebased({}) == 1
    assert data_of(work.segments()) == {"a": 2}
