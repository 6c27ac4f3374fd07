"""Images of the real nydus-image for tests that serve them, and what is in them.

The judges are GNU tar and the kernel's overlayfs (`judges`).
"""

import gzip
import hashlib
import re

from fixtures_path import FIXTURES
from judges import expected_layers, expected_tar
from serving import Built
from treecompare import differences

from erofs import open_bootstrap

MADE = FIXTURES / "made-by-nydus-image"
CASES = MADE / "cases"
# The builder leaves these out when they are at the top (spec 3.8).
_SKIPPED = {b"/.prefetch.landmark", b"/.no.prefetch.landmark", b"/stargz.index.json"}
# Of several headers of one inode either may win; times are the builder's business.
_NOT_COMPARED = frozenset({"mtime_ns"})
# The judges write ACLs anew, and keep overlayfs' own attributes to themselves.
_HIDDEN = ("system.posix_acl", "trusted.overlay.")


def load(path):
    """Return the bytes of a fixture, which may be packed or lie in another case."""
    if path.exists():
        return path.read_bytes()
    packed = path.with_name(path.name + ".gz")
    if packed.exists():
        return gzip.decompress(packed.read_bytes())
    same = dict(line.split() for line in (path.parent / "same-as.txt").read_text().splitlines())
    other = path.parent / same[path.name]
    return load(other.parent / other.name.removesuffix(".gz"))


def make_store(top):
    """Put all stored blobs of the cases into a directory, by id, and layers that some refer to."""
    for path in CASES.rglob("*"):
        name = path.name.removesuffix(".gz")
        if path.is_file() and re.fullmatch("[0-9a-f]{64}", name) and path.stat().st_size:
            (top / name).write_bytes(load(path.parent / name))
    layers = [path.read_bytes() for path in (MADE / "inputs").glob("*.tar.gz")]
    layers += [gzip.decompress(layer) for layer in layers]
    layers.append((FIXTURES / "nydus/stargz/alpine-stargz.tar.gz").read_bytes())
    for layer in layers:
        (top / hashlib.sha256(layer).hexdigest()).write_bytes(layer)
    return top


def _load_input(name):
    if name == "alpine-stargz":
        return load(FIXTURES / "nydus/stargz" / f"{name}.tar")
    return load(MADE / "inputs" / f"{name}.tar")


class Truth:
    """Trees of inputs, as others make them: `truth("l1")`, or layers `truth("l1", "l2")`."""

    def __init__(self, top):
        self._top = top
        self._known = {}

    def __call__(self, *names):
        if names not in self._known:
            found = self._make(names)
            self._known[names] = {p: entry for p, entry in found.items() if p not in _SKIPPED}
        return self._known[names]

    def _make(self, names):
        tars = [self._top / f"{name}.tar" for name in names]
        for name, tar in zip(names, tars, strict=True):
            tar.write_bytes(_load_input(name))
        where = self._top / "-".join(names)
        if len(tars) == 1:
            return expected_tar(tars[0], where)
        where.mkdir()
        return expected_layers(tars, where)


def place(tmp_path, store, boot, *, named=(), name="image.boot"):
    """Return an image: its bootstrap (or blob), and the blobs it needs under their ids."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    (tmp_path / name).write_bytes(load(CASES / boot))
    for path in store.iterdir():
        (blobs / path.name).hardlink_to(path)
    for blob_id, source in named:
        (blobs / blob_id).write_bytes(load(CASES / source))
    return Built(tmp_path / name, blobs)


def named_blob(tmp_path, store, source, name="theblob"):
    """Return an image that is a blob with its bootstrap inside; the file's name is its id."""
    return place(tmp_path, store, source, named=[(name, source)], name=f"{name}.nydus")


def wrong(expected, got):
    """Return what is other than the judge has it."""
    trees = [
        {
            path: entry._replace(
                xattrs=tuple(x for x in entry.xattrs if not x[0].startswith(_HIDDEN))
            )
            for path, entry in tree.items()
        }
        for tree in (expected, got)
    ]
    return differences(*trees, ignore=_NOT_COMPARED)


def check(serving, image, expected):
    """Serve an image and compare its whole tree; return the daemon."""
    daemon = serving.start(image)
    got = serving.snapshot(daemon.mountpoint)
    assert wrong(expected, got) == []
    return daemon


def file_in_batch(image):
    """Return the blob's entry, and the path of a file that is in its first batch."""
    with open_bootstrap(image.bootstrap) as bootstrap:
        (entry,) = bootstrap.blobs
        for path, inode in bootstrap.walk():
            if inode.is_regular and inode.size:
                (chunk, *_) = bootstrap.file_chunks(inode)
                if chunk.chunk_index == 0:
                    return entry, path.decode()
    raise AssertionError("no file in the first batch")
