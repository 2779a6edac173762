"""What lies between a session's segments and the bytes that a grid keeps.

Format version 1, for ever; the flags in byte 1 say what is around the map of segments::

    byte 0   format version, 1
    byte 1   flags: 0x01 compressed, 0x02 encrypted, both, or neither
    then     neither: the map, as `gridsession.payload` describes it
             compressed: one zstd frame, whose content is the map
             encrypted: 8 bytes: which key; their first bit is 0, as no map's is
                        12 bytes: nonce
                        AES-256-GCM of what would follow the flags without this one: the map,
                        or the frame; and its tag of 16 bytes at the end

Keys are derived by HKDF-SHA256 without salt from a master key of 32 bytes. `info` is, for

    ====================  =======================================================================
    which key (8 bytes)   "gridsession 1 key id"; then the first bit is cleared
    a record's own key    "gridsession 1 record", bound
    ====================  =======================================================================

where *bound* is the namespace in UTF-8 and the record's key, each after its length in 4 bytes,
big-endian. The associated data are all bytes ahead of the ciphertext, and bound.

So a record opens in its own place only, and with its own flags. That no nonce comes twice under one
key is left to chance, which is 1 in 2³³ after 2³² writes of one session.

No await, clock or randomness: random bytes are an argument.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from gridsession.errors import SessionEncryptionError, SessionFormatError, SettingsError
from gridsession.payload import COMPRESSED, ENCRYPTED, FORMAT_VERSION, HEADER, join, split
from gridsession.sources.keys import KEY_BYTES, PLAIN, EncryptionKey, Keys
from gridsession.sources.kinds import checked

# Bytes. Session data of 1 KiB shrink by half, in 6 µs and 9 to open it; of 256 bytes they lose as
# little as a third, while what a grid keeps beside them stays.
COMPRESS_FROM: Final = 1024
_LEVEL = 3  # zstd's default; level 1 saves a tenth of the time and leaves a tenth more bytes
_MIN_WINDOW, _MAX_WINDOW = 10, 31  # as powers of two: zstd's own bounds

_ID_BYTES, _NONCE_BYTES, _TAG_BYTES = 8, 12, 16
_ID_END = len(HEADER) + _ID_BYTES
_NONCE_END = _ID_END + _NONCE_BYTES
_KEY_ID, _RECORD_KEY = b"gridsession 1 key id", b"gridsession 1 record"
_NOT_ENCRYPTED = (
    "a stored session is not encrypted, and encryption_keys is set here: whoever can write to the "
    "grid may have made it; it was left as it is: for sessions from before encryption, list plain "
    "after the keys"
)
_SEALED = tuple(bytes((FORMAT_VERSION, flags)) for flags in range(1, (COMPRESSED | ENCRYPTED) + 1))


class Envelope:
    """How the sessions of one namespace are stored: as they are, compressed, encrypted, both.

    Args:
        namespace: the one that the records belong to, in force.
        max_bytes: how large a session may be, uncompressed.
        compress: compress what is large enough and gets smaller by it. Compressed sessions are
            read whether it is set or not.
        keys: as the option `encryption_keys`; the first encrypts, all decrypt; none: sessions are
            not encrypted.

    Raises:
        SettingsError: a package is missing, or a key cannot be used.
    """

    def __init__(
        self,
        *,
        namespace: str,
        max_bytes: int,
        compress: bool = False,
        keys: Sequence[EncryptionKey | str] = (),
    ) -> None:
        items: Any = checked(Keys(), "encryption_keys", keys)
        try:
            masters = [_MasterKey(item.secret) for item in items if item != PLAIN]
        except ImportError:
            raise SettingsError(
                "encryption_keys cannot be used: cryptography is not there: "
                "pip install 'gridsession[encryption]'",
                option="encryption_keys",
            ) from None
        self._max_bytes = max_bytes
        self._namespace = _sized(namespace.encode())
        self._masters = {master.id: master for master in masters}
        self._sealing = None if not items or items[0] == PLAIN else masters[0]
        self._reads_plain = not masters or PLAIN in items
        self._is_bare = self._sealing is None and not compress
        self._press: Any = None
        if compress:
            zstd = _zstd()
            if zstd is None:
                raise SettingsError(
                    f"compression_enabled=True cannot be used: {_NO_ZSTD}",
                    option="compression_enabled",
                )
            # Kept, for making one takes 9 µs; it has a lock, for threads.
            self._press = zstd.ZstdCompressor(_LEVEL)
            self._flush = zstd.ZstdCompressor.FLUSH_FRAME

    def seal(
        self, key: bytes, segments: Mapping[str, bytes], random_bytes: Callable[[int], bytes]
    ) -> bytes:
        """The stored bytes of a session.

        Args:
            key: the record's, 32 bytes.
            segments: what `payload.join` takes.
            random_bytes: a source of random bytes that nobody can foretell, such as os.urandom.

        Raises:
            SessionTooLarge, SessionTypeError: as `payload.join` does, before anything else.
        """
        payload = join(segments, self._max_bytes)
        if self._is_bare:
            return payload
        flags = 0
        content: bytes | memoryview = memoryview(payload)[len(HEADER) :]
        if self._press is not None and len(content) >= COMPRESS_FROM:
            frame = self._press.compress(content, self._flush)
            if len(frame) < len(content):
                content, flags = frame, COMPRESSED
        if self._sealing is None:
            return b"".join((bytes((FORMAT_VERSION, flags)), content)) if flags else payload
        head = bytes((FORMAT_VERSION, flags | ENCRYPTED)) + self._sealing.id
        nonce = random_bytes(_NONCE_BYTES)
        if len(nonce) != _NONCE_BYTES:
            raise ValueError(f"random_bytes({_NONCE_BYTES}) gave {len(nonce)} bytes")
        head += nonce
        bound = self._namespace + _sized(key)
        return head + self._sealing.encrypt(content, nonce, head, bound)

    def open(self, key: bytes, stored: bytes) -> dict[str, bytes]:
        """The segments of a stored session: the inverse of `seal`.

        The dict may be shared with whoever opens the same bytes again: do not change it.

        Args:
            key: the record's, 32 bytes.
            stored: what the grid keeps under it.

        Raises:
            SessionEncryptionError: it is encrypted and does not open with the keys here; or it is
                not, and plain is not among them.
            SessionFormatError: as `payload.split` does; and for what cannot be decompressed, or
                would be too large then.
        """
        header = stored[:2]
        if header == HEADER:
            if self._reads_plain:
                return split(stored)
            raise SessionEncryptionError(_NOT_ENCRYPTED)
        if header not in _SEALED:
            return split(stored)  # which says what is wrong
        flags = header[1]
        if flags & ENCRYPTED:
            content = self._decrypted(key, stored)
        elif self._reads_plain:
            content = stored[2:]
        else:
            raise SessionEncryptionError(_NOT_ENCRYPTED)
        if flags & COMPRESSED:
            content = self._decompressed(content)
        return split(HEADER + content)

    def _decrypted(self, key: bytes, stored: bytes) -> bytes:
        if not self._masters:
            raise SessionEncryptionError(
                "a stored session is encrypted, and encryption_keys is not set here; it was left "
                "as it is: set the keys that the other workers have"
            )
        if len(stored) < _NONCE_END + _TAG_BYTES:
            raise SessionEncryptionError("a stored session is encrypted, and cut short")
        master = self._masters.get(stored[len(HEADER) : _ID_END])
        if master is None:
            raise SessionEncryptionError(
                "a stored session is encrypted with a key that is not among the encryption_keys "
                "set here; it was left as it is: set all keys that the other workers have, and "
                "keep a key that is replaced at the end of the list until nothing is stored with it"
            )
        head, ciphertext = stored[:_NONCE_END], memoryview(stored)[_NONCE_END:]
        bound = self._namespace + _sized(key)
        if (content := master.decrypt(ciphertext, head[_ID_END:], head, bound)) is None:
            raise SessionEncryptionError(
                "a stored session is encrypted with one of the encryption_keys set here, and does "
                "not open: it was changed, or belongs to another session or namespace; it was "
                "left as it is"
            )
        return content

    def _decompressed(self, frame: bytes) -> bytes:
        """At most as many bytes as a session may have, and a window of that size, in memory."""
        zstd = _zstd()
        if zstd is None:
            raise SessionFormatError(f"a stored session is compressed, and {_NO_ZSTD}")
        most = self._max_bytes - len(HEADER)
        window = min(max(most.bit_length(), _MIN_WINDOW), _MAX_WINDOW)
        opened = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
        try:
            content: bytes = opened.decompress(frame, max_length=most + 1)
        except zstd.ZstdError:
            trouble = (
                "it is no zstd frame, or one that needs more memory than max_payload_bytes "
                f"({self._max_bytes:,}) allows"
            )
        else:
            if opened.eof and not opened.unused_data and len(content) <= most:
                return content
            if len(content) > most:
                trouble = f"it takes more than max_payload_bytes ({self._max_bytes:,}) opened"
            else:
                trouble = "it goes on after its end" if opened.eof else "it is cut short"
        raise SessionFormatError(f"a stored session cannot be decompressed: {trouble}")


class _MasterKey:
    """One of the encryption keys, and what is done with it.

    Attributes:
        id: says in a stored session which key it is; tells nothing of the key.
    """

    def __init__(self, secret: bytes) -> None:
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        self._secret = secret
        self._aes, self._does_not_open, self._hkdf, self._sha256 = AESGCM, InvalidTag, HKDF, SHA256
        digest = self._derive(_KEY_ID)
        self.id = bytes((digest[0] & 0x7F,)) + digest[1:_ID_BYTES]

    def _derive(self, info: bytes) -> bytes:
        return self._hkdf(self._sha256(), KEY_BYTES, None, info).derive(self._secret)

    def encrypt(
        self, content: bytes | memoryview, nonce: bytes, head: bytes, bound: bytes
    ) -> bytes:
        """The ciphertext and its tag."""
        own = self._aes(self._derive(_RECORD_KEY + bound))
        return own.encrypt(nonce, content, head + bound)

    def decrypt(
        self, ciphertext: bytes | memoryview, nonce: bytes, head: bytes, bound: bytes
    ) -> bytes | None:
        """What was encrypted; None where one bit is another than it was."""
        own = self._aes(self._derive(_RECORD_KEY + bound))
        try:
            return own.decrypt(nonce, ciphertext, head + bound)
        except self._does_not_open:
            return None


def _sized(text: bytes) -> bytes:
    return len(text).to_bytes(4, "big") + text


if sys.version_info >= (3, 14):
    _NO_ZSTD = "this Python was built without compression.zstd"

    def _zstd() -> Any:
        try:
            from compression import zstd
        except ImportError:
            return None
        return zstd

else:
    _NO_ZSTD = "backports.zstd is not there: pip install 'gridsession[compression]'"

    def _zstd() -> Any:
        try:
            from backports import zstd
        except ImportError:
            return None
        return zstd
