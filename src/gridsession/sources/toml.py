"""Settings from TOML: `gridsession.toml`, or `[tool.gridsession]` in `pyproject.toml`."""

from __future__ import annotations

import tomllib
from pathlib import Path

from gridsession.errors import SettingsError
from gridsession.sources.given import TABLES, Given, Source

_MOST_BYTES = 1 << 20


def read_toml(path: Path, name: str = "") -> Source | None:
    """What a TOML file says: options as keys, and the tables `app_settings` and
    `connection_strings`; in a `pyproject.toml` all of it inside of `[tool.gridsession]`.

    Args:
        path: the file.
        name: how places and errors call it; its base name by default.

    Returns:
        None where a `pyproject.toml` has no such table.

    Raises:
        SettingsError: the file cannot be read, or is no TOML; says where.
    """
    file = name or path.name
    table = _parse(path, file)
    prefix = ""
    tool = table.get("tool")
    if path.name == "pyproject.toml":
        if not isinstance(tool, dict) or "gridsession" not in tool:
            return None
        table = tool["gridsession"]
        prefix = "tool.gridsession."
        if not isinstance(table, dict):
            raise SettingsError(f"{file}: tool.gridsession must be a table")
    elif isinstance(tool, dict) and "gridsession" in tool:
        raise SettingsError(
            f"{file}: [tool.gridsession] is for pyproject.toml; leave that line out, and let the "
            "options stand at the top of this file"
        )
    source = Source(file)
    for key, value in table.items():
        place = f"{file}: {prefix}{key}"
        if key not in TABLES.values():
            source.options[key] = Given(value, place)
        elif isinstance(value, dict):
            named = {entry: Given(given, f"{place}.{entry}") for entry, given in value.items()}
            getattr(source, key).update(named)
        else:
            raise SettingsError(f"{place} must be a table")
    return source


def mentions_us(path: Path) -> bool | None:
    """Whether `gridsession` stands in a file, be it TOML or not; None where it cannot be read."""
    try:
        with path.open("rb") as file:
            return b"gridsession" in file.read(_MOST_BYTES)
    except OSError:
        return None


def _parse(path: Path, name: str) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        reason = getattr(error, "strerror", None) or "no usable file name"
        raise SettingsError(f"{name} cannot be read: {reason}") from None
    if len(data) > _MOST_BYTES:
        raise SettingsError(f"{name} is larger than {_MOST_BYTES >> 20} MiB")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name} is not UTF-8, at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{name} is no TOML: {_without_values(error)}") from None
    except RecursionError:
        raise SettingsError(f"{name} is nested too deeply") from None


def _without_values(error: tomllib.TOMLDecodeError) -> str:
    """Where it failed, without what stands there: that may be a part of a password."""
    text = str(error)
    at = text.rfind("(at ")
    return text[at:].strip("()") if at >= 0 else "it ends too early"
