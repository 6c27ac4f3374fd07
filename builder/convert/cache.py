"""Layers that were converted before: recognised by source and options, and not read again.

A converted layer depends on its source layer's bytes and on the options alone, never on the
layers below it, so its source's digest stands for the whole chain (spec tools 15.10). Records
without options, as the real tool writes them, are not used: nobody knows how they were made.
"""

from __future__ import annotations

import base64
import fcntl
import json
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from builder.convert.layer import ConvertedLayer, copy_blob
from builder.oci import media
from builder.oci.errors import ImageError
from builder.oci.place import BlobStore, Source, Target
from builder.oci.records import Descriptor, Index, Manifest, check_digest, describe, parse_json
from builder.output import write_file
from fscache.backend.base import NotFound

__all__ = ["CachePlace", "LayerRecords", "LocalRecords"]

logger = logging.getLogger(__name__)

_CONFIG = b"{}"
# Paths of directories that a layer does not describe, as far as a record has room for them.
_PATHS_MAX = 1 << 14
_FILE = "layers.json"
_LOCAL_MAX = 10_000


class LocalRecords:
    """Records in a file of a folder, for processes of one machine; nothing else is kept.

    Args:
        directory: made when it is not there.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / _FILE
        directory.mkdir(parents=True, exist_ok=True)

    def load(self) -> dict[str, Descriptor]:
        """Return the records by key; a broken file is told and counts as none."""
        try:
            values = parse_json(self._path.read_bytes(), "records of layers")
            return {key: Descriptor.from_json(value) for key, value in values.items()}
        except FileNotFoundError:
            return {}
        except ImageError as error:
            logger.warning("%s: %s; nothing is taken from it", self._path, error)
            return {}

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._path.with_suffix(".lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def add(self, key: str, descriptor: Descriptor) -> None:
        """Remember a record, beside those that others have added meanwhile."""
        with self._locked():
            known = {key: descriptor, **{k: v for k, v in self.load().items() if k != key}}
            kept = dict(list(known.items())[:_LOCAL_MAX])
            text = json.dumps({name: one.to_json() for name, one in kept.items()})
            write_file(self._path, text.encode(), 0o644)


class CachePlace(NamedTuple):
    """A cache image: where it is read, and where it is written."""

    source: Source
    target: Target
    version: str
    max_records: int


class LayerRecords:
    """Finds and keeps converted layers; safe to use from many threads.

    Args:
        key: of the options.
        blobs: where the layers have to be.
        stored: the same place to read from, for filling the cache image.
        image: the cache image, if there is one.
        local: records of this machine, if they are wanted.
    """

    def __init__(
        self,
        key: str,
        blobs: BlobStore,
        stored: Source | None,
        image: CachePlace | None = None,
        local: LocalRecords | None = None,
    ) -> None:
        self._key = key
        self._blobs = blobs
        self._stored = stored
        self._image = image
        self._local = local
        self._lock = threading.Lock()
        self._old = [] if image is None else _read(image)
        self._new: list[Descriptor] = []
        self._here = {} if local is None else local.load()

    def find(self, layer: Descriptor) -> tuple[Descriptor, tuple[bytes, ...]] | None:
        """Return a converted layer, which is in its place now, and what it does not describe."""
        name = f"{layer.digest} {self._key}"
        found = self._here.get(name)
        if found is not None and self._blobs.has(found):
            return self._taken(found)
        for record in self._old:
            if self._is_for(record, layer):
                return self._fetched(record)
        return None

    def _is_for(self, record: Descriptor, layer: Descriptor) -> bool:
        marks = record.annotations
        return (
            marks.get(media.SOURCE_DIGEST) == layer.digest
            and marks.get(media.CACHE_OPTIONS) == self._key
        )

    def _fetched(self, record: Descriptor) -> tuple[Descriptor, tuple[bytes, ...]] | None:
        if not self._blobs.has(record):
            assert self._image is not None  # noqa: S101 - the record is from there
            try:
                copy_blob(self._image.source, self._blobs, record)
            except NotFound as error:
                logger.warning("cached layer is gone, it is made anew: %s", error)
                return None
        return self._taken(record)

    def _taken(self, record: Descriptor) -> tuple[Descriptor, tuple[bytes, ...]]:
        with self._lock:
            self._new.append(record)
        try:
            text = base64.b64decode(record.annotations.get(media.CACHE_UNDESCRIBED, ""))
        # Of text that is not ASCII, a plain one.
        except ValueError as error:
            raise ImageError("record of the cache is broken", blob=record.digest) from error
        paths = tuple(text.split(b"\0")[1:])
        marks = {key: text for key, text in record.annotations.items() if key in _KEPT}
        plain = Descriptor(record.media_type, record.digest, record.size, annotations=marks)
        return plain, paths

    def note(self, layer: ConvertedLayer) -> None:
        """Remember a layer that was made."""
        paths = b"".join(b"\0" + path for path in layer.undescribed)
        if len(paths) > _PATHS_MAX:
            return
        record = layer.descriptor.annotated(
            SOURCE_DIGEST=layer.source.digest,
            UNCOMPRESSED=layer.descriptor.digest,
            CACHE_OPTIONS=self._key,
            CACHE_UNDESCRIBED=base64.b64encode(paths).decode(),
        )
        with self._lock:
            self._new.append(record)
        if self._local is not None:
            self._local.add(f"{layer.source.digest} {self._key}", record)

    def publish(self) -> None:
        """Store the cache image, newest records first; raise `NydusError`."""
        image = self._image
        if image is None:
            return
        logger.info("pushing cache %s", image.target.name)
        records: dict[tuple[str, str], Descriptor] = {}
        for record in (*self._new, *self._old):
            marks = record.annotations
            name = marks.get(media.SOURCE_DIGEST, ""), marks.get(media.CACHE_OPTIONS, "")
            records.setdefault(name, record)
        kept = tuple(records.values())[: image.max_records]
        config = describe(_CONFIG, media.OCI_CONFIG)
        image.target.put(config, [_CONFIG])
        for record in kept:
            if self._stored is not None and self._blobs.has(record):
                copy_blob(self._stored, image.target, record)
        manifest = Manifest(media.OCI_MANIFEST, config, kept, {media.CACHE_VERSION: image.version})
        data = manifest.pack()
        image.target.publish(data, describe(data, media.OCI_MANIFEST))
        logger.info("pushed cache %s", image.target.name)


_KEPT = (media.BLOB, media.LAYER_REF)


def _read(image: CachePlace) -> list[Descriptor]:
    """Return the records of a cache image; none when there is no image yet, or none of ours."""
    logger.info("pulling cache %s", image.source.name)
    try:
        top = image.source.resolve()
    except ImageError as error:
        if isinstance(error.__cause__, NotFound):
            return []
        raise
    data = image.source.document(top)
    manifests = [top]
    if media.is_index(top.media_type):
        manifests = list(Index.parse(data, top.media_type).manifests)
    records = []
    for one in manifests:
        manifest = Manifest.parse(image.source.document(one), one.media_type)
        if manifest.annotations.get(media.CACHE_VERSION) == image.version:
            records += [each for each in manifest.layers if media.CACHE_OPTIONS in each.annotations]
    for record in records:
        check_digest(record.annotations.get(media.SOURCE_DIGEST))
    logger.info("pulled cache %s", image.source.name)
    return records
