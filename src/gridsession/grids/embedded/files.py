"""The embedded grid's folder: who opens it and has it open, what state.json says, blocks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.embedded.codec import LAYOUT
from gridsession.grids.embedded.place import DEFAULT_MAX_SIZE
from gridsession.sources.connection_string import MIN_SIZE, PAGE

log = logging.getLogger("gridsession")

# What all must have in common: made anew by a process that joins, it would be its own.
COMMON = ("data.mdb", "lock.mdb", "gate", "state.json")
_SMALL_DISK_SHARE = 4  # of a disk with less room than 4 × the default size, take a quarter


@dataclass(frozen=True)
class State:
    """What state.json says.

    Attributes:
        layout: of records and index.
        max_size: bytes of data.mdb.
        boot_id: of the system that wrote last.
        clean: everything was on disk when the last process closed it.
        durable: every commit was flushed, so that a restart of the system loses nothing.
        write_map: blocks are reserved, so that writing through the map cannot fail.
    """

    layout: int
    max_size: int
    boot_id: int
    clean: bool
    durable: bool
    write_map: bool


_TYPES = {name: type(value) for name, value in asdict(State(0, 0, 0, True, True, True)).items()}


@contextlib.contextmanager
def opening(path: Path, timeout: float) -> Iterator[float]:
    """One process at a time opens or closes a store; until when it may wait for others."""
    fd = os.open(path / "opening", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + max(timeout, 5.0)  # opening writes to disk, which may be slow
        if not _lock(fd, fcntl.LOCK_EX, end):
            pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
            raise GridUnavailable(
                f"the embedded grid in {path} is being opened by process {pid}, which "
                "does not get on with it"
            )
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield end
    finally:
        os.close(fd)


def _lock(fd: int, kind: int, end: float | None = None) -> bool:
    """A `flock`, tried until then, or once; never waited for, since that could not be ended."""
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if end is None or time.monotonic() > end:
                return False
            time.sleep(0.005)
        else:
            return True


class OpenFolder:
    """The folder of a store that this process has open, or opens: who else has it open, too.

    `users` is held shared (`flock`) by whoever has the store open; who gets it alone is alone.
    Where old files are removed, it was, under those who held it, and the next process believed
    itself alone. So all hold the folder as well, where they can: anybody who may list it may lock
    it, so it is asked only where `users` is not there, and nobody ever waits for it.

    Args:
        path: the folder, which is there; to be used inside `opening`.

    Raises:
        GridUnavailable: others have it open, and `users` was removed under them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            removed = (path / "data.mdb").exists() and not (path / "users").exists()
            if removed and not _lock(self._fd, fcntl.LOCK_EX):
                raise files_missing(path)  # and not made anew: the next one would be alone in it
            self._users = os.open(path / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except BaseException:
            os.close(self._fd)
            raise

    def try_alone(self) -> bool:
        """Whether nobody else has the store open; inside `opening`, it stays so."""
        return _lock(self._users, fcntl.LOCK_EX)

    def share(self, end: float) -> None:
        """Have it open from now on, beside others."""
        # Not free only where `opening` was removed, so that two are inside, or for a stranger.
        if not _lock(self._users, fcntl.LOCK_SH, end):
            raise GridUnavailable(
                f"the embedded grid in {self._path} is being opened by another process, which "
                "does not get on with it"
            )
        self._hold()

    def _hold(self) -> None:
        with contextlib.suppress(OSError):  # not every file system can lock folders
            _lock(self._fd, fcntl.LOCK_SH)

    def is_ours(self) -> bool:
        """Whether what is there now is what was opened: not moved away, nor made anew by others."""
        try:
            if not os.path.samestat(os.fstat(self._fd), os.stat(self._path)):
                return False
            with contextlib.suppress(FileNotFoundError):  # who comes now refuses to open it
                return os.path.samestat(os.fstat(self._users), os.stat(self._path / "users"))
        except OSError:
            return False
        return True

    def keep_young(self) -> list[str]:
        """Touch the files; which ones are missing, of those that others cannot do without."""
        if not self.is_ours():
            return [str(self._path)]
        self._hold()  # a stranger may have had it before
        missing = []
        for name in (".", *COMMON, "users"):
            try:
                os.utime(self._path / name)
            except FileNotFoundError:
                missing.append(name)
            except OSError:
                continue  # it belongs to another user, whose process may do it
        with contextlib.suppress(OSError):
            (self._path / "opening").touch(mode=0o600)
        with contextlib.suppress(OSError):
            (self._path / "bells").mkdir(mode=0o700, exist_ok=True)
            os.utime(self._path / "bells")
        return missing

    def close(self) -> None:
        os.close(self._users)
        os.close(self._fd)


def files_missing(path: Path) -> GridUnavailable:
    return GridUnavailable(
        f"files are missing in {path}, which is in use; stop all processes that use it, "
        "then start them"
    )


def read_state(path: Path) -> State | None:
    try:
        raw = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if raw["layout"] != LAYOUT:  # its other fields may be others
            return State(int(raw["layout"]), 0, 0, False, False, False)
        state = State(**raw)
        if any(type(value) is not _TYPES[name] for name, value in asdict(state).items()):
            raise TypeError
        return state
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        log.warning("state.json in %s cannot be read: %s", path, type(error).__name__)
        return None


def write_state(path: Path, state: State) -> None:
    fresh = path / "state.json.new"
    with open(fresh, "w", encoding="utf-8") as file:
        json.dump(asdict(state), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path / "state.json")
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def reserve(fd: int, size: int, path: Path) -> bool:
    """Give a file all its blocks, or else writing through a map to a full disk kills the process.

    False where that can't be done.
    """
    try:
        os.posix_fallocate(fd, 0, size)
    except AttributeError:  # macOS
        return False
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            return False
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path).free
            raise SettingsError(
                f"connection_string: the embedded grid needs {-(-size >> 20)} MiB reserved in "
                f"{path}, and {free >> 20} MiB are free there; make room, or set a smaller max_size"
            ) from error
        raise
    return True


def fitting_size(path: Path) -> int:
    free = shutil.disk_usage(path).free
    if free >= _SMALL_DISK_SHARE * DEFAULT_MAX_SIZE:
        return DEFAULT_MAX_SIZE
    size = max(free // _SMALL_DISK_SHARE // PAGE * PAGE, MIN_SIZE)
    log.warning(
        "the embedded grid takes %d MiB instead of %d, since %s has only %d MiB free",
        size >> 20,
        DEFAULT_MAX_SIZE >> 20,
        path,
        free >> 20,
    )
    return size
