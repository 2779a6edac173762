"""The grid of a farm: records in Redis, changed by scripts that carry the contract's rules."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from typing import Any

from gridsession.errors import GridUnavailable
from gridsession.grids.contract import (
    EXISTS,
    Busy,
    Change,
    Claim,
    Committed,
    Conflict,
    Exists,
    Found,
    Gone,
    Granted,
    Locked,
    LockLost,
    Missing,
    NewRecord,
    QueueFull,
    Released,
    Removed,
    Replaced,
    Version,
)
from gridsession.grids.redis import scripts
from gridsession.grids.redis.answers import (
    ON_COMMIT,
    ON_COMMIT_IF,
    ON_RELEASE,
    ON_REMOVE,
    ON_RENEW,
    ON_TOUCH,
    TOKEN,
    Answers,
)
from gridsession.grids.redis.connections import Connections
from gridsession.grids.redis.credentials import CredentialProvider
from gridsession.grids.redis.health import concerns
from gridsession.grids.redis.names import PARTS, Names
from gridsession.grids.redis.permissions import refused
from gridsession.grids.redis.ready_client import server_of
from gridsession.grids.redis.replies import Misset, ServerReply, failure
from gridsession.grids.redis.scripts import Script
from gridsession.grids.redis.server import Server, Word
from gridsession.sources.address_parts import wrong
from gridsession.sources.connection_string import RedisAddress, parse

_PARTS_AT_ONCE = 8  # asked together by a sweep
_MARGIN = 60.0  # seconds that a record outlives its end at the server where ends are not kept
_A_DAY = 86400.0  # seconds

log = logging.getLogger("gridsession")


class RedisGrid:
    """Records in a Redis, shared by every worker of a farm.

    Made by `from_connection_string` or `from_client`. Each event loop that uses it has one
    connection for calls and, while somebody waits for a lock, a second for notices.

    Args:
        server: where it is and how to get in.
        namespace: sets the records of several applications apart.
        timeout: seconds within which a call must have been answered.

    Attributes:
        connections, names: for tools that look behind the contract.
    """

    def __init__(self, server: Server, *, namespace: str = "/", timeout: float = 1.0) -> None:
        self.connections = Connections(server, timeout=timeout)
        self.names = Names(namespace)
        self._answers = Answers(server.where)
        self._margin = _MARGIN
        self._is_checked = False
        self._waiters: set[bytes] = set()  # tokens

    @classmethod
    def from_connection_string(
        cls,
        connection_string: str,
        *,
        namespace: str = "/",
        timeout: float = 1.0,
        credential_provider: CredentialProvider | None = None,
    ) -> RedisGrid:
        """From `redis://`, `rediss://`, `redis+unix://` or `bootstrapGateways=…`.

        Args:
            credential_provider: asked for user and password at each new connection, with
                redis-py's interface; the connection string names none then.

        Raises:
            SettingsError: a part of it is wrong.
        """
        address = parse(connection_string)
        if not isinstance(address, RedisAddress):
            raise wrong("it names no Redis; write redis://host:6379")
        server = Server.at(address, credential_provider)
        return cls(server, namespace=namespace, timeout=timeout)

    @classmethod
    def from_client(cls, client: Any, *, namespace: str = "/", timeout: float = 1.0) -> RedisGrid:
        """With the configuration of a ready `redis.asyncio.Redis`, which itself is not used.

        Its address, credentials, TLS, database and client name are taken over. Its time-outs,
        retries and pool are not.

        Raises:
            SettingsError: it is no such client, or leads to a Cluster or by way of Sentinels.
        """
        return cls(server_of(client), namespace=namespace, timeout=timeout)

    is_local = False

    @property
    def where(self) -> str:
        return self.connections.server.where

    async def open(self) -> None:
        self.connections.leave_parent()
        try:
            await self._reach()
            await self._read_flag()
        except ServerReply as error:
            failed = failure(self.where, error)
        except Misset as error:
            failed = error
        else:
            return
        if isinstance(failed, Misset):
            raise self.connections.server.wrong(str(failed)) from None
        raise failed

    async def close(self) -> None:
        self.connections.leave_parent()
        await self.connections.close()

    async def _reach(self) -> None:
        try:
            await self.connections.ends().link.open()
        except ServerReply as error:
            if error.code != "NOPERM":
                raise
            self._is_checked = False  # a check names what is not permitted
        if not self._is_checked:
            await self._check()

    async def _check(self) -> None:
        """What cannot heal by itself is an error at the start; what is unwise, a warning."""
        where = self.where
        names = ", ".join(await refused(self.connections, self.names))
        if names:
            raise Misset(
                f"{where} does not permit its user: {names} (on keys and channels that begin with "
                f"{self.names.prefix.decode()}); docs/farm.md has the ACL rule"
            )
        if self._is_checked:  # by another request meanwhile
            return
        self._is_checked = True
        try:
            told = await self.connections.ends().link.call(
                b"INFO", b"memory", b"persistence", b"replication"
            )
        except ServerReply:  # its user may not ask; `doctor` says so
            return
        for concern in concerns(told):
            log.warning("%s: %s", where, concern)

    async def _read_flag(self) -> bool:
        """Whether ends of sessions are kept for handlers, and so how long a record has to last."""
        kept = await self.connections.ask(b"GET", self.names.flag)
        try:
            self._margin = _MARGIN if kept is None else max(float(kept), _MARGIN)
        except ValueError:  # a newer release's
            self._margin = max(self._margin, _A_DAY)
        return kept is not None

    # -- the contract ---------------------------------------------------------------------

    def _run(self, script: Script, key: bytes, *arguments: Word) -> asyncio.Future[Any]:
        return self.connections.run(script, self.names.record(key), *arguments)

    async def create(
        self, key: bytes, new: NewRecord, claim: Claim | None = None
    ) -> Committed | Exists:
        absolute = new.absolute_timeout
        lasts = new.timeout if absolute is None else min(new.timeout, absolute)
        # Ahead of the record: a worker that dies in between leaves an entry without a record, which
        # the sweeper removes, and no record without an entry. A hint, so this machine's clock will
        # do.
        due = self._wall() + lasts
        indexed = self._enter(key, due, repeats=False)
        outcome = await self._run(
            scripts.CREATE,
            key,
            self._margin,
            TOKEN.pack(new.commit_token),
            new.secret,
            new.payload,
            new.timeout,
            b"" if absolute is None else absolute,
            b"" if new.user is None else f"1{new.user}",
            *((b"", b"", 0) if claim is None else (claim.token, _holder(claim), claim.lease)),
            due,
        )
        if outcome == scripts.EXISTS:
            await self._look_at(self.names.part(key), self.names.entry(key), due)  # as it was
            return EXISTS
        committed = self._answers.committed(outcome, new.commit_token)
        await self._entered(indexed)
        return committed

    def _enter(self, key: bytes, due: float, *, repeats: bool) -> asyncio.Future[Any]:
        """Write an entry of the index, ahead of what is asked next.

        Not only where it is earlier: a sweeper that has asked the record corrects the entry that
        it has seen, unless another has moved it; so it has to be moved.
        """
        link, part = self.connections.ends().link, self.names.part(key)
        entry = link.call(b"ZADD", part, due, self.names.entry(key), repeats=repeats)
        entry.add_done_callback(_heard)
        return entry

    async def _entered(self, entry: asyncio.Future[Any]) -> None:
        try:
            await entry
        except ServerReply as error:  # stored, but nobody would sweep it: it has to be told
            raise GridUnavailable(str(failure(self.where, error))) from None

    async def acquire(
        self, key: bytes, secret: bytes, claim: Claim, known: Version | None = None
    ) -> Granted | Busy | QueueFull | Replaced | Missing:
        outcome = await self._run(
            scripts.ACQUIRE,
            key,
            self._margin,
            claim.token,
            secret,
            _holder(claim),
            claim.lease,
            b"" if claim.queue_limit is None else claim.queue_limit,
            *(() if known is None else (_version(known),)),
        )
        snapshot = self._answers.snapshot(outcome)
        if snapshot is not None:
            self._forget(claim.token)
            return Granted(snapshot)
        refused = self._answers.refused(outcome)
        if type(refused) is not Busy:
            self._forget(claim.token)
        return refused

    async def read(
        self,
        key: bytes,
        secret: bytes,
        watch: Claim | None = None,
        seen: bytes | None = None,
        known: Version | None = None,
    ) -> Found | Busy | QueueFull | Replaced | Missing:
        has = () if known is None else (_version(known),)
        if watch is None:
            outcome = await self._run(scripts.READ, key, secret, *has)
        else:
            outcome = await self._run(
                scripts.WATCH,
                key,
                self._margin,
                watch.token,
                secret,
                _holder(watch),
                b"" if watch.queue_limit is None else watch.queue_limit,
                seen or b"",
                *has,
            )
        snapshot = self._answers.snapshot(outcome)
        found = self._answers.refused(outcome) if snapshot is None else Found(snapshot)
        if watch is not None and type(found) is not Busy:
            self._forget(watch.token)
        return found

    async def wait(self, key: bytes, token: bytes, seconds: float) -> None:
        self._waiters.add(token)
        notices = self.connections.ends().notices
        await notices.wait(self.names.record(key), token, seconds)

    def _forget(self, token: bytes) -> None:
        """Nobody waits under this token any more."""
        if token in self._waiters:
            self._waiters.discard(token)
            self.connections.ends().notices.forget(token)

    async def commit(
        self, key: bytes, token: bytes, change: Change, *, release: bool
    ) -> Committed | LockLost | Gone:
        how = b"1" if release else b"0"
        outcome = await self._commit(scripts.COMMIT, key, token, how, change)
        if type(outcome) is int:
            return self._answers.one_of(outcome, ON_COMMIT)
        return self._answers.committed(outcome, change.commit_token)

    async def commit_if(
        self, key: bytes, secret: bytes, base: Version, change: Change
    ) -> Committed | Conflict | Locked | Replaced | Gone:
        outcome = await self._commit(scripts.COMMIT_IF, key, secret, _version(base), change)
        if type(outcome) is int:
            return self._answers.one_of(outcome, ON_COMMIT_IF)
        snapshot = self._answers.snapshot(outcome, scripts.CONFLICT)
        if snapshot is not None:
            return Conflict(snapshot)
        return self._answers.committed(outcome, change.commit_token)

    async def _commit(
        self, script: Script, key: bytes, by: bytes, how: bytes, change: Change
    ) -> Any:
        """What a commit's script answers in the end."""
        rotation = change.rotation

        def ask(indexed: bytes) -> asyncio.Future[Any]:
            return self._run(
                script,
                key,
                self._margin,
                by,
                TOKEN.pack(change.commit_token),
                change.timeout,
                b"" if change.user is None else f"1{change.user}",
                how,
                b"" if rotation is None else rotation.secret,
                b"1" if rotation is not None and rotation.user_changed else b"0",
                indexed,
                *(() if change.payload is None else (change.payload,)),
            )

        outcome = await ask(b"0")
        if type(outcome) is list and len(outcome) == 2 and outcome[0] == scripts.UNINDEXED:
            # Ahead of the record, as at its making.
            due = outcome[1]
            indexed = self._enter(key, due, repeats=True)
            outcome = await ask(b"1")
            await self._entered(indexed)
            if type(outcome) is int or outcome[0] != scripts.OK:  # it is as it was
                await self._look_at(self.names.part(key), self.names.entry(key), due)
        return outcome

    async def renew(self, leases: Sequence[tuple[bytes, bytes]], lease: float) -> list[bool]:
        calls = (self._run(scripts.RENEW, key, self._margin, token, lease) for key, token in leases)
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        failures = [x for x in outcomes if isinstance(x, BaseException)]
        if failures and len(failures) == len(outcomes):
            raise failures[0]
        # One record that cannot be read says nothing of the others; its lock's commit will tell.
        return [
            isinstance(outcome, BaseException) or self._answers.one_of(outcome, ON_RENEW)
            for outcome in outcomes
        ]

    async def release(self, key: bytes, token: bytes) -> Released | LockLost | Gone:
        self._forget(token)
        outcome = await self._run(scripts.RELEASE, key, self._margin, token)
        return self._answers.one_of(outcome, ON_RELEASE)

    async def touch(self, key: bytes) -> bool:
        return self._answers.one_of(await self._run(scripts.TOUCH, key, self._margin), ON_TOUCH)

    async def remove(self, key: bytes, token: bytes | None = None) -> Removed | LockLost | Gone:
        outcome = await self._run(scripts.REMOVE, key, token or b"")
        return self._answers.one_of(outcome, ON_REMOVE)

    async def sweep(self, limit: int) -> int:
        if await self._read_flag():
            return 0  # ends are kept for handlers, and this release has none: not ours to take
        now, looked_at = await self._server_time(), 0
        failures: list[BaseException] = []
        first = random.randrange(PARTS)  # workers do not look at the same ones
        for some in range(first, first + PARTS, _PARTS_AT_ONCE):
            parts = [self.names.part_at(some + number) for number in range(_PARTS_AT_ONCE)]
            due = await self._due(parts, now, limit - looked_at)
            looks = (self._look_at(*entry) for entry in due)
            outcomes = await asyncio.gather(*looks, return_exceptions=True)
            failures += [outcome for outcome in outcomes if outcome is not None]
            looked_at += len(due)
            if looked_at >= limit:
                break
        if failures:  # what cannot be read keeps nobody from sweeping the rest
            raise failures[0]
        return looked_at

    async def _server_time(self) -> float:
        seconds, micros = await self.connections.ask(b"TIME")
        return int(seconds) + int(micros) / 1e6

    _wall = staticmethod(time.time)

    async def _due(
        self, parts: list[bytes], now: float, limit: int
    ) -> list[tuple[bytes, bytes, float]]:
        """Part, key and score of up to `limit` entries whose second has come."""
        found = await asyncio.gather(
            *(
                self.connections.ask(
                    *(b"ZRANGE", part, b"-inf", now, b"BYSCORE"),
                    *(b"LIMIT", 0, limit, b"WITHSCORES"),
                )
                for part in parts
            )
        )
        due = [
            (part, key, score)
            for part, entries in zip(parts, found, strict=True)
            for key, score in entries
        ]
        return due[:limit]

    async def _look_at(self, part: bytes, key: bytes, score: float) -> None:
        again = await self._run(scripts.SWEEP, key, self._margin)
        await self.connections.run(scripts.INDEX, part, key, repr(score), again)


def _holder(claim: Claim) -> bytes:
    return claim.holder.encode("utf-8", "replace")


def _version(version: Version) -> bytes:
    """A version as scripts have it."""
    return b"%b%d" % (TOKEN.pack(version.token), version.counter)


def _heard(future: asyncio.Future[Any]) -> None:
    """Its error was told, though nobody came for it."""
    if not future.cancelled():
        future.exception()
