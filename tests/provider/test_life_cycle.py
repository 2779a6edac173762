"""A session's life without a framework: `provider.open`."""

# ruff: noqa: PT012 - what is raised comes from the end of a block, after the statements in it

from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import Any

import pytest

from gridsession import (
    Access,
    SessionClosed,
    SessionGone,
    SessionLockLost,
    SessionNotAvailable,
    SessionReadOnly,
    SessionReplaced,
    SessionTooLarge,
    SessionTypeError,
    SettingsError,
)
from gridsession.access import Use
from gridsession.provider.bearer import Cookie
from gridsession.provider.visit import Visit
from gridsession.testing import ManualClock
from tests.provider.harness import (
    Spy,
    data_of,
    identity_of,
    in_loop,
    is_free,
    provider_on,
    stored,
    until,
)

EXCLUSIVE = Use(Access.EXCLUSIVE)

# -- which session ------------------------------------------------------------------------------


@in_loop
async def test_what_was_stored_is_there_for_the_next(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None) as session:
            assert session.is_new
            assert session == {}
            session["cart"] = ["tea"]
        async with provider.open(session.id) as again:
            assert not again.is_new
            assert (again.id, again) == (session.id, {"cart": ["tea"]})
            assert again.key == session.key == identity_of(session.id).key.hex()
            again["cart"].append("milk")
        assert await data_of(provider, session.id) == {"cart": ["tea", "milk"]}
        assert await is_free(grid, session.id)


@in_loop
async def test_keys_are_stored_in_the_order_of_the_dict(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None) as session:
            session.update(a=1, b=2, c=3)
            del session["a"]
            session["a"] = 4
        assert list(await data_of(provider, session.id)) == ["b", "c", "a"]
        async with provider.open(session.id) as session:
            del session["b"]
            session.update(d=5, b=6)
        assert list(await data_of(provider, session.id)) == ["c", "a", "d", "b"]


@pytest.mark.parametrize("access", ["exclusive", "read_only", "none"])
@in_loop
async def test_a_session_in_which_nothing_was_stored_asks_the_grid_nothing(
    grid: Spy, access: str
) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None, access=access) as session:
            assert session.access == access
            session.waited  # noqa: B018 - about the request, and no use of the session
        async with provider.open(None) as session:
            assert "cart" not in session
            assert len(session.id) == 64
            session["a"] = 1
            del session["a"]
            session.timeout = 5
        async with provider.open(None) as session:
            session["a"] = 1
            session.abandon()
    assert grid.asked == []


@pytest.mark.parametrize(
    "foreign",
    ["", "x", "A" * 63, "A" * 65, "é" * 64, "A" * 63 + "\n", "../" * 21 + "a", "\ud800" * 64],
)
@in_loop
async def test_an_id_of_the_wrong_shape_is_no_call_and_never_adopted(
    grid: Spy, foreign: str
) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(foreign) as session:
            assert session.is_new
            assert grid.asked == []
            session["a"] = 1
        assert session.id != foreign
        assert grid.asked == ["create"]
        assert await data_of(provider, session.id) == {"a": 1}


@pytest.mark.parametrize("access", ["exclusive", "read_only", "read_only wait_for_writer"])
@in_loop
async def test_an_unknown_id_is_never_adopted(grid: Spy, access: str) -> None:
    invented = base64.urlsafe_b64encode(bytes(48)).decode()
    async with provider_on(grid) as provider:
        async with provider.open(invented, access=access) as session:
            assert session.is_new
            assert session.id != invented
            if access == "exclusive":
                session["a"] = 1
        async with provider.open(invented) as again:
            assert again.is_new
            assert again == {}


@in_loop
async def test_a_known_handle_with_another_secret_is_unknown(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        forged = session_id[:22] + ("A" * 42 if session_id[22:] != "A" * 42 else "B" * 42)
        # The 22nd character holds the handle's last bits beside the secret's first.
        assert identity_of(forged).key == identity_of(session_id).key
        async with provider.open(forged) as session:
            assert session.is_new
            session["b"] = 2
        assert session.id[:21] != session_id[:21]
        assert await data_of(provider, session_id) == {"a": 1}


@in_loop
async def test_bad_access_is_refused(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        with pytest.raises(SettingsError, match="access 'all' is unknown"):
            async with provider.open(None, access="all"):
                pass
        with pytest.raises(SettingsError, match="wait_for_writer goes with read_only"):
            async with provider.open(None, wait_for_writer=True):
                pass


# -- access -------------------------------------------------------------------------------------


@in_loop
async def test_read_only_sees_the_last_commit_and_locks_nothing(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=[1])
        async with provider.open(session_id) as writer:
            writer["a"].append(2)
            grid.calls.clear()
            async with provider.open(session_id, access="read_only") as reader:
                assert reader == {"a": [1]}
                assert reader.is_read_only
                assert reader.access is Access.READ_ONLY
                with pytest.raises(SessionReadOnly):
                    reader["b"] = 1
                with pytest.raises(SessionReadOnly):
                    await reader.save()
                await reader.release()
            assert grid.asked == ["read"]
        assert await data_of(provider, session_id) == {"a": [1, 2]}


@in_loop
async def test_a_nested_change_in_read_only_is_told_at_the_end(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, cart=[1], b={"c": 1}, d=5)
        with pytest.raises(SessionReadOnly, match="under 'cart', 'b';") as raised:
            async with provider.open(session_id, access=Access.READ_ONLY) as session:
                assert session["d"] == 5
                session["cart"].append("4111")
                session["b"]["c"] = 2
        assert "4111" not in str(raised.value)
        assert await data_of(provider, session_id) == {"cart": [1], "b": {"c": 1}, "d": 5}


@in_loop
async def test_without_a_session_there_is_no_call_and_no_use(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        grid.calls.clear()
        async with provider.open(session_id, access="none") as session:
            for use in (
                lambda: session["a"],
                lambda: session.id,
                session.exclusive,
                session.abandon,
            ):
                with pytest.raises(SessionNotAvailable):
                    use()
        assert grid.asked == []


# -- during ---------------------------------------------------------------------------------------


@in_loop
async def test_save_stores_and_keeps_the_lock(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        with contextlib.suppress(ZeroDivisionError):
            async with provider.open(session_id) as session:
                session["a"] = 2
                await session.save()
                assert await data_of(provider, session_id) == {"a": 2}
                assert not await is_free(grid, session_id)
                grid.calls.clear()
                await session.save()
                assert grid.asked == []  # nothing new to store
                session["a"] = 3
                raise ZeroDivisionError
        assert await data_of(provider, session_id) == {"a": 2}
        assert await is_free(grid, session_id)


@in_loop
async def test_save_of_a_new_session_creates_it_locked(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        async with provider.open(None) as session:
            await session.save()
            assert grid.asked == []
            session["a"] = 1
            await session.save()
            assert not session.is_new
            assert not await is_free(grid, session.id)
            session["a"] = 2
        assert await data_of(provider, session.id) == {"a": 2}
        assert await is_free(grid, session.id)


@in_loop
async def test_release_stores_unlocks_and_closes(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=[1])
        async with provider.open(session_id) as session:
            session["a"].append(2)
            await session.release()
            assert await is_free(grid, session_id)
            assert session == {"a": [1, 2]}
            assert session.is_read_only
            with pytest.raises(SessionClosed, match=r"session\.exclusive\(\)"):
                session["a"] = 1
            with pytest.raises(SessionClosed):
                await session.save()
            grid.calls.clear()
            await session.release()
        assert grid.asked == []
        assert await data_of(provider, session_id) == {"a": [1, 2]}


@in_loop
async def test_what_was_read_stays_readable_when_an_unchanged_session_ends(grid: Spy) -> None:
    """A template that streams goes on reading while the lock is another's already."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=[1], b=2)
        async with provider.open(session_id) as session:
            items = iter(session.items())
            assert next(items) == ("a", [1])
            held = session["a"]
            await session.release()
            assert next(items) == ("b", 2)
            assert list(dict.values(session)) == [[1], 2]
            assert session["a"] is held


@in_loop
async def test_abandon_ends_data_lock_and_id(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            session["a"] = 2
            session.abandon()
            assert session["a"] == 2
        async with provider.open(session_id) as again:
            assert again.is_new
            assert again.id != session_id


@in_loop
async def test_clear_removes_what_is_left_empty_and_without_user(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, user="ann", a=1)
        visit = Visit(provider, session_id.encode(), EXCLUSIVE, "test")
        await visit.begin()
        visit.session.clear()
        assert visit.session.user is None
        await visit.end()
        assert visit.cookie is Cookie.REMOVE
        assert grid.asked[-1] == "remove"
        async with provider.open(session_id) as again:
            assert again.is_new


@in_loop
async def test_a_session_emptied_key_by_key_keeps_its_user(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, user="ann", a=1)
        async with provider.open(session_id) as session:
            del session["a"]
        async with provider.open(session_id) as session:
            assert (session.is_new, session.user, dict(session)) == (False, "ann", {})
            session.user = None
        async with provider.open(session_id) as session:
            assert session.is_new


@in_loop
async def test_a_session_can_be_filled_again_after_clear(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            session.clear()
            session["b"] = 2
        assert await data_of(provider, session_id) == {"b": 2}
        async with provider.open(session_id) as session:
            session.clear()
            await session.save()  # stored empty: the lock is kept, so there is more to come
            session["c"] = 3
        assert await data_of(provider, session_id) == {"c": 3}
        async with provider.open(session_id) as session:
            session.clear()
            await session.save()
        async with provider.open(session_id) as session:
            assert session.is_new


@in_loop
async def test_a_user_alone_makes_a_session(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, user="ann")
        async with provider.open(session_id, access="read_only") as session:
            assert (session.is_new, session.user) == (False, "ann")


# -- ids that change ----------------------------------------------------------------------------


@in_loop
async def test_a_rotated_id_is_known_for_ten_seconds_more(grid: Spy, clock: ManualClock) -> None:
    async with provider_on(grid) as provider:
        old = await stored(provider, a=1)
        async with provider.open(old) as session:
            session.regenerate_id()
            assert session.id == old
        new = session.id
        assert new != old
        assert identity_of(new).key == identity_of(old).key
        clock.advance(9.9)
        async with provider.open(old) as alias:
            assert not alias.is_new
            alias["a"] += 1
        visit = Visit(provider, old.encode(), EXCLUSIVE, "test")
        await visit.begin()
        visit.session["a"] += 1
        visit.session.regenerate_id()  # its browser has just been given one
        await visit.end()
        assert visit.cookie_to_send(visit.session, rolling=True) is Cookie.KEEP
        assert await data_of(provider, new) == {"a": 3}
        clock.advance(0.2)
        async with provider.open(old) as late:
            assert late.is_new
        assert await data_of(provider, new) == {"a": 3}


@in_loop
async def test_an_alias_cannot_change_the_user(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        old = await stored(provider, user="ann", a=1)
        async with provider.open(old) as session:
            session.regenerate_id()
        async with provider.open(old) as alias:
            for change in ("bob", None):
                with pytest.raises(SessionReplaced, match="cannot change the user"):
                    alias.user = change
            alias.user = "ann"
        async with provider.open(session.id) as session:
            assert session.user == "ann"


@in_loop
async def test_a_change_of_user_shuts_the_old_id_out(grid: Spy, clock: ManualClock) -> None:
    async with provider_on(grid) as provider:
        first = await stored(provider, a=1)
        async with provider.open(first) as session:
            session.regenerate_id()
        second = session.id
        async with provider.open(second) as session:
            session.user = "ann"
            await session.save()  # its cookie would be lost with a handler that fails now
            assert session.id == second
        third = session.id
        assert third != second
        for old in (first, second):
            for access in ("exclusive", "read_only", "read_only wait_for_writer"):
                with pytest.raises(SessionReplaced):
                    async with provider.open(old, access=access):
                        raise AssertionError("the block ran")
        clock.advance(10.1)
        async with provider.open(second) as late:
            assert late.is_new
        async with provider.open(third) as session:
            assert (session.user, session["a"]) == ("ann", 1)
            assert await is_free(grid, first)  # its tickets went with it


@in_loop
async def test_those_who_wait_with_the_old_id_are_shut_out(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        old = await stored(provider, a=1)

        async def wait(access: str) -> str:
            try:
                async with provider.open(old, access=access):
                    return "the block ran"
            except SessionReplaced:
                return "replaced"

        async with provider.open(old) as session, asyncio.TaskGroup() as tasks:
            waiting = [
                tasks.create_task(wait(access))
                for access in ("exclusive", "read_only wait_for_writer", "exclusive")
            ]
            await until(lambda: grid.in_line(len(waiting)))
            session.user = "ann"
            await session.release()
        assert [task.result() for task in waiting] == ["replaced"] * 3
        assert await is_free(grid, session.id)


@in_loop
async def test_setting_the_user_it_has_changes_no_id(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, user="ann")
        grid.calls.clear()
        async with provider.open(session_id) as session:
            session.user = "bob"
            session.user = "ann"
        assert session.id == session_id
        assert grid.asked == ["acquire", "release"]


# -- time -----------------------------------------------------------------------------------------


@in_loop
async def test_a_session_expires_when_it_is_not_used(grid: Spy, clock: ManualClock) -> None:
    async with provider_on(grid, timeout=100) as provider:
        used, unused = await stored(provider, a=1), await stored(provider, b=2)
        for _ in range(4):
            clock.advance(60)
            async with provider.open(used) as session:
                assert session == {"a": 1}
        async with provider.open(unused) as session:
            assert session.is_new
        clock.advance(100.1)
        async with provider.open(used) as session:
            assert session.is_new


@in_loop
async def test_timeout_is_the_sessions_own(grid: Spy, clock: ManualClock) -> None:
    async with provider_on(grid, timeout=100) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            assert session.timeout == 100.0
            grid.calls.clear()
            session.timeout = 5
        assert grid.asked == ["commit"]
        async with provider.open(session_id) as session:
            assert session.timeout == 5.0
        clock.advance(5.1)
        async with provider.open(session_id) as session:
            assert session.is_new


@in_loop
async def test_absolute_timeout_ends_a_session_in_use(grid: Spy, clock: ManualClock) -> None:
    async with provider_on(grid, timeout=100, absolute_timeout=150) as provider:
        session_id = await stored(provider, a=1)
        clock.advance(90)
        async with provider.open(session_id) as session:
            session["a"] = 2
        clock.advance(59)
        assert await data_of(provider, session_id) == {"a": 2}
        clock.advance(2)
        async with provider.open(session_id) as session:
            assert session.is_new


# -- refusals at the end ------------------------------------------------------------------------


@in_loop
async def test_an_exception_discards_and_unlocks(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=[1])
        with pytest.raises(ZeroDivisionError):
            async with provider.open(session_id) as session:
                session["a"].append(2)
                session["b"] = 1
                session.user = "ann"
                raise ZeroDivisionError
        assert await data_of(provider, session_id) == {"a": [1]}
        assert await is_free(grid, session_id)
        assert session == {"a": [1]}
        with pytest.raises(SessionClosed):
            session["b"] = 1
        grid.calls.clear()
        with pytest.raises(ZeroDivisionError):
            async with provider.open(None) as session:
                session["a"] = 1
                raise ZeroDivisionError
        assert grid.asked == []


CANNOT_BE_STORED: list[tuple[Any, type[Exception], str]] = [
    (object(), SessionTypeError, r"\['deep'\].*object|\[\"deep\"\].*object"),
    (b"x" * 3000, SessionTooLarge, "'a' 3,0|\"a\" 3,0"),
]


@pytest.mark.parametrize(("value", "error", "text"), CANNOT_BE_STORED)
@pytest.mark.parametrize("member", ["end", "save", "release"])
@in_loop
async def test_what_cannot_be_stored_stores_nothing_and_unlocks(
    grid: Spy, value: Any, error: type[Exception], text: str, member: str
) -> None:
    async with provider_on(grid, max_payload_bytes=2048) as provider:
        session_id = await stored(provider, a={}, b=1)
        for opened in (session_id, None):
            grid.calls.clear()
            with pytest.raises(error, match=text):
                async with provider.open(opened) as session:
                    session["b"] = 2
                    session["a"] = {"deep": value}
                    if member != "end":
                        await getattr(session, member)()
            assert not {"create", "commit"} & set(grid.asked)
        assert await data_of(provider, session_id) == {"a": {}, "b": 1}
        assert await is_free(grid, session_id)


@in_loop
async def test_what_could_not_be_saved_can_be_mended(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            session["b"] = object()
            with pytest.raises(SessionTypeError):
                await session.save()
            session["b"] = 2
        assert await data_of(provider, session_id) == {"a": 1, "b": 2}


@pytest.mark.parametrize("member", ["end", "save", "release"])
@in_loop
async def test_a_lost_lock_is_told_and_nothing_stored(
    grid: Spy, clock: ManualClock, member: str
) -> None:
    async with provider_on(grid, lock_lease=15) as provider:
        session_id = await stored(provider, a=1)
        with pytest.raises(SessionLockLost):
            async with provider.open(session_id) as hung:
                clock.advance(15.1)
                async with provider.open(session_id) as other:
                    other["a"] = 2
                hung["a"] = 3
                if member != "end":
                    await getattr(hung, member)()
        assert await data_of(provider, session_id) == {"a": 2}
        assert await is_free(grid, session_id)


@in_loop
async def test_a_lost_lock_cannot_end_the_session_by_emptying_it(
    grid: Spy, clock: ManualClock
) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        with pytest.raises(SessionLockLost):
            async with provider.open(session_id) as hung:
                clock.advance(15.1)
                async with provider.open(session_id) as other:
                    other["a"] = 2
                hung.clear()
        assert await data_of(provider, session_id) == {"a": 2}


@in_loop
async def test_a_session_that_ended_meanwhile_does_not_come_back(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        with pytest.raises(SessionGone):
            async with provider.open(session_id) as session:
                await grid.inner.remove(identity_of(session_id).key)
                session["a"] = 2
        async with provider.open(session_id) as session:
            assert session.is_new
        async with provider.open(await stored(provider, a=1)) as session:
            await grid.inner.remove(identity_of(session.id).key)
            session.clear()  # what was to go is gone


@in_loop
async def test_a_user_saved_before_a_failure_leaves_the_old_id_good(
    grid: Spy, clock: ManualClock
) -> None:
    """The response that would have carried the new id never came."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        with pytest.raises(ZeroDivisionError):
            async with provider.open(session_id) as session:
                session.user = "ann"
                session["a"] = 2
                await session.save()
                raise ZeroDivisionError
        clock.advance(30)
        async with provider.open(session_id) as session:
            assert (session.user, dict(session)) == (None, {"a": 2})


@pytest.mark.parametrize("access", ["read_only", "exclusive"])
@in_loop
async def test_only_who_held_the_lock_to_the_end_sends_the_same_cookie_again(
    grid: Spy, access: str
) -> None:
    """Another may have replaced the id meanwhile, and its answer came first."""
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        late = Visit(provider, session_id.encode(), Use.parse(access), "late")
        await late.begin()
        assert late.session["a"] == 1
        if access == "exclusive":
            await late.session.release()
        async with provider.open(session_id) as session:
            session.regenerate_id()
        await late.end()
        assert late.cookie_to_send(late.session, rolling=True) is Cookie.KEEP
        held = Visit(provider, session_id.encode(), Use.parse("exclusive"), "held")
        await held.begin()
        await held.end()
        # Its id is the replaced one.
        assert held.cookie_to_send(held.session, rolling=True) is Cookie.KEEP
        fresh = Visit(provider, session.id.encode(), Use.parse("exclusive"), "fresh")
        await fresh.begin()
        assert fresh.session["a"] == 1
        await fresh.end()
        assert fresh.cookie_to_send(fresh.session, rolling=True) is Cookie.SET


@in_loop
async def test_a_replaced_id_can_log_out(grid: Spy) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            session.user = "ann"
        with_user = session.id
        async with provider.open(with_user) as session:
            session.regenerate_id()
        async with provider.open(with_user) as session:
            session.clear()
        assert await data_of(provider, with_user) == {}


@pytest.mark.parametrize("user", ["\ud800", "x" * 256])
@in_loop
async def test_a_user_that_cannot_be_stored_is_refused_at_once(grid: Spy, user: str) -> None:
    async with provider_on(grid) as provider:
        session_id = await stored(provider, a=1)
        async with provider.open(session_id) as session:
            with pytest.raises(ValueError, match="at most 255 characters"):
                session.user = user
            session.user = "x" * 255
        assert await is_free(grid, session.id)
