"""The session of a request that asked for none."""

from __future__ import annotations

from typing import Any, NoReturn

from gridsession.errors import SessionNotAvailable
from gridsession.session import Session


class NoSession(Session):
    """What a request has whose access is `none`: whatever it is used for, it raises."""

    def _read(self) -> NoReturn:
        raise SessionNotAvailable

    mark_accessed = _read

    def __getitem__(self, key: str) -> NoReturn:
        raise SessionNotAvailable

    def get(self, key: str, default: Any = None) -> NoReturn:
        raise SessionNotAvailable

    def __contains__(self, key: object) -> NoReturn:
        raise SessionNotAvailable
