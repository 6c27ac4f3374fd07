"""The calls of BuildKit, as they were recorded: FIFOs on both sides, four at once, then a merge."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import subprocess
import sys
import tarfile
import threading

from builder.bootstrap import inlined_bootstrap
from builder.build import BuildOptions, SourceType, build
from builder.options import PrefetchPolicy
from builder.source.options import SourceOptions, WhiteoutSpec
from erofs import check_image, open_bootstrap
from tests.fixtures_path import FIXTURES, needs_fixtures

pytestmark = needs_fixtures

RECORDED = FIXTURES / "buildkit" / "commands.txt"
INPUTS = FIXTURES / "made-by-nydus-image" / "inputs"
TIMEOUT = 100


def calls():
    """Return the words of each call, with the scratch directory's place at `{}`."""
    lines = [line for line in RECORDED.read_text().splitlines() if not line.startswith("#")]
    return [re.sub(r"<NYDUS_WORKDIR>/nydus-converter-N", "{}", line).split() for line in lines]


CALLS = calls() if RECORDED.exists() else []
LAYERS = ("l1", "l2", "l3", "nodata")


def started(words, place):
    words = [word.replace("{}", str(place)) for word in words]
    return subprocess.Popen(
        [sys.executable, "-m", "builder.cli", *words],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ended(process, stdin=""):
    out, err = process.communicate(stdin, timeout=TIMEOUT)
    assert process.returncode == 0, err
    return out


def layer(name):
    packed = INPUTS / f"{name}.tar.gz"
    if packed.exists():
        return gzip.decompress(packed.read_bytes())
    return (INPUTS / f"{name}.tar").read_bytes()


class Conversion:
    """One layer on its way through two FIFOs, whose ends are threads as in BuildKit."""

    def __init__(self, words, place, content):
        place.mkdir()
        for name in ("blob.rafs", "blob.targz"):
            os.mkfifo(place / name)
        self._process = started(words, place)
        self._blob = b""
        self._threads = [
            threading.Thread(
                target=(place / "blob.targz").write_bytes, args=[content], daemon=True
            ),
            threading.Thread(target=self._take, args=[place / "blob.rafs"], daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _take(self, fifo):
        self._blob = fifo.read_bytes()

    def finish(self):
        assert ended(self._process, "/\n") == ""
        for thread in self._threads:
            thread.join(TIMEOUT)
        return self._blob


def built_from_files(tmp_path, name):
    """Return the blob that the same options give without any FIFO."""
    source, blob = tmp_path / f"{name}.tar", tmp_path / f"{name}.blob"
    source.write_bytes(layer(name))
    options = BuildOptions(
        source_type=SourceType.TAR, blob=blob, inline_bootstrap=True, toc=True,
        source=SourceOptions(whiteout_spec=WhiteoutSpec.NONE),
        prefetch_policy=PrefetchPolicy.FS, prefetch_patterns=[b"/"],
    )  # fmt: skip
    build(source, options)
    return blob


def test_recorded_calls(tmp_path):
    help_call, *creates, merge_call = CALLS
    out = ended(started(help_call, tmp_path))
    assert all(word in out for word in ("tar-rafs", "blob-toc", "--batch-size", "--encrypt"))
    conversions = [
        Conversion(words, tmp_path / str(number), layer(name))
        for number, (words, name) in enumerate(zip(creates, LAYERS, strict=True))
    ]
    place = tmp_path / "merging"
    place.mkdir()
    sources = []
    for conversion, name in zip(conversions, LAYERS, strict=True):
        blob = conversion.finish()
        file = built_from_files(tmp_path, name)
        assert blob == file.read_bytes()
        sources.append(place / hashlib.sha256(blob).hexdigest())
        sources[-1].write_bytes(inlined_bootstrap(file))
    words = [*merge_call[: -len(LAYERS)], *map(str, sources)]
    assert ended(started(words, place), "/\n") == ""
    with open_bootstrap(place / "bootstrap") as image:
        assert list(check_image(image)) == []
        # The last layer has no data, so no blob.
        assert {blob.id for blob in image.blobs} == {path.name for path in sources[:3]}
        assert list(image.prefetch_nids) == [image.superblock.root_nid]


def test_bootstrap_that_was_pushed():
    packed = (FIXTURES / "buildkit/bootstrap-layer.tar.gz").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        data = archive.extractfile("image/image.boot").read()
    merge_call = CALLS[-1]
    ids = [word.rpartition("/")[2] for word in merge_call[-4:]]
    with open_bootstrap(data) as image:
        assert list(check_image(image)) == []
        assert {blob.id for blob in image.blobs} <= set(ids)
