"""`nydusctl` against recorded and hostile answers on a real unix socket."""

import json
import os
import re
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from erofs.errors import NydusError
from fscache.ctl import client as ctl_client
from fscache.ctl import command as ctl
from fscache.ctl import text as ctl_text
from fscache.ctl.client import ApiClient
from tests.fixtures_path import FIXTURES, needs_fixtures

RECORDED = FIXTURES / "nydusd-api"
NO_CONTENT = b"HTTP/1.1 204 \r\nServer: Nydus API\r\nConnection: keep-alive\r\n\r\n"
DAEMON = {
    "version": {"package_ver": "v1", "git_commit": "abc", "profile": "release", "rustc": "r"},
    "state": "RUNNING",
    "backend_collection": {
        "/": {"backend_type": "Rafs", "mountpoint": "/", "mounted_time": "2026-01-02 03:04:05 +0"}
    },
}
BACKEND = {
    "backend_type": "localfs",
    "read_count": 5,
    "read_errors": 1,
    "read_amount_total": 3 << 20,
    "read_cumulative_latency_millis_total": 13,
    "read_cumulative_latency_millis_dist": [0, 0, 0, 0, 0, 0, 13, 0],
    "read_count_block_size_dist": [0, 0, 0, 0, 1, 0, 4, 0],
}
CACHE = {
    "underlying_files": ["a.blob.data", "b.blob.data"],
    "store_path": "/cache",
    "partial_hits": 1,
    "whole_hits": 2,
    "total": 3,
    "prefetch_data_amount": 350224384,
    "prefetch_requests_count": 167,
    "prefetch_workers": 8,
    "prefetch_unmerged_chunks": 4,
    "prefetch_cumulative_time_millis": 478980,
    "prefetch_begin_time_secs": 100,
    "prefetch_begin_time_millis": 900,
    "prefetch_end_time_secs": 106,
    "prefetch_end_time_millis": 677,
    "buffered_backend_size": 5,
}
FSSTATS = {
    "data_read": 66708312,
    "fop_hits": list(range(15)),
    "fop_errors": [0, 0, 0, 0, 7, *[0] * 10],
    "read_latency_dist": [2244, 2, 440, 10, 3, 0, 0, 12345678],
}


def answer(body, status=200):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"HTTP/1.1 {status} \r\nServer: Nydus API\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class FakeNydusd:
    """Answers each connection with the bytes that `answers` has for method and target."""

    def __init__(self, path):
        self.path = path
        self.answers = {}
        self.requests = []
        self.forever = threading.Event()
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self):
        while True:
            connection, _ = self._socket.accept()
            with connection, connection.makefile("rb") as file:
                line = file.readline().decode().split()
                if not line:
                    return
                length = 0
                while (header := file.readline()) not in (b"\r\n", b""):
                    name, _, value = header.partition(b":")
                    if name.lower() == b"content-length":
                        length = int(value)
                self.requests.append((line[0], line[1], file.read(length)))
                reply = self.answers.get((line[0], line[1]), answer({"message": "no"}, 404))
                if isinstance(reply, list):
                    reply = reply.pop(0)
                if reply is None:
                    self.forever.wait(10)
                else:
                    connection.sendall(reply)

    def close(self):
        self.forever.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(self.path))
        self._thread.join()
        self._socket.close()


@pytest.fixture
def nydusd(tmp_path):
    fake = FakeNydusd(tmp_path / "api.sock")
    yield fake
    fake.close()


@pytest.fixture
def run(nydusd, capsys):
    def run(*arguments, sock=nydusd.path):
        try:
            status = ctl.main(["-S", str(sock), *arguments])
        except SystemExit as ended:
            status = ended.code
        output = capsys.readouterr()
        return status, output.out, output.err

    return run


# --- recorded ------------------------------------------------------------------------------


def exchanges(scenario):
    return json.loads((RECORDED / f"{scenario}.json").read_text())["exchanges"]


def response(scenario, name):
    (found, *_) = [e for e in exchanges(scenario) if e["name"] == name]
    return whole(found["response"])


def whole(recorded):
    """Return a recorded answer with the length that its placeholders made wrong."""
    head, _, body = recorded.partition("\r\n\r\n")
    head = re.sub(r"(?<=Content-Length: )\d+", str(len(body)), head)
    return f"{head}\r\n\r\n{body}".encode("latin-1")


def transcript():
    if not RECORDED.is_dir():
        return []
    blocks = (RECORDED / "nydusctl.txt").read_text().split("\n$ nydusctl -S <sock> ")[1:]
    calls = []
    for block in blocks:
        command, status, *rest = block.split("\n")
        errors = [line[8:] for line in rest if line.startswith("stderr| ")]
        output = "\n".join(line for line in rest if not line.startswith("stderr| "))
        number = int(re.fullmatch(r"\[exit (\d+)\]", status)[1])
        calls.append((command, number, output.rstrip("\n"), "\n".join(errors)))
    return calls


def prepare(nydusd, second_instance):
    nydusd.answers = {
        ("GET", "/api/v1/metrics"): response("fuse-localfs", "/metrics ambiguous (several mounts)"),
        ("GET", "/api/v1/metrics/blobcache"): response(
            "fuse-localfs", "/metrics/blobcache unknown id"
        ),
        ("GET", "/api/v1/metrics/backend"): response(
            "fuse-localfs", "/metrics/backend after reads"
        ),
        ("PUT", "/api/v1/daemon"): NO_CONTENT,
        ("POST", "/api/v1/mount?mountpoint=/ctl"): NO_CONTENT,
        ("DELETE", "/api/v1/mount?mountpoint=/ctl"): NO_CONTENT,
        ("DELETE", "/api/v1/mount?mountpoint=/nope"): response("fuse-localfs", "umount-unknown"),
    }
    daemon = response("fuse-localfs", "/api/v1/daemon")
    if second_instance:
        value = json.loads(daemon.partition(b"\r\n\r\n")[2])
        mounts = value["backend_collection"]
        moment = "2026-11-22 02:53:16.489336675 +00:00:00"
        mounts["/ctl"] = mounts["/"] | {"mountpoint": "/ctl", "mounted_time": moment}
        daemon = answer(value)
    nydusd.answers["GET", "/api/v1/daemon"] = daemon


@needs_fixtures
@pytest.mark.parametrize("call", transcript(), ids=lambda call: call[0])
def test_transcript(nydusd, run, tmp_path, call):
    command, status, output, errors = call
    prepare(nydusd, second_instance="/ctl" in output)
    if "loud" in command:
        refused = response("fuse-localfs", "daemon-put-bad-level")
        nydusd.answers["PUT", "/api/v1/daemon"] = refused
    (tmp_path / "fuse.json").write_text("{}")
    arguments = command.replace("<work>", str(tmp_path)).split()
    # Tips about similar values are the one thing that is left out.
    errors = re.sub(r"\n\n  tip: .*", "", errors)
    got_status, got_output, got_errors = run(*arguments)
    assert (got_status, got_output.rstrip("\n")) == (status, output)
    usage = "mount [OPTIONS]"  # clap leaves this word out where it reports an error
    assert got_errors.rstrip("\n").replace(usage, "mount") == errors


@needs_fixtures
def test_transcript_is_replayed_whole():
    assert len(transcript()) == 20


@needs_fixtures
@pytest.mark.parametrize("scenario", ["fuse-empty", "fuse-localfs", "fuse-registry", "singleton"])
def test_recorded_answers(nydusd, run, scenario):
    """Every recorded answer to a path that nydusctl asks gives text, or the daemon's error."""
    commands = {
        "/api/v1/daemon": ["info"],
        "/api/v1/metrics": ["metrics", "fsstats"],
        "/api/v1/metrics/blobcache": ["metrics", "cache"],
        "/api/v1/metrics/backend": ["metrics", "backend"],
    }
    seen = 0
    for exchange in exchanges(scenario):
        method, target, *_ = [*exchange["request"].split(), "", ""]
        if method != "GET" or target not in commands or exchange["name"] == "get-with-body":
            continue
        reply = whole(exchange["response"])
        if not reply.startswith((b"HTTP/1.1 200 ", b"HTTP/1.1 404 ")):
            continue
        nydusd.answers["GET", target] = reply
        for raw in ([], ["--raw"]):
            status, output, errors = run(*raw, *commands[target])
            if reply.startswith(b"HTTP/1.1 200 "):
                assert (status, errors) == (0, "")
                assert output.strip()
            else:
                assert (status, output) == (1, "")
                assert errors.startswith('Error: Request failed. Object {"code": String("UND')
        if raw and status == 0:
            body = json.loads(reply.partition(b"\r\n\r\n")[2])
            assert output == json.dumps(body, sort_keys=True, separators=(",", ":")) + "\n"
        seen += 1
    assert seen >= 2


@needs_fixtures
@pytest.mark.parametrize("command", ["", "info", "metrics", "mount", "umount"])
def test_help_names_what_the_recorded_one_names(capsys, command):
    recorded = (RECORDED / "help" / f"nydusctl{command and '-' + command}.txt").read_text()
    with pytest.raises(SystemExit) as ended:
        ctl.main([*([command] if command else []), "--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for line in recorded.splitlines():
        if found := re.match(r"  +(\S.*?)  +(\S.*)", line):
            names, about = found.groups()
            # argparse repeats the metavariable behind both names and has its own word for -h.
            for name in re.findall(r"--?[a-z]+|<\w+>", names):
                assert name in shown
            if "help" not in names:
                assert about in shown


@needs_fixtures
def test_help_of_set(capsys):
    with pytest.raises(SystemExit):
        ctl.main(["set", "--help"])
    assert (RECORDED / "help" / "nydusctl-set.txt").read_text() in capsys.readouterr().out


# --- text ----------------------------------------------------------------------------------


def test_info_without_configuration_and_instances(nydusd, run):
    nydusd.answers["GET", "/api/v1/daemon"] = answer(DAEMON)
    status, output, _ = run("info")
    assert status == 0
    assert output.endswith(
        "Instances:\n\tInstance Mountpoint:  /\n\tType:  Rafs\n"
        "\tMounted Time:  2026-01-02 3:04:05 +0\n\n"
    )
    nydusd.answers["GET", "/api/v1/daemon"] = answer(DAEMON | {"backend_collection": None})
    assert run("info")[1].endswith('Commit:                 "abc"\n')


PATTERN = [
    {"ino": 9, "path": "/usr/bin/b\u00e4r", "nr_read": 1},
    {"ino": 7, "path": "/name\udcff", "nr_read": 2},
    {"ino": 8, "path": "/two\nlines", "nr_read": 1},
    {"ino": 6, "path": "/blank ", "nr_read": 1},
]
LISTED = "/usr/bin/bär\n".encode() + b"/name\xff\n"


@pytest.fixture
def recording(nydusd):
    nydusd.answers = {
        ("GET", "/api/v1/metrics"): answer({"access_pattern_enabled": True}),
        ("GET", "/api/v1/metrics/pattern?paths=true"): answer(PATTERN),
        ("GET", "/api/v1/metrics?id=/b"): answer({"access_pattern_enabled": True}),
        ("GET", "/api/v1/metrics/pattern?id=/b&paths=true"): answer(PATTERN[:1]),
    }
    return nydusd


def test_prefetch_list(recording, capfdbinary):
    assert ctl.main(["-S", str(recording.path), "prefetch-list"]) == 0
    out, err = capfdbinary.readouterr()
    assert out == LISTED
    assert err.decode().splitlines() == [
        f"warning: left out, a list cannot hold it: {name}"
        for name in ("b'/two\\nlines'", "b'/blank '")
    ]


def test_prefetch_list_into_a_file(recording, run, tmp_path):
    path = tmp_path / "list"
    path.write_text("old")
    status, output, _ = run("prefetch-list", "--output", str(path))
    assert (status, output, path.read_bytes()) == (0, "", LISTED)
    assert run("prefetch-list", "--id", "/b", "-o", str(path)) == (0, "", "")
    assert path.read_bytes() == "/usr/bin/bär\n".encode()
    assert [entry.name for entry in tmp_path.iterdir() if "list" in entry.name] == ["list"]
    status, output, errors = run("prefetch-list", "-o", str(tmp_path / "absent/list"))
    assert (status, output) == (1, "")
    assert "the list cannot be written (No such file or directory)" in errors


def test_prefetch_list_raw(recording, run):
    status, output, errors = run("prefetch-list", "--raw")
    assert (status, errors) == (0, "")
    assert json.loads(output)[0]["ino"] == 9


@pytest.mark.parametrize(
    ("enabled", "pattern", "text"),
    [
        (False, [], "nothing is recorded: the configuration has no access_pattern"),
        (None, [], "access_pattern_enabled of the daemon's answer"),
        (True, {}, "not a list of files"),
        # A daemon that knows no paths.
        (True, [{"ino": 9, "nr_read": 1}], "member path of the daemon's answer"),
        (True, [{"path": "/\ud800"}], "path that is none"),
    ],
)
def test_prefetch_list_of_a_daemon_without_one(recording, run, enabled, pattern, text):
    recording.answers["GET", "/api/v1/metrics"] = answer({"access_pattern_enabled": enabled})
    recording.answers["GET", "/api/v1/metrics/pattern?paths=true"] = answer(pattern)
    status, output, errors = run("prefetch-list")
    assert (status, output) == (1, "")
    assert text in errors


def test_backend_averages():
    text = ctl_text.backend_text(BACKEND)
    assert "Read Amount:        3145728 Bytes (3 MB)\n" in text
    assert "Average Latency(millis): " + "0       " * 6 + "3       0       \n" in text


def test_rates():
    after = BACKEND | {
        "read_count": 9,
        "read_amount_total": 7 << 20,
        "read_cumulative_latency_millis_total": 33,
        "read_cumulative_latency_millis_dist": [0, 0, 0, 0, 0, 0, 33, 0],
        "read_count_block_size_dist": [0, 0, 0, 0, 1, 0, 8, 0],
    }
    text = ctl_text.backend_rates_text(BACKEND, after, 2.0)
    assert "Backend Read Bandwidth:     2048 KB/S\n" in text
    assert "Backend Average IO Size:    1048576 Bytes\n" in text
    assert "Backend Average Latency:    5 millis\n" in text
    assert "\n" + "0       " * 6 + "5       0       \n<<<" in text
    # A daemon that started anew counts from zero.
    text = ctl_text.backend_rates_text(after, BACKEND, 1.0)
    assert "Backend Read Bandwidth:     3072 KB/S\n" in text


def test_cache():
    text = ctl_text.cache_text(CACHE)
    assert text.startswith("\nPartial Hits:               1\n")
    assert 'Files:                      ["a.blob.data","b.blob.data"]\n' in text
    assert "Prefetch Amount:            350224384 = 342016 KB\n" in text
    assert "Prefetch Average Size:      2097152 Bytes\n" in text
    assert "Prefetch Duration:          5.777 Seconds\n" in text
    assert re.search(r"Prefetch Bandwidth:         57\.8154\d+ MB/S\n", text)
    assert re.search(r"Prefetch Request Latency:   2\.8681\d+ Seconds\n", text)
    running = CACHE | {"prefetch_end_time_secs": 0, "prefetch_requests_count": 0}
    text = ctl_text.cache_text(running)
    assert "Prefetch Duration:          0 Seconds\nPrefetch Bandwidth:         0 MB/S\n" in text
    assert "Prefetch Average Size:      0 Bytes\n" in text


def test_fsstats():
    assert ctl_text.fsstats_text(FSSTATS) == (
        "\nRead Latency:   <200us  ~1ms    ~20ms   ~50ms   ~500ms  ~1s     ~2s     2s~     \n"
        "Reads Count:    2244    2       440     10      3       0       0       12345678 \n"
        "\nRead Errors: 7\nRead Data: 66708312Bytes (63MB)\n"
        "\nFOP Counters:\n"
        "Getattr(0) Readlink(1) Open(2) Release(3) Read(4) Statfs(5) Getxattr(6) Listxattr(7)\n"
        "Opendir(8) Lookup(9) Readdir(10) Readdirplus(11) Access(12) Forget(13) BatchForget(14)\n"
    )


def test_small_numbers_have_no_exponent():
    text = ctl_text.backend_text(BACKEND | {"read_amount_total": 1})
    assert "1 Bytes (0.00000095367431640625 MB)" in text


# --- requests ------------------------------------------------------------------------------


def test_requests(nydusd, run, tmp_path):
    (tmp_path / "c.json").write_text('{"ä": 1}')
    target = "/api/v1/mount?mountpoint=/a%20%26b%3D%C3%A4"
    nydusd.answers |= {
        ("POST", target): NO_CONTENT,
        ("DELETE", target): NO_CONTENT,
        ("PUT", "/api/v1/daemon"): NO_CONTENT,
        ("GET", "/api/v1/metrics?id=/a%23"): answer(FSSTATS),
    }
    mount = ["-s", "/s", "-c", str(tmp_path / "c.json"), "-m", "/a &b=ä", "-t", "rafs"]
    assert run("mount", *mount) == (0, "", "")
    assert run("umount", "--mountpoint", "/a &b=ä", "--raw") == (0, "", "")
    assert run("set", "log-level", "warn") == (0, "", "")
    assert run("metrics", "fsstats", "--id", "/a#", "-r")[0] == 0
    assert [request[:2] for request in nydusd.requests] == [
        ("POST", target), ("DELETE", target), ("PUT", "/api/v1/daemon"),
        ("GET", "/api/v1/metrics?id=/a%23"),
    ]  # fmt: skip
    bodies = [json.loads(body) if body else None for _, _, body in nydusd.requests]
    body = {"source": "/s", "fs_type": "rafs", "config": '{"ä": 1}'}
    assert bodies == [body, None, {"log_level": "warn"}, None]


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"\xff", "is not UTF-8"), (b"x" * 51_201, "more than the 51200"), (b"\x01" * 20_000, "<=")],
)
def test_configurations_that_cannot_be_sent(nydusd, run, tmp_path, content, text):
    (tmp_path / "c.json").write_bytes(content)
    mount = ["mount", "-s", "/s", "-c", str(tmp_path / "c.json"), "-m", "/", "-t", "rafs"]
    status, output, errors = run(*mount)
    assert (status, output, len(errors.splitlines())) == (1, "", 1)
    assert text in errors
    assert nydusd.requests == []


def test_names_that_are_not_utf8(nydusd, run):
    nydusd.answers["DELETE", "/api/v1/mount?mountpoint=/%FF"] = NO_CONTENT
    assert run("umount", "-m", "/\udcff") == (0, "", "")
    status, _, errors = run("mount", "-s", "/\udcff", "-c", os.devnull, "-m", "/", "-t", "rafs")
    assert (status, errors) == (1, "Error: arguments of a request have to be UTF-8\n")


@contextmanager
def intervals(monkeypatch, number):
    left = iter(range(number))

    def sleep(seconds):
        assert seconds == 7
        if next(left, None) is None:
            raise KeyboardInterrupt

    ticks = iter(range(0, 7000, 7))
    clock = SimpleNamespace(sleep=sleep, monotonic=lambda: next(ticks))
    monkeypatch.setattr(ctl, "time", clock)
    yield


def test_intervals(nydusd, run, monkeypatch):
    nydusd.answers["GET", "/api/v1/metrics/backend"] = answer(BACKEND)
    nydusd.answers["GET", "/api/v1/metrics/blobcache"] = answer(CACHE)
    with intervals(monkeypatch, 2):
        status, output, errors = run("metrics", "backend", "-I", "7")
    assert (status, errors) == (130, "")
    assert output.count("Backend Read Bandwidth:     0 KB/S") == 2
    assert "Backend Type" not in output
    with intervals(monkeypatch, 2):
        status, output, _ = run("metrics", "backend", "--interval", "7", "--raw")
    assert [json.loads(line) for line in output.splitlines()] == [BACKEND] * 3
    with intervals(monkeypatch, 1):
        assert run("metrics", "cache", "--interval", "7")[1].count("Partial Hits") == 2


# --- command line --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "  --sock <sock>"),
        (["info"], "  --sock <sock>"),
        (["-S", "s", "nonsense"], "nonsense"),
        (["-S", "s", "info", "more"], "more"),
        (["-S", "s", "set", "log-level"], "  <VALUE>\n"),
        (["-S", "s", "metrics"], "  <category>\n"),
        (["-S", "s", "metrics", "backend", "-I", "0"], "'0' for '--interval <interval>'"),
        (["-S", "s", "metrics", "backend", "-I", "x"], "'x' for '--interval <interval>'"),
        (["-S", "s", "metrics", "backend", "-I", "9" * 5000], "--interval"),
        (["-S", "s", "umount"], "  -m <mountpoint>\n"),
        (["-S", "s", "mount", "-s", "/s"], "  --config <config>\n  --mountpoint"),
        (["help", "nonsense"], "nonsense"),
    ],
)
def test_wrong_usage(capsys, arguments, text):
    with pytest.raises(SystemExit) as ended:
        ctl.main(arguments)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert text in output.err


def test_help_and_version(capsys):
    assert ctl.main(["help"]) == 0
    assert "Umounts a filesystem instance" in capsys.readouterr().out
    assert ctl.main(["help", "mount"]) == 0
    assert "--source" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        ctl.main(["-V"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("nydusctl ")


def test_nothing_of_the_daemon_is_imported():
    code = (
        "import sys; import fscache.ctl.command; "
        "print([name for name in sys.modules if name.split('.')[0] in ('urllib3', 'blake3')"
        " or name.startswith('fscache.') and not name.startswith('fscache.ctl')])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert printed.stdout == b"[]\n"


def test_output_that_nobody_reads(nydusd):
    nydusd.answers["GET", "/api/v1/daemon"] = answer(DAEMON)
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fscache.ctl.command", "-S", str(nydusd.path), "info"]
    ended = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (1, b"")


# --- failures ------------------------------------------------------------------------------


def failure(result):
    status, output, errors = result
    assert (status, output) == (1, "")
    assert "Traceback" not in errors
    (line,) = errors.splitlines()
    assert line.startswith("Error: ")
    return line


def test_sockets_that_do_not_answer(run, tmp_path):
    assert "no such API socket" in failure(run("info", sock=tmp_path / "none"))
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    assert "no daemon listens" in failure(run("info", sock=tmp_path / "stale"))
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in failure(run("info", sock=tmp_path / "file"))
    assert "too long" in failure(run("info", sock=tmp_path / ("x" * 200)))
    failure(run("info", sock=""))


def test_time_out(nydusd):
    nydusd.answers["GET", "/x"] = None
    with pytest.raises(NydusError, match=r"gave no answer for 0\.05 seconds") as caught:
        ApiClient(str(nydusd.path), timeout=0.05).request("GET", "/x")
    assert caught.value.where["path"] == str(nydusd.path)


@pytest.mark.parametrize(
    ("reply", "text"),
    [
        (b"", "closed the connection without an answer"),
        (b"garbage\r\n\r\n", "not an HTTP answer (BadStatusLine)"),
        (b"HTTP/1.1 200 " + b"x" * 70_000, "not an HTTP answer (LineTooLong)"),
        (b"HTTP/1.1 200 \r\n" + b"A: b\r\n" * 200 + b"\r\n", "not an HTTP answer (HTTPException)"),
        (b'HTTP/1.1 200 \r\nContent-Length: 10\r\n\r\n{"a"', "broke off"),
        (b"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "(IncompleteRead)"),
        (b"HTTP/1.1 200 \r\nContent-Length: -1\r\n\r\n[", "is not JSON"),
        (NO_CONTENT, "is empty"),
        (answer(b""), "is empty"),
        (answer(b"<html>"), "is not JSON"),
        (answer(b"\xff"), "is not JSON"),
        (answer(b"NaN"), "is not JSON"),
        (answer(b"[1e999]"), "is not JSON"),
        (answer(b"9" * 5000), "is not JSON"),
        (answer(b"[" * 200 + b"]" * 200), "is not JSON"),
        (answer(b"[" * 100_000 + b"]" * 100_000), "is not JSON"),
        (answer(b"null"), "expected an object, got nothing"),
        (answer(b"oops\n\x1b[2J", 500), r"Request failed. HTTP status 500, 'oops\n\x1b[2J'"),
        (answer(b"", 503), "Request failed. HTTP status 503"),
        (answer(b'{"x":1}', 302), 'Request failed. Object {"x": Number(1)}'),
        (
            answer({"m": 'a"b\n\x1b\\', "l": [None, True, 1.5]}, 400),
            'Request failed. Object {"l": Array [Null, Bool(true), Number(1.5)],'
            r' "m": String("a\"b\n\u{1b}\\")}',
        ),
    ],
)  # fmt: skip
def test_hostile_answers(nydusd, run, reply, text):
    nydusd.answers["GET", "/api/v1/daemon"] = reply
    assert text in failure(run("info"))


def test_answers_without_end(nydusd, run, monkeypatch):
    monkeypatch.setattr(ctl_client, "ANSWER_LIMIT", 1000)
    nydusd.answers["GET", "/api/v1/daemon"] = b"HTTP/1.1 200 \r\n\r\n" + b" " * 2000
    assert "more than 1000 bytes" in failure(run("info"))


def test_terminals_are_safe(nydusd, run):
    mount = {"backend_type": "R\x1b[2J", "mountpoint": "/", "mounted_time": "t\nError:"}
    version = DAEMON["version"] | {"package_ver": "\x9b\ud800\u202e"}
    hostile = DAEMON | {"version": version, "backend_collection": {"/\x1b": mount}}
    nydusd.answers["GET", "/api/v1/daemon"] = answer(hostile)
    status, output, _ = run("info")
    assert status == 0
    assert output.isascii()
    assert "\x1b" not in output
    assert r'"\x9b\ud800\u202e"' in output
    assert "\tMounted Time:  t\\nError:\n" in output


TEXTS = [
    (ctl_text.info_text, DAEMON),
    (ctl_text.backend_text, BACKEND),
    (ctl_text.cache_text, CACHE),
    (ctl_text.fsstats_text, FSSTATS),
    (lambda value: ctl_text.backend_rates_text(value, value, 1.0), BACKEND),
]


def places(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize(("text", "sample"), TEXTS)
@pytest.mark.parametrize(
    "new", [None, True, -1, 1.5, 1 << 64, 10**4000, "", "\0", [], [[]] * 8, {}, {"/": 1}]
)
def test_wrong_types_anywhere(text, sample, new):
    for path in places(sample):
        try:
            assert isinstance(text(replaced(sample, path, new)), str)
        except ctl_text.AnswerError as error:
            assert "the daemon's answer: expected" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("text", "sample", "not_shown"),
    [
        (*TEXTS[0], {"backend_collection"}),
        (*TEXTS[1], {"read_cumulative_latency_millis_total"}),
        (*TEXTS[2], set()),
        (*TEXTS[3], set()),
        (*TEXTS[4], {"backend_type", "read_errors"}),
    ],
)
def test_missing_and_unknown_members(text, sample, not_shown):
    assert text(sample | {"new": {"deep": [1]}}) == text(sample)
    unnoticed = set()
    for name in sample:
        try:
            text({key: value for key, value in sample.items() if key != name})
            unnoticed.add(name)
        except ctl_text.AnswerError:
            pass
    assert unnoticed == not_shown


def test_the_largest_counters():
    most = (1 << 64) - 1
    for text, sample in TEXTS:
        value = sample
        for path in places(sample):
            inner = value
            for key in path:
                inner = inner[key]
            if isinstance(inner, int):
                value = replaced(value, path, most)
        assert text(value)


def test_errors_name_the_instance():
    broken = replaced(DAEMON, ("backend_collection", "/", "backend_type"), 1)
    with pytest.raises(ctl_text.AnswerError) as caught:
        ctl_text.info_text(broken)
    assert str(caught.value) == (
        "entry /: member backend_type of the daemon's answer: expected a string, got another number"
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(suppress_health_check=list(HealthCheck), deadline=None)
@given(value=JSON)
def test_any_json(value):
    assert ctl_text.request_failed_text(value).startswith("Request failed. ")
    for text, _ in TEXTS:
        with pytest.raises(ctl_text.AnswerError):
            text(value)
