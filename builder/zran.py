"""Find the places in a gzip file from which it can be inflated (spec rafs-v6 4.10).

Where contexts begin, and what they hold, is the real builder's choice to the byte: it goes by
what has been read when a chunk begins, so a tar must be read through `ZranStream` piece by
piece, without a buffer in between.
"""

from __future__ import annotations

from typing import NamedTuple

from builder.blob import Place
from builder.errors import BuildError
from builder.source.unpacking import GzipStream, Packed
from erofs.contexts import ZranContext
from erofs.rafs import MAX_CHUNK_SIZE

__all__ = ["ZranLimits", "ZranStream"]


class ZranLimits(NamedTuple):
    """When a new context is begun: bytes of gzip at least and at most, bytes of tar at most."""

    least: int = 512 << 10
    most: int = 1 << 20
    most_output: int = 2 << 20


class _Boundary(NamedTuple):
    """The last place between two blocks: where inflating can begin anew."""

    in_offset: int
    out_offset: int
    byte: int
    bits: int
    window: bytes


class ZranStream(GzipStream):
    """The content of a gzip file, and contexts for the chunks that are read from it.

    Args:
        source: the file; not closed.
        chunk_size: that of the build, also for shorter chunks.
        limits: as the real builder has them.

    `contexts` are complete, `dictionaries` are what they name.
    """

    _to_boundary = True

    def __init__(self, source: Packed, chunk_size: int, limits: ZranLimits | None = None) -> None:
        super().__init__(source)
        self._chunk_size = chunk_size
        self._limits = limits or ZranLimits()
        self._output_position = 0
        self._boundary: _Boundary | None = None
        self._chunk_start = (0, 0)
        self.contexts: list[ZranContext] = []
        self.dictionaries = bytearray()

    def _inflate(self, target: memoryview) -> int:
        count = super()._inflate(target)
        self._output_position += count
        inflater = self._inflater
        if inflater.at_boundary:
            bits = inflater.unused_bits
            byte = inflater.last_byte if bits else 0
            self._boundary = _Boundary(
                self.input_position, self._output_position, byte, bits, inflater.window()
            )
        return count

    def begin_chunk(self) -> None:
        """Note that the next bytes which are read belong to a chunk."""
        boundary = self._boundary
        if boundary is None:
            raise BuildError("chunk before the first block of gzip data")
        if self._needs_context(boundary):
            self.contexts.append(
                ZranContext(
                    in_offset=boundary.in_offset,
                    out_offset=boundary.out_offset,
                    dict_offset=len(self.dictionaries),
                    in_len=0,
                    out_len=0,
                    dict_size=len(boundary.window),
                    ctx_byte=boundary.byte,
                    ctx_bits=boundary.bits,
                )
            )
            self.dictionaries += boundary.window
        self._chunk_start = self.input_position, self._output_position

    def _needs_context(self, boundary: _Boundary) -> bool:
        if not self.contexts:
            return True
        context = self.contexts[-1]
        if boundary.in_offset == context.in_offset:
            return False
        limits = self._limits
        compressed = self.input_position - context.in_offset
        plain = self._output_position - context.out_offset
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
        start, output_start = self._chunk_start
        context = self.contexts[-1]
        context = self.contexts[-1] = context._replace(
            in_len=self.input_position - context.in_offset,
            out_len=self._output_position - context.out_offset,
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
            self.input_position - start,
            len(self.contexts) - 1,
            output_start - context.out_offset,
        )
