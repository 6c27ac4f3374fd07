"""SHA-256 of each block of a buffer; as a program: of ranges of an open file, into that file.

Nothing of this package and little of the standard library, so that `python -I -S blockhash.py`
starts at once. The digest of a block takes hardly longer than its call, under the
interpreter's lock, so threads do not help: whoever has much to hash starts this program once
for each core (`builder.hashtree`).
"""

import hashlib
import struct
import sys

# Of `os`, whose import takes as long as that of all the rest.
from posix import pread, pwrite

__all__ = ["REQUEST_BYTES", "block_digests", "pack_request"]

_WORD = 8
REQUEST_BYTES = 4 * _WORD
# Answers on standard output: one byte for each request, an error number or this.
DONE = 0
_SHORT_READ = 5  # EIO


def block_digests(
    data: bytes | bytearray | memoryview, block_size: int, salt: bytes = b""
) -> bytes:
    """Return the digests of `salt` and each block, in order; the last block may be shorter."""
    if not salt and not len(data) % block_size:
        sha256 = hashlib.sha256
        # All at once: a tuple for each of half a million blocks takes a tenth of the time.
        blocks = struct.unpack(f"{block_size}s" * (len(data) // block_size), data)
        return b"".join([sha256(block).digest() for block in blocks])
    start = hashlib.sha256(salt).copy
    view = memoryview(data)
    digests = []
    for position in range(0, len(view), block_size):
        state = start()
        state.update(view[position : position + block_size])
        digests.append(state.digest())
    return b"".join(digests)


def pack_request(offset: int, length: int, block_size: int, target: int) -> bytes:
    """Return the request to digest a range and to write the digests to `target`; all in bytes."""
    words = (offset, length, block_size, target)
    return b"".join(word.to_bytes(_WORD, "little") for word in words)


def _answer(descriptor: int, salt: bytes, request: bytes) -> int:
    """Carry out a request; return what to answer."""
    offset, length, block_size, target = (
        int.from_bytes(request[at : at + _WORD], "little") for at in range(0, REQUEST_BYTES, _WORD)
    )
    try:
        data = pread(descriptor, length, offset)
        if len(data) != length:
            return _SHORT_READ
        digests = memoryview(block_digests(data, block_size, salt))
        while digests:
            count = pwrite(descriptor, digests, target)
            digests, target = digests[count:], target + count
    except OSError as error:
        return error.errno or _SHORT_READ
    return DONE


def _serve(descriptor: int, salt: bytes) -> None:
    """Answer requests until the parent closes the pipe."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while len(request := requests.read(REQUEST_BYTES)) == REQUEST_BYTES:
        answers.write(bytes([_answer(descriptor, salt, request)]))
        answers.flush()


if __name__ == "__main__":
    _serve(int(sys.argv[1]), bytes.fromhex(sys.argv[2]))
