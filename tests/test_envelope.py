"""Sealed and opened: the same session or an error, whatever was done to the bytes in between."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import os
import re
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from gridsession import SessionProvider, SessionSettings, SessionTooLarge, SettingsError
from gridsession.envelope import COMPRESS_FROM, Envelope
from gridsession.errors import SessionEncryptionError, SessionFormatError
from gridsession.payload import encode, join
from gridsession.sources.keys import EncryptionKey
from tests.provider.harness import Spy, in_loop

if sys.version_info >= (3, 14):
    from compression import zstd

    ZSTD_PACKAGE, ZSTD_CURE = "compression", "this Python was built without compression.zstd"
else:
    from backports import zstd

    ZSTD_PACKAGE, ZSTD_CURE = "backports", "pip install 'gridsession[compression]'"

MIB = 1 << 20
KEY = hashlib.sha256(b"a session's handle").digest()
OTHER_KEY = hashlib.sha256(b"another's").digest()
SECRET = "hunter2-very-secret"
CART = {"cart": encode("cart", [SECRET, 1]), "user": encode("user", "ann")}
LARGE = {"text": encode("text", "shoes, shirts and socks; " * 100)}


def key_named(name: str) -> str:
    """A key as an operator writes it, always the same."""
    return base64.b64encode(hashlib.sha256(name.encode()).digest()).decode()


OLD, NEW = key_named("old"), key_named("new")


def envelope(
    keys: Sequence[EncryptionKey | str] = (),
    *,
    compress: bool = False,
    namespace: str = "/shop",
    max_bytes: int = MIB,
) -> Envelope:
    return Envelope(namespace=namespace, max_bytes=max_bytes, compress=compress, keys=keys)


def no_chance(count: int) -> bytes:
    raise AssertionError("nothing random is needed here")


# -- there and back -------------------------------------------------------------------------------

SEGMENTS = st.dictionaries(
    st.text(max_size=20),
    st.binary(max_size=40) | st.builds(bytes.__mul__, st.binary(max_size=9), st.integers(0, 999)),
    max_size=6,
)
RECORD_KEYS = st.binary(min_size=32, max_size=32)
NAMES = st.lists(st.sampled_from(["old", "new", "third"]), unique=True, max_size=3)


@given(SEGMENTS, RECORD_KEYS, st.text(max_size=20), NAMES, st.booleans())
def test_any_session_comes_back(
    segments: dict[str, bytes], key: bytes, namespace: str, names: list[str], compress: bool
) -> None:
    sealing = envelope([*map(key_named, names)], compress=compress, namespace=namespace)
    stored = sealing.seal(key, segments, os.urandom)
    opened = sealing.open(key, stored)
    assert opened == segments
    assert list(opened) == list(segments)  # in the session's order
    # Another worker, which does not compress.
    assert envelope([*map(key_named, names)], namespace=namespace).open(key, stored) == segments
    assert len(stored) <= len(join(segments, MIB)) + (36 if names else 0)


def test_without_options_the_bytes_are_the_payload() -> None:
    assert envelope().seal(KEY, CART, no_chance) == join(CART, MIB)
    assert envelope().open(KEY, join(CART, MIB)) == CART


@pytest.mark.parametrize(
    ("keys", "compress", "flags"),
    [((), False, 0), ((), True, 1), ([OLD], False, 2), ([OLD], True, 3)],
)
def test_the_second_byte_says_how(keys: list[str], compress: bool, flags: int) -> None:
    stored = envelope(keys, compress=compress).seal(KEY, LARGE, os.urandom)
    assert stored[:2] == bytes((1, flags))
    assert (b"shoes" in stored) == (not keys)
    assert envelope(keys).open(KEY, stored) == LARGE


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (b"", "it is empty"),
        (b"\x01", "it is cut short"),
        (b"\x02\x00\x80", "format version 2"),
        (b"\x01\x04\x80", "flags 0x04 that this release does not know"),
        (b"\x01\x07\x80", "flags 0x07 that this release does not know"),
    ],
)
def test_what_no_release_wrote_is_refused_in_words(stored: bytes, says: str) -> None:
    for keys in ((), [OLD], [OLD, "plain"]):
        with pytest.raises(SessionFormatError, match=says):
            envelope(keys).open(KEY, stored)


# -- the format, for ever -------------------------------------------------------------------------

MASTER = bytes(range(32))
NONCE = bytes(range(100, 112))
STORED_CART = {"a": b"\x01", "b": b"\xa3xyz"}
# What release 0.1 wrote with MASTER and NONCE for KEY of "/shop". Never change these lines.
STORED_ENCRYPTED = (
    "010254c0d089c887d9ab6465666768696a6b6c6d6e6fa8ac49fd7545efb3c948fcb2e1847d7ebf3e"
    "a8595d9fbf8482fba686ee82"
)
STORED_BOTH = (
    "010354c0d089c887d9ab6465666768696a6b6c6d6e6f02b807c4149446a40c4c0bc8195a677bb468"
    "094dcbb11e64e2e8bac13a6d11d39f35d13e09b6110997d723ae5f993c012cfc250c29c2631247dd"
    "a33104fe0e08bfbab8a3c04dbf63"
)


def by_hand(flags: int, content: bytes) -> bytes:
    """The format as the module describes it, written down once more."""

    def derived(info: bytes) -> bytes:
        return HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(MASTER)

    which = derived(b"gridsession 1 key id")[:8]
    head = bytes((1, flags)) + bytes((which[0] & 0x7F,)) + which[1:] + NONCE
    bound = b"\x00\x00\x00\x05/shop" + b"\x00\x00\x00\x20" + KEY
    cipher = AESGCM(derived(b"gridsession 1 record" + bound))
    return head + cipher.encrypt(NONCE, content, head + bound)


def test_the_encrypted_format_is_what_is_written_down() -> None:
    sealing = envelope([MASTER.hex()])
    asked: list[int] = []

    def chance(count: int) -> bytes:
        asked.append(count)
        return NONCE

    stored = sealing.seal(KEY, STORED_CART, chance)
    assert asked == [12]
    assert stored == by_hand(2, b"\x82\xa1a\xc4\x01\x01\xa1b\xc4\x04\xa3xyz")
    assert stored.hex() == STORED_ENCRYPTED
    assert sealing.open(KEY, stored) == STORED_CART


def test_a_compressed_session_is_compressed_first_and_then_encrypted() -> None:
    stored = envelope([MASTER.hex()], compress=True).seal(KEY, LARGE, lambda _: NONCE)
    frame = zstd.compress(join(LARGE, MIB)[2:])
    assert stored == by_hand(3, frame)
    assert len(stored) < 120  # of 2,500; the other way round nothing would be gained


def test_what_the_first_release_wrote_opens() -> None:
    opening = envelope([MASTER.hex()])
    assert opening.open(KEY, bytes.fromhex(STORED_ENCRYPTED)) == STORED_CART
    assert opening.open(KEY, bytes.fromhex(STORED_BOTH)) == LARGE


# -- compression ----------------------------------------------------------------------------------


def of_size(size: int, content: Callable[[int], bytes] = bytes) -> dict[str, bytes]:
    """A session whose map takes so many bytes, more than 260."""
    return {"a": content(size - 6)}


def test_only_large_sessions_are_compressed() -> None:
    pressing = envelope(compress=True)
    below, at = of_size(COMPRESS_FROM - 1), of_size(COMPRESS_FROM)
    assert len(join(at, MIB)) == 2 + COMPRESS_FROM
    assert pressing.seal(KEY, below, no_chance) == join(below, MIB)
    stored = pressing.seal(KEY, at, no_chance)
    assert stored[:2] == b"\x01\x01"
    assert len(stored) < 40
    assert pressing.open(KEY, stored) == at


def test_what_gets_no_smaller_is_stored_as_it_is() -> None:
    random = of_size(5000, os.urandom)
    assert envelope(compress=True).seal(KEY, random, no_chance) == join(random, MIB)


def test_a_session_after_another_is_compressed_for_itself() -> None:
    pressing = envelope(compress=True)
    first = pressing.seal(KEY, LARGE, no_chance)
    pressing.seal(KEY, of_size(9000), no_chance)
    assert pressing.seal(KEY, LARGE, no_chance) == first


def test_threads_may_seal_at_once() -> None:
    pressing = envelope(compress=True)
    sessions = [{f"{number}": b"%d, " % number * 20_000} for number in range(4)]

    def seal(session: dict[str, bytes]) -> list[bytes]:
        return [pressing.seal(KEY, session, no_chance) for _ in range(30)]

    with ThreadPoolExecutor(4) as threads:
        for session, stored in zip(sessions, threads.map(seal, sessions), strict=True):
            assert len(set(stored)) == 1
            assert pressing.open(KEY, stored[0]) == session


def test_what_counts_is_the_size_before_compression() -> None:
    session = of_size(5000)
    most = len(join(session, MIB))
    pressing = envelope(compress=True, max_bytes=most)
    stored = pressing.seal(KEY, session, no_chance)
    assert pressing.open(KEY, stored) == session
    less = envelope(compress=True, max_bytes=most - 1)
    with pytest.raises(SessionTooLarge, match="more than max_payload_bytes"):
        less.seal(KEY, session, no_chance)
    with pytest.raises(SessionFormatError, match=r"more than max_payload_bytes \(5,001\)"):
        less.open(KEY, stored)


def test_a_session_of_the_largest_size_opens() -> None:
    for most in (2000, 1 << 12, (1 << 12) + 1, MIB, 3 * MIB):
        session = {"a": os.urandom(most // 3) + bytes(most - most // 3 - 10)}
        pressing = envelope(compress=True, max_bytes=most)
        stored = pressing.seal(KEY, session, no_chance)
        assert stored[1] == 1
        assert pressing.open(KEY, stored) == session


def bomb(mebibytes: int, *, says_so: bool) -> bytes:
    """A frame of zeros, whose window is small enough."""
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 15})
    if says_so:
        compressor.set_pledged_input_size(mebibytes * MIB)
    parts = [compressor.compress(bytes(MIB)) for _ in range(mebibytes)]
    return b"\x01\x01" + b"".join([*parts, compressor.flush()])


@pytest.mark.parametrize("says_so", [True, False])
def test_a_bomb_takes_no_memory(says_so: bool) -> None:
    stored = bomb(256, says_so=says_so)
    assert len(stored) < MIB // 16
    said = zstd.get_frame_info(stored[2:]).decompressed_size
    assert said == (256 * MIB if says_so else None)
    opening = envelope(max_bytes=MIB)
    tracemalloc.start()
    try:
        with pytest.raises(SessionFormatError, match="it takes more than max_payload_bytes"):
            opening.open(KEY, stored)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * MIB


def test_a_window_larger_than_any_session_is_refused() -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    content = join(LARGE, MIB)[2:]
    stored = b"\x01\x01" + compressor.compress(content) + compressor.flush()
    assert zstd.decompress(stored[2:]) == content  # it is whole, and takes 128 MiB
    with pytest.raises(SessionFormatError, match="needs more memory than max_payload_bytes"):
        envelope().open(KEY, stored)


def test_a_frame_that_does_not_say_its_size_opens() -> None:
    compressor = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 15})
    frame = compressor.compress(join(LARGE, MIB)[2:]) + compressor.flush()
    assert zstd.get_frame_info(frame).decompressed_size is None
    assert envelope().open(KEY, b"\x01\x01" + frame) == LARGE


GOOD_FRAME = zstd.compress(join(LARGE, MIB)[2:])


@pytest.mark.parametrize(
    ("frame", "says"),
    [
        (GOOD_FRAME + b"\x00", "it goes on after its end"),
        (GOOD_FRAME + GOOD_FRAME, "it goes on after its end"),
        (b"\x50\x2a\x4d\x18\x01\x00\x00\x00x" + GOOD_FRAME, "it goes on after its end"),
        (b"not a frame at all", "it is no zstd frame"),
        (join(LARGE, MIB)[2:], "it is no zstd frame"),
        (GOOD_FRAME[:4] + b"\xff" + GOOD_FRAME[5:], "it is no zstd frame"),
        (zstd.compress(b""), "a stored session cannot be read"),
        (zstd.compress(b"\x90"), "it is not a map of segments"),
    ],
)
def test_a_frame_that_is_none_of_ours(frame: bytes, says: str) -> None:
    with pytest.raises(SessionFormatError, match=says):
        envelope().open(KEY, b"\x01\x01" + frame)


def test_a_frame_that_is_cut_short() -> None:
    for end in range(len(GOOD_FRAME)):
        with pytest.raises(SessionFormatError, match="cannot be decompressed: it is cut short"):
            envelope().open(KEY, b"\x01\x01" + GOOD_FRAME[:end])


@given(st.binary(max_size=60))
def test_any_frame_opens_or_is_refused_in_our_words(tail: bytes) -> None:
    for frame in (tail, GOOD_FRAME[: len(tail)] + tail, b"\x28\xb5\x2f\xfd" + tail):
        with contextlib.suppress(SessionFormatError):
            assert envelope().open(KEY, b"\x01\x01" + frame) in ({}, LARGE)


# -- encryption -----------------------------------------------------------------------------------


def refused(keys: Sequence[str], stored: bytes, key: bytes = KEY, namespace: str = "/shop") -> str:
    """Why it does not open."""
    with pytest.raises(SessionFormatError) as raised:
        envelope(keys, namespace=namespace).open(key, stored)
    text = str(raised.value)
    for secret in (OLD, NEW, SECRET, KEY.hex()):
        assert secret not in text
    return text


@pytest.mark.parametrize("session", [CART, LARGE], ids=["small", "compressed"])
@pytest.mark.parametrize("keys", [[OLD], [OLD, "plain"], ["plain", OLD]], ids=" ".join)
def test_any_flipped_bit_is_seen(session: dict[str, bytes], keys: list[str]) -> None:
    stored = envelope([OLD], compress=True).seal(KEY, session, os.urandom)
    assert stored[1] == (3 if session is LARGE else 2)
    for place in range(len(stored)):
        for bit in range(8):
            changed = bytearray(stored)
            changed[place] ^= 1 << bit
            assert refused(keys, bytes(changed))
    for other in range(256):  # the flags, any other way
        if other != stored[1]:
            assert refused(keys, bytes((1, other)) + stored[2:])


@given(st.data())
def test_any_change_is_seen(data: st.DataObject) -> None:
    stored = envelope([OLD]).seal(KEY, CART, os.urandom)
    changed = bytearray(stored)
    start = data.draw(st.integers(0, len(stored) - 1))
    part = data.draw(st.binary(max_size=30))
    changed[start : start + data.draw(st.integers(0, 30))] = part
    if changed != stored:
        assert refused([OLD], bytes(changed))


def test_a_record_that_is_cut_short_or_goes_on_is_refused() -> None:
    stored = envelope([OLD]).seal(KEY, CART, os.urandom)
    for end in range(2, 38):
        assert refused([OLD], stored[:end]) == "a stored session is encrypted, and cut short"
    for end in range(38, len(stored)):
        assert "does not open" in refused([OLD], stored[:end])
    assert "does not open" in refused([OLD], stored + b"\x00")


def test_a_record_opens_in_its_own_place_only() -> None:
    stored = envelope([OLD]).seal(KEY, CART, os.urandom)
    assert "belongs to another session or namespace" in refused([OLD], stored, OTHER_KEY)
    assert "belongs to another session or namespace" in refused([OLD], stored, namespace="/")
    # The end of a namespace is not the beginning of a key.
    beside = envelope([OLD], namespace="/shopa").seal(b"b" * 31, CART, os.urandom)
    assert "does not open" in refused([OLD], beside, b"a" + b"b" * 31)


def test_each_record_and_each_writing_is_different() -> None:
    sealing = envelope([OLD])
    all_of_them = [sealing.seal(KEY, CART, os.urandom) for _ in range(50)]
    assert len(set(all_of_them)) == 50
    # One nonce for two records: their own keys make them different all the same.
    one, other = (sealing.seal(key, CART, lambda _: NONCE)[22:] for key in (KEY, OTHER_KEY))
    assert one != other


def test_a_source_of_chance_that_gives_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match=r"random_bytes\(12\) gave 11 bytes"):
        envelope([OLD]).seal(KEY, CART, lambda count: bytes(count - 1))


def test_rotation() -> None:
    before, between, after = envelope([OLD]), envelope([NEW, OLD]), envelope([NEW])
    old = before.seal(KEY, CART, os.urandom)
    new = between.seal(KEY, CART, os.urandom)
    assert between.open(KEY, old) == between.open(KEY, new) == after.open(KEY, new) == CART
    assert "not among the encryption_keys" in refused([NEW], old)
    assert "not among the encryption_keys" in refused([OLD], new)
    # The first step, for workers that are still to get the new key.
    assert envelope([OLD, NEW]).open(KEY, new) == CART
    assert before.open(KEY, envelope([OLD, NEW]).seal(KEY, CART, os.urandom)) == CART


def test_introduction_in_three_steps() -> None:
    none, first, second, third = (
        envelope(keys) for keys in ([], ["plain", OLD], [OLD, "plain"], [OLD])
    )
    plain = none.seal(KEY, CART, no_chance)
    assert first.seal(KEY, CART, no_chance) == plain
    encrypted = second.seal(KEY, CART, os.urandom)
    assert third.seal(KEY, CART, os.urandom)[1] == encrypted[1] == 2
    # Workers of neighbouring steps read each other's.
    for opening in (none, first, second):
        assert opening.open(KEY, plain) == CART
    for opening in (first, second, third):
        assert opening.open(KEY, encrypted) == CART


def test_what_is_not_encrypted_may_be_anybodys() -> None:
    for stored in (join(CART, MIB), b"\x01\x01" + GOOD_FRAME):
        with pytest.raises(SessionEncryptionError, match="is not encrypted, and encryption_keys"):
            envelope([OLD, NEW]).open(KEY, stored)
        assert envelope([OLD, "plain", NEW]).open(KEY, stored) in (CART, LARGE)


def test_without_keys_an_encrypted_session_is_an_error() -> None:
    stored = envelope([OLD]).seal(KEY, CART, os.urandom)
    with pytest.raises(SessionEncryptionError, match="encryption_keys is not set here"):
        envelope().open(KEY, stored)


def test_which_key_it_is_tells_nothing_of_the_key() -> None:
    stored = [
        envelope([key], namespace=namespace).seal(key_of, CART, os.urandom)[2:10]
        for key in (OLD, NEW)
        for namespace, key_of in (("/", KEY), ("/shop", OTHER_KEY))
    ]
    assert stored[0] == stored[1]
    assert stored[2] == stored[3] != stored[0]
    assert base64.b64decode(OLD)[:8] != stored[0]


# -- what is missing ------------------------------------------------------------------------------


def test_without_zstd(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = envelope(compress=True).seal(KEY, LARGE, no_chance)
    monkeypatch.setitem(sys.modules, ZSTD_PACKAGE, None)
    with pytest.raises(SettingsError) as at_start:
        envelope(compress=True)
    assert at_start.value.option == "compression_enabled"
    with pytest.raises(SessionFormatError) as reading:
        envelope().open(KEY, stored)
    assert ZSTD_CURE in str(at_start.value)
    assert ZSTD_CURE in str(reading.value)
    assert envelope().open(KEY, join(CART, MIB)) == CART


def test_without_cryptography(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(SettingsError, match=r"pip install 'gridsession\[encryption\]'") as raised:
        envelope(["plain", OLD])
    assert raised.value.option == "encryption_keys"
    assert OLD not in str(raised.value)
    assert envelope().open(KEY, join(CART, MIB)) == CART


def test_a_wrong_key_is_told_without_showing_it() -> None:
    with pytest.raises(SettingsError, match="item 2 of 2 is none: it has 43") as raised:
        envelope([OLD, f"{NEW[:42]}*"])
    assert NEW[:42] not in str(raised.value)


def test_nothing_shows_a_key() -> None:
    sealing = envelope([OLD, NEW])
    shown = f"{sealing!r} {vars(sealing)!r}"
    assert repr(EncryptionKey(MASTER)) == "<encryption key>"
    for key in (OLD, NEW):
        assert key not in shown
        assert repr(base64.b64decode(key)) not in shown


# -- in a provider --------------------------------------------------------------------------------


@in_loop
async def test_a_wrong_key_is_never_an_empty_session(grid: Spy) -> None:
    def provider(*keys: str) -> SessionProvider:
        settings = SessionSettings(
            encryption_keys=keys, compression_enabled=True, sweep_interval=3600
        )
        return SessionProvider(settings, grid=grid)

    await grid.inner.open()
    async with provider(OLD) as right, right.open(None) as session:
        session["cart"] = [SECRET] * 500
        sid = session.id
    for wrong in (provider(NEW), provider()):
        async with wrong:
            for access in ("exclusive", "read_only", "concurrent", "exclusive"):
                with pytest.raises(SessionEncryptionError):
                    async with wrong.open(sid, access=access):
                        pytest.fail("the handler ran")
    async with provider(NEW, OLD) as right, right.open(sid) as session:  # and no lock is left
        assert session["cart"] == [SECRET] * 500


# -- what the page says ---------------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "encryption.md").read_text("utf-8")


def test_the_page_has_every_error() -> None:
    stored = envelope([OLD]).seal(KEY, CART, os.urandom)
    texts = [
        refused([], stored),
        refused([NEW], stored),
        refused([OLD], stored, OTHER_KEY),
        refused([OLD], join(CART, MIB)),
    ]
    section = PAGE.partition("## A wrong key")[2].partition("## ")[0]
    rows = [line.split(" | ")[0].strip("| ") for line in section.splitlines() if line[:3] == "| e"]
    rows += [line.split(" | ")[0].strip("| ") for line in section.splitlines() if line[:3] == "| n"]
    assert len(rows) == len(texts)
    for row, text in zip(rows, texts, strict=True):
        assert row in text


def test_the_page_s_steps_read_each_other() -> None:
    keys = {"KEY": OLD, "OLD": OLD, "NEW": NEW, "plain": "plain"}
    steps = re.findall(r"^\| \d[^|]*\| `([A-Za-z,]+)` \|", PAGE, re.MULTILINE)
    assert steps == ["plain,KEY", "KEY,plain", "KEY", "OLD,NEW", "NEW,OLD", "NEW"]
    for three, before in ((steps[:3], []), (steps[3:], [OLD])):
        workers = [envelope(before)]
        workers += [envelope([keys[name] for name in step.split(",")]) for step in three]
        for older, newer in itertools.pairwise(workers):
            for writing, reading in ((older, newer), (newer, older)):
                stored = writing.seal(KEY, CART, os.urandom)
                assert reading.open(KEY, stored) == CART
