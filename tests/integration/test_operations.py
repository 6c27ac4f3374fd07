"""What operators see of a running nydusd: readiness, metrics, events, stacks, logs, doctor."""

import contextlib
import http.client
import json
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from capabilities import missing, need_tool, requires
from fakes.blob_server import BlobServer
from leftovers import loops_over
from prometheus_client.parser import text_string_to_metric_families
from serving import TIMEOUT, build_image, wait_until, write_config

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "docs/systemd").glob("*.service"))
CONTENT = b"served\n" * 1000
OK = ("erofs", "-B", "boot", "-M", "mnt", "-C", "config.json")


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    top = tmp_path_factory.mktemp("operations")
    (top / "source").mkdir()
    (top / "source/file").write_bytes(CONTENT)
    return build_image(top / "source", top / "image")


@pytest.fixture
def home(serving, image):
    """A directory with `boot`, `mnt` and `config.json`, and the blobs behind it."""
    (serving.directory / "boot").write_bytes(image.bootstrap.read_bytes())
    serving.mountpoint("mnt")
    write_config(serving.directory / "config.json", image)
    return serving.directory


def ask(sock, path):
    """Send a GET over the API's socket; return content type and body."""
    connection = http.client.HTTPConnection("localhost", timeout=TIMEOUT)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(TIMEOUT)
    connection.sock.connect(str(sock))
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 200
        return answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


def samples(body):
    families = text_string_to_metric_families(body.decode())
    return {
        (sample.name, sample.labels.get("mountpoint")): sample.value
        for family in families
        for sample in family.samples
    }


class Manager:
    """A service manager: hears what a service says of itself.

    A thread takes what comes: the kernel keeps ten messages, and drops others.
    """

    def __init__(self, stack, path):
        self.path = path
        self.receiver = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.receiver.bind(str(path))
        self.messages = queue.Queue()
        thread = threading.Thread(target=self._listen)
        thread.start()
        stack.callback(thread.join)
        stack.callback(self._stop)

    def _listen(self):
        while message := self.receiver.recv(4096):
            self.messages.put(message.decode().splitlines())

    def _stop(self):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", str(self.path))

    def message(self, skip="WATCHDOG=1", timeout=TIMEOUT):
        """Return the next message that is not of the watchdog."""
        while True:
            lines = self.messages.get(timeout=timeout)
            if lines[0] != skip:
                return lines

    def drain(self):
        """Forget what has come already."""
        with contextlib.suppress(queue.Empty):
            while True:
                self.messages.get_nowait()


def test_service_manager_is_told(serving, home, stack):
    manager = Manager(stack, home / "notify")
    daemon = serving.nydusd(*OK, cwd=home, NOTIFY_SOCKET=str(manager.path), WATCHDOG_USEC="200000")
    ready = manager.message()
    assert ready == ["READY=1", "STATUS=RUNNING: 1 mounts at mnt, 0 reads wait"]
    assert os.path.ismount(home / "mnt")
    assert manager.message(skip="")[0] == "WATCHDOG=1"
    # A reader keeps the mount: signs of life go on while the daemon waits for it.
    file = os.open(home / "mnt/file", os.O_RDONLY)
    daemon.send(signal.SIGTERM)
    assert manager.message()[0] == "STOPPING=1"
    for _ in range(3):
        assert manager.message(skip="")[0] == "WATCHDOG=1"
    assert daemon.process.poll() is None
    os.close(file)
    assert daemon.end() == 0


def test_a_hung_intake_is_told_to_nobody(serving, home, stack):
    """Stop one intake thread for good, as a deadlock would: the signs of life end."""
    manager = Manager(stack, home / "notify")
    code = """
import sys, threading
from fscache import heartbeat
from fscache.channel import fanotify
from fscache.cli.nydusd import main
from fscache.service import Service
heartbeat.LATE_SECONDS = 3.0
fanotify.BEAT_SECONDS = 0.2
def a_deadlock(service, request, reply):
    threading.Event().wait()
Service.handle = a_deadlock
sys.exit(main(sys.argv[1:]))
"""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "NOTIFY_SOCKET": str(manager.path),
        "WATCHDOG_USEC": "100000",
    }
    with open(home / "stderr", "wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *OK], cwd=home, env=environment, stderr=errors
        )
    stack.callback(process.wait, TIMEOUT)
    stack.callback(process.kill)
    assert manager.message()[0] == "READY=1"
    assert manager.message(skip="")[0] == "WATCHDOG=1"
    reader = serving.child("import sys; open(sys.argv[1], 'rb').read()", home / "mnt/file")
    wait_until(lambda: "intake of events: no move for" in (home / "stderr").read_text())
    manager.drain()
    with pytest.raises(queue.Empty):
        manager.message(skip="", timeout=2)
    assert "no sign of life" in (home / "stderr").read_text()
    # What systemd does then; the stacks say where it hangs.
    process.send_signal(signal.SIGABRT)
    process.wait(TIMEOUT)
    assert "in a_deadlock" in (home / "stderr").read_text()
    reader.close()


def test_stacks_on_demand(serving, home):
    daemon = serving.nydusd(*OK, "-L", "daemon", cwd=home)
    log = home / "daemon.log"
    wait_until(lambda: log.exists() and "serving " in log.read_text())
    daemon.send(signal.SIGUSR1)
    # Every thread of the daemon has a stack: the main one, intake, workers.
    for name in ("wait", "_run", "_work", "_sync_loop", "_deadline_loop", "_reap_loop"):
        stack = re.compile(rf'^  File ".*", line \d+ in {name}$', re.MULTILINE)
        wait_until(lambda stack=stack: stack.search(log.read_text()))
    assert serving.read(home / "mnt/file") == CONTENT
    log.rename(home / "old.log")
    daemon.send(signal.SIGHUP)
    daemon.send(signal.SIGTERM)
    assert daemon.end() == 0
    assert "state RUNNING -> STOPPED" in log.read_text()


def test_end_of_the_terminal_is_an_orderly_end(serving, home):
    daemon = serving.nydusd(*OK, cwd=home)
    daemon.wait_for("serving ")
    daemon.send(signal.SIGHUP)
    assert daemon.end() == 0
    assert not os.path.ismount(home / "mnt")


def test_metrics_by_socket_and_by_port(serving, home):
    daemon = serving.nydusd(*OK, "-A", "api", "--prometheus", "0", cwd=home)
    daemon.wait_for("serving ")
    port = int(re.search(r"metrics at 127\.0\.0\.1, port (\d+)", daemon.stderr)[1])
    assert serving.read(home / "mnt/file") == CONTENT
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    by_port = samples(answer.read())
    kind, body = ask(home / "api", "/metrics")
    assert kind == answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    by_socket = samples(body)
    assert by_port.keys() == by_socket.keys()
    for values in (by_port, by_socket):
        assert values["nydusd_chunks_fetched_total", "/"] == 1
        assert values["nydusd_cache_chunks_ready", "/"] == 1
        assert values["nydusd_read_duration_seconds_count", "/"] >= 1
        assert values["nydusd_backend_bytes_total", "/"] > 0
        assert values["nydusd_waiting_reads", None] == 0
    daemon.send(signal.SIGTERM)
    assert daemon.end() == 0


def test_a_port_that_is_taken_is_an_error(serving, home):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        daemon = serving.nydusd(*OK, "--prometheus", port, cwd=home)
        assert daemon.end() == 1
    assert f"Error: metrics cannot be served at 127.0.0.1:{port}" in daemon.stderr
    assert not os.path.ismount(home / "mnt")


def test_events_tell_why_reads_fail(serving, home, image):
    with BlobServer(image.blobs()) as server:
        backend = {"type": "http-proxy", "config": {"addr": server.address, "retry_limit": 1}}
        config = {
            "version": 2,
            "backend": {"type": "http-proxy", "http-proxy": backend["config"]},
            "cache": {"type": "blobcache", "filecache": {"work_dir": str(home / "cache")}},
        }
        (home / "config.json").write_text(json.dumps(config))
        daemon = serving.nydusd(*OK, "-A", "api", cwd=home)
        daemon.wait_for("serving ")
        assert json.loads(ask(home / "api", "/api/v1/daemon/events")[1])["errors"] == []
        server.blobs.clear()
        serving.read_fails(home / "mnt/file")
        events = json.loads(ask(home / "api", "/api/v1/daemon/events")[1])
        (blob_id,) = image.blobs()
        assert events["total_errors"] == len(events["errors"]) > 0
        assert re.search(rf" GMT - blob {blob_id}.*: no such blob", events["errors"][0])
        assert samples(ask(home / "api", "/metrics")[1])["nydusd_errors_total", None] > 0
        daemon.send(signal.SIGTERM)
        assert daemon.end() == 0


@pytest.mark.parametrize(
    "words", [("--prometheus", "x"), ("--prometheus", "1.2.3.4"), ("--log-rotation-size", "-1")]
)
def test_wrong_words(serving, home, words):
    daemon = serving.nydusd(*OK, *words, cwd=home)
    assert daemon.end() == 2
    assert daemon.stderr.startswith("error: ")


# nydusd doctor


def doctor(*words, **options):
    program = Path(sys.executable).with_name("nydusd")
    return subprocess.run(
        [program, "doctor", *words], capture_output=True, text=True, check=False, **options
    )


# Mounts of other tests do not come into a namespace of its own; some go, with their directories.
ALONE = """cat /proc/self/mountinfo >before; "$@"; status=$?
cat /proc/self/mountinfo >after; exit $status"""


def test_doctor_agrees_with_the_daemon_and_leaves_nothing(tmp_path):
    work_dir = tmp_path / "work"
    work_dir.mkdir()
    program = Path(sys.executable).with_name("nydusd")
    result = subprocess.run(
        ["unshare", "--mount", "sh", "-c", ALONE, "sh",
         program, "doctor", "--work-dir", work_dir, "--json"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    before, after = ((tmp_path / name).read_text().splitlines() for name in ("before", "after"))
    assert set(after) <= set(before)
    assert list(work_dir.rglob("*")) == []
    wait_until(lambda: loops_over(work_dir) == [])
    report = json.loads(result.stdout)
    assert report["lazy"]
    assert report["chosen"] == "fanotify on plain files"
    assert report["work_dir"] == str(work_dir)
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert verdicts["lazy read, tried"] == verdicts["privilege"] == verdicts["EROFS"] == "yes"


def test_doctor_whose_reader_has_seen_enough(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    program = Path(sys.executable).with_name("nydusd")
    with open(writing, "wb") as closed:
        done = subprocess.run(
            [program, "doctor", "--work-dir", tmp_path],
            stdout=closed, stderr=subprocess.PIPE, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


def test_doctor_on_a_directory_that_does_not_do(serving):
    directory = serving.mountpoint()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", directory], check=True)
    result = doctor("--work-dir", directory)
    assert "a directory on ext4, xfs or btrfs" in result.stdout
    # FUSE takes any directory.
    lazy = "\nTransport: FUSE\n" in result.stdout
    assert lazy == (missing("fuse") is None)
    assert result.returncode == (0 if lazy else 1)
    assert result.stdout.endswith(f"Lazy reading: {'yes' if lazy else 'no'}\n")


def test_doctor_for_a_directory_to_be_made(tmp_path):
    result = doctor("--work-dir", tmp_path / "a/b")
    assert result.returncode == 0
    assert f"{tmp_path}: " in result.stdout
    assert not (tmp_path / "a").exists()


def test_doctor_without_privilege():
    # Everything is imported before: the interpreter may be where only root may look.
    code = """
import os, sys
from pathlib import Path
from fscache.doctor.report import doctor
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
sys.exit(doctor(Path("/"), as_json=False))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    # Where everybody may open /dev/fuse there is that.
    by_fuse = "\nTransport: FUSE\n" in result.stdout
    assert (result.returncode, result.stderr) == (0 if by_fuse else 1, "")
    assert "-> run as root; in a container with --privileged" in result.stdout
    assert by_fuse or "\nTransport: none\n" in result.stdout


def test_doctor_of_a_file(home):
    result = doctor("--work-dir", home / "boot")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"Error: {home}/boot: Not a directory\n"


# Unit files


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_unit_files(unit, tmp_path):
    analyze = need_tool("systemd-analyze")
    # The program of the unit need not be installed here.
    text = unit.read_text()
    program = re.search(r"^ExecStart=(\S+)", text, re.MULTILINE)[1]
    copy = tmp_path / unit.name.replace("@", "@x")
    copy.write_text(text.replace(program, str(Path(sys.executable).with_name("nydusd"))))
    result = subprocess.run([analyze, "verify", "--man=no", copy], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_unit_files_serve_what_they_promise():
    (unit,) = UNITS
    settings = dict(
        line.split("=", 1) for line in unit.read_text().splitlines() if re.match(r"\w+=", line)
    )
    # A killed holder, or a daemon killed while readers are there, would give them zeros.
    assert settings["Type"] == "notify"
    assert settings["KillMode"] == "process"
    assert settings["SendSIGKILL"] == "no"
    assert settings["TimeoutStopSec"] == "infinity"
    assert int(settings["WatchdogSec"].rstrip("s")) >= 60
    assert int(settings["OOMScoreAdjust"]) < 0
    assert int(settings["LimitNOFILE"]) >= 1 << 20
