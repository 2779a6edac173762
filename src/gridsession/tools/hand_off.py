"""How long it takes from the release of a lock in one process to its grant in another.

This process holds the lock of the doctor's record; a second one, `neighbour`, waits for it. What
they say to each other are lines of JSON through pipes: a connection string does not belong on a
command line, where every user of the machine can read it. Both read the same clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from typing import Any

from gridsession.errors import SessionError
from gridsession.grids import open_grid
from gridsession.grids.contract import Granted
from gridsession.tools.measure import OwnRecord, WrongAnswer, own_record
from gridsession.tools.report import Timing

_ROUNDS = 20
_LONGEST = 2.0  # seconds that the rounds may take
_PATIENCE = 15.0  # seconds for all of it; a process that starts on a busy machine takes some
_PARTING = 3.0  # seconds for it to end by itself
_SETTLING = 0.002  # seconds in which a waiter that has said so comes to wait
# The same modules, wherever they come from: no folder of the application may hide one of them.
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from gridsession.tools.neighbour import main; main()"
)


class NotMeasured(Exception):
    """There is no second process to measure with; the text says why."""


async def hand_offs(*, connection_string: str, namespace: str, timeout: float) -> Timing:
    """Let a second process take a lock from this one, several times, on a record made for it.

    Args:
        connection_string, namespace, timeout: with which both processes open the grid.

    Raises:
        NotMeasured: the second process did not get that far.
        WrongAnswer, Left, GridUnavailable, GridFull: the grid failed in this one.
    """
    async with (
        open_grid(connection_string, namespace=namespace, timeout=timeout) as grid,
        own_record(grid) as record,
    ):
        await record.call_all()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-c",
            _CODE,
            json.dumps(sys.path),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # a traceback may show what is none of a reader's business
            start_new_session=True,  # an interruption is ours to see to
        )
        try:
            async with asyncio.timeout(_PATIENCE):
                order = {
                    "connection_string": connection_string,
                    "namespace": namespace,
                    "timeout": timeout,
                    "key": record.key.hex(),
                    "secret": record.secret.hex(),
                }
                await _tell(process, order)
                await _hear(process, "ready")
                return await _rounds(record, process)
        except TimeoutError:
            raise NotMeasured(f"the second process was not done within {_PATIENCE:g} s") from None
        finally:
            await _end(process)


async def _rounds(record: OwnRecord, process: asyncio.subprocess.Process) -> Timing:
    times: list[float] = []
    end = time.monotonic() + _LONGEST
    while len(times) < _ROUNDS and (not times or time.monotonic() < end):
        claim = record.claim()
        acquired = await record.grid.acquire(record.key, record.secret, claim)
        if not isinstance(acquired, Granted):
            raise WrongAnswer(f"the grid answered {type(acquired).__name__} to acquire")
        await _tell(process, {"do": "take"})
        await _hear(process, "waiting")
        await asyncio.sleep(_SETTLING)
        released = time.monotonic()
        await record.grid.release(record.key, claim.token)
        times.append((await _hear(process, "granted"))["at"] - released)
    return Timing.of(times)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Let it close the grid, which leaves nothing of it behind; or else end it."""
    assert process.stdin is not None
    process.stdin.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_PARTING):
            await process.wait()
    if process.returncode is None:
        process.kill()
        await process.wait()


async def _tell(process: asyncio.subprocess.Process, message: dict[str, Any]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(message).encode() + b"\n")
        await process.stdin.drain()
    except ConnectionError:
        raise NotMeasured("the second process ended") from None


async def _hear(process: asyncio.subprocess.Process, said: str) -> dict[str, Any]:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        try:
            message = json.loads(line)
        except ValueError:  # what an interpreter was told to say at its start
            continue
        if not isinstance(message, dict) or "said" not in message:
            continue
        if message["said"] != said:
            raise NotMeasured(f"the second process: {message.get('why') or message['said']}")
        return message
    raise NotMeasured(f"the second process ended with status {await process.wait()}")


def why(error: Exception) -> str:
    """What may be shown of an error: our own texts, and of others the kind."""
    return str(error) if isinstance(error, SessionError) else type(error).__name__
