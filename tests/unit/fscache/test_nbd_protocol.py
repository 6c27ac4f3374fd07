import errno
import struct

import pytest
from fakes.nbd_client import OPTION_MAGIC, go, option, replies, request

from fscache.nbd.handshake import Export, Handshake, Phase
from fscache.nbd.protocol import (
    MAX_PAYLOAD,
    Command,
    ExportFlags,
    ProtocolError,
    Request,
    RequestParser,
    wire_error,
)

FLAGS = ExportFlags.HAS_FLAGS | ExportFlags.READ_ONLY
EXPORT = Export(0x123456000, FLAGS)
HELLO = struct.pack(">I", 3)


def begun(exports=None, hello=HELLO):
    handshake = Handshake({b"": EXPORT} if exports is None else exports)
    assert handshake.greeting() == b"NBDMAGICIHAVEOPT\0\3"
    assert handshake.receive(hello) == b""
    return handshake


def test_go_begins_with_what_was_told():
    handshake = begun()
    answers = replies(handshake.receive(go(infos=[3, 1, 77])))
    assert handshake.phase is Phase.TRANSMISSION
    assert handshake.export is EXPORT
    assert not handshake.structured
    assert answers == [
        (7, 3, struct.pack(">HQH", 0, EXPORT.size, 3)),
        (7, 3, b"\0\1"),
        (7, 3, struct.pack(">HIII", 3, 1, 65536, MAX_PAYLOAD)),
        (7, 1, b""),
    ]


def test_info_tells_and_goes_on():
    handshake = begun()
    assert [kind for _, kind, _ in replies(handshake.receive(go(number=6)))] == [3, 1]
    assert handshake.phase is Phase.OPTIONS
    assert handshake.export is None


def test_structured_replies_are_agreed_on():
    handshake = begun()
    assert replies(handshake.receive(option(8))) == [(8, 1, b"")]
    answers = replies(handshake.receive(go()))
    assert handshake.structured
    assert answers[0][2] == struct.pack(">HQH", 0, EXPORT.size, FLAGS | 1 << 7)


@pytest.mark.parametrize(
    ("sent", "kind"),
    [
        (option(8, b"x"), 0x80000003),
        (option(3, b"x"), 0x80000003),
        (option(5), 0x80000001),
        (option(10, b"\0" * 20), 0x80000001),
        (option(4711), 0x80000001),
        (go(b"other"), 0x80000006),
        (go(b"other", number=6), 0x80000006),
        (option(7), 0x80000003),
        (option(7, struct.pack(">I", 1 << 31) + b"\0\0"), 0x80000003),
        (option(7, struct.pack(">IH", 0, 2) + b"\0\0"), 0x80000003),
        (option(7, struct.pack(">IH", 0, 0) + b"\0\0"), 0x80000003),
    ],
)
def test_refused_options_leave_the_handshake_open(sent, kind):
    handshake = begun()
    ((_, got, data),) = replies(handshake.receive(sent))
    assert (got, data) == (kind, b"")
    assert handshake.phase is Phase.OPTIONS
    assert replies(handshake.receive(go()))[-1][1] == 1


def test_list_names_the_exports():
    handshake = begun({b"": EXPORT, b"two": EXPORT})
    assert replies(handshake.receive(option(3))) == [
        (3, 2, struct.pack(">I", 0)),
        (3, 2, struct.pack(">I", 3) + b"two"),
        (3, 1, b""),
    ]


def test_abort_ends():
    handshake = begun()
    assert replies(handshake.receive(option(2))) == [(2, 1, b"")]
    assert handshake.phase is Phase.CLOSED


@pytest.mark.parametrize(("hello", "zeros"), [(HELLO, 0), (struct.pack(">I", 1), 124)])
def test_old_way_to_name_an_export(hello, zeros):
    handshake = begun(hello=hello)
    head = struct.pack(">QH", EXPORT.size, FLAGS)
    assert handshake.receive(option(1)) == head + bytes(zeros)
    assert handshake.phase is Phase.TRANSMISSION


def test_what_follows_the_handshake_is_kept():
    handshake = begun()
    handshake.receive(go() + request(0, 1, 2, 3))
    assert handshake.rest == request(0, 1, 2, 3)


@pytest.mark.parametrize("size", [1, 3, 7])
def test_cut_up_bytes_mean_the_same(size):
    sent = HELLO + option(8) + option(3) + go(infos=[3]) + request(0, 1)
    whole, cut = Handshake({b"": EXPORT}), Handshake({b"": EXPORT})
    answers = b"".join(cut.receive(sent[at : at + size]) for at in range(0, len(sent), size))
    assert answers == whole.receive(sent)
    assert (cut.rest, cut.phase) == (whole.rest, whole.phase)


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">I", 4),
        HELLO + b"x" * 16,
        HELLO + struct.pack(">QII", OPTION_MAGIC, 3, 1 << 31),
        HELLO + option(1, b"unknown"),
        HELLO + option(3) * 1001,
    ],
)
def test_wrong_handshakes_end_the_connection(sent):
    with pytest.raises(ProtocolError):
        Handshake({b"": EXPORT}).receive(sent)


def test_requests_are_cut_out():
    parser = RequestParser()
    sent = request(0, 7, 4096, 512, 4) + request(3, 8) + request(0, 9, 1, 2)
    assert parser.feed(sent[:40]) == [Request(4, Command.READ, 7, 4096, 512)]
    assert parser.feed(sent[40:]) == [Request(0, 3, 8, 0, 0), Request(0, 0, 9, 1, 2)]
    assert [item.pack() for item in parser.feed(sent)] == [sent[:28], sent[28:56], sent[56:]]


@pytest.mark.parametrize("size", [1, 5, 28, 1000])
def test_payload_of_writes_is_passed_over(size):
    sent = request(1, 7, 0, 100) + b"\x25\x60\x95\x13" * 25 + request(0, 8, 1, 2)
    parser, found = RequestParser(), []
    for at in range(0, len(sent), size):
        found += parser.feed(sent[at : at + size])
    assert [(item.command, item.cookie) for item in found] == [(1, 7), (0, 8)]


def test_a_write_is_reported_when_its_payload_is_over():
    parser = RequestParser()
    assert parser.feed(request(1, 7, 0, 100) + bytes(99)) == []
    assert len(parser.feed(b"\0")) == 1


@pytest.mark.parametrize(
    "sent", [b"\0" * 28, request(0, 1)[1:] + b"\0", request(1, 1, 0, MAX_PAYLOAD + 1)]
)
def test_wrong_requests_end_the_connection(sent):
    with pytest.raises(ProtocolError):
        RequestParser().feed(sent)


def test_errors_that_the_protocol_does_not_know():
    assert wire_error(errno.ENOSPC) == errno.ENOSPC
    assert wire_error(errno.EACCES) == errno.EIO
