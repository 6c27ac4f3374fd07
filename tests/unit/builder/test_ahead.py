"""A stream that is read ahead gives the same bytes, and errors where they are."""

from __future__ import annotations

import io

import pytest

from builder.errors import BuildError
from builder.source.ahead import AheadStream

_MIB = 1 << 20


class _Breaking(io.BytesIO):
    """Raises behind its bytes."""

    def readinto(self, buffer, /):
        count = super().readinto(buffer)
        if not count:
            raise BuildError("broken")
        return count


@pytest.mark.parametrize("size", [0, 1, _MIB, 2 * _MIB + 5])
def test_all_bytes_in_order(size):
    content = bytes(number % 251 for number in range(1000)) * (size // 1000 + 1)
    with AheadStream(io.BytesIO(content[:size])) as ahead:
        assert ahead.read() == content[:size]
        assert ahead.read(1) == b""


def test_an_error_comes_behind_the_bytes_before_it():
    with AheadStream(_Breaking(b"a" * (_MIB + 3))) as ahead:
        buffer = io.BufferedReader(ahead, 16)
        assert buffer.read(_MIB + 3) == b"a" * (_MIB + 3)
        for _ in range(2):
            with pytest.raises(BuildError, match="broken"):
                buffer.read(1)
