"""The input: a real tree of this machine as a tar, its layers, and one large file."""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from erofs.digest import digest
from erofs.rafs import DEFAULT_CHUNK_SIZE, Digester

CHUNK = DEFAULT_CHUNK_SIZE
BIG_NAME = "data"
# Installed packages are not part of the standard library.
_LEFT_OUT = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Settings:
    """How much is measured, and with what."""

    quick: bool
    source: Path | None
    image_peer: Path | None
    daemon_peer: Path | None
    overlayfs_peer: Path | None = None
    nydusify_peer: Path | None = None
    only_rows: str = ""

    def wants(self, row: str) -> bool:
        """Tell whether a row of the builder is asked for by its name."""
        return fnmatch(row, self.only_rows or "*")

    @property
    def rounds(self) -> int:
        return 3 if self.quick else 5

    @property
    def tree_bytes(self) -> int:
        return 24 << 20 if self.quick else 150 << 20

    @property
    def tree_names(self) -> int:
        return 1500 if self.quick else 9000

    @property
    def files(self) -> int:
        """Files of the trees that have many."""
        return 2000 if self.quick else 100_000

    @property
    def layers(self) -> int:
        """Layers of that many files each."""
        return 3 if self.quick else 10

    @property
    def stream_bytes(self) -> int:
        """What is built through a pipe, to see that memory does not grow with it."""
        return 256 << 20 if self.quick else 10 << 30

    @property
    def big_bytes(self) -> int:
        return 24 << 20 if self.quick else 512 << 20

    @property
    def guest_rounds(self) -> int:
        return 1 if self.quick else self.rounds

    @property
    def guest_bytes(self) -> int:
        """Size of the large file in a guest, whose processor may be emulated."""
        return 8 << 20 if self.quick else 32 << 20


def _walk(top: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(top):
        names[:] = sorted(set(names) - _LEFT_OUT)
        here = Path(directory)
        yield here
        yield from (here / name for name in sorted(files))


def _add(tar: tarfile.TarFile, path: Path, limit: int) -> int:
    """Add one file as it is; return its bytes, 0 when it cannot be read or is too large."""
    try:
        info = tar.gettarinfo(path, str(path).lstrip("/"))
        if info is None or info.size > limit:
            return 0
        # Fractions of seconds would give each member a PAX header.
        info.mtime = int(info.mtime)
        if not info.isreg():
            tar.addfile(info)
            return 0
        with path.open("rb") as file:
            tar.addfile(info, file)
    except OSError:
        return 0
    return info.size


def pack_tree(target: Path, settings: Settings) -> None:
    """Pack the standard library and `/usr/share`, half of the room for each."""
    size = count = 0
    tops = [Path(sysconfig.get_path("stdlib")), Path("/usr/share")]
    with tarfile.open(target, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, top in enumerate(tops, 1):
            share = number / len(tops)
            for path in _walk(top):
                if size >= settings.tree_bytes * share or count >= settings.tree_names * share:
                    break
                size += _add(tar, path, settings.tree_bytes // 10)
                count += 1


_FILES_IN_DIRECTORY = 1000
_HEADER_TEXT = b"%07o\0"


def _header(name: bytes, kind: bytes, size: int) -> bytes:
    """Return a ustar header; `tarfile` would take minutes for a million."""
    block = bytearray(tarfile.BLOCKSIZE)
    block[: len(name)] = name
    for start, value in ((100, 0o755 if kind == b"5" else 0o644), (108, 0), (116, 0)):
        block[start : start + 8] = _HEADER_TEXT % value
    block[124:136], block[136:148] = b"%011o\0" % size, b"%011o\0" % 1_700_000_000
    block[148:156], block[156:157] = b" " * 8, kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pack_files(target: Path, count: int, size: int, top: str = "t") -> None:
    """Pack files of the same size and different content, a thousand in a directory."""
    rng = random.Random(top)
    padding = bytes(-size % tarfile.BLOCKSIZE)
    with target.open("wb", buffering=1 << 20) as tar:
        for number in range(count):
            directory, place = divmod(number, _FILES_IN_DIRECTORY)
            if not place:
                tar.write(_header(b"%s/d%04d/" % (top.encode(), directory), b"5", 0))
            name = b"%s/d%04d/file-%03d.txt" % (top.encode(), directory, place)
            tar.write(_header(name, b"0", size))
            if size:
                # Half of it does not compress.
                noise = rng.randbytes(size // 2)
                tar.write(noise + bytes(size - len(noise)) + padding)
        tar.write(bytes(2 * tarfile.BLOCKSIZE))


def write_plan(source: Path, target: Path) -> tuple[int, int]:
    """Write what the floor has to do: place, size and newness of each chunk of a tar.

    Returns:
        The number of files and of content bytes.
    """
    plan, seen = array("Q"), set()
    files = size = 0
    with tarfile.open(source) as tar, source.open("rb") as data:
        for member in tar:
            if not member.isreg():
                continue
            files += 1
            size += member.size
            for start in range(0, member.size, CHUNK):
                length = min(CHUNK, member.size - start)
                offset = member.offset_data + start
                name = digest(Digester.BLAKE3, os.pread(data.fileno(), length, offset))
                plan.extend((offset, length, name not in seen))
                seen.add(name)
    target.write_bytes(plan)
    return files, size


def pack_big(target: Path, size: int) -> bytes:
    """Pack one file of which half does not compress; return its SHA-256."""
    rng, hash_of_file = random.Random(6), hashlib.sha256()
    text = b"".join(b"%07x. " % number for number in range(256))[:2048]
    info = tarfile.TarInfo(BIG_NAME)
    info.size = size
    with target.open("wb") as raw:
        raw.write(info.tobuf())
        for _ in range(0, size, CHUNK):
            noise = rng.randbytes(CHUNK // 2)
            parts = (noise[at : at + 2048] + text for at in range(0, CHUNK // 2, 2048))
            piece = b"".join(parts)
            hash_of_file.update(piece)
            raw.write(piece)
        raw.write(bytes(2 * tarfile.BLOCKSIZE))
    return hash_of_file.digest()
