"""What the API tells of the counters of a node's images (spec tools section 8)."""

from __future__ import annotations

import time
from http import HTTPStatus

from fscache.api.message import DONE, Answer, Refusal, Request
from fscache.image import ServedImage
from fscache.node import NodeDaemon

__all__ = ["backend_metrics", "cache_metrics", "file_metrics", "inflight", "metrics", "pattern"]

# Reads of any channel have the number that FUSE gives to them.
_FUSE_READ = 15


def _counted(daemon: NodeDaemon, request: Request, what: str) -> tuple[str, ServedImage]:
    """Return the image that a metrics request means: by its path, or the only one."""
    images = [(entry.path, entry.image) for entry in daemon.entries() if entry.image is not None]
    wanted = request.query.get("id")
    for path, image in images:
        if path == wanted or (wanted is None and len(images) == 1):
            return path, image
    raise Refusal(HTTPStatus.NOT_FOUND, f"{what}(Metrics(Stats(NoCounter)))")


def metrics(daemon: NodeDaemon, request: Request) -> Answer:
    """Return the counters of reads."""
    path, image = _counted(daemon, request, "GlobalMetrics")
    trace = image.trace
    flags = {
        "files_account_enabled": trace is not None and trace.files,
        "access_pattern_enabled": trace is not None and trace.pattern,
        "record_latest_read_files_enabled": trace is not None and trace.latest,
    }
    return Answer(
        HTTPStatus.OK,
        {**flags, "measure_latency": True, "id": path, **image.cache_metrics.reads.as_dict()},
    )


def file_metrics(daemon: NodeDaemon, request: Request) -> Answer:
    """Return counters by file, or which files were read since this was asked last."""
    _, image = _counted(daemon, request, "FsFilesMetrics")
    trace = image.trace
    if request.query.get("latest") == "true":
        return Answer(HTTPStatus.OK, [] if trace is None else trace.take_latest())
    return Answer(HTTPStatus.OK, {} if trace is None else trace.files_as_dict())


def pattern(daemon: NodeDaemon, request: Request) -> Answer:
    """Return the files in the order of their first reads."""
    _, image = _counted(daemon, request, "Pattern")
    trace, paths = image.trace, request.query.get("paths") == "true"
    return Answer(HTTPStatus.OK, [] if trace is None else trace.pattern_as_list(paths=paths))


def backend_metrics(daemon: NodeDaemon, request: Request) -> Answer:
    """Return the counters of a backend."""
    _, image = _counted(daemon, request, "BackendMetrics")
    return Answer(HTTPStatus.OK, image.backend.metrics.as_dict())


def inflight(daemon: NodeDaemon, request: Request) -> Answer:
    """Return the reads that have no answer yet, of all images; nothing when there are none."""
    now, moment = time.time(), time.monotonic()
    reads = [
        {
            "inode": read.inode,
            "opcode": _FUSE_READ,
            "unique": number,
            "timestamp_secs": int(now - (moment - read.since)),
        }
        for entry in daemon.entries()
        if entry.image is not None
        for number, read in entry.image.cache_metrics.reads.waiting().items()
    ]
    return Answer(HTTPStatus.OK, reads) if reads else DONE


def cache_metrics(daemon: NodeDaemon, request: Request) -> Answer:
    """Return cache counters: here `id` is the configuration's id, not the path."""
    images = [entry.image for entry in daemon.entries() if entry.image is not None]
    wanted = request.query.get("id")
    if wanted is None and len({image.config.id for image in images}) == 1:
        wanted = images[0].config.id
    # Of several images with one id the last one counts, as in the original.
    for image in reversed(images):
        if image.config.id == wanted:
            return Answer(HTTPStatus.OK, image.cache_metrics.as_dict())
    raise Refusal(HTTPStatus.NOT_FOUND, "BlobcacheMetrics(Metrics(Stats(NoCounter)))")
