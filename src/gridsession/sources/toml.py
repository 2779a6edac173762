"""Settings from TOML: `gridsession.toml`, or `[tool.gridsession]` in `pyproject.toml`."""

from __future__ import annotations

import tomllib
from pathlib import Path

from gridsession.errors import SettingsError
from gridsession.sources.given import Given, Source

_TABLES = ("app_settings", "connection_strings")
_MOST_BYTES = 1 << 20


def read_toml(path: Path) -> Source | None:
    """What a TOML file says: options as keys, and the tables `app_settings` and
    `connection_strings`; in a `pyproject.toml` all of it inside of `[tool.gridsession]`.

    Returns:
        None where a `pyproject.toml` has no such table.

    Raises:
        SettingsError: the file cannot be read, or is no TOML; says where.
    """
    table = _parse(path)
    prefix = ""
    if path.name == "pyproject.toml":
        tool = table.get("tool")
        if not isinstance(tool, dict) or "gridsession" not in tool:
            return None
        table = tool["gridsession"]
        prefix = "tool.gridsession."
        if not isinstance(table, dict):
            raise SettingsError(f"{path.name}: tool.gridsession must be a table")
    source = Source(path.name)
    for name, value in table.items():
        place = f"{path.name}: {prefix}{name}"
        if name not in _TABLES:
            source.options[name] = Given(value, place)
        elif isinstance(value, dict):
            named = {key: Given(entry, f"{place}.{key}") for key, entry in value.items()}
            getattr(source, name).update(named)
        else:
            raise SettingsError(f"{place} must be a table")
    return source


def _parse(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path.name} cannot be read: {error.strerror}") from None
    if len(data) > _MOST_BYTES:
        raise SettingsError(f"{path.name} is larger than {_MOST_BYTES >> 20} MiB")
    try:
        return tomllib.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path.name} is not UTF-8, at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{path.name} is no TOML: {_without_values(error)}") from None
    except RecursionError:
        raise SettingsError(f"{path.name} is nested too deeply") from None


def _without_values(error: tomllib.TOMLDecodeError) -> str:
    """Where it failed, without what stands there: that may be a part of a password."""
    text = str(error)
    at = text.rfind("(at ")
    return text[at:].strip("()") if at >= 0 else "it ends too early"
