"""Digests and checksums of chunks; libraries are loaded on first use."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from typing import Any

from erofs.errors import CodecError
from erofs.rafs import Digester

__all__ = ["crc32c", "digest", "function"]


@cache
def _blake3() -> Any:
    try:
        from blake3 import blake3
    except ImportError as error:
        raise CodecError(f"the Python package blake3 is not installed ({error})") from error
    return blake3


@cache
def _crc32c() -> Any:
    """Return the function of the package, out of its extension where that can be found.

    The package itself loads `importlib.metadata`, for its version alone, which takes 25 ms.
    """
    package = PathFinder.find_spec("crc32c")
    places = None if package is None else package.submodule_search_locations
    found = None if places is None else PathFinder.find_spec("_crc32c", list(places))
    try:
        if found is None or found.loader is None:
            from crc32c import crc32c

            return crc32c
        extension = module_from_spec(found)
        found.loader.exec_module(extension)
        return extension.crc32c
    except ImportError as error:
        raise CodecError(f"the Python package crc32c is not installed ({error})") from error


def digest(algorithm: Digester, data: bytes | bytearray | memoryview) -> bytes:
    """Return the 32-byte digest of an uncompressed chunk."""
    return function(algorithm)(data)


def function(algorithm: Digester) -> Callable[[bytes | bytearray | memoryview], bytes]:
    """Return the function for one algorithm: of many small chunks the choice takes its time."""
    if algorithm is Digester.SHA256:
        return lambda data: hashlib.sha256(data).digest()
    blake3 = _blake3()
    return lambda data: blake3(data).digest()


def crc32c(data: bytes | bytearray | memoryview) -> int:
    """Return the CRC-32C (Castagnoli) of `data`."""
    result: int = _crc32c()(data)
    return result
