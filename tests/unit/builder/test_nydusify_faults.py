"""Whole conversions through a registry that misbehaves, while it is read and while it is pushed."""

from __future__ import annotations

import base64
import json
import random
import time

import pytest

from builder.nydusify.places import Places
from tests.fakes.oci_image import Image, layer, member
from tests.fakes.oci_registry import Fault, OciRegistry
from tests.fakes.registry import PASSWORD, USER
from tests.nydusify_images import nydusify

CHUNK_BYTES = 64 << 10
CONTENT = random.Random(8).randbytes(600_000)
PULL, PIECE, END = "GET /v2/app/blobs", "PATCH /v2/out/blobs", "PUT /v2/out/blobs"
NAMES = ("HEAD /v2/out/manifests", "PUT /v2/out/manifests")


@pytest.fixture
def registry(monkeypatch):
    """Layers of several pieces, in a registry that wants tokens."""
    usual = Places.settings
    monkeypatch.setattr(
        Places, "settings", lambda self, insecure, size=0: usual(self, insecure, CHUNK_BYTES)
    )
    with OciRegistry() as server:
        tar = layer(member("large", CONTENT), member("small", b"x"))
        Image([tar]).add(server.repository("app"), "v1")
        server.auth = "bearer"
        yield server


@pytest.fixture
def convert(registry, tmp_path, monkeypatch):
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    def run(*words):
        return nydusify(
            "convert", "--source", f"{registry.host}/app:v1", "--target",
            f"{registry.host}/out:n", "--plain-http", "--work-dir", tmp_path / "work",
            "--push-retry-delay", "1ms", "--push-retry-count", "3", *words,
        )  # fmt: skip

    return run


def _fault(where, what, **more):
    method, path = where.split()
    return Fault(method, path, what, **more)


def _check_published(registry, tmp_path):
    done = nydusify(
        "check", "--source", f"{registry.host}/app:v1", "--target", f"{registry.host}/out:n",
        "--plain-http", "--work-dir", tmp_path / "check",
    )  # fmt: skip
    assert done.status == 0, done.stderr


@pytest.mark.parametrize("where", [PULL, PIECE, END, *NAMES])
@pytest.mark.parametrize("what", ["expire", "reset", "lose", 429, 503])
def test_moment_is_overcome(registry, convert, tmp_path, where, what):
    headers = {"Retry-After": "0"} if what in (429, 503) else {}
    # A token that is refused as soon as it was given is no matter of a moment.
    count = 1 if what == "expire" else 2
    registry.faults.append(_fault(where, what, count=count, skip=1, headers=headers))
    if where in NAMES:
        registry.faults[-1].skip = 0
    done = convert()
    assert done.status == 0, done.stderr
    assert registry.faults[0].count < count, "it happened"
    _check_published(registry, tmp_path)


@pytest.mark.parametrize("where", [PULL, PIECE])
def test_retry_after_is_waited_for(registry, convert, where):
    registry.faults.append(_fault(where, 429, headers={"Retry-After": "1"}))
    start = time.monotonic()
    assert convert("--no-proof").status == 0
    assert time.monotonic() - start >= 1


def test_broken_transfer_of_a_registry_without_ranges(registry, convert, tmp_path):
    registry.faults += [
        _fault(PULL, "truncate", skip=1), _fault(PULL, "ignore-range", count=9),
    ]  # fmt: skip
    done = convert("--no-proof")
    assert done.status == 0, done.stderr
    _check_published(registry, tmp_path)


def test_slow_registry_is_waited_for(registry, convert, tmp_path):
    registry.drip = 16 << 10
    done = convert()
    assert done.status == 0, done.stderr
    _check_published(registry, tmp_path)


def test_forgotten_upload_begins_anew(registry, convert, tmp_path):
    registry.faults.append(_fault(PIECE, 404, skip=3))
    done = convert()
    assert done.status == 0, done.stderr
    assert "begins anew" in done.stderr
    _check_published(registry, tmp_path)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (PULL, "damage"), (PULL, "truncate"), (PULL, 404), (PULL, 403), (PULL, 429),
        (PIECE, "reset"), (PIECE, 404), (PIECE, 403), (PIECE, 429), (PIECE, 507), (END, 400),
        (END, "reset"), (NAMES[0], 403), (NAMES[1], 400), (NAMES[1], 413), (NAMES[1], "reset"),
    ],
)  # fmt: skip
def test_what_does_not_pass_leaves_no_name(registry, convert, tmp_path, where, what):
    registry.faults.append(_fault(where, what, count=1000))
    done = convert()
    assert done.status == 1
    assert len([line for line in done.stderr.splitlines() if "level=fatal" in line]) == 1
    assert registry.repository("out").tags == {}
    assert not list((tmp_path / "work").iterdir())
    for secret in (PASSWORD, "t0k3n-"):
        assert secret not in done.stderr


def test_layer_that_is_not_the_one_of_the_configuration(registry, convert):
    """Its own digest is right: only the digest of the plain layer tells."""
    app = registry.repository("app")
    kind, data = app.manifests[app.tags["v1"]]
    config = json.loads(app.blobs[json.loads(data)["config"]["digest"]])
    config["rootfs"]["diff_ids"] = ["sha256:" + "0" * 64]
    manifest = json.loads(data)
    packed = json.dumps(config).encode()
    manifest["config"] |= {"digest": app.add_blob(packed), "size": len(packed)}
    app.add_manifest(json.dumps(manifest).encode(), kind, "v1")
    done = convert()
    assert done.status == 1
    assert "plain layer has another digest" in done.last
    assert registry.repository("out").tags == {}
