"""What a node daemon tells Prometheus: its counters as families of samples.

Everything that is about an image has the label `mountpoint`, as in the table of mounts. No
value of a configuration is here but its id, the type of the backend and the bootstrap's path.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from erofs.version import GIT_COMMIT, VERSION
from fscache.api.prometheus import Family, Histogram, Kind, Sample, render
from fscache.backend.base import LATENCY_CLASSES, BackendCounts
from fscache.image import ServedImage
from fscache.lifecycle import State
from fscache.metrics import LATENCY_SECONDS, SIZE_CLASSES, CacheCounts, ReadCounts
from fscache.node import Entry, NodeDaemon

__all__ = ["exposition"]

# A size is counted in the class that it begins, a whole millisecond in the class that it ends.
_SIZE_BOUNDS = [size - 1 for size in SIZE_CLASSES]
_BACKEND_BOUNDS = [(millis + 1) / 1000 for millis in LATENCY_CLASSES]
_PREFIX = "nydusd_"

_Value = float | Histogram


class _Image(NamedTuple):
    """The counters of one image, taken once."""

    path: str
    reads: ReadCounts
    cache: CacheCounts
    backend: BackendCounts


class _Metric(NamedTuple):
    """A family of which each image has one sample, or one for each value of a second label."""

    name: str
    kind: Kind
    help: str
    value: Callable[[_Image], _Value | Mapping[str, _Value]]
    label: str = ""


def _results(image: _Image) -> Mapping[str, _Value]:
    cache = image.cache
    missed = cache.requests - cache.whole_hits - cache.partial_hits
    return {"hit": cache.whole_hits, "partial": cache.partial_hits, "miss": missed}


_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

_OF_IMAGES = (
    _Metric("read_bytes_total", _C, "Bytes that the kernel asked for and got.",
            lambda image: image.reads.bytes_read),
    _Metric("read_errors_total", _C, "Reads of the kernel that failed.",
            lambda image: image.reads.errors),
    _Metric("read_size_bytes", _H, "Sizes of the reads that the kernel asked for.",
            lambda image: Histogram(_SIZE_BOUNDS, image.reads.sizes, image.reads.bytes_wanted)),
    _Metric("read_duration_seconds", _H, "Time from a read of the kernel to its answer.",
            lambda image: Histogram(LATENCY_SECONDS, image.reads.latencies,
                                    image.reads.micros / 1e6)),
    _Metric("cache_requests_total", _C, "Reads by how much of them was in the cache.",
            _results, "result"),
    _Metric("cache_chunks_ready", _G, "Chunks in the cache.",
            lambda image: image.cache.chunks_ready),
    _Metric("cache_complete", _G, "Whether every chunk is in the cache, and durable.",
            lambda image: int(image.cache.complete)),
    _Metric("cache_files", _G, "Data files in use.",
            lambda image: image.cache.files),
    _Metric("chunks_fetched_total", _C, "Chunks that were fetched, verified and written.",
            lambda image: image.cache.chunks_fetched),
    _Metric("chunks_bad_total", _C, "Chunks that could not be decompressed or verified.",
            lambda image: image.cache.digest_failures),
    _Metric("backend_requests_total", _C, "Reads of the backend, repetitions counted.",
            lambda image: {image.backend.type: image.backend.reads}, "backend"),
    _Metric("backend_errors_total", _C, "Reads of the backend that failed.",
            lambda image: {image.backend.type: image.backend.errors}, "backend"),
    _Metric("backend_bytes_total", _C, "Bytes that the backend gave.",
            lambda image: {image.backend.type: image.backend.bytes_read}, "backend"),
    _Metric("backend_request_duration_seconds", _H, "Time of reads of the backend that succeeded.",
            lambda image: {image.backend.type: Histogram(
                _BACKEND_BOUNDS, image.backend.latencies, image.backend.seconds)}, "backend"),
    _Metric("backend_buffered_bytes", _G, "Bytes of the backend that are held in memory.",
            lambda image: image.cache.buffered_bytes),
    _Metric("prefetch_workers", _G, "Threads that prefetch may use.",
            lambda image: image.cache.prefetch_workers),
    _Metric("prefetch_requests_total", _C, "Requests of the prefetch that ended.",
            lambda image: image.cache.prefetch_requests),
    _Metric("prefetch_bytes_total", _C, "Bytes that were prefetched.",
            lambda image: image.cache.prefetch_bytes),
    _Metric("prefetch_duration_seconds_total", _C, "Time of all requests of the prefetch.",
            lambda image: image.cache.prefetch_millis / 1000),
    _Metric("prefetch_begin_timestamp_seconds", _G, "When the prefetch began, 0 for never.",
            lambda image: image.cache.prefetch_begin),
    _Metric("prefetch_end_timestamp_seconds", _G, "When the latest request of it ended, 0: never.",
            lambda image: image.cache.prefetch_end),
)  # fmt: skip


def exposition(daemon: NodeDaemon) -> bytes:
    """Return everything that is counted, in Prometheus' text format; safe in every state."""
    entries = daemon.entries()
    images = [
        _Image(
            entry.path,
            entry.image.cache_metrics.reads.counts(),
            entry.image.cache_metrics.counts(),
            entry.image.backend.metrics.counts(),
        )
        for entry in entries
        if entry.image is not None
    ]
    families = [*_of_daemon(daemon, entries), *(_family(metric, images) for metric in _OF_IMAGES)]
    return render([*families, *_of_process()])


def _family(metric: _Metric, images: Sequence[_Image]) -> Family:
    samples = []
    for image in images:
        value = metric.value(image)
        values = value if isinstance(value, Mapping) else {"": value}
        for word, number in values.items():
            extra = {metric.label: word} if metric.label else {}
            samples.append(Sample(number, {"mountpoint": image.path, **extra}))
    return Family(_PREFIX + metric.name, metric.kind, metric.help, samples)


def _of_daemon(daemon: NodeDaemon, entries: Sequence[Entry]) -> Iterator[Family]:
    version = {
        "version": VERSION,
        "git_commit": GIT_COMMIT,
        "python": platform.python_version(),
    }
    yield _gauge("build_info", "Versions; always 1.", [Sample(1, version)])
    yield _gauge(
        "state",
        "Where the daemon is in its life: 1 for this state.",
        [Sample(int(state is daemon.state), {"state": state.value}) for state in State],
    )
    images = sum(entry.is_image for entry in entries)
    yield _gauge(
        "mounts",
        "Mounts of the table, by type.",
        [
            Sample(images, {"type": "rafs"}),
            Sample(len(entries) - images, {"type": "passthrough_fs"}),
        ],
    )
    yield _gauge(
        "waiting_reads",
        "Reads of the kernel that wait for their answers.",
        [Sample(daemon.waiting)],
    )
    yield Family(
        _PREFIX + "errors_total",
        Kind.COUNTER,
        "Errors in the log.",
        [Sample(daemon.events.count)],
    )
    yield _gauge(
        "mount_info",
        "What is mounted where; always 1.",
        [
            Sample(1, {"mountpoint": entry.path, **_about(entry.image)})
            for entry in entries
            if entry.image is not None
        ],
    )
    yield _gauge(
        "mount_timestamp_seconds",
        "When it was mounted.",
        [Sample(entry.mounted_at, {"mountpoint": entry.path}) for entry in entries],
    )


def _about(image: ServedImage) -> Mapping[str, str]:
    return {
        "id": image.config.id,
        "bootstrap": str(image.bootstrap),
        "backend": image.backend.metrics.counts().type,
    }


def _gauge(name: str, text: str, samples: Sequence[Sample]) -> Family:
    return Family(_PREFIX + name, Kind.GAUGE, text, samples)


def _of_process() -> Iterator[Family]:
    """Yield what every exporter tells of its process, under the names that dashboards know."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # Fields of proc(5) from the third on; the second, the name, may hold blanks.
    fields = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
    begin = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    for name, kind, text, value in (
        ("cpu_seconds_total", Kind.COUNTER, "User and system time spent.",
         usage.ru_utime + usage.ru_stime),
        ("open_fds", Kind.GAUGE, "Open file descriptors.", len(os.listdir("/proc/self/fd"))),
        ("max_fds", Kind.GAUGE, "Largest number of open file descriptors.",
         resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        ("virtual_memory_bytes", Kind.GAUGE, "Size of virtual memory.", int(fields[20])),
        ("resident_memory_bytes", Kind.GAUGE, "Size of resident memory.",
         int(fields[21]) * os.sysconf("SC_PAGE_SIZE")),
        ("start_time_seconds", Kind.GAUGE, "Start of the process since the epoch.",
         _boot_time() + begin),
    ):  # fmt: skip
        yield Family(f"process_{name}", kind, text, [Sample(value)])


def _boot_time() -> int:
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime "):
            return int(line.split()[1])
    return 0
