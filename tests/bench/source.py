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
from pathlib import Path

from erofs.digest import digest
from erofs.rafs import DEFAULT_CHUNK_SIZE, Digester

CHUNK = DEFAULT_CHUNK_SIZE
BIG_NAME = "data"
_LAYERS = 5
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
    def big_bytes(self) -> int:
        return 24 << 20 if self.quick else 256 << 20


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


def pack_layers(source: Path, directory: Path) -> list[Path]:
    """Cut a tar into layers of neighbours; each also brings a tenth of the one below anew."""
    paths = []
    with tarfile.open(source) as tar:
        members = [member for member in tar.getmembers() if not member.islnk()]
        step = len(members) // _LAYERS + 1
        for number in range(_LAYERS):
            start = number * step
            path = directory / f"layer{number}.tar"
            with tarfile.open(path, "w") as layer:
                for member in members[max(0, start - step // 10) : start + step]:
                    layer.addfile(member, tar.extractfile(member) if member.isreg() else None)
            paths.append(path)
    return paths


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
