"""Where an embedded grid lies: connection string, default folder, and what is no place for it."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from gridsession.errors import SettingsError

DEFAULT_MAX_SIZE = 256 << 20  # bytes; about 100,000 sessions of 1 KiB
MIN_SIZE = 1 << 20  # bytes; below, the reserve for releases would be a page or two
MAX_SIZE = 1 << 46  # bytes; half of what a process can map
PAGE = 4096
_SIZE = re.compile(r"(\d+)\s*(B|KB|MB|GB|TB|KIB|MIB|GIB|TIB)?", re.IGNORECASE)
_UNITS: dict[str, int] = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", 1)
    for suffix, base in (("B", 1000), ("IB", 1024))
}
# No file locks that hold between machines, or none at all, and maps that are not coherent.
_NETWORK = re.compile(
    r"nfs\d?|cifs|smb\w*|9p|afs|ceph|glusterfs|lustre|beegfs|gpfs|ocfs2|gfs2|ncpfs|coda|"
    r"fuse\.(sshfs|s3fs|glusterfs|ceph\S*|rclone|gcsfuse|blobfuse\S*|juicefs|davfs\S*|curlftpfs)"
)
# Copy on write: a block that is overwritten needs a new one, so reserving blocks reserves nothing.
_COPY_ON_WRITE = {"btrfs", "zfs", "bcachefs"}
_OPTIONS = ("max_size", "durable")


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
        url = urlsplit(connection_string)
        if url.netloc or url.fragment or (url.path and not url.path.startswith("/")):
            raise SettingsError(
                "connection_string: an embedded grid lies under an absolute path, with three "
                "slashes: embedded:///var/lib/shop/sessions"
            )
        if "\0" in unquote(url.path):
            raise SettingsError("connection_string: a path cannot have a null character")
        options = dict(parse_qsl(url.query, keep_blank_values=True))
        for name in options:
            if name not in _OPTIONS:
                raise SettingsError(
                    f"connection_string: embedded: has no option {name!r}; "
                    f"there are: {', '.join(_OPTIONS)}"
                )
        size = options.get("max_size")
        return cls(
            Path(unquote(url.path)) if url.path.strip("/") else None,
            None if size is None else _parse_size(size),
            _parse_bool(options.get("durable", "false")),
        )


def _parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise SettingsError(
            f"connection_string: max_size={text!r} is no size; write 512MiB or 2GiB"
        )
    size = int(match[1]) * _UNITS[(match[2] or "").upper()]
    if size < MIN_SIZE:
        raise SettingsError(f"connection_string: max_size={text!r} is too small; use 1MiB or more")
    if size > MAX_SIZE:
        raise SettingsError(f"connection_string: max_size={text!r} is too large for a file")
    return -(-size // PAGE) * PAGE


def _parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise SettingsError(f"connection_string: durable={text!r}: write true or false")


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
