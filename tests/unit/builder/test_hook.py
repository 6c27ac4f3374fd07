"""Hook plug-ins: what a real one was recorded to say, and what a broken one may do."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from builder.convert.driver import HookImage
from builder.nydusify.hook import plugin
from builder.nydusify.hook.errors import PluginError
from builder.nydusify.hook.gob import BOOL, INT, STRING, UINT, Decoder, Encoder, SliceOf, Struct
from builder.nydusify.hook.plugin import HookPlugin
from tests.fakes.oci_image import Image
from tests.fakes.oci_registry import OciRegistry
from tests.nydusify_images import nydusify

REPOSITORY = Path(__file__).resolve().parents[3]
FAKE = REPOSITORY / "tests" / "fakes" / "hook_plugin.py"
# As it was when the answers were recorded.
IMAGE = HookImage(
    Path("/etc/hosts"),
    "localhost:5000/app:v1",
    "localhost:5000/app:n",
    (("0a" * 32, 300), ("1b" * 32, 70000)),
)


@pytest.fixture
def program(tmp_path):
    """The fake as a program; its number is in `pid`."""
    path = tmp_path / "hook"
    path.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec {sys.executable} -I {FAKE}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def start(program, tmp_path, monkeypatch):
    """Start it in a mode; it has ended when the test has."""
    monkeypatch.setattr(plugin, "_END_SECONDS", 0.5)
    started = []

    def begin(mode, **more):
        environment = {**os.environ, "HOOK_FAKE": mode, "TMPDIR": str(tmp_path)}
        started.append(HookPlugin(program, environment, **more))
        return started[-1]

    yield begin
    for one in started:
        one.close()
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()


def test_calls_are_those_that_the_real_one_understood(start, caplog):
    caplog.set_level("DEBUG")
    hook = start("good")
    hook.before_push(IMAGE)
    hook.after_push(IMAGE)
    hook.close()
    texts = caplog.text
    assert "[HOOK] Call hook 'AfterPushManifest'" in texts
    for said in ("printed", "after the line", "to be logged"):
        assert f"plug-in says: {said}" in texts


def test_refusal_is_told_in_its_own_words(start):
    hook = start("refused")
    with pytest.raises(PluginError, match="'BeforePushManifest': refused: größer"):
        hook.before_push(IMAGE)


@pytest.mark.parametrize(
    "mode",
    [
        "crash", "version", "kind", "too much", "strange stream", "widened", "away",
        "endless message", "empty message", "number of 100 bytes", "value of an unknown type",
        "cut text",
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error(start, mode):
    hook = start(mode)
    with pytest.raises(PluginError, match="Failed to call hook 'BeforePushManifest'"):
        hook.before_push(IMAGE)


@pytest.mark.parametrize("mode", ["hang", "stubborn"])
def test_one_that_hangs_is_killed(start, mode):
    hook = start(mode, call_seconds=0.2)
    with pytest.raises(PluginError, match="does not answer in time"):
        hook.before_push(IMAGE)
    (socket,) = Path(hook._sockets.name).iterdir()
    hook.close()
    assert not socket.parent.exists()


@pytest.mark.parametrize("mode", ["chatty", "other version", "grpc", "tcp", "tls", "nowhere"])
def test_other_programs_are_refused_and_ended(start, mode, tmp_path):
    with pytest.raises(PluginError, match=str(tmp_path / "hook")):
        start(mode)


def test_programs_that_end_or_are_not_there(tmp_path):
    with pytest.raises(PluginError, match="no plug-in of go-plugin"):
        HookPlugin(Path("/bin/true"), {})
    with pytest.raises(PluginError, match="cannot be started"):
        HookPlugin(tmp_path / "nothing", {})


def _decoder(data):
    parts = iter([data])
    buffer = bytearray()

    def read(length):
        buffer.extend(next(parts, b""))
        if len(buffer) < length:
            raise PluginError("end")
        piece = bytes(buffer[:length])
        del buffer[:length]
        return piece

    return Decoder(read)


def test_values_come_back():
    kind = Struct("T", {"Text": STRING, "Number": INT, "Flag": BOOL, "Count": UINT, "No": STRING})
    value = {"Text": "ü" * 200, "Number": -(1 << 40), "Flag": True, "Count": 1 << 63, "No": ""}
    encoder = Encoder()
    data = encoder.encode(kind, value) + encoder.encode(kind, value) + encoder.encode(UINT, 7)
    decoder = _decoder(data)
    assert decoder.struct() == {key: one for key, one in value.items() if one}
    decoder.skip()
    assert decoder.number() == 7


def test_every_cut_of_a_message_is_an_error():
    data = Encoder().encode(Struct("T", {"A": STRING, "B": SliceOf(INT)}), {"A": "x", "B": [1]})
    for length in range(len(data)):
        with pytest.raises(PluginError):
            _decoder(data[:length]).struct()
    for place in range(len(data)):
        for value in (0, 1, 0x7F, 0xFF):
            broken = data[:place] + bytes((value,)) + data[place + 1 :]
            with contextlib.suppress(PluginError):
                _decoder(broken).struct()


@pytest.fixture
def registry():
    with OciRegistry() as server:
        Image().add(server.repository("app"), "v1")
        yield server


@pytest.fixture
def convert(registry, tmp_path, program, monkeypatch):
    monkeypatch.setenv("NYDUS_HOOK_PLUGIN_PATH", str(program))

    def run(*words):
        return nydusify(
            "convert", "--source", f"{registry.host}/app:v1", "--target",
            f"{registry.host}/out:n", "--plain-http", "--push-retry-delay", "1ms",
            "--work-dir", tmp_path / "work", *words,
        )  # fmt: skip

    return run


class _Recorder:
    """A plug-in in this process: which calls there were, and which tags at that time."""

    def __init__(self, target):
        self.calls = []
        self.target = target
        self.refuses = ""
        self.closed = 0

    def _call(self, method, image):
        assert image.bootstrap.stat().st_size > 0
        self.calls.append((method, image, dict(self.target.tags)))
        if method == self.refuses:
            raise PluginError(f"Failed to call hook '{method}': no")

    def before_push(self, image):
        self._call("BeforePushManifest", image)

    def after_push(self, image):
        self._call("AfterPushManifest", image)

    def close(self):
        self.closed += 1


@pytest.fixture
def hook(registry, monkeypatch):
    recorder = _Recorder(registry.repository("out"))
    monkeypatch.setattr("builder.nydusify.convert.HookPlugin", lambda *_: recorder)
    return recorder


def test_conversion_calls_before_and_after(convert, registry, hook):
    done = convert()
    assert done.status == 0, done.stderr
    out = registry.repository("out")
    manifest = json.loads(out.manifests[out.tags["n"]][1])
    (before, image, tags), (after, same, later) = hook.calls
    assert (before, after) == ("BeforePushManifest", "AfterPushManifest")
    assert image == same
    assert tags == {}
    assert "n" in later
    assert image.source == f"{registry.host}/app:v1"
    assert image.target == f"{registry.host}/out:n"
    layers = [one for one in manifest["layers"] if one["mediaType"].endswith("blob.v1")]
    assert [(one["digest"][7:], one["size"]) for one in layers] == list(image.blobs)
    assert hook.closed == 1


def test_refusal_before_the_push_leaves_no_tag(convert, registry, hook):
    hook.refuses = "BeforePushManifest"
    done = convert("--build-cache-tag", "cache")
    assert done.status == 1
    assert done.last == "Failed to call hook 'BeforePushManifest': no"
    assert registry.repository("out").tags == {}
    assert registry.repository("out").manifests == {}
    assert hook.closed == 1


def test_failure_after_the_push_is_an_error(convert, registry, hook):
    hook.refuses = "AfterPushManifest"
    assert convert().status == 1
    assert "n" in registry.repository("out").tags
    assert hook.closed == 1


def test_plug_in_that_cannot_be_used_stops_at_once(convert, registry, monkeypatch):
    monkeypatch.setenv("HOOK_FAKE", "grpc")
    done = convert()
    assert done.status == 1
    assert "plug-in wants another transport" in done.last
    assert registry.repository("out").blobs == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_plug_in_ends_with_the_command(registry, program, tmp_path, number):
    process = subprocess.Popen(
        [sys.executable, "-m", "builder.nydusify", "convert", "--source",
         f"{registry.host}/app:v1", "--target", f"{registry.host}/out:n", "--plain-http",
         "--no-proof", "--work-dir", tmp_path / "work"],
        cwd=REPOSITORY, stderr=subprocess.PIPE,
        env={**os.environ, "HOOK_FAKE": "hang", "NYDUS_HOOK_PLUGIN_PATH": str(program)},
    )  # fmt: skip
    line = b""
    while b"Call hook 'BeforePushManifest'" not in line:
        line = process.stderr.readline()
        assert line
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert not Path("/proc", (tmp_path / "pid").read_text().strip()).exists()
    assert registry.repository("out").tags == {}
