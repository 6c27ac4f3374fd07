import errno
import os
import random
import select
import socket
import threading

import pytest
from fakes.nbd_client import CACHE, DF, DISC, FLUSH, READ, TRIM, WRITE, NbdClient, option, request

from erofs.errors import CodecError
from fscache.cache.cachefile import CacheError
from fscache.nbd.disk import Disk, FileSource, Segment, Slice
from fscache.nbd.protocol import MAX_PAYLOAD, ProtocolError
from fscache.nbd.server import DISK_FLAGS, DiskServer

DATA = random.Random(3).randbytes(1 << 20)
GAP = 5000
SIZE = GAP + 3 * len(DATA)


class Waiting:
    """A source whose ranges become ready when a test says so."""

    slow = False

    def __init__(self, fd):
        self.fd = fd
        self.asked = []
        self.reads = 0
        self.changed = threading.Condition()
        self.failure = None

    def request(self, offset, length, done):
        with self.changed:
            self.asked.append(done)
            self.changed.notify_all()

    def read(self, offset, length):
        self.reads += 1
        if self.failure is not None:
            raise self.failure
        return Slice(self.fd, offset, length)

    def wait(self, count):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.asked) >= count, 30)

    def finish(self, number, error=None):
        self.asked[number](error)


class Slow(FileSource):
    slow = True

    def read(self, offset, length):
        assert threading.current_thread().name.startswith("nbd-answer")
        return DATA[offset : offset + length]


class Rig:
    """A disk of: a file, a gap of zeros, the file when it is ready, the file from memory."""

    def __init__(self, path):
        path.write_bytes(DATA)
        self.path = path
        self.fd = os.open(path, os.O_RDONLY)
        self.waiting = Waiting(self.fd)
        size = len(DATA)
        self.lazy = size + GAP
        self.slow = self.lazy + size
        self.disk = Disk(
            SIZE,
            4096,
            [
                Segment(0, size, FileSource(self.fd), 0),
                Segment(self.lazy, self.slow, self.waiting, 0),
                Segment(self.slow, SIZE, Slow(self.fd), 0),
            ],
        )
        self.server = DiskServer(self.disk, 3)
        self.clients = []
        self.ends = []

    def client(self, *, handshake=True, **options):
        ours, theirs = socket.socketpair()
        ended = threading.Event()

        def end(*, orderly):
            self.ends.append(orderly)
            ended.set()

        self.connection = self.server.start(ours, handshake=handshake, ended=end)
        client = NbdClient(theirs, handshake=handshake, **options)
        client.ended = ended
        self.clients.append(client)
        return client

    def close(self):
        for client in self.clients:
            client.close()
        self.server.close()
        os.close(self.fd)


@pytest.fixture
def rig(tmp_path):
    rig = Rig(tmp_path / "file")
    yield rig
    rig.close()


KINDS = [
    {"handshake": False},
    {"structured": False},
    {"structured": True},
]


@pytest.fixture(params=KINDS, ids=["kernel", "simple", "structured"])
def client(rig, request):
    return rig.client(**request.param)


def test_what_clients_are_told(rig):
    client = rig.client()
    assert (client.size, client.flags) == (SIZE, DISK_FLAGS)
    assert rig.client(structured=True).flags == DISK_FLAGS | 1 << 7
    assert rig.server.connections == 2


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (3, 100), (4096, 20000), (0, len(DATA))])
def test_reads_give_the_bytes(client, offset, length):
    assert client.read(offset, length) == DATA[offset : offset + length]


@pytest.mark.parametrize("flags", [0, DF])
def test_reads_over_several_segments(rig, client, flags):
    expected = DATA[-70_000:] + bytes(GAP) + DATA[:50_000]
    start = len(DATA) - 70_000
    cookie = client.ask(READ, start, len(expected), flags=flags)
    rig.waiting.wait(1)
    rig.waiting.finish(0)
    assert client.answer({cookie: len(expected)}) == (cookie, 0, expected)
    if client.structured:
        assert client.pieces == (1 if flags else 3)


def test_zeros_alone(client):
    assert client.read(len(DATA), GAP) == bytes(GAP)
    assert client.read(0, 0) == b""


def test_slow_sources_do_not_hold_up_a_connection(rig, client):
    assert client.read(rig.slow + 5, 100_000) == DATA[5:100_005]


def test_answers_come_in_the_order_in_which_they_are_ready(rig, client):
    cookies = [client.ask(READ, rig.lazy + 4096 * n, 4096) for n in range(3)]
    rig.waiting.wait(3)
    assert client.read(5, 5) == DATA[5:10]
    for number in (2, 0, 1):
        rig.waiting.finish(number)
        cookie, error, data = client.answer(dict.fromkeys(cookies, 4096))
        assert (cookie, error) == (cookies[number], 0)
        assert data == DATA[4096 * number : 4096 * (number + 1)]


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CodecError("broken"), errno.EIO),
        (CacheError("full", errno.ENOSPC), errno.ENOSPC),
        (CacheError("odd", errno.EROFS), errno.EIO),
    ],
)
def test_what_cannot_be_fetched_is_an_error(rig, client, error, code):
    cookie = client.ask(READ, rig.lazy - 10, 100)
    rig.waiting.wait(1)
    rig.waiting.finish(0, error)
    assert client.answer({cookie: 100})[:2] == (cookie, code)
    assert rig.waiting.reads == 0
    assert client.read(0, 3) == DATA[:3]


@pytest.mark.parametrize("failure", [CodecError("broken"), ValueError("a bug")])
def test_what_cannot_be_read_is_an_error(rig, client, failure):
    rig.waiting.failure = failure
    cookie = client.ask(READ, rig.lazy, 100)
    rig.waiting.wait(1)
    rig.waiting.finish(0)
    assert client.answer({cookie: 100})[:2] == (cookie, errno.EIO)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((READ, SIZE, 1), errno.EINVAL),
        ((READ, SIZE - 1, 2), errno.EINVAL),
        ((READ, 1 << 63, 512), errno.EINVAL),
        ((READ, (1 << 64) - 1, 0xFFFFFF), errno.EINVAL),
        ((READ, 0, MAX_PAYLOAD + 1), errno.EOVERFLOW),
        ((CACHE, SIZE, 1), errno.EINVAL),
        ((TRIM, 0, 512), errno.EPERM),
        ((6, 0, 512), errno.EPERM),
        ((7, 0, 512), errno.EINVAL),
        ((4711, 0, 512), errno.EINVAL),
    ],
)
def test_refusals(client, words, code):
    with pytest.raises(OSError) as caught:
        client.do(*words)
    assert caught.value.errno == code
    assert client.read(0, 3) == DATA[:3]


def test_unknown_flags_are_refused(client):
    with pytest.raises(OSError) as caught:
        client.read(0, 3, flags=1 << 4)
    assert caught.value.errno == errno.EINVAL


def test_writes_are_refused_and_passed_over(rig, client):
    with pytest.raises(OSError) as caught:
        client.do(WRITE, 0, 100_000, payload=request(READ, 9, 0, 5) * 3571 + bytes(12))
    assert caught.value.errno == errno.EPERM
    assert client.read(0, 3) == DATA[:3]
    assert rig.path.read_bytes() == DATA


def test_flush_and_cache(rig, client):
    assert client.do(FLUSH) == b""
    cookie = client.ask(CACHE, rig.lazy, 100_000)
    rig.waiting.wait(1)
    rig.waiting.finish(0)
    assert client.answer({}) == (cookie, 0, b"")
    assert rig.waiting.reads == 0


def test_end_in_order_waits_for_answers(rig, client):
    cookie = client.ask(READ, rig.lazy, 10)
    client.ask(DISC)
    rig.waiting.wait(1)
    rig.waiting.finish(0)
    assert client.answer({cookie: 10}) == (cookie, 0, DATA[:10])
    with pytest.raises(ConnectionError):
        client.take(1)
    assert client.ended.wait(60)
    assert rig.ends == [True]


def test_a_client_that_goes_away_is_forgotten(rig, client):
    client.ask(READ, rig.lazy, 10)
    rig.waiting.wait(1)
    client.close()
    rig.waiting.finish(0)
    assert client.ended.wait(60)
    assert rig.ends == [False]
    rig.connection.join()
    assert rig.server.connections == 0


@pytest.mark.parametrize("sent", [b"x" * 28, request(WRITE, 1, 0, 1 << 30)])
def test_nonsense_ends_the_connection(rig, client, sent):
    other = rig.client()
    client.socket.sendall(sent)
    with pytest.raises(ConnectionError):
        client.take(1)
    assert client.ended.wait(60)
    assert rig.ends == [False]
    assert other.read(0, 5) == DATA[:5]


def test_pause_answers_what_was_taken(rig, client):
    cookie = client.ask(READ, rig.lazy, 10)
    rig.waiting.wait(1)
    rig.server.pause()
    assert rig.server.waiting == 1
    rig.waiting.finish(0)
    assert client.answer({cookie: 10}) == (cookie, 0, DATA[:10])
    with pytest.raises(ConnectionError):
        client.take(1)
    assert client.ended.wait(60)


def test_the_end_is_told_before_slow_answers(rig, client):
    client.ask(READ, rig.lazy, 10)
    rig.waiting.wait(1)
    client.close()
    assert client.ended.wait(60)
    assert rig.server.waiting == 1
    rig.waiting.finish(0)
    rig.connection.join()


def test_handshakes_that_fail(rig):
    with pytest.raises(OSError, match="refused"):
        rig.client(name=b"other")
    ours, theirs = socket.socketpair()
    rig.server.start(ours, handshake=True)
    theirs.sendall(b"\0\0\0\3" + option(2))
    client = NbdClient(theirs, handshake=False)
    assert client.take(18 + 20)
    with pytest.raises(ConnectionError):
        client.take(1)
    client.close()


def test_requests_behind_the_handshake_are_answered(rig):
    ours, theirs = socket.socketpair()
    rig.server.start(ours, handshake=True)
    theirs.sendall(b"\0\0\0\3" + option(1) + request(READ, 5, 0, 3))
    client = NbdClient(theirs, handshake=False)
    client.take(18 + 10)
    assert client.answer({5: 3}) == (5, 0, DATA[:3])
    client.close()


def test_many_readers_over_several_connections(rig):
    clients = [rig.client(handshake=False) for _ in range(3)]
    rng = random.Random(5)
    failures = []

    def work(client):
        places, sizes = {}, {}
        for _ in range(200):
            offset = rng.randrange(len(DATA) - 70_000)
            length = rng.choice([1, 512, 4096, 65536])
            cookie = client.ask(READ, offset, length)
            places[cookie], sizes[cookie] = offset, length
            while len(places) > 5:
                take(client, places, sizes)
        while places:
            take(client, places, sizes)

    def take(client, places, sizes):
        cookie, error, data = client.answer(sizes)
        offset = places.pop(cookie)
        if error or data != DATA[offset : offset + sizes[cookie]]:
            failures.append((offset, error))

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures


def test_a_file_that_became_shorter(rig, client):
    """What cannot be told any more ends the connection; the next one gets an error."""
    os.truncate(rig.path, 50_000)
    client.ask(READ, 0, 100_000)
    with pytest.raises(ConnectionError):
        client.take(100_016)
    other = rig.client(handshake=False)
    with pytest.raises(OSError) as caught:
        other.read(0, 100_000)
    assert caught.value.errno == errno.EIO
    assert other.read(0, 40_000) == DATA[:40_000]


def test_close_uses_no_source_afterwards(rig, client):
    for number in range(3):
        client.ask(READ, rig.lazy + 4096 * number, 4096)
    rig.waiting.wait(3)
    rig.server.close()
    for number in range(3):
        rig.waiting.finish(number)
    assert client.ended.wait(60)
    assert rig.waiting.reads == 0
    ours, theirs = socket.socketpair()
    with pytest.raises(ProtocolError, match="closed"):
        rig.server.start(ours, handshake=False)
    assert theirs.recv(1) == b""
    theirs.close()


def test_a_client_that_takes_no_answers_does_not_stop_the_end(rig):
    client = rig.client(handshake=False)
    for _ in range(20):
        client.ask(READ, 0, len(DATA))
    select.select([client.socket], [], [], 30)
    rig.server.close()
    assert client.ended.wait(60)
