"""What a source says, and where it says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

PREFIX = "GRIDSESSION_"  # of an option's name where other programs' names stand beside it
CONFIG_VARIABLE = "GRIDSESSION_CONFIG"  # names a file of settings
# Which table of a `Source` an entry is looked for in that an option names.
TABLES = {
    "connection_string_app_setting": "app_settings",
    "connection_string_element": "connection_strings",
}


class Given(NamedTuple):
    """A value that somebody gave.

    Attributes:
        value: as it was given; text where the source knows nothing but text.
        place: where, in the operator's words: `environment variable GRIDSESSION_TIMEOUT`,
            `gridsession.toml: timeout`, `web.config, line 12: sessionState timeout`. Shown in
            errors and by `gridsession doctor`; holds no value. Empty: an argument.
    """

    value: object
    place: str


def options_among(named: Mapping[str, Given]) -> dict[str, Given]:
    """Our options among the names of other programs: `GRIDSESSION_TIMEOUT` is `timeout`."""
    return {
        name.removeprefix(PREFIX).lower(): given
        for name, given in named.items()
        if name.startswith(PREFIX) and name != CONFIG_VARIABLE
    }


@dataclass
class Source:
    """All that one source says.

    Attributes:
        name: what it is, in words: `environment`, `/srv/shop/gridsession.toml`.
        options: by the option's name, in snake_case, whether or not there is such an option.
        app_settings: named values among which a connection string may be looked for.
        connection_strings: the same, of a section for connection strings.
        notes: what was found and cannot be heeded, each with what to do instead, in words and
            without values; they are logged as warnings when the provider starts.
        file: the absolute path of the file that was found or named; empty where it is none.
        unreadable: of `app_settings` and `connection_strings`, those that are there and whose
            entries cannot be read, with why and what to do.
    """

    name: str
    options: dict[str, Given] = field(default_factory=dict)
    app_settings: dict[str, Given] = field(default_factory=dict)
    connection_strings: dict[str, Given] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_shared: bool = False
    is_text: bool = False
    has_tables: bool = True
    file: str = field(default="", compare=False)
    unreadable: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class FrameworkSettings:
    """A framework's own settings, such as Flask's `app.config`.

    Attributes:
        name: how users call it: `app.config`.
        values: by name; `GRIDSESSION_TIMEOUT` is the option `timeout`. Other names are looked at
            only where `connection_string_app_setting` or `connection_string_element` names one.
    """

    name: str
    values: Mapping[str, object]

    def read(self) -> Source:
        everything = {
            key: Given(value, f"{self.name}[{key!r}]")
            for key, value in self.values.items()
            if isinstance(key, str)
        }
        options = options_among(everything)
        return Source(self.name, options, everything, everything, is_shared=True)
