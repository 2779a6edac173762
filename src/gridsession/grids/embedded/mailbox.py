"""Bells between processes: UNIX datagrams, one socket for each event loop that waits.

A datagram wakes another process in a seventh of the time that polling each millisecond takes, for
a third of its CPU. The socket's name is what stands in tickets; it is made when somebody first
has to wait, so that requests which find their lock free never make one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from contextvars import Context
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from gridsession.errors import GridUnavailable
from gridsession.grids.bells import Bells

_TOKEN_BYTES = 16
_numbers = count()


def _queue_length() -> int:
    """How many datagrams a socket holds before those that follow are dropped."""
    try:
        return int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return 10


def _sender() -> socket.socket:
    out = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    out.setblocking(False)
    return out


@dataclass(slots=True)
class _Mailbox:
    loop: asyncio.AbstractEventLoop
    socket: socket.socket
    name: str


class SocketBells(Bells):
    """Who waits in this process, and how to ring those who wait in another.

    Args:
        folder: where the sockets lie; the same for all processes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        short = Path(f"/proc/self/fd/{self._folder_fd}")
        self._folder_path = short if short.exists() else folder
        self._mailboxes: dict[asyncio.AbstractEventLoop, _Mailbox] = {}
        self._queue_length = _queue_length()
        self._out = _sender()
        self._sweep()

    def address(self) -> bytes:
        """The bell of the running event loop, made if there is none yet."""
        loop = asyncio.get_running_loop()
        mailbox = self._mailboxes.get(loop)
        if mailbox is None:
            mailbox = self._mailboxes[loop] = self._open(loop)
        return mailbox.name.encode()

    def ring_at(self, address: bytes, token: bytes) -> None:
        """Ring a ticket's bell, wherever it is. Never fails: a lost bell costs a safety poll."""
        name = address.decode()
        # A copy: other threads' loops may come and go meanwhile.
        if any(mailbox.name == name for mailbox in list(self._mailboxes.values())):
            self.ring(token)
            return
        # Nobody there: its process is dead, and its ticket will be passed over. Queue full: it
        # has many datagrams to wake up for, and rings all of its waiters then. Anything else:
        # what was done is done, whether it can be told or not.
        path = self._path(name)
        with contextlib.suppress(OSError):
            try:
                self._out.sendto(token, path)
            except FileNotFoundError:
                if self._follow():
                    self._out.sendto(token, path)
            except BlockingIOError:
                # Or it is our buffer that is full, of what stopped processes do not take.
                self._out.close()
                self._out = _sender()
                self._out.sendto(token, path)

    def keep_up(self) -> None:
        """Touch our sockets: a datagram does not, and old files are removed where it may be."""
        for mailbox in list(self._mailboxes.values()):
            try:
                os.utime(mailbox.name, dir_fd=self._folder_fd)
            except FileNotFoundError:  # nobody can ring it: who waits next makes another
                if mailbox.loop is asyncio.get_running_loop():  # another's is its own to drop
                    self._drop(self._mailboxes.pop(mailbox.loop))
            except OSError:
                continue

    def close(self) -> None:
        for mailbox in self._mailboxes.values():
            self._drop(mailbox)
        self._mailboxes.clear()
        self._out.close()
        os.close(self._folder_fd)

    def forsake(self) -> None:
        """In a forked child: let go of what is the parent's, which goes on using it."""
        for mailbox in self._mailboxes.values():
            mailbox.socket.close()
        self._out.close()
        os.close(self._folder_fd)

    # -- parts ----------------------------------------------------------------------------

    def _open(self, loop: asyncio.AbstractEventLoop) -> _Mailbox:
        for dead in [x for x in list(self._mailboxes) if x.is_closed()]:
            mailbox = self._mailboxes.pop(dead, None)
            if mailbox is not None:  # or another thread was quicker
                self._drop(mailbox)
        name = f"{os.getpid()}.{next(_numbers)}"
        inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            inbox.setblocking(False)
            try:
                inbox.bind(self._path(name))
            except FileNotFoundError:
                self._follow()
                inbox.bind(self._path(name))
        except OSError as error:
            inbox.close()
            raise GridUnavailable(
                f"no socket can be made for those who wait for a session: {error.strerror}"
            ) from error
        mailbox = _Mailbox(loop, inbox, name)
        # A context of its own: the request's that waits first would be kept for ever.
        Context().run(loop.add_reader, inbox.fileno(), self._drain, inbox)
        return mailbox

    def _follow(self) -> bool:
        """To the folder that is there now, if ours was removed; made anew if nobody has done it."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if os.path.samestat(os.fstat(self._folder_fd), os.stat(self._folder)):
            return False
        fd = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.dup2(fd, self._folder_fd, inheritable=False)  # other threads find it at any moment
        finally:
            os.close(fd)
        return True

    def _path(self, name: str) -> str:
        # A socket's address has 107 bytes, and folders may be deep: on Linux this names them short.
        return f"{self._folder_path}/{name}"

    def _drain(self, inbox: socket.socket) -> None:
        came = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                token = inbox.recv(_TOKEN_BYTES)
                came += 1
                self.ring(token)
        if came >= self._queue_length:  # full: others may have been dropped
            self.ring_all()

    def _drop(self, mailbox: _Mailbox) -> None:
        if not mailbox.loop.is_closed():
            mailbox.loop.remove_reader(mailbox.socket.fileno())
        mailbox.socket.close()
        with contextlib.suppress(OSError):  # gone, or a disk that is read-only now
            os.unlink(mailbox.name, dir_fd=self._folder_fd)

    def _sweep(self) -> None:
        """Remove the sockets that dead processes left behind."""
        for name in os.listdir(self._folder_fd):
            try:
                with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
                    probe.connect(self._path(name))
            except ConnectionRefusedError:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._folder_fd)
            except OSError:
                continue  # gone meanwhile, or not ours to judge
