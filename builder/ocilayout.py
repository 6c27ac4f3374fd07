"""An OCI image layout on disk: descriptors, verified content, and one more entry of its index.

Only what disks need; nothing here speaks to a registry. Source: OCI image-spec 1.1,
`image-layout.md`, `descriptor.md`.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from builder.errors import BuildError
from builder.output import write_file
from erofs.errors import CorruptStructure, FormatError, IntegrityError, error_context

__all__ = [
    "INDEX_TYPES",
    "MANIFEST_TYPES",
    "REF_NAME",
    "Descriptor",
    "Layout",
    "as_list",
    "as_object",
    "json_bytes",
]

MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
REF_NAME = "org.opencontainers.image.ref.name"
_NAME_KEYS = (REF_NAME, "io.containerd.image.name")
# What registries take for a manifest.
_MAX_JSON_BYTES = 4 << 20
_MODE = 0o644
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_MAX_SIZE = (1 << 63) - 1


def json_bytes(value: object) -> bytes:
    """Return JSON in the one form that the same value always has."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def as_object(value: object, what: str) -> dict[str, object]:
    """Return a JSON object; raise `CorruptStructure`."""
    if not isinstance(value, dict):
        raise CorruptStructure(f"{what} is not an object")
    return value


def as_list(value: object, what: str) -> list[object]:
    """Return a JSON array; raise `CorruptStructure`."""
    if not isinstance(value, list):
        raise CorruptStructure(f"{what} is not an array")
    return value


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What an index or a manifest says of content: type, digest, bytes."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    platform: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, data: bytes, media_type: str) -> Descriptor:
        """Return the descriptor of some bytes."""
        return cls(media_type, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))

    @classmethod
    def from_json(cls, value: object) -> Descriptor:
        """Decode and check one; raise `CorruptStructure`."""
        fields = as_object(value, "descriptor")
        media_type, digest, size = (fields.get(key) for key in ("mediaType", "digest", "size"))
        if not isinstance(media_type, str) or not media_type:
            raise CorruptStructure("mediaType of a descriptor is missing")
        if not isinstance(digest, str) or not _DIGEST.match(digest):
            raise CorruptStructure("digest of a descriptor", expected="sha256:<64 hex digits>")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= _MAX_SIZE:
            raise CorruptStructure("size of a descriptor", got=ascii(size)[:32])
        artifact_type = fields.get("artifactType") or ""
        return cls(
            media_type,
            digest,
            size,
            _texts(fields.get("annotations")),
            artifact_type if isinstance(artifact_type, str) else "",
            _texts(fields.get("platform")),
        )

    def as_json(self) -> dict[str, object]:
        """Return the JSON object."""
        value: dict[str, object] = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
        }
        if self.annotations:
            value["annotations"] = dict(sorted(self.annotations.items()))
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        if self.platform:
            value["platform"] = dict(self.platform)
        return value

    @property
    def hex(self) -> str:
        """The digest without its algorithm."""
        return self.digest.partition(":")[2]


def _texts(value: object) -> dict[str, str]:
    """Return the members of an object that are texts; others mean nothing here."""
    found = value if isinstance(value, dict) else {}
    return {key: text for key, text in found.items() if isinstance(text, str)}


class Layout:
    """A directory with `oci-layout`, `index.json` and `blobs`.

    Raises:
        FormatError: it is no layout of version 1.
        BuildError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with error_context(path=path / "oci-layout"):
            marker = as_object(_load(self._read_file(path / "oci-layout")), "layout")
            version = marker.get("imageLayoutVersion")
            if not isinstance(version, str) or not version.startswith("1."):
                raise CorruptStructure("imageLayoutVersion", expected="1.*", got=ascii(version))

    @staticmethod
    def is_at(path: Path) -> bool:
        """Whether a path looks like a layout."""
        return (path / "oci-layout").is_file()

    @staticmethod
    def _read_file(path: Path, limit: int = _MAX_JSON_BYTES) -> bytes:
        try:
            with path.open("rb") as file:
                data = file.read(limit + 1)
        except OSError as error:
            raise BuildError(f"cannot be read ({error.strerror})", path=path) from error
        if len(data) > limit:
            raise FormatError("is too large", path=path, expected=f"{limit} bytes")
        return data

    def blob(self, descriptor: Descriptor) -> Path:
        """Return where content lies; it is not looked at."""
        return self.path / "blobs" / "sha256" / descriptor.hex

    def read(self, descriptor: Descriptor) -> dict[str, object]:
        """Return the JSON object that a descriptor names, verified.

        Raises:
            IntegrityError: the content has another digest or length.
            FormatError: it is no JSON object.
            BuildError: it cannot be read.
        """
        path = self.blob(descriptor)
        with error_context(path=path):
            data = self._read_file(path)
            if len(data) != descriptor.size:
                raise IntegrityError("length", expected=descriptor.size, got=len(data))
            found = hashlib.sha256(data).hexdigest()
            if found != descriptor.hex:
                raise IntegrityError("SHA-256", expected=descriptor.hex, got=found)
            return as_object(_load(data), "content")

    def check(self, descriptor: Descriptor) -> Path:
        """Verify content of any size and return its path; raise as `read`."""
        path = self.blob(descriptor)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BuildError(f"cannot be read ({error.strerror})", path=path) from error
        if size != descriptor.size:
            raise IntegrityError("length", path=path, expected=descriptor.size, got=size)
        if found != descriptor.hex:
            raise IntegrityError("SHA-256", path=path, expected=descriptor.hex, got=found)
        return path

    def entries(self) -> list[Descriptor]:
        """Return what the index lists; raise `FormatError`."""
        return [Descriptor.from_json(entry) for entry in self._index_entries(self._index())]

    def _index(self) -> dict[str, object]:
        path = self.path / "index.json"
        with error_context(path=path):
            return as_object(_load(self._read_file(path)), "index")

    @staticmethod
    def _index_entries(index: dict[str, object]) -> list[object]:
        return as_list(index.get("manifests"), "manifests of the index")

    def find(self, reference: str | None = None) -> Descriptor:
        """Return the entry with a name or digest; without one the only image.

        Raises:
            BuildError: there is none, or there are several.
            FormatError: the index is broken.
        """
        images = [entry for entry in self.entries() if not entry.artifact_type]
        if reference is not None:
            images = [
                entry for entry in images
                if entry.digest == reference
                or any(entry.annotations.get(key) == reference for key in _NAME_KEYS)
            ]  # fmt: skip
        if len({entry.digest for entry in images}) != 1:
            what = "images" if reference is None else f"images called {reference}"
            raise BuildError(what, path=self.path, expected=1, got=len(images))
        return images[0]

    def write(self, data: bytes, media_type: str) -> Descriptor:
        """Store content and return its descriptor; raise `BuildError`."""
        descriptor = Descriptor.of(data, media_type)
        target = self.blob(descriptor)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_file(target, data, _MODE)
        return descriptor

    def add(self, descriptor: Descriptor) -> None:
        """List content in the index, once; others may do the same at the same time.

        Raises:
            BuildError: the index cannot be written.
            FormatError: it is broken.
        """
        with self._alone():
            index = self._index()
            entries = self._index_entries(index)
            listed = [as_object(entry, "descriptor").get("digest") for entry in entries]
            if descriptor.digest not in listed:
                entries.append(descriptor.as_json())
                write_file(self.path / "index.json", json_bytes(index), _MODE)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _load(data: bytes) -> object:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptStructure("is not JSON") from error
