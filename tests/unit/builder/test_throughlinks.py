"""Entries of a layer below symlinks of lower layers, judged by the rules of the proof."""

from __future__ import annotations

import tarfile

import pytest

from tests.fakes.oci_image import Image, layer, member
from tests.fakes.oci_registry import OciRegistry
from tests.nydusify_images import nydusify

DIRECTORY, LINK = tarfile.DIRTYPE, tarfile.SYMTYPE


def _link(name, target):
    return member(name, kind=LINK, linkname=target)


LOWER = layer(
    member("usr", kind=DIRECTORY, mode=0o750, uid=5),
    member("usr/bin", kind=DIRECTORY, mode=0o711),
    member("usr/bin/old", b"old"),
    member("usr/bin/sub", kind=DIRECTORY),
    member("usr/bin/sub/deep", b"deep"),
    _link("bin", "usr/bin"),
    _link("sbin", "/bin"),
    _link("usr/up", "../usr/./bin/sub"),
    _link("away", "no/where"),
    _link("loop", "loop"),
)


def _check(tmp_path, *uppers):
    """Convert with proof; the outcome, and whether it is published."""
    with OciRegistry() as registry:
        Image([LOWER, *uppers]).add(registry.repository("app"), "v1")
        done = nydusify(
            "convert", "--source", f"{registry.host}/app:v1", "--target",
            f"{registry.host}/out:n", "--plain-http", "--work-dir", tmp_path,
        )  # fmt: skip
        assert (done.status == 0) == ("n" in registry.repository("out").tags)
    return done


@pytest.mark.parametrize(
    "members",
    [
        [member("bin/new", b"new"), member("bin/old", b"another")],
        [member("sbin/new", b"new"), member("usr/bin/more", b"m"), member("bin/third", b"3")],
        [member("bin/.wh.old"), member("usr/up/.wh.deep"), member("usr/up/x", b"x")],
        [member("bin/sub", kind=DIRECTORY, mode=0o700, uid=9), member("bin/sub/y", b"y")],
        [member("bin/sub/.wh..wh..opq"), member("bin/sub/only", b"1")],
        [member("away/there/file", b"made")],
        # A directory of the layer's own, or a deletion, puts an end to the link.
        [member("bin", kind=DIRECTORY), member("bin/new", b"new")],
        [member(".wh.bin"), member("bin/new", b"new")],
    ],
)
def test_as_when_unpacked(tmp_path, members):
    done = _check(tmp_path, layer(*members))
    assert done.status == 0, done.stderr


def test_through_links_of_several_layers(tmp_path):
    uppers = layer(_link("usr/bin/again", "sub")), layer(member("bin/again/z", b"z"))
    done = _check(tmp_path, *uppers)
    assert done.status == 0, done.stderr


def test_loop_is_refused(tmp_path):
    done = _check(tmp_path, layer(member("loop/file", b"x")))
    assert done.status == 1


def test_hard_link_to_what_only_a_lower_layer_has_is_refused(tmp_path):
    """As the real builder does; layers of overlayfs have both names."""
    done = _check(tmp_path, layer(member("again", kind=tarfile.LNKTYPE, linkname="usr/bin/old")))
    assert done.status == 1
    assert "hard link to b'usr/bin/old', which is not there" in done.last
