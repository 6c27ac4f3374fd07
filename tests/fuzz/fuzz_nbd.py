"""Any bytes of an NBD client are answered, or the connection ends with ProtocolError."""

import struct

from harness import instrument, run

with instrument():
    from nbd_target import feed


def target(data):
    """Serve a client that sends the input, in three ways of cutting it."""
    whole = feed(data, max(1, len(data)))
    for size in (1, 13):
        found = feed(data, size)
        assert found == whole, (found, whole)


def seeds():
    from fakes.nbd_client import go, option, request

    hello = struct.pack(">I", 3)
    yield hello + go(infos=[3, 1]) + request(0, 1, 4096, 512) + request(2, 2)
    yield hello + option(8) + option(3) + go() + request(1, 3, 0, 20) + bytes(20) + request(3, 4)
    yield hello + option(1) + request(0, 1, 0, 1 << 20) + request(5, 6, 0, 512)
    yield hello + option(5) + option(10, bytes(12)) + go(b"x" * 5000, number=6) + option(2)


if __name__ == "__main__":
    run(target, seeds())
