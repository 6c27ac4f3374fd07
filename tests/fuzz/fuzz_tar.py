"""Walking any bytes as a tar stream ends, and raises nothing but TarError."""

import io
import tarfile

from harness import instrument, run

with instrument():
    from builder.tarheader import TarError
    from builder.tarstream import TarStream

_LIMIT = 1 << 16


def target(data):
    stream = TarStream(io.BytesIO(data), "input")
    try:
        for _ in stream:
            while stream.read(_LIMIT):
                pass
    except TarError:
        pass


def seeds():
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        output = io.BytesIO()
        with tarfile.open(fileobj=output, mode="w", format=form) as archive:
            for name, kind in (("dir", b"5"), ("dir/file", b"0"), ("x" * 90, b"2")):
                info = tarfile.TarInfo(name)
                info.type = kind
                info.linkname = "target" * 10 if kind == b"2" else ""
                info.size = 5 if kind == b"0" else 0
                info.mtime = -1.5 if form == tarfile.PAX_FORMAT else 7
                info.pax_headers = {"SCHILY.xattr.user.a": "1"}
                archive.addfile(info, io.BytesIO(b"12345"))
        yield output.getvalue()


if __name__ == "__main__":
    run(target, seeds())
