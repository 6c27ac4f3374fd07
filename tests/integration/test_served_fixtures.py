"""Images of the real nydus-image, mounted lazily by our daemon: every file is what it was.

Batches, chunk dictionaries, merged layers, ToCs, and bootstraps inside of their blobs.
"""

import hashlib
import json
import os
import shutil
import signal
import stat

import pytest
from capabilities import requires
from fixtures_path import FIXTURES, needs_fixtures
from made_images import (
    MADE,
    Truth,
    check,
    file_in_batch,
    load,
    make_store,
    named_blob,
    place,
    wrong,
)
from serving import TIMEOUT, Built, wait_until, write_config

from erofs import IntegrityError, open_bootstrap
from fscache.api.routes import Request, answer
from fscache.backend import LocalFsConfig
from fscache.cache.tablefile import META_SUFFIX
from fscache.config import DaemonConfig
from fscache.daemon import Daemon, Transport
from fscache.mounts.mount import mount_erofs
from fscache.node import NodeDaemon, NodeOptions

pytestmark = [
    needs_fixtures,
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

_RELEASE_CANDIDATE = "2fa78cad554b75ac91a4a125ed148d0ddeb25efa4aaa8bd80e5dc292690a4dca"
_OLD_ID = "d788a0eac4ff9779bc2eae3842117a918d847d90fddbea1503f7c5296a4a7de3"
_MARCH_2023 = "be7d77eeb719f70884758d1aa800ed0fb09d701aaec469964e9d54325f0d5fef"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    return Truth(tmp_path_factory.mktemp("truth"))


SEPARATE = [
    ("batch-64k-zstd/boot", ["batch"]),
    ("batch-64k-none/boot", ["batch"]),
    ("batch-4k-zstd/boot", ["batch"]),
    ("batch-l1-toc/boot", ["l1"]),
    ("tar-toc/boot", ["l2"]),
    ("tar-big-64k-lz4/boot", ["big"]),
    ("chunkdict/l2.boot", ["l2"]),
    ("chunkdict-all-hit/same.boot", ["l3"]),
    ("chunkdict-generate-versions/use.boot", ["l3"]),
    ("encrypt-zstd/boot", ["l3"]),
    ("encrypt-batch/boot", ["l3"]),
    ("zran/boot", ["l1"]),
    ("zran-big/boot", ["big"]),
    ("zran-big-64k/boot", ["big"]),
    ("zran-multi-member/boot", ["l2"]),
    ("zran-plain-tar/boot", ["l3"]),
    ("estargz-ref/boot", ["alpine-stargz"]),
    ("tarfs-big/boot", ["big"]),
]


@pytest.mark.parametrize(("boot", "layers"), SEPARATE, ids=[boot for boot, _ in SEPARATE])
def test_separate_bootstraps(serving, store, truth, tmp_path, boot, layers):
    image = place(tmp_path, store, boot)
    daemon = check(serving, image, truth(*layers))
    metas = {path.name for path in (tmp_path / "cache").glob(f"*{META_SUFFIX}")}
    with open_bootstrap(image.bootstrap) as bootstrap:
        # Batches, gzip data and generated dictionaries; nobody needs the tables of others.
        needed = {e.id + META_SUFFIX for e in bootstrap.blobs if e.features & 0x288}
    assert metas == needed
    daemon.stop()
    # Again with what is in the cache, and no backend.
    shutil.rmtree(image.blob_dir)
    image.blob_dir.mkdir()
    check(serving, image, truth(*layers))


def test_tar_under_a_name_that_is_not_its_digest(serving, store, tmp_path, caplog):
    """Nobody could tell a damaged one: parts are given, until the whole is known to be another."""
    name = "2" * 64
    image = place(tmp_path, store, "tarfs-l2/boot")
    (image.blob_dir / name).write_bytes(load(MADE / "inputs/l2.tar"))
    daemon = serving.start(image, transport=Transport.FANOTIFY)
    # That is all of it: the tar is a small one.
    assert serving.read(daemon.mountpoint / "wh/added")
    wait_until(lambda: "digest that it is named by" in caplog.text)
    serving.read_fails(daemon.mountpoint / "own2")
    with pytest.raises(IntegrityError, match="digest that it is named by"):
        serving.start(image, work_dir=tmp_path / "other", transport=Transport.EAGER)


INLINED = [
    ("batch-1m-lz4-toc/blob.nydus", ["batch"]),
    ("tar-inline/blob.nydus", ["l2"]),
    ("tar-inline-toc/blob.nydus", ["l1"]),
    ("tar-inline-toc-lz4/blob.nydus", ["l2"]),
    ("chunkdict/l3.nydus", ["l3"]),
    ("encrypt-none-inline-toc/blob.nydus", ["l3"]),
    ("merge-zran/l2.zran", ["l2"]),
    ("merge-zran/l3.zran", ["l3"]),
    ("tar-nodata-inline/blob.nydus", ["nodata"]),
    ("tar-nodata-inline-notoc/blob.nydus", ["nodata"]),
]


@pytest.mark.parametrize(("blob", "layers"), INLINED, ids=[blob for blob, _ in INLINED])
def test_bootstraps_inside_of_their_blobs(serving, store, truth, tmp_path, blob, layers):
    """The blob's id is the name of the file, up to the first dot."""
    image = place(tmp_path, store, blob, named=[("theblob", blob)], name="theblob.nydus")
    daemon = check(serving, image, truth(*layers))
    (extracted,) = (tmp_path / "cache").glob("*.image.boot")
    data = extracted.read_bytes()
    assert extracted.name == f"{hashlib.sha256(data).hexdigest()}.image.boot"
    before = extracted.stat()
    daemon.stop()
    check(serving, image, truth(*layers)).stop()
    assert extracted.stat().st_ino == before.st_ino
    extracted.write_bytes(data[:-1] + b"x")
    check(serving, image, truth(*layers))
    assert extracted.read_bytes() == data
    assert len(list((tmp_path / "cache").glob("*.image.boot"))) == 1


MERGED = [
    (
        "merge-inline/merged.boot",
        ["l1", "l2", "l3"],
        [
            ("l1", "tar-inline-toc/blob.nydus"),
            ("l2", "merge-inline/l2"),
            ("l3", "merge-inline/l3"),
        ],
    ),
    (
        "merge-inline/merged-prefetch.boot",
        ["l1", "l2", "l3"],
        [
            ("l1", "tar-inline-toc/blob.nydus"),
            ("l2", "merge-inline/l2"),
            ("l3", "merge-inline/l3"),
        ],
    ),
    (
        "merge-mixed-compressor/merged.boot",
        ["l2", "l3"],
        [("l2", "merge-mixed-compressor/l2"), ("l3", "merge-mixed-compressor/l3")],
    ),
    (
        "merge-encrypted/merged.boot",
        ["l2", "l3"],
        [("l2", "merge-encrypted/l2"), ("l3", "merge-encrypted/l3")],
    ),
    ("tarfs-merge-23/merged.boot", ["l2", "l3"], []),
    (
        "chunkdict/merged.boot",
        ["l2", "l3"],
        [
            ("l2", "chunkdict/a5fa57d7248e3648de984495a4aa91a31de6d4651f7fa23d94c2ea025a2ec4ee"),
            ("l3", "chunkdict/l3.nydus"),
        ],
    ),
]


@pytest.mark.parametrize(("boot", "layers", "named"), MERGED, ids=[boot for boot, *_ in MERGED])
def test_merged_layers(serving, store, truth, tmp_path, boot, layers, named):
    check(serving, place(tmp_path, store, boot, named=named), truth(*layers))


@pytest.mark.parametrize("transport", [Transport.FANOTIFY, Transport.FUSE, Transport.EAGER])
@pytest.mark.parametrize(
    ("boot", "layers"),
    [
        ("batch-4k-zstd/boot", ["batch"]),
        ("chunkdict-generate-versions/use.boot", ["l3"]),
        ("zran-big-64k/boot", ["big"]),
        ("tarfs-big/boot", ["big"]),
        ("encrypt-batch/boot", ["l3"]),
    ],
)
def test_in_every_way(serving, store, truth, tmp_path, boot, layers, transport):
    image = place(tmp_path, store, boot)
    daemon = serving.start(image, transport=transport)
    assert wrong(truth(*layers), serving.snapshot(daemon.mountpoint)) == []


@pytest.mark.parametrize("inlined", [False, True])
def test_published_images(serving, tmp_path, inlined):
    """Files of the project itself, of two older versions; verified chunk by chunk, so readable."""
    published = FIXTURES / "nydus" / "v6"
    blob_id = _RELEASE_CANDIDATE if inlined else _MARCH_2023
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    # The bootstrap inside names its blob by another digest; so did that version.
    stored = _OLD_ID if inlined else blob_id
    (blobs / stored).write_bytes((published / blob_id).read_bytes())
    boot = tmp_path / (f"{blob_id}.blob" if inlined else "boot")
    boot.write_bytes((published / (blob_id if inlined else "rafs-v6-2.2.boot")).read_bytes())
    daemon = serving.start(Built(boot, blobs))
    tree = serving.snapshot(daemon.mountpoint)
    found = {path.decode(): entry for path, entry in tree.items() if stat.S_ISREG(entry.mode)}
    with open_bootstrap(daemon.served.bootstrap_file) as image:
        assert {path: entry.size for path, entry in found.items()} == {
            path.decode(): inode.size for path, inode in image.walk() if inode.is_regular
        }
    expected = json.loads((FIXTURES / "nydus" / "expected" / "v6-blobs.json").read_text())
    for chunk in expected[blob_id].get("uncompressed_chunks", ()):
        assert found[chunk["file"]].content == chunk["sha256"]


def test_mounted_over_the_api(serving, store, truth, tmp_path):
    image = named_blob(tmp_path, store, "batch-1m-lz4-toc/blob.nydus")
    daemon = NodeDaemon(NodeOptions(serving.mountpoint()))
    serving.stack.callback(daemon.stop)
    daemon.start()
    config = {
        "device": {
            "backend": {"type": "localfs", "config": {"dir": str(image.blob_dir)}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}},
        },
        "mode": "direct",
    }
    body = {"source": str(image.bootstrap), "fs_type": "rafs", "config": json.dumps(config)}

    def ask(method, path="/api/v1/mount", mountpoint="/a/b", body=body):
        data = json.dumps(body).encode() if body else b""
        return answer(daemon, Request(method, path, {"mountpoint": mountpoint}, data))

    assert ask("POST").status == 204, ask("POST").body
    top = daemon.options.mountpoint / "a/b"
    assert wrong(truth("batch"), serving.snapshot(top)) == []
    superblock = ask("GET", "/api/v1/daemon/backend", body=None)
    assert superblock.body["chunk_size"] == 1 << 20
    # The same blobs below a second place: nothing is fetched again, so none has to be there.
    shutil.rmtree(image.blob_dir)
    assert ask("POST", mountpoint="/c").status == 204
    assert wrong(truth("batch"), serving.snapshot(daemon.options.mountpoint / "c")) == []
    assert ask("PUT").status == 204
    assert wrong(truth("batch"), serving.snapshot(top)) == []
    assert ask("DELETE", body=None).status == 204


def test_a_successor_goes_on(serving, store, truth, tmp_path, monkeypatch):
    monkeypatch.setenv("NYDUSD_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("NYDUSD_HOLDER_SECONDS", "60")
    image = named_blob(tmp_path, store, "batch-1m-lz4-toc/blob.nydus")
    config = write_config(tmp_path / "config.json", image)
    top = serving.mountpoint()
    words = ["fuse", "-M", top, "-B", image.bootstrap, "-C", config]
    first = serving.nydusd(*words)
    wait_until(lambda: os.path.ismount(top))
    _, name = _first_file(tmp_path)
    serving.read(f"{top}{name}")
    first.send(signal.SIGKILL)
    first.process.wait(TIMEOUT)
    # What the kernel mounts and what the table says is in the cache; both can be had again.
    for path in (tmp_path / "cache").glob("*.image.boot"):
        path.unlink()
    second = serving.nydusd(*words)
    second.wait_for("took over")
    assert wrong(truth("batch"), serving.snapshot(top)) == []
    second.send(signal.SIGTERM)
    assert second.end() == 0
    assert not os.path.ismount(top)


def _first_file(tmp_path):
    (boot,) = (tmp_path / "cache").glob("*.image.boot")
    return file_in_batch(Built(boot, tmp_path))


def test_what_a_dead_daemon_left_is_taken_away(serving, store, truth, tmp_path, caplog):
    image = named_blob(tmp_path, store, "tar-inline/blob.nydus")
    daemon = serving.start(image)
    mounted = daemon.served.bootstrap_file.resolve()
    daemon.stop()
    data = tmp_path / "data"
    data.write_bytes(bytes(1 << 20))
    mount_erofs(mounted, [data], daemon.options.mountpoint)
    config = DaemonConfig(LocalFsConfig(dir=image.blob_dir), tmp_path / "cache")
    with Daemon(config, image.bootstrap, daemon.options.mountpoint):
        assert "daemon that is gone" in caplog.text
        assert wrong(truth("l2"), serving.snapshot(daemon.options.mountpoint)) == []
    assert not os.path.ismount(daemon.options.mountpoint)
