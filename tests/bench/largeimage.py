"""An image of any size in a registry, made while it is sent: little of it is random."""

from __future__ import annotations

import hashlib
import json
import random
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import closing

from builder.oci import media
from builder.oci.names import parse_reference
from builder.oci.records import Manifest, describe
from builder.oci.registry import RegistrySettings, Repository

_PIECE = 1 << 20
_RANDOM = 96 << 10
_LAYERS = 3
_FILES = 4


def _content(size: int, number: int) -> Iterator[bytes]:
    """Yield a file: of each mebibyte something random, something that repeats, and zeros."""
    some = random.Random(number)
    for start in range(0, size, _PIECE):
        words = b"%d of %d\n" % (start, number)
        piece = some.randbytes(_RANDOM) + words * (_PIECE // 4 // len(words))
        yield piece.ljust(_PIECE, b"\0")[: min(_PIECE, size - start)]


def _layer(size: int, number: int) -> Iterator[bytes]:
    for file in range(_FILES):
        member = tarfile.TarInfo(f"layer{number}/file{file}")
        member.size = size // _FILES
        yield member.tobuf(tarfile.PAX_FORMAT)
        yield from _content(member.size, number * _FILES + file)
        yield bytes(-member.size % 512)
    yield bytes(1024)


def push_large(reference: str, size: int) -> None:
    """Push an image of `size` bytes of content in three layers."""
    settings = RegistrySettings(plain_http=True)
    with closing(Repository(parse_reference(reference), settings, push=True)) as target:
        layers, diff_ids = [], []
        for number in range(_LAYERS):
            upload, packer, plain = target.begin(), zlib.compressobj(1, wbits=31), hashlib.sha256()
            for piece in _layer(size // _LAYERS, number):
                plain.update(piece)
                upload.write(packer.compress(piece))
            upload.write(packer.flush())
            layers.append(upload.finish(media.OCI_LAYER_GZIP))
            diff_ids.append(f"sha256:{plain.hexdigest()}")
        config = json.dumps(
            {"architecture": "amd64", "os": "linux", "config": {},
             "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        ).encode()  # fmt: skip
        stored = describe(config, media.OCI_CONFIG)
        target.put(stored, [config])
        data = Manifest(media.OCI_MANIFEST, stored, tuple(layers)).pack()
        target.publish(data, describe(data, media.OCI_MANIFEST))
