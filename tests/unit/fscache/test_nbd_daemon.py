"""The daemon of a disk, at a socket and with a kernel that is a fake; and its words."""

import errno
import json
import threading
from pathlib import Path

import pytest
from fakes.built import built, member, tar_of
from fakes.nbd_client import NbdClient

from erofs.errors import NydusError
from fscache.api.message import Request
from fscache.api.routes import answer
from fscache.backend import LocalFsConfig
from fscache.cache.plan import PlanError
from fscache.cli.nydusd import main
from fscache.config import DaemonConfig
from fscache.lifecycle import State
from fscache.nbd import daemon as nbd_daemon
from fscache.nbd.daemon import NbdDaemon, NbdOptions
from fscache.nbd.device import identifier_of
from fscache.nbd.errors import DeviceError
from fscache.nbd.listener import ListenerError

DATA = b"".join(b"%07d\n" % number for number in range(20_000))


@pytest.fixture
def image(tmp_path):
    return built(tmp_path, tar_of(member("file", data=DATA)))


class Device:
    """What `KernelDevice` does, as far as the daemon sees it."""

    made = []
    fails = None

    def __init__(self, how, index, identifier, connections, detached):
        if self.fails is not None:
            raise self.fails
        self.how, self.index, self.identifier = how, index, identifier
        self.connections, self.detached = connections, detached
        self.path = Path("/dev/null")
        self.ended = threading.Event()
        self.released = threading.Event()
        self.made.append(self)

    @classmethod
    def attach(cls, server, *args):
        return cls("attach", *args)

    @classmethod
    def take_over(cls, server, *args):
        return cls("take over", *args)

    @property
    def has_ended(self):
        return self.ended.is_set()

    def release(self):
        self.released.set()

    def wait(self, seconds):
        return self.ended.wait(0.01)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(Device, "made", [])
    monkeypatch.setattr(Device, "fails", None)
    monkeypatch.setattr(nbd_daemon, "KernelDevice", Device)
    monkeypatch.setattr(nbd_daemon, "set_read_ahead", lambda *_: None)
    monkeypatch.setattr(nbd_daemon, "is_connected", lambda _: False)
    return monkeypatch


@pytest.fixture
def begin(image, tmp_path):
    daemons = []

    def begin(bootstrap=image, **options):
        config = DaemonConfig(LocalFsConfig(dir=tmp_path), tmp_path / "cache")
        daemons.append(NbdDaemon(NbdOptions(bootstrap, config, **options)))
        daemons[-1].start()
        return daemons[-1]

    yield begin
    for daemon in daemons:
        for made in Device.made:
            made.ended.set()
        daemon.stop()


def test_a_socket(begin, image, tmp_path):
    path = tmp_path / "sock"
    daemon = begin(socket=path)
    assert path.stat().st_mode & 0o777 == 0o600
    client = NbdClient.connect(path)
    assert client.read(0, 4096) == image.read_bytes()[:4096]
    assert daemon.summary == f"RUNNING: {path}, 1 connections"
    assert daemon.trouble == ""
    daemon.stop()
    daemon.stop()
    assert daemon.state is State.STOPPED
    assert not path.exists()
    client.close()


def test_clients_beyond_the_limit(begin, tmp_path, monkeypatch):
    monkeypatch.setattr("fscache.nbd.listener._MAX_CLIENTS", 2)
    begin(socket=tmp_path / "sock")
    clients = [NbdClient.connect(tmp_path / "sock") for _ in range(2)]
    with pytest.raises(ConnectionError):
        NbdClient.connect(tmp_path / "sock")
    for client in clients:
        client.close()


def test_sockets_that_cannot_be(begin, tmp_path):
    begin(socket=tmp_path / "sock")
    with pytest.raises(ListenerError, match="another process serves this socket"):
        begin(socket=tmp_path / "sock")
    with pytest.raises(ListenerError):
        begin(socket=tmp_path / "no/sock")
    (tmp_path / "file").write_bytes(b"kept")
    with pytest.raises(ListenerError):
        begin(socket=tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_a_device(device, begin, image):
    daemon = begin(device=Path("/dev/nbd3"), threads=7)
    (made,) = Device.made
    with open(image, "rb") as file:
        identifier = identifier_of(file.fileno())
    assert identifier.startswith("nydusd-")
    assert (made.how, made.index, made.connections) == ("attach", 3, 7)
    assert made.identifier == identifier
    stopping = threading.Thread(target=daemon.stop)
    stopping.start()
    # Whoever has it open is waited for.
    assert made.released.wait(60)
    assert daemon.state is State.RUNNING
    made.ended.set()
    stopping.join(60)
    assert daemon.state is State.STOPPED


def test_somebody_else_detaches_it(device, begin):
    daemon = begin(device=Path("/dev/nbd3"))
    (made,) = Device.made
    made.ended.set()
    made.detached()
    daemon.wait()
    daemon.stop()
    assert not made.released.is_set()


def test_a_device_of_a_killed_daemon(device, begin, image):
    device.setattr(nbd_daemon, "is_connected", lambda _: True)
    with open(image, "rb") as file:
        mine = identifier_of(file.fileno())
    for found in (mine, None):
        device.setattr(nbd_daemon, "identifier_at", lambda _, found=found: found)
        begin(device=Path("/dev/nbd3"))
        assert Device.made[-1].how == "take over"
    device.setattr(nbd_daemon, "identifier_at", lambda _: "nydusd-other")
    with pytest.raises(DeviceError, match="something else"):
        begin(device=Path("/dev/nbd3"))


def test_failures_leave_nothing(device, begin, tmp_path):
    before = set(threading.enumerate())
    Device.fails = DeviceError("busy", errno.EBUSY)
    with pytest.raises(DeviceError):
        begin(device=Path("/dev/nbd3"), socket=tmp_path / "sock")
    assert not (tmp_path / "sock").exists()
    Device.fails = None
    with pytest.raises(DeviceError, match="not an NBD device"):
        begin(device=Path("/dev/sda"))
    with pytest.raises(PlanError):
        begin(tmp_path / "missing", socket=tmp_path / "sock")
    (tmp_path / "junk").write_bytes(bytes(8192))
    with pytest.raises(NydusError):
        begin(tmp_path / "junk", socket=tmp_path / "sock")
    names = {thread.name for thread in set(threading.enumerate()) - before}
    assert not [name for name in names if name.startswith(("nbd", "fetch"))]


def test_the_api(begin, tmp_path):
    daemon = begin(socket=tmp_path / "sock", id="name")

    def ask(method, path, body=b""):
        return answer(daemon, Request.parse(method, path, body))

    told = ask("GET", "/api/v1/daemon").body
    assert (told["state"], told["id"], told["backend_collection"]) == ("RUNNING", "name", None)
    assert ask("GET", "/api/v2/daemon").body == told
    assert ask("PUT", "/api/v1/daemon", json.dumps({"log_level": "info"}).encode()).status == 204
    assert ask("GET", "/api/v1/daemon/events").status == 200
    assert ask("GET", "/api/v1/mount").status >= 400
    assert ask("PUT", "/api/v1/daemon/exit").status == 204
    daemon.wait()


ENTRY = {"type": "bootstrap", "id": "name", "domain_id": ""}


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "<DEVICE> or --socket <socket>"),
        (["/dev/nbd0"], 1, "both option `-C/--config` and `-B/--bootstrap` are missing"),
        (["/dev/nbd0", "-B", "boot"], 2, "--localfs-dir <localfs-dir>"),
        (["/dev/nbd0", "-D", "."], 2, "--bootstrap <bootstrap>"),
        (["/dev/nbd0", "-C", "entry", "-B", "boot"], 2, "cannot be used with"),
        (["/dev/nbd0", "-C", "entry", "-D", "."], 2, "cannot be used with"),
        (["/dev/nbd0", "--threads", "0", "-C", "entry"], 2, "from 1 to 1024"),
        (["/dev/nbd0", "-C", "entry", "--id", "name"], 2, "--supervisor <supervisor>"),
        (["/dev/nbd0", "-B", "boot", "-D", "missing"], 1, "not a directory"),
        (["/dev/nbd0", "-C", "missing"], 1, "cannot be read"),
        (["/dev/nbd0", "-C", "entry"], 1, "metadata_path: missing"),
        (["/dev/sdx", "-B", "boot", "-D", "."], 1, "not an NBD device"),
    ],
)
def test_words_that_are_refused(words, status, said, image, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = {"backend_type": "localfs", "backend_config": {"dir": "."}, "cache_type": "filecache",
             "cache_config": {"work_dir": "."}}  # fmt: skip
    (tmp_path / "entry").write_text(json.dumps({**ENTRY, "config": short}))
    words = ["nbd", "--rlimit-nofile", "0", *words]
    try:
        found = main(words)
    except SystemExit as ended:
        found = ended.code
    assert (found, said in capsys.readouterr().err) == (status, True)
