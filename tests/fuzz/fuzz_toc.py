"""Reading any bytes as the table of contents of a blob, or of an eStargz layer, succeeds or raises
NydusError; of the first, sections that are found lie within the blob."""

import contextlib
import io
import json

from harness import GOLDEN, instrument, run

with instrument():
    from builder.errors import BuildError
    from builder.source.options import SourceOptions
    from builder.stargz import read_toc as read_stargz_toc
    from erofs.errors import FormatError, NydusError
    from erofs.framing import SECTION_BOOTSTRAP, read_sections, read_toc, read_toc_section
    from erofs.view import View


def _blob(data):
    blob = View(data)
    with contextlib.suppress(FormatError):
        for section in read_sections(blob):
            assert 0 <= section.offset <= section.header_offset <= len(data)
    try:
        toc = read_toc(blob)
    except FormatError:
        return
    for entry in toc.entries:
        assert isinstance(entry.text, str)
    bootstrap = toc.find(SECTION_BOOTSTRAP)
    if bootstrap is not None and bootstrap.uncompressed_size < 1 << 20:
        with contextlib.suppress(NydusError):
            read_toc_section(blob, bootstrap)


def _stargz(data):
    try:
        toc = read_stargz_toc(io.BytesIO(data), 0x1000, None, SourceOptions())
    except (BuildError, FormatError):
        return
    for file in toc.files:
        assert sum(chunk.size for chunk in file.chunks) == file.node.size


def target(data):
    _blob(data)
    _stargz(data)


def seeds():
    yield (GOLDEN / "toc.blob").read_bytes()
    yield (GOLDEN / "toc.blob").read_bytes()[-1536:]
    digest = "sha256:" + "0" * 64
    entries = [
        {"name": "dir/", "type": "dir", "modtime": "2022-03-28T19:26:00Z", "mode": 0o40755},
        {"name": "dir/a", "type": "reg", "size": 5000, "offset": 100, "chunkSize": 0x1000,
         "chunkDigest": digest, "xattrs": {"user.a": "AAAA"}},
        {"name": "dir/a", "type": "chunk", "chunkOffset": 0x1000, "offset": 900,
         "chunkDigest": digest},
        {"name": "l", "type": "hardlink", "linkName": "dir/a"},
        {"name": "s", "type": "symlink", "linkName": "x", "uid": 7},
        {"name": "c", "type": "char", "devMajor": 1, "devMinor": 3},
    ]  # fmt: skip
    yield json.dumps({"version": 1, "entries": entries}).encode()


if __name__ == "__main__":
    run(target, seeds())
