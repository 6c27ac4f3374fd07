"""A hook plug-in in Go, made with hashicorp/go-plugin, is called by `nydusify convert`."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from builder.convert.driver import HookImage
from builder.nydusify.hook.errors import PluginError
from builder.nydusify.hook.plugin import HookPlugin
from tests.fakes.oci_image import Image
from tests.fakes.oci_registry import OciRegistry
from tests.nydusify_images import nydusify


@pytest.fixture
def registry():
    with OciRegistry() as server:
        Image().add(server.repository("app"), "v1")
        yield server


@pytest.fixture
def convert(registry, peers, tmp_path, monkeypatch):
    """Convert with the plug-in; what it was told comes back."""
    monkeypatch.setenv("NYDUS_HOOK_PLUGIN_PATH", str(peers / "hookplugin"))
    monkeypatch.setenv("HOOK_RECORD", str(tmp_path / "record"))

    def run(*words):
        done = nydusify(
            "--log-level", "debug", "convert", "--source", f"{registry.host}/app:v1", "--target",
            f"{registry.host}/out:n", "--plain-http", "--work-dir", tmp_path / "work", *words,
        )  # fmt: skip
        record = tmp_path / "record"
        lines = record.read_text().splitlines() if record.exists() else []
        return done, [json.loads(line) for line in lines]

    yield run
    left = subprocess.run(["pgrep", "-f", peers / "hookplugin"], check=False, capture_output=True)
    assert left.stdout == b""


def test_plug_in_is_told_before_and_after(convert, registry):
    done, calls = convert()
    assert done.status == 0, done.stderr
    assert [one["method"] for one in calls] == ["BeforePushManifest", "AfterPushManifest"]
    out = registry.repository("out")
    manifest = json.loads(out.manifests[out.tags["n"]][1])
    for call in calls:
        assert call["bootstrap_bytes"] > 0
        assert call["source_ref"] == f"{registry.host}/app:v1"
        assert call["target_ref"] == f"{registry.host}/out:n"
        assert call["blobs"] == [
            {"id": one["digest"].removeprefix("sha256:"), "size": one["size"]}
            for one in manifest["layers"][:2]
        ]
    for text in ("called BeforePushManifest", "warned by AfterPushManifest"):
        assert text in done.stderr


@pytest.mark.parametrize(("how", "why"), [
    ("HOOK_REFUSE", "refused: größer"), ("HOOK_CRASH", "connection to the plug-in"),
])  # fmt: skip
def test_nothing_gets_the_name_without_its_consent(convert, registry, monkeypatch, how, why):
    monkeypatch.setenv(how, "BeforePushManifest")
    done, calls = convert()
    assert done.status == 1
    assert done.last.startswith(f"Failed to call hook 'BeforePushManifest': {why}")
    assert registry.repository("out").tags == {}
    assert calls == []


def test_what_it_is_told_may_be_larger_than_a_window(peers, tmp_path):
    blobs = tuple((f"{number:064x}", number) for number in range(20000))
    bootstrap = tmp_path / "boot"
    bootstrap.write_bytes(b"x")
    hook = HookPlugin(peers / "hookplugin", {**os.environ, "HOOK_RECORD": str(tmp_path / "record")})
    try:
        hook.before_push(HookImage(bootstrap, "a", "b", blobs))
    finally:
        hook.close()
    told = json.loads((tmp_path / "record").read_text())["blobs"]
    assert [(one["id"], one["size"]) for one in told] == list(blobs)


def test_one_that_hangs_is_killed(peers, tmp_path):
    environment = {**os.environ, "HOOK_HANG": "BeforePushManifest"}
    hook = HookPlugin(peers / "hookplugin", environment, call_seconds=0.5)
    with pytest.raises(PluginError, match="does not answer in time"):
        hook.before_push(HookImage(tmp_path, "a", "b", ()))
    hook.close()
