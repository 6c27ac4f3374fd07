"""Prometheus' text format, version 0.0.4: families of samples to text, and nothing else.

Source: https://prometheus.io/docs/instrumenting/exposition_formats/ (text-based format).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple

__all__ = ["CONTENT_TYPE", "Family", "Histogram", "Kind", "Sample", "render"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Kind(StrEnum):
    """What a family is; names of counters end with `_total`."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Histogram(NamedTuple):
    """Observations by class.

    Args:
        bounds: upper ends of the classes, which belong to them, in rising order.
        counts: observations of each class alone; one more than bounds, for all above.
        sum: of all observations.
    """

    bounds: Sequence[float]
    counts: Sequence[int]
    sum: float


class Sample(NamedTuple):
    """One value and the labels that tell it from the others of its family."""

    value: float | Histogram
    labels: Mapping[str, str] = {}


class Family(NamedTuple):
    """All samples of one name."""

    name: str
    kind: Kind
    help: str
    samples: Sequence[Sample]


def render(families: Iterable[Family]) -> bytes:
    """Return the text of families; those without samples are left out."""
    lines: list[str] = []
    for family in families:
        if family.samples:
            lines.append(f"# HELP {family.name} {_escape(family.help)}")
            lines.append(f"# TYPE {family.name} {family.kind}")
            for sample in family.samples:
                lines.extend(_lines(family.name, sample))
    return "".join(line + "\n" for line in lines).encode()


def _lines(name: str, sample: Sample) -> Iterator[str]:
    value, labels = sample
    if not isinstance(value, Histogram):
        yield f"{name}{_labels(labels)} {value!r}"
        return
    below = list(accumulate(value.counts))
    for bound, count in zip((*map(repr, value.bounds), "+Inf"), below, strict=True):
        yield f"{name}_bucket{_labels({**labels, 'le': bound})} {count}"
    yield f"{name}_sum{_labels(labels)} {value.sum!r}"
    yield f"{name}_count{_labels(labels)} {below[-1]}"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    pairs = ((name, _escape(value).replace('"', '\\"')) for name, value in labels.items())
    return "{" + ",".join(f'{name}="{value}"' for name, value in pairs) + "}"


def _escape(text: str) -> str:
    """Return text without line ends; bytes of file names that are no UTF-8 become escapes."""
    safe = text.encode("utf-8", "backslashreplace").decode()
    return safe.replace("\\", "\\\\").replace("\n", "\\n")
