"""What VM runtimes and the snapshotter ask of the programs (spec vm-runtimes 7.3: K3, K4, K6, K7).

K3 and K4 with `nydusd fuse`: the same API and the same two kinds of mounts as Kata's daemon has,
which is in tests/integration/test_virtiofs.py.
"""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import quote

import pytest

from kata import KataVirtualVolume, parse_verity
from kata.guest import PASSTHROUGH_MOUNTPOINT, SHARED, image_mountpoint, overlay_storage
from kata.mounts import Disk, disk_volumes
from tests.capabilities import requires
from tests.fakes.kata_runtime import CHECKOUT, SECONDS, Daemon, image_request, passthrough_request

LOG = ("--log-level", "info")
FILE = b"of the image\n" * 1000


@pytest.fixture
def image(tmp_path):
    """A bootstrap and the configuration for it, as a request."""
    source = tmp_path / "source"
    (source / "bin").mkdir(parents=True)
    (source / "file").write_bytes(FILE)
    return image_request(source, tmp_path)


@pytest.fixture
def shared(tmp_path):
    """The directory of the host that the guest sees, with one container's snapshot."""
    for name in ("fs", "work"):
        (tmp_path / "shared/c1/snapshotdir" / name).mkdir(parents=True)
    (tmp_path / "shared/c1/rootfs").mkdir()
    return passthrough_request(tmp_path / "shared")


@pytest.fixture
def daemon(tmp_path):
    """A daemon that has no mount yet."""
    top = tmp_path / "top"
    top.mkdir()
    started = Daemon(tmp_path, "fuse", "--mountpoint", top, "--writable", *LOG)
    try:
        yield started, top
    finally:
        started.end()


@pytest.mark.root
@requires("root", "erofs_mount", "fanotify")
@pytest.mark.parametrize("encode", [str, lambda path: quote(path, safe="")], ids=["go", "rs"])
def test_k3_the_requests_of_both_runtimes(daemon, image, shared, encode):
    daemon, top = daemon
    info = daemon.wait()
    assert {"package_ver", "git_commit", "build_time", "profile", "rustc"} <= set(info["version"])
    places = [(PASSTHROUGH_MOUNTPOINT, shared), (image_mountpoint("c1"), image)]
    for place, body in places:
        target = f"/api/v1/mount?mountpoint={encode(place)}"
        status, _, answer = daemon.ask("POST", target, body)
        assert (status, answer) == (204, b""), answer
    read = subprocess.run(["cat", f"{top}/rafs/c1/lowerdir/file"], capture_output=True, check=True)
    assert read.stdout == FILE
    assert (top / "containers/c1/snapshotdir/fs").is_dir()
    for place, _ in reversed(places):
        target = f"/api/v1/mount?mountpoint={encode(place)}"
        status, _, answer = daemon.ask("DELETE", target)
        assert (status, answer) == (204, b""), answer
    assert not (top / "rafs/c1/lowerdir/file").exists()


@pytest.mark.root
@requires("root", "erofs_mount", "fanotify")
def test_k3_errors_have_a_code_and_a_message(daemon, image, shared):
    daemon, _ = daemon
    daemon.wait()
    place = "/api/v1/mount?mountpoint="
    cases = [
        ("POST", f"{place}/a", {**image, "source": "/nowhere"}),
        ("POST", f"{place}/a", {**image, "config": "{"}),
        ("POST", f"{place}/a", {**image, "fs_type": "other"}),
        ("POST", f"{place}/a", {**shared, "source": "/nowhere"}),
        ("POST", "/api/v1/mount", image),
        ("DELETE", f"{place}/a", None),
    ]
    for method, target, body in cases:
        status, head, answer = daemon.ask(method, target, body)
        assert status >= 400, (method, target)
        assert b"application/json" in head
        assert {"code", "message"} <= set(json.loads(answer))
        assert all(isinstance(text, str) for text in json.loads(answer).values())


@pytest.mark.root
@requires("root", "erofs_mount", "fanotify", "overlay")
def test_k4_the_overlay_of_the_guest_without_privileges(daemon, image, shared, tmp_path):
    """A user namespace stands for the guest: what the agent does there, by hand."""
    daemon, top = daemon
    daemon.wait()
    for place, body in ((PASSTHROUGH_MOUNTPOINT, shared), (image_mountpoint("c1"), image)):
        assert daemon.ask("POST", f"/api/v1/mount?mountpoint={place}", body)[0] == 204
    storage = overlay_storage("c1")
    script = f"""
        mount -t tmpfs tmpfs /run && mkdir -p {SHARED} && mount --rbind {top} {SHARED} &&
        mount -t {storage.fstype} {storage.source} -o {",".join(storage.options)} \
            {storage.mount_point} &&
        cd {storage.mount_point} && cat file && echo new > bin/new && rm file && ls
    """
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == FILE + b"bin\n"
    upper = tmp_path / "shared/c1/snapshotdir/fs"
    assert (upper / "bin/new").read_text() == "new\n"
    assert (upper / "file").is_char_device()


def nydus_image(*words):
    """Run our builder as the snapshotter does; return its standard output."""
    command = [sys.executable, "-m", "builder.cli", *map(str, words)]
    done = subprocess.run(
        command, cwd=CHECKOUT, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def layer_tar(name, size):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.size = size
        tar.addfile(member, io.BytesIO(name.encode() * size))
    return stream.getvalue()


def create_layer(cache, snapshot, tar):
    """Make a layer from a FIFO while a copy is written to the cache (3.4, step "layer")."""
    blob = hashlib.sha256(tar).hexdigest()
    (snapshot / "image").mkdir(parents=True)
    fifo, boot = snapshot / "layer.fifo", snapshot / "image/layer.boot.tarfs.tmp"
    os.mkfifo(fifo)
    writer = subprocess.Popen(["tee", cache / blob, fifo], stdin=-1, stdout=subprocess.DEVNULL)
    words = ["create", "--type", "tar-tarfs", "--bootstrap", boot, "--blob-id", blob]
    command = [sys.executable, "-m", "builder.cli", *words, "--blob-dir", cache, fifo]
    with subprocess.Popen(list(map(str, command)), cwd=CHECKOUT, stderr=-1) as builder:
        writer.communicate(tar, timeout=SECONDS)
        assert builder.wait(SECONDS) == 0, builder.stderr.read()
    return blob, boot.rename(snapshot / "image/layer.boot")


SCANNED = re.compile(
    r'dm-verity options: --no-superblock --format=1 -s "" --hash=sha256 --data-block-size=512'
    r" --hash-block-size=4096 --data-blocks (\d+) --hash-offset (\d+) ([0-9a-f]{64})\n"
)


def export(cache, boot, disk):
    """Export with verity and return the label that the snapshotter makes of the output."""
    words = ["--localfs-dir", cache, "--bootstrap", boot, "--output", f"{disk}.tarfs.tmp"]
    output = nydus_image("export", "--block", *words, "--verity")
    found = SCANNED.match(output)
    assert found, output
    Path(f"{disk}.tarfs.tmp").rename(disk)
    return output, f"{found[1]},{found[2]},sha256:{found[3]}"


def test_k6_the_commands_of_the_tarfs_mode(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    tars = [layer_tar("lower", 5000), layer_tar("upper", 70_000)]
    layers = [
        create_layer(cache, tmp_path / f"snapshots/{number}/fs", tar)
        for number, tar in enumerate(tars, 1)
    ]
    boot = tmp_path / "snapshots/2/fs/image/image.boot"
    temporary = boot.with_name("image.boot.tarfs.tmp")
    nydus_image("merge", "--bootstrap", temporary, *(path for _, path in layers))
    temporary.rename(boot)
    # One argument with a blank, and a text that is searched for as it stands.
    listed = nydus_image("inspect", "-R blobs", boot)
    for blob, _ in layers:
        assert f'"blob_id":"{blob}"' in listed
    disks = []
    for blob, path in layers:
        disk = cache / f"{blob}.layer.disk"
        output, label = export(cache, path, disk)
        verity = parse_verity(output)
        assert verity.label() == label
        assert verity.table("/dev/x") == parse_verity(label).table("/dev/x")
        assert disk.stat().st_size > verity.hash_offset >= 512 * verity.data_blocks
        disks.insert(0, Disk(str(disk), verity))
    for volume in disk_volumes(disks, whole_image=False):
        assert KataVirtualVolume.decode(volume.encode()) == volume
    whole = cache / f"{layers[-1][0]}.image.disk"
    _, label = export(cache, boot, whole)
    (volume,) = disk_volumes([Disk(str(whole), parse_verity(label))], whole_image=True)
    volume.encode()
    # Without verity nothing may be printed.
    words = ["--localfs-dir", cache, "--bootstrap", boot, "--output", tmp_path / "plain.disk"]
    assert nydus_image("export", "--block", *words) == ""
    plain = (tmp_path / "plain.disk").read_bytes()
    assert whole.read_bytes().startswith(plain)


@pytest.mark.root
@requires("root")
def test_k7_the_requests_of_the_fscache_mode(tmp_path, image):
    """Of a process that keeps blobs; nothing is read through the kernel's cachefiles here."""
    (tmp_path / "cache").mkdir()
    daemon = Daemon(tmp_path, "singleton", *LOG)
    try:
        daemon.wait()
        name = hashlib.sha256(b"nydus-snapshot-9").hexdigest()
        entry = {
            "type": "bootstrap",
            "id": name,
            "domain_id": "d1",
            "config": {
                "id": name,
                "backend_type": "localfs",
                "backend_config": {"dir": str(tmp_path / "blobs")},
                "cache_type": "fscache",
                "cache_config": {"work_dir": str(tmp_path / "cache")},
                "prefetch_config": {"enable": True, "threads_count": 8, "merging_size": 1048576},
                "metadata_path": image["source"],
            },
        }
        status, _, body = daemon.ask("PUT", "/api/v2/blobs", entry)
        assert (status, body) == (204, b"")
        status, _, body = daemon.ask("GET", "/api/v2/blobs?domain_id=d1")
        assert status == 200
        assert name.encode() in body
        for _ in range(2):
            # The second time it is unknown, which the snapshotter knows by this phrase only.
            target = f"/api/v2/blobs?domain_id=d1&blob_id={name}"
            status, _, body = daemon.ask("DELETE", target)
            assert status == 204 or b"blob_cache: cache entry not found" in body
        # A failure of the last step is only logged.
        assert daemon.ask("DELETE", f"/api/v2/blobs?blob_id={name}")[0] in (204, 501)
    finally:
        daemon.end()
