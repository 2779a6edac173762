"""The gate before write transactions: one at a time, over all threads and processes.

LMDB has a mutex of its own, without a time-out: a process stopped inside a transaction would
freeze the event loop of every neighbour for as long as it is stopped. So nobody begins a
transaction before it holds this gate, and nobody waits at the gate without its event loop going
on. Two locks, since `flock` excludes no threads of one process: a thread lock, then a `flock` on a
descriptor that this very process opened (a forked child's unlock of an inherited one would free
its parent's).

A process that has the store for itself leaves the `flock` out (its system calls were a fifteenth
of what a session adds to a request). Whoever opens the store beside it says so in the file, does
not enter before the first was seen to be outside, and from then on all lock. Should that ever
fail, LMDB's mutex still stands between them.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import struct
import threading
import time
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from pathlib import Path

from gridsession.errors import GridUnavailable

_SPINS = 20  # tries before yielding; a transaction takes less time than a turn of the loop
_LOCK_AT_ONCE = LOCK_EX | LOCK_NB
_PAUSES = (0.0001, 0.002)  # seconds between tries after that, first and longest
_PID = struct.Struct("<q")
_PID_AT, _CROWD_AT = slice(0, 8), slice(8, 16)
_NOBODY = bytes(8)
# How many processes use the gate: one; others too, and the first may still be inside; several.
_ALONE, _JOINED, _CROWD = bytes(8), b"joined..", b"crowd..."
_SIZE = 4096
_SETTLING = 0.001  # seconds in which what one process has written is seen by all, many times over


class GateShut(GridUnavailable):
    """Another process is inside a transaction and does not come out; nothing was done."""


class Gate:
    """The gate of one store, in one process.

    Args:
        path: its file, made if absent; the pid of whoever is inside stands in it, and whether
            several processes use it.
        timeout: seconds to try for, before giving up.
        alone: no other process has the store open, and none is opening it.
    """

    def __init__(self, path: Path, timeout: float, *, alone: bool = False) -> None:
        self._timeout = timeout
        self._threads = threading.Lock()
        self._own_pid = _PID.pack(os.getpid())  # a forked child opens a gate of its own
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if alone or os.fstat(self._fd).st_size < _SIZE:
                # Nobody inside, no crowd. Real blocks: a full disk is found out here.
                os.write(self._fd, bytes(_SIZE))
            self._map = mmap.mmap(self._fd, _SIZE)
            if not alone and self._map[_CROWD_AT] != _CROWD:
                self._map[_CROWD_AT] = _JOINED
                time.sleep(_SETTLING)
        except BaseException:
            os.close(self._fd)
            raise
        self._is_locked = False

    def try_enter(self) -> bool:
        """Enter if nobody is inside."""
        if not self._threads.acquire(False):
            return False
        try:
            if self._map[_CROWD_AT] != _CROWD:
                if self._enter_alone():
                    return True
                if self._first_is_inside():
                    self._threads.release()
                    return False
                self._map[_CROWD_AT] = _CROWD
            flock(self._fd, _LOCK_AT_ONCE)
        except BaseException as error:
            self._threads.release()
            if isinstance(error, BlockingIOError):
                return False
            raise
        self._map[_PID_AT] = self._own_pid
        self._is_locked = True
        return True

    def _enter_alone(self) -> bool:
        if self._map[_CROWD_AT] != _ALONE:
            return False
        self._map[_PID_AT] = self._own_pid
        if self._map[_CROWD_AT] == _ALONE:  # so whoever joins from now on finds us inside
            return True
        self._map[_PID_AT] = _NOBODY
        return False

    def _first_is_inside(self) -> bool:
        """Who was alone may have entered before it could see that it is not any more."""
        (pid,) = _PID.unpack_from(self._map, 0)
        return bool(pid) and not _has_ended(pid)  # if it died there, LMDB knows how to go on

    async def enter(self) -> None:
        """Enter when it is free, with the event loop running meanwhile.

        Raises:
            GateShut: it was not free for the whole time-out; says whose pid is inside.
        """
        for _ in range(_SPINS):
            if self.try_enter():
                return
        end = time.monotonic() + self._timeout
        pause, longest = _PAUSES
        await asyncio.sleep(0)
        while not self.try_enter():
            if time.monotonic() > end:
                raise self._too_long()
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    def enter_blocking(self) -> None:
        """The same for a thread of its own."""
        end = time.monotonic() + self._timeout
        pause, longest = _PAUSES
        while not self.try_enter():
            if time.monotonic() > end:
                raise self._too_long()
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def leave(self) -> None:
        self._map[_PID_AT] = _NOBODY
        if self._is_locked:
            self._is_locked = False
            flock(self._fd, LOCK_UN)
        self._threads.release()

    def forget_own_pid(self) -> None:
        """Where this process has no other gate there: its pid is of before an `exec`."""
        if self._map[_PID_AT] == self._own_pid:
            self._map[_PID_AT] = _NOBODY

    def close(self) -> None:
        """Close, with no thread inside but the caller's; whoever comes later finds it shut."""
        self._threads.acquire(False)  # for good
        self.abandon()

    def abandon(self) -> None:
        """Close in a forked child, where the thread lock has no owner to wait for."""
        self._map.close()  # it has a descriptor of its own, and the flock is on both
        fd, self._fd = self._fd, -1
        os.close(fd)

    @property
    def threads(self) -> threading.Lock:
        """Held by whichever thread of this process is inside; taken around a fork."""
        return self._threads

    def _too_long(self) -> GateShut:
        try:
            (pid,) = _PID.unpack_from(self._map, 0)
        except ValueError:
            return GateShut("the embedded grid is closed")
        who = f"process {pid}" if pid else "another process"
        return GateShut(
            f"the embedded grid was busy for {self._timeout:g} s: {who} is inside a transaction "
            "and does not come out (stopped, or starved of CPU)"
        )


def _has_ended(pid: int) -> bool:
    """Whether a process is dead; its parent may not have asked for it yet, and never do so."""
    try:
        os.kill(pid, 0)  # sends nothing
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except ProcessLookupError:
        return True
    except OSError:  # another user's, or a system without /proc
        return False
    return stat.rpartition(b") ")[2][:1] in (b"Z", b"X")
