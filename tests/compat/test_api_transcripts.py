"""Replay the recorded requests to the real daemon against ours: status, keys and types.

Differences are listed with their reasons.
"""

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from builder import BuildOptions, build
from erofs.rafs import Compressor
from fscache.api.server import ApiServer
from fscache.config import load_config, parse_config
from fscache.node import NodeDaemon, NodeOptions
from fscache.singleton import SingletonDaemon, SingletonOptions
from fscache.unixsocket import is_served
from tests.capabilities import requires
from tests.fakes.registry import REPO, RegistryServer
from tests.fixtures_path import FIXTURES, needs_fixtures

pytestmark = [needs_fixtures, requires("root", "fanotify")]

# What the real daemon answers and ours does not, by number and name of the exchange.
STATUS = {
    # Members of a prefetch configuration that are missing have defaults: the entry is taken,
    # and there is one of that name already.
    ("singleton", 18, "blobs-put-variant"),
    # Credentials alone can be replaced.
    ("fuse-registry", 14, "config-put-proxy"),
    # A successor has nothing to mount before it has taken over.
    ("takeover", 4, "mount in INIT"),
}
# So it is not shown either.
SHAPE = {("fuse-registry", 15, "config-get-after2")}
# Accepted here, and then the name would be taken for the exchanges that follow.
ACCEPTED = {"mount-config-missing-mode"}
# Requests that have more than one answer, or none that is complete.
SEVERAL_ANSWERS = {"expect-continue", "body-60k", "two-pipelined"}
# An empty list has the shape of any: these must not be empty.
FILLED_BY_READS = {
    "/metrics/files after reads", "/metrics/pattern after reads",
    "/metrics/files?latest after reads",
}  # fmt: skip
# The order of the last exchanges ends the daemon.
AFTER = {"exit"}


def exchanges(scenario):
    data = json.loads((FIXTURES / "nydusd-api" / f"{scenario}.json").read_text())
    return data["exchanges"]


def fatal(scenario):
    """Return the request that kills the real daemon."""
    (found,) = (item["request"] for item in exchanges(scenario) if item["name"] == "fatal")
    return found.encode("latin-1")


@pytest.fixture
def place(tmp_path):
    """Images under the names of the recordings, and a configuration."""
    source = tmp_path / "source"
    source.mkdir()
    for number in range(4):
        (source / f"f{number}").write_bytes(bytes([number]) * 70_000)
    (tmp_path / "blobs").mkdir()
    for name, compressor in (("zstd", Compressor.ZSTD), ("lz4", Compressor.LZ4_BLOCK)):
        build(
            source,
            BuildOptions(
                bootstrap=tmp_path / f"small-{name}.boot",
                blob_dir=tmp_path / "blobs",
                compressor=compressor,
            ),
        )
    config = {
        "device": {
            "backend": {"type": "localfs", "config": {"dir": str(tmp_path / "blobs")}},
            "cache": {"type": "blobcache", "config": {"work_dir": str(tmp_path / "cache")}},
        },
        "mode": "direct",
        "iostats_files": True,
        "access_pattern": True,
        "latest_read_files": True,
    }
    (tmp_path / "c.json").write_text(json.dumps(config))
    (tmp_path / "mnt").mkdir()
    return tmp_path


def ask(path, request):
    """Send the bytes of a recorded request on a connection of its own."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(60)
        client.connect(str(path))
        client.sendall(request)
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.decode("latin-1"), body


class Served:
    def __init__(self, place, daemon):
        self.daemon = daemon
        self.daemon.start()
        self.api = ApiServer(place / "api.sock")
        self.api.serve(self.daemon)
        self.path = place / "api.sock"

    def ask(self, request):
        return ask(self.path, request)

    def close(self):
        self.api.close()
        stopper = threading.Thread(target=self.daemon.stop, daemon=True)
        stopper.start()
        stopper.join(60)
        assert not stopper.is_alive()


class Succession:
    """A daemon that is killed when it has sent its state, its successor, and their supervisor."""

    def __init__(self, place):
        self.place = place
        self.asked = 0
        self.daemons = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(place / "sup.sock"))
        self.listener.listen()
        threading.Thread(target=self._supervise, daemon=True).start()
        self._start("k1.sock")

    def _supervise(self):
        with self.listener:
            sender, _ = self.listener.accept()
            with sender:
                state, descriptors, _, _ = socket.recv_fds(sender, 32768, 1)
                state += b"".join(iter(lambda: sender.recv(65536), b""))
            taker, _ = self.listener.accept()
            with taker:
                socket.send_fds(taker, [state], descriptors)
        for fd in descriptors:
            os.close(fd)

    def _start(self, sock, *words):
        nydusd = Path(sys.executable).with_name("nydusd")
        command = [nydusd, "-M", self.place / "mnt", "-B", self.place / "small-zstd.boot",
                   "-C", self.place / "c.json", "-A", self.place / sock, "--id", "kid",
                   "--supervisor", self.place / "sup.sock", "-l", "error", *words]  # fmt: skip
        run = {"NYDUSD_RUN_DIR": str(self.place / "run"), "NYDUSD_HOLDER_SECONDS": "30"}
        self.daemons.append(subprocess.Popen(command, env={**os.environ, **run}))
        self.path = self.place / sock
        end = time.monotonic() + 60
        while not is_served(self.path):
            assert time.monotonic() < end
            assert self.daemons[-1].poll() is None
            time.sleep(0.02)

    def ask(self, request):
        if self.asked == 2:
            self.daemons[0].kill()
            self.daemons[0].wait(60)
            self._start("k2.sock", "--upgrade")
        self.asked += 1
        return ask(self.path, request)

    def close(self):
        for daemon in self.daemons:
            daemon.terminate()
            daemon.wait(60)
        subprocess.run(["umount", "-l", self.place / "mnt"], stderr=subprocess.DEVNULL)


def shape(value):
    """Return keys and types of a JSON value; lists by their first member."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return type(value).__name__


def same_shape(ours, theirs):
    """Compare shapes; an empty list, an empty table of files, and null stand for any."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            # Tables by inode number.
            return all(re.fullmatch(r"\d+", key) for key in (*ours, *theirs))
        return all(same_shape(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list) and isinstance(theirs, list):
        return not ours or not theirs or same_shape(ours[0], theirs[0])
    return ours == theirs or "NoneType" in (ours, theirs)


def replay(served, place, scenario, without=(), unmounted=()):
    """Ask the recorded requests; return what differs, or is in an answer and must not be.

    Args:
        served: what answers.
        place: of the images.
        scenario: the name of the recording.
        without: bytes that must not be in an answer.
        unmounted: paths of mounts that only the original has.
    """
    problems = []
    for number, exchange in enumerate(exchanges(scenario)):
        name = exchange["name"]
        if name in SEVERAL_ANSWERS | ACCEPTED | AFTER or exchange["end"] != "complete":
            continue
        if name == "/metrics after reads":
            subprocess.run(["cat", place / "mnt/f0", place / "mnt/f2"], stdout=subprocess.DEVNULL)
        request = exchange["request"].replace("<img>", str(place)).replace("<work>", str(place))
        head, _, body = request.partition("\r\n\r\n")
        head = re.sub(r"(?i)content-length: \d+", f"Content-Length: {len(body.encode())}", head)
        got_head, got_body = served.ask(f"{head}\r\n\r\n{body}".encode("latin-1"))
        their_head, _, their_body = exchange["response"].partition("\r\n\r\n")
        status, their_status = got_head.split(" ")[1], their_head.split(" ")[1]
        problems += [f"{name}: shows {text!r}" for text in without if text in got_body]
        listed = (scenario, number, name) in STATUS
        if listed and status == their_status:
            problems.append(f"{name}: listed as different, and is not")
        if status != their_status:
            if not listed:
                problems.append(f"{name}: status {status}, recorded {their_status}: {got_body!r}")
            continue
        if status == "200":
            ours, theirs = shape(json.loads(got_body)), shape(json.loads(their_body))
            for path in unmounted:
                theirs.get("backend_collection", {}).pop(path, None)
            if same_shape(ours, theirs) == ((scenario, number, name) in SHAPE):
                problems.append(f"{name}: {ours} is not like {theirs}")
            if name in FILLED_BY_READS and not json.loads(got_body):
                problems.append(f"{name}: nothing after reads")
        elif status != "204":
            assert json.loads(got_body).keys() == {"code", "message"}, name
        else:
            assert got_body == b""
    return problems


def test_daemon_with_an_image(place):
    served = Served(
        place,
        NodeDaemon(
            NodeOptions(
                place / "mnt",
                bootstrap=place / "small-zstd.boot",
                config=load_config(place / "c.json"),
            )
        ),
    )
    try:
        problems = replay(served, place, "fuse-localfs")
    finally:
        served.close()
    assert not problems, "\n".join(problems)


def test_singleton_daemon(place):
    served = Served(place, SingletonDaemon(SingletonOptions()))
    try:
        problems = replay(served, place, "singleton")
        head, body = served.ask(fatal("abort-blobs-get-singleton"))
        assert head.split(" ")[1] == "200"
        assert json.loads(body) == []
        assert served.ask(fatal("abort-sendfd-singleton"))[0].split(" ")[1] == "204"
    finally:
        served.close()
    assert not problems, "\n".join(problems)


def test_daemon_with_a_registry(place):
    """Its password is in no answer, also not of those that show the original's."""
    blobs = {path.name: path.read_bytes() for path in (place / "blobs").iterdir()}
    with RegistryServer(blobs, auth="basic") as registry:
        registry.user, registry.password = "user", "pass"
        config = json.loads((place / "c.json").read_text())
        keys = {"scheme": "http", "host": registry.host, "repo": REPO, "auth": "dXNlcjpwYXNz"}
        config["device"]["backend"] = {"type": "registry", "config": keys}
        config["fs_prefetch"] = {"enable": True}
        config |= {"iostats_files": False, "access_pattern": False, "latest_read_files": False}
        options = NodeOptions(
            place / "mnt",
            bootstrap=place / "small-zstd.boot",
            config=parse_config(json.dumps(config)),
        )
        served = Served(place, NodeDaemon(options))
        try:
            problems = replay(served, place, "fuse-registry", without=(b"dXNl", b"bmV3"))
        finally:
            served.close()
    assert not problems, "\n".join(problems)


def test_daemon_without_an_image(place):
    options = NodeOptions(place / "mnt", id="d2", supervisor="/nowhere")
    served = Served(place, NodeDaemon(options))
    try:
        problems = replay(served, place, "fuse-empty")
        # The requests that kill the real daemon.
        assert served.ask(fatal("abort-blobs-get-fuse"))[0].split(" ")[1] == "501"
        assert served.ask(fatal("abort-sendfd"))[0].split(" ")[1] == "500"
    finally:
        served.close()
    assert not problems, "\n".join(problems)


def test_succession(place):
    succession = Succession(place)
    try:
        problems = replay(succession, place, "takeover", unmounted=["/q"])
    finally:
        succession.close()
    assert not problems, "\n".join(problems)
    assert succession.asked == 12


def test_every_scenario_is_replayed():
    recorded = {path.stem for path in (FIXTURES / "nydusd-api").glob("*.json")}
    replayed = {"fuse-localfs", "fuse-empty", "fuse-registry", "singleton", "takeover"}
    # Of these one request each, which kills the original.
    fatal_ones = {"abort-blobs-get-fuse", "abort-blobs-get-singleton", "abort-sendfd",
                  "abort-sendfd-singleton"}  # fmt: skip
    assert recorded == replayed | fatal_ones
