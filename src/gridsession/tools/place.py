"""An embedded grid's folder, looked at from outside and, once it is open, from inside.

Looking changes nothing. Opening does more than looking: a store that cannot be trusted after a
restart of the system is moved aside by whoever opens it, it becomes as durable as that one wants
it, and files made anew belong to whoever made them. The doctor leaves all that to the application.
"""

from __future__ import annotations

import os
import shutil
import stat
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gridsession.errors import GridUnavailable
from gridsession.tools.report import Finding

if TYPE_CHECKING:  # at run time where an embedded grid is looked at: not every system has one
    from gridsession.grids.embedded import EmbeddedGrid

_MOST_COUNTED = 20_000  # records; they take about 0.1 s


@dataclass(frozen=True)
class Facts:
    """What is known of a store.

    Attributes:
        path: the folder.
        is_default: no connection string names it.
        working_directory, user: of this process.
        exists: there is a store in it.
        mode: the folder's permissions; None where there is no folder.
        owner: who owns the folder.
        is_foreign: the store's files are another user's.
        would_be_foreign: there is none, and root would make one in another user's folder.
        file_system: its type; empty where that cannot be told.
        is_network: which is one of a network.
        disk_free: bytes.
        durable_asked: by the connection string.
        layout: of the store; None where there is none, or its state.json cannot be read.
        our_layout: that this release reads.
        durable: the store's own; None where there is none.
        is_open: a process has it open, and as durable as was not asked for; else not looked for.
        boot_id_fits: it was last used since the system started.
        is_clean: the last process that had it open closed it in order.
        is_reserved: its blocks are reserved on the disk.
        size: bytes of the store.
        used: bytes of it in use; known once it is open.
        records, locks: of this namespace; known once it is open.
        is_counted: all of them, and not the first ones only.
    """

    path: str
    is_default: bool
    working_directory: str
    user: str
    exists: bool
    mode: int | None
    owner: str | None
    is_foreign: bool
    file_system: str
    is_network: bool
    disk_free: int
    durable_asked: bool
    layout: int | None
    our_layout: int
    durable: bool | None = None
    is_open: bool = False
    boot_id_fits: bool | None = None
    is_clean: bool | None = None
    is_reserved: bool | None = None
    size: int | None = None
    used: int | None = None
    records: int | None = None
    locks: int | None = None
    is_counted: bool = True
    would_be_foreign: bool = False

    def reasons_to_stay_out(self) -> list[Finding]:
        """Why this store is not to be opened now; none: it may be."""
        if self.is_network:
            return [
                Finding(
                    "error",
                    f"the folder is on a network file system ({self.file_system}), where locks do "
                    "not hold between machines; the application does not start with it",
                    "name a folder on a local disk",
                )
            ]
        if self.is_foreign:
            return [
                Finding(
                    "error",
                    f"the store belongs to another user than {self.user}; it was not opened, for "
                    "files made anew would shut the application out",
                    "run the doctor as the user that the application runs as",
                )
            ]
        if self.would_be_foreign:
            return [
                Finding(
                    "warning",
                    f"there is no store, and {self.user} would make one in another user's folder; "
                    "it was not opened, for that could shut the application out",
                    f"run the doctor as the user that the application runs as; if that is "
                    f"{self.user}, start the application first",
                )
            ]
        if not self.exists:
            return []
        if self.layout is None:
            return [
                Finding(
                    "warning",
                    "state.json is missing or unreadable beside a store; whoever opens it next "
                    "moves the store aside, with all its sessions. It was not opened",
                    "put state.json back from a backup of the same time; or start the application, "
                    "which begins with an empty store",
                )
            ]
        if self.layout != self.our_layout:
            return [
                Finding(
                    "error",
                    f"the store has layout {self.layout}, and this release reads "
                    f"{self.our_layout}: another release of gridsession wrote it",
                    "bring application and doctor to the release that wrote it, or name another "
                    "folder",
                )
            ]
        if not (self.boot_id_fits or self.is_clean or self.durable):
            return [
                Finding(
                    "warning",
                    "the system restarted while the store was in use and not durable, so it cannot "
                    "be trusted; whoever opens it next moves it aside, with all its sessions. It "
                    "was not opened",
                    "start the application, which begins with an empty store; set durable=true "
                    "where sessions must outlive that",
                )
            ]
        return self._other_durable()

    def _other_durable(self) -> list[Finding]:
        if self.durable is None or self.durable == self.durable_asked:
            return []
        its, asked = str(self.durable).lower(), str(self.durable_asked).lower()
        if self.is_open:
            return [
                Finding(
                    "error",
                    f"durable={asked} is set, and another process has the store open with "
                    f"durable={its}; the application does not start beside it. The store was not "
                    "opened",
                    "set the same everywhere; to change it, stop all that use the store, then "
                    "start them",
                )
            ]
        return [
            Finding(
                "warning",
                f"durable={asked} is set, and the store was last used with durable={its}; whoever "
                f"opens it next makes it durable={asked}. The store was not opened, and nothing "
                "was measured",
                f"start the application, if durable={asked} is meant, and run the doctor again; "
                f"else set durable={its}",
            )
        ]

    def shown(self) -> dict[str, Any]:
        """For the report, in JSON's types."""
        shown: dict[str, Any] = {
            "path": self.path,
            "path_from": "working directory and user" if self.is_default else "connection_string",
            "file_system": self.file_system or None,
            "disk_free_bytes": self.disk_free,
            "permissions": None if self.mode is None else f"{self.mode:04o}",
            "owner": self.owner,
            "size_bytes": self.size,
            "used_bytes": self.used,
            "layout": self.layout,
            "durable": self.durable,
            "boot_id_fits": self.boot_id_fits,
            "blocks_reserved": self.is_reserved,
            "records": self.records,
            "locks": self.locks,
        }
        if not self.is_counted:
            shown["counted"] = f"the first {_MOST_COUNTED} records only"
        return shown


def look(grid: EmbeddedGrid) -> Facts:
    """What can be known of a store without opening it.

    Raises:
        SettingsError: there is no default folder.
        OSError: it may not be looked at.
    """
    from gridsession.grids.embedded.codec import LAYOUT
    from gridsession.grids.embedded.files import read_state
    from gridsession.grids.embedded.place import (
        default_folder,
        filesystem_of,
        is_network,
        read_boot_id,
    )

    place = grid._place
    path = Path(os.path.realpath(place.path or default_folder()))
    near = next(folder for folder in (path, *path.parents) if folder.exists())
    folder = path.stat() if near == path else None
    data = (path / "data.mdb").stat() if (path / "data.mdb").exists() else None
    state = read_state(path) if data is not None else None
    kind = filesystem_of(near)
    facts = Facts(
        path=str(path),
        is_default=place.path is None,
        working_directory=os.getcwd(),
        user=_user(os.geteuid()),
        exists=data is not None,
        mode=None if folder is None else stat.S_IMODE(folder.st_mode),
        owner=None if folder is None else _user(folder.st_uid),
        is_foreign=data is not None and data.st_uid != os.geteuid(),
        file_system=kind,
        is_network=is_network(kind),
        disk_free=shutil.disk_usage(near).free,
        durable_asked=place.durable,
        layout=None if state is None else state.layout,
        our_layout=LAYOUT,
        would_be_foreign=data is None and os.geteuid() == 0 and near.stat().st_uid != 0,
    )
    if state is None or state.layout != LAYOUT:
        return facts
    return replace(
        facts,
        durable=state.durable,
        is_open=state.durable != place.durable
        and not (facts.is_foreign or facts.is_network)
        and _is_open(path),
        boot_id_fits=state.boot_id == read_boot_id(),
        is_clean=state.clean,
        is_reserved=state.write_map,
        size=state.max_size,
    )


def _is_open(path: Path) -> bool:
    """Whether a process has a store open. Asked as those do who open it, which disturbs nobody."""
    from gridsession.grids.embedded.files import OpenFolder, opening

    if not all((path / name).exists() for name in ("opening", "users")):  # they would be made
        return False
    try:
        with opening(path, 0):
            folder = OpenFolder(path)
            try:
                return not folder.try_alone()
            finally:
                folder.close()
    except GridUnavailable:  # one is about to
        return True


def look_inside(grid: EmbeddedGrid) -> Facts:
    """What can be known of a store that is open, besides.

    Raises:
        GridUnavailable: it is not open.
    """
    from gridsession.grids.embedded import codec

    store = grid._store
    if store is None:
        raise GridUnavailable("the embedded grid is closed")
    facts = look(grid)
    now, prefix = store.clock.now(), grid._prefix
    seen = records = locks = 0
    with store.reads, store.env.begin() as transaction:
        pages = transaction.stat(store.main)
        cursor = transaction.cursor()
        go_on = cursor.set_range(prefix)
        while go_on and seen < _MOST_COUNTED and cursor.key().startswith(prefix):
            if cursor.key().endswith(codec.HEAD):
                seen += 1
                try:
                    record = codec.unpack(bytes(cursor.value()))
                except GridUnavailable:  # of another release: there, and not to be read
                    records += 1
                else:
                    records += record.is_live(now)
                    locks += (
                        record.lock_token is not None
                        and record.boot_id == now.boot_id
                        and record.lock_until > now.steady
                    )
            go_on = cursor.next()
    in_use = pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"]
    return replace(
        facts,
        used=in_use * pages["psize"],
        records=records,
        locks=locks,
        is_counted=seen < _MOST_COUNTED,
    )


def _user(number: int) -> str:
    import pwd

    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # of a container that has no such user
        return str(number)
