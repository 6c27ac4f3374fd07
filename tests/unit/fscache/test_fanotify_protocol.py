import errno
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscache.protocol import (
    NO_FD,
    Event,
    KernelMessageError,
    ProtocolError,
    pack_response,
    parse_events,
)

MASK = 0x100000


def event(records=None, *, fd=7, version=3, metadata_length=24, length=None, pad=b""):
    body = RANGE if records is None else records
    total = metadata_length + len(body) if length is None else length
    head = struct.pack("=IBBHQii", total, version, 0, metadata_length, MASK, fd, 42)
    return head + pad + body


def range_record(offset=0x1000, count=0x2000, length=24):
    return struct.pack("=BBHIQQ", 6, 0, length, 0, offset, count)


RANGE = range_record()
PIDFD = struct.pack("=BBHi", 4, 0, 8, 9)


def test_one_event_has_the_documented_layout():
    raw = bytes.fromhex(
        "30000000 03 00 1800 0000100000000000 07000000 2a000000"
        "06 00 1800 00000000 0010000000000000 0020000000000000"
    )
    assert raw == event()
    assert parse_events(raw) == [Event(MASK, 7, 42, 0x1000, 0x2000)]


def test_no_bytes_are_no_events():
    assert parse_events(b"") == []


def test_batch_is_walked_by_lengths():
    batch = event(fd=1) + event(PIDFD + RANGE, fd=2) + event(pad=b"\0" * 8, metadata_length=32)
    assert [(item.fd, item.offset) for item in parse_events(batch)] == [
        (1, 0x1000),
        (2, 0x1000),
        (7, 0x1000),
    ]


def test_offset_and_length_of_64_bits():
    (item,) = parse_events(event(range_record(2**63, 2**64 - 1)))
    assert (item.offset, item.length) == (2**63, 2**64 - 1)


@pytest.mark.parametrize(
    "records",
    [
        b"",
        PIDFD,
        b"\6\0",
        range_record(length=0),
        range_record(length=3),
        range_record(length=25),
        range_record(length=0xFFFF),
        RANGE[:20],
        struct.pack("=BBHI", 6, 0, 8, 0),
    ],
)
def test_missing_or_broken_range_record_is_a_value(records):
    (item, after) = parse_events(event(records) + event(fd=8))
    assert (item.fd, item.offset, item.length) == (7, -1, -1)
    assert after.fd == 8


def test_event_without_descriptor_is_a_value():
    (item,) = parse_events(event(fd=NO_FD))
    assert item.fd == NO_FD


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (event(version=2), "version"),
        (event(length=0), "lengths"),
        (event(length=23), "lengths"),
        (event(length=49), "lengths"),
        (event(length=0xFFFFFFFF), "lengths"),
        (event(metadata_length=16, length=48), "lengths"),
        (event(metadata_length=64, length=48), "lengths"),
        (event()[:23], "truncated"),
    ],
)
def test_bad_event_raises_and_hands_over_those_before(bad, text):
    with pytest.raises(KernelMessageError, match=text) as caught:
        parse_events(event(fd=5) + bad)
    assert [item.fd for item in caught.value.events] == [5]
    assert caught.value.where["offset"] == 48
    assert isinstance(caught.value, ProtocolError)


@given(st.binary(max_size=300))
def test_any_bytes_parse_or_raise(data):
    try:
        events = parse_events(data)
    except KernelMessageError as error:
        events = error.events
    assert all(isinstance(item, Event) for item in events)


@given(st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**64 - 1)), max_size=20))
def test_what_the_kernel_sends_comes_back(items):
    batch = b"".join(event(range_record(offset), fd=fd) for fd, offset in items)
    assert [(item.fd, item.offset) for item in parse_events(batch)] == items


@given(st.integers(0, 47), st.binary(min_size=1, max_size=8))
def test_damaged_events_parse_or_raise(position, damage):
    raw = bytearray(event() + event())
    raw[position : position + len(damage)] = damage
    try:
        events = parse_events(raw)
    except KernelMessageError as error:
        events = error.events
    assert len(events) <= 2


def test_responses():
    assert pack_response(7, allow=True) == struct.pack("=iI", 7, 1)
    assert pack_response(7, allow=False) == struct.pack("=iI", 7, 2 | errno.EIO << 24)
