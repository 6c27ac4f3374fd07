"""Compares a converted image with its source, and says so in an in-toto statement."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from builder.convert.bootlayer import extract_bootstrap
from builder.convert.witness import Follower
from builder.oci import media
from builder.oci.ahead import PieceQueue, read_ahead, until
from builder.oci.config import ImageConfig
from builder.oci.errors import ImageError
from builder.oci.place import BlobStore, LayerSource, Source, Target, verified_pieces
from builder.oci.plain import plain_pieces
from builder.oci.records import Descriptor, Manifest, describe, go_json
from builder.output import write_file
from builder.proof.compare import COMPARED, require_equal
from builder.proof.entry import Entry, tree_digest
from builder.proof.source import LayerItem, lay_together, read_layer
from builder.proof.target import load_target
from erofs.errors import error_context
from erofs.rafs import Digester

__all__ = ["Proof", "Prover", "SourceReader", "statement"]

logger = logging.getLogger(__name__)

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:nydus-erofs:conversion:v1"
IN_TOTO = "application/vnd.in-toto+json"
_PREDICATE_KEY = "in-toto.io/predicate-type"
_EMPTY = b"{}"
# Pieces of a layer that wait to be walked.
_PIECES = 4
# Layers that are followed: as many as are converted, which is for the converter to say.
_MANY = 64


@dataclass(frozen=True, slots=True)
class Proof:
    """What was found equal: digest of the tree, its names, and the bytes of distinct content."""

    tree: str
    names: int
    content_bytes: int


class _Follower:
    """A layer on its way from the converter to the walker."""

    def __init__(self, pieces: PieceQueue) -> None:
        self._pieces = pieces

    def feed(self, piece: bytes) -> None:
        self._pieces.put(piece)

    def end(self, error: BaseException | None = None) -> None:
        self._pieces.end(error)


class SourceReader:
    """Reads the layers of source images in the background, each once.

    Args:
        source: has the layers.
        chunk_bytes: length of the pieces that are digested.
        digester: of the pieces.
        at_once: layers that are read at the same time.
        progress: called with numbers of content bytes.
    """

    def __init__(
        self,
        source: LayerSource,
        chunk_bytes: int,
        digester: Digester,
        at_once: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._source = source
        self._chunk_bytes = chunk_bytes
        self._digester = digester
        self._progress = progress
        self._pool = ThreadPoolExecutor(at_once, "walk")
        self._followers = ThreadPoolExecutor(_MANY, "follow")
        self._diff_ids: dict[str, str] = {}
        self._layers: dict[str, Future[list[LayerItem]]] = {}
        self._stop = threading.Event()

    def expect(self, manifest: Manifest, config: ImageConfig) -> None:
        """Hear of the layers of an image, each of which `read` or `follow` will name."""
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
            self._diff_ids.setdefault(layer.digest, diff_id)

    def begin(self, manifest: Manifest, config: ImageConfig) -> None:
        """Put the layers of an image on their way."""
        self.expect(manifest, config)
        for layer in manifest.layers:
            self.read(layer)

    def read(self, layer: Descriptor) -> None:
        """Put a layer on its way, from where it is stored."""
        if layer.digest not in self._layers:
            self._layers[layer.digest] = self._pool.submit(self._read, layer)

    def follow(self, layer: Descriptor) -> _Follower:
        """Return what takes the unpacked layer from somebody who has it.

        What comes that way is the layer if it has the digest that the configuration promises.
        """
        pieces = PieceQueue(_PIECES)
        self._layers[layer.digest] = self._followers.submit(self._walk_along, layer, pieces)
        return _Follower(pieces)

    def _walk_along(self, layer: Descriptor, pieces: PieceQueue) -> list[LayerItem]:
        try:
            return self._walk(layer, pieces.pieces())
        finally:
            # Whatever goes wrong here, the converter does not wait for this.
            pieces.close()

    def _read(self, layer: Descriptor) -> list[LayerItem]:
        pieces = until(self._stop, plain_pieces(self._source, layer))
        return self._walk(layer, read_ahead(pieces, _PIECES))

    def _walk(self, layer: Descriptor, pieces: Generator[bytes]) -> list[LayerItem]:
        with error_context(blob=layer.digest):
            return read_layer(
                pieces, self._diff_ids[layer.digest], self._chunk_bytes, self._digester,
                self._progress,
            )  # fmt: skip

    def tree(self, manifest: Manifest, config: ImageConfig) -> Entry:
        """Return the tree of an image; raise `NydusError`."""
        self.begin(manifest, config)
        layers = [self._layers[layer.digest].result() for layer in manifest.layers]
        return lay_together([_fresh(items) for items in layers])

    def close(self) -> None:
        """Stop what is under way, which is nothing when all went well, and wait for that."""
        self._stop.set()
        for pool in (self._pool, self._followers):
            pool.shutdown(wait=True, cancel_futures=True)


def _fresh(items: Sequence[LayerItem]) -> list[LayerItem]:
    """Return items that can be used up: images share layers."""
    return [
        item._replace(
            entry=replace(item.entry, children=None if item.entry.children is None else {})
        )
        for item in items
    ]


class Prover:
    """Proves images of one conversion.

    Args:
        source: the images before.
        target: takes the statements.
        blobs: where the data blobs are.
        work: a scratch directory.
        reader: of the source's layers.
        options: how the conversion was done, in words.
        version: of this program.
        file: for the statements instead of the target; None for the target.
        publishes: whether statements are stored at all.
        progress: called with numbers of content bytes that were read back.
    """

    def __init__(
        self,
        source: Source,
        target: Target,
        blobs: BlobStore,
        work: Path,
        reader: SourceReader,
        *,
        options: str,
        version: str,
        file: Path | None = None,
        publishes: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._source = source
        self._target = target
        self._blobs = blobs
        self._work = work
        self._reader = reader
        self._options = options
        self._version = version
        self._file = file
        self._publishes = publishes
        self._progress = progress
        self._statements: list[bytes] = []

    def expect(self, manifest: Manifest, config: ImageConfig) -> None:
        """Hear of a source that will be converted."""
        self._reader.expect(manifest, config)

    def follow(self, layer: Descriptor) -> Follower:
        """Return what is to see a layer that is converted now."""
        return self._reader.follow(layer)

    def read(self, layer: Descriptor) -> None:
        """Read a layer that the converter does not unpack."""
        self._reader.read(layer)

    def prove(self, manifest: Manifest, old: Manifest, config: ImageConfig) -> Proof:
        """Compare a stored image, whose manifest is not published, with its source.

        Args:
            manifest: of the result.
            old: of the source.
            config: of the source.

        Raises:
            TreesDiffer: they are not equal.
            NydusError: something cannot be read, or is not what its digest promises.
        """
        layer = manifest.bootstrap
        if layer is None:
            raise ImageError("image without a bootstrap")
        path = self._work / f"proof-{layer.hex}.boot"
        extract_bootstrap(verified_pieces(self._target, layer), layer, path)
        tree = load_target(path)
        content = tree.verify_blobs(self._blobs, self._progress)
        require_equal(self._reader.tree(old, config), tree.root)
        digest, names = tree_digest(tree.root)
        path.unlink()
        logger.info("proved: %d entries are equal, tree %s", names, digest)
        return Proof(digest, names, content)

    def publish(
        self, proof: Proof, image: Descriptor, source: Descriptor, layers: Sequence[Descriptor]
    ) -> None:
        """Store the statement about an image beside it, or in the file; raise `NydusError`."""
        text = statement(
            proof, (self._target.name, image), (self._source.name, source), layers,
            self._options, self._version,
        )  # fmt: skip
        self._statements.append(text)
        if self._file is not None:
            write_file(self._file, b"\n".join(self._statements) + b"\n", 0o644)
        elif self._publishes:
            self._attach(text, image)

    def _attach(self, text: bytes, image: Descriptor) -> None:
        empty = describe(_EMPTY, media.OCI_EMPTY)
        marks = {_PREDICATE_KEY: PREDICATE_TYPE}
        layer = replace(describe(text, IN_TOTO), annotations=marks)
        self._target.put(empty, [_EMPTY])
        self._target.put(layer, [text])
        manifest = Manifest(media.OCI_MANIFEST, empty, (layer,), marks, image.plain(), IN_TOTO)
        data = manifest.pack(None)
        stored = describe(data, media.OCI_MANIFEST)
        entry = replace(stored, annotations=marks, artifact_type=IN_TOTO)
        self._target.attach(data, entry, image)


def statement(
    proof: Proof,
    target: tuple[str, Descriptor],
    source: tuple[str, Descriptor],
    layers: Sequence[Descriptor],
    options: str,
    version: str,
) -> bytes:
    """Return the in-toto statement about an image; the same images give the same bytes."""
    return go_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [_subject(*target)],
            "predicateType": PREDICATE_TYPE,
            "predicate": {
                "source": {**_subject(*source), "layers": [layer.digest for layer in layers]},
                "tree": {"digest": proof.tree, "entries": proof.names},
                "contentBytes": proof.content_bytes,
                "compared": list(COMPARED),
                "result": "equal",
                "converter": {"name": "nydus-erofs", "version": version},
                "options": options,
            },
        }
    )


def _subject(name: str, descriptor: Descriptor) -> dict[str, object]:
    return {"name": name, "digest": {"sha256": descriptor.hex}}
