"""One class for each decision that a caller makes; a class's docstring is its default message.

No message ever holds a session id, a payload, a password or a request's whole path: logs and error
pages show these texts. A record is named by the first digits of its key, a lock by its holder.
"""

from __future__ import annotations

import inspect


class SessionError(Exception):
    """A session could not be used as asked."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.getdoc(type(self)) or type(self).__name__)


# -- before a handler ran: the same request may succeed a moment later ------------------------


class GridUnavailable(SessionError):
    """The grid did not answer; nothing is known of the session, nor whether a change arrived."""

    never_asked = False  # the grid is known to be away and the call never left: nothing to undo


class GridFull(SessionError):
    """The grid has no room for more session data; what is stored already stays."""


class SessionLockTimeout(SessionError):
    """Another request held this session's lock for longer than this one was ready to wait."""


class SessionQueueFull(SessionError):
    """Too many requests wait for this session already."""


class SessionReplaced(SessionError):
    """This request came with a session id that a change of user has just replaced."""


# -- at commit: the handler's work was not stored ---------------------------------------------


class SessionLockLost(SessionError):
    """Another request took the lock over before this one committed; nothing was stored."""


class SessionGone(SessionError):
    """The session ended, or expired, before this request committed; nothing was stored."""


class SessionTooLarge(SessionError):
    """The session's data is larger than max_payload_bytes; nothing was stored."""


class SessionTypeError(SessionError, TypeError):
    """A value of the session is of no type that a session can hold; nothing was stored."""


# -- in a handler: the session was used against its access ------------------------------------


class SessionReadOnly(SessionError):
    """This request reads its session only; open it with access "exclusive" to change it."""


class SessionClosed(SessionError):
    """The session was committed and unlocked already; change it inside `session.exclusive()`."""


class SessionNotAvailable(SessionError):
    """This path asked for no session: its access is "none"."""


# -- what cannot heal by itself ----------------------------------------------------------------


class SessionFormatError(SessionError):
    """The stored bytes are of no format that this release reads; they were left as they are."""


class SessionEncryptionError(SessionFormatError):
    """The stored bytes do not open with the encryption_keys here; they were left as they are."""


class SettingsError(SessionError, ValueError):
    """A setting cannot be used."""

    def __init__(self, message: str | None = None, *, option: str | None = None) -> None:
        super().__init__(message)
        self.option = option  # its name, where it is one that is wrong: who loaded it knows whence
