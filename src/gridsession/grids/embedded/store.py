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
import logging
import os
import shutil
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import lmdb

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.clock import SystemClock
from gridsession.grids.embedded.codec import LAYOUT
from gridsession.grids.embedded.files import (
    COMMON,
    OpenFolder,
    State,
    files_missing,
    fitting_size,
    opening,
    read_state,
    reserve,
    write_state,
)
from gridsession.grids.embedded.gate import Gate
from gridsession.grids.embedded.place import (
    Place,
    can_reserve,
    default_folder,
    filesystem_of,
    is_network,
    read_boot_id,
)
from gridsession.grids.record import Record
from gridsession.sources.connection_string import MIN_SIZE, PAGE

log = logging.getLogger("gridsession")

_MAX_READERS = 1022  # processes at once, of which each reads with one slot at a time
_LEAST_RESERVE = 96  # pages: a release copies up to ten, and those of the two before are taken yet
_UPKEEP_SECONDS = 60.0
# How full the file is, is not counted at each small write: transactions are numbered over all
# processes, and those until the next count, of so many pages at most, fit into half the reserve.
_PAGES_A_WRITE = 16
SMALL_BYTES = 4096
_LONG_READ = 100  # transactions of others; a read takes less than one
_LOCK_FILE_BYTES = 128 * 1024  # of which LMDB uses 64 bytes a reader
_LAST_WORDS = 1.0  # seconds for threads to come out of their transactions before it is closed


class Store:
    """An open store, one for each folder and process. Use `open_store` and `close_store`.

    Attributes:
        env: the LMDB environment.
        main: its one tree.
        gate: to be entered before each write transaction.
        reads: to be held during each read transaction; a fork waits for it.
        path: the folder.
        state: what it was opened as.
        decoded: see `LmdbTable`; to be used inside the gate.
    """

    def __init__(self, path: Path, place: Place, timeout: float, boot_id: int) -> None:
        self.path = path
        self.place = place
        self.users = 0
        self.reads = threading.Lock()
        self.inherited = False  # in a process forked from the one that opened it
        self._timeout = timeout
        self._boot_id = boot_id
        with opening(path, timeout) as end, contextlib.ExitStack() as undo:
            self._folder = OpenFolder(path)
            undo.callback(self._folder.close)
            alone = self._folder.try_alone()
            self.state = self._prepare(alone)
            self.gate = Gate(path / "gate", timeout, alone=alone)
            undo.callback(self.gate.close)
            self.gate.forget_own_pid()
            self.env = self._open_env()
            undo.callback(self.env.close)
            self._folder.share(end)
            undo.pop_all()
        self.main = self.env.open_db()
        pages = self.state.max_size // PAGE
        self._reserve = reserve = max(pages * 5 // 100, _LEAST_RESERVE)
        self._full_pages = pages - reserve  # more than this are in use by no payloads
        self._brim_pages = pages - reserve // 2  # nor more than this by locks and tickets
        self.roomy_until = 0
        self.decoded: dict[bytes, tuple[bytes, Record]] = {}
        self.clock = SystemClock(boot_id)
        self._upkeep_due = 0.0
        self._told_missing = False

    def has_room(self, transaction: lmdb.Transaction, grown_by: int) -> bool:
        """Whether what a transaction has written may stay. Transactions of a number before
        `roomy_until` need not ask, if their payloads grow by no more than `SMALL_BYTES`.

        Args:
            transaction: before its commit.
            grown_by: bytes of payloads in it that became longer; 0 when only records did.
        """
        stat = transaction.stat(self.main)  # counted by LMDB, not scanned
        in_use = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        spare = self._full_pages - in_use
        if spare > self._reserve:
            self.roomy_until = transaction.id() + self._reserve // (2 * _PAGES_A_WRITE)
        return bool(in_use <= (self._full_pages if grown_by else self._brim_pages))

    @property
    def upkeep_is_due(self) -> bool:
        return time.monotonic() >= self._upkeep_due

    def keep_up(self) -> None:
        """What is to be done once a minute, not on an event loop: disks may be slow.

        Free the slots of processes that died while reading: what such a reader saw stays in the
        file for as long as its slot does; one made the file grow from 0.1 to 215 MiB. And touch the
        files: some are written to by nobody, and old ones are removed from temporary folders.
        """
        self._upkeep_due = time.monotonic() + _UPKEEP_SECONDS
        try:
            with opening_guard:  # it is not closed meanwhile
                with self.reads:
                    self.env.reader_check()
                missing = self._folder.keep_young()
        except lmdb.Error as error:
            raise GridUnavailable(f"the embedded grid failed: {error}") from error
        if missing and not self._told_missing:
            log.error(
                "the embedded grid in %s lost %s while it is in use: processes that start now "
                "cannot share its sessions; stop all that use it, then start them",
                self.path,
                ", ".join(missing),
            )
        self._told_missing = bool(missing)

    def held_up_by(self) -> str:
        """Who has been reading for so long that nothing freed since can be used again, in words."""
        readers = [line.split() for line in self.env.readers().splitlines()[1:]]
        seen = [(int(txn), pid) for pid, _, txn in readers if txn.isdigit()]
        if not seen or min(seen)[0] > self.env.info()["last_txnid"] - _LONG_READ:
            return ""
        return f": process {min(seen)[1]} is inside a read and does not come out (stopped?)"

    def close(self) -> bool:
        """Close; the last one out writes everything to disk and says so in state.json.

        False if it had to be left open: at exit, that is as if the process died there.
        """
        ours = self._folder.is_ours()
        is_closed = self._all_are_out()
        if is_closed:
            self._close(ours)
        else:
            log.warning(
                "the embedded grid in %s was not closed: a thread is in the middle of it", self.path
            )
        # At exit nobody has closed the grids, whose sockets these are.
        for mailbox in (self.path / "bells").glob(f"{os.getpid()}.*") if ours else ():
            with contextlib.suppress(OSError):  # a disk that is read-only now
                mailbox.unlink()
        return is_closed

    def _all_are_out(self) -> bool:
        """Hold off the other threads. At exit those with an event loop of their own still run.

        Closed under a thread that is in a transaction, LMDB's mutex is given back by nobody: that
        thread, this process, and whoever opens the store or writes to it next waits for ever.
        """
        if self.gate.threads.acquire(timeout=_LAST_WORDS):
            if self.reads.acquire(timeout=_LAST_WORDS):
                return True
            self.gate.threads.release()
        return False

    def _close(self, ours: bool) -> None:
        try:
            if not ours:  # what we would write there is not true of what others have there
                raise GridUnavailable("it was removed, moved or made anew")
            with opening(self.path, self._timeout):
                last = self._folder.try_alone()
                if last and not self.state.durable:
                    self.env.sync(True)
                self.env.close()
                if last:
                    write_state(self.path, replace(self.state, boot_id=self._boot_id, clean=True))
        except (GridUnavailable, OSError, lmdb.Error) as error:
            log.warning("the embedded grid in %s was not closed in order: %s", self.path, error)
        self.env.close()
        self.gate.close()  # its thread lock stays taken: nobody begins a transaction any more
        self._folder.close()
        self.reads.release()  # to find it closed

    def become_inherited(self) -> None:
        """In a forked child, at once: a lock outlasts its holder where a child keeps it open."""
        self.inherited = True
        self.gate.abandon()
        self._folder.close()

    def forsake(self) -> None:
        """In a forked child, before it opens its own: let go of what is the parent's."""
        self.env.close()

    # -- parts ----------------------------------------------------------------------------

    def _prepare(self, alone: bool) -> State:
        """Bring the files into a state in which they can be opened."""
        path, place = self.path, self.place
        data = path / "data.mdb"
        state = read_state(path)
        if state is not None and state.layout != LAYOUT:
            raise GridUnavailable(
                f"the embedded grid in {path} has layout {state.layout}, and this release reads "
                f"{LAYOUT}: another release of gridsession wrote it; it was left alone"
            )
        if not alone and (state is None or not all((path / name).exists() for name in COMMON)):
            raise files_missing(path)
        if state is None and data.exists():
            self._move_aside("its state.json is missing or unreadable")
        torn = state is not None and not state.clean and not state.durable
        if torn and state is not None and state.boot_id != self._boot_id:
            self._move_aside("the system restarted while it was in use and not durable")
            state = None
        if state is None or not data.exists():
            state = self._create()
        elif place.max_size not in (None, state.max_size):
            state = self._resize(state, alone)
        elif alone and state.write_map:  # copied or restored, a file may have holes
            with open(data, "r+b") as file:
                reserve(file.fileno(), state.max_size, path)
        if alone or state.clean or state.durable != place.durable:
            if not alone and state.durable != place.durable:
                raise SettingsError(
                    f"connection_string: durable={str(place.durable).lower()}, and another "
                    f"process has {path} open otherwise; all must say the same"
                )
            opened = replace(state, boot_id=self._boot_id, clean=False, durable=place.durable)
            if opened != read_state(path):
                write_state(path, opened)
            state = opened
        if alone:
            (path / "lock.mdb").touch(mode=0o600)  # LMDB would make it, but reserve no blocks
            with open(path / "lock.mdb", "r+b") as file:
                reserve(file.fileno(), _LOCK_FILE_BYTES, path)
            shutil.rmtree(path / "bells", ignore_errors=True)
        (path / "bells").mkdir(mode=0o700, exist_ok=True)
        return state

    def _create(self) -> State:
        path = self.path
        write_map = can_reserve(filesystem_of(path))
        size = self.place.max_size or fitting_size(path)
        fresh = path / "fresh"
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        try:
            lmdb.open(str(fresh), map_size=MIN_SIZE, max_readers=_MAX_READERS, mode=0o600).close()
            with open(fresh / "data.mdb", "r+b") as file:
                write_map = write_map and reserve(file.fileno(), size, path)
                if not write_map:
                    file.truncate(size)
            with open(fresh / "lock.mdb", "r+b") as file:
                reserve(file.fileno(), _LOCK_FILE_BYTES, path)
            state = State(LAYOUT, size, self._boot_id, False, self.place.durable, write_map)
            write_state(fresh, state)  # now, since the disk may have no room left for it
            for name in ("state.json", "lock.mdb", "data.mdb"):  # without data it is made anew
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
            try:
                if not state.write_map or not reserve(file.fileno(), wanted, self.path):
                    file.truncate(wanted)
            except BaseException:
                file.truncate(state.max_size)
                raise
        return replace(state, max_size=wanted)

    def _move_aside(self, why: str) -> None:
        aside = Path(tempfile.mkdtemp(prefix=time.strftime("aside-%Y%m%dT%H%M%S-"), dir=self.path))
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
opening_guard = threading.RLock()


def open_store(place: Place, timeout: float, boot_id: int | None = None) -> Store:
    """The store of a place, opened if this process does not have it open.

    Raises:
        SettingsError: it cannot be there, or not like this.
        GridUnavailable: it is busy, or of another layout.
    """
    with opening_guard:
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
    """Give a store back; the last user of this process closes it.

    One that has to be left open is still known: to the next who opens it, to forks, and at exit.
    """
    with opening_guard:
        store.users -= 1
        if store.users == 0 and _stores.get(store.path) is store and store.close():
            del _stores[store.path]


def _close_at_exit() -> None:
    with opening_guard:
        for store in list(_stores.values()):
            store.users = 1
            close_store(store)


def _before_fork() -> None:
    # No transaction may be open at that moment: the child would close it, and its mutex with it,
    # or would wait for ever for the thread that is in the middle of a call.
    opening_guard.acquire()
    for store in _stores.values():
        store.gate.threads.acquire()
        store.reads.acquire()


def _in_parent() -> None:
    for store in _stores.values():
        store.reads.release()
        store.gate.threads.release()
    opening_guard.release()


def _in_child() -> None:
    for store in _stores.values():
        store.become_inherited()
        _inherited.append(store)
    _stores.clear()
    opening_guard.release()


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
