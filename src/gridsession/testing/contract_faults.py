"""The grid contract, last part: secrets kept, newer layouts, no room."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import traceback
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from gridsession.errors import GridFull, GridUnavailable
from gridsession.grids.contract import (
    Claim,
    Grid,
    Missing,
    Released,
    Removed,
    Rotation,
    Version,
)
from gridsession.testing.contract_hooks import (
    LONG,
    GridHooks,
    Undo,
    Visitor,
    a_change,
    a_claim,
    a_new,
    a_secret,
    contract_test,
    expect,
)

_Call = Coroutine[Any, Any, object]


_KNOWN = Version(1, 7)  # not the record's


class _Spy(logging.Handler):
    """Keeps the text of every log record, arguments and traceback included."""

    def __init__(self) -> None:
        super().__init__(logging.NOTSET)
        self.texts: list[str] = []
        self._formatter = logging.Formatter("%(name)s %(message)s")

    def emit(self, record: logging.LogRecord) -> None:
        extras = {k: v for k, v in vars(record).items() if k not in ("msg", "args")}
        self.texts += [self._formatter.format(record), repr(record.args), repr(extras)]


@contextlib.contextmanager
def _spied() -> Iterator[_Spy]:
    """Everything that is logged, by whatever logger, at any level."""
    spy, root = _Spy(), logging.getLogger()
    names = [n for n in logging.root.manager.loggerDict if n.partition(".")[0] == "gridsession"]
    loggers = [root, *map(logging.getLogger, {"gridsession", *names})]
    levels = [logger.level for logger in loggers]
    root.addHandler(spy)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    try:
        yield spy
    finally:
        root.removeHandler(spy)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _spellings(planted: bytes) -> set[str]:
    """How bytes may turn up in a text."""
    encoded = {base64.b64encode(planted).decode(), base64.urlsafe_b64encode(planted).decode()}
    return {
        repr(planted)[2:-1],
        planted.decode("latin-1"),
        planted.hex(),
        planted.hex().upper(),
        *(text.rstrip("=") for text in encoded),
    }


def _all_calls(visitor: Visitor, holder: Claim) -> list[Callable[[], _Call]]:
    grid, key, token = visitor.grid, visitor.key, holder.token
    return [
        visitor.read,
        lambda: visitor.read(known=_KNOWN),
        lambda: visitor.acquire(a_claim(), known=_KNOWN),
        lambda: visitor.commit_if(_KNOWN, a_change(b"overwritten")),
        lambda: visitor.read(watch=a_claim()),
        lambda: visitor.acquire(a_claim()),
        lambda: visitor.release(holder),
        lambda: grid.touch(key),
        lambda: grid.remove(key),
        lambda: grid.remove(key, token),
        lambda: grid.renew([(key, token)], LONG),
        lambda: grid.create(key, a_new(a_secret())),
        lambda: grid.commit(key, token, a_change(b"overwritten"), release=True),
    ]


class FaultContract(GridHooks):
    @contract_test()
    async def test_promise_9_nothing_secret_is_logged_raised_or_shown(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        holder, waiter, watcher = a_claim("POST /cart"), a_claim(), a_claim(queue_limit=1)
        payload, more, user = b"card 4111 1111", b"pin 8264 x", "ann@example.com"
        new = a_new(visitor.secret, payload, user=user)
        rotation = Rotation(a_secret(), user_changed=False)
        change = a_change(more, user=user, rotation=rotation)
        merged = a_change(more, user=user, rotation=rotation)
        base = Version(1, merged.commit_token)
        key, secret, stranger = visitor.key, visitor.secret, a_secret()
        pairs = [(key, holder.token), (key, waiter.token)]
        calls: list[Callable[[], _Call]] = [
            lambda: grid.create(key, new, holder),
            lambda: grid.create(key, a_new(stranger, payload)),
            lambda: grid.acquire(key, secret, holder),
            lambda: grid.acquire(key, secret, waiter),
            lambda: grid.acquire(key, stranger, watcher),
            lambda: grid.read(key, secret),
            lambda: grid.read(key, secret, watcher),
            lambda: grid.read(key, secret, known=base),
            lambda: grid.acquire(key, secret, waiter, base),
            lambda: grid.commit_if(key, secret, base, merged),
            lambda: grid.wait(key, waiter.token, 0.01),
            lambda: grid.commit(key, waiter.token, change, release=True),
            lambda: grid.commit(key, holder.token, change, release=False),
            lambda: grid.commit_if(key, secret, base, change),
            lambda: grid.renew(pairs, 30.0),
            lambda: grid.touch(key),
            lambda: grid.remove(key, waiter.token),
            lambda: grid.sweep(3),
            lambda: grid.release(key, holder.token),
            lambda: grid.acquire(key, secret, waiter),
            lambda: grid.release(key, stranger[:16]),
            lambda: grid.release(key, waiter.token),
            lambda: grid.commit_if(key, rotation.secret, base, merged),
            lambda: grid.commit_if(key, secret, Version(2, change.commit_token), merged),
            lambda: grid.remove(key),
            lambda: grid.acquire(key, secret, holder),
        ]
        shown = [repr(x) for x in (holder, waiter, new, change, rotation, base, grid, grid.where)]
        with _spied() as spy:
            shown += [repr(await call()) for call in calls]
            await grid.close()
            for call in calls:  # of a closed grid nothing is promised but that it keeps quiet
                try:
                    async with asyncio.timeout(2.0):
                        shown.append(repr(await call()))
                except Exception as error:
                    shown += ["".join(traceback.format_exception(error)), repr(vars(error))]
        tokens = [holder.token, waiter.token, watcher.token]
        planted = [key, secret, stranger, rotation.secret, payload, more, user.encode(), *tokens]
        for text in (*shown, *spy.texts):
            for number, secret_bytes in enumerate(planted):
                for spelling in _spellings(secret_bytes):
                    assert spelling not in text, f"planted value {number} is shown in: {text}"

    # -- open, close; 10; no room -------------------------------------------------------------

    @contract_test()
    async def test_open_and_close_twice(self, grid: Grid) -> None:
        visitor = Visitor(grid)
        await visitor.create(b"kept")
        await grid.open()
        assert (await visitor.found()).payload == b"kept"
        assert isinstance(grid.where, str)
        assert grid.where
        assert grid.is_local in (False, True)
        await grid.close()
        await grid.close()

    @contract_test()
    async def test_a_second_client_sees_the_same_records(self, grid: Grid) -> None:
        visitor, claim = Visitor(grid), a_claim()
        await visitor.create(b"first")
        async with self.second_client(grid) as other:
            there = visitor.at(other)
            assert await there.found() == await visitor.found()
            await there.locked(claim)
            await visitor.queued(a_claim())
            await there.commit(claim, a_change(b"second"))
            assert (await visitor.found()).payload == b"second"
            expect(Removed, await there.grid.remove(there.key))
            expect(Missing, await visitor.read())


class StoredGridContract(GridHooks):
    """What a grid has to do besides, whose records outlive the process: promise 10."""

    async def make_newer_layout(self, grid: Grid, key: bytes) -> Undo:
        """Mark what is stored (at least the record under `key`) as written by a newer release.

        To be overridden. Returns what undoes the mark and nothing else.
        """
        raise NotImplementedError("a stored grid's suite overrides make_newer_layout()")

    @contract_test()
    async def test_promise_10_a_newer_layout_is_unavailable(self, grid: Grid) -> None:
        visitor, holder = Visitor(grid), a_claim()
        await visitor.create(b"from the future", claim=holder)
        before = await visitor.found()
        undo = await self.make_newer_layout(grid, visitor.key)
        for number in range(len(_all_calls(visitor, holder))):
            with contextlib.suppress(GridUnavailable):
                async with self.second_client(grid) as other:
                    calls = _all_calls(visitor.at(other), holder)
                    outcome = await calls[number]()
                    raise AssertionError(f"call {number} answered: {outcome!r}")
        await undo()
        assert await visitor.found() == before
        await visitor.commit(holder, a_change(b"x"))


class BoundedGridContract(GridHooks):
    """What a grid has to do besides, whose size is bounded: `GridFull`."""

    async def make_full(self, grid: Grid) -> None:
        """Store records until `create` raises `GridFull`. To be overridden."""
        raise NotImplementedError("a bounded grid's suite overrides make_full()")

    @contract_test()
    async def test_a_full_grid_refuses_whole_and_still_releases(self, grid: Grid) -> None:
        holder, waiter, visitor, victim = a_claim(), a_claim(), Visitor(grid), Visitor(grid)
        await visitor.create(b"small", claim=holder)
        there = await victim.create(b"x" * 10_000)
        await visitor.queued(waiter)
        await self.make_full(grid)
        refused = Visitor(grid)
        for call in (
            grid.create(refused.key, a_new(refused.secret, b"y" * 100_000)),
            grid.commit(visitor.key, holder.token, a_change(b"y" * 100_000), release=True),
            victim.commit_if(there.version, a_change(b"y" * 100_000)),
        ):
            try:
                outcome = await call
            except GridFull:
                continue
            raise AssertionError(f"GridFull was due, the grid answered: {outcome!r}")
        expect(Missing, await refused.read())
        assert (await visitor.found()).payload == b"small"
        assert (await victim.found()).version == there.version
        assert await grid.renew([(visitor.key, holder.token)], LONG) == [True]
        expect(Released, await visitor.release(holder))
        expect(Removed, await grid.remove(victim.key))
        assert await grid.sweep(10) <= 10
