"""Where an embedded grid may lie: connection strings, folders, file systems."""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from gridsession.errors import SettingsError
from gridsession.grids import make_grid
from gridsession.grids.embedded import EmbeddedGrid, files, place, store
from gridsession.grids.embedded.place import (
    DEFAULT_MAX_SIZE,
    Place,
    can_reserve,
    default_folder,
    filesystem_of,
    is_network,
    read_boot_id,
)
from tests.grids.embedded_process import Child
from tests.grids.embedded_words import MIB, opened

pytestmark = pytest.mark.skipif("sys.platform != 'linux'")


# -- connection strings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("embedded:", Place()),
        ("embedded:///", Place()),
        ("embedded:?durable=true", Place(None, None, True)),
        ("embedded:///var/lib/shop", Place(Path("/var/lib/shop"))),
        ("embedded:/var/lib/shop", Place(Path("/var/lib/shop"))),
        ("embedded:///var/my%20shop?max_size=1GiB", Place(Path("/var/my shop"), 1 << 30)),
        ("embedded:///a?max_size=512MiB&durable=true", Place(Path("/a"), 512 * MIB, True)),
        ("embedded:///a?max_size=2mb", Place(Path("/a"), 2_002_944)),  # whole pages
        ("embedded:///a?max_size=1048576", Place(Path("/a"), MIB)),
        ("embedded:///a?max_size=3 MIB&durable=NO", Place(Path("/a"), 3 * MIB)),
    ],
)
def test_a_connection_string_is_understood(text: str, expected: Place) -> None:
    assert Place.parse(text) == expected


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("embedded://var/lib/shop", "three slashes"),
        ("embedded:var/lib/shop", "three slashes"),
        ("embedded:///a#b", "three slashes"),
        ("embedded:///a?size=1GiB", "no option 'size'; there are: max_size, durable"),
        ("embedded:///a?max_size=", "is no size"),
        ("embedded:///a?max_size=-5MiB", "is no size"),
        ("embedded:///a?max_size=1.5GiB", "is no size"),
        ("embedded:///a?max_size=lots", "write 512MiB or 2GiB"),
        ("embedded:///a?max_size=1000KiB", "too small; use 1MiB"),
        ("embedded:///a?max_size=0", "too small"),
        ("embedded:///a?max_size=99999999999TiB", "too large"),
        ("embedded:///a?durable=maybe", "write true or false"),
        ("embedded:///a?durable=", "write true or false"),
        ("embedded:///a%00b", "null character"),
    ],
)
def test_what_is_wrong_with_a_connection_string_is_said(text: str, why: str) -> None:
    with pytest.raises(SettingsError, match="connection_string") as caught:
        make_grid(text)
    assert why in str(caught.value)


# -- the default folder -----------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(place, "filesystem_of", lambda path: "ext4")
    app = tmp_path / "app"
    app.mkdir()
    monkeypatch.chdir(app)
    return tmp_path / "state"


def test_the_default_folder_is_private_and_the_working_directorys(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = os.umask(0)
    try:
        folder = default_folder()
    finally:
        os.umask(old)
    assert folder.parent == home / "gridsession"
    assert folder.name.startswith("app-")
    for made in (folder, folder.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert default_folder() == folder
    other = tmp_path / "elsewhere" / "app"
    other.mkdir(parents=True)
    monkeypatch.chdir(other)
    assert default_folder() != folder
    assert default_folder().name.startswith("app-")
    (tmp_path / "link").symlink_to(tmp_path / "app")
    monkeypatch.chdir(tmp_path / "link")
    assert default_folder() == folder


@pytest.fixture
def fallback(home: Path) -> Iterator[Path]:
    """The folder under /var/tmp that is taken when there is none under home."""
    parent = Path(f"/var/tmp/gridsession-{os.geteuid()}")
    there = parent.exists()
    made = parent / default_folder().name
    yield made
    if made.exists():
        made.rmdir()
    if not there and parent.exists():
        parent.rmdir()


def test_a_default_folder_that_others_can_read_is_not_taken(home: Path, fallback: Path) -> None:
    folder = default_folder()
    for folder_of_others in (folder, folder.parent):
        for mode in (0o750, 0o705, 0o710):
            folder_of_others.chmod(mode)
            assert default_folder() == fallback
            folder_of_others.chmod(0o700)
    assert default_folder() == folder


def test_a_default_folder_of_another_user_is_not_taken(
    home: Path, fallback: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = default_folder()
    if os.geteuid() == 0:
        os.chown(folder, 65534, 65534)
        assert default_folder() == fallback
    else:
        real = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
        with pytest.raises(SettingsError, match="not this user's alone"):
            default_folder()


def test_a_link_is_no_default_folder(home: Path, fallback: Path, tmp_path: Path) -> None:
    folder = default_folder()
    folder.rmdir()
    (tmp_path / "of an attacker").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "of an attacker")
    assert default_folder() == fallback


def test_a_home_that_cannot_be_used_is_passed_over(
    home: Path, fallback: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.joinpath("file").write_text("") if home.exists() else None
    for no_home in (str(home / "file" / "below"), "relative/path", "/proc/nowhere"):
        monkeypatch.setenv("XDG_STATE_HOME", no_home)
        assert default_folder() == fallback
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home at all
    assert default_folder() == fallback
    assert os.listdir(".") == []


def test_no_default_folder_at_all_names_what_was_tried(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "filesystem_of", lambda path: "nfs4")
    with pytest.raises(SettingsError, match=r"gridsession.*network.*/var/tmp.*name one"):
        default_folder()


def test_the_default_grid_opens(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "fitting_size", lambda path: 2 * MIB)

    async def run() -> None:
        grid = EmbeddedGrid(Place())
        await grid.open()
        assert str(home) in grid.where
        await grid.close()

    asyncio.run(run())


def test_a_small_disk_gets_a_smaller_store_and_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Usage:
        free = 40 * MIB

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage)
    assert files.fitting_size(tmp_path) == 10 * MIB
    assert "10 MiB instead of 256" in caplog.text
    caplog.clear()
    Usage.free = 4 * DEFAULT_MAX_SIZE
    assert files.fitting_size(tmp_path) == DEFAULT_MAX_SIZE
    assert not caplog.records
    Usage.free = 100
    assert files.fitting_size(tmp_path) == MIB  # which is then refused in words


# -- folders that cannot be used --------------------------------------------------------------


def test_a_path_below_a_file_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def run(path: Path) -> None:
        with pytest.raises(SettingsError, match=f"cannot use {path}: "):
            async with opened(path):
                pass

    asyncio.run(run(tmp_path / "file"))
    asyncio.run(run(tmp_path / "file" / "below"))
    asyncio.run(run(Path("/proc/gridsession")))
    asyncio.run(run(tmp_path / ("long" * 100)))
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_may_not_be_written_is_refused_in_words(tmp_path: Path) -> None:
    """Also for root, who may write anywhere: the child gives that up."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    for parent in folder.parents:
        if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    with Child("hold_open", path=folder, user=65534 if os.geteuid() == 0 else None) as other:
        said = other.says("refused")
        assert said.startswith("SettingsError: connection_string")
        assert f"cannot use {folder}" in said
        assert "Permission denied" in said
    assert os.listdir(folder) == []


# -- file systems -----------------------------------------------------------------------------

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw,nosuid - proc proc rw
30 22 0:40 / /srv rw - nfs4 server:/srv rw
31 30 0:41 / /srv/local rw - xfs /dev/vdb rw
32 22 0:42 / /my\\040disk rw master:3 - btrfs /dev/vdc rw
33 22 0:43 / /tmp rw - tmpfs tmpfs rw
34 33 0:44 / /tmp rw - fuse.sshfs me@there: rw
35 22 0:45 / /tab\\011and\\134slash rw - cifs //server/x rw
36 22 0:46 / /srvother rw shared:9 master:1 - zfs pool rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/", "ext4"),
        ("/home/shop", "ext4"),
        ("/srv", "nfs4"),
        ("/srv/x/y", "nfs4"),
        ("/srv/local", "xfs"),
        ("/srv/local/x", "xfs"),
        ("/srv/localx", "nfs4"),
        ("/srvother/x", "zfs"),
        ("/my disk/x", "btrfs"),
        ("/tmp/x", "fuse.sshfs"),  # mounted over the other
        ("/tab\tand\\slash/x", "cifs"),
    ],
)
def test_the_file_system_of_a_path_is_the_innermost(path: str, expected: str) -> None:
    assert filesystem_of(Path(path), MOUNTS) == expected


def test_where_mounts_cannot_be_read_nothing_is_known() -> None:
    assert filesystem_of(Path("/"), "") == ""
    assert filesystem_of(Path("/proc/self")) == "proc"
    assert not is_network("")


@pytest.mark.parametrize(
    "kind",
    [
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "ceph",
        "glusterfs",
        "lustre",
        "beegfs",
        "gpfs",
        "ocfs2",
        "fuse.sshfs",
        "fuse.s3fs",
        "fuse.glusterfs",
        "fuse.ceph-fuse",
        "fuse.rclone",
    ],
)
def test_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(store, "filesystem_of", lambda path: kind)

    async def run() -> None:
        with pytest.raises(SettingsError, match=f"network file system \\({kind}\\)"):
            async with opened(tmp_path):
                pass

    asyncio.run(run())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs", "overlay", "fuseblk", "f2fs", "btrfs"])
def test_a_local_file_system_is_not_refused(kind: str) -> None:
    assert not is_network(kind)
    assert can_reserve(kind) is (kind != "btrfs")


def test_the_boot_is_a_number_that_fits_and_stays() -> None:
    assert read_boot_id() == read_boot_id()
    assert 0 < read_boot_id() < 1 << 60


# -- a full disk ------------------------------------------------------------------------------


def namespaces() -> list[str]:
    """A command that runs another where it may mount; empty where that is not allowed."""
    command = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    try:
        allowed = subprocess.run([*command, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return []
    return command if allowed.returncode == 0 else []


@pytest.fixture(scope="module")
def under() -> list[str]:
    command = namespaces()
    if not command:
        pytest.skip("no mount namespaces here")
    return command


def test_a_size_that_does_not_fit_is_an_error_at_start(under: list[str], tmp_path: Path) -> None:
    with Child("on_small_disk", under=under, mount=tmp_path, mib=8, size=16 * MIB) as other:
        said = other.says("refused")
        assert "needs 16 MiB reserved" in said
        assert "are free there; make room" in said
        assert "data.mdb" not in other.says("left")
        assert other.says("smaller") == "works"
        other.ends()


@pytest.mark.parametrize("spare", range(0, 300, 20))
def test_however_little_is_missing_nothing_half_made_is_left(
    under: list[str], tmp_path: Path, spare: int
) -> None:
    """Data fit in, and what comes after may not: no reserved file is left without its state."""
    with Child("on_tight_disk", under=under, mount=tmp_path, spare=spare) as other:
        outcome, _, left = other.says("outcome").partition(" ")
        assert outcome in ("opened", "SettingsError")
        assert ("data.mdb" in left) is ("state.json" in left)
        assert "aside" not in left
        assert "fresh" not in left
        assert other.says("then") == "opened"  # once there is room
        assert "aside" not in other.says("left")
        other.ends()


def test_an_open_store_goes_on_when_the_disk_is_full(under: list[str], tmp_path: Path) -> None:
    """A write through the map to a block that is not there kills a process by SIGBUS."""
    with Child("on_full_disk", under=under, mount=tmp_path) as other:
        assert int(other.says("filled")) == 0  # bytes free
        assert int(other.says("commits")) == 3000
        assert other.says("largest") == "works"
        other.says("closed")
        other.ends()
