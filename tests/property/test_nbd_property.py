"""NBD: what a client sends is understood however it is cut; any bytes are answered or refused."""

import re
import struct

import pytest
from fakes.nbd_client import go, option, request
from hypothesis import given
from hypothesis import strategies as st
from nbd_target import EXPORTS, feed

from fscache.nbd.disk import Disk, Segment
from fscache.nbd.handshake import Handshake, Phase
from fscache.nbd.protocol import MAX_PAYLOAD, ProtocolError, Request, RequestParser

u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))


@st.composite
def options(draw):
    """Options as clients send them, most of them sound."""
    kind = draw(st.sampled_from(["go", "info", "list", "structured", "any"]))
    if kind in ("go", "info"):
        name = draw(st.sampled_from([b"", b"other", b"x" * 300]))
        return go(name, draw(st.lists(u16, max_size=5)), number=7 if kind == "go" else 6)
    if kind == "any":
        return option(draw(u32), draw(st.binary(max_size=40)))
    return option(3 if kind == "list" else 8)


@st.composite
def requests(draw):
    """Requests with their payloads."""
    fields = [draw(part) for part in (u16, st.integers(0, 9), u64, u64, u32)]
    if fields[1] == 1:
        fields[4] = draw(st.integers(0, 100))
    found = Request(*fields)
    return found, found.pack() + bytes(found.length if found.command == 1 else 0)


def pieces(data, sizes):
    position = 0
    for size in sizes:
        yield data[position : position + size]
        position += size
    yield data[position:]


@given(st.lists(options(), max_size=6), st.lists(st.integers(0, 30), max_size=20), st.booleans())
def test_handshakes_mean_the_same_in_pieces(sent, sizes, zeros):
    data = struct.pack(">I", 1 if zeros else 3) + b"".join(sent)
    whole, cut = Handshake(EXPORTS), Handshake(EXPORTS)
    try:
        expected = whole.receive(data)
    except ProtocolError as error:
        # The oldest way of choosing an export has no answer for one that is not there.
        with pytest.raises(ProtocolError, match=f"^{re.escape(str(error))}$"):
            b"".join(cut.receive(piece) for piece in pieces(data, sizes))
        return
    assert b"".join(cut.receive(piece) for piece in pieces(data, sizes)) == expected
    assert (cut.phase, cut.structured, cut.rest) == (whole.phase, whole.structured, whole.rest)
    assert (whole.export is not None) == (whole.phase is Phase.TRANSMISSION)


@given(st.lists(requests(), max_size=10), st.lists(st.integers(0, 60), max_size=20))
def test_requests_are_found_in_pieces(made, sizes):
    data = b"".join(packed for _, packed in made)
    parser = RequestParser()
    found = [item for piece in pieces(data, sizes) for item in parser.feed(piece)]
    assert found == [item for item, _ in made]


@given(st.binary(max_size=300), st.booleans())
def test_any_bytes_are_answered_or_refused(noise, sound):
    begin = struct.pack(">I", 3) + option(8) + go() if sound else b""
    assert feed(begin + noise, 1) == feed(begin + noise, 1000)


@given(u64, st.integers(MAX_PAYLOAD + 1, (1 << 32) - 1))
def test_memory_does_not_depend_on_what_a_client_announces(cookie, length):
    found = feed(struct.pack(">I", 3) + go() + request(1, cookie, 0, length) + bytes(100), 7)
    assert found[-1] == "refused"


@st.composite
def disks(draw):
    """A disk of bytes, and what it holds."""
    segments, content, position = [], b"", 0
    for _ in range(draw(st.integers(0, 6))):
        position += draw(st.integers(0, 5))
        source = draw(st.binary(min_size=1, max_size=20))
        offset = draw(st.integers(0, len(source) - 1))
        piece = source[offset:]
        content += bytes(position - len(content)) + piece
        segments.append(Segment(position, position + len(piece), source, offset))
        position += len(piece)
    size = position + draw(st.integers(0, 5))
    return Disk(size, 1, segments), content + bytes(size - len(content))


@given(disks(), st.data())
def test_parts_of_a_range_are_its_bytes(made, data):
    disk, content = made
    offset = data.draw(st.integers(0, disk.size))
    length = data.draw(st.integers(0, disk.size - offset))
    found = b""
    for source, place, size in disk.parts(offset, length):
        assert size > 0
        found += bytes(size) if source is None else source[place : place + size]
    assert found == content[offset : offset + length]
