"""Which files hold settings."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from gridsession.errors import SettingsError
from gridsession.sources.given import CONFIG_VARIABLE, Source
from gridsession.sources.kinds import is_quoted
from gridsession.sources.toml import mentions_us, read_toml
from gridsession.sources.web_config import read as read_web_config

_TOML, _PROJECT, _WEB_CONFIG = "gridsession.toml", "pyproject.toml", "web.config"


def read_files(
    path: str | os.PathLike[str] | None, environ: Mapping[str, str] | None = None
) -> list[Source]:
    """What files say, the strongest first.

    Args:
        path: the one to read; None for the one that the environment names, else for those that lie
            in the working directory.
        environ: the environment, where `GRIDSESSION_CONFIG` is looked for.

    Raises:
        SettingsError: one cannot be read, or is not what its name says.
    """
    if path is not None:
        return [_read(path)]
    if environ is not None and (named := environ.get(CONFIG_VARIABLE, "").strip()):
        try:
            return [_read(named)]
        except SettingsError as error:
            text = f"{error} (named by environment variable {CONFIG_VARIABLE})"
            raise SettingsError(text, option=error.option) from None
    return _find()


def _read(given: str | os.PathLike[str]) -> Source:
    path = Path(given)
    # Shown as it was given: who named it may not know from which folder it is looked for.
    name = "".join(c if c.isprintable() else "�" for c in os.fspath(given))
    if is_quoted(name):
        raise SettingsError("the name of the file of settings is in quotation marks; remove them")
    if "://" in name:  # a connection string in the wrong place
        name = "a file of settings"
    if path.suffix.lower() == ".toml":
        source = read_toml(path, name)
        if source is None:
            raise SettingsError(f"{name} has no table [tool.gridsession]")
    elif path.suffix.lower() in (".config", ".xml"):
        source = read_web_config(path, name)
    else:
        if not path.name or any(c in name for c in "@=;"):
            name = "a file of settings"
        raise SettingsError(
            f"{name} cannot be used: a file of settings is a TOML file (….toml) or a web.config "
            "(….config, ….xml)"
        )
    source.file = _absolute(path)
    return source


def _absolute(path: Path) -> str:
    try:
        return os.path.abspath(path)
    except OSError:  # where this is, may be hidden from us
        return str(path)


# -- in the working directory -------------------------------------------------------------------


def _find() -> list[Source]:
    """The files that nobody named. Only what is wrong with our own stops anything."""
    about = Source("working directory", has_tables=False)  # for notes about it
    found = []
    own = _read_if_there(_TOML, read_toml, about)
    project = _read_if_there(_PROJECT, lambda path: _read_project(path, about), about)
    if own is not None:
        found.append(own)
        if project is not None:  # which is meant can't be known: the more special is taken whole
            own.notes.append(f"{_PROJECT} has settings too, and they are not used beside {_TOML}")
    elif project is not None:
        found.append(project)
    for name in _web_configs():
        if (source := _read_if_there(name, read_web_config, about)) is not None:
            found.append(source)
            break
    for source in found:
        _note_owner(source)
    return [*found, about] if about.notes else found


def _read_if_there(
    name: str, read: Callable[[Path], Source | None], about: Source
) -> Source | None:
    try:
        # Not Path.is_file(), which from Python 3.14 on does not tell "not there" from "forbidden".
        if not stat.S_ISREG(os.stat(name).st_mode):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        if not os.path.lexists(name):  # otherwise a link to where we may not look: an error
            note = (
                "the working directory cannot be searched, so no file of settings in it is heeded; "
                f"name one by {CONFIG_VARIABLE}, or start in another directory"
            )
            about.notes = [note]
            return None
    if (source := read(Path(name))) is not None:
        source.file = _absolute(Path(name))
    return source


def _read_project(path: Path, about: Source) -> Source | None:
    """The table in a project's file. The file is other programs' too, and often none of ours."""
    try:
        return read_toml(path)
    except SettingsError:
        if (mentioned := mentions_us(path)) is True:
            raise
    what = "cannot be read" if mentioned is None else "is no TOML that can be read"
    about.notes.append(
        f"{path.name} {what}, so its [tool.gridsession], if it has one, is not heeded"
    )
    return None


def _web_configs() -> list[str]:
    """The names of a web.config that may be there; on Windows, case does not count."""
    try:
        names = [name for name in os.listdir() if name.lower() == _WEB_CONFIG]
    except OSError:  # it may be searched and not listed
        names = [_WEB_CONFIG, "Web.config"]
    return sorted(names, key=lambda name: (name != _WEB_CONFIG, name != "Web.config", name))


def _note_owner(source: Source) -> None:
    """Note a file that somebody else put where this program happens to be started."""
    try:
        owners = {os.stat(source.file).st_uid, os.lstat(source.file).st_uid} - {0}
    except OSError:
        return
    if owners and owners != {os.geteuid()}:  # on Windows there are none
        source.notes.append(
            f"{source.name}, found in the working directory, belongs neither to root nor to the "
            "user of this process, and says where sessions are kept: give it to one of them, "
            f"or name the file that is meant by {CONFIG_VARIABLE}"
        )
