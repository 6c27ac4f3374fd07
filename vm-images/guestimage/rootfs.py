"""Where the files of a guest come from: mmdebstrap, or what is given; and our own first program."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from builder import (
    BuildOptions,
    ExportOptions,
    MergeOptions,
    SourceType,
    build,
    export_block,
    merge,
)
from builder.backends import blob_directory
from erofs.rafs import Compressor
from guestimage.errors import GuestImageError
from guestimage.programs import run

__all__ = ["DEFAULT_SUITE", "bootstrap_debian", "make_filesystem"]

DEFAULT_SUITE = "bookworm"
_MMDEBSTRAP_SECONDS = 1800
_APT_CONFIG_SECONDS = 30
# Downloads go the way that this machine's own go.
_APT_KEYS = ("Acquire::http::Proxy", "Acquire::https::Proxy", "Acquire::Check-Valid-Until")
# What a guest without a package manager does not need.
_LEFT_OUT = (
    "/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*",
    "/var/cache/apt/*", "/var/lib/apt/lists/*", "/var/log/*",
)  # fmt: skip
# Directories that the first program mounts on; an image that is read-only has to have them.
_PLACES = ("dev", "proc", "run", "sbin", "sys", "tmp")
_INIT = "sbin/init"


def bootstrap_debian(work: Path, suite: str, packages: tuple[str, ...]) -> Path:
    """Return a tar of Debian minbase with some packages, which is downloaded.

    Args:
        work: a directory.
        suite: of Debian.
        packages: in addition.

    Raises:
        GuestImageError: mmdebstrap is missing or fails.
    """
    settings = run(["apt-config", "dump"], "apt", seconds=_APT_CONFIG_SECONDS)
    # In a file: proxies may have passwords.
    file = work / "apt.conf"
    file.touch(0o600)
    file.write_text(
        "".join(f"{line}\n" for line in settings.splitlines() if line.startswith(_APT_KEYS))
    )
    target = work / "debian.tar"
    words: list[str | Path] = ["mmdebstrap", "--variant=minbase", f"--aptopt={file}"]
    words += [f"--dpkgopt=path-exclude={pattern}" for pattern in _LEFT_OUT]
    if packages:
        words.append(f"--include={','.join(packages)}")
    # Its own clock: the same packages give the same tar.
    environment = {"SOURCE_DATE_EPOCH": "0", "TMPDIR": str(work)}
    words += [suite, target]
    run(words, "mmdebstrap", seconds=_MMDEBSTRAP_SECONDS, environment=environment)
    return target


def _init_layer(path: Path) -> None:
    """Write the layer that has our first program and the places it mounts on."""
    program = Path(__file__).with_name("init").read_bytes()
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in _PLACES:
            member = tarfile.TarInfo(name)
            member.type, member.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            archive.addfile(member)
        member = tarfile.TarInfo(_INIT)
        member.size, member.mode = len(program), 0o755
        archive.addfile(member, io.BytesIO(program))


def make_filesystem(source: Path, target: Path, work: Path, *, own_init: bool = True) -> None:
    """Write the EROFS of a directory or tar, with our first program on top.

    It is uncompressed and has blocks of 4096 bytes, so that DAX can map it.

    Args:
        source: a directory, or a tar, which may be compressed.
        target: the file.
        work: an empty directory.
        own_init: False leaves what the source has as `/sbin/init`.

    Raises:
        NydusError: the source cannot be read.
        GuestImageError: it is not there.
    """
    if not source.exists():
        raise GuestImageError("no such directory or tar", path=source)
    sources = [source]
    if own_init:
        sources.append(work / "init.tar")
        _init_layer(sources[-1])
    blobs = work / "blobs"
    blobs.mkdir()
    bootstraps = [work / f"layer{number}.boot" for number in range(len(sources))]
    for layer, bootstrap in zip(sources, bootstraps, strict=True):
        kind = SourceType.DIRECTORY if layer.is_dir() else SourceType.TAR
        build(
            layer,
            BuildOptions(
                source_type=kind, bootstrap=bootstrap, blob_dir=blobs, compressor=Compressor.NONE
            ),
        )
    merged = work / "merged.boot"
    merge(bootstraps, MergeOptions(bootstrap=merged, keep_ids=True))
    export_block(merged, target, blob_directory(blobs), ExportOptions())
