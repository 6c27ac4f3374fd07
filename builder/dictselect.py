"""Choose the chunks of a dictionary: common ones of images, and of versions of an image.

Two passes, as the real tool has them (spec tools 2.11): density clustering (DBSCAN) of
images, then exponential smoothing over the versions of each. Pure functions; where the real
tool iterates in random order, the order here is that of the input.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from builder.chunkdb import ChunkRow

__all__ = ["Choice", "choose"]

logger = logging.getLogger(__name__)

TRAINING_SHARE = 0.7
MAX_CLUSTERINGS = 7
MIN_POINTS = 10
COMMON_SHARE = 0.9
SMOOTHING = 0.5
_STEP = 0.05
_MEBIBYTE = 1 << 20


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen chunks, and the images that are like no others."""

    chunks: list[ChunkRow]
    noise: list[str]


@dataclass(slots=True)
class _Image:
    """A point of the clustering."""

    name: str
    chunks: list[ChunkRow]
    visited: bool = False
    cluster: int = 0
    size: int = field(init=False)
    first_sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.size = sum(chunk.compressed_size for chunk in self.chunks)
        self.first_sizes = {}
        for chunk in self.chunks:
            self.first_sizes.setdefault(chunk.digest, chunk.compressed_size)


def _mebibytes(size: int) -> str:
    value = size / _MEBIBYTE
    return str(int(value)) if value == int(value) else str(value)


def _size(chunks: Iterable[ChunkRow]) -> int:
    return sum(chunk.compressed_size for chunk in chunks)


def _distance(left: _Image, right: _Image) -> float:
    """Return 1 minus the share of bytes that repeat in both together."""
    total = left.size + right.size
    if not total:
        return math.nan
    once = sum(left.first_sizes.values())
    known = left.first_sizes
    once += sum(size for digest, size in right.first_sizes.items() if digest not in known)
    return 1.0 - (total - once) / total


def _by_image(chunks: Iterable[ChunkRow]) -> dict[str, list[ChunkRow]]:
    found: dict[str, list[ChunkRow]] = {}
    for chunk in chunks:
        found.setdefault(chunk.image, []).append(chunk)
    return found


def _version_key(version: str) -> tuple[int, ...]:
    """Return the numbers in a version, which alone order and tell versions."""
    return tuple(int(number) for number in re.findall(r"[0-9]+", version))


def _divide(chunks: Iterable[ChunkRow]) -> tuple[list[ChunkRow], list[ChunkRow]]:
    """Return the chunks of older versions, to learn from, and of newer ones, to test with."""
    training: list[ChunkRow] = []
    test: list[ChunkRow] = []
    for _, of_image in sorted(_by_image(chunks).items()):
        versions: dict[tuple[int, ...], list[ChunkRow]] = {}
        for chunk in of_image:
            versions.setdefault(_version_key(chunk.version), []).append(chunk)
        count = int(len(versions) * TRAINING_SHARE)
        for number, key in enumerate(sorted(versions)):
            (training if number < count else test).extend(versions[key])
    return training, test


class _Clustering:
    """DBSCAN over images; with a growing radius what is in a cluster stays there."""

    def __init__(self, images: Sequence[_Image]) -> None:
        self.images = images
        self._distances = [[_distance(left, right) for right in images] for left in images]

    def _near(self, place: int, radius: float) -> list[int]:
        return [
            other
            for other, distance in enumerate(self._distances[place])
            if not self.images[other].visited and distance <= radius
        ]

    def grow(self, radius: float) -> None:
        """Put images into clusters that have enough others within `radius`."""
        number = 1
        for place, image in enumerate(self.images):
            if image.visited or image.cluster:
                continue
            if len(self._near(place, radius)) >= MIN_POINTS:
                self._expand(place, number, radius)
                number += 1

    def _expand(self, place: int, number: int, radius: float) -> None:
        self.images[place].cluster = number
        stack = [place]
        while stack:
            current = stack.pop()
            if self.images[current].visited:
                continue
            self.images[current].visited = True
            near = self._near(current, radius)
            if len(near) < MIN_POINTS:
                continue
            for other in near:
                stack.append(other)
                self.images[other].cluster = self.images[other].cluster or number

    def common(self) -> dict[tuple[str, ...], list[ChunkRow]]:
        """Return for each cluster its images and the chunks that nearly all of them have."""
        clusters: dict[int, list[_Image]] = {}
        for image in self.images:
            if image.cluster:
                clusters.setdefault(image.cluster, []).append(image)
        return {
            tuple(image.name for image in members): _common_chunks(members)
            for members in clusters.values()
        }


def _common_chunks(members: Sequence[_Image]) -> list[ChunkRow]:
    counts = Counter(digest for image in members for digest in image.first_sizes)
    found: dict[str, ChunkRow] = {}
    for image in members:
        for chunk in image.chunks:
            if counts[chunk.digest] / len(members) >= COMMON_SHARE:
                found.setdefault(chunk.digest, chunk)
    return list(found.values())


_Clusters = dict[tuple[str, ...], list[ChunkRow]]


def _steps(first: float, last: float) -> Iterable[float]:
    """Yield numbers as the real tool adds them up, rounding errors included."""
    while first <= last:
        yield first
        first += _STEP


def _choose_between_images(chunks: Sequence[ChunkRow]) -> list[_Clusters]:
    """Return the chunks that images of a cluster share, clustering by clustering."""
    training, test = _divide(chunks)
    found: list[_Clusters] = []
    while len(found) < MAX_CLUSTERINGS:
        images = [_Image(name, rows) for name, rows in _by_image(training).items()]
        clustering = _Clustering(images)
        best: _Clusters = {}
        best_size: int | None = None
        for radius in _steps(0.5, 0.9):
            clustering.grow(radius)
            clusters = clustering.common()
            chosen = {row for rows in clusters.values() for row in rows}
            size = _size(row for row in test if row not in chosen)
            if best_size is None or size <= best_size:
                best_size, best = size, clusters
        chosen = {row for rows in best.values() for row in rows}
        digests = {row.digest for row in training if row in chosen}
        training = [row for row in training if row.digest not in digests]
        test = [row for row in test if row.digest not in digests]
        clustered = sum(1 for image in images if image.cluster)
        if images and clustered / len(images) < 0.2:
            break
        found.append(best)
    return found


def _smooth(chunks: Sequence[ChunkRow], threshold: float) -> list[ChunkRow]:
    """Return the chunks of one image that keep coming back from version to version."""
    found: dict[str, ChunkRow] = {}
    score = 0.0
    before: set[str] = set()
    current: set[str] = set()
    for place, chunk in enumerate(chunks):
        if chunk.version == chunks[0].version:
            score = 0.0
        else:
            if chunk.version != chunks[place - 1].version:
                before, current = current, set()
            score = SMOOTHING * (chunk.digest in before) + (1.0 - SMOOTHING) * score
        current.add(chunk.digest)
        if score > threshold:
            found.setdefault(chunk.digest, chunk)
    return [found[digest] for digest in sorted(found)]


def _choose_between_versions(
    chunks: Sequence[ChunkRow], clusterings: Sequence[_Clusters]
) -> dict[str, list[ChunkRow]]:
    """Return for each image the chunks that its versions share, and no cluster has."""
    training, test = _divide(chunks)
    logger.info("Train set size is %s", _mebibytes(_size(training)))
    logger.info("Test set size is %s", _mebibytes(_size(test)))
    rest = {name: _without(name, rows, clusterings) for name, rows in _by_image(training).items()}
    tests = _by_image(test)
    best: dict[str, list[ChunkRow]] = {}
    best_size: int | None = None
    for threshold in _steps(0.5, 0.8):
        chosen = {name: _smooth(rows, threshold) for name, rows in rest.items()}
        size = 0
        for name, rows in tests.items():
            digests = {row.digest for row in chosen.get(name, ())}
            size += _size(row for row in rows if row.digest not in digests)
        if best_size is None or size <= best_size:
            best_size, best = size, chosen
    size, all_size = best_size or 0, _size(test)
    rate = 1.0 - size / all_size if all_size else math.nan
    logger.info(
        "After deduplicating test set size is %s and deduplicating rate is %s ",
        _mebibytes(size),
        int(rate) if rate in (0.0, 1.0) else rate,
    )
    return best


def _without(
    name: str, chunks: Sequence[ChunkRow], clusterings: Sequence[_Clusters]
) -> list[ChunkRow]:
    taken = {
        row
        for clusters in clusterings
        for names, rows in clusters.items()
        if name in names
        for row in rows
    }
    return [row for row in chunks if row not in taken]


def choose(chunks: Sequence[ChunkRow]) -> Choice:
    """Return the chunks that are worth to be in a dictionary."""
    logger.info("All chunk size is %s", _mebibytes(_size(chunks)))
    clusterings = _choose_between_images(chunks)
    versions = _choose_between_versions(chunks, clusterings)
    chosen: list[ChunkRow] = []
    core: set[str] = set()
    for clusters in clusterings:
        for names, rows in clusters.items():
            core.update(names)
            chosen += rows
    for rows in versions.values():
        chosen += rows
    logger.info("Chunkdict size is %s", _mebibytes(_size(chosen)))
    noise = dict.fromkeys(chunk.image for chunk in chunks if chunk.image not in core)
    return Choice(chosen, list(noise))
