"""The second process of the doctor's hand-off; see `hand_off`. Ends when its input does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator
from typing import Any

from gridsession.grids import Grid, open_grid
from gridsession.grids.contract import Busy, Claim, Granted
from gridsession.tools.hand_off import why

_PATIENCE = 10.0  # seconds that a lock may take to come
_LEASE = 10.0  # seconds


def main() -> None:
    """Obey what comes on standard input, a line at a time."""
    lines = _lines()
    order = json.loads(next(lines))
    try:
        asyncio.run(_serve(order, lines))
    except Exception as error:
        _say("failed", why=why(error))


async def _serve(order: dict[str, Any], lines: Iterator[bytes]) -> None:
    key, secret = bytes.fromhex(order["key"]), bytes.fromhex(order["secret"])
    async with open_grid(
        order["connection_string"], namespace=order["namespace"], timeout=order["timeout"]
    ) as grid:
        _say("ready")
        asked: asyncio.Queue[bytes] = asyncio.Queue()
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()

        def listen() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                for line in lines:
                    loop.call_soon_threadsafe(asked.put_nowait, line)
                loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=listen, daemon=True).start()
        work = asyncio.create_task(_obey(grid, key, secret, asked))
        end = asyncio.create_task(ended.wait())
        await asyncio.wait((work, end), return_when=asyncio.FIRST_COMPLETED)
        for task in (work, end):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work


async def _obey(grid: Grid, key: bytes, secret: bytes, asked: asyncio.Queue[bytes]) -> None:
    """Each time that it is asked: wait for the lock, say when it came, give it back."""
    while await asked.get():
        claim = Claim(secrets.token_bytes(16), "gridsession doctor, second process", _LEASE, 50)
        async with asyncio.timeout(_PATIENCE):
            outcome = await grid.acquire(key, secret, claim)
            _say("waiting" if isinstance(outcome, Busy) else type(outcome).__name__)
            while isinstance(outcome, Busy):
                await grid.wait(key, claim.token, outcome.retry_in)
                outcome = await grid.acquire(key, secret, claim)
            at = time.monotonic()
            await grid.release(key, claim.token)
        _say("granted" if isinstance(outcome, Granted) else type(outcome).__name__, at=at)


def _lines() -> Iterator[bytes]:
    # Not through sys.stdin: a thread that reads from it at the end would hold its lock.
    rest = b""
    while part := os.read(0, 65536):
        *lines, rest = (rest + part).split(b"\n")
        yield from lines


def _say(said: str, **more: Any) -> None:
    print(json.dumps({"said": said, **more}), flush=True)
