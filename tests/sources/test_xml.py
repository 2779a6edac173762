"""Configuration files are read as trees, and hostile ones refused with what and where."""

from __future__ import annotations

import codecs

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gridsession import SettingsError
from gridsession.sources.xml import MAX_BYTES, MAX_DEPTH, Element, parse

NAME = "web.config"
SECRET = "hunter2-in-the-file"


def refusal(data: bytes) -> str:
    with pytest.raises(SettingsError) as raised:
        parse(data, NAME)
    assert raised.value.__suppress_context__ or raised.value.__context__ is None
    return str(raised.value)


def outcome(data: bytes) -> str:
    try:
        return f"read {parse(data, NAME)!r}"
    except SettingsError as error:
        return str(error)


# -- the tree -----------------------------------------------------------------------------------


def test_a_tree_has_tags_attributes_children_and_lines() -> None:
    root = parse(
        b'<?xml version="1.0"?>\n<a x="1"\n   y="&lt;&#38;">\n  <b/>\n'
        b'  <p:c q:z="2"><d/></p:c>\n</a>',
        NAME,
    )
    assert (root.tag, root.attributes, root.line) == ("a", {"x": "1", "y": "<&"}, 2)
    assert [(child.tag, child.attributes, child.line) for child in root.children] == [
        ("b", {}, 4),
        ("p:c", {"q:z": "2"}, 5),
    ]
    assert [child.tag for child in root.children[1].children] == ["d"]
    assert {element.file for element in (root, *root.children)} == {NAME}


def test_text_is_noticed_and_not_kept() -> None:
    root = parse(f"<a> \n<b>{SECRET}</b><!-- x --><c>\t</c></a>".encode(), NAME)
    assert [e.has_text for e in (root, *root.children)] == [False, True, False]
    assert SECRET not in repr([getattr(root.children[0], slot) for slot in Element.__slots__])


def test_no_repr_shows_a_value() -> None:
    root = parse(f'<a b="{SECRET}"><c d="{SECRET}"/></a>'.encode(), NAME)
    assert SECRET not in repr(root) + repr(root.children)


@pytest.mark.parametrize(
    "data",
    [
        '<a b="é€"/>'.encode(),
        codecs.BOM_UTF8 + '<a b="é€"/>'.encode(),
        codecs.BOM_UTF8 + '<?xml version="1.0" encoding="utf-8"?><a b="é€"/>'.encode(),
        '<a b="é€"/>'.encode("utf-16"),
        '<?xml version="1.0" encoding="UTF-16"?>\r\n<a b="é€"/>'.encode("utf-16"),
        codecs.BOM_UTF16_BE + '<a b="é€"/>'.encode("utf-16-be"),
        '<?xml version="1.0" encoding="Windows-1252"?><a b="é€"/>'.encode("cp1252"),
    ],
)
def test_the_encodings_of_configuration_files_are_read(data: bytes) -> None:
    assert parse(data, NAME).attributes == {"b": "é€"}


# -- what is refused ----------------------------------------------------------------------------

LAUGHS = (
    b'<?xml version="1.0"?>\n<!DOCTYPE lolz [\n<!ENTITY a "ha">\n<!ENTITY b "&a;&a;&a;">\n]>\n'
    b"<a>&b;</a>"
)


@pytest.mark.parametrize(
    "data",
    [
        LAUGHS,
        b'<?xml version="1.0"?>\n<!DOCTYPE a SYSTEM "file:///etc/passwd">\n<a/>',
        b'<?xml version="1.0"?>\n<!DOCTYPE a [<!ENTITY x SYSTEM "http://x/">]>\n<a>&x;</a>',
        b'<?xml version="1.0"?>\n<!DOCTYPE a [<!ENTITY % x "y"> %x;]>\n<a/>',
        b'<?xml version="1.0"?>\n<!DOCTYPE a [<!ATTLIST a b CDATA "c">]>\n<a/>',
        '<?xml version="1.0"?>\n<!DOCTYPE a>\n<a/>'.encode("utf-16"),
    ],
)
def test_document_type_declarations_are_refused(data: bytes) -> None:
    text = refusal(data)
    assert text.startswith("web.config, line 2: a document type declaration")
    assert "remove it" in text


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "web.config, line 1: malformed XML: no element found"),
        (b"<a>\n<b>\n</a>", "web.config, line 3: malformed XML: mismatched tag"),
        (b"<a>\n<b></b>", "web.config, line 2: malformed XML: no element found"),
        (b"<a/>\n<b/>", "web.config, line 2: malformed XML: junk after document element"),
        (b"<a>\n&nbsp;</a>", "web.config, line 2: malformed XML: undefined entity"),
        (b'<a b="1"\nb="2"/>', "web.config, line 2: malformed XML: duplicate attribute"),
        (b"\xff<a/>", "web.config, line 1: malformed XML: not well-formed"),
        (b"<a>\n\xff</a>", "web.config, line 2: malformed XML: not well-formed"),
        (b"\x00\x00", "web.config, line 1: malformed XML"),
        (b"timeout = 20", "web.config, line 1: malformed XML"),
        (b"PK\x03\x04", "web.config, line 1: malformed XML"),
        ("<a/>".encode("utf-32"), "web.config, line 1: malformed XML"),
    ],
)
def test_malformed_files_are_refused_with_the_line(data: bytes, expected: str) -> None:
    assert refusal(data).startswith(expected)


@pytest.mark.parametrize("encoding", ["unicode_escape", "utf-7", "idna", "rot13", "x", "mbcs"])
def test_no_other_codec_is_tried(encoding: str) -> None:
    data = f'<?xml version="1.0" encoding="{encoding}"?><a b="\\d"/>'.encode()
    assert refusal(data) == "web.config, line 1: its encoding is unknown; save the file as UTF-8"


@pytest.mark.parametrize("encoding", ["utf-7", "shift_jis", "x"])
def test_what_a_codec_raises_is_no_other_error(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr("gridsession.sources.xml._ENCODINGS", (encoding,))
    text = refusal(f'<?xml version="1.0" encoding="{encoding}"?><a/>'.encode())
    assert text == "web.config, line 1: its encoding is unreadable; save the file as UTF-8"


def test_a_file_has_a_largest_size() -> None:
    head, tail = b'<a b="', b'"/>'
    full = head + b"x" * (MAX_BYTES - len(head) - len(tail)) + tail
    assert len(parse(full, NAME).attributes["b"]) > MAX_BYTES - 20
    assert refusal(full + b"\n") == "web.config is larger than 1 MiB; nothing of it was read"


def test_a_file_has_a_largest_depth() -> None:
    assert parse(b"<a>" * MAX_DEPTH + b"</a>" * MAX_DEPTH, NAME).tag == "a"
    deeper = b"\n<a>" * 100_000
    assert refusal(deeper) == "web.config, line 66: elements are nested deeper than 64"


@given(
    st.binary(max_size=300)
    | st.text(max_size=100).map(lambda text: f'<?xml version="1.0"?><a b="{text}"/>'.encode())
    | st.text(max_size=100).map(lambda text: f"<a>{text}</a>".encode("utf-16", "surrogatepass"))
    | st.text("abcdefgiopstuxz0123456789-_", max_size=20).map(
        lambda name: f'<?xml version="1.0" encoding="{name}"?><a/>'.encode()
    )
)
@example(b'<?xml version="1.0" encoding="utf-16"?><a/>')
@example('<a b="'.encode("utf-16") + b'\x00\xd8"\x00/\x00>\x00')
@example(b"<a" + b" b" * 50)
def test_any_bytes_are_a_tree_or_refused(data: bytes) -> None:
    assert outcome(data).startswith(("read", NAME))


@given(st.integers(0, 400), st.integers(0, 400), st.binary(max_size=8))
def test_no_refusal_shows_what_is_written_there(start: int, end: int, put: bytes) -> None:
    whole = f'<?xml version="1.0"?><a>\n<b c="{SECRET}">{SECRET}</b><!--{SECRET}-->\n</a>'.encode()
    assert "hunter" not in outcome(whole[:start] + put + whole[max(start, end) :])
