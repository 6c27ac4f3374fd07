"""`nydusd singleton` as a user meets it."""

import http.client
import json
import signal
import socket
from pathlib import Path

import pytest
from serving import TIMEOUT

WITHOUT_DEVICE = pytest.mark.skipif(
    Path("/dev/cachefiles").exists(), reason="this kernel has cachefiles"
)


def ask(sock, method, path):
    connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(sock))
    try:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or "null")
    finally:
        connection.close()


def test_serves_the_api_until_it_is_told_to_exit(serving):
    sock = serving.directory / "api"
    daemon = serving.nydusd("singleton", "-A", sock, "--id", "s", "--supervisor", "/nowhere")
    daemon.wait_for("-> RUNNING")
    status, info = ask(sock, "GET", "/api/v1/daemon")
    assert (status, info["state"], info["backend_collection"]) == (200, "RUNNING", None)
    assert (info["id"], info["supervisor"]) == ("s", "/nowhere")
    assert ask(sock, "GET", "/api/v2/blobs?domain_id=x") == (200, [])
    assert ask(sock, "PUT", "/api/v1/daemon/exit") == (204, None)
    assert daemon.end() == 0
    assert not sock.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it(serving, number):
    daemon = serving.nydusd("singleton")
    daemon.wait_for("-> RUNNING")
    daemon.send(number)
    assert daemon.end() == 0


@pytest.mark.parametrize(
    ("args", "status", "text"),
    [
        (["--fscache-tag", "x"], 2, "were not provided:\n  --fscache <fscache>"),
        (["--fscache-threads", "0"], 2, "expected a number from 1 to 1024"),
        (["--id", "x"], 2, "were not provided:\n  --supervisor <supervisor>"),
        (["-M", "/mnt"], 2, "unrecognized arguments: -M /mnt"),
        (["--fscache", "/nowhere"], 1, "Error: /nowhere: --fscache needs a directory"),
        (["-C", "/nowhere"], 1, "Error: /nowhere: cannot be read (No such file"),
        pytest.param(
            ["--fscache", "/"], 1, "/dev/cachefiles: not available on this kernel",
            marks=WITHOUT_DEVICE,
        ),
    ],
)  # fmt: skip
def test_wrong_words(serving, args, status, text):
    daemon = serving.nydusd("singleton", *args)
    assert daemon.end() == status
    assert text in daemon.stderr
