"""Small XML files as a tree: only what a configuration file needs, and nothing that can be turned
against who reads it.

The standard library's expat, told to refuse every DTD: entities that grow without end or name
other files need one. Values stay in the tree and in no message.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from xml.parsers import expat

from gridsession.errors import SettingsError

MAX_BYTES = 1 << 20  # IIS refuses a web.config of more than 250 KB by default
MAX_DEPTH = 64  # elements inside each other
# An encoding that expat does not know is looked up among Python's codecs, of which some warn, some
# are no encodings of text, and all are more than a configuration file has use for.
_ENCODINGS = ("utf-8", "utf-16", "us-ascii", "iso-8859-1", "windows-1252")


@dataclass(repr=False, eq=False, slots=True)
class Element:
    """An element, without the text in it, which may be a secret and is no setting.

    Attributes:
        tag: its name, with its prefix.
        attributes: by name, with their prefixes.
        file: the file's name, for messages.
        line: on which its start tag begins, from 1.
        children: in the file's order.
        has_text: there is text in it that is no white space.
    """

    tag: str
    attributes: dict[str, str]
    file: str
    line: int
    children: list[Element] = field(default_factory=list)
    has_text: bool = False


def parse(data: bytes, name: str) -> Element:
    """The root of a file.

    Args:
        data: the file's bytes, in UTF-8 or UTF-16, or as the XML declaration says.
        name: the file's name, for messages.

    Raises:
        SettingsError: it is no well-formed XML, too large, too deep, or has a document type
            declaration; says what and on which line, and nothing of what is written there.
    """
    if len(data) > MAX_BYTES:
        raise SettingsError(f"{name} is larger than {MAX_BYTES >> 20} MiB; nothing of it was read")
    tree = _Tree(name)
    try:
        tree.parser.Parse(data, True)
    except expat.ExpatError as error:
        what = expat.ErrorString(error.code)
        raise SettingsError(f"{name}, line {error.lineno}: malformed XML: {what}") from None
    except (LookupError, ValueError) as error:
        if isinstance(error, SettingsError):
            raise
        raise tree.refused("its encoding is unreadable; save the file as UTF-8") from None
    assert tree.root is not None  # expat refuses a file without one
    return tree.root


class _Tree:
    """What expat calls."""

    def __init__(self, name: str) -> None:
        self.root: Element | None = None
        self.parser = expat.ParserCreate()
        self._name = name
        self._open: list[Element] = []
        self.parser.XmlDeclHandler = self._declaration
        self.parser.StartDoctypeDeclHandler = self._doctype
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._text

    def refused(self, why: str) -> SettingsError:
        return SettingsError(f"{self._name}, line {self.parser.CurrentLineNumber}: {why}")

    def _declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding is not None and encoding.lower() not in _ENCODINGS:
            raise self.refused("its encoding is unknown; save the file as UTF-8")

    def _doctype(self, *of: object) -> None:
        raise self.refused(
            "a document type declaration (<!DOCTYPE …>) is refused, since entities declared in "
            "one can fill the memory or read other files; remove it"
        )

    def _start(self, tag: str, attributes: dict[str, str]) -> None:
        if len(self._open) == MAX_DEPTH:
            raise self.refused(f"elements are nested deeper than {MAX_DEPTH}")
        element = Element(tag, attributes, self._name, self.parser.CurrentLineNumber)
        if self._open:
            self._open[-1].children.append(element)
        else:
            self.root = element
        self._open.append(element)

    def _end(self, tag: str) -> None:
        self._open.pop()

    def _text(self, text: str) -> None:
        if text.strip():
            self._open[-1].has_text = True
