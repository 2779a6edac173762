"""Where an embedded grid lies: connection string, default folder, and what is no place for it."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from gridsession.errors import SettingsError
from gridsession.sources.connection_string import EmbeddedAddress, parse

DEFAULT_MAX_SIZE = 256 << 20  # bytes; about 100,000 sessions of 1 KiB
# No file locks that hold between machines, or none at all, and maps that are not coherent.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|ceph|glusterfs|lustre|beegfs|gpfs|ocfs2|gfs2|ncpfs|coda|"
    r"fuse\.(sshfs|s3fs|glusterfs|ceph\S*|rclone|gcsfuse|blobfuse\S*|juicefs|davfs\S*|curlftpfs)"
)
# Copy on write: a block that is overwritten needs a new one, so reserving blocks reserves nothing.
_COPY_ON_WRITE = {"btrfs", "zfs", "bcachefs"}


@dataclass(frozen=True)
class Place:
    """What a connection string says.

    Attributes:
        path: the folder; None for the default one.
        max_size: bytes of the file, a whole number of pages; None for the default size.
        durable: every commit is on disk before it is answered.
    """

    path: Path | None = None
    max_size: int | None = None
    durable: bool = False

    @classmethod
    def parse(cls, connection_string: str) -> Place:
        """From `embedded:` or `embedded:///path?max_size=512MiB&durable=true`.

        Raises:
            SettingsError: says which part is wrong.
        """
        address = parse(connection_string)
        assert isinstance(address, EmbeddedAddress)
        path = address.path
        try:
            (path or "").encode()
        except UnicodeEncodeError:
            raise SettingsError(
                "connection_string: the path of an embedded grid must be UTF-8"
            ) from None
        return cls(None if path is None else Path(path), address.max_size, address.durable)


def default_folder() -> Path:
    """A folder of this user's and this working directory's, on disk, readable by nobody else.

    Raises:
        SettingsError: there is no place for it.
    """
    cwd = os.path.realpath(os.getcwd())
    name = re.sub(r"[^A-Za-z0-9._-]", "-", os.path.basename(cwd) or "root")[:40]
    leaf = f"{name}-{sha256(os.fsencode(cwd)).hexdigest()[:12]}"
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    tried = []
    for parent in (Path(home) / "gridsession", Path(f"/var/tmp/gridsession-{os.geteuid()}")):
        folder = parent / leaf
        try:
            if not parent.is_absolute():  # no home, or an XDG_STATE_HOME to be ignored
                raise OSError("it is no absolute path")
            parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder.mkdir(mode=0o700, exist_ok=True)
            if is_network(filesystem_of(folder)):
                raise OSError("it is on a network file system")
            for place in (parent, folder):
                _check_private(place)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise OSError("it cannot be written to")
        except OSError as error:
            tried.append(f"{folder}: {error.strerror or error}")
        else:
            return folder
    raise SettingsError(
        "connection_string: the embedded grid finds no folder of its own ("
        + "; ".join(tried)
        + "); name one: embedded:///path"
    )


def _check_private(folder: Path) -> None:
    there = folder.lstat()
    if not os.path.isdir(folder) or there.st_uid != os.geteuid() or there.st_mode & 0o077:
        raise OSError("it is not this user's alone (mode 0700)")


def filesystem_of(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that a path lies on; empty where that can't be told.

    Args:
        path: of something that exists.
        mounts: the text of /proc/self/mountinfo; read when None.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    real = os.path.realpath(path)
    best, kind = -1, ""
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        fields, after = left.split(" "), right.split(" ")
        if len(fields) < 5 or not after[0]:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields[4]).rstrip("/")
        if (real == point or real.startswith(point + "/")) and len(point) >= best:
            best, kind = len(point), after[0]
    return kind


def is_network(filesystem: str) -> bool:
    return _NETWORK.fullmatch(filesystem) is not None


def can_reserve(filesystem: str) -> bool:
    """Whether blocks reserved once stay reserved when they are overwritten."""
    return filesystem not in _COPY_ON_WRITE


def read_boot_id() -> int:
    """A number of this boot of the operating system.

    Raises:
        SettingsError: this system does not tell.
    """
    kernel = Path("/proc/sys/kernel/random/boot_id")
    command = Path("/usr/sbin/sysctl")  # macOS
    if kernel.exists():
        text = kernel.read_text(encoding="ascii")
    elif command.exists():
        asked = [str(command), "-n", "kern.bootsessionuuid"]
        text = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    else:
        raise SettingsError(
            "connection_string: an embedded grid cannot tell one boot of this system from the "
            "next, so it would read what a crash left; use memory://"
        )
    return int(text.strip().replace("-", "")[:15], 16)  # 60 bits fit any integer that is stored
