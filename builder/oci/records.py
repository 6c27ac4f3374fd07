"""Descriptors, manifests, indexes and configurations, both ways; what is read is hostile.

Written in the order and with the escapes of Go's encoder, so that equal content has an equal
digest whoever writes it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, TypeVar

from builder.oci import media
from builder.oci.errors import ImageError

__all__ = [
    "Descriptor",
    "Index",
    "Manifest",
    "Platform",
    "check_digest",
    "describe",
    "go_json",
    "parse_json",
]

# What registries take at most is 4 MiB.
DOCUMENT_LIMIT = 8 << 20
_ITEMS_LIMIT = 65535
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MEDIA_TYPE = re.compile(r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*/[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]*")
_SIZE_MAX = 1 << 62
_ESCAPES = {
    "<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029",
}  # fmt: skip
_T = TypeVar("_T")


def go_json(value: object, indent: int | None = None) -> bytes:
    """Encode as Go's encoder does."""
    separators = (",", ": ") if indent else (",", ":")
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators)
    for char, escape in _ESCAPES.items():
        text = text.replace(char, escape)
    return text.encode("utf-8", "replace")


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Decode an object; raise `ImageError` for anything else, and for one that is too long."""
    if len(data) > DOCUMENT_LIMIT:
        raise ImageError(f"{what} is too long", expected=f"at most {DOCUMENT_LIMIT} bytes")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is not JSON") from error
    if not isinstance(value, dict):
        raise ImageError(f"{what} is not a JSON object", got=type(value).__name__)
    return value


def check_digest(text: object) -> str:
    """Return a digest that is safe as part of a path or address, or raise `ImageError`."""
    if not isinstance(text, str) or not _DIGEST.fullmatch(text):
        raise ImageError("no digest", expected="sha256:…", got=ascii(text)[:100])
    return text


def _get(value: Mapping[str, Any], key: str, kind: type[_T], default: _T, what: str) -> _T:
    found = value.get(key)
    if found is None:
        return default
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise ImageError(f"{what}: wrong {key}", got=ascii(found)[:60])
    return found


def _texts(value: Mapping[str, Any], key: str, what: str) -> dict[str, str]:
    found: dict[str, Any] = _get(value, key, dict, {}, what)
    if not all(isinstance(text, str) for text in found.values()):
        raise ImageError(f"{what}: {key} are not text")
    return found


def _list(value: Mapping[str, Any], key: str, item: Callable[[Any], _T], what: str) -> list[_T]:
    found: list[Any] = _get(value, key, list, [], what)
    if len(found) > _ITEMS_LIMIT:
        raise ImageError(f"{what}: too many {key}", got=len(found))
    return [item(one) for one in found]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ImageError("no text", got=ascii(value)[:60])
    return value


def _media_type(value: Mapping[str, Any], what: str) -> str:
    text = _get(value, "mediaType", str, "", what)
    if text and not _MEDIA_TYPE.fullmatch(text):
        raise ImageError(f"{what}: wrong mediaType", got=ascii(text)[:100])
    return text


def _sorted(texts: Mapping[str, str]) -> dict[str, str]:
    return dict(sorted(texts.items()))


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image runs on."""

    architecture: str = ""
    os: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()
    variant: str = ""

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Decode; raise `ImageError`."""
        if not isinstance(value, dict):
            raise ImageError("platform is not an object")
        what = "platform"
        return cls(
            _get(value, "architecture", str, "", what),
            _get(value, "os", str, "", what),
            _get(value, "os.version", str, "", what),
            tuple(_list(value, "os.features", _text, what)),
            _get(value, "variant", str, "", what),
        )

    def to_json(self) -> dict[str, object]:
        """Return the members in order."""
        value: dict[str, object] = {"architecture": self.architecture, "os": self.os}
        if self.os_version:
            value["os.version"] = self.os_version
        if self.os_features:
            value["os.features"] = list(self.os_features)
        if self.variant:
            value["variant"] = self.variant
        return value

    def __str__(self) -> str:
        parts = (self.os, self.architecture, self.variant)
        return "/".join(part for part in parts if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to content: its type, digest and length in bytes."""

    media_type: str
    digest: str
    size: int
    urls: tuple[str, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    platform: Platform | None = None
    artifact_type: str = ""

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Decode; raise `ImageError`."""
        what = "descriptor"
        if not isinstance(value, dict):
            raise ImageError("descriptor is not an object")
        size = _get(value, "size", int, -1, what)
        if not 0 <= size < _SIZE_MAX:
            raise ImageError(f"{what}: wrong size", got=size)
        platform = value.get("platform")
        return cls(
            _media_type(value, what),
            check_digest(value.get("digest")),
            size,
            tuple(_list(value, "urls", _text, what)),
            _texts(value, "annotations", what),
            None if platform is None else Platform.from_json(platform),
            _get(value, "artifactType", str, "", what),
        )

    def to_json(self) -> dict[str, object]:
        """Return the members in order."""
        value: dict[str, object] = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size,
        }
        if self.urls:
            value["urls"] = list(self.urls)
        if self.annotations:
            value["annotations"] = _sorted(self.annotations)
        if self.platform is not None:
            value["platform"] = self.platform.to_json()
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        return value

    @property
    def hex(self) -> str:
        """The digest without its algorithm: what blobs are called."""
        return self.digest.partition(":")[2]

    def plain(self) -> Descriptor:
        """Return type, digest and size alone."""
        return Descriptor(self.media_type, self.digest, self.size)

    def annotated(self, **changes: str) -> Descriptor:
        """Return a copy with further annotations, named as in `builder.oci.media`."""
        more = {getattr(media, name): text for name, text in changes.items()}
        return replace(self, annotations={**self.annotations, **more})

    @property
    def is_nydus_blob(self) -> bool:
        """Whether this is a layer with data of a Nydus image."""
        return media.BLOB in self.annotations or self.media_type == media.NYDUS_BLOB

    @property
    def is_bootstrap(self) -> bool:
        """Whether this is the layer with the metadata of a Nydus image."""
        return media.BOOTSTRAP in self.annotations

    @property
    def is_nydus_manifest(self) -> bool:
        """Whether an index says that this is a Nydus image, by its present or its older mark."""
        features = () if self.platform is None else self.platform.os_features
        return self.artifact_type == media.NYDUS_ARTIFACT or media.NYDUS_OS_FEATURE in features


@dataclass(frozen=True, slots=True)
class Manifest:
    """One image for one platform."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None
    artifact_type: str = ""

    @classmethod
    def parse(cls, data: bytes, media_type: str = "") -> Self:
        """Decode; `media_type` is what the manifest came as. Raise `ImageError`."""
        value = parse_json(data, "manifest")
        _check_version(value, "manifest")
        if "manifests" in value or "config" not in value:
            raise ImageError("no manifest of one image")
        own = _media_type(value, "manifest")
        if own and media_type and own != media_type:
            raise ImageError("manifest came as another type", expected=own, got=media_type)
        subject = value.get("subject")
        return cls(
            own or media_type or media.OCI_MANIFEST,
            Descriptor.from_json(value["config"]),
            tuple(_list(value, "layers", Descriptor.from_json, "manifest")),
            _texts(value, "annotations", "manifest"),
            None if subject is None else Descriptor.from_json(subject),
            _get(value, "artifactType", str, "", "manifest"),
        )

    def pack(self, indent: int | None = 2) -> bytes:
        """Encode."""
        value: dict[str, object] = {"schemaVersion": 2, "mediaType": self.media_type}
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        value["config"] = self.config.to_json()
        value["layers"] = [layer.to_json() for layer in self.layers]
        if self.subject is not None:
            value["subject"] = self.subject.to_json()
        if self.annotations:
            value["annotations"] = _sorted(self.annotations)
        return go_json(value, indent)

    @property
    def bootstrap(self) -> Descriptor | None:
        """The layer with the metadata; None for an image that is not Nydus'."""
        return next((layer for layer in reversed(self.layers) if layer.is_bootstrap), None)


@dataclass(frozen=True, slots=True)
class Index:
    """Images of several platforms under one name."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: Mapping[str, str] = field(default_factory=dict)
    subject: Descriptor | None = None
    artifact_type: str = ""

    @classmethod
    def parse(cls, data: bytes, media_type: str = "") -> Self:
        """Decode; raise `ImageError`."""
        value = parse_json(data, "index")
        _check_version(value, "index")
        if "manifests" not in value or "layers" in value or "config" in value:
            raise ImageError("no index of images")
        own = _media_type(value, "index")
        if own and media_type and own != media_type:
            raise ImageError("index came as another type", expected=own, got=media_type)
        subject = value.get("subject")
        return cls(
            own or media_type or media.OCI_INDEX,
            tuple(_list(value, "manifests", Descriptor.from_json, "index")),
            _texts(value, "annotations", "index"),
            None if subject is None else Descriptor.from_json(subject),
            _get(value, "artifactType", str, "", "index"),
        )

    def pack(self, indent: int | None = None, *, named: bool = True) -> bytes:
        """Encode; `named` puts the media type in."""
        value: dict[str, object] = {"schemaVersion": 2}
        if named:
            value["mediaType"] = self.media_type
        if self.artifact_type:
            value["artifactType"] = self.artifact_type
        value["manifests"] = [item.to_json() for item in self.manifests]
        if self.subject is not None:
            value["subject"] = self.subject.to_json()
        if self.annotations:
            value["annotations"] = _sorted(self.annotations)
        return go_json(value, indent)


def _check_version(value: Mapping[str, Any], what: str) -> None:
    if value.get("schemaVersion", 2) != 2:
        raise ImageError(f"{what} of an unknown version", expected=2)


def describe(data: bytes, media_type: str) -> Descriptor:
    """Return the descriptor of bytes."""
    return Descriptor(media_type, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))
