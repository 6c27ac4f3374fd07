"""What was measured, as lines of a table and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

OURS = "ours"
COMPLETE = "complete files"


@dataclass
class Row:
    """One measurement: the value of each round by variant, ours first among them.

    `note` says how much work it was; `facts` are numbers for the JSON; `unit` is "s" for
    seconds, "B" for bytes, or what is counted. Of whole programs `cpu_seconds` count all cores,
    `peak_bytes` is the largest resident set, and `bars` are the ratios that ours is to stay below.
    """

    name: str
    values: dict[str, list[float]]
    note: str = ""
    facts: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)
    unit: str = "s"


def ratios(row: Row, against: str) -> list[float]:
    """Return ours divided by another variant, for each round."""
    pairs = zip(row.values[OURS], row.values[against], strict=True)
    return [ours / other for ours, other in pairs]


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


def _size(size: float) -> str:
    return f"{size / (1 << 20):.3g} MiB"


def _count(count: float) -> str:
    return f"{count:.0f}"


_SHOW = {"s": _time, "B": _size}


def _span(values: Sequence[float], show) -> str:
    return f"{show(statistics.median(values))} ({show(min(values))}..{show(max(values))})"


def _ratio(value: float) -> str:
    return f"{value:.2f}"


_COLUMNS = "{:32} {:30} {:18} {:30} {}"
HEADER = _COLUMNS.format("measurement", "ours", "beside", "its time", "ours / its")


def lines(row: Row) -> list[str]:
    """Return the lines of one measurement: one for each thing it is put beside."""
    show = _SHOW.get(row.unit, _count)
    name, ours, result = row.name, _span(row.values[OURS], show), []
    for other, values in row.values.items():
        if other == OURS:
            continue
        span = _span(values, show)
        ratio = _span(ratios(row, other), _ratio)
        result.append(_COLUMNS.format(name, ours, other, span, ratio))
        name = ours = ""
    if name:
        result.append(_COLUMNS.format(name, ours, "", "", "").rstrip())
    result += [f"  {text}" for text in (row.note, _resources(row)) if text]
    return result


def _resources(row: Row) -> str:
    """Return what whole programs took of the machine, and where the bars are."""
    parts = []
    if row.cpu_seconds:
        cpu = (f"{name} {_time(min(each))}" for name, each in row.cpu_seconds.items())
        parts.append("least cpu: " + ", ".join(cpu))
    if row.peak_bytes:
        peaks = (f"{name} {peak >> 20} MiB" for name, peak in row.peak_bytes.items())
        parts.append("peak: " + ", ".join(peaks))
    if row.bars:
        parts.append("bar: " + ", ".join(f"{bar:g} of {name}" for name, bar in row.bars.items()))
    return "; ".join(parts)


def _statistics(values: Sequence[float]) -> dict[str, object]:
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }


def _json_row(row: Row) -> dict[str, object]:
    others = [name for name in row.values if name != OURS]
    return {
        "name": row.name,
        "note": row.note,
        "facts": row.facts,
        "unit": row.unit,
        "values": {name: _statistics(values) for name, values in row.values.items()},
        "cpu_seconds": {name: _statistics(values) for name, values in row.cpu_seconds.items()},
        "peak_bytes": row.peak_bytes,
        "ratios": {name: _statistics(ratios(row, name)) for name in others},
        "bars": row.bars,
    }


def machine() -> dict[str, object]:
    """Return what the digits depend on."""
    return {
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
    }


def write_json(
    path: Path, rows: Sequence[Row], skipped: Sequence[str], conditions: dict[str, object]
) -> None:
    """Write everything as one JSON document."""
    content = {
        "conditions": machine() | conditions,
        "rows": [_json_row(row) for row in rows],
        "skipped": list(skipped),
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
