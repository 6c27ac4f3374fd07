"""Configuration of the daemon as frozen values (tools section 4); nothing is decoded here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from erofs.values import EMPTY, Value, field
from fscache.backend.settings import BackendConfig

__all__ = [
    "CacheConfig",
    "DaemonConfig",
    "ExternalBackend",
    "OverlayConfig",
    "PrefetchConfig",
    "RafsConfig",
]

MIB = 1 << 20


class PrefetchConfig(Value):
    """Reading ahead of demand; sizes in bytes.

    Args:
        enable: whether anything is prefetched.
        threads: that fetch.
        batch_size: largest single request.
        bandwidth_limit: bytes a second of all threads, 0 for no limit.
        prefetch_all: after the listed files, the rest.
        stream_prefetch: whole blobs by one request each.
    """

    enable: bool = False
    threads: int = 8
    batch_size: int = MIB
    bandwidth_limit: int = 0
    prefetch_all: bool = False
    stream_prefetch: bool = False


class CacheConfig(Value):
    """How blobs are cached; `DaemonConfig.work_dir` says where.

    Args:
        type: `blobcache`, `filecache` (the same), `fscache`, `dummycache` or empty.
        compressed: keep data as in the backend.
        validate: verify fetched chunks; they always are.
        disable_indexed_map: of nydusd's older chunk maps.
        enable_encryption: of cached data.
        enable_convergent_encryption: with keys from the data.
        encryption_key: 64 hex digits.
        prefetch: at the level of blobs.
    """

    type: str = "blobcache"
    compressed: bool = False
    validate: bool = False
    disable_indexed_map: bool = False
    enable_encryption: bool = False
    enable_convergent_encryption: bool = False
    encryption_key: str = field(default="", repr=False)
    prefetch: PrefetchConfig = PrefetchConfig()


class RafsConfig(Value):
    """How the file system behaves; `batch_size` in bytes.

    Args:
        mode: `direct` or `cached`.
        batch_size: to which small reads are enlarged.
        validate: verify digests at run time.
        enable_xattr: show extended attributes.
        iostats_files: count per file.
        access_pattern: record the order of first reads.
        latest_read_files: record which files were read.
        prefetch: at the level of files.
    """

    mode: str = "direct"
    batch_size: int = MIB
    validate: bool = False
    enable_xattr: bool = False
    iostats_files: bool = False
    access_pattern: bool = False
    latest_read_files: bool = False
    prefetch: PrefetchConfig = PrefetchConfig()


class OverlayConfig(Value):
    """Directories of a writable layer."""

    upper_dir: Path
    work_dir: Path


class ExternalBackend(Value):
    """A backend of files that are stored outside of the image, as it was written down."""

    type: str
    patch: Mapping[str, str] = EMPTY
    config: Mapping[str, str] = field(default=EMPTY, repr=False)


class DaemonConfig(Value):
    """What the daemon needs to know to serve one image.

    Args:
        backend: where the blobs are.
        work_dir: cache directory, on ext4, xfs or btrfs for lazy reading.
        id: label of the instance, key of its cache counters.
        cache: how blobs are cached.
        rafs: how the file system behaves.
        overlay: of a writable mount.
        external_backends: of files outside of the image.
        prefetch_files: what to fetch first in place of the bootstrap's table, as absolute paths;
            given with the mount, not in a configuration file.
        text: what all this was decoded from, for a successor of a killed daemon.
    """

    backend: BackendConfig
    work_dir: Path
    id: str = ""
    cache: CacheConfig = CacheConfig()
    rafs: RafsConfig = RafsConfig()
    overlay: OverlayConfig | None = None
    external_backends: tuple[ExternalBackend, ...] = ()
    prefetch_files: tuple[bytes, ...] | None = None
    text: str = field(default="", repr=False, compare=False)
