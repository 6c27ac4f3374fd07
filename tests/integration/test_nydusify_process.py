"""nydusify as a process: killed, interrupted, out of space, watched on a terminal, with secrets."""

from __future__ import annotations

import base64
import json
import os
import pty
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.capabilities import requires
from tests.fakes.oci_image import Image, layer, member
from tests.fakes.oci_registry import Fault, OciRegistry
from tests.fakes.registry import PASSWORD, USER

WAIT_SECONDS = 60
REPOSITORY = Path(__file__).resolve().parents[2]
LAYERS = [
    layer(member(f"file{number}", random.Random(number).randbytes(3 << 20))) for number in range(2)
]


@pytest.fixture
def registry():
    with OciRegistry() as server:
        Image(LAYERS).add(server.repository("app"), "v1")
        yield server
        server.released.set()


def _layer_digest(registry, number):
    app = registry.repository("app")
    manifest = json.loads(app.manifests[app.tags["v1"]][1])
    return manifest["layers"][number]["digest"]


def _words(registry, tmp_path, *more):
    return [
        sys.executable, "-m", "builder.nydusify", "convert", "--source",
        f"{registry.host}/app:v1", "--target", f"{registry.host}/out:n", "--plain-http",
        "--work-dir", str(tmp_path / "work"), "--push-retry-delay", "10ms", *map(str, more),
    ]  # fmt: skip


def _start(words, **more):
    return subprocess.Popen(
        words, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, start_new_session=True, **more,
    )  # fmt: skip


def _wait(condition, process):
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < end
        time.sleep(0.02)


def _reads(registry, number):
    digest = _layer_digest(registry, number)
    return sum(line.startswith(f"GET /v2/app/blobs/{digest}") for line in registry.log)


def test_killed_conversion_goes_on_with_what_it_had(registry, tmp_path):
    records = tmp_path / "records"
    stalled = f"app/blobs/{_layer_digest(registry, 1)}"
    registry.faults.append(Fault("GET", stalled, "stall", count=99))
    process = _start(_words(registry, tmp_path, "--build-cache-dir", records))
    _wait((records / "layers.json").exists, process)
    process.kill()
    process.communicate(timeout=WAIT_SECONDS)
    assert registry.repository("out").tags == {}
    assert _reads(registry, 0) == 1
    registry.faults.clear()
    registry.released.set()
    words = _words(registry, tmp_path, "--build-cache-dir", records, "--no-proof")
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert _reads(registry, 0) == 1, "the layer that was done is not read again"
    assert "n" in registry.repository("out").tags


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", ["GET app/blobs/sha", "PUT out/blobs", "PUT out/manifests/n"])
def test_signal_ends_it_with_one_line(registry, tmp_path, number, where):
    method, path = where.split()
    registry.faults.append(Fault(method, path, "stall", count=99))
    process = _start(_words(registry, tmp_path))
    _wait(lambda: registry.faults[0].count < 99, process)
    process.send_signal(number)
    registry.released.set()
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 128 + number
    last = errors.decode().splitlines()[-1]
    assert 'level=fatal msg="interrupted' in last
    assert b"Traceback" not in errors
    assert registry.repository("out").tags == {}
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.root
@requires("root")
def test_full_disk_is_named(registry, tmp_path):
    """The metadata of a layer does not fit into the work directory."""
    many = layer(*(member(f"a-name-that-is-long-{number:06}") for number in range(3000)))
    Image([many]).add(registry.repository("app"), "v1")
    work = tmp_path / "work"
    work.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", work], check=True)
    try:
        words = _words(registry, tmp_path)
        done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, timeout=120, check=False)
        assert list(work.iterdir()) == []
    finally:
        subprocess.run(["umount", work], check=True)
    text = done.stderr.decode()
    assert done.returncode == 1
    assert "No space left on device" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert registry.repository("out").tags == {}


def _shown(words):
    """Run a command on a terminal; return what is shown."""
    master, slave = pty.openpty()
    try:
        process = subprocess.Popen(
            words, cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=slave,
        )  # fmt: skip
        os.close(slave)
        shown = b""
        while piece := _read(master):
            shown += piece
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        os.close(master)
    return shown


def test_progress_is_for_terminals(registry, tmp_path):
    registry.drip = 16 << 10
    shown = _shown(_words(registry, tmp_path))
    assert re.search(rb"\rconverting: \d+ MB", shown)
    assert re.search(rb"\rcomparing: \d+ MB", shown)
    # Log lines stand on lines of their own.
    assert not re.search(rb"MB[^\r\n]*time=", shown.replace(b"\r\033[K", b"\r"))
    done = subprocess.run(
        _words(registry, tmp_path), cwd=REPOSITORY, capture_output=True, timeout=120, check=True
    )
    assert b"\r" not in done.stderr + done.stdout


def test_copy_and_build_show_progress(registry, tmp_path):
    nydusify = [sys.executable, "-m", "builder.nydusify"]
    source, target = f"{registry.host}/app:v1", f"oci:{tmp_path}/layout"
    words = ["copy", "--plain-http", "--source", source, "--target", target]
    assert re.search(rb"\rcopying: \d+ MB", _shown([*nydusify, *words]))
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(bytes(1 << 20))
    words = ["build", "--source-dir", f"{tmp_path}/tree", "--output-dir", f"{tmp_path}/out"]
    assert re.search(rb"\rchunking: \d+ MB", _shown([*nydusify, *words, "--name", "n"]))


def _read(descriptor):
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:
        # What a terminal answers when its last writer has gone.
        return b""


def _everything(tmp_path, docker):
    for path in tmp_path.rglob("*"):
        if path.is_file() and docker not in path.parents:
            yield str(path), path.read_bytes()


def _arguments(process):
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("ends", ["well", "badly", "killed"])
def test_secrets_are_in_nothing_that_is_written(registry, tmp_path, ends):
    registry.auth = "bearer"
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    docker = tmp_path / "docker"
    docker.mkdir()
    (docker / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
    words = _words(
        registry, tmp_path, "--build-cache", f"{registry.host}/cache:c", "--build-cache-dir",
        tmp_path / "records", "--proof", tmp_path / "proof.json", "--output-json",
        tmp_path / "metrics.json",
    )  # fmt: skip
    words[3:3] = ["-D", "--log-file", str(tmp_path / "log")]
    if ends != "well":
        what = 403 if ends == "badly" else "stall"
        registry.faults.append(Fault("PUT", "out/manifests", what, count=99))
    process = _start(words, env={**os.environ, "DOCKER_CONFIG": str(docker)})
    texts = [("arguments", _arguments(process))]
    if ends == "killed":
        _wait(lambda: registry.faults[0].count < 99, process)
        # With everything that it would remove in the end.
        texts += _everything(tmp_path, docker)
        process.kill()
    output, errors = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode == 0) == (ends == "well"), errors.decode()
    texts += [("output", output), ("errors", errors), *_everything(tmp_path, docker)]
    for name, repository in registry.repositories.items():
        texts += [(name, data) for _, data in repository.manifests.values()]
        texts += [(name, data) for data in repository.blobs.values()]
    assert (tmp_path / "log").stat().st_size
    for secret in (PASSWORD, auth, "t0k3n-"):
        assert [name for name, text in texts if secret.encode() in text] == []
