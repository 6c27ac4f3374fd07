"""What is written behind comes whole and in order, and its errors come back."""

from __future__ import annotations

import pytest

from builder.behind import WriteBehind, joined


@pytest.mark.parametrize("pieces", [[], [b"a"], [b"%d" % number for number in range(2000)]])
def test_everything_comes_in_order(pieces):
    taken = []
    with WriteBehind(joined(taken.append)) as behind:
        for piece in pieces:
            behind.write(piece)
    assert b"".join(taken) == b"".join(pieces)
    assert len(taken) < 10


def test_what_fails_is_raised_where_it_is_written():
    def refuse(data):
        raise OSError(28, "No space left on device")

    def write():
        with WriteBehind(joined(refuse)) as behind:
            for _ in range(5):
                behind.write(bytes(1 << 20))

    with pytest.raises(OSError, match="No space"):
        write()


def test_nothing_is_written_behind_an_error():
    taken = []

    def write():
        with WriteBehind(joined(taken.append)) as behind:
            behind.write(b"a")
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        write()
    assert not taken
