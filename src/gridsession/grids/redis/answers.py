"""What scripts answer, as the contract's outcomes.

An answer that no script of ours gives says nothing of a session: it must not pass for missing.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, TypeVar

from gridsession.errors import GridUnavailable
from gridsession.grids.contract import (
    GONE,
    LOCK_LOST,
    LOCKED,
    MISSING,
    RELEASED,
    REMOVED,
    REPLACED,
    Busy,
    Committed,
    Gone,
    Locked,
    LockLost,
    Missing,
    QueueFull,
    Released,
    Removed,
    Replaced,
    Snapshot,
    Version,
)
from gridsession.grids.redis import scripts

TOKEN = struct.Struct(">Q")  # a commit's, as scripts have it

Answer = TypeVar("Answer")
ON_RELEASE: dict[int, Released | LockLost | Gone] = {
    scripts.OK: RELEASED,
    scripts.LOCK_LOST: LOCK_LOST,
    scripts.GONE_OR_MISSING: GONE,
}
ON_REMOVE: dict[int, Removed | LockLost | Gone] = {
    scripts.OK: REMOVED,
    scripts.LOCK_LOST: LOCK_LOST,
    scripts.GONE_OR_MISSING: GONE,
}
ON_COMMIT: dict[int, LockLost | Gone] = {
    scripts.LOCK_LOST: LOCK_LOST,
    scripts.GONE_OR_MISSING: GONE,
}
ON_COMMIT_IF: dict[int, Locked | Replaced | Gone] = {
    scripts.LOCKED: LOCKED,
    scripts.REFUSED: REPLACED,
    scripts.GONE_OR_MISSING: GONE,
}
ON_RENEW = {scripts.OK: True, scripts.LOCK_LOST: False}
ON_TOUCH = {scripts.OK: True, scripts.GONE_OR_MISSING: False}
_REFUSED: dict[int, Replaced | Missing] = {
    scripts.REFUSED: REPLACED,
    scripts.GONE_OR_MISSING: MISSING,
}


class Answers:
    """Reads those of one server.

    Args:
        where: it in words.
    """

    def __init__(self, where: str) -> None:
        self._where = where

    def _senseless(self) -> GridUnavailable:
        return GridUnavailable(f"{self._where} gave an answer that no script of ours gives")

    def one_of(self, outcome: object, meanings: Mapping[int, Answer]) -> Answer:
        if type(outcome) is not int or outcome not in meanings:
            raise self._senseless()
        return meanings[outcome]

    def committed(self, outcome: Any, commit_token: int) -> Committed:
        if type(outcome) is not list or len(outcome) != 4 or outcome[0] != scripts.OK:
            raise self._senseless()
        _, counter, deadline, micros = outcome
        return Committed(Version(counter, commit_token), deadline, micros / 1e6)

    def snapshot(self, outcome: Any, code: int = scripts.GRANTED) -> Snapshot | None:
        if type(outcome) is not list or len(outcome) != 11 or outcome[0] != code:
            return None
        _, payload, counter, version, created, timeout, deadline, micros, user, replaced, due = (
            outcome
        )
        return Snapshot(
            payload,
            Version(counter, TOKEN.unpack(version)[0]),
            created,
            timeout,
            deadline,
            micros / 1e6,
            None if user is None else user.decode(),
            replaced == 1,
            due == 1,
        )

    def refused(self, outcome: Any) -> Busy | QueueFull | Replaced | Missing:
        if type(outcome) is list:
            if len(outcome) == 6 and outcome[0] == scripts.BUSY:
                _, holder, held_for, ahead, retry_in, lock = outcome
                return Busy(holder.decode(), held_for, ahead, retry_in, lock)
            if len(outcome) == 3 and outcome[0] == scripts.QUEUE_FULL:
                return QueueFull(outcome[1].decode(), outcome[2])
        return self.one_of(outcome, _REFUSED)
