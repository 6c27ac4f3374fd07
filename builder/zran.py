"""Find the places in a gzip file from which it can be inflated (spec rafs-v6 4.10).

Where contexts begin, and what they hold, is the real builder's choice to the byte: it goes by
what has been inflated when a chunk begins, so a tar must be read piece by piece, without a
buffer in between that reads ahead.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from builder.blob import Place
from builder.errors import BuildError
from builder.source.unpacking import GzipStream, Packed
from erofs.contexts import ZranContext
from erofs.rafs import MAX_CHUNK_SIZE

__all__ = ["BlockStream", "Blocks", "Stop", "ZranLimits", "ZranPlaces"]


class ZranLimits(NamedTuple):
    """When a new context is begun: bytes of gzip at least and at most, bytes of tar at most."""

    least: int = 512 << 10
    most: int = 1 << 20
    most_output: int = 2 << 20


class Stop(NamedTuple):
    """How far a gzip file was inflated, and the last place in it where that can begin anew.

    Positions count bytes of the file, a partly used one included, and bytes of its content.
    `block_*` are of the last place between two blocks: positions, the bits of the byte before
    that belong to what follows, that byte, and how much of the content may be referred to.
    """

    out_offset: int
    in_offset: int
    block_out: int
    block_in: int
    window_size: int
    bits: int
    byte: int


class Blocks(Protocol):
    """What knows where it stopped inflating."""

    def stop(self) -> Stop | None:
        """Return what is known where reading has come to; None before the first block."""

    def window(self) -> bytes:
        """Return the content before the block of the last stop that it may refer to."""


class BlockStream(GzipStream):
    """The content of a gzip file, inflated exactly as far as it is read.

    Args:
        source: the file; not closed.
        keep_windows: False leaves out what `window` returns.
    """

    _to_boundary = True
    # As the real builder: at the end of its input the library cannot look at what follows the
    # last byte of a chunk, which elsewhere makes the chunk a byte or two longer.
    _input_bytes = 64 << 10

    def __init__(self, source: Packed, *, keep_windows: bool = True) -> None:
        super().__init__(source)
        self._keep_windows = keep_windows
        self._window = b""
        self._block: tuple[int, int, int, int, int] | None = None

    def _pass_boundary(self) -> None:
        inflater = self._inflater
        bits = inflater.unused_bits
        self._block = (
            self.output_position,
            self.input_position,
            inflater.window_size,
            bits,
            inflater.last_byte if bits else 0,
        )
        if self._keep_windows:
            self._window = inflater.window()

    def stop(self) -> Stop | None:
        """Return what is known where reading has come to; None before the first block."""
        if self._block is None:
            return None
        return Stop(self.output_position, self.input_position, *self._block)

    def window(self) -> bytes:
        """Return the content before the last block that it may refer to."""
        return self._window


class ZranPlaces:
    """Finds contexts for the chunks that are read from a gzip file.

    Args:
        blocks: what they are read from.
        chunk_size: that of the build, also for shorter chunks.
        limits: as the real builder has them.

    `contexts` are complete, `dictionaries` are what they name.
    """

    def __init__(self, blocks: Blocks, chunk_size: int, limits: ZranLimits | None = None) -> None:
        self._blocks = blocks
        self._chunk_size = chunk_size
        self._limits = limits or ZranLimits()
        self._chunk_start = (0, 0)
        self.contexts: list[ZranContext] = []
        self.dictionaries = bytearray()

    def begin_chunk(self) -> None:
        """Note that the next bytes which are read belong to a chunk."""
        stop = self._blocks.stop()
        if stop is None:
            raise BuildError("chunk before the first block of gzip data")
        if self._needs_context(stop):
            self.contexts.append(
                ZranContext(
                    in_offset=stop.block_in,
                    out_offset=stop.block_out,
                    dict_offset=len(self.dictionaries),
                    in_len=0,
                    out_len=0,
                    dict_size=stop.window_size,
                    ctx_byte=stop.byte,
                    ctx_bits=stop.bits,
                )
            )
            self.dictionaries += self._blocks.window()
        self._chunk_start = stop.in_offset, stop.out_offset

    def _needs_context(self, stop: Stop) -> bool:
        if not self.contexts:
            return True
        context = self.contexts[-1]
        if stop.block_in == context.in_offset:
            return False
        limits = self._limits
        compressed = stop.in_offset - context.in_offset
        plain = stop.out_offset - context.out_offset
        return (
            compressed >= limits.most // 2
            or plain + self._chunk_size >= limits.most_output
            or (compressed > 2 * context.in_len and context.in_len > limits.least)
        )

    def end_chunk(self) -> Place:
        """Return where the bytes are that were read since `begin_chunk`.

        Raises:
            BuildError: no reader would take the context.
        """
        stop = self._blocks.stop()
        if stop is None:
            raise BuildError("chunk before the first block of gzip data")
        start, output_start = self._chunk_start
        context = self.contexts[-1]
        context = self.contexts[-1] = context._replace(
            in_len=stop.in_offset - context.in_offset,
            out_len=stop.out_offset - context.out_offset,
        )
        if context.out_len > MAX_CHUNK_SIZE:
            raise BuildError(
                "gzip data with blocks that are too large to refer to chunks of this size",
                offset=context.in_offset,
                expected=f"at most {MAX_CHUNK_SIZE} bytes",
                got=context.out_len,
            )
        return Place(
            start,
            stop.in_offset - start,
            len(self.contexts) - 1,
            output_start - context.out_offset,
        )
