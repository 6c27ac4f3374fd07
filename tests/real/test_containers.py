"""containerd and containerd-nydus-grpc run containers on our nydusd, unchanged."""

import re
import shutil

import pytest

from tests.capabilities import requires
from tests.real.box import wait_for
from tests.real.rootfs import BIG, PIECE

pytestmark = [
    requires("root", "erofs_mount", "fanotify"),
    pytest.mark.timeout(900, func_only=True),
]

SECONDS = 90.0
PIECE_SUM = f"dd if={BIG} bs={PIECE} skip=$i count=1 2>/dev/null | sha256sum"


def test_a_container_reads_lazily(rig, image, layers):
    reference = rig.push(image)
    rig.pull(reference)
    assert rig.fetched(image) == 0
    number = len(layers.pieces()) * 2 // 3
    assert rig.run(reference, f"i={number}; {PIECE_SUM}").split()[0] == layers.pieces()[number]
    assert 0 < rig.fetched(image) < sum(image.blobs.values()) // 3


def test_a_container_sees_what_the_layers_say(rig, image, layers):
    reference = rig.push(image)
    rig.pull(reference)
    lines = rig.run(reference, f"sha256sum {' '.join(sorted(layers.sums))}").splitlines()
    assert {path: digest for digest, path in map(str.split, lines)} == layers.sums
    assert rig.run(reference, "cat /etc/hostname") == "replaced\n"
    names = rig.run(reference, "ls -a /data").split()
    assert "added" in names
    assert not {"gone", ".wh.gone"} & set(names)


def test_two_images_share_a_blob(rig, image, other_image, layers):
    references = [rig.push(image), rig.push(other_image)]
    logs = [rig.root / f"reader{number}.log" for number in range(2)]
    count = len(layers.pieces())
    script = f"i=0; while [ $i -lt {count} ]; do {PIECE_SUM}; i=$((i+1)); done; sleep 1000"
    for number, reference in enumerate(references):
        rig.pull(reference)
        uri = f"file://{logs[number]}"
        rig.ctr("run", "-d", "--log-uri", uri, reference, f"c{number}", "sh", "-c", script)
    for log in logs:
        wait_for("reading", SECONDS, lambda log=log: len(log.read_text().splitlines()) == count)
        assert [line.split()[0] for line in log.read_text().splitlines()] == layers.pieces()
    assert len(rig.nydusds()) == (1 if rig.mode == "shared" else 2)
    rig.remove(references[1], "c1")
    # The cache that both had still serves the other one.
    assert rig.ctr("task", "exec", "--exec-id", "e", "c0", "cat", "/etc/hostname") == "replaced\n"


def test_removal_leaves_nothing(rig, image):
    reference = rig.push(image)
    rig.pull(reference)
    rig.ctr("run", "-d", "--null-io", reference, "sleeper", "sleep", "1000")
    assert len(rig.nydusds()) == 1
    assert any(line.split()[2] == "erofs" for line in rig.mounts())
    rig.remove(reference, "sleeper")
    if rig.mode == "shared":
        # The daemon and its own mount stay for the next image, until the snapshotter ends.
        wait_for("removal", SECONDS, lambda: len(rig.mounts()) == 1)
        assert rig.mounts()[0].split()[1] == f"{rig.root}/sn/mnt"
        assert len(rig.nydusds()) == 1
        rig.snapshotter.end()
    rig.wait_until_clean()
    # What `auto` has found stays there until the next boot.
    assert not [path for path in rig.box.top.glob("run/nydusd/*") if path.is_dir()]


def test_the_snapshotter_takes_our_counters(rig, image):
    reference = rig.push(image)
    rig.pull(reference)
    rig.ctr("run", "-d", "--null-io", reference, "sleeper", "sleep", "1000")
    label = f'{{image_ref="{reference}"}}'
    # One series of each of the three answers that it polls for.
    series = (f"nydusd_cache_whole_hits{label}", f"nydusd_total_read_bytes{label}")
    wait_for("counters", SECONDS, lambda: all(name in rig.prometheus() for name in series))
    assert "nydusd_hung_io_counts 0\n" in rig.prometheus()
    assert not re.search(r"failed to get \w+ metric", rig.snapshotter.log.read_text())


def test_an_image_comes_back_after_removal(rig, image, layers):
    reference = rig.push(image)
    for _ in range(2):
        rig.pull(reference)
        rig.ctr("run", "-d", "--null-io", reference, "sleeper", "sleep", "1000")
        rig.remove(reference, "sleeper")
    rig.pull(reference)
    assert rig.run(reference, f"i=3; {PIECE_SUM}").split()[0] == layers.pieces()[3]


def test_a_missing_blob_is_an_error_for_a_while(rig, image, layers):
    reference = rig.push(image)
    rig.pull(reference)
    # The programs are in the cache from here on.
    assert rig.run(reference, f"i=3; {PIECE_SUM}").split()[0] == layers.pieces()[3]
    data = rig.root / "registry/docker/registry/v2/blobs"
    away = rig.root / "away"
    shutil.move(data, away)
    script = f"dd if={BIG} of=/dev/null bs={PIECE} skip=90 count=1 2>&1 || :"
    assert "Input/output error" in rig.run(reference, script)
    shutil.move(away, data)

    def is_read():
        return rig.run(reference, f"i=90; {PIECE_SUM}").split()[0] == layers.pieces()[90]

    # nydusd may remember a failure, so that not every reader asks a broken backend again.
    wait_for("right data", SECONDS, is_read)


def test_debian_with_prefetching(make_rig, mode, debian, debian_sums):
    rig = make_rig(mode, "restart", prefetch=True)
    reference = rig.push(debian)
    rig.pull(reference)
    program = "import http.client, json, ssl; print(json.dumps([1]))"
    assert rig.ctr("run", "--rm", reference, "python", "python3", "-c", program) == "[1]\n"
    # The list of paths is longer than an argument may be.
    script = "find / -xdev -type f ! -path '/run/*' ! -path '/proc/*' -print0 | xargs -0 sha256sum"
    lines = rig.run(reference, script).splitlines()
    sums = dict(line.split("  ", 1)[::-1] for line in lines)
    assert {path: sums.get(path) for path in debian_sums} == debian_sums
