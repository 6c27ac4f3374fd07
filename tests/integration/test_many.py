"""Row 19 of spec ondemand 7.3: hundreds of mounts and thousands of blobs in one daemon."""

import hashlib
import itertools
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fakes.blob_image import CHUNK_SIZE
from fakes.blob_server import BlobServer
from serving import build_image, http, wait_until

from builder.bootstrap import inlined_bootstrap
from builder.build import BuildOptions, SourceType, build
from builder.merge import MergeOptions, merge
from fscache.backend import LocalFsConfig
from fscache.config import DaemonConfig
from fscache.node import NodeDaemon, NodeOptions
from tests.capabilities import requires

pytestmark = requires("root", "erofs_mount", "fanotify")

_READ_ALL = """
import os, sys
for top in sorted(os.listdir(sys.argv[1]), key=int):
    for name in sorted(os.listdir(os.path.join(sys.argv[1], top)), key=int):
        with open(os.path.join(sys.argv[1], top, name), "rb") as file:
            data = file.read()
        if data != name.encode() * (len(data) // len(name)) or not data:
            sys.exit(f"{top}/{name}: {data[:20]}")
print("right")
"""


def make_layers(directory, count):
    """Build layers of one file each; return their bootstraps."""
    blob_dir, source = directory / "blobs", directory / "source"
    blob_dir.mkdir()
    bootstraps = []
    for number in range(count):
        source.mkdir()
        text = str(number).encode()
        (source / str(number)).write_bytes(text * (CHUNK_SIZE // len(text)))
        result = build(
            source,
            BuildOptions(
                source_type=SourceType.DIRECTORY,
                blob_dir=blob_dir,
                inline_bootstrap=True,
                toc=True,
                chunk_size=CHUNK_SIZE,
            ),
        )
        (source / str(number)).unlink()
        source.rmdir()
        bootstraps.append(directory / result.blobs[0])
        bootstraps[-1].write_bytes(inlined_bootstrap(result.blob_path))
    return blob_dir, bootstraps


def resident():
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    ("mounts", "blobs"),
    [
        (12, 80),
        pytest.param(300, 2000, marks=[pytest.mark.long, pytest.mark.timeout(900)]),
    ],
)
def test_row_19_many_mounts_and_blobs(serving, tmp_path, mounts, blobs, record_property):
    each = -(-blobs // mounts)
    blob_dir, bootstraps = make_layers(tmp_path, blobs)
    images = []
    for number in range(mounts):
        images.append(tmp_path / f"image{number}")
        layers = [bootstraps[(number * each + at) % blobs] for at in range(each)]
        merge(layers, MergeOptions(bootstrap=images[-1]))
    top = serving.mountpoint()
    daemon = NodeDaemon(NodeOptions(top))
    serving.stack.callback(daemon.stop)
    daemon.start()
    config = DaemonConfig(LocalFsConfig(dir=blob_dir), tmp_path / "cache")
    before, begin = resident(), time.monotonic()
    for number, image in enumerate(images):
        daemon.mount_image(f"/{number}", image, config)
    record_property("seconds a mount", (time.monotonic() - begin) / mounts)
    descriptors = len(os.listdir("/proc/self/fd"))
    assert serving.child(_READ_ALL, top).finish() == b"right\n"
    used = resident() - before
    record_property("bytes a blob", used / blobs)
    assert used < (64 << 20) + blobs * (100 << 10)
    # A data file and a lock or two for each blob, a bootstrap for each mount.
    assert descriptors < 100 + 4 * blobs + 4 * mounts
    for number in range(mounts):
        daemon.unmount(f"/{number}")
    assert os.listdir(top) == []
    wait_until(lambda: len(os.listdir("/proc/self/fd")) < descriptors - blobs)


_READ_AT_ONCE = """
import hashlib, os, sys, threading
paths = [os.path.join(sys.argv[1], name, "file") for name in os.listdir(sys.argv[1])]
ready = threading.Barrier(len(paths))
found = []
def read(path):
    ready.wait()
    with open(path, "rb") as file:
        found.append(hashlib.file_digest(file, "sha256").hexdigest())
threads = [threading.Thread(target=read, args=(path,)) for path in paths]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(found), *set(found))
"""


def test_a_storm_of_mounts_fetches_each_chunk_once(serving, tmp_path):
    """50 mounts of one image at once, and 50 readers of the same file."""
    count, content = 50, random.Random(19).randbytes(64 * CHUNK_SIZE)
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(content)
    image = build_image(source, tmp_path / "image", chunk_size=CHUNK_SIZE)
    server = BlobServer(image.blobs())
    serving.stack.callback(server.stop)
    top = serving.mountpoint()
    daemon = NodeDaemon(NodeOptions(top))
    serving.stack.callback(daemon.stop)
    daemon.start()
    config = DaemonConfig(http(server), tmp_path / "cache")
    with ThreadPoolExecutor(count) as pool:
        mounts = [
            pool.submit(daemon.mount_image, f"/{number}", image.bootstrap, config)
            for number in range(count)
        ]
        for mount in mounts:
            mount.result()
    digest = hashlib.sha256(content).hexdigest()
    assert serving.child(_READ_AT_ONCE, top).finish().decode().split() == [str(count), digest]
    asked = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for _, text in server.ranges]
    ends = sorted(asked)
    assert all(last < following for (_, last), (following, _) in itertools.pairwise(ends))
