"""What the HTTP API of a node daemon answers: method, path, query and body to status and JSON.

No sockets here; metrics, blobs and the singleton daemon have modules of their own.
"""

from __future__ import annotations

import os
import time
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from erofs.reader import open_bootstrap
from fscache.api.message import DONE, Answer, Refusal, Request, Router, text
from fscache.api.routes_daemon import events, info, set_level
from fscache.api.routes_metrics import (
    backend_metrics,
    cache_metrics,
    file_metrics,
    inflight,
    metrics,
    pattern,
)
from fscache.backend.settings import Credentials, RegistryConfig
from fscache.backend.table import is_plain
from fscache.config import DaemonConfig, parse_config
from fscache.entry import Entry
from fscache.environment import with_environment
from fscache.lifecycle import State
from fscache.node import NodeDaemon

if TYPE_CHECKING:
    from fscache.nbd.daemon import NbdDaemon
    from fscache.singleton import SingletonDaemon

__all__ = ["answer"]

_HIDDEN = "<hidden>"


def _mounted(entry: Entry) -> dict[str, object]:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry.mounted_at))
    nanos = int(entry.mounted_at % 1 * 1e9)
    # Imported here: a client asks for the first time while nothing is mounted.
    from fscache.api.shown import shown_config

    return {
        "backend_type": "Rafs" if entry.is_image else "PassthroughFs",
        "mountpoint": entry.path,
        "mounted_time": f"{moment}.{nanos:09d} +00:00:00",
        "config": shown_config(entry.image.config) if entry.image is not None else None,
    }


def _entries(daemon: NodeDaemon) -> dict[str, object]:
    return {entry.path: _mounted(entry) for entry in daemon.entries()}


def _start(daemon: NodeDaemon, request: Request) -> Answer:
    if daemon.state is not State.READY or not daemon.has_taken_over:
        raise Refusal(HTTPStatus.BAD_REQUEST, 'Configure(DaemonAbnormal(UnexpectedEvent("Start")))')
    daemon.start_taken_over()
    return DONE


def _exit(daemon: NodeDaemon, request: Request) -> Answer:
    daemon.request_exit()
    return DONE


class _MountWords(NamedTuple):
    """What a request to mount says."""

    path: str
    source: Path
    kind: str
    config: str
    prefetch_files: tuple[bytes, ...] | None


def _send_state(daemon: NodeDaemon, request: Request) -> Answer:
    daemon.send_state()
    return DONE


def _take_over(daemon: NodeDaemon, request: Request) -> Answer:
    if daemon.state is not State.INIT:
        raise Refusal(
            HTTPStatus.BAD_REQUEST, 'Upgrade(DaemonAbnormal(UnexpectedEvent("Takeover")))'
        )
    daemon.take_over()
    return DONE


def _mount_words(request: Request) -> _MountWords:
    path = request.need("mountpoint")
    values = request.json()
    source, config = text(values, "source"), text(values, "config")
    files = values.get("prefetch_files")
    if files is not None and not (
        isinstance(files, list) and all(isinstance(item, str) and is_plain(item) for item in files)
    ):
        raise Refusal(
            HTTPStatus.BAD_REQUEST, "ParseBody(prefetch_files: expected a sequence of paths)"
        )
    kind = text(values, "fs_type", "")
    if kind not in ("rafs", "passthrough_fs"):
        raise Refusal(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            f"Mount(only 'rafs' and 'passthrough_fs' are supported, but {kind} was specified)",
        )
    listed = None
    if files is not None:
        from fscache.fetch.prefetchlist import check_paths

        listed = check_paths(map(os.fsencode, files))
    return _MountWords(path, Path(source), kind, config, listed)


def _image_config(daemon: NodeDaemon, words: _MountWords) -> DaemonConfig:
    config = parse_config(words.config)
    backend = with_environment(config.backend, daemon.options.environment)
    return config._replace(backend=backend, prefetch_files=words.prefetch_files)


def _mount(daemon: NodeDaemon, request: Request) -> Answer:
    words = _mount_words(request)
    if words.kind == "rafs":
        daemon.mount_image(words.path, words.source, _image_config(daemon, words))
    else:
        daemon.mount_directory(words.path, words.source)
    return DONE


def _remount(daemon: NodeDaemon, request: Request) -> Answer:
    words = _mount_words(request)
    if words.kind != "rafs":
        raise Refusal(
            HTTPStatus.INTERNAL_SERVER_ERROR, "Mount(filesystem type mismatch, expect RAFS)"
        )
    daemon.remount_image(words.path, words.source, _image_config(daemon, words))
    return DONE


def _umount(daemon: NodeDaemon, request: Request) -> Answer:
    daemon.unmount(request.need("mountpoint"))
    return DONE


def _get_config(daemon: NodeDaemon, request: Request) -> Answer:
    """Tell that there are credentials, without the secret: the original shows it in clear."""
    known = daemon.credentials_replaced or any(map(_has_credentials, daemon.entries()))
    return Answer(HTTPStatus.OK, {"registry_auth": _HIDDEN} if known else {})


def _has_credentials(entry: Entry) -> bool:
    backend = entry.image.config.backend if entry.image is not None else None
    return isinstance(backend, RegistryConfig) and backend.credentials is not None


def _put_config(daemon: NodeDaemon, request: Request) -> Answer:
    values = request.json()
    auth = text(values, "registry_auth", "")
    if values.keys() - {"registry_auth"}:
        raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "Configure(only registry_auth is taken)")
    if "registry_auth" in values:
        try:
            daemon.set_credentials(Credentials.from_base64(auth))
        except ValueError as error:
            raise Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, f"Configure({error})") from error
    return DONE


def _superblock(daemon: NodeDaemon, request: Request) -> Answer:
    image = daemon.image(request.need("mountpoint"))
    with open_bootstrap(image.bootstrap_file) as bootstrap:
        superblock, extended = bootstrap.superblock, bootstrap.extended
        return Answer(
            HTTPStatus.OK,
            {
                "magic": superblock.magic,
                "version": 0x600,
                "sb_size": 0,
                "root_inode": 0,
                "chunk_size": extended.chunk_size,
                "batch_size": 0,
                "inodes_count": superblock.inos,
                "flags": {"bits": extended.flags},
                "inode_table_entries": 0,
                "inode_table_offset": 0,
                "blob_table_size": extended.blob_table_size,
                "blob_table_offset": extended.blob_table_offset,
                "extended_blob_table_offset": 0,
                "extended_blob_table_entries": 0,
                "blob_device_table_count": superblock.extra_devices,
                "blob_device_table_offset": superblock.devt_slotoff * 128,
                "prefetch_table_offset": extended.prefetch_table_offset,
                "prefetch_table_entries": extended.prefetch_table_size // 4,
                "attr_timeout": {"secs": 1 << 32, "nanos": 0},
                "entry_timeout": {"secs": 1 << 32, "nanos": 0},
                "is_chunk_dict": False,
                "meta_blkaddr": superblock.meta_blkaddr,
                "root_nid": superblock.root_nid,
                "chunk_table_offset": extended.chunk_table_offset,
                "chunk_table_size": extended.chunk_table_size,
            },
        )


def _prometheus(daemon: NodeDaemon, request: Request) -> Answer:
    # Imported here: the clients that start daemons ask for the other metrics.
    from fscache.api.exposition import exposition
    from fscache.api.prometheus import CONTENT_TYPE

    return Answer(HTTPStatus.OK, exposition(daemon), CONTENT_TYPE)


def _no_blobs(daemon: NodeDaemon, request: Request) -> Answer:
    raise Refusal(HTTPStatus.NOT_IMPLEMENTED, "BlobObject(DaemonAbnormal(Unsupported))")


def _get_blobs(daemon: NodeDaemon, request: Request) -> Answer:
    if "domain_id" not in request.query:
        raise Refusal(HTTPStatus.BAD_REQUEST, "BadRequest")
    return _no_blobs(daemon, request)


def _delete_blobs(daemon: NodeDaemon, request: Request) -> Answer:
    # As the original: nothing is culled, and nothing is wrong.
    if "domain_id" not in request.query and "blob_id" in request.query:
        return DONE
    return _get_blobs(daemon, request)


_ROUTER = Router[NodeDaemon]({
    ("GET", "/api/v1/daemon"): lambda daemon, _: info(daemon, _entries(daemon)),
    ("PUT", "/api/v1/daemon"): set_level,
    ("GET", "/api/v2/daemon"): lambda daemon, _: info(daemon, None),
    ("PUT", "/api/v2/daemon"): set_level,
    ("GET", "/api/v1/daemon/events"): events,
    ("GET", "/api/v1/daemon/backend"): _superblock,
    ("PUT", "/api/v1/daemon/start"): _start,
    ("PUT", "/api/v1/daemon/exit"): _exit,
    ("PUT", "/api/v1/daemon/fuse/sendfd"): _send_state,
    ("PUT", "/api/v1/daemon/fuse/takeover"): _take_over,
    ("POST", "/api/v1/mount"): _mount,
    ("PUT", "/api/v1/mount"): _remount,
    ("DELETE", "/api/v1/mount"): _umount,
    ("GET", "/api/v1/config"): _get_config,
    ("PUT", "/api/v1/config"): _put_config,
    ("GET", "/api/v1/metrics"): metrics,
    ("GET", "/api/v1/metrics/files"): file_metrics,
    ("GET", "/api/v1/metrics/pattern"): pattern,
    ("GET", "/api/v1/metrics/backend"): backend_metrics,
    ("GET", "/api/v1/metrics/blobcache"): cache_metrics,
    ("GET", "/api/v1/metrics/inflight"): inflight,
    ("GET", "/metrics"): _prometheus,
    ("GET", "/api/v2/blobs"): _get_blobs,
    ("PUT", "/api/v2/blobs"): _no_blobs,
    ("DELETE", "/api/v2/blobs"): _delete_blobs,
})  # fmt: skip


def answer(daemon: NodeDaemon | SingletonDaemon | NbdDaemon, request: Request) -> Answer:
    """Answer a request; errors become statuses, nothing is raised but what is a bug."""
    if isinstance(daemon, NodeDaemon):
        return _ROUTER.answer(daemon, request)
    # Imported here: most daemons are of the other kind.
    from fscache.singleton import SingletonDaemon

    if isinstance(daemon, SingletonDaemon):
        from fscache.api.routes_singleton import singleton_answer

        return singleton_answer(daemon, request)
    from fscache.api.routes_nbd import nbd_answer

    return nbd_answer(daemon, request)
