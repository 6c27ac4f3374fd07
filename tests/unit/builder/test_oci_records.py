"""Documents of images: hostile ones are refused, good ones come back as they were."""

from __future__ import annotations

import json

import pytest

from builder.oci import media
from builder.oci.config import ImageConfig
from builder.oci.errors import ImageError
from builder.oci.names import matches, parse_platforms, parse_reference
from builder.oci.records import Descriptor, Index, Manifest, Platform, go_json

DIGEST = f"sha256:{'a' * 64}"
GOOD = {"mediaType": media.OCI_LAYER, "digest": DIGEST, "size": 3}


def test_round_trip_keeps_every_member():
    platform = Platform("arm", "linux", "1.2", ("f",), "v7")
    descriptor = Descriptor(
        media.OCI_LAYER, DIGEST, 7, ("https://a/b",), {"b": "2", "a": "1"}, platform, "x/y"
    )
    manifest = Manifest(
        media.OCI_MANIFEST, descriptor, (descriptor,), {"k": "v"}, descriptor, "x/z"
    )
    index = Index(media.OCI_INDEX, (descriptor,), {"k": "v"}, descriptor, "x/z")
    assert Manifest.parse(manifest.pack()) == manifest
    assert Manifest.parse(manifest.pack(None)) == manifest
    assert Index.parse(index.pack()) == index
    assert list(json.loads(manifest.pack())["layers"][0]["annotations"]) == ["a", "b"]


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "sha256:../../etc/passwd"}, {"digest": "md5:00"}, {"digest": 3},
        {"digest": DIGEST.upper()}, {"size": -1}, {"size": "3"}, {"size": True},
        {"size": 1 << 70}, {"mediaType": "a b\r\nX: y"}, {"annotations": {"a": 1}},
        {"annotations": []}, {"platform": []}, {"urls": [1]},
    ],
)  # fmt: skip
def test_hostile_descriptor_is_refused(change):
    with pytest.raises(ImageError):
        Descriptor.from_json({**GOOD, **change})


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{", b'"x"', b"\xff", b"[" * 100_000, b"{}", b'{"schemaVersion":1}',
        b'{"schemaVersion":2,"config":[],"layers":[]}',
        b'{"schemaVersion":2,"manifests":[],"config":{}}',
        b'{"schemaVersion":2,"config":' + json.dumps(GOOD).encode() + b',"layers":{}}',
    ],
)  # fmt: skip
def test_hostile_manifest_is_refused(data):
    with pytest.raises(ImageError):
        Manifest.parse(data)


def test_manifest_and_index_are_not_taken_for_each_other():
    """A document that is both would be read as one thing and checked as another."""
    both = {"schemaVersion": 2, "config": GOOD, "layers": [], "manifests": []}
    for kind in (Manifest, Index):
        with pytest.raises(ImageError):
            kind.parse(json.dumps(both).encode())
    with pytest.raises(ImageError, match="another type"):
        Manifest.parse(Manifest(media.OCI_MANIFEST, Descriptor(**_plain()), ()).pack(), "x/y")


def _plain():
    return {"media_type": media.OCI_CONFIG, "digest": DIGEST, "size": 1}


def test_json_is_written_as_go_does():
    assert go_json({"a": "<&>\u2028é"}) == b'{"a":"\\u003c\\u0026\\u003e\\u2028\xc3\xa9"}'


def test_configuration_keeps_what_nobody_knows():
    values = {
        "docker_version": "1", "os": "linux", "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [DIGEST]},
        "config": {"Healthcheck": {"Test": ["x"]}, "Cmd": None, "Labels": {"b": "", "a": ""}},
        "history": [{"created_by": "x", "strange": 1}],
    }  # fmt: skip
    config = ImageConfig.parse(json.dumps(values).encode())
    again = json.loads(config.pack())
    assert again["docker_version"] == "1"
    assert again["config"]["Healthcheck"] == {"Test": ["x"]}
    assert "Cmd" not in again["config"]
    assert list(again)[:2] == ["architecture", "os"]
    assert list(again["config"]["Labels"]) == ["a", "b"]
    assert again["history"] == [{"created_by": "x", "strange": 1}]


@pytest.mark.parametrize(
    "values",
    [
        {}, {"rootfs": []}, {"rootfs": {"diff_ids": ["x"]}}, {"rootfs": {"diff_ids": {}}},
        {"rootfs": {"diff_ids": []}, "history": {}}, {"rootfs": {}, "history": [1]},
        {"rootfs": {}, "config": []},
    ],
)  # fmt: skip
def test_hostile_configuration_is_refused(values):
    with pytest.raises(ImageError):
        ImageConfig.parse(json.dumps({"x": 1, **values}).encode()).pack()


@pytest.mark.parametrize(
    ("text", "host", "repository", "name"),
    [
        ("debian", "docker.io", "library/debian", "latest"),
        ("a/b:c", "docker.io", "a/b", "c"),
        ("localhost/a", "localhost", "a", "latest"),
        ("h:5000/a/b:t", "h:5000", "a/b", "t"),
        (f"h.x/a@{DIGEST}", "h.x", "a", DIGEST),
        (f"h.x/a:t@{DIGEST}", "h.x", "a", DIGEST),
        ("index.docker.io/a/b", "docker.io", "a/b", "latest"),
    ],
)
def test_reference(text, host, repository, name):
    found = parse_reference(text)
    assert (found.host, found.repository, found.name) == (host, repository, name)


@pytest.mark.parametrize(
    "text",
    ["", "A/b", "h.x/", "h.x/../b", "h.x/a:b c", "h.x/a@sha256:1", "h.x/a//b", "h.x/a?b", "u@h.x/a",
     "h.x:99999999/a"],
)  # fmt: skip
def test_reference_that_is_none(text):
    with pytest.raises(ImageError):
        parse_reference(text)


def test_platforms():
    arm = Platform("arm64", "linux", variant="v8")
    (wanted,) = parse_platforms("linux/arm64")
    assert matches(wanted, arm)
    assert matches(parse_platforms("aarch64")[0], arm)
    assert not matches(wanted, Platform("amd64", "linux"))
    assert not matches(wanted, None)
    assert [str(one) for one in parse_platforms("linux/amd64,linux/arm/v7")] == [
        "linux/amd64", "linux/arm/v7",
    ]  # fmt: skip
    for text in ("", "linux/", "a/b/c/d", "linux/amd64,"):
        with pytest.raises(ImageError):
            parse_platforms(text)
