"""`nydusd nbd --socket`: clients of other projects get the disk that export writes."""

import hashlib
import io
import json
import random
import signal
import subprocess

import pytest
from capabilities import need_tool
from fakes.blob_server import BlobServer
from fakes.nbd_client import NbdClient
from serving import TIMEOUT, Built, build_layers, wait_until

from builder.backends import blob_directory
from builder.build import BuildOptions, SourceType, build
from builder.export import export_block
from tests.fakes.built import built, member, tar_of

CHUNK = 64 << 10
NOISE = random.Random(11).randbytes(8 << 20)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """Two layers, the upper of which takes a file of the lower one away."""
    top = tmp_path_factory.mktemp("image")
    layers = [
        tar_of(
            member("dir", "dir"),
            member("dir/large", data=NOISE[: 5 << 20]),
            member("gone", data=NOISE[5 << 20 : 6 << 20]),
            member("sparse", data=bytes(1 << 20) + b"x"),
            *(member(f"dir/{number}", data=NOISE[number : number * 301]) for number in range(90)),
        ),
        tar_of(member(".wh.gone"), member("new", data=NOISE[6 << 20 :])),
    ]
    tars = []
    for number, tar in enumerate(layers):
        tars.append(top / f"{number}.tar")
        tars[-1].write_bytes(tar)
    return build_layers(tars, top, chunk_size=CHUNK)


@pytest.fixture(scope="module")
def disk(image, tmp_path_factory):
    path = tmp_path_factory.mktemp("disk") / "disk"
    export_block(image.bootstrap, path, blob_directory(image.blob_dir))
    return path


def run(*words):
    done = subprocess.run(
        [need_tool(words[0]), *map(str, words[1:])],
        capture_output=True,
        text=True,
        timeout=TIMEOUT * 2,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


class Served:
    """A daemon at a socket; `blobs` None takes them from their directory."""

    def __init__(self, serving, image, backend=None, amplify=1 << 20):
        self.serving = serving
        directory = serving.directory
        self.socket = directory / "nbd.sock"
        self.uri = f"nbd+unix:///?socket={self.socket}"
        cache = directory / "cache"
        cache.mkdir(exist_ok=True)
        entry = {
            "type": "bootstrap",
            "id": "image",
            "config_v2": {
                "version": 2,
                "backend": backend or {"type": "localfs", "localfs": {"dir": str(image.blob_dir)}},
                "cache": {"type": "filecache", "filecache": {"work_dir": str(cache)}},
                "rafs": {"batch_size": amplify},
                "metadata_path": str(image.bootstrap),
            },
        }
        (directory / "entry.json").write_text(json.dumps(entry))
        self.words = ["nbd", "--socket", self.socket, "-C", directory / "entry.json"]
        self.start()

    def start(self):
        self.daemon = self.serving.nydusd(*self.words)
        self.daemon.wait_for("-> RUNNING")

    def kill(self):
        self.daemon.send(signal.SIGKILL)
        self.daemon.process.wait(TIMEOUT)

    def client(self, **options):
        client = NbdClient.connect(self.socket, **options)
        self.serving.stack.callback(client.close)
        return client


@pytest.fixture
def served(serving, image):
    return Served(serving, image)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def test_qemu_copies_the_exported_disk(served, disk, tmp_path):
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", served.uri, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(disk)
    assert "identical" in run("qemu-img", "compare", "-f", "raw", "-F", "raw", served.uri, disk)
    info = json.loads(run("qemu-img", "info", "--output=json", "-f", "raw", served.uri))
    assert info["virtual-size"] == disk.stat().st_size


@pytest.mark.parametrize("words", [(), ("--connections=4", "--requests=32"), ("--synchronous",)])
def test_libnbd_copies_the_exported_disk(served, disk, tmp_path, words):
    run("nbdcopy", *words, served.uri, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(disk)


def test_libnbd_is_told_what_it_is(served, disk):
    (export,) = json.loads(run("nbdinfo", "--json", served.uri))["exports"]
    told = {
        "export-name": "",
        "export-size": disk.stat().st_size,
        "is_read_only": True,
        "can_multi_conn": True,
        "can_flush": True,
        "can_cache": True,
        "can_df": True,
        "can_trim": False,
        "can_zero": False,
    }
    assert {key: export[key] for key in told} == told
    assert export["content"].startswith("EROFS filesystem")
    (listed,) = json.loads(run("nbdinfo", "--json", "--list", served.uri))["exports"]
    assert listed["export-size"] == disk.stat().st_size


def test_qemu_reads_and_may_not_write(served, disk):
    words = ["qemu-io", "-r", "-f", "raw", "-c", "read -v 1024 16", served.uri]
    with open(disk, "rb") as file:
        file.seek(1024)
        assert f"00000400:  {file.read(4).hex(' ')}" in run(*words)
    writing = [need_tool("qemu-io"), "-f", "raw", "-c", "write 0 512", served.uri]
    done = subprocess.run(writing, capture_output=True, text=True, check=False)
    assert done.returncode
    assert "Permission denied" in done.stderr or "read-only" in done.stderr


def test_qemu_waits_for_a_successor(serving, image, disk, tmp_path):
    """The server is killed while it waits for a blob; nothing is lost."""
    server = serving.stack.enter_context(BlobServer(image.blobs()))
    host = server.address.removeprefix("http://")
    served = Served(
        serving,
        image,
        {"type": "http-proxy", "http-proxy": {"addr": f"http://{host}", "path": "/blobs"}},
    )
    server.fault = "stall"
    copy = subprocess.Popen(
        [
            need_tool("qemu-img"), "convert", "-O", "raw", "--image-opts",
            f"driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={served.socket},"
            "file.reconnect-delay=60",
            tmp_path / "copy",
        ],
        stderr=subprocess.PIPE,
    )  # fmt: skip
    serving.stack.callback(copy.kill)
    wait_until(lambda: server.requests.total() > 0)
    served.kill()
    server.fault = None
    served.start()
    _, errors = copy.communicate(timeout=TIMEOUT * 2)
    assert copy.returncode == 0, errors
    assert digest(tmp_path / "copy") == digest(disk)


def test_failures_are_errors_and_pass(serving, image, disk):
    server = serving.stack.enter_context(BlobServer(image.blobs()))
    address = {"addr": server.address, "path": "/blobs", "retry_limit": 1}
    served = Served(serving, image, {"type": "http-proxy", "http-proxy": address})
    client = served.client()
    data = disk.read_bytes()
    place = data.index(NOISE[:CHUNK])
    server.fault = 404
    with pytest.raises(OSError, match="error") as caught:
        client.read(place, 4096)
    assert caught.value.errno == 5
    assert client.read(0, 4096) == data[:4096]
    server.fault = None

    def right():
        try:
            return client.read(place, 4096) == data[place : place + 4096]
        except OSError:
            return False

    wait_until(right)
    assert "reads fail" in served.daemon.stderr


def test_only_what_is_read_is_fetched(serving, image, disk):
    server = serving.stack.enter_context(BlobServer(image.blobs()))
    address = {"addr": server.address, "path": "/blobs", "timeout": TIMEOUT}
    backend = {"type": "http-proxy", "http-proxy": address}
    served = Served(serving, image, backend, amplify=0)
    client = served.client()
    data = disk.read_bytes()
    with open(image.bootstrap, "rb") as file:
        assert client.read(0, 4096) == file.read(4096)
    assert server.requests.total() == 0
    place = data.index(NOISE[:CHUNK])
    assert client.read(place, 10) == NOISE[:10]
    assert server.requests.total() == 1
    assert sum(server.bytes_sent.values()) <= CHUNK
    served.daemon.send(signal.SIGTERM)
    assert served.daemon.end() == 0
    served.start()
    assert served.client().read(place, CHUNK) == NOISE[:CHUNK]
    assert server.requests.total() == 1


def test_the_end(served):
    client = served.client()
    assert client.read(1024, 4) == b"\xe2\xe1\xf5\xe0"
    served.daemon.send(signal.SIGTERM)
    assert served.daemon.end() == 0
    assert not served.socket.exists()
    with pytest.raises(ConnectionError):
        client.read(0, 1)


def test_sockets_that_are_there(served, serving):
    second = serving.nydusd(*served.words)
    assert second.end() == 1
    assert "another process serves this socket" in second.stderr
    assert served.client().size
    served.kill()
    assert served.socket.exists()
    served.start()
    assert served.client().size


def test_other_ways_to_name_an_image(serving, image, disk):
    """A bootstrap with the directory of the blobs, as the original has it; and its API."""
    sock = serving.directory / "sock"
    daemon = serving.nydusd(
        "nbd", "--socket", sock, "-B", image.bootstrap, "-D", image.blob_dir, "--threads", "1",
        "-A", serving.directory / "api", "--id", "me", "--supervisor", serving.directory / "nobody",
    )  # fmt: skip
    daemon.wait_for("-> RUNNING")
    client = NbdClient.connect(sock, structured=True)
    data = disk.read_bytes()
    assert client.read(len(data) - 100_000, 100_000) == data[-100_000:]
    client.close()
    api = ["curl", "--silent", "--unix-socket", serving.directory / "api"]
    told = json.loads(run(*api, "http://localhost/api/v1/daemon"))
    names = (told["state"], told["id"], told["supervisor"])
    assert names == ("RUNNING", "me", str(serving.directory / "nobody"))
    run(*api, "-X", "PUT", "http://localhost/api/v1/daemon/exit")
    assert daemon.end() == 0


def test_a_layer_with_its_metadata_inside(serving, tmp_path):
    blob = built(tmp_path, tar_of(member("file", data=NOISE[:200_000])), inline_bootstrap=True)
    served = Served(serving, Built(blob, tmp_path))
    export_block(blob, tmp_path / "disk", blob_directory(tmp_path))
    run("nbdcopy", served.uri, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(tmp_path / "disk")


def test_tars(serving, tmp_path):
    """Tarfs in blocks of 512 bytes; the tar is read where it is."""
    tar = tar_of(*(member(str(number), data=NOISE[: number * 997]) for number in range(50)))
    options = BuildOptions(
        source_type=SourceType.TARFS, bootstrap=tmp_path / "boot", blob_dir=tmp_path
    )
    (blob,) = build(io.BytesIO(tar), options).blobs
    (tmp_path / blob).write_bytes(tar)
    served = Served(serving, Built(tmp_path / "boot", tmp_path))
    export_block(tmp_path / "boot", tmp_path / "disk", blob_directory(tmp_path))
    run("nbdcopy", served.uri, tmp_path / "copy")
    assert digest(tmp_path / "copy") == digest(tmp_path / "disk")
    served.daemon.send(signal.SIGTERM)
    assert served.daemon.end() == 0
