"""Replay the recorded requests to the real daemon against ours: status, keys and types.

Differences are listed with their reasons.
"""

import json
import re
import socket
import subprocess
import threading

import pytest

from builder import BuildOptions, build
from erofs.rafs import Compressor
from fscache.api.server import ApiServer
from fscache.config import load_config
from fscache.node import NodeDaemon, NodeOptions
from fscache.singleton import SingletonDaemon, SingletonOptions
from tests.capabilities import requires
from tests.fixtures_path import FIXTURES, needs_fixtures

pytestmark = [needs_fixtures, requires("root", "fanotify")]

# What the real daemon answers and ours does not, by number and name of the exchange.
STATUS = {
    # Members of a prefetch configuration that are missing have defaults: the entry is taken,
    # and there is one of that name already.
    ("singleton", 18, "blobs-put-variant"),
}
# Accepted here, and then the name would be taken for the exchanges that follow.
ACCEPTED = {"mount-config-missing-mode"}
# Requests that have more than one answer, or none that is complete.
SEVERAL_ANSWERS = {"expect-continue", "body-60k", "two-pipelined"}
# `config` of a mount is left out with its secrets.
KEYS_LEFT_OUT = {"config"}
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


class Served:
    def __init__(self, place, daemon):
        self.daemon = daemon
        self.daemon.start()
        self.api = ApiServer(place / "api.sock")
        self.api.serve(self.daemon)
        self.path = str(place / "api.sock")

    def ask(self, request):
        """Send the bytes of a recorded request on a connection of its own."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(self.path)
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            while data := client.recv(65536):
                answer += data
        head, _, body = answer.partition(b"\r\n\r\n")
        return head.decode("latin-1"), body

    def close(self):
        self.api.close()
        stopper = threading.Thread(target=self.daemon.stop, daemon=True)
        stopper.start()
        stopper.join(60)
        assert not stopper.is_alive()


def shape(value):
    """Return keys and types of a JSON value; lists by their first member."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items() if key not in KEYS_LEFT_OUT}
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


def replay(served, place, scenario):
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
        listed = (scenario, number, name) in STATUS
        if listed and status == their_status:
            problems.append(f"{name}: listed as different, and is not")
        if status != their_status:
            if not listed:
                problems.append(f"{name}: status {status}, recorded {their_status}: {got_body!r}")
            continue
        if status == "200":
            ours, theirs = shape(json.loads(got_body)), shape(json.loads(their_body))
            if not same_shape(ours, theirs):
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
    finally:
        served.close()
    assert not problems, "\n".join(problems)


def test_daemon_without_an_image(place):
    options = NodeOptions(place / "mnt", id="d2", supervisor="/nowhere")
    served = Served(place, NodeDaemon(options))
    try:
        problems = replay(served, place, "fuse-empty")
        # The request that kills the real daemon.
        assert served.ask(fatal("abort-blobs-get-fuse"))[0].split(" ")[1] == "501"
    finally:
        served.close()
    assert not problems, "\n".join(problems)
