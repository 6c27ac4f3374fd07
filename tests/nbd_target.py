"""Everything that bytes of an NBD client pass through, without sockets."""

from fscache.nbd.handshake import Export, Handshake, Phase
from fscache.nbd.protocol import ExportFlags, ProtocolError, RequestParser

EXPORTS = {b"": Export(1 << 30, ExportFlags.HAS_FLAGS)}


def feed(data, size):
    """Give a server bytes in pieces; return what it says, `refused` at the end if it does."""
    handshake, parser = Handshake(EXPORTS), RequestParser()
    said, requests = handshake.greeting(), []
    try:
        for start in range(0, len(data), size):
            piece = data[start : start + size]
            if handshake.phase is Phase.CLOSED:
                break
            if handshake.phase is Phase.TRANSMISSION:
                requests += parser.feed(piece)
                continue
            said += handshake.receive(piece)
            if handshake.phase is Phase.TRANSMISSION:
                requests += parser.feed(handshake.rest)
    except ProtocolError:
        # What came before in the same piece is not told: the connection is over.
        return ["refused"]
    return [said, handshake.phase, handshake.structured, requests]
