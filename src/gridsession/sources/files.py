"""Which files hold settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from gridsession.errors import SettingsError
from gridsession.sources.given import Source
from gridsession.sources.toml import read_toml
from gridsession.sources.web_config import read as read_web_config

_TOML = ("gridsession.toml", "pyproject.toml")
_WEB_CONFIG = ("web.config", "Web.config")


def read_files(path: str | os.PathLike[str] | None) -> list[Source]:
    """What files say, the strongest first.

    Args:
        path: the one to read; None for those that lie in the working directory.

    Raises:
        SettingsError: one cannot be read, or is not what its name says.
    """
    if path is not None:
        return [_read(Path(path))]
    found = [source for name in _TOML if (source := _read_if_there(name, read_toml)) is not None]
    if len(found) > 1:  # which one is meant can't be known, so the more special one is taken whole
        found[0].notes.append(
            f"{found[1].name} has settings too, and they are not used beside {found[0].name}"
        )
    del found[1:]
    for name in _WEB_CONFIG:
        if (source := _read_if_there(name, read_web_config)) is not None:
            return [*found, source]
    return found


def _read(path: Path) -> Source:
    if path.suffix.lower() == ".toml":
        source = read_toml(path)
        if source is None:
            raise SettingsError(f"{path.name} has no table [tool.gridsession]")
        return source
    if path.suffix.lower() in (".config", ".xml"):
        return read_web_config(path)
    raise SettingsError(
        f"{path.name or 'a file of settings without name'} cannot be used: a file of settings is a "
        "TOML file (….toml) or a web.config (….config, ….xml)"
    )


def _read_if_there(name: str, read: Callable[[Path], Source | None]) -> Source | None:
    path = Path(name)
    return read(path) if path.is_file() else None
