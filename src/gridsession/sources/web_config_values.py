"""An attribute of a web.config, and what is made of its text; what has been read so far.

ASP.NET's enumerations are written one way only, its names of settings in any case. No text here
shows a value: who reads the message has the line.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from gridsession.errors import SettingsError
from gridsession.sources.given import CONFIG_VARIABLE, Given, Source
from gridsession.sources.xml import Element

MAX_NOTES = 200  # a file that earns more is none that anybody wrote
_MAX_NAME = 64  # characters; of a longer name, only these are shown
SECTION = ("configSource", "configProtectionProvider")  # every section may have them
COLLECTION = ("add", "remove", "clear")
MAX_INT = 2**31 - 1  # .NET's int
# The way out where this file cannot be changed.
ANOTHER_FILE = f"name another file by {CONFIG_VARIABLE}: then this one is not read"
_WHOLE = re.compile(r"[0-9]{1,10}")


@dataclass(frozen=True, repr=False)
class Attribute:
    """One attribute, and how messages call it.

    Attributes:
        element: who has it.
        name: its name.
        owner: its element, in words: `sessionState`, `sessionState provider`.
        option: the option that it sets, if any.
        spoken_by: the attribute that holds the value; the one of this name where it is empty.
            An entry of appSettings is called by its key, and speaks by its value.
    """

    element: Element
    name: str
    owner: str
    option: str | None = None
    spoken_by: str = ""

    @property
    def value(self) -> str:
        """The text as it is written; empty where there is no such attribute."""
        return self.element.attributes.get(self.spoken_by or self.name, "")

    @property
    def place(self) -> str:
        return f"{place(self.element)}: {self.owner} {self.name}"

    def wrong(self, wanted: str) -> SettingsError:
        """The error for a value that is none of those which are wanted."""
        return SettingsError(f"{self.place}: it must be {wanted}", option=self.option)

    def text(self) -> str:
        """Any text that is not empty."""
        if not self.value:
            raise self.wrong("not empty; leave it out where it is not needed")
        return self.value

    def flag(self) -> bool:
        """`true` or `false`, in any case."""
        value = self.value.strip().lower()
        if value not in ("true", "false"):
            raise self.wrong("true or false")
        return value == "true"

    def whole(self, least: int, most: int, of: str = "") -> int:
        """A whole number in a range, without sign, point or unit."""
        value = self.value.strip()
        if not _WHOLE.fullmatch(value) or not least <= int(value) <= most:
            raise self.wrong(f"a whole number{of}, at least {least} and at most {most}")
        return int(value)

    def choice(self, words: Iterable[str]) -> str:
        """One of a few words, written as they are."""
        value, words = self.value.strip(), [*words]
        if value not in words:
            raise self.wrong(f"one of {', '.join(words)}{did_you_mean(value, words)}")
        return value


Table = Mapping[str, tuple[str, Callable[[Attribute], object]]]
"""Attributes, the options that they set, and how their values are read."""


class Reading:
    """A web.config in the course of being read.

    Args:
        name: the source's name.
    """

    def __init__(self, name: str) -> None:
        self.source = Source(name)

    def give(self, attribute: Attribute, value: object) -> None:
        """Take an attribute's value for the option that it sets."""
        assert attribute.option is not None
        self.source.options[attribute.option] = Given(value, attribute.place)

    def note(self, where: str, text: str) -> None:
        """Say that something is not heeded, and what to do instead."""
        notes = self.source.notes
        if len(notes) < MAX_NOTES:
            notes.append(f"{where}: {text}")
        elif len(notes) == MAX_NOTES:
            notes.append("there is more that is not heeded; mend the file, and look again")

    def check_names(
        self,
        element: Element,
        owner: str,
        known: Iterable[str],
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        """Note the attributes of an element that are none of those known, and text in it.

        Args:
            element: the one to look at.
            owner: the element, for messages.
            known: the attributes that it may have.
            elsewhere: those that another element has, by name, and which one that is.
        """
        known = [*known]
        if element.has_text:
            self.note(place(element), f"{owner} holds text, which is no setting")
        for name in element.attributes:
            if name in known or name == "xmlns" or name.startswith("xmlns:"):
                continue
            if len(self.source.notes) > MAX_NOTES:
                return
            where = f"{place(element)}: {owner} {shown(name)}"
            if elsewhere is not None and name in elsewhere:
                self.note(where, f"it is passed over: it belongs to {elsewhere[name]}")
            elif ":" in name:
                self.note(where, "belongs to a program that transforms this file; run it first")
            elif name in _LOCKS:
                self.note(where, "has no counterpart: no other file overrides these settings")
            else:
                self.note(where, f"there is no such attribute{did_you_mean(name, known)}")

    def check_leaf(
        self,
        element: Element,
        owner: str,
        known: Iterable[str],
        elsewhere: Mapping[str, str] | None = None,
    ) -> None:
        """The same, for an element that has none inside it."""
        self.check_names(element, owner, known, elsewhere)
        for _ in self.children(element, owner, ()):
            pass

    def children(self, element: Element, owner: str, known: Iterable[str]) -> Iterator[Element]:
        """The elements inside another that are known; the others are noted."""
        known = [*known]
        for child in element.children:
            if child.tag in known:
                yield child
            elif len(self.source.notes) <= MAX_NOTES:
                self.note(
                    f"{place(child)}: {shown(child.tag)} in {owner}",
                    f"there is no such element{did_you_mean(child.tag, known)}",
                )


_LOCKS = (
    "lockAttributes",
    "lockAllAttributesExcept",
    "lockElements",
    "lockAllElementsExcept",
    "lockItem",
)


def place(element: Element) -> str:
    """Where an element is: `web.config, line 12`."""
    return f"{element.file}, line {element.line}"


def shown(name: str) -> str:
    """A name out of the file, fit for one line of a log."""
    return repr(name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}…")[1:-1]


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that somebody may have meant, whatever its case."""
    if len(name) > _MAX_NAME:  # nobody mistyped that; comparing would take its time
        return None
    lowered = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=cutoff)
    return lowered[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing."""
    near = nearest(name, known)
    return f"; did you mean {shown(near)}?" if near else ""


# -- what sections have in common ------------------------------------------------------------------


def collected(  # noqa: PLR0917 - what a collection is made of
    reading: Reading,
    children: Iterable[Element],
    owner: str,
    key: str,
    attributes: Iterable[str] | None,
    once: bool,
) -> dict[str, Element]:
    """The entries that are left of a collection, by their names in lower case.

    Args:
        reading: takes notes.
        children: `add`, `remove` and `clear` elements, in order.
        owner: the collection, for messages.
        key: the attribute that names an entry.
        attributes: those that an entry may have; None: somebody else looks at them.
        once: an entry added twice is an error, otherwise the later one wins, both as in ASP.NET.
    """
    found: dict[str, Element] = {}
    for child in children:
        what = f"{owner} {child.tag}"
        if child.tag != "add" or attributes is not None:
            known = {"add": attributes or (), "remove": (key,), "clear": ()}[child.tag]
            reading.check_leaf(child, what, known)
        name = child.attributes.get(key, "").lower()
        if child.tag == "clear":
            found.clear()
        elif not name:
            reading.note(f"{place(child)}: {what}", f"it has no {key}, so it is passed over")
        elif child.tag == "remove":
            found.pop(name, None)
        elif once and name in found:
            raise SettingsError(
                f"{place(child)}: {what}: line {found[name].line} adds the same {key}; keep one"
            )
        else:
            found[name] = child
    return found


def give_all(reading: Reading, element: Element, owner: str, table: Table) -> None:
    """Take the options that an element's attributes set."""
    for name, (option, read) in table.items():
        if name in element.attributes:
            attribute = Attribute(element, name, owner, option)
            value = read(attribute)
            if value != []:  # no remote stores: as if there were no such attribute
                reading.give(attribute, value)


def note_all(reading: Reading, element: Element, owner: str, notes: Mapping[str, str]) -> None:
    """Note the attributes of an element that nothing here corresponds to."""
    for name, text in notes.items():
        if element.attributes.get(name):  # empty is ASP.NET's default of most of them
            reading.note(Attribute(element, name, owner).place, text)


def note_near(reading: Reading, section: Element, owner: str, known: str) -> None:
    """Note what may be meant for an attribute, in a section whose others are not ours."""
    for name in section.attributes:
        if name != known and (near := nearest(name, (known, "configSource"), 0.9)):
            where = f"{place(section)}: {owner} {shown(name)}"
            reading.note(where, f"there is no such attribute; did you mean {near}?")


def same_site(reading: Reading, section: Element, owner: str, name: str) -> None:
    """Take an attribute that says which requests of other sites bring the cookie."""
    if name not in section.attributes:
        return
    attribute = Attribute(section, name, owner, "same_site")
    value = attribute.value.strip()
    if value.lower() in ("none", "lax", "strict"):
        reading.give(attribute, value.lower())
    elif value.lower() in ("unspecified", "-1"):
        reading.note(
            attribute.place, "the cookie always says SameSite; Lax, which browsers assume, is used"
        )
    else:
        words = ("None", "Lax", "Strict", "Unspecified")
        raise attribute.wrong(f"one of {', '.join(words)}{did_you_mean(value, words)}")
