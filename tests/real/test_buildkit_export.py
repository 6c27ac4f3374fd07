"""BuildKit exports Dockerfiles through our nydus-image, and our nydusd runs what it pushed."""

import hashlib
import random
import shutil
from pathlib import Path

import pytest

from tests.capabilities import need_tool, requires
from tests.fixtures_path import FIXTURES, needs_fixtures
from tests.real.buildkit import BuildKit

pytestmark = [
    needs_fixtures,
    requires("root", "erofs_mount", "fanotify"),
    pytest.mark.timeout(600, func_only=True),
]

_DOCKERFILE = """\
FROM scratch
COPY busybox /bin/busybox
RUN ["/bin/busybox","--install","-s","/bin"]
COPY d /data
RUN rm /data/r && echo {name} > /data/x && mkdir /data/old && mknod /data/fifo p
RUN rm -r /data/old && mkdir /data/old && ln /data/big /data/link
"""
_LAYERS = 5
_NAMES = [f"built{number}:n" for number in range(4)]


def _build(name, busybox):
    data = random.Random(name).randbytes(3_000_000)
    files = {"busybox": busybox, "d/big": data, "d/r": data[:1000], "d/empty": b""}
    return _DOCKERFILE.format(name=name), files


def _options(call):
    return [word for word in call if word.startswith("-")]


def _recorded_words():
    """Return the options of each kind of call that was recorded with the real builder."""
    lines = (FIXTURES / "buildkit" / "commands.txt").read_text().splitlines()
    calls = [line.split() for line in lines if not line.startswith("#")]
    return {call[0]: _options(call) for call in calls if "-h" not in call}


@pytest.fixture(scope="module")
def busybox():
    need_tool("busybox")
    return Path(shutil.which("busybox"))


def test_exports_side_by_side_run_on_our_daemon(make_rig, busybox):
    rig = make_rig("dedicated")
    buildkit = BuildKit(rig)
    builds = {name: _build(name, busybox) for name in _NAMES}
    references = buildkit.export_together(builds)
    assert buildkit.leftovers() == []
    calls = [call for call in buildkit.calls if "-h" not in call]
    assert sum(call[0] == "merge" for call in calls) == len(_NAMES)
    # A layer that several have is converted once or for each of them, as it comes.
    assert sum(call[0] == "create" for call in calls) >= _LAYERS
    recorded = _recorded_words()
    for call in calls:
        assert _options(call) == recorded[call[0]], call
    for name, reference in references.items():
        *blobs, bootstrap = buildkit.manifest(name)["layers"]
        assert len(blobs) == _LAYERS
        assert bootstrap["annotations"]["containerd.io/snapshot/nydus-bootstrap"] == "true"
        rig.pull(reference)
        data = builds[name][1]["d/big"]
        text = rig.run(
            reference,
            "cat /data/x; ls /data; ls -A /data/old; sha256sum < /data/link;"
            " stat -c %h /data/big; test -p /data/fifo && echo fifo",
        )
        assert text.split() == [
            name, "big", "empty", "fifo", "link", "old", "x",
            hashlib.sha256(data).hexdigest(), "-", "2", "fifo",
        ]  # fmt: skip


_ON_TOP = """\
FROM {base}
RUN test -e /data/added && test ! -e /data/gone && echo above > /etc/hostname && echo new > /data/x
"""


def test_image_of_nydusify_is_a_base_image(make_rig, image, layers):
    """BuildKit unpacks each blob by the builder, builds on that, and makes blobs of all of it."""
    rig = make_rig("dedicated")
    buildkit = BuildKit(rig)
    base = rig.push(image)
    reference = buildkit.export("above:n", _ON_TOP.format(base=base), {})
    assert buildkit.leftovers() == []
    unpacked = [call for call in buildkit.calls if call[0] == "unpack"]
    assert len(unpacked) == len(layers.tars)
    # The base's own blobs are in the result as they are, and it runs on our daemon.
    stored = {one["digest"][7:] for one in buildkit.manifest("above:n")["layers"]}
    assert stored > set(image.blobs)
    rig.pull(reference)
    sums = {path: digest for path, digest in layers.sums.items() if path != "/etc/hostname"}
    lines = rig.run(reference, f"sha256sum {' '.join(sorted(sums))}").splitlines()
    assert {path: digest for digest, path in map(str.split, lines)} == sums
    assert rig.run(reference, "cat /etc/hostname /data/x").split() == ["above", "new"]
    names = rig.run(reference, "ls -a /data").split()
    assert {"added", "x"} < set(names)
    assert not {"gone", ".wh.gone"} & set(names)
