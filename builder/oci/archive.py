"""Images in tar archives: OCI layouts, and what `docker save` writes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import tempfile
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from builder.oci import media
from builder.oci.errors import ImageError
from builder.oci.layout import BLOBS, INDEX, LayoutTarget, choose, remove_tree
from builder.oci.place import Verifier, read_document
from builder.oci.records import DOCUMENT_LIMIT, Descriptor, Index, Manifest, describe, go_json
from builder.output import OutputFile
from erofs.errors import error_context
from fscache.backend.base import NotFound, ShortRead

__all__ = ["ArchiveSource", "ArchiveTarget"]

_MANIFEST = "manifest.json"
_MODE = 0o644
_BLOB_MODE = 0o444
_PIECE_BYTES = 1 << 20
_MAX_MEMBERS = 1 << 20


class _Part:
    """A member of the archive as a `BlobReader`; safe to use from many threads."""

    def __init__(self, descriptor: int, blob_id: str, offset: int, size: int) -> None:
        self._descriptor = descriptor
        self.blob_id = blob_id
        self._offset = offset
        self._size = size

    def size(self) -> int:
        """Return the length in bytes."""
        return self._size

    def read_at(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes; raise `ShortRead`."""
        data = b""
        if offset >= 0 and offset + length <= self._size:
            data = os.pread(self._descriptor, length, self._offset + offset)
        if len(data) != length:
            raise ShortRead("archive ends too early", blob=self.blob_id, offset=offset)
        return data

    @contextmanager
    def _stream(self, offset: int) -> Iterator[Iterator[bytes]]:
        yield (
            self.read_at(start, min(_PIECE_BYTES, self._size - start))
            for start in range(offset, self._size, _PIECE_BYTES)
        )

    def stream(self, offset: int) -> AbstractContextManager[Iterator[bytes]]:
        """Return everything from `offset` on."""
        return self._stream(offset)


class ArchiveSource:
    """An image of an archive, which is read where it is.

    Args:
        path: a tar that is not compressed.
        name: which of its images; empty for the only one.
        shown: what to call the image.

    Raises:
        ImageError: no archive of images, or not this one.
    """

    def __init__(self, path: Path, name: str = "", shown: str = "") -> None:
        self._path = path
        self.name = shown or str(path)
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise ImageError(f"cannot be read ({error.strerror})", path=path) from error
        self._made: dict[str, bytes] = {}
        try:
            with error_context(path=path):
                self._parts = _members(self._file)
                self._top = self._find(name)
        except BaseException:
            self._file.close()
            raise

    def _find(self, name: str) -> Descriptor:
        if INDEX in self._parts:
            return choose(Index.parse(self._read(INDEX)), name, self._path)
        if _MANIFEST in self._parts:
            return self._docker_image(name)
        raise ImageError("neither an OCI nor a Docker archive", expected=f"{INDEX}, {_MANIFEST}")

    def _read(self, name: str) -> bytes:
        if name not in self._parts:
            raise ImageError("archive lacks a member", entry=name)
        offset, size = self._parts[name]
        if size > DOCUMENT_LIMIT:
            raise ImageError("member is too long", entry=name, got=size)
        return _Part(self._file.fileno(), name, offset, size).read_at(0, size)

    def _docker_image(self, name: str) -> Descriptor:
        """Return a manifest, made for an image of `docker save`; its layers are plain tars."""
        try:
            images = json.loads(self._read(_MANIFEST))
            if name:
                images = [image for image in images if name in (image.get("RepoTags") or [])]
            if len(images) != 1:
                raise ImageError("exactly one image is wanted", got=f"{len(images)} images")
            config, layers = images[0]["Config"], images[0]["Layers"]
            texts = all(isinstance(item, str) for item in (config, *layers))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ImageError(f"{_MANIFEST} is not understood") from error
        if not texts:
            raise ImageError(f"{_MANIFEST} is not understood")
        data = self._read(config)
        manifest = Manifest(
            media.DOCKER_MANIFEST,
            self._keep(data, media.DOCKER_CONFIG),
            tuple(self._layer(layer) for layer in layers),
        )
        return self._keep(manifest.pack(), media.DOCKER_MANIFEST)

    def _keep(self, data: bytes, media_type: str) -> Descriptor:
        descriptor = describe(data, media_type)
        self._made[descriptor.hex] = data
        return descriptor

    def _layer(self, name: str) -> Descriptor:
        if name not in self._parts:
            raise ImageError("archive lacks a layer", entry=name)
        offset, size = self._parts[name]
        part = _Part(self._file.fileno(), name, offset, size)
        total = hashlib.sha256()
        with part.stream(0) as pieces:
            for piece in pieces:
                total.update(piece)
        digest = total.hexdigest()
        self._parts[f"{BLOBS}/{digest}"] = offset, size
        return Descriptor(media.DOCKER_LAYER, f"sha256:{digest}", size)

    def resolve(self) -> Descriptor:
        """Return the image's descriptor."""
        return self._top

    def document(self, descriptor: Descriptor) -> bytes:
        """Return a document, verified; raise `NydusError`."""
        made = self._made.get(descriptor.hex)
        return read_document(self, descriptor) if made is None else made

    def pieces(self, descriptor: Descriptor) -> Generator[bytes]:
        """Yield a blob, verified at its end; raise `NydusError`."""
        if descriptor.hex in self._made:
            yield self._made[descriptor.hex]
            return
        verifier = Verifier(descriptor)
        with error_context(path=self._path), self.open(descriptor.hex).stream(0) as pieces:
            for piece in pieces:
                verifier.update(piece)
                yield piece
            verifier.finish()

    def open(self, blob_id: str) -> _Part:
        """Return a reader of ranges; raise `NotFound`."""
        place = self._parts.get(f"{BLOBS}/{blob_id}")
        if place is None:
            raise NotFound("archive lacks a blob", path=self._path, blob=blob_id)
        return _Part(self._file.fileno(), blob_id, *place)

    def close(self) -> None:
        """Close the archive."""
        self._file.close()


def _members(file: Any) -> dict[str, tuple[int, int]]:
    """Return where the members of a tar are; links lead to what they name; raise `ImageError`."""
    parts: dict[str, tuple[int, int]] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = _normal(member.name)
                if len(parts) > _MAX_MEMBERS:
                    raise ImageError("archive has too many members")
                if member.isreg() and not member.issparse():
                    parts[name] = member.offset_data, member.size
                elif member.issym():
                    links[name] = _normal(str(PurePosixPath(name).parent / member.linkname))
                elif member.islnk():
                    links[name] = _normal(member.linkname)
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ImageError("not a tar archive, or a compressed one") from error
    for name, target in links.items():
        if target in parts:
            parts.setdefault(name, parts[target])
    return parts


def _normal(name: str) -> str:
    return os.path.normpath(name).lstrip("/")


class ArchiveTarget(LayoutTarget):
    """An OCI layout tar with Docker's `manifest.json`, which appears whole at `publish`.

    A tar names the length of a member before its content, so blobs are kept beside it until
    then.

    Args:
        path: of the archive.
        image_name: the whole reference.
        ref_name: its tag.
    """

    def __init__(self, path: Path, image_name: str, ref_name: str) -> None:
        self._path = path
        try:
            self._scratch = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", dir=path.parent))
        except OSError as error:
            raise ImageError(f"cannot be written ({error.strerror})", path=path) from error
        super().__init__(self._scratch, ref_name, image_name, str(path))

    def publish(self, data: bytes, descriptor: Descriptor, *, named: bool = True) -> None:
        """Store a manifest or index; `named` writes the archive; raise `NydusError`."""
        super().publish(data, descriptor, named=named)
        if named:
            self._write(data, descriptor)

    def _write(self, data: bytes, descriptor: Descriptor) -> None:
        names = sorted(path.name for path in (self._scratch / BLOBS).iterdir())
        with OutputFile(self._path, _MODE) as output:
            writer = _Appender(output)
            with tarfile.open(fileobj=writer, mode="w|", format=tarfile.USTAR_FORMAT) as tar:
                for directory in ("blobs", BLOBS):
                    tar.addfile(_info(f"{directory}/", 0, 0o755, tarfile.DIRTYPE))
                for name in names:
                    path = self._scratch / BLOBS / name
                    with path.open("rb") as file:
                        info = _info(f"{BLOBS}/{name}", path.stat().st_size, _BLOB_MODE)
                        tar.addfile(info, file)
                for name, content in self._documents(data, descriptor):
                    tar.addfile(_info(name, len(content), _BLOB_MODE), io.BytesIO(content))
            output.sync()
            output.commit()

    def _documents(self, data: bytes, descriptor: Descriptor) -> Iterable[tuple[str, bytes]]:
        yield INDEX, (self._scratch / INDEX).read_bytes()
        if media.is_manifest(descriptor.media_type):
            manifest = Manifest.parse(data)
            image = {
                "Config": f"{BLOBS}/{manifest.config.hex}",
                "RepoTags": [self._image_name],
                "Layers": [f"{BLOBS}/{layer.hex}" for layer in manifest.layers],
            }
            yield _MANIFEST, go_json([image])
        yield "oci-layout", (self._scratch / "oci-layout").read_bytes()

    def close(self) -> None:
        """Remove what was kept beside the archive."""
        super().close()
        remove_tree(self._scratch)


class _Appender(io.RawIOBase):
    """An `OutputFile` as a stream."""

    def __init__(self, output: OutputFile) -> None:
        super().__init__()
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._output.write(data)
        return len(data)


def _info(name: str, size: int, mode: int, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.mode, info.mtime = kind, size, mode, 0
    return info
