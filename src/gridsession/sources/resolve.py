"""Which source wins, option by option, and where the connection string is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from gridsession.errors import SettingsError
from gridsession.sources.given import TABLES, Given, Source
from gridsession.sources.kinds import Kind, checked, is_quoted, shown, wrong

# The first is the connection string itself, the others name the place that holds it.
_STRING, _VARIABLE, *_ = LOCATIONS = (
    "connection_string",
    "connection_string_environment_variable",
    *TABLES,
)
# What Kubernetes and Docker set for a service, here with the underscore that ends our prefix.
_OF_A_SERVICE = re.compile(r".*_(port|service_host|service_port|service_port_.+|port_[0-9]+_.+)")
_SLIP = 0.85  # likeness to an option's name from which on another name is a slip


def resolve(
    sources: Sequence[Source], kinds: Mapping[str, Kind], environ: Mapping[str, str]
) -> tuple[dict[str, Given], list[str]]:
    """The options as the strongest source gives each, checked, with what an operator should know.

    Args:
        sources: the strongest first.
        kinds: the options that there are.
        environ: where an environment variable is looked for.

    Raises:
        SettingsError: a value is of the wrong kind, there is no such option, or the connection
            string is in two places or in none; names the option and the place.
    """
    notes = [note for source in sources for note in source.notes]
    values: dict[str, Given] = {}
    for source in sources:
        for name, given in source.options.items():
            if name in kinds:
                value = _checked(kinds[name], name, given, is_text=source.is_text)
                values.setdefault(name, Given(value, given.place))
            elif name not in LOCATIONS:
                notes += _unknown(name, given, source, [*kinds, *LOCATIONS[1:]])
    located = _locate(sources, environ)
    if located is not None:
        values[_STRING] = located
    return values, notes


def _checked(kind: Kind, name: str, given: Given, *, is_text: bool) -> object:
    value, place = given
    if is_text and isinstance(value, str):
        value = value.strip()
        if is_quoted(value):
            error = SettingsError(
                f"{name} cannot be used: it stands in quotation marks, which are part of the value "
                "(docker --env-file keeps them); remove the quotes",
                option=name,
            )
            raise set_by(place, error)
        value = kind.read(value)
    try:
        return checked(kind, name, value)
    except SettingsError as error:
        raise set_by(place, error) from None


def set_by(place: str, error: SettingsError) -> SettingsError:
    """An error with the place where its option was set; empty: an argument."""
    return SettingsError(f"{error} (set by {place or 'an argument'})", option=error.option)


def _unknown(name: str, given: Given, source: Source, known: list[str]) -> list[str]:
    """A note of a name that is no option, where it may be somebody else's."""
    slip, near = _near(name, known)
    if source.is_shared and _OF_A_SERVICE.fullmatch(f"_{name}"):
        slip, near = None, None
    if source.is_shared and slip is None:
        meant = f"; did you mean {near!r}?" if near else ""
        return [f"{given.place} is none of our options, and is not heeded{meant}"]
    shown = repr(name) if len(name) <= 60 else "of such a long name"
    near = slip or near
    raise set_by(
        given.place,
        SettingsError(
            f"there is no option {shown}"
            + (f"; did you mean {near!r}?" if near else f"; there are: {', '.join(known)}")
        ),
    )


def _near(name: str, known: list[str]) -> tuple[str | None, str | None]:
    """The option of which a name is a slip, and else the one that may be meant."""
    if len(name) > 64:  # nobody mistyped that; comparing would take its time
        return None, None
    joined = name.replace("_", "")
    slips = [option for option in known if option.replace("_", "") == joined]
    slips += difflib.get_close_matches(name, known, n=1, cutoff=_SLIP)
    if slips:
        return slips[0], None
    inside = [option for option in known if f"_{option}_" in f"_{name}_"]
    if inside:  # session_timeout is timeout, however like it is to execution_timeout
        return None, max(inside, key=len)
    return None, next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _locate(sources: Sequence[Source], environ: Mapping[str, str]) -> Given | None:
    """The connection string of the strongest source that has one, or that names its place."""
    for source in sources:
        named = {name: source.options[name] for name in LOCATIONS if name in source.options}
        if len(named) > 1:
            one, other = list(named)[:2]
            places = dict.fromkeys(given.place for given in named.values() if given.place)
            where = f" ({', '.join(places)})" if places else ""
            raise SettingsError(
                f"{one} and {other} are both set{where}: the connection string has one place; "
                "leave all but one out",
                option=_STRING,
            )
        for location, given in named.items():
            return given if location == _STRING else _found(location, given, sources, environ)
    return None


def _found(
    location: str, given: Given, sources: Sequence[Source], environ: Mapping[str, str]
) -> Given:
    name, place = given
    named_by = f"named by {location}" + (f" ({place})" if place else "")
    if not isinstance(name, str) or not name:
        raise wrong(location, name, f"a str, the name of a place, {named_by}")
    if location == _VARIABLE:
        if environ.get(name):
            return Given(environ[name], f"environment variable {name}, {named_by}")
        looked = ["the environment"]
    else:
        looked = []
        for source in sources:
            table: dict[str, Given] = getattr(source, TABLES[location])
            if name in table:
                value, entry = table[name]
                if not isinstance(value, str):
                    raise SettingsError(
                        f"{entry}, {named_by}, cannot be used: it must be a str", option=_STRING
                    )
                return Given(value, f"{entry}, {named_by}")
            if source.has_tables:
                why = source.unreadable.get(TABLES[location])
                looked.append(source.name + (f" ({why})" if why else ""))
    raise set_by(
        place,
        SettingsError(
            f"{location}={shown(location, name)} names nothing that is there: looked in "
            f"{', '.join(looked) or 'no file, for there is none'}",
            option=_STRING,
        ),
    )
