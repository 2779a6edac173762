"""The embedded grid's folder: who opens it, what state.json says, blocks reserved."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.embedded.codec import LAYOUT
from gridsession.grids.embedded.place import DEFAULT_MAX_SIZE
from gridsession.sources.connection_string import MIN_SIZE, PAGE

log = logging.getLogger("gridsession")

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


@contextmanager
def opening(path: Path, timeout: float) -> Iterator[None]:
    """One process at a time opens or closes a store."""
    fd = os.open(path / "opening", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + max(timeout, 5.0)  # opening writes to disk, which may be slow
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    pid = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
                    raise GridUnavailable(
                        f"the embedded grid in {path} is being opened by process {pid}, which "
                        "does not get on with it"
                    ) from None
                time.sleep(0.005)
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def try_alone(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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
                f"connection_string: the embedded grid needs {size >> 20} MiB reserved in {path}, "
                f"and {free >> 20} MiB are free there; make room, or set a smaller max_size"
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
