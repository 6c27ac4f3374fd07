"""What the HTTP API of a node daemon answers: method, path, query and body to status and JSON.

No sockets here. Statuses follow the recordings of the real daemon (spec tools section 7).
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from erofs.console import GIT_COMMIT, LOG_LEVELS, package_version
from erofs.errors import NydusError
from erofs.reader import open_bootstrap
from fscache.backend.settings import Credentials
from fscache.config import DaemonConfig, parse_config
from fscache.environment import with_environment
from fscache.image import ServedImage
from fscache.lifecycle import State
from fscache.node import Entry, NodeDaemon

__all__ = ["Answer", "Request", "answer"]

_HIDDEN = "<hidden>"
_EVENTS = {"max_errors": 500, "total_errors": 0, "max_size": 51200, "total_size": 0, "errors": []}


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and JSON body; no body for None."""

    status: HTTPStatus
    body: object = None


class _Refusal(Exception):
    """An answer that is not what was asked for."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.answer = Answer(status, {"code": "UNDEFINED", "message": message})


@dataclass(slots=True)
class Request:
    """One request; `path` without the query."""

    method: str
    path: str
    query: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def parse(cls, method: str, target: str, body: bytes) -> Request:
        """Take a request target apart; absolute addresses are accepted."""
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        return cls(method, parts.path, query, body)

    def need(self, name: str) -> str:
        """Return a query parameter, or refuse with 400."""
        value = self.query.get(name)
        if value is None:
            raise _Refusal(
                HTTPStatus.BAD_REQUEST,
                f"QueryString(\"'{name}' should be specified in query string\")",
            )
        return value

    def json(self) -> Mapping[str, object]:
        """Return the body as a JSON object, or refuse with 400."""
        if not self.body:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "BadRequest")
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise _Refusal(HTTPStatus.BAD_REQUEST, f"ParseBody({error})") from error
        if not isinstance(value, dict):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "ParseBody(expected an object)")
        return value


def _text(values: Mapping[str, object], key: str, default: str | None = None) -> str:
    value = values.get(key, default)
    if value is None and key not in values:
        raise _Refusal(HTTPStatus.BAD_REQUEST, f"ParseBody(missing field `{key}`)")
    if not isinstance(value, str):
        raise _Refusal(HTTPStatus.BAD_REQUEST, f"ParseBody({key}: expected a string)")
    return value


def _version() -> dict[str, str]:
    return {
        "package_ver": package_version(),
        "git_commit": GIT_COMMIT,
        "build_time": "unknown",
        "profile": "release",
        "rustc": f"python {platform.python_version()}",
    }


def _mounted(entry: Entry) -> dict[str, object]:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry.mounted_at))
    nanos = int(entry.mounted_at % 1 * 1e9)
    return {
        "backend_type": "Rafs" if entry.image is not None else "PassthroughFs",
        "mountpoint": entry.path,
        "mounted_time": f"{moment}.{nanos:09d} +00:00:00",
    }


def _info(daemon: NodeDaemon, *, collection: bool) -> Answer:
    entries = {entry.path: _mounted(entry) for entry in daemon.entries()}
    return Answer(
        HTTPStatus.OK,
        {
            "version": _version(),
            "id": daemon.options.id,
            "supervisor": daemon.options.supervisor,
            "state": daemon.state.value,
            "backend_collection": entries if collection else None,
        },
    )


def _set_level(daemon: NodeDaemon, request: Request) -> Answer:
    level = _text(request.json(), "log_level")
    if level not in LOG_LEVELS:
        raise _Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "Configure(ResponsePayloadType)")
    logging.getLogger().setLevel(LOG_LEVELS[level])
    return Answer(HTTPStatus.NO_CONTENT)


def _start(daemon: NodeDaemon, request: Request) -> Answer:
    if daemon.state is not State.READY:
        raise _Refusal(
            HTTPStatus.BAD_REQUEST, 'Configure(DaemonAbnormal(UnexpectedEvent("Start")))'
        )
    daemon.enter(State.RUNNING)
    return Answer(HTTPStatus.NO_CONTENT)


def _exit(daemon: NodeDaemon, request: Request) -> Answer:
    daemon.request_stop()
    return Answer(HTTPStatus.NO_CONTENT)


def _mount_words(request: Request) -> tuple[str, str, str, str]:
    path = request.need("mountpoint")
    values = request.json()
    source, config = _text(values, "source"), _text(values, "config")
    files = values.get("prefetch_files")
    if files is not None and not (
        isinstance(files, list) and all(isinstance(item, str) for item in files)
    ):
        raise _Refusal(HTTPStatus.BAD_REQUEST, "ParseBody(prefetch_files: expected a sequence)")
    kind = _text(values, "fs_type", "")
    if kind not in ("rafs", "passthrough_fs"):
        raise _Refusal(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            f"Mount(only 'rafs' and 'passthrough_fs' are supported, but {kind} was specified)",
        )
    return path, source, config, kind


def _image_config(daemon: NodeDaemon, text: str) -> DaemonConfig:
    config = parse_config(text)
    backend = with_environment(config.backend, daemon.options.environment)
    return replace(config, backend=backend)


def _mount(daemon: NodeDaemon, request: Request) -> Answer:
    path, source, config, kind = _mount_words(request)
    if kind == "rafs":
        daemon.mount_image(path, Path(source), _image_config(daemon, config))
    else:
        daemon.mount_directory(path, Path(source))
    return Answer(HTTPStatus.NO_CONTENT)


def _remount(daemon: NodeDaemon, request: Request) -> Answer:
    path, source, config, kind = _mount_words(request)
    if kind != "rafs":
        raise _Refusal(
            HTTPStatus.INTERNAL_SERVER_ERROR, "Mount(filesystem type mismatch, expect RAFS)"
        )
    daemon.remount_image(path, Path(source), _image_config(daemon, config))
    return Answer(HTTPStatus.NO_CONTENT)


def _umount(daemon: NodeDaemon, request: Request) -> Answer:
    daemon.unmount(request.need("mountpoint"))
    return Answer(HTTPStatus.NO_CONTENT)


def _get_config(daemon: NodeDaemon, request: Request) -> Answer:
    """Tell what was replaced, without the secret: the original shows it in clear."""
    return Answer(HTTPStatus.OK, {"registry_auth": _HIDDEN} if daemon.credentials_replaced else {})


def _put_config(daemon: NodeDaemon, request: Request) -> Answer:
    values = request.json()
    auth = _text(values, "registry_auth", "")
    if values.keys() - {"registry_auth"}:
        raise _Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "Configure(only registry_auth is taken)")
    if auth:
        try:
            daemon.set_credentials(Credentials.from_base64(auth))
        except ValueError as error:
            raise _Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, f"Configure({error})") from error
    return Answer(HTTPStatus.NO_CONTENT)


def _superblock(daemon: NodeDaemon, request: Request) -> Answer:
    image = daemon.image(request.need("mountpoint"))
    with open_bootstrap(image.bootstrap) as bootstrap:
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


def _counted(daemon: NodeDaemon, request: Request, what: str) -> tuple[str, ServedImage]:
    """Return the image that a metrics request means: by its path, or the only one."""
    images = [(entry.path, entry.image) for entry in daemon.entries() if entry.image is not None]
    wanted = request.query.get("id")
    for path, image in images:
        if path == wanted or (wanted is None and len(images) == 1):
            return path, image
    raise _Refusal(HTTPStatus.NOT_FOUND, f"{what}(Metrics(Stats(NoCounter)))")


def _metrics(daemon: NodeDaemon, request: Request) -> Answer:
    path, image = _counted(daemon, request, "GlobalMetrics")
    flags = dict.fromkeys(
        (
            "files_account_enabled",
            "access_pattern_enabled",
            "record_latest_read_files_enabled",
        ),
        False,
    )
    return Answer(
        HTTPStatus.OK,
        {**flags, "measure_latency": True, "id": path, **image.cache_metrics.reads.as_dict()},
    )


def _file_metrics(daemon: NodeDaemon, request: Request) -> Answer:
    _counted(daemon, request, "FsFilesMetrics")
    return Answer(HTTPStatus.OK, [] if request.query.get("latest") == "true" else {})


def _pattern(daemon: NodeDaemon, request: Request) -> Answer:
    _counted(daemon, request, "Pattern")
    return Answer(HTTPStatus.OK, [])


def _backend_metrics(daemon: NodeDaemon, request: Request) -> Answer:
    _, image = _counted(daemon, request, "BackendMetrics")
    return Answer(HTTPStatus.OK, image.backend.metrics.as_dict())


def _cache_metrics(daemon: NodeDaemon, request: Request) -> Answer:
    """Return cache counters: here `id` is the configuration's id, not the path."""
    images = [entry.image for entry in daemon.entries() if entry.image is not None]
    wanted = request.query.get("id")
    # Of several images with one id the last one counts, as in the original.
    for image in reversed(images):
        if image.config.id == wanted or (wanted is None and len(images) == 1):
            return Answer(HTTPStatus.OK, image.cache_metrics.as_dict())
    raise _Refusal(HTTPStatus.NOT_FOUND, "BlobcacheMetrics(Metrics(Stats(NoCounter)))")


def _nothing(daemon: NodeDaemon, request: Request) -> Answer:
    return Answer(HTTPStatus.NO_CONTENT)


def _fixed(body: object) -> Callable[[NodeDaemon, Request], Answer]:
    return lambda daemon, request: Answer(HTTPStatus.OK, body)


_ROUTES: dict[tuple[str, str], Callable[[NodeDaemon, Request], Answer]] = {
    ("GET", "/api/v1/daemon"): lambda daemon, _: _info(daemon, collection=True),
    ("PUT", "/api/v1/daemon"): _set_level,
    ("GET", "/api/v2/daemon"): lambda daemon, _: _info(daemon, collection=False),
    ("PUT", "/api/v2/daemon"): _set_level,
    ("GET", "/api/v1/daemon/events"): _fixed(_EVENTS),
    ("GET", "/api/v1/daemon/backend"): _superblock,
    ("PUT", "/api/v1/daemon/start"): _start,
    ("PUT", "/api/v1/daemon/exit"): _exit,
    ("POST", "/api/v1/mount"): _mount,
    ("PUT", "/api/v1/mount"): _remount,
    ("DELETE", "/api/v1/mount"): _umount,
    ("GET", "/api/v1/config"): _get_config,
    ("PUT", "/api/v1/config"): _put_config,
    ("GET", "/api/v1/metrics"): _metrics,
    ("GET", "/api/v1/metrics/files"): _file_metrics,
    ("GET", "/api/v1/metrics/pattern"): _pattern,
    ("GET", "/api/v1/metrics/backend"): _backend_metrics,
    ("GET", "/api/v1/metrics/blobcache"): _cache_metrics,
    ("GET", "/api/v1/metrics/inflight"): _nothing,
}
_PATHS = {path for _, path in _ROUTES}


def answer(daemon: NodeDaemon, request: Request) -> Answer:
    """Answer a request; errors become statuses, nothing is raised but what is a bug."""
    route = _ROUTES.get((request.method, request.path))
    try:
        if route is not None:
            if request.method == "GET" and request.body:
                raise _Refusal(HTTPStatus.BAD_REQUEST, "BadRequest")
            return route(daemon, request)
        if request.path not in _PATHS:
            raise _Refusal(HTTPStatus.NOT_FOUND, "NoRoute")
        if request.path == "/api/v1/mount":
            request.need("mountpoint")
        raise _Refusal(HTTPStatus.BAD_REQUEST, "BadRequest")
    except _Refusal as refusal:
        return refusal.answer
    except (NydusError, OSError) as error:
        message = {"code": "UNDEFINED", "message": str(error)}
        return Answer(HTTPStatus.INTERNAL_SERVER_ERROR, message)
