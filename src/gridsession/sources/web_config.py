"""Settings from the web.config of an ASP.NET application, as it is.

Sections that are other programs' are passed over. In those that concern sessions nothing is: what
cannot be heeded is a note, or an error where the application would go wrong without it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from gridsession.errors import SettingsError
from gridsession.sources import web_config_sections as sections
from gridsession.sources.given import TABLES, Given, Source
from gridsession.sources.web_config_session import session_state
from gridsession.sources.web_config_values import (
    ANOTHER_FILE,
    Reading,
    did_you_mean,
    place,
    shown,
)
from gridsession.sources.xml import MAX_BYTES, Element, parse

_TOP, _SYSTEM_WEB, _WEB_SERVER = "configuration", "system.web", "system.webServer"
_HOMES = {  # where each section is
    "appSettings": _TOP,
    "connectionStrings": _TOP,
    "sessionState": _SYSTEM_WEB,
    "httpRuntime": _SYSTEM_WEB,
    "httpCookies": _SYSTEM_WEB,
    "pages": _SYSTEM_WEB,
    "httpModules": _SYSTEM_WEB,  # of IIS's classic mode
    "modules": _WEB_SERVER,
}
_ROOTS = (
    _TOP,
    _SYSTEM_WEB,
    _WEB_SERVER,
    "sessionState",
    "modules",
    "appSettings",
    "connectionStrings",
)
_TABLES = {"appSettings": "app_settings", "connectionStrings": "connection_strings"}
_PLAIN_PATH = re.compile(r"[A-Za-z0-9._~/-]{1,60}")  # what may stand in a line of the log


def read(path: Path, name: str = "") -> Source:
    """What a web.config says about sessions.

    The root may be one of the sections alone, as documentation shows them.

    Args:
        path: the file. Others that it names are looked for from its folder.
        name: how places and errors call it; its base name by default.

    Returns:
        Options, entries for connection strings, and notes of what is not heeded.

    Raises:
        SettingsError: the file or one that it names cannot be read or is no XML, a section is
            encrypted that holds more than entries for connection strings, or a setting has a
            value that it cannot have; says where, and shows no value.
    """
    name = name or path.name or str(path)
    root = _load(path, name)
    reading = Reading(name)
    found = _Found()
    _look_through(reading, root, found)
    own = {
        tag: resolved
        for tag, section in found.sections.items()
        if (resolved := _resolved(reading, path, section)) is not None
    }
    if (section := own.get("appSettings")) is not None:
        sections.app_settings(reading, [section, *_other_file(reading, path, section)])
    if (section := own.get("connectionStrings")) is not None:
        sections.connection_strings(reading, section)
    if (session := own.get("sessionState")) is not None:
        session_state(reading, session)
    if (section := own.get("httpRuntime")) is not None:
        sections.http_runtime(reading, section)
    if (section := own.get("httpCookies")) is not None:
        sections.http_cookies(reading, section, session)
    if (section := own.get("pages")) is not None:
        sections.pages(reading, section)
    for tag in ("httpModules", "modules"):
        if (section := own.get(tag)) is not None:
            sections.modules(reading, section)
    for location in found.locations:
        _note_location(reading, location)
    _spell_as_entries(reading.source)
    return reading.source


# -- finding the sections --------------------------------------------------------------------------


@dataclass
class _Found:
    """What a file has of what concerns sessions.

    Attributes:
        sections: those for the whole application, by tag.
        locations: `location` elements for a part of it.
    """

    sections: dict[str, Element] = field(default_factory=dict)
    locations: list[Element] = field(default_factory=list)


def _look_through(reading: Reading, root: Element, found: _Found) -> None:
    if root.tag not in _ROOTS:
        raise SettingsError(
            f"{place(root)}: this is no web.config: its root must be one of {', '.join(_ROOTS)}"
            + did_you_mean(root.tag, _ROOTS)
        )
    if root.tag in _HOMES:
        found.sections[root.tag] = root
        return
    _look_into(reading, root, root.tag, found)


def _look_into(reading: Reading, parent: Element, home: str, found: _Found) -> None:
    """The sections in an element that is `home`, or a `location` in its place."""
    known = [tag for tag, where in _HOMES.items() if where == home]
    if home == _TOP:
        known += [_SYSTEM_WEB, _WEB_SERVER, "location"]
    for child in parent.children:
        if child.tag == "location" and home == _TOP:
            if _path_of(child) in ("", "."):  # the whole application, said in another way
                _look_into(reading, child, home, found)
            else:
                found.locations.append(child)
        elif child.tag in (_SYSTEM_WEB, _WEB_SERVER) and home == _TOP:
            _look_into(reading, child, child.tag, found)
        elif child.tag in known:
            if (first := found.sections.setdefault(child.tag, child)) is not child:
                raise SettingsError(
                    f"{place(child)}: {child.tag} is there twice, first on line {first.line}; "
                    "a section stands once"
                )
        else:
            _note_misplaced(reading, child, known)


def _note_misplaced(reading: Reading, element: Element, known: list[str]) -> None:
    """Note what is meant for a section of ours; anything else belongs to another program."""
    lower = element.tag.lower()
    where = f"{place(element)}: {shown(element.tag)}"
    if meant := next((tag for tag in known if tag.lower() == lower), None):
        reading.note(where, f"there is no such element; did you mean {meant}?")
    elif lower == "sessionstate":
        reading.note(where, f"it is passed over: sessionState belongs into {_SYSTEM_WEB}")


def _path_of(location: Element) -> str:
    path = next((v for k, v in location.attributes.items() if k.lower() == "path"), "")
    return path.strip()


def _note_location(reading: Reading, location: Element) -> None:
    """Note what is said for one path only: that is for path rules here."""
    found = _Found()
    _look_into(reading, location, _TOP, found)
    noted = len(reading.source.notes)
    for tag, section in found.sections.items():
        where = f"{place(section)}: {tag} inside of location"
        use = sections.use_of(section) if tag == "pages" else None
        if tag == "sessionState":
            use = "none" if section.attributes.get("mode") == "Off" else "…"
        if use is not None:
            rule = f'access = {{"{_rule(location)}": "{use}"}}'
            reading.note(where, f"write a path rule for it: {rule} (in TOML, = for the colon)")
        elif tag == "pages" or not _concerns_sessions(section):
            continue  # as outside of a location
        else:
            reading.note(where, "it holds for the whole application here; set it outside")
    if len(reading.source.notes) > noted:
        known = ("path", "allowOverride", "inheritInChildApplications", "overrideMode")
        reading.check_names(location, "location", known)


def _concerns_sessions(section: Element) -> bool:
    if section.tag == "httpRuntime":
        return "executionTimeout" in section.attributes
    if section.tag in ("modules", "httpModules"):
        names = [child.attributes.get("name", "").lower() for child in section.children]
        return "session" in names
    return True


def _rule(location: Element) -> str:
    """The path rule for what a location covers."""
    path = _path_of(location).strip("/")
    if not _PLAIN_PATH.fullmatch(path):
        return "/path/*"
    return f"/{path}" if "." in path.rpartition("/")[2] else f"/{path}/*"  # a file, a folder


# -- files ----------------------------------------------------------------------------------------


def _load(path: Path, name: str) -> Element:
    try:
        if path.is_dir():
            reason = "is a folder; name the web.config in it"
        else:
            with path.open("rb") as file:
                return parse(file.read(MAX_BYTES + 1), name)
    except SettingsError:
        raise
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        reason = f"cannot be read: {getattr(error, 'strerror', None) or 'no usable file name'}"
    raise SettingsError(f"{name} {reason}")


def _resolved(reading: Reading, web_config: Path, section: Element) -> Element | None:
    """The element that holds a section's settings: itself, or the root of its configSource.

    Returns:
        None where it is encrypted and nothing more than noted.
    """
    if _is_encrypted(reading, section):
        return None
    source = section.attributes.pop("configSource", "")
    if not source:
        return section
    where = f"{place(section)}: {section.tag} configSource"
    if section.attributes or section.children:
        reading.note(where, "what stands beside it is passed over: the other file replaces it")
    path = _beside(web_config, source)
    folder = web_config.parent
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):  # links in a circle, a name too long
        inside = False
    if not inside:
        raise SettingsError(f"{where}: it must name a file in the folder of {web_config.name}")
    if not _is_file(path):
        raise SettingsError(f"{where}: there is no such file; upper and lower case differ here")
    root = _root_of(path, section, where)
    if _is_encrypted(reading, root):
        return None
    if root.attributes.get("configSource"):
        raise SettingsError(f"{place(root)}: {root.tag} configSource: it stands in one file only")
    return root


def _other_file(reading: Reading, web_config: Path, section: Element) -> list[Element]:
    """The root of what appSettings names as its `file`, if there is one."""
    if not (name := section.attributes.pop("file", "")):
        return []
    where = f"{place(section)}: appSettings file"
    path = _beside(web_config, name)
    if not _is_file(path):
        reading.note(where, "there is no such file; upper and lower case differ here")
        return []
    root = _root_of(path, section, where)
    if _is_encrypted(reading, root):
        return []
    for attribute in ("configSource", "file"):
        if root.attributes.pop(attribute, ""):
            reading.note(
                f"{place(root)}: appSettings {attribute}", "it is passed over in this file"
            )
    return [root]


def _root_of(path: Path, section: Element, where: str) -> Element:
    root = _load(path, path.name)
    if root.tag != section.tag:
        raise SettingsError(f"{where}: the root of that file must be {section.tag}")
    return root


def _beside(web_config: Path, name: str) -> Path:
    return web_config.parent / name.strip().replace("\\", "/")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long
        return False


def _is_encrypted(reading: Reading, section: Element) -> bool:
    """Whether nothing in a section can be read; noted where that may well be none of ours.

    Most encrypted sections hold the passwords of databases. Whether the connection string is among
    them is known when it is looked for.
    """
    encrypted = any(child.tag == "EncryptedData" for child in section.children)
    if not encrypted and "configProtectionProvider" not in section.attributes:
        return False
    where = f"{place(section)}: {section.tag}"
    what = "is encrypted, for a key of the machine that wrote it"
    cure = (
        "decrypt it there (aspnet_regiis -pd), or give the connection string by the environment "
        "variable GRIDSESSION_CONNECTION_STRING"
    )
    if (table := _TABLES.get(section.tag)) is None:
        raise SettingsError(
            f"{where} {what}: decrypt it there (aspnet_regiis -pd), or leave it out and set its "
            "options elsewhere (the connection string by the environment variable "
            f"GRIDSESSION_CONNECTION_STRING); if this file is to stay as it is, {ANOTHER_FILE}"
        )
    reading.source.unreadable[table] = f"{where} {what}: {cure}"
    reading.note(
        where, f"it {what}, so nothing in it is heeded; if it holds settings of sessions, {cure}"
    )
    return True


def _spell_as_entries(source: Source) -> None:
    """Spell the name of the connection string's entry as the entry does: cases are one there."""
    for option, table in TABLES.items():
        entries: dict[str, Given] = getattr(source, table)
        if (given := source.options.get(option)) is None or given.value in entries:
            continue
        name = str(given.value).lower()
        same = [entry for entry in entries if entry.lower() == name]
        if same:
            source.options[option] = Given(same[0], given.place)
