"""Answer questions about a bootstrap: the commands of `nydus-image inspect`.

The texts are the real tool's, byte for byte (spec tools 2.5). Reading commands from
somewhere and printing answers is the command line's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from builder.errors import BuildError
from builder.listing import (
    child_entries,
    flag_names,
    quoted,
    readable,
    unsigned,
)
from builder.report import COMPRESSOR_NAMES
from erofs import AnyBootstrap, AnyInode
from erofs.base import BlobHint
from erofs.blobmeta import chunk_data_size
from erofs.rafs import (
    BlobEntry,
    BlobFeatures,
    ChunkInfo,
    Cipher,
    Compressor,
    Digester,
)

__all__ = ["HELP", "Answer", "InspectError", "Inspector"]

HELP = """
    stats:              Display RAFS filesystesm metadata
    ls:                 Show files in current directory
    cd DIR:             Change current directory
    stat FILE_NAME:     Show particular information of RAFS file
    blobs:              Show blob table
    prefetch:           Show prefetch table
    chunk OFFSET:       List basic info of a single chunk together with a list of files that share it
    icheck INODE:       Show path of the inode and basic information
    exit:               Exit
        
"""  # noqa: E501, W293 -- the real tool's text
_DIGESTERS = {Digester.BLAKE3: "Blake3", Digester.SHA256: "Sha256"}
_CIPHERS = {Cipher.NONE: "None", Cipher.AES_128_XTS: "Aes128Xts"}
_CHUNK_FILE_WIDTH = 32
_NUMBER_DIGITS = 20


class InspectError(BuildError):
    """A command that cannot be carried out."""


class Answer(NamedTuple):
    """What a command has to say; `value` is the JSON of request mode, where it replaces `text`.

    With `value` None both are printed there, the text and `null`.
    """

    text: str = ""
    value: object = None


class _Place(NamedTuple):
    """A directory on the way from the root to where we are."""

    name: bytes
    nid: int


class Inspector:
    """Carries out commands on a bootstrap; remembers the current directory.

    Args:
        image: stays the caller's.
        ids: as `builder.bootstrap.blob_ids` gives them.
    """

    def __init__(self, image: AnyBootstrap, ids: Sequence[str]) -> None:
        self._image = image
        self._ids = ids
        self._places = [_Place(b"/", image.root.nid)]
        self._plain: dict[bytes, Callable[[], Answer]] = {
            b"stats": self._stats,
            b"ls": self._ls,
            b"blobs": self._blobs,
            b"prefetch": self._prefetch,
        }
        self._with_argument: dict[bytes, Callable[[bytes], Answer]] = {
            b"cd": self._cd,
            b"stat": self._stat,
            b"chunk": self._chunk,
            b"icheck": self._icheck,
        }

    def execute(self, command: bytes, argument: bytes) -> Answer | None:
        """Carry out a command; return None when there is none of that form.

        Raises:
            InspectError: the argument is no number, or names nothing.
            FormatError: the bootstrap is broken.
        """
        if not argument:
            plain = self._plain.get(command)
            return None if plain is None else plain()
        with_argument = self._with_argument.get(command)
        return None if with_argument is None else with_argument(argument)

    def _stats(self) -> Answer:
        image, tables = self._image, self._image.tables
        rows = {
            "Version:": image.version,
            "Inodes Count:": image.inode_count,
            "Chunk Size:": f"{image.chunk_size // 1024}KB",
            "Root Inode:": image.root.nid,
            "Flags:": flag_names(image.flags),
            "Blob table offset:": f"{tables.blob_offset:#x}",
            "Blob table size:": f"{tables.blob_size:#x}",
            "Prefetch table offset:": f"{tables.prefetch_offset:#x}",
            "Prefetch table entries:": f"{tables.prefetch_entries:#x}",
            "Chunk table offset:": f"{tables.chunk_offset:#x}",
            "Chunk table size:": f"{tables.chunk_size:#x}",
        }
        lines = "".join(f"    {key:<23} {value}\n" for key, value in rows.items())
        return Answer(f"\n{lines}    \n", {"inodes_count": image.inode_count})

    def _ls(self) -> Answer:
        lines = []
        for name, nid in child_entries(self._here()):
            inode = self._image.inode(nid)
            sign = "-" if inode.is_regular else "d" if inode.is_dir else "l"
            if not (inode.is_regular or inode.is_dir or inode.is_symlink):
                sign = " "
            lines.append(f"{sign}    {nid:<8} {quoted(name)}\n")
        return Answer("".join(lines))

    def _here(self) -> AnyInode:
        return self._image.inode(self._places[-1].nid)

    def _cd(self, name: bytes) -> Answer:
        if name == b".":
            return Answer()
        if name == b"..":
            if len(self._places) > 1:
                self._places.pop()
            return Answer()
        entry = self._here().lookup(name)
        if entry is None:
            return Answer(f"{readable(name)} is \n")
        if not self._image.inode(entry.nid).is_dir:
            return Answer(f"{readable(name)} is not a directory\n")
        self._places.append(_Place(name, entry.nid))
        return Answer()

    def _stat(self, name: bytes) -> Answer:
        if name in (b".", b".."):
            up = 1 if name == b"." else 2
            place = self._places[max(0, len(self._places) - up)]
            parent = self._places[max(0, len(self._places) - up - 1)]
            return Answer(_stat_text(place.name, self._image.inode(place.nid), parent.nid))
        entry = self._here().lookup(name)
        if entry is None:
            raise InspectError("no such file here", entry=name)
        inode = self._image.inode(entry.nid)
        text = _stat_text(name, inode, self._places[-1].nid)
        if inode.is_regular:
            text += "  Chunk list:\n" + "".join(self._chunk_list(inode))
        return Answer(text)

    def _chunk_list(self, inode: AnyInode) -> Iterator[str]:
        for number, chunk in enumerate(inode.file_chunks()):
            yield (
                f"        {number} ->\n"
                f"        file offset: {number * self._image.chunk_size},"
                f" chunk index: {chunk.chunk_index}\n"
                f"        compressed size: {chunk.compressed_size},"
                f" decompressed size: {chunk.uncompressed_size}\n"
                f"        compressed offset: {chunk.compressed_offset},"
                f" decompressed offset: {chunk.uncompressed_offset}\n"
                f"        blob id: {self._ids[chunk.blob_index]}\n"
                f"        chunk id: {chunk.digest.hex()}\n"
                "    \n"
            )

    def _blobs(self) -> Answer:
        blobs, hints = self._image.blobs, self._image.blob_hints
        values = [
            {
                "blob_id": blob_id,
                "compressed_size": blob.compressed_size,
                "decompressed_size": blob.uncompressed_size,
                "readahead_offset": hint.readahead_offset,
                "readahead_size": hint.readahead_size,
            }
            for blob_id, blob, hint in zip(self._ids, blobs, hints, strict=True)
        ]
        texts = map(_blob_text, self._ids, blobs, hints)
        return Answer("".join(texts), values)

    def _prefetch(self) -> Answer:
        nids = self._image.prefetch_nids
        paths = self._paths_of(nids)
        lines = [f"Total Prefetching Files: {len(nids)}\n"]
        for nid in nids:
            joined = b" ".join(paths[nid])
            lines.append(f"Inode Number:{nid:10} | Path: {quoted(joined)} \n")
        values = [{"inode": nid, "path": list(map(readable, paths[nid]))} for nid in nids]
        return Answer("".join(lines), values)

    def _paths_of(self, nids: Iterable[int]) -> dict[int, list[bytes]]:
        """Return every path of each inode, in one walk; those of directories end with a slash."""
        paths: dict[int, list[bytes]] = {nid: [] for nid in nids}
        if paths:
            for path, inode in self._image.walk():
                if inode.nid in paths:
                    paths[inode.nid].append(_with_slash(path) if inode.is_dir else path)
        return paths

    def _chunk(self, argument: bytes) -> Answer:
        offset = _number(argument, "Wrong OFFSET is specified. Is it a number?")
        texts = [
            self._chunk_text(path, chunk)
            for path, inode in self._image.walk()
            if inode.is_regular
            for chunk in inode.file_chunks()
            if chunk.compressed_offset == offset
        ]
        return Answer("".join(texts))

    def _chunk_text(self, path: bytes, chunk: ChunkInfo) -> str:
        parent, name = path.rsplit(b"/", 1)
        width = _CHUNK_FILE_WIDTH
        return (
            f"\nFile: {readable(name):<{width}} Parent Path: {readable(parent + b'/'):<{width}}\n"
            f"Compressed Offset: {chunk.compressed_offset},"
            f" Compressed Size: {chunk.compressed_size}\n"
            f"Decompressed Offset: {chunk.uncompressed_offset},"
            f" Decompressed Size: {chunk.uncompressed_size}\n"
            f"Chunk ID: {chunk.digest.hex()},\n"
            f"Blob ID: {self._ids[chunk.blob_index]}\n\n"
        )

    def _icheck(self, argument: bytes) -> Answer:
        nid = _number(argument, "Wrong INODE is specified. Is it a inode number?")
        texts = []
        parents = {b"": self._image.root.nid}
        for path, inode in self._image.walk():
            if inode.is_dir:
                parents[path.rstrip(b"/")] = inode.nid
            if inode.nid != nid:
                continue
            texts.append(readable(path) + "\n")
            if path != b"/":
                parent, name = path.rsplit(b"/", 1)
                texts.append(_stat_text(name, inode, parents[parent]))
        if not texts:
            raise InspectError("no inode of this number in the tree", got=nid)
        return Answer("".join(texts))


def _with_slash(path: bytes) -> bytes:
    return path if path.endswith(b"/") else path + b"/"


def _number(argument: bytes, complaint: str) -> int:
    if not argument.isdigit() or len(argument) > _NUMBER_DIGITS:
        raise InspectError(complaint)
    return int(argument)


def _stat_text(name: bytes, inode: AnyInode, parent: int) -> str:
    rows = {
        "Inode Number:": inode.nid,
        "Name:": quoted(name),
        "Size:": inode.size,
        "Parent:": parent,
        "Mode:": f"0x{inode.mode:X}",
        "Permissions:": f"{inode.mode:o}",
        "Nlink:": inode.nlink,
        "UID:": inode.uid,
        "GID:": inode.gid,
        "Mtime:": unsigned(inode.mtime),
        "MtimeNsec:": inode.mtime_nsec,
        "Blocks:": inode.sectors,
    }
    return "\n" + "".join(f"{key:<19} {value}\n" for key, value in rows.items())


def _blob_text(blob_id: str, blob: BlobEntry, hint: BlobHint) -> str:
    rows = {
        "Blob Index:": blob.blob_index,
        "Blob ID:": blob_id,
        "Raw Blob ID:": blob.id,
        "Blob Size:": blob.compressed_size,
        "Compressed Data Size:": chunk_data_size(blob),
        "Uncompressed Data Size:": blob.uncompressed_size,
        "Mapped Block Address:": hint.mapped_blkaddr,
        "Features:": flag_names(BlobFeatures(blob.features)),
        "Compressor:": COMPRESSOR_NAMES[Compressor(blob.compressor)],
        "Digester:": _DIGESTERS[Digester(blob.digester)],
        "Cipher:": _CIPHERS[Cipher(blob.cipher)],
        "Chunk Size:": f"{blob.chunk_size:#x}",
        "Chunk Count:": blob.chunk_count,
        "Prefetch Table Offset:": hint.readahead_offset,
        "Prefetch Table Size:": hint.readahead_size,
        "Meta Compressor:": COMPRESSOR_NAMES[Compressor(blob.ci_compressor)],
        "Meta Offset:": blob.ci_offset,
        "Meta Compressed Size:": blob.ci_compressed_size,
        "Meta Uncompressed Size:": blob.ci_uncompressed_size,
        "ToC Digest:": blob.blob_toc_digest.hex(),
        "ToC Size:": blob.blob_toc_size,
        "RAFS Blob Digest:": blob.blob_meta_digest.hex(),
        "RAFS Blob Size:": blob.blob_meta_size,
    }
    return "\n" + "".join(f"{key:<23} {value}\n" for key, value in rows.items())
