"""The types that an application registers, process-wide."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable
from enum import Enum, Flag
from typing import Any, Final, NamedTuple, TypeVar

from gridsession.valuetypes.builtin import BUILT_IN, DISGUISED

T = TypeVar("T")

MAX_NAME_LENGTH: Final = 100  # characters; it is stored with every object


class Registration(NamedTuple):
    """How one class of an application is stored, under which name."""

    name: str
    cls: type
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


BY_CLASS: Final[dict[type, Registration]] = {}
BY_NAME: Final[dict[str, Registration]] = {}
_registering = threading.Lock()


def register_type(
    cls: type[T],
    *,
    name: str | None = None,
    encode: Callable[[T], Any] | None = None,
    decode: Callable[[Any], T] | None = None,
) -> type[T]:
    """Let sessions hold objects of `cls`, in this process, from now on. Returns `cls`.

    `name` is what is stored beside each object, and what finds the class again: it must stay the
    same for as long as sessions live. Default: `cls.__qualname__`, so that moving the class to
    another module breaks nothing, but renaming it does; give a name of your own ("shop.cart") to
    be free of both. `encode` turns an object into any session value (a dict, a list, other
    registered types), always into the same one for an equal object; `decode` gets that value back
    and must return an object of exactly `cls`. Both must have no effects: they may run twice.

    An Enum needs neither: its members are stored by name. A dataclass needs neither: it is stored
    as its fields and made again by `cls(**fields)`. Subclasses are not included: register each.

    Raises TypeError when `cls` cannot be registered or lacks a codec, ValueError when `name` is
    taken by another class, or `cls` has another name already. The same class again, or the one
    that a module reload made of it (same module and qualified name), replaces the earlier.
    """
    if not isinstance(cls, type):
        raise TypeError(f"register_type takes a class, not an object of type {type(cls).__name__}")
    if cls in BUILT_IN or cls in DISGUISED:
        why = "sessions hold it already" if cls in BUILT_IN else "use bytes"
        raise TypeError(f"{cls.__qualname__} cannot be registered: {why}")
    if encode is None and decode is None:
        encode, decode = _derived_codec(cls)
    if encode is None or decode is None:
        raise TypeError(f"register_type({cls.__qualname__}, …) needs encode= and decode=")
    if name is None:
        name = cls.__qualname__
        if "<" in name:
            raise ValueError(f"{name} is local to a function: give it a name that lasts, name=…")
    if (
        not isinstance(name, str)
        or not name
        or len(name) > MAX_NAME_LENGTH
        or not name.isprintable()
    ):
        raise ValueError(
            f"the name of a registered type is 1 to {MAX_NAME_LENGTH} printable characters"
        )
    with _registering:
        taken, earlier = BY_NAME.get(name), BY_CLASS.get(cls)
        if taken is not None and _address(taken.cls) != _address(cls):
            raise ValueError(
                f"the name {name!r} is taken by {_address(taken.cls)}: "
                f"give {_address(cls)} another, name=…"
            )
        if earlier is not None and earlier.name != name:
            raise ValueError(f"{_address(cls)} is registered already, as {earlier.name!r}")
        BY_NAME[name] = BY_CLASS[cls] = Registration(name, cls, encode, decode)
    return cls


def _address(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _derived_codec(cls: type) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """The codec of an Enum or a dataclass; TypeError for what has none."""
    title = cls.__qualname__
    if issubclass(cls, Flag):
        raise TypeError(
            f"{title} is a Flag, whose combinations have no name; "
            f"give encode=lambda flags: flags.value, decode={title}"
        )
    if issubclass(cls, Enum):
        return (lambda member: member.name), (lambda stored: cls[stored])
    if "__dataclass_fields__" not in cls.__dict__:
        raise TypeError(f"register_type({title}, …) needs encode= and decode=")
    if issubclass(cls, tuple(BUILT_IN)):
        raise TypeError(f"{title} is more than its fields; give encode= and decode=")
    declared = dataclasses.fields(cls)  # type: ignore[arg-type]
    fields = tuple(field.name for field in declared)
    if late := [field.name for field in declared if not field.init]:
        raise TypeError(
            f"{title} has fields with init=False ({', '.join(late)}); give encode= and decode="
        )
    parameters = inspect.signature(cls).parameters
    missing = [
        parameter.name
        for parameter in parameters.values()
        if parameter.name not in fields and parameter.default is parameter.empty
    ]
    if missing or not set(fields) <= set(parameters):
        raise TypeError(f"{title} cannot be made of its fields alone; give encode= and decode=")
    return (
        lambda value: {field: getattr(value, field) for field in fields},
        lambda stored: cls(**stored),
    )
