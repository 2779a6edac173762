"""Server-side session state for Python web farms: locked, shared, nothing lost."""

from gridsession.access import Access
from gridsession.changes import ABSENT
from gridsession.errors import (
    GridFull,
    GridUnavailable,
    SessionClosed,
    SessionEncryptionError,
    SessionError,
    SessionFormatError,
    SessionGone,
    SessionLockLost,
    SessionLockTimeout,
    SessionNotAvailable,
    SessionQueueFull,
    SessionReadOnly,
    SessionReplaced,
    SessionTooLarge,
    SessionTypeError,
    SettingsError,
)
from gridsession.payload import register_type
from gridsession.provider import SessionProvider
from gridsession.session import Session
from gridsession.settings import SessionSettings

__all__ = [
    "ABSENT",
    "Access",
    "GridFull",
    "GridUnavailable",
    "Session",
    "SessionClosed",
    "SessionEncryptionError",
    "SessionError",
    "SessionFormatError",
    "SessionGone",
    "SessionLockLost",
    "SessionLockTimeout",
    "SessionNotAvailable",
    "SessionProvider",
    "SessionQueueFull",
    "SessionReadOnly",
    "SessionReplaced",
    "SessionSettings",
    "SessionTooLarge",
    "SessionTypeError",
    "SettingsError",
    "register_type",
]
