"""eStargz layers: every chunk begins a member of gzip, a table of contents names them."""

import gzip
import hashlib
import io
import json
import tarfile

__all__ = ["estargz", "toc_of"]

_MODTIME = "2022-03-28T19:26:00Z"


def _digest(data):
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class _Writer:
    """Writes members; what is put since the last `cut` becomes one."""

    def __init__(self):
        self.stored = bytearray()
        self._open = bytearray()

    def put(self, data):
        self._open += data

    def cut(self):
        """End the member, and return where the next one begins."""
        if self._open:
            self.stored += gzip.compress(bytes(self._open), 6, mtime=0)
            self._open.clear()
        return len(self.stored)


def _header(name, kind, size=0, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    info.mode = 0o755 if kind == tarfile.DIRTYPE else 0o644
    info.mtime = 1648495560
    return info.tobuf(tarfile.PAX_FORMAT)


def _add_file(writer, entries, name, data, chunk_size):
    writer.put(_header(name, tarfile.REGTYPE, len(data)))
    entry = {"name": name, "type": "reg", "size": len(data), "modtime": _MODTIME, "mode": 0o100644}
    entries.append(entry)
    entry["digest"] = _digest(data)
    for start in range(0, len(data), chunk_size):
        piece = data[start : start + chunk_size]
        if start:
            entry = {"name": name, "type": "chunk", "chunkOffset": start}
            entries.append(entry)
        entry["offset"] = writer.cut()
        entry["chunkDigest"] = _digest(piece)
        if start + chunk_size < len(data):
            entry["chunkSize"] = chunk_size
        writer.put(piece)
    writer.put(bytes(-len(data) % 512))


def estargz(files, *, chunk_size=4 << 20, links=()):
    """Return a layer and its table of contents (text).

    Args:
        files: dictionary of names and contents; None is a directory.
        chunk_size: into which files are cut.
        links: (name, target) of symlinks, with `=` in front of the target of hard links.
    """
    writer, entries = _Writer(), []
    for name, data in files.items():
        if data is None:
            writer.put(_header(name, tarfile.DIRTYPE))
            entries.append(
                {"name": name + "/", "type": "dir", "modtime": _MODTIME, "mode": 0o40755}
            )
        else:
            _add_file(writer, entries, name, data, chunk_size)
    for name, target in links:
        hard = target.startswith("=")
        kind = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
        writer.put(_header(name, kind, link=target.removeprefix("=")))
        entries.append(
            {"name": name, "type": "hardlink" if hard else "symlink", "modtime": _MODTIME,
             "mode": 0o644, "linkName": target.removeprefix("=")}
        )  # fmt: skip
    toc = json.dumps({"version": 1, "entries": entries}, indent=1)
    writer.cut()
    writer.put(_header("stargz.index.json", tarfile.REGTYPE, len(toc)))
    writer.put(toc.encode() + bytes(-len(toc) % 512) + bytes(1024))
    writer.cut()
    return bytes(writer.stored), toc


def toc_of(layer):
    """Return the table of contents of a layer."""
    with tarfile.open(fileobj=io.BytesIO(layer)) as archive:
        return archive.extractfile("stargz.index.json").read().decode()
