"""Traces of real reads, lists made of them, and what the lists are good for."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from capabilities import requires
from fakes.blob_server import BlobServer
from serving import TIMEOUT, build_image, http, wait_until, write_config

from fscache.api.server import ApiServer
from fscache.config import DaemonConfig
from fscache.ctl import command as ctl
from fscache.ctl.client import ApiClient, CtlError
from fscache.image import ImageOptions
from fscache.node import NodeDaemon, NodeOptions
from fscache.settings import PrefetchConfig, RafsConfig

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

CHUNK = 0x10000
NAMES = [f"f{number}" for number in range(20)]
RECORD = RafsConfig(iostats_files=True, access_pattern=True, latest_read_files=True)
# Reads whole files, one after the other, and tells their inode numbers.
_READ_FILES = """
import os, sys
for name in sys.argv[1:]:
    with open(name, "rb", buffering=0) as file:
        while file.read(1 << 16):
            pass
        print(os.fstat(file.fileno()).st_ino)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    top = tmp_path_factory.mktemp("prefetch") / "source"
    (top / "d").mkdir(parents=True)
    rng = random.Random(11)
    for name in NAMES:
        (top / name).write_bytes(rng.randbytes(2 * CHUNK + 100))
    (top / "d/x").write_bytes(rng.randbytes(CHUNK))
    (top / "d" / os.fsdecode(b"name\xff")).write_bytes(rng.randbytes(10))
    return top


@pytest.fixture(scope="module")
def image(source, tmp_path_factory):
    return build_image(source, tmp_path_factory.mktemp("prefetch") / "image", chunk_size=CHUNK)


class Served:
    """A node daemon with its API in this process, and an HTTP server for the blobs."""

    def __init__(self, serving, image, *, mounted=True, **settings):
        self.serving = serving
        self.server = BlobServer(image.blobs())
        serving.stack.callback(self.server.stop)
        self.top = serving.mountpoint()
        self.config = DaemonConfig(
            http(self.server),
            serving.directory / f"cache-{self.top.name}",
            **settings,
        )
        self.sock = serving.directory / f"api-{self.top.name}"
        self.image = image
        options = NodeOptions(self.top)
        if mounted:
            options = options._replace(bootstrap=image.bootstrap, config=self.config)
        self.start(options)

    def start(self, options):
        self.daemon = NodeDaemon(options)
        self.serving.stack.callback(self.daemon.stop)
        self.daemon.start()
        api = ApiServer(self.sock)
        api.serve(self.daemon)
        self.serving.stack.callback(api.close)

    def ask(self, path, **query):
        return ApiClient(str(self.sock)).request("GET", path, query)

    def read(self, *names):
        """Read files in a process of its own; return their inode numbers."""
        paths = [self.top / name for name in names]
        return list(map(int, self.serving.child(_READ_FILES, *paths).finish().split()))

    def content(self, name):
        return self.serving.read(self.top / name)

    def prefetched(self, count, path="/"):
        """Wait until a number of chunks is there."""
        metrics = self.daemon.image(path).cache_metrics
        wait_until(lambda: metrics.as_dict()["entries_count"] >= count)

    def prefetch_list(self, *options):
        path = self.serving.directory / "list"
        command = ["-S", str(self.sock), "prefetch-list", "-o", str(path), *options]
        assert ctl.main(command) == 0
        return path


def test_the_whole_circle(serving, image, source, tmp_path):
    """Record a run, make the list, build with it, and find the data there."""
    first = Served(serving, image, rafs=RECORD)
    used = ["f13", "f2", "f7", "d/" + os.fsdecode(b"name\xff"), "f0"]
    nids = first.read(*used)
    assert [item["ino"] for item in first.ask("/api/v1/metrics/pattern")] == nids
    listed = first.prefetch_list()
    assert listed.read_bytes() == b"".join(b"/" + os.fsencode(name) + b"\n" for name in used)

    (tmp_path / "blobs").mkdir()
    command = [
        Path(sys.executable).with_name("nydus-image"), "create", "-t", "directory",
        "-B", tmp_path / "boot", "-D", tmp_path / "blobs", "--chunk-size", hex(CHUNK),
        "--prefetch-policy", "fs", source,
    ]  # fmt: skip
    subprocess.run(command, input=listed.read_bytes(), check=True, capture_output=True)
    rebuilt = type(image)(tmp_path / "boot", tmp_path / "blobs")
    config = RafsConfig(prefetch=PrefetchConfig(enable=True, threads=2))
    second = Served(serving, rebuilt, rafs=config)
    second.prefetched(3 * 4 + 1)
    asked = len(second.server.ranges)
    # Not as they lie in the blob: who reads on there is followed beyond them.
    for name in reversed(used):
        assert second.content(name) == (source / name).read_bytes()
    assert len(second.server.ranges) == asked
    # The counterpart: a file that was not in the list.
    assert second.content("f5") == (source / "f5").read_bytes()
    assert len(second.server.ranges) > asked


def test_a_list_in_place_of_the_table(serving, image, source):
    """`--prefetch-files` of the command line; what is not there is warned about."""
    listed = serving.directory / "list"
    listed.write_text("/d\n\n  /f3\n/nowhere\n")
    server = BlobServer(image.blobs())
    serving.stack.callback(server.stop)
    backend = {"type": "http-proxy", "config": {"addr": server.address, "timeout": TIMEOUT}}
    config = write_config(serving.directory / "config.json", image, backend)
    values = json.loads(config.read_text())
    values["fs_prefetch"] = {"enable": True, "prefetch_all": False}
    config.write_text(json.dumps(values))
    top = serving.mountpoint()
    words = ["-B", image.bootstrap, "-C", config, "-M", top, "--prefetch-files", listed]
    daemon = serving.nydusd("fuse", *words, "-l", "info")
    daemon.wait_for("prefetch is through")
    assert "WARN file to prefetch is not in the image: b'/nowhere'" in daemon.stderr
    # d/x, d/name?, and the three chunks of f3.
    wait_until(lambda: sum(server.bytes_sent.values()) > 3 * CHUNK)
    asked = len(server.ranges)
    for name in ("d/x", "f3"):
        assert serving.read(top / name) == (source / name).read_bytes()
    assert len(server.ranges) == asked
    serving.read(top / "f4")
    assert len(server.ranges) > asked


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--prefetch-files", "x"], 2, "--bootstrap <bootstrap>"),
        (["-B", "boot", "-D", ".", "--prefetch-files", "absent"], 1, "cannot be read"),
        (["-B", "boot", "-D", ".", "--prefetch-files", "bad"], 1, "is not absolute"),
    ],
)
def test_lists_that_cannot_be(serving, image, words, status, text):
    (serving.directory / "boot").write_bytes(image.bootstrap.read_bytes())
    (serving.directory / "bad").write_text("relative\n")
    top = serving.mountpoint()
    daemon = serving.nydusd("fuse", "-M", top, *words, cwd=serving.directory)
    assert daemon.end() == status
    assert text in daemon.stderr
    assert not os.path.ismount(top)


def test_prefetch_files_of_a_mount_by_the_api(serving, image, source):
    served = Served(serving, image, mounted=False)
    config = {
        "device": {
            "backend": {
                "type": "http-proxy",
                "config": {"addr": served.server.address, "timeout": TIMEOUT},
            },
            "cache": {"type": "blobcache", "config": {"work_dir": str(served.config.work_dir)}},
        },
        "mode": "direct",
        "fs_prefetch": {"enable": True, "prefetch_all": False},
    }

    def mount(path, *files):
        body = {
            "source": str(image.bootstrap),
            "fs_type": "rafs",
            "config": json.dumps(config),
            "prefetch_files": list(files),
        }
        ApiClient(str(served.sock)).request("POST", "/api/v1/mount", {"mountpoint": path}, body)

    with pytest.raises(CtlError, match="not absolute"):
        mount("/bad", "f1")
    mount("/a", "/f1", "/d/x")
    served.prefetched(4, "/a")
    asked = len(served.server.ranges)
    assert served.content("a/f1") == (source / "f1").read_bytes()
    assert len(served.server.ranges) == asked


def test_the_whole_blob_by_one_request(serving, image, source):
    config = RafsConfig(prefetch=PrefetchConfig(enable=True, threads=2, stream_prefetch=True))
    served = Served(serving, image, rafs=config)
    served.prefetched(3 * len(NAMES) + 2)
    assert [header for _, header in served.server.ranges] == [None]
    for name in ("f0", "f19", "d/x"):
        assert served.content(name) == (source / name).read_bytes()
    assert len(served.server.ranges) == 1


def test_metrics_of_files(serving, image, source):
    served = Served(serving, image, rafs=RECORD)
    assert served.ask("/api/v1/metrics/pattern") == []
    assert served.ask("/api/v1/metrics/files") == {}
    nids = served.read("f4", "d/x")
    flags = served.ask("/api/v1/metrics")
    for name in ("files_account", "access_pattern", "record_latest_read_files"):
        assert flags[f"{name}_enabled"] is True
    files = served.ask("/api/v1/metrics/files")
    assert files.keys() == set(map(str, nids))
    # Every page once: the kernel keeps what it has read.
    counted = files[str(nids[0])]
    assert counted["data_read"] == len((source / "f4").read_bytes())
    assert counted["total_fops"] == counted["fop_hits"][4] == sum(counted["block_count_read"]) > 0
    pattern = served.ask("/api/v1/metrics/pattern", paths="true")
    assert [item["path"] for item in pattern] == ["/f4", "/d/x"]
    latest = served.ask("/api/v1/metrics/files", latest="true")
    assert sorted(nid for item in latest for nid in range(item[0], item[-1] + 1)) == sorted(nids)
    assert served.ask("/api/v1/metrics/files", latest="true") == []


def test_without_recording_nothing_is_told(serving, image):
    served = Served(serving, image)
    served.read("f4")
    assert served.daemon.image("/").trace is None
    flags = served.ask("/api/v1/metrics")
    assert not any(value for name, value in flags.items() if name.endswith("_enabled"))
    assert served.ask("/api/v1/metrics/pattern") == []
    assert ctl.main(["-S", str(served.sock), "prefetch-list"]) == 1


def test_a_complete_cache_is_recorded_all_the_same(serving, image):
    """A blob that is complete raises no events, unless they are recorded."""
    everything = RafsConfig(prefetch=PrefetchConfig(enable=True, prefetch_all=True))
    served = Served(serving, image, rafs=everything)
    metrics = served.daemon.image("/").cache_metrics
    wait_until(lambda: metrics.as_dict()["data_all_ready"])
    (domain,) = served.daemon.runtime._domains.values()
    (shared,) = domain._shared.values()
    wait_until(lambda: shared.ignored)

    # A second image on the same cache is recorded; then nobody needs the events any more.
    other = serving.mountpoint()
    config = served.config._replace(rafs=RECORD)
    runtime = served.daemon.runtime
    recorded = runtime.mount(config, image.bootstrap, other, ImageOptions())
    assert not shared.ignored
    (nid,) = map(int, serving.child(_READ_FILES, other / "f9").finish().split())
    (item,) = recorded.trace.pattern_as_list()
    assert item["ino"] == nid
    runtime.unmount(recorded)
    wait_until(lambda: shared.ignored)
    assert shared.blob.traces == ()
