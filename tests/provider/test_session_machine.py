"""Session against a plain dict, through any operations, commits and reloads, on each grid."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gridsession import Session, SessionProvider, SessionSettings
from gridsession.testing import ManualClock
from tests.provider.harness import Spy, data_of, is_free, make_grid

KEYS = st.sampled_from(["a", "b", "c", "", "é", "d" * 40])
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
)
VALUES = st.recursive(
    LEAVES | st.binary(max_size=4) | st.frozensets(st.integers(), max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=5,
)


class Sessions(RuleBasedStateMachine):
    """One browser: requests that come and go, each with a session that is open for a while."""

    kind = "memory"

    def __init__(self) -> None:
        super().__init__()
        self.closing = contextlib.ExitStack()
        folder = Path(self.closing.enter_context(tempfile.TemporaryDirectory()))
        self.runner = self.closing.enter_context(asyncio.Runner())
        self.grid = Spy(make_grid(self.kind, folder, ManualClock()))
        settings = SessionSettings(lock_wait_timeout=0.05)
        self.provider = SessionProvider(settings, grid=self.grid)
        self.session_id: str | None = None
        self.stored: dict[str, Any] = {}  # what the grid has
        self.user: str | None = None
        self.stored_user: str | None = None
        self.open()

    def open(self) -> None:
        self.opened = self.provider.open(self.session_id)
        self.session: Session = self.runner.run(self._enter())
        if self.session_id is not None:
            kept = self.runner.run(data_of(self.provider, self.session_id))
            assert kept == self.stored
            # Keys that changed places and nothing else are no write.
            self.stored = {key: self.stored[key] for key in kept}
        assert self.session.is_new is (self.session_id is None)
        self.model = copy.deepcopy(self.stored)
        self.user = self.stored_user

    async def _enter(self) -> Session:
        return await self.opened.__aenter__()

    async def _leave(self, error: BaseException | None) -> None:
        with contextlib.suppress(ZeroDivisionError):
            await self.opened.__aexit__(type(error) if error else None, error, None)

    def teardown(self) -> None:
        self.runner.run(self._leave(None))
        self.runner.run(self.provider.close())
        self.runner.run(self.grid.inner.close())
        self.closing.close()

    def note_commit(self) -> None:
        self.stored, self.stored_user = copy.deepcopy(self.model), self.user
        self.session_id = self.session.id if self.stored or self.stored_user else None

    # -- a handler ------------------------------------------------------------------------

    @rule(key=KEYS, value=VALUES)
    def set(self, key: str, value: Any) -> None:
        self.session[key] = copy.deepcopy(value)
        self.model[key] = copy.deepcopy(value)

    @rule(key=KEYS)
    def set_what_is_there(self, key: str) -> None:
        if key in self.model:
            self.session[key] = copy.deepcopy(self.model[key])

    @rule(key=KEYS)
    def delete(self, key: str) -> None:
        assert (key in self.session) == (key in self.model)
        if key in self.model:
            del self.session[key]
            del self.model[key]

    @rule(key=KEYS)
    def pop(self, key: str) -> None:
        assert self.session.pop(key, "nothing") == self.model.pop(key, "nothing")

    @rule()
    def popitem(self) -> None:
        if self.model:
            assert self.session.popitem() == self.model.popitem()

    @rule(key=KEYS, value=VALUES)
    def setdefault(self, key: str, value: Any) -> None:
        mine = self.session.setdefault(key, copy.deepcopy(value))
        assert mine == self.model.setdefault(key, copy.deepcopy(value))

    @rule(values=st.dictionaries(KEYS, VALUES, max_size=3), merge=st.booleans())
    def update(self, values: dict[str, Any], merge: bool) -> None:
        if merge:
            self.session |= copy.deepcopy(values)
        else:
            self.session.update(copy.deepcopy(values))
        self.model.update(copy.deepcopy(values))

    @rule(key=KEYS, value=LEAVES)
    def change_inside(self, key: str, value: Any) -> None:
        match self.model.get(key):
            case list():
                self.session[key].append(value)
                self.model[key].append(value)
            case dict():
                self.session[key]["new"] = value
                self.model[key]["new"] = value
            case (list(), _):
                self.session[key][0].append(value)
                self.model[key][0].append(value)

    @rule()
    def clear(self) -> None:
        self.session.clear()
        self.model.clear()
        self.user = None

    @rule(user=st.sampled_from(["ann", "bob", None]))
    def set_user(self, user: str | None) -> None:
        self.session.user = self.user = user

    @rule()
    def regenerate(self) -> None:
        self.session.regenerate_id()

    @rule(key=KEYS)
    def read(self, key: str) -> None:
        assert self.session.get(key, "nothing") == self.model.get(key, "nothing")

    # -- commits ----------------------------------------------------------------------------

    @rule()
    def save(self) -> None:
        was_new, user_before = self.session.is_new, self.stored_user
        self.runner.run(self.session.save())
        self.note_commit()
        if not was_new:  # a new user waits for the response that carries the new id
            self.stored_user = user_before
        if not self.session.is_new:  # stored, if only as empty
            self.session_id = self.session.id

    @rule()
    def end(self) -> None:
        self.runner.run(self._leave(None))
        self.note_commit()
        self.open()

    @rule()
    def fail(self) -> None:
        self.runner.run(self._leave(ZeroDivisionError()))
        self.open()

    @precondition(lambda self: self.session_id is not None)
    @rule()
    def end_and_read_only_is_no_write(self) -> None:
        self.end()
        if self.session_id is None:
            return
        self.grid.calls.clear()
        assert self.session == self.model
        list(self.session.items())
        self.runner.run(self._leave(None))
        assert self.grid.asked == (["release"] if self.stored or self.stored_user else ["remove"])
        self.open()

    # -- what holds at any moment -----------------------------------------------------------

    @invariant()
    def data_is_the_models(self) -> None:
        assert len(self.session) == len(self.model)
        assert list(self.session) == list(self.model)

    @invariant()
    def user_is_the_models(self) -> None:
        assert self.session.user == self.user

    @invariant()
    def the_lock_is_held(self) -> None:
        if self.session_id is not None:
            assert not self.runner.run(is_free(self.grid.inner, self.session_id))


class EmbeddedSessions(Sessions):
    kind = "embedded"


BRIEF = settings(
    max_examples=250, stateful_step_count=40, suppress_health_check=[HealthCheck.too_slow]
)
TestSessions = Sessions.TestCase
TestSessions.settings = BRIEF
TestEmbeddedSessions = EmbeddedSessions.TestCase
TestEmbeddedSessions.settings = settings(BRIEF, max_examples=60)
