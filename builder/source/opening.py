"""Open what a tar comes from: a file, FIFO, character device or stream, compressed or not."""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from builder.errors import BuildError
from builder.source.ahead import AheadStream
from builder.source.unpacking import GzipStream, ZstdStream, is_gzip, is_zstd
from builder.tarstream import ByteStream
from erofs.errors import error_context

__all__ = ["drain", "open_seekable_tar", "open_source", "open_tar", "source_name"]

_BUFFER_BYTES = 1 << 20
_HEADERS_BYTES = 8 << 10
_MAGIC_BYTES = 4


def source_name(source: Path | BinaryIO) -> str:
    """Return what to call a source in messages."""
    return str(source if isinstance(source, Path) else getattr(source, "name", "input"))


@contextmanager
def open_source(
    source: Path | BinaryIO, buffer_bytes: int = _BUFFER_BYTES
) -> Iterator[io.BufferedReader[Any]]:
    """Open a source for reading forward, as it is; errors of the block name it.

    Raises:
        BuildError: it cannot be read, or is no file, FIFO or character device.
    """
    name = source_name(source)
    try:
        with ExitStack() as stack, error_context(path=name):
            raw = source
            if isinstance(raw, Path):
                mode = raw.stat().st_mode
                if stat.S_ISDIR(mode) or stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
                    raise BuildError("must be a regular file, FIFO or character device")
                raw = stack.enter_context(raw.open("rb", buffering=0))
            buffered = io.BufferedReader(cast(io.RawIOBase, raw), buffer_bytes)
            if not isinstance(source, Path):
                # What was handed in stays open when the wrapper goes.
                stack.callback(buffered.detach)
            # Gzip of nothing is a layer without members to whoever unpacks it, nothing is none.
            if not buffered.peek(1):
                raise BuildError("empty file")
            yield buffered
    except OSError as error:
        raise BuildError(f"cannot be read ({error.strerror})", path=name) from error


@contextmanager
def open_tar(source: Path | BinaryIO, *, unpack: bool = True) -> Iterator[io.BufferedReader[Any]]:
    """Open a tar for reading forward; gzip and zstd are unpacked when the first bytes say so.

    All of a compressed source is read before the block is left without an error, so that its
    checksums are, and all of a pipe, so that its writer is not killed.

    Raises:
        BuildError: as `open_source`, broken, or compressed without `unpack`.
    """
    with open_source(source) as raw, ExitStack() as stack:
        head = raw.peek(_MAGIC_BYTES)[:_MAGIC_BYTES]
        packed: GzipStream | ZstdStream | AheadStream | None = None
        if is_gzip(head):
            packed = stack.enter_context(GzipStream(raw))
        elif is_zstd(head):
            packed = stack.enter_context(ZstdStream(raw))
        if packed is not None and not unpack:
            raise BuildError("is compressed, a plain tar is wanted")
        is_file = isinstance(source, Path) and source.is_file()
        if packed is not None and is_file:
            # Not of a pipe: nobody could interrupt a thread that waits for its writer.
            packed = stack.enter_context(AheadStream(packed))
        stream: io.BufferedReader[Any] = (
            raw if packed is None else io.BufferedReader(packed, _BUFFER_BYTES)
        )
        yield stream
        if packed is not None or not is_file:
            drain(stream)


@contextmanager
def open_seekable_tar(source: Path | BinaryIO) -> Iterator[io.BufferedReader[Any] | None]:
    """Open a tar that lies in a file as it is; None for others, which `open_tar` opens.

    Its buffer is small, since it is for headers alone.

    Raises:
        BuildError: it cannot be read.
    """
    if not isinstance(source, Path) or not source.is_file():
        yield None
        return
    with open_source(source, _HEADERS_BYTES) as stream:
        head = stream.peek(_MAGIC_BYTES)[:_MAGIC_BYTES]
        yield None if is_gzip(head) or is_zstd(head) else stream


def drain(stream: ByteStream) -> None:
    """Read a stream to its end."""
    while stream.read(_BUFFER_BYTES):
        pass
