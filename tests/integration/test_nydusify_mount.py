"""`nydusify mount` and `check --mount`, and `nydusd erofs --image`: from a name to a tree."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from serving import wait_until

from tests.fakes.model_artifact import add_model
from tests.fakes.object_store import SECRET, ObjectStoreServer
from tests.fakes.oci_image import Image, layer, member
from tests.fakes.oci_registry import OciRegistry
from tests.nydusify_images import nydusify

WAIT_SECONDS = 60
REPOSITORY = Path(__file__).resolve().parents[2]


def _wait(condition, process):
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.fixture
def layout(tmp_path):
    """An image in a folder: nothing has to be served while it is read."""
    target = f"oci:{tmp_path}/image:n"
    with OciRegistry() as registry:
        Image().add(registry.repository("app"), "v1")
        words = ("convert", "--source", f"{registry.host}/app:v1", "--plain-http")
        done = nydusify(*words, "--target", target, "--work-dir", tmp_path / "w")
        assert done.status == 0, done.stderr
        yield target, f"{registry.host}/app:v1"


def _start(words, tmp_path):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        cwd=REPOSITORY,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def _mounted(tmp_path, words, look=lambda: None):
    """Run a program that mounts at `mnt`, read from it, and end it by a signal to it alone."""
    mountpoint = tmp_path / "mnt"
    process = _start(words, tmp_path)
    try:
        _wait(mountpoint.is_mount, process)
        content = subprocess.run(
            ["cat", mountpoint / "etc" / "conf"], check=True, capture_output=True, timeout=60
        ).stdout
        names = sorted(os.listdir(mountpoint))
        look()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=WAIT_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, errors.decode()
    assert not mountpoint.is_mount()
    return content, names


@pytest.fixture
def _can_mount(tmp_path):
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("/dev/fuse cannot be opened")


@pytest.mark.usefixtures("_can_mount")
@pytest.mark.parametrize("work", ["mw", "longer than the path of a socket may be " * 3])
def test_mount_until_a_signal(layout, tmp_path, work):
    """The real tool leaves mount and daemon behind when the signal is for it alone."""
    target, _ = layout
    words = ("builder.nydusify", "mount", "--target", target, "--mount-path", tmp_path / "mnt",
             "--work-dir", tmp_path / work)  # fmt: skip
    content, names = _mounted(tmp_path, words)
    assert content == b"two\n"
    assert names == ["data", "dir", "etc", "null"]
    assert list((tmp_path / work).iterdir()) == []


@pytest.mark.usefixtures("_can_mount")
@pytest.mark.parametrize("kind", ["s3", "oss"])
def test_mount_with_the_data_in_a_bucket(kind, tmp_path):
    """Keys go into a file that is gone when the image is there."""
    with OciRegistry() as registry, ObjectStoreServer(kind) as bucket:
        Image().add(registry.repository("app"), "v1")
        config = tmp_path / "config.json"
        config.write_text(json.dumps(bucket.config(object_prefix="blobs/")))
        place = ("--backend-type", kind, "--backend-config-file", config)
        target = f"{registry.host}/out:n"
        done = nydusify(
            "convert", "--source", f"{registry.host}/app:v1", "--target", target, "--plain-http",
            "--work-dir", tmp_path / "w", *place,
        )  # fmt: skip
        assert done.status == 0, done.stderr
        words = (
            "builder.nydusify", "mount", "--target", target, "--target-insecure", "--mount-path",
            tmp_path / "mnt", "--work-dir", tmp_path / "mw", *place,
        )  # fmt: skip

        def look():
            paths = [one for one in (tmp_path / "mw").rglob("*") if "cache" not in one.parts]
            assert paths
            # The tool looks for the mount now and then, too.
            wait_until(lambda: not any(_has_secret(path) for path in paths))

        content, _ = _mounted(tmp_path, words, look)
    assert content == b"two\n"


def _has_secret(path):
    with contextlib.suppress(FileNotFoundError):
        return path.is_file() and SECRET.encode() in path.read_bytes()
    return False


@pytest.mark.usefixtures("_can_mount")
def test_mount_of_a_model(tmp_path):
    """The files are read from the artifact's own tars."""
    weights = bytes(range(256)) * 9000
    tars = [
        ("application/vnd.cnai.model.weight.v1.tar", layer(member("model.bin", weights))),
        ("application/vnd.cnai.model.doc.v1.tar", layer(member("etc/conf", b"two\n"))),
    ]
    with OciRegistry() as registry:
        add_model(registry.repository("models"), "v1", tars)
        reference = f"{registry.host}/models"
        done = nydusify(
            "convert", "--source", f"{reference}:v1", "--target", f"{reference}:n", "--plain-http",
            "--source-backend-type", "model-artifact", "--work-dir", tmp_path / "w",
        )  # fmt: skip
        assert done.status == 0, done.stderr
        words = (
            "builder.nydusify", "mount", "--target", f"{reference}:n", "--target-insecure",
            "--mount-path", tmp_path / "mnt", "--work-dir", tmp_path / "mw",
        )  # fmt: skip
        sums = []

        def look():
            found = subprocess.run(
                ["sha256sum", tmp_path / "mnt" / "model.bin"], check=True, capture_output=True,
                timeout=60,
            )  # fmt: skip
            sums.append(found.stdout.split()[0].decode())

        content, names = _mounted(tmp_path, words, look)
    assert content == b"two\n"
    assert names == ["etc", "model.bin"]
    assert sums == [hashlib.sha256(weights).hexdigest()]


@pytest.mark.usefixtures("_can_mount")
def test_daemon_takes_an_image_by_its_name(layout, tmp_path):
    target, _ = layout
    words = ("fscache", "erofs", "--image", target, "--mountpoint", tmp_path / "mnt")
    assert _mounted(tmp_path, words)[0] == b"two\n"


def test_daemon_refuses_words_that_do_not_go_together(tmp_path):
    for words in (("--image", "x", "--bootstrap", "y"), ()):
        process = _start(("fscache", "erofs", "--mountpoint", tmp_path, *words), tmp_path)
        process.communicate(timeout=WAIT_SECONDS)
        assert process.returncode == 2


@pytest.mark.usefixtures("_can_mount")
def test_check_by_the_kernel(layout, tmp_path):
    target, source = layout
    words = ("check", "--source", source, "--target", target, "--plain-http")
    done = nydusify(*words, "--mount", "--work-dir", tmp_path / "out")
    assert done.status == 0, done.stderr
    assert not (tmp_path / "out" / "target" / "mnt").is_mount()


def test_image_that_is_not_nydus_cannot_be_mounted(tmp_path):
    with OciRegistry() as registry:
        Image().add(registry.repository("app"), "v1")
        done = nydusify(
            "mount", "--target", f"{registry.host}/app:v1", "--plain-http", "--mount-path",
            tmp_path / "mnt", "--work-dir", tmp_path / "w",
        )  # fmt: skip
    assert done.status == 1
    assert "is no Nydus image" in done.last
