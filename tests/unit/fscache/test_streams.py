"""Who is followed: readers that go from chunk to chunk, and nobody else."""

import random

from fscache.cache.streams import REMEMBERED, Streams


def one(index):
    return range(index, index + 1)


def test_a_reader_that_goes_on_is_followed_further_and_further():
    streams = Streams(4)
    assert [streams.ahead(one(index)) for index in range(7)] == [0, 1, 2, 4, 4, 4, 4]


def test_who_goes_on_is_followed_in_steps_of_several_chunks():
    streams = Streams(16)
    ends = [index + 1 + streams.ahead(one(index)) for index in range(40)]
    assert ends[:6] == [1, 3, 5, 8, 13, 20]
    assert sorted(set(ends[5:])) == list(range(20, 57, 4))
    assert all(end - index > 12 for index, end in enumerate(ends) if index >= 5)


def test_several_requests_within_one_chunk_are_one_step():
    streams = Streams(4)
    streams.ahead(one(0))
    assert [streams.ahead(one(0)) for _ in range(5)] == [0] * 5
    assert [streams.ahead(one(1)) for _ in range(3)] == [1] * 3


def test_requests_over_several_chunks():
    streams = Streams(8)
    assert streams.ahead(range(3)) == 0
    assert streams.ahead(range(3, 6)) == 1
    assert streams.ahead(range(5, 8)) == 2


def test_random_readers_are_not_followed():
    streams = Streams(4)
    order = list(range(0, 20_000, 2))
    random.Random(1).shuffle(order)
    assert not any(streams.ahead(one(index)) for index in order)


def test_several_readers_at_once():
    streams = Streams(4)
    starts = [1000 * number for number in range(10)]
    for step in range(4):
        answers = {streams.ahead(one(start + step)) for start in starts}
        assert answers == {[0, 1, 2, 4][step]}


def test_readers_are_forgotten():
    streams = Streams(4)
    for index in range(0, 2 * (REMEMBERED + 1), 2):
        streams.ahead(one(index))
    assert streams.ahead(one(1)) == 0
