"""What `nydusctl` prints: pure functions from answers of the API to text (tools sections 8, 12).

An answer is what `json.loads` returned and nothing about it is believed: members are looked
at through `text`, `count` and `counts`, which raise `AnswerError`. Nothing is sent or
printed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from decimal import Decimal

from erofs.errors import NydusError, error_context

__all__ = [
    "AnswerError",
    "backend_rates_text",
    "backend_text",
    "cache_text",
    "fsstats_text",
    "info_text",
    "raw_text",
    "request_failed_text",
]

MIB = 1 << 20
KIB = 1 << 10
COUNTER_LIMIT = 1 << 64
SIZE_CLASSES = ("<1K", "1K~", "4K~", "16K~", "64K~", "128K~", "512K~", "1M~")
READ_LATENCIES = ("<200us", "~1ms", "~20ms", "~50ms", "~500ms", "~1s", "~2s", "2s~")
OPERATIONS = (
    "Getattr", "Readlink", "Open", "Release", "Read", "Statfs", "Getxattr", "Listxattr",
    "Opendir", "Lookup", "Readdir", "Readdirplus", "Access", "Forget", "BatchForget",
)  # fmt: skip
READ = OPERATIONS.index("Read")
FIRST_LINE_OPERATIONS = 8
_HOUR = re.compile(r"(\d{4}-\d\d-\d\d) 0(\d:)")
_DEBUG_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t", "\0": "\\0"}


class AnswerError(NydusError):
    """An answer of the daemon that does not have the promised shape."""


def _kind(value: object) -> str:
    """Name the kind of a value without showing it: its content is anybody's."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "another number"
    if isinstance(value, str):
        return "a string"
    return "a list" if isinstance(value, list) else "an object"


def _refuse(path: str, expected: str, value: object) -> AnswerError:
    what = f"member {path} of the daemon's answer" if path else "the daemon's answer"
    return AnswerError(what, expected=expected, got=_kind(value))


def _member(answer: object, path: str) -> object:
    """Return the member at a dotted path, None when it is missing; raise `AnswerError`."""
    value, walked = answer, ""
    for name in path.split("."):
        if not isinstance(value, dict):
            raise _refuse(walked, "an object", value)
        value = value.get(name)
        walked = f"{walked}.{name}" if walked else name
    return value


def _as_count(value: object, path: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < COUNTER_LIMIT:
        raise _refuse(path, "a count of 64 bits", value)
    return value


def text(answer: object, path: str) -> str:
    """Return the string at a dotted path; raise `AnswerError`."""
    value = _member(answer, path)
    if not isinstance(value, str):
        raise _refuse(path, "a string", value)
    return value


def is_set(answer: object, path: str) -> bool:
    """Return the truth value at a dotted path; raise `AnswerError`."""
    value = _member(answer, path)
    if not isinstance(value, bool):
        raise _refuse(path, "a truth value", value)
    return value


def count(answer: object, path: str) -> int:
    """Return the counter at a dotted path; raise `AnswerError`."""
    return _as_count(_member(answer, path), path)


def counts(answer: object, path: str, length: int) -> list[int]:
    """Return the counters at a dotted path, `length` of them; raise `AnswerError`."""
    value = _member(answer, path)
    if not isinstance(value, list) or len(value) != length:
        raise _refuse(path, f"a list of {length} counts", value)
    return [_as_count(item, path) for item in value]


def _plain(value: str) -> str:
    """Escape what would steer a terminal or break the line."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in value
    )


def _quoted(value: str) -> str:
    return _plain(json.dumps(value, ensure_ascii=False))


def _decimal(value: float) -> str:
    """Write a number with the fewest digits that name it, never with an exponent."""
    return format(Decimal(repr(value)).normalize(), "f")


def _labelled(width: int, rows: Iterable[tuple[str, object]]) -> str:
    return "".join(f"{label + ':':<{width}}{value}\n" for label, value in rows)


def _cells(values: Iterable[object]) -> str:
    return "".join(f"{value!s:<7} " for value in values)


def _table_row(label: str, width: int, values: Iterable[object]) -> str:
    return f"{label + ':':<{width}}{_cells(values)}\n"


def _average(total: int, number: int) -> int:
    return total // number if number else 0


def raw_text(answer: object) -> str:
    """Return the answer as JSON on one line, members sorted by name."""
    return json.dumps(answer, ensure_ascii=False, sort_keys=True, separators=(",", ":")) + "\n"


def _debug_string(value: str) -> str:
    escaped = (
        _DEBUG_ESCAPES.get(char) or (char if char.isprintable() else f"\\u{{{ord(char):x}}}")
        for char in value
    )
    return f'"{"".join(escaped)}"'


def _debug(value: object) -> str:
    """Write a JSON value as the debug text of Rust's serde_json, which scripts look for."""
    if isinstance(value, dict):
        members = (f"{_debug_string(name)}: {_debug(value[name])}" for name in sorted(value))
        return f"Object {{{', '.join(members)}}}"
    if isinstance(value, list):
        return f"Array [{', '.join(map(_debug, value))}]"
    if isinstance(value, str):
        return f"String({_debug_string(value)})"
    if value is None:
        return "Null"
    return f"{'Bool' if isinstance(value, bool) else 'Number'}({json.dumps(value)})"


def request_failed_text(body: object) -> str:
    """Return the one line that says with which JSON body the daemon refused."""
    return f"Request failed. {_debug(body)}"


def _instance_text(mountpoint: str, instance: object) -> str:
    # The original prints the hour without its leading zero.
    moment = _HOUR.sub(r"\1 \2", text(instance, "mounted_time"))
    rows = [
        ("Instance Mountpoint", _plain(mountpoint)),
        ("Type", _plain(text(instance, "backend_type"))),
        ("Mounted Time", _plain(moment)),
    ]
    # Passthrough mounts have no configuration, and a daemon may keep it for itself.
    if _member(instance, "config") is not None:
        enabled = is_set(instance, "config.cache.prefetch.enable")
        rows += [
            ("Mode", _plain(text(instance, "config.rafs.mode"))),
            ("Prefetch", "true" if enabled else "false"),
            ("Prefetch Merging Size", str(count(instance, "config.cache.prefetch.batch_size"))),
        ]
    return "".join(f"\t{label}:  {value}\n" for label, value in rows) + "\n"


def info_text(answer: object) -> str:
    """Describe the daemon and its mounts from `GET /api/v1/daemon`; raise `AnswerError`."""
    head = _labelled(24, [
        ("Version", _quoted(text(answer, "version.package_ver"))),
        ("Status", _quoted(text(answer, "state"))),
        ("Profile", _quoted(text(answer, "version.profile"))),
        ("Commit", _quoted(text(answer, "version.git_commit"))),
    ])  # fmt: skip
    # A daemon that serves blobs, not mounts, has no instances: null.
    instances = _member(answer, "backend_collection") or {}
    if not isinstance(instances, dict):
        raise _refuse("backend_collection", "an object", instances)
    mounts = ["Instances:\n"] if instances else []
    for name in sorted(instances):
        with error_context(entry=_plain(name)):
            mounts.append(_instance_text(name, instances[name]))
    return f"\n{head}{''.join(mounts)}"


def backend_text(answer: object) -> str:
    """Describe the backend's counters from `GET /api/v1/metrics/backend`; raise `AnswerError`."""
    amount = count(answer, "read_amount_total")
    requests = counts(answer, "read_count_block_size_dist", len(SIZE_CLASSES))
    millis = counts(answer, "read_cumulative_latency_millis_dist", len(SIZE_CLASSES))
    averages = map(_average, millis, requests)
    head = _labelled(20, [
        ("Backend Type", _quoted(text(answer, "backend_type"))),
        ("Read Amount", f"{amount} Bytes ({_decimal(amount / MIB)} MB)"),
        ("Read Count", count(answer, "read_count")),
        ("Read Errors", count(answer, "read_errors")),
    ])  # fmt: skip
    sizes = _table_row("Block Sizes", 25, SIZE_CLASSES)
    return (
        f"\n{head}\n{sizes}{_table_row('Average Latency(millis)', 25, averages)}"
        f"\n{sizes}{_table_row('Request Count', 25, requests)}"
    )


def _rise(old: int, new: int) -> int:
    """Return by how much a counter rose; one that fell is of a new daemon and began at zero."""
    return new - old if new >= old else new


def _rises(before: object, after: object, path: str) -> list[int]:
    length = len(SIZE_CLASSES)
    return list(map(_rise, counts(before, path, length), counts(after, path, length)))


def backend_rates_text(before: object, after: object, seconds: float) -> str:
    """Describe what the backend did between two answers; raise `AnswerError`.

    Args:
        before: the first answer of `GET /api/v1/metrics/backend`.
        after: the second one.
        seconds: the time between them.
    """
    amount, requests, millis = (
        _rise(count(before, name), count(after, name))
        for name in ("read_amount_total", "read_count", "read_cumulative_latency_millis_total")
    )
    averages = map(
        _average,
        _rises(before, after, "read_cumulative_latency_millis_dist"),
        _rises(before, after, "read_count_block_size_dist"),
    )
    rates = _labelled(28, [
        ("Backend Read Bandwidth", f"{int(amount / KIB / seconds)} KB/S"),
        ("Backend Average IO Size", f"{_average(amount, requests)} Bytes"),
        ("Backend Average Latency", f"{_average(millis, requests)} millis"),
    ])  # fmt: skip
    return (
        f"\n>>> >>> >>> >>> >>>\n{rates}\nBlock Sizes/millis:\n"
        f"{_cells(SIZE_CLASSES)}\n{_cells(averages)}\n<<< <<< <<< <<< <<<\n"
    )


def _prefetch_millis(answer: object) -> int:
    """Return how long prefetch took, 0 while it has no end."""
    begin, end = (
        count(answer, f"prefetch_{edge}_time_secs") * 1000
        + count(answer, f"prefetch_{edge}_time_millis")
        for edge in ("begin", "end")
    )
    return max(end - begin, 0)


def cache_text(answer: object) -> str:
    """Describe the cache's counters from `GET /api/v1/metrics/blobcache`; raise `AnswerError`."""
    files = _member(answer, "underlying_files")
    if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
        raise _refuse("underlying_files", "a list of strings", files)
    amount = count(answer, "prefetch_data_amount")
    requests = count(answer, "prefetch_requests_count")
    cumulative = count(answer, "prefetch_cumulative_time_millis")
    millis = _prefetch_millis(answer)
    hits = _labelled(28, [
        ("Partial Hits", count(answer, "partial_hits")),
        ("Whole Hits", count(answer, "whole_hits")),
        ("Total Read", count(answer, "total")),
        ("Directory", _quoted(text(answer, "store_path"))),
        ("Files", f"[{','.join(map(_quoted, files))}]"),
        ("Persister Buffer", count(answer, "buffered_backend_size")),
    ])  # fmt: skip
    bandwidth = amount / MIB / (millis / 1000) if millis else 0.0
    latency = cumulative / requests / 1000 if requests else 0.0
    prefetch = _labelled(28, [
        ("Prefetch Workers", count(answer, "prefetch_workers")),
        ("Prefetch Amount", f"{amount} = {_decimal(amount / KIB)} KB"),
        ("Prefetch Requests", requests),
        ("Prefetch Average Size", f"{_average(amount, requests)} Bytes"),
        ("Prefetch Duration", f"{_decimal(millis / 1000)} Seconds"),
        ("Prefetch Bandwidth", f"{_decimal(bandwidth)} MB/S"),
        ("Prefetch Request Latency", f"{_decimal(latency)} Seconds"),
        ("Prefetch Unmerged", count(answer, "prefetch_unmerged_chunks")),
    ])  # fmt: skip
    return f"\n{hits}\n{prefetch}"


def fsstats_text(answer: object) -> str:
    """Describe a filesystem's counters from `GET /api/v1/metrics`; raise `AnswerError`."""
    reads = counts(answer, "read_latency_dist", len(READ_LATENCIES))
    hits = counts(answer, "fop_hits", len(OPERATIONS))
    errors = counts(answer, "fop_errors", len(OPERATIONS))
    amount = count(answer, "data_read")
    operations = [f"{name}({hit})" for name, hit in zip(OPERATIONS, hits, strict=True)]
    return (
        f"\n{_table_row('Read Latency', 16, READ_LATENCIES)}{_table_row('Reads Count', 16, reads)}"
        f"\nRead Errors: {errors[READ]}\n"
        f"Read Data: {amount}Bytes ({amount // MIB}MB)\n"
        "\nFOP Counters:\n"
        f"{' '.join(operations[:FIRST_LINE_OPERATIONS])}\n"
        f"{' '.join(operations[FIRST_LINE_OPERATIONS:])}\n"
    )
