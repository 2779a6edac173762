"""Which source wins, option by option, and where the connection string is."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from gridsession.errors import SettingsError
from gridsession.sources.given import Given, Source
from gridsession.sources.kinds import Kind, checked, shown, wrong

# The first is the connection string itself, the others name the place that holds it.
_STRING, _VARIABLE, _APP_SETTING, _ELEMENT = LOCATIONS = (
    "connection_string",
    "connection_string_environment_variable",
    "connection_string_app_setting",
    "connection_string_element",
)


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
        value = kind.read(value.strip())
    try:
        return checked(kind, name, value)
    except SettingsError as error:
        raise _set_by(place, error) from None


def _set_by(place: str, error: SettingsError) -> SettingsError:
    return SettingsError(f"{error} (set by {place})", option=error.option) if place else error


def _unknown(name: str, given: Given, source: Source, known: list[str]) -> list[str]:
    near = difflib.get_close_matches(name, known, n=1)
    shown = repr(name) if len(name) <= 60 else "of such a long name"
    if source.is_shared and not near:
        return [f"{given.place} is none of our options, and is not heeded"]
    raise _set_by(
        given.place,
        SettingsError(
            f"there is no option {shown}"
            + (f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(known)}")
        ),
    )


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
            table = source.app_settings if location == _APP_SETTING else source.connection_strings
            if name in table:
                value, entry = table[name]
                if not isinstance(value, str):
                    raise SettingsError(
                        f"{entry}, {named_by}, cannot be used: it must be a str", option=_STRING
                    )
                return Given(value, f"{entry}, {named_by}")
            if source.has_tables:
                looked.append(source.name)
    raise SettingsError(
        f"{location}={shown(location, name)} names nothing that is there: looked in "
        f"{', '.join(looked) or 'no file, for there is none'}"
        + (f" (set by {place})" if place else ""),
        option=_STRING,
    )
