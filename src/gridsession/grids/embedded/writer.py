"""Durable transactions: on a thread, those that come together in one."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from gridsession.errors import GridUnavailable
from gridsession.grids.embedded.gate import GateShut

_MOST = 256  # calls that share a transaction; what comes later waits for the next


@dataclass(slots=True)
class _Call:
    run: Callable[[Any], Any]
    future: Future[Any]


class Writer:
    """Runs calls in groups on a thread of its own.

    Args:
        transaction: runs all of the calls it is given in one transaction, and returns their
            outcomes. What it raises, it has undone.
    """

    def __init__(self, transaction: Callable[[list[Callable[[Any], Any]]], list[Any]]) -> None:
        self._transaction = transaction
        self._closed = False
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="gridsession-writer", daemon=True)
        self._thread.start()

    async def write(self, run: Callable[[Any], Any]) -> Any:
        """The outcome of a call, once it is on disk. Cancelled, it may have happened."""
        call = _Call(run, Future())
        self._calls.put(call)
        if self._closed:
            self._refuse_queued(GridUnavailable("the embedded grid is closed"))
        return await asyncio.wrap_future(call.future)

    def close(self) -> None:
        """Finish what was asked for, and stop."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (group := self._next_group()) is not None:
            self._settle(group)
        self._closed = True
        self._refuse_queued(GridUnavailable("the embedded grid is closed"))

    def _next_group(self) -> list[_Call] | None:
        first = self._calls.get()
        return None if first is None else [first, *self._queued(_MOST - 1)]

    def _queued(self, most: int) -> list[_Call]:
        """What waits by now, without waiting for more."""
        calls: list[_Call] = []
        with contextlib.suppress(queue.Empty):
            while len(calls) < most:
                call = self._calls.get_nowait()
                if call is None:
                    self._calls.put(None)  # for after these
                    break
                calls.append(call)
        return calls

    def _refuse_queued(self, error: GridUnavailable) -> None:
        while group := self._queued(_MOST):
            _refuse(group, error)

    def _settle(self, group: list[_Call]) -> None:
        # A caller that was cancelled before its turn has asked for nothing.
        self._carry_out([call for call in group if call.future.set_running_or_notify_cancel()])

    def _carry_out(self, group: list[_Call]) -> None:
        try:
            outcomes = self._transaction([call.run for call in group])
        except GateShut as error:
            # No fault of any of them: tried one by one, the last would wait for minutes.
            _refuse(group, error)
            self._refuse_queued(error)
            return
        except BaseException as error:  # whatever it is, it is the callers' to see
            if len(group) == 1:
                group[0].future.set_exception(error)
                return
            for call in group:  # one of them failed: the others are not to suffer for it
                self._carry_out([call])
            return
        for call, outcome in zip(group, outcomes, strict=True):
            call.future.set_result(outcome)


def _refuse(group: list[_Call], error: GridUnavailable) -> None:
    for call in group:
        if call.future.running() or call.future.set_running_or_notify_cancel():
            call.future.set_exception(type(error)(str(error)))
