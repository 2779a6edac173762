"""The embedded grid's files: fixed size, reserved; whose boot; which layout; who shares them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lmdb
import ormsgpack
import pytest

from gridsession.errors import GridUnavailable, SettingsError
from gridsession.grids.contract import Busy, Found, Missing
from gridsession.grids.embedded import EmbeddedGrid, codec, files, store, table
from gridsession.grids.embedded.codec import HEAD, LAYOUT
from gridsession.grids.embedded.place import Place
from gridsession.testing import ManualClock
from gridsession.testing.contract_hooks import Visitor, a_change, a_claim, a_secret, expect
from tests.grids.embedded_process import Child, memory_folder
from tests.grids.embedded_words import MIB, boot, counted, inside, opened, store_of, visitor

pytestmark = pytest.mark.skipif("sys.platform != 'linux'")


@pytest.fixture
def folder() -> Iterator[Path]:
    with memory_folder() as path:
        yield path / "store"


def blocks(path: Path) -> tuple[int, int]:
    """Bytes of a file, and bytes that the disk has set aside for it."""
    there = path.stat()
    return there.st_size, there.st_blocks * 512


def crash(folder: Path) -> Path:
    """What lies on disk when the system stops now: the files as they are."""
    left = folder.with_name("crashed")
    shutil.copytree(folder, left, ignore=shutil.ignore_patterns("bells"))
    return left


def state_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    return state


def put_state(folder: Path, **changed: object) -> None:
    (folder / "state.json").write_text(json.dumps({**state_of(folder), **changed}))


def aside(folder: Path) -> list[Path]:
    return sorted(folder.glob("aside-*"))


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]


# -- one size ---------------------------------------------------------------------------------


def test_all_blocks_are_reserved_from_the_start(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=4 * MIB) as grid:
            assert blocks(folder / "data.mdb") == (4 * MIB, 4 * MIB)
            size, reserved = blocks(folder / "lock.mdb")
            assert reserved >= size > 1022 * 64  # all readers that there can be
            assert blocks(folder / "gate")[1] >= 4096
            for _ in range(20):
                await Visitor(grid).create(b"x" * 50_000)
            assert blocks(folder / "data.mdb") == (4 * MIB, 4 * MIB)
        assert blocks(folder / "data.mdb") == (4 * MIB, 4 * MIB)
        size, reserved = blocks(folder / "lock.mdb")
        assert reserved >= size

    asyncio.run(run())


def test_the_size_stays_for_all_while_one_has_it_open(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        with Child("hold_open", path=folder, size=4 * MIB) as other:
            assert other.says("open") == f"{4 * MIB}"
            for size in (8 * MIB, 2 * MIB):
                caplog.clear()
                async with opened(folder, size=size) as grid:
                    assert store_of(grid).state.max_size == 4 * MIB
                    assert blocks(folder / "data.mdb") == (4 * MIB, 4 * MIB)
                    await Visitor(grid).create(b"x")
                assert f"not max_size's {size // MIB}" in caplog.text
            caplog.clear()
            async with opened(folder, size=None):  # says nothing of a size
                assert not caplog.records
            other.tell("close")
            other.says("closed")
            other.ends()

    asyncio.run(run())


def test_it_grows_when_alone_and_never_shrinks(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with opened(folder, size=2 * MIB) as grid:
            await visitor(grid, 1).create(b"kept")
        async with opened(folder, size=3 * MIB) as grid:
            assert blocks(folder / "data.mdb") == (3 * MIB, 3 * MIB)
            await Visitor(grid).create(b"x" * (2 * MIB))
        assert not caplog.records
        async with opened(folder, size=MIB) as grid:
            assert blocks(folder / "data.mdb") == (3 * MIB, 3 * MIB)
            assert (await visitor(grid, 1).found()).payload == b"kept"
        assert "never shrinks" in caplog.text
        assert state_of(folder)["max_size"] == 3 * MIB

    asyncio.run(run())


def test_a_growth_that_fails_leaves_the_file_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some file systems keep what they had added before the disk was full."""
    real = os.posix_fallocate

    def runs_out(fd: int, offset: int, length: int) -> None:
        real(fd, offset, length // 2 + MIB)
        raise OSError(errno.ENOSPC, "No space left on device")

    async def run() -> None:
        async with opened(folder, size=2 * MIB) as grid:
            await visitor(grid, 1).create(b"kept")
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", runs_out)
            with pytest.raises(SettingsError, match=r"needs 8 MiB .* free there; make room"):
                async with opened(folder, size=8 * MIB):
                    pass
        assert blocks(folder / "data.mdb") == (2 * MIB, 2 * MIB)
        async with opened(folder, size=2 * MIB) as grid:
            assert (await visitor(grid, 1).found()).payload == b"kept"

    asyncio.run(run())


def test_a_file_with_holes_is_reserved_at_open(folder: Path) -> None:
    """Copied or restored, it may have become sparse: a full disk would kill whoever writes."""

    async def run() -> None:
        async with opened(folder, size=4 * MIB) as grid:
            await visitor(grid, 1).create(b"kept")
        data = folder / "data.mdb"
        content = data.read_bytes().rstrip(b"\0")
        with open(data, "wb") as file:
            file.write(content)
            file.truncate(4 * MIB)
        assert blocks(data)[1] < MIB
        async with opened(folder, size=4 * MIB) as grid:
            assert blocks(data) == (4 * MIB, 4 * MIB)
            assert (await visitor(grid, 1).found()).payload == b"kept"

    asyncio.run(run())


def test_lmdbs_lock_file_is_reserved_when_it_is_made_anew(folder: Path) -> None:
    """LMDB truncates it to its size and reserves nothing: who reads on a full disk would die."""

    async def run() -> None:
        async with opened(folder):
            before = blocks(folder / "lock.mdb")
        for damage in (Path.unlink, lambda path: os.truncate(path, 0)):
            damage(folder / "lock.mdb")
            async with opened(folder) as grid:
                await Visitor(grid).create(b"x")
                assert blocks(folder / "lock.mdb") == before
                assert (folder / "lock.mdb").stat().st_mode & 0o777 == 0o600

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["btrfs", "zfs", "bcachefs"])
def test_where_blocks_cannot_be_reserved_nothing_is_written_through_the_map(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(store, "filesystem_of", lambda path: kind)

    async def run() -> None:
        async with opened(folder, size=4 * MIB) as grid:
            assert store_of(grid).env.flags()["writemap"] is False
            there, claim = visitor(grid, 1), a_claim()
            await there.create(b"first", claim=claim)
            await there.commit(claim, a_change(b"second"))
            assert blocks(folder / "data.mdb")[1] < MIB
            async with opened(folder, size=4 * MIB) as other:
                assert (await there.at(other).found()).payload == b"second"

    asyncio.run(run())


def test_reserving_that_is_not_supported_is_no_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)

    async def run() -> None:
        for _ in range(2):
            async with opened(folder) as grid:
                assert store_of(grid).env.flags()["writemap"] is False
                await Visitor(grid).create(b"x")

    asyncio.run(run())


def test_elsewhere_it_writes_through_the_map_and_does_not_flush(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            flags = store_of(grid).env.flags()
            assert (flags["writemap"], flags["sync"], flags["metasync"]) == (True, False, False)

    asyncio.run(run())


def test_opening_does_not_scan_what_is_stored(folder: Path) -> None:
    """Counted in memory: what a process has not touched of a mapped file is not resident."""

    async def run() -> None:
        async with opened(folder, size=64 * MIB) as grid:
            with inside(grid) as transaction:
                for number in range(20_000):
                    transaction.put(b"r%039d" % number + b"p", b"x" * 1000)
        with Child("resident", path=folder, size=64 * MIB) as other:
            opened_only, scanned = map(int, other.says("kib").split(" "))
            other.ends()
        assert scanned > 20_000  # KiB: the measure sees a scan
        assert opened_only < 1000

    asyncio.run(run())


# -- boots ------------------------------------------------------------------------------------


def test_after_a_crash_of_the_system_it_is_moved_aside_and_never_read(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        with boot(1):
            async with opened(folder) as grid:
                await visitor(grid, 1).create(b"from before the crash")
                left = crash(folder)
        before = (left / "data.mdb").read_bytes()
        with boot(2):
            async with opened(left) as grid:
                expect(Missing, await visitor(grid, 1).read())
                assert store_of(grid).env.info()["last_txnid"] == 0
                await visitor(grid, 1).create(b"new")
        (moved,) = aside(left)
        assert (moved / "data.mdb").read_bytes() == before
        (line,) = errors(caplog)
        assert moved.name in line
        assert "restarted" in line

    asyncio.run(run())


def test_a_killed_process_in_the_same_boot_loses_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        with boot(1):
            async with opened(folder) as grid:
                await visitor(grid, 1).create(b"kept")
                left = crash(folder)
            async with opened(left) as grid:
                assert (await visitor(grid, 1).found()).payload == b"kept"
        assert not aside(left)
        assert not errors(caplog)

    asyncio.run(run())


def test_closed_in_order_it_is_kept_over_a_restart_but_for_locks(folder: Path) -> None:
    """Leases, tickets and replaced secrets count a clock that began anew."""

    async def run() -> None:
        with boot(1):
            async with opened(folder) as grid:
                there, holder = visitor(grid, 1), a_claim("of the old boot", lease=1e9)
                await there.create(b"kept")
                replaced = await there.rotated()
                await there.locked(holder)
                await there.queued(a_claim())
                secret = there.secret
        with boot(2):
            async with opened(folder) as grid:
                there = visitor(grid, 1)
                expect(Missing, await there.read(replaced))
                there.secret = secret
                assert (await there.found()).payload == b"kept"
                newcomer = a_claim()
                await there.locked(newcomer)
                assert await grid.renew([(there.key, holder.token)], 1.0) == [False]
                assert (await there.queued(a_claim(queue_limit=1))).ahead == 0
            async with opened(folder) as grid:  # of this boot: its lock lives
                expect(Busy, await there.at(grid).acquire(a_claim()))

    asyncio.run(run())


def test_durable_it_is_kept_over_a_crash(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        with boot(1):
            async with opened(folder, durable=True) as grid:
                await visitor(grid, 1).create(b"kept", claim=a_claim(lease=1e9))
                left = crash(folder)
        with boot(2):
            async with opened(left, durable=True) as grid:
                assert (await visitor(grid, 1).found()).payload == b"kept"
                await visitor(grid, 1).locked(a_claim())
        assert not aside(left)
        assert not errors(caplog)

    asyncio.run(run())


def test_durable_once_and_then_not_a_crash_counts_for_what_it_was(folder: Path) -> None:
    async def run() -> None:
        with boot(1):
            async with opened(folder, durable=True) as grid:
                await visitor(grid, 1).create(b"durable")
            async with opened(folder, durable=False) as grid:
                assert (await visitor(grid, 1).found()).payload == b"durable"
                left = crash(folder)
        with boot(2):
            async with opened(left, durable=True) as grid:  # what was written last was not
                expect(Missing, await visitor(grid, 1).read())
        assert aside(left)

    asyncio.run(run())


def test_the_mark_of_an_orderly_close_is_removed_at_open(folder: Path) -> None:
    """Closed in order, opened again, and then the crash: the old mark must not count."""

    async def run() -> None:
        with boot(1):
            async with opened(folder) as grid:
                await visitor(grid, 1).create(b"x")
                assert state_of(folder)["clean"] is False
            assert state_of(folder)["clean"] is True
            async with opened(folder):
                assert state_of(folder)["clean"] is False
                left = crash(folder)
        with boot(2):
            async with opened(left) as grid:
                expect(Missing, await visitor(grid, 1).read())
        assert aside(left)

    asyncio.run(run())


def test_only_the_last_one_out_marks_it(folder: Path) -> None:
    async def run() -> None:
        with boot(1):
            with Child("hold_open", path=folder, boot_id=1) as other:
                other.says("open")
                async with opened(folder) as grid:
                    await visitor(grid, 1).create(b"x")
                assert state_of(folder)["clean"] is False
                other.tell("close")
                other.says("closed")
                other.ends()
            assert state_of(folder)["clean"] is True
            with Child("hold_open", path=folder, boot_id=1) as other:
                other.says("open")
                other.kill()
            assert state_of(folder)["clean"] is False
            async with opened(folder) as grid:
                assert (await visitor(grid, 1).found()).payload == b"x"
            assert state_of(folder)["clean"] is True

    asyncio.run(run())


def test_all_is_flushed_before_it_is_marked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And by the last one out alone: the others would only wait for each other."""
    done: list[str] = []

    class Env:
        def __init__(self, env: lmdb.Environment) -> None:
            self._env = env

        def sync(self, force: bool) -> None:
            done.append(f"flushed, marked {state_of(folder)['clean']}")
            self._env.sync(force)

        def close(self) -> None:
            self._env.close()

    async def run() -> None:
        with Child("hold_open", path=folder) as other:
            other.says("open")
            for expected in ([], ["flushed, marked False"]):
                async with opened(folder) as grid:
                    monkeypatch.setattr(store_of(grid), "env", Env(store_of(grid).env))
                assert done == expected
                if not expected:
                    other.tell("close")
                    other.says("closed")
                    other.ends()
                    done.clear()
        assert state_of(folder)["clean"] is True

    asyncio.run(run())


def test_a_close_that_cannot_flush_does_not_mark_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        with monkeypatch.context() as patch:
            async with opened(folder):
                patch.setattr(store, "write_state", _no_space)
        assert "was not closed in order" in caplog.text
        assert state_of(folder)["clean"] is False
        async with opened(folder):
            pass
        assert state_of(folder)["clean"] is True

    asyncio.run(run())


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


# -- layouts, damage --------------------------------------------------------------------------


def test_a_newer_layout_is_refused_and_left_alone(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            await visitor(grid, 1).create(b"from the future")
        future = {"layout": 2, "and": "what this release does not know"}
        (folder / "state.json").write_text(json.dumps(future))
        before = {x.name: x.read_bytes() for x in folder.iterdir() if x.suffix in (".mdb", ".json")}
        for _ in range(2):
            with pytest.raises(GridUnavailable, match=r"layout 2, and this release reads 1"):
                async with opened(folder):
                    pass
        after = {x.name: x.read_bytes() for x in folder.iterdir() if x.suffix in (".mdb", ".json")}
        assert after == before
        assert not aside(folder)

    asyncio.run(run())


def test_a_record_of_a_newer_layout_is_not_read_by_guess(folder: Path) -> None:
    """Even where it looks just like one of ours."""

    async def run() -> None:
        async with opened(folder) as grid:
            there = visitor(grid, 1)
            await there.create(b"x")
            stored = grid._prefix + there.key + b"h"
            with inside(grid) as transaction:
                row = ormsgpack.unpackb(bytes(transaction.get(stored) or b""))
                transaction.put(stored, ormsgpack.packb([LAYOUT + 1, *row[1:]]))
            store_of(grid).decoded.clear()
            for call in (there.read(), there.create(b"y"), grid.remove(there.key)):
                with pytest.raises(GridUnavailable, match="has layout 2, and this release reads 1"):
                    await call

    asyncio.run(run())


def test_a_record_that_cannot_be_read_is_in_nobodys_way(folder: Path) -> None:
    """Neither in that of the sweeper nor of the other locks that are renewed with it."""

    async def run() -> None:
        clock = ManualClock()
        async with opened(folder, clock=clock) as grid:
            good, bad, others = a_claim(), visitor(grid, 1), [visitor(grid, n) for n in (2, 3)]
            await bad.create(b"x", timeout=10.0)
            for there in others:
                await there.create(b"x", timeout=20.0)
            held = visitor(grid, 4)
            await held.create(b"x", timeout=1000.0, claim=good)
            with inside(grid) as transaction:
                transaction.put(grid._prefix + bad.key + b"h", b"\xc1")
            leases = [(bad.key, good.token), (held.key, good.token)]
            assert await grid.renew(leases, 15.0) == [False, True]
            clock.advance(30)
            assert await grid.sweep(2) == 2
            assert await grid.sweep(2) == 1
            assert await grid.sweep(2) == 0
            for there in others:
                assert isinstance(await there.read(), Missing)
            with pytest.raises(GridUnavailable, match="damaged; it was left alone"):
                await bad.read()

    asyncio.run(run())


@pytest.mark.parametrize("lives", [False, True])
def test_a_record_that_can_be_read_again_expires_in_its_time(folder: Path, lives: bool) -> None:
    """When it was due it could not be read; the entry that was put off is all that it has."""

    async def run() -> None:
        clock = ManualClock()
        async with opened(folder, clock=clock) as grid:
            there = visitor(grid, 1)
            await there.create(b"x", timeout=100.0)
            stored = grid._prefix + there.key + HEAD
            with inside(grid) as transaction:
                before = bytes(transaction.get(stored) or b"")
                transaction.put(stored, ormsgpack.packb((LAYOUT + 1, "a newer release's")))
            clock.advance(200)
            assert await grid.sweep(10) == 1
            record = codec.unpack(before)
            record.deadline += 10_000.0 if lives else 0.0  # where the newer release slid it
            with inside(grid) as transaction:
                transaction.put(stored, codec.pack(record))
            clock.advance(700)
            assert await grid.sweep(10) == 1
            assert index_of(grid) == ([(record.deadline, there.key)] if lives else [])
            clock.advance(10_000)
            assert await grid.sweep(10) == (1 if lives else 0)
            with inside(grid) as transaction:
                assert transaction.stat()["entries"] == 0

    asyncio.run(run())


def index_of(grid: EmbeddedGrid) -> list[tuple[float, bytes]]:
    with inside(grid) as transaction, transaction.cursor() as cursor:
        raw = [bytes(key) for key, _ in cursor if bytes(key).startswith(codec.INDEX)]
    return [(due, key.removeprefix(grid._prefix)) for due, key in map(codec.parse_index_key, raw)]


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", "7", '"x"', "{}", '{"layout": 1}', '{"layout": "x"}', "\ufffd\0"],
)
def test_a_damaged_state_is_moved_aside(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            await visitor(grid, 1).create(b"x")
        (folder / "state.json").write_text(damage)
        async with opened(folder) as grid:
            expect(Missing, await visitor(grid, 1).read())
        assert (aside(folder)[0] / "state.json").read_text() == damage
        assert errors(caplog)

    asyncio.run(run())


@pytest.mark.parametrize(
    "changed", [{"max_size": "4194304"}, {"clean": 0}, {"boot_id": None}, {"unknown": 1}]
)
def test_a_state_with_fields_of_the_wrong_type_is_damaged(
    folder: Path, changed: dict[str, object]
) -> None:
    async def run() -> None:
        async with opened(folder):
            pass
        put_state(folder, **changed)
        async with opened(folder):
            assert aside(folder)

    asyncio.run(run())


def test_files_that_vanish_under_others_are_not_made_anew(folder: Path) -> None:
    """A second file beside the one that the others have open would split the sessions in two."""

    async def run() -> None:
        with Child("hold_open", path=folder) as other:
            other.says("open")
            for name in ("state.json", "data.mdb", "lock.mdb", "gate"):
                gone = folder / f"{name}.gone"
                (folder / name).rename(gone)
                with pytest.raises(GridUnavailable, match="missing in"):
                    async with opened(folder):
                        pass
                gone.rename(folder / name)

    asyncio.run(run())


def test_whatever_else_vanishes_nobody_is_alone_beside_another(folder: Path) -> None:
    """The file that says who has it open was removed, since nobody ever writes to such a file."""

    async def run() -> None:
        with Child("hold_open", path=folder) as other:
            other.says("open")
            for path in folder.iterdir():
                if path.name not in ("state.json", "data.mdb", "lock.mdb", "gate", "bells"):
                    path.unlink()
            for _ in range(2):  # nor does the first one leave a file that the second finds free
                with pytest.raises(GridUnavailable, match="missing in"):
                    async with opened(folder, size=8 * MIB):
                        pass
            other.tell("close")
            other.says("closed")
            other.ends()
        async with opened(folder, size=8 * MIB) as grid:
            assert store_of(grid).state.max_size == 8 * MIB

    asyncio.run(run())


@contextlib.contextmanager
def locked(path: Path, kind: int) -> Iterator[int]:
    """Held by somebody else: a `flock` belongs to what was opened, not to a process."""
    fd = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(fd, kind)
        yield fd
    finally:
        os.close(fd)


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH])
def test_a_stranger_who_locks_the_folder_is_in_nobodys_way(folder: Path, kind: int) -> None:
    """Whoever may list it may lock it: backups, cleaners of temporary folders, anybody."""

    def run() -> None:
        for size in (4 * MIB, 8 * MIB):
            with Child("hold_open", path=folder, size=size) as other:
                assert other.says("open") == f"{size}"  # it grows when alone
                other.tell("close")
                other.says("closed")
                other.ends()
            assert state_of(folder)["clean"] is True

    folder.mkdir()
    with locked(folder, kind):
        run()


def test_the_folder_is_held_once_a_stranger_lets_it_go(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            with pytest.raises(BlockingIOError), locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB):
                pass
        with locked(folder, fcntl.LOCK_EX) as stranger:
            async with opened(folder) as grid:
                fcntl.flock(stranger, fcntl.LOCK_UN)
                await grid.sweep(1)
                with pytest.raises(BlockingIOError):
                    fcntl.flock(stranger, fcntl.LOCK_EX | fcntl.LOCK_NB)

    asyncio.run(run())


def test_a_release_that_holds_users_alone_is_seen(folder: Path) -> None:
    """As those before did, which are still there while workers are replaced one by one."""

    async def run() -> None:
        async with opened(folder):
            assert (folder / "users").stat().st_mode & 0o777 == 0o600
            users, kind = folder / "users", fcntl.LOCK_EX | fcntl.LOCK_NB
            with pytest.raises(BlockingIOError), locked(users, kind):
                pass
        with locked(folder / "users", fcntl.LOCK_SH):
            async with opened(folder, size=8 * MIB) as grid:
                assert store_of(grid).state.max_size == 4 * MIB
            assert state_of(folder)["clean"] is False

    asyncio.run(run())


def test_who_finds_out_whether_it_is_alone_is_waited_for_and_not_for_ever(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `opening` was removed, two may find out at once."""
    pauses: list[float] = []

    async def run() -> None:
        async with opened(folder):
            pass
        with locked(folder / "users", fcntl.LOCK_EX) as another, monkeypatch.context() as patch:

            def sleep(seconds: float) -> None:
                pauses.append(seconds)
                if pauses.count(0.005) == 3:
                    fcntl.flock(another, fcntl.LOCK_UN)

            patch.setattr(time, "sleep", sleep)
            async with opened(folder) as grid:
                await Visitor(grid).create(b"x")
            assert pauses.count(0.005) == 3
        with locked(folder / "users", fcntl.LOCK_EX), monkeypatch.context() as patch:
            patch.setattr(time, "monotonic", iter(range(0, 10_000, 4)).__next__)
            before = len(os.listdir("/proc/self/fd"))
            with pytest.raises(GridUnavailable, match="being opened by another process"):
                store.open_store(Place(folder, 4 * MIB, False), 1.0)
            assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(run())


@pytest.mark.parametrize("how", ["removed", "moved", "emptied"])
def test_a_store_made_anew_under_another_is_left_alone_by_it(
    folder: Path, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    """Its state was overwritten by the one that closed: of another size, and closed in order."""

    async def run() -> None:
        async with opened(folder, size=8 * MIB) as grid:
            if how == "moved":
                folder.rename(folder.with_name("moved"))
            elif how == "removed":
                shutil.rmtree(folder)
            else:
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            with Child("hold_open", path=folder, size=4 * MIB) as other:
                assert other.says("open") == f"{4 * MIB}"
                paths = [folder, *folder.rglob("*")]
                for path in paths:
                    os.utime(path, (0, 0))
                for _ in range(2):
                    store_of(grid)._upkeep_due = 0.0
                    await grid.sweep(1)
                await grid.close()
                assert [path for path in paths if path.stat().st_mtime] == []
                assert state_of(folder)["max_size"] == 4 * MIB
                assert state_of(folder)["clean"] is False
                (line,) = errors(caplog)
                assert f"lost {folder} while it is in use" in line
                assert "was not closed in order" in caplog.text
                async with opened(folder, size=8 * MIB) as another:
                    assert store_of(another).state.max_size == 4 * MIB

    asyncio.run(run())


def test_the_files_of_a_store_in_use_stay_young(folder: Path) -> None:
    """In temporary folders those that nobody wrote to for days are removed."""

    async def run() -> None:
        async with opened(folder) as grid:
            there = visitor(grid, 1)
            await there.create(claim=a_claim())
            await there.queued(a_claim())  # so there is a bell
            paths = [folder, *folder.rglob("*")]
            assert {"bells", "opening", f"{os.getpid()}"} < {path.stem for path in paths}
            for path in paths:
                os.utime(path, (0, 0))
            await grid.sweep(1)
            assert [path for path in paths if path.stat().st_mtime < time.time() - 60] == []

    asyncio.run(run())


@pytest.mark.parametrize("name", ["state.json", "data.mdb", "lock.mdb", "gate", "users", ""])
def test_files_removed_under_a_store_are_told_once(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            await grid.sweep(1)
            assert errors(caplog) == []
            kept = folder.with_name("kept")
            shutil.copytree(folder, kept)
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            else:
                (folder / name).unlink()
            if not name:
                shutil.copytree(kept, folder)  # of that name, and another
            for _ in range(2):
                store_of(grid)._upkeep_due = 0.0
                await grid.sweep(1)
            (line,) = errors(caplog)
            assert f"lost {name or folder} while it is in use" in line

    asyncio.run(run())


def test_files_that_nobody_misses_are_made_anew_quietly(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            shutil.rmtree(folder / "bells")
            (folder / "opening").unlink()
            await grid.sweep(1)
            assert (folder / "bells").stat().st_mode & 0o777 == 0o700
            assert (folder / "opening").stat().st_mode & 0o777 == 0o600
        assert not caplog.records

    asyncio.run(run())


@pytest.mark.parametrize("name", ["data.mdb", "lock.mdb", "bells", "gate", "users", "opening"])
def test_a_missing_file_is_made_anew_when_alone(folder: Path, name: str) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            await visitor(grid, 1).create(b"x")
        if name == "bells":
            shutil.rmtree(folder / name)
        else:
            (folder / name).unlink()
        async with opened(folder) as grid:
            kind = Missing if name == "data.mdb" else Found
            expect(kind, await visitor(grid, 1).read())

    asyncio.run(run())


def test_a_file_that_is_no_store_is_refused_in_words(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder):
            pass
        with open(folder / "data.mdb", "r+b") as file:
            file.write(b"garbage " * 4096)
        with pytest.raises(SettingsError, match="cannot use"):
            async with opened(folder):
                pass

    asyncio.run(run())


def test_a_damaged_record_is_unavailable_and_tells_nothing(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder) as grid:
            there = visitor(grid, 1)
            await there.create(b"payload")
            stored = grid._prefix + there.key + b"h"
            for damage in (b"", b"\xc1", b"\x93\x01\x02\x03", b"\x92\xa6secret\x01", b"\x90"):
                with inside(grid) as transaction:
                    transaction.put(stored, damage)
                for call in (there.read(), there.acquire(a_claim()), grid.remove(there.key)):
                    with pytest.raises(GridUnavailable) as caught:
                        await call
                    assert "secret" not in str(caught.value)
                with inside(grid) as transaction:
                    assert transaction.get(stored) == damage

    asyncio.run(run())


# -- one per path and process -----------------------------------------------------------------


def test_one_store_for_each_path_and_process(folder: Path, tmp_path: Path) -> None:
    async def run() -> None:
        link = tmp_path / "link"
        async with opened(folder) as first:
            link.symlink_to(folder)
            async with (
                opened(link) as second,
                opened(folder.parent / "x" / ".." / "store") as third,
            ):
                assert store_of(first) is store_of(second) is store_of(third)
            await Visitor(first).create(b"still open")
            assert state_of(folder)["clean"] is False
        assert state_of(folder)["clean"] is True
        async with opened(folder) as again:
            assert store_of(again) is not None

    asyncio.run(run())


def test_whoever_opened_it_first_may_close_it_first(folder: Path) -> None:
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            first = await stack.enter_async_context(opened(folder))
            second = await stack.enter_async_context(opened(folder))
            await first.close()
            await first.close()
            await Visitor(second).create(b"x")
            await second.close()
            assert state_of(folder)["clean"] is True

    asyncio.run(run())


def test_other_options_for_the_same_path_in_one_process_are_refused(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder, size=4 * MIB):
            for size, durable in ((8 * MIB, False), (None, False), (4 * MIB, True)):
                with pytest.raises(SettingsError, match="with other options already"):
                    async with opened(folder, size=size, durable=durable):
                        pass
            async with opened(folder, size=4 * MIB):
                pass

    asyncio.run(run())


def test_durable_is_for_all_processes_or_for_none(folder: Path) -> None:
    async def run() -> None:
        with Child("hold_open", path=folder, durable=True) as other:
            other.says("open")
            with pytest.raises(SettingsError, match="all must say the same"):
                async with opened(folder, durable=False):
                    pass
            async with opened(folder, durable=True):
                pass

    asyncio.run(run())


def test_a_process_stopped_while_it_opens_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        async with opened(folder):
            pass
        with files.opening(folder, 1.0):
            monkeypatch.setattr(time, "monotonic", iter(range(0, 10_000, 4)).__next__)
            with pytest.raises(GridUnavailable, match=f"opened by process {os.getpid()}"):
                async with opened(folder):
                    pass

    asyncio.run(run())


def test_a_failed_open_leaves_no_descriptor_behind(folder: Path) -> None:
    async def run() -> None:
        async with opened(folder):
            pass
        with open(folder / "data.mdb", "r+b") as file:
            file.write(b"garbage " * 4096)
        await asyncio.to_thread(lambda: None)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(5):
            with pytest.raises(SettingsError):
                async with opened(folder):
                    pass
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(run())


def test_so_many_records_are_kept_decoded_and_no_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of those that are only made, and that nobody comes back to."""
    monkeypatch.setattr(table, "_MOST_DECODED", 10)

    async def run() -> None:
        async with opened(folder) as grid:
            for number in range(35):
                await visitor(grid, number).create(b"0")
                assert 1 <= len(store_of(grid).decoded) <= 10
            for number in range(35):
                await counted(visitor(grid, number))
                assert 1 <= len(store_of(grid).decoded) <= 10

    asyncio.run(run())


def test_namespaces_are_apart_and_swept_together(folder: Path) -> None:
    """One may have no workers left: whoever looks removes what is due in all of them."""

    async def run() -> None:
        async with opened(folder, namespace="a") as a, opened(folder, namespace="b") as b:
            there = visitor(a, 1)
            await there.create(b"of a", timeout=0.001)
            expect(Missing, await there.at(b).read())
            mine = there.at(b)
            mine.secret = a_secret()
            await mine.create(b"of b")
            await asyncio.sleep(0.01)
            assert await b.sweep(10) == 1
            with inside(b) as transaction:
                assert transaction.stat()["entries"] == 3  # b's record, payload and deadline
            assert (await mine.found()).payload == b"of b"

    asyncio.run(run())


def test_it_says_where_it_is(folder: Path) -> None:
    async def run() -> None:
        grid = EmbeddedGrid(Place(folder, 4 * MIB))
        assert str(folder) in grid.where
        assert "this machine only" in grid.where
        assert "default folder" in EmbeddedGrid(Place()).where
        await grid.open()
        assert f"{folder}, 4 MiB" in grid.where
        await grid.close()

    asyncio.run(run())


# -- secrets ----------------------------------------------------------------------------------


def test_promise_9_failures_tell_no_secret(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    payload, user = b"card 4111 1111 1111 1111", "ann@example.com"
    texts: list[str] = []

    async def fails(call: Any) -> None:
        try:
            await call
        except Exception as error:
            texts.extend(["".join(traceback.format_exception(error)), repr(vars(error))])
        else:
            raise AssertionError("it did not fail")

    async def run() -> None:
        with boot(1):
            async with opened(folder, size=MIB, timeout=0.01) as grid:
                there, claim = Visitor(grid), a_claim()
                planted.extend([there.key, there.secret, claim.token, payload, user.encode()])
                big = payload * 100_000
                await there.create(payload, claim=claim, user=user)
                everything: list[Callable[[], Any]] = [
                    lambda: there.create(big, user=user),
                    lambda: there.acquire(claim),
                    lambda: there.commit(claim, a_change(payload, user=user)),
                    lambda: there.release(claim),
                    lambda: grid.renew([(there.key, claim.token)], 1.0),
                ]
                await fails(Visitor(grid).create(big, user=user))
                await fails(there.commit(claim, a_change(big, user=user)))
                gate = store_of(grid).gate
                assert gate.try_enter()
                for call in everything:
                    await fails(call())
                gate.leave()
                stored = grid._prefix + there.key + b"h"
                with inside(grid) as transaction:
                    record = bytes(transaction.get(stored) or b"")
                    transaction.put(stored, record[:-5])
                for call in everything[1:]:
                    await fails(call())
                with inside(grid) as transaction:
                    transaction.put(stored, b"\x92" + record)
                for call in everything[1:]:
                    await fails(call())
                with monkeypatch.context() as patch:
                    patch.setattr(store_of(grid), "env", None)
                    texts.append(repr(store_of(grid)))
                texts.extend([repr(grid), grid.where, repr(store_of(grid)), repr(grid._bells)])
                left = crash(folder)
        with boot(2):
            async with opened(left, size=2 * MIB):
                pass

    planted: list[bytes] = []
    asyncio.run(run())
    texts.extend(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert len(texts) > 10
    for text in texts:
        for secret in planted:
            for spelling in (repr(secret)[2:-1], secret.hex()):
                assert spelling not in text, text
