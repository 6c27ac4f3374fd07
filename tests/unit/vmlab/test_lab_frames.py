import pytest

from vmlab import frames


def decode(*pieces):
    decoder = frames.Decoder()
    return [frame for piece in pieces for frame in decoder.feed(piece)]


def test_frames_survive_being_cut_anywhere():
    stream = (
        frames.pack(frames.READY, {"release": "6.12"})
        + frames.pack(frames.STDOUT, b"\x00\xff")
        + frames.pack(frames.STDERR)
        + frames.pack(frames.EXIT, {"status": -9})
    )
    expected = [
        (frames.READY, {"release": "6.12"}),
        (frames.STDOUT, b"\x00\xff"),
        (frames.STDERR, b""),
        (frames.EXIT, {"status": -9}),
    ]
    assert decode(stream) == expected
    assert decode(*(stream[at : at + 1] for at in range(len(stream)))) == expected


def test_sizes_are_bounded():
    with pytest.raises(ValueError, match="frame of kind 2 with 4294967295 bytes"):
        decode(b"\x02\xff\xff\xff\xff")
