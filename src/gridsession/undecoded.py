"""What stands in a session's slot until its value is asked for."""

from __future__ import annotations

from typing import Any, NoReturn


class Undecoded:
    """A value that nobody has asked for. Not serializable, on purpose: C code that reads a dict's
    slots past the session finds this, and raises, instead of taking it for data.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "<not decoded: use dict(session)>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("an undecoded session value was read past the session; use dict(session)")


UNDECODED: Any = Undecoded()
# Pydantic hands unknown objects through unseen, in Python mode; this is no serializer: it raises.
Undecoded.__pydantic_serializer__ = UNDECODED  # type: ignore[attr-defined]
