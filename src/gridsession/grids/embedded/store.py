"""The embedded grid's files: made, reserved, opened, shared, closed.

    data.mdb, lock.mdb   LMDB's, of one size for ever: each open and each resize would truncate
                         the file under the other processes
    gate                 see gate.py
    opening              held while a process opens or closes
    users                held shared by whoever has the store open; who gets it alone is alone
    state.json           layout, size, boot, and whether the last one out wrote everything
    bells/               sockets of those who wait; see mailbox.py

Without `durable` nothing is flushed to disk while it runs. That is safe against the death of
processes, since the pages belong to the operating system, and not against the death of that one:
torn pages were read as good data in experiments. So after a restart of the system the files are
used only if they were closed in order, and else moved aside.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import lmdb

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.contract import SystemClock
from gridsession.grids.embedded.codec import LAYOUT
from gridsession.grids.embedded.gate import Gate
from gridsession.grids.embedded.place import (
    DEFAULT_MAX_SIZE,
    MIN_SIZE,
    Place,
    can_reserve,
    default_folder,
    filesystem_of,
    is_network,
    read_boot_id,
)

log = logging.getLogger("gridsession")

_MAX_READERS = 1022  # processes at once, of which each reads with one slot at a time
_PAGE = 4096
_READER_CHECK_SECONDS = 60.0
_LOCK_FILE_BYTES = 128 * 1024  # of which LMDB uses 64 bytes a reader
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


class Store:
    """An open store, one for each folder and process. Use `open_store` and `close_store`.

    Attributes:
        env: the LMDB environment.
        main: its one tree.
        gate: to be entered before each write transaction.
        path: the folder.
        state: what it was opened as.
        full_pages: more pages than this are in use only by what makes room.
    """

    def __init__(self, path: Path, place: Place, timeout: float, boot_id: int) -> None:
        self.path = path
        self.place = place
        self.users = 0
        self.inherited = False  # in a process forked from the one that opened it
        self._timeout = timeout
        self._boot_id = boot_id
        self._alone = -1
        with _opening(path, timeout):
            self._alone = os.open(path / "users", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                alone = _try_alone(self._alone)
                self.state = self._prepare(alone)
                self.gate = Gate(path / "gate", timeout)
                self.env = self._open_env()
                fcntl.flock(self._alone, fcntl.LOCK_SH)
            except BaseException:
                os.close(self._alone)
                raise
        self.main = self.env.open_db()
        self.full_pages = self.state.max_size // _PAGE * 95 // 100
        self.clock = SystemClock(boot_id)
        self._readers_due = 0.0

    def pages_in_use(self, transaction: lmdb.Transaction) -> int:
        """Pages of the tree as this transaction leaves it; counted by LMDB, not scanned."""
        stat = transaction.stat(self.main)
        return int(stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"])

    def forget_dead_readers(self) -> None:
        """Free the slots of processes that died while reading, now and then.

        What such a reader saw stays in the file for as long as its slot does: one made the file
        grow from 0.1 to 215 MiB.
        """
        if time.monotonic() >= self._readers_due:
            self._readers_due = time.monotonic() + _READER_CHECK_SECONDS
            self.env.reader_check()

    def close(self) -> None:
        """Close; the last one out writes everything to disk and says so in state.json."""
        with contextlib.suppress(GridUnavailable), _opening(self.path, self._timeout):
            if not self.state.durable:
                self.env.sync(True)
            self.env.close()
            if _try_alone(self._alone):
                _write_state(self.path, replace(self.state, boot_id=self._boot_id, clean=True))
        self.env.close()
        self.gate.close()
        os.close(self._alone)

    def forsake(self) -> None:
        """In a forked child: let go of what is the parent's, without touching its locks."""
        self.env.close()
        self.gate.close()
        os.close(self._alone)

    # -- parts ----------------------------------------------------------------------------

    def _prepare(self, alone: bool) -> State:
        """Bring the files into a state in which they can be opened."""
        path, place = self.path, self.place
        state = _read_state(path)
        if state is not None and state.layout != LAYOUT:
            raise GridUnavailable(
                f"the embedded grid in {path} has layout {state.layout}, and this release reads "
                f"{LAYOUT}: another release of gridsession wrote it; it was left alone"
            )
        if state is None and (path / "data.mdb").exists():
            if not alone:
                raise GridUnavailable(f"state.json is missing in {path}, which is in use")
            self._move_aside("its state.json is missing or unreadable")
        torn = state is not None and not state.clean and not state.durable
        if torn and state is not None and state.boot_id != self._boot_id:
            self._move_aside("the system restarted while it was in use and not durable")
            state = None
        if state is None:
            state = self._create()
        elif place.max_size not in (None, state.max_size):
            state = self._resize(state, alone)
        if alone or state.clean or state.durable != place.durable:
            if not alone and state.durable != place.durable:
                raise SettingsError(
                    f"connection_string: durable={str(place.durable).lower()}, and another "
                    f"process has {path} open otherwise; all must say the same"
                )
            state = replace(state, boot_id=self._boot_id, clean=False, durable=place.durable)
            _write_state(path, state)
        if alone:
            shutil.rmtree(path / "bells", ignore_errors=True)
        (path / "bells").mkdir(mode=0o700, exist_ok=True)
        return state

    def _create(self) -> State:
        path = self.path
        write_map = can_reserve(filesystem_of(path))
        size = self.place.max_size or _fitting_size(path)
        fresh = path / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        try:
            lmdb.open(str(fresh), map_size=size, max_readers=_MAX_READERS, mode=0o600).close()
            with open(fresh / "data.mdb", "r+b") as file:
                file.truncate(size)
                write_map = write_map and _reserve(file.fileno(), size, path)
            with open(fresh / "lock.mdb", "r+b") as file:
                _reserve(file.fileno(), _LOCK_FILE_BYTES, path)
            state = State(LAYOUT, size, self._boot_id, False, self.place.durable, write_map)
            for name in ("lock.mdb", "data.mdb"):
                os.replace(fresh / name, path / name)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        return state

    def _resize(self, state: State, alone: bool) -> State:
        wanted = self.place.max_size
        assert wanted is not None
        if not alone or wanted < state.max_size:
            why = "it never shrinks" if alone else "it grows when no process has it open"
            log.warning(
                "the embedded grid in %s stays at %d MiB, not max_size's %d: %s",
                self.path,
                state.max_size >> 20,
                wanted >> 20,
                why,
            )
            return state
        with open(self.path / "data.mdb", "r+b") as file:
            if state.write_map:
                _reserve(file.fileno(), wanted, self.path)
            else:
                file.truncate(wanted)
        return replace(state, max_size=wanted)

    def _move_aside(self, why: str) -> None:
        aside = self.path / time.strftime("aside-%Y%m%dT%H%M%S")
        aside.mkdir(mode=0o700, exist_ok=True)
        for name in ("data.mdb", "lock.mdb", "state.json"):
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path / name, aside / name)
        log.error(
            "the embedded grid in %s was moved to %s, and all its sessions with it: %s",
            self.path,
            aside.name,
            why,
        )

    def _open_env(self) -> lmdb.Environment:
        return lmdb.open(
            str(self.path),
            map_size=self.state.max_size,
            sync=self.state.durable,
            metasync=self.state.durable,
            writemap=self.state.write_map,
            create=False,
            mode=0o600,
            max_readers=_MAX_READERS,
            # A cached read transaction would hold a reader's slot, which a forked child that
            # closes what it inherited gives away under its parent.
            max_spare_txns=0,
        )


# -- one store for each folder and process ----------------------------------------------------

_stores: dict[Path, Store] = {}
_inherited: list[Store] = []
_guard = threading.RLock()


def open_store(place: Place, timeout: float, boot_id: int | None = None) -> Store:
    """The store of a place, opened if this process does not have it open.

    Raises:
        SettingsError: it cannot be there, or not like this.
        GridUnavailable: it is busy, or of another layout.
    """
    with _guard:
        while _inherited:  # closed before anything is opened: LMDB allows no file to be open twice
            _inherited.pop().forsake()
        path = Path(os.path.realpath(place.path or default_folder()))
        store = _stores.get(path)
        if store is None:
            try:
                _check_folder(path)
                boot_id = read_boot_id() if boot_id is None else boot_id
                store = _stores[path] = Store(path, place, timeout, boot_id)
            except (OSError, lmdb.Error) as error:
                raise _unusable(path, error) from error
        elif (place.durable, place.max_size) != (store.place.durable, store.place.max_size):
            raise SettingsError(
                f"connection_string: this process has {path} open with other options already"
            )
        store.users += 1
        return store


def close_store(store: Store) -> None:
    """Give a store back; the last user of this process closes it."""
    with _guard:
        store.users -= 1
        if store.users == 0 and _stores.get(store.path) is store:
            del _stores[store.path]
            store.close()


def _close_at_exit() -> None:
    with _guard:
        for store in list(_stores.values()):
            store.users = 1
            close_store(store)


def _before_fork() -> None:
    # No transaction may be open at that moment: the child would close it, and its mutex with it.
    _guard.acquire()
    for store in _stores.values():
        store.gate.threads.acquire()


def _in_parent() -> None:
    for store in _stores.values():
        store.gate.threads.release()
    _guard.release()


def _in_child() -> None:
    for store in _stores.values():
        store.inherited = True
        _inherited.append(store)
    _stores.clear()
    _guard.release()


atexit.register(_close_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)


def _check_folder(path: Path) -> None:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    kind = filesystem_of(path)
    if is_network(kind):
        raise SettingsError(
            f"connection_string: {path} is on a network file system ({kind}), where locks do not "
            "hold between machines; an embedded grid needs a local disk"
        )


def _unusable(path: Path, error: Exception) -> SettingsError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return SettingsError(f"connection_string: the embedded grid cannot use {path}: {reason}")


# -- files ------------------------------------------------------------------------------------


@contextmanager
def _opening(path: Path, timeout: float) -> Iterator[None]:
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


def _try_alone(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_state(path: Path) -> State | None:
    try:
        raw = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if raw["layout"] != LAYOUT:  # its other fields may be others
            return State(int(raw["layout"]), 0, 0, False, False, False)
        return State(**raw)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        log.warning("state.json in %s cannot be read: %s", path, type(error).__name__)
        return None


def _write_state(path: Path, state: State) -> None:
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


def _reserve(fd: int, size: int, path: Path) -> bool:
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


def _fitting_size(path: Path) -> int:
    free = shutil.disk_usage(path).free
    if free >= _SMALL_DISK_SHARE * DEFAULT_MAX_SIZE:
        return DEFAULT_MAX_SIZE
    size = max(free // _SMALL_DISK_SHARE // _PAGE * _PAGE, MIN_SIZE)
    log.warning(
        "the embedded grid takes %d MiB instead of %d, since %s has only %d MiB free",
        size >> 20,
        DEFAULT_MAX_SIZE >> 20,
        path,
        free >> 20,
    )
    return size
