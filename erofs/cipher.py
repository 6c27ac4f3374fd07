"""Encryption of blobs: AES-128-XTS with one key and one IV for all of a blob (spec 4.8).

The library is loaded on first use. Keys lie in the bootstrap in clear, so nothing here
protects against who has that; they are kept out of messages all the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

from erofs.errors import CodecError, CorruptStructure
from erofs.rafs import BlobEntry, BlobFeatures, Cipher

__all__ = ["UNIT", "BlobCipher", "blob_cipher"]

KEY_SIZE = 32
IV_SIZE = 16
# Less than this is padded, in bytes.
UNIT = 16
# Behind what is too short for XTS and was therefore padded to one unit.
_PADDING_END = b"\x78\x90"
_PADDED_SIZE = UNIT + len(_PADDING_END)


@cache
def _library() -> Callable[[bytes, bytes], Any]:
    try:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    except ImportError as error:
        raise CodecError(f"the Python package cryptography is not installed ({error})") from error
    return lambda key, iv: Cipher(algorithms.AES(key), modes.XTS(iv))


class BlobCipher:
    """Encrypts and decrypts what is stored in one blob; threads may share it.

    Args:
        key: 32 bytes whose halves differ.
        iv: 16 bytes.
    """

    def __init__(self, key: bytes, iv: bytes) -> None:
        if len(key) != KEY_SIZE or len(iv) != IV_SIZE or key[:UNIT] == key[UNIT:]:
            raise CodecError("key or IV of a blob that AES-128-XTS does not take")
        self.key = key
        self.iv = iv

    @classmethod
    def generate(cls) -> BlobCipher:
        """Return a cipher with a new random key and IV."""
        while True:
            key = os.urandom(KEY_SIZE)
            if key[:UNIT] != key[UNIT:]:
                return cls(key, os.urandom(IV_SIZE))

    def __repr__(self) -> str:
        return "BlobCipher(...)"

    def _cipher(self) -> Any:
        return _library()(self.key, self.iv)

    def encrypt(self, data: bytes | bytearray | memoryview) -> bytes:
        """Return the ciphertext: as long as `data`, but 18 bytes for less than 16."""
        if len(data) < UNIT:
            missing = UNIT - len(data)
            data = bytes(data) + bytes([missing]) * missing + _PADDING_END
        context = self._cipher().encryptor()
        result: bytes = context.update(data) + context.finalize()
        return result

    def decrypt(self, data: bytes | bytearray | memoryview, size: int | None = None) -> bytes:
        """Return the plaintext.

        Args:
            data: ciphertext.
            size: length of the plaintext where it is known; without it, 18 bytes that look
                padded are taken for it.

        Raises:
            CodecError: no ciphertext has this length.
        """
        if len(data) < UNIT:
            raise CodecError("encrypted data is too short", expected=UNIT, got=len(data))
        context = self._cipher().decryptor()
        plain: bytes = context.update(data) + context.finalize()
        if len(plain) != _PADDED_SIZE or size == _PADDED_SIZE:
            return plain
        return _without_padding(plain)

    @staticmethod
    def stored_size(size: int) -> int:
        """Return the length of the ciphertext of so many bytes."""
        return size if size >= UNIT else _PADDED_SIZE

    def fields(self) -> dict[str, Any]:
        """Return what a blob table entry says of the cipher, as `BlobEntry._replace` takes it."""
        return {
            "blob_meta_digest": self.key,
            "blob_meta_size": int.from_bytes(self.iv[:8], "little"),
            "cipher_iv": self.iv[8:],
            "cipher": Cipher.AES_128_XTS,
        }


def _without_padding(plain: bytes) -> bytes:
    count = plain[UNIT - 1]
    padding = plain[UNIT - count : UNIT] if 0 < count <= UNIT else b""
    if plain[UNIT:] != _PADDING_END or not padding or padding != bytes([count]) * count:
        return plain
    return plain[: UNIT - count]


def blob_cipher(entry: BlobEntry) -> BlobCipher | None:
    """Return the cipher of an encrypted blob, None for others.

    Raises:
        CorruptStructure: its key is none, or it is said to be encrypted, but not how.
    """
    found = entry.encryption()
    if found is not None:
        return BlobCipher(*found)
    if entry.features & BlobFeatures.ENCRYPTED:
        raise CorruptStructure("encrypted blob without its cipher", blob=entry.id)
    return None
