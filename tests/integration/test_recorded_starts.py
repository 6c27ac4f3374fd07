"""Every recorded start of the real daemon (`cli-errors.txt`): the same exit status, or why not."""

import json
import os
import random
import re
import signal
import subprocess
from pathlib import Path

import pytest
from capabilities import requires
from serving import build_image, wait_until, write_config

from tests.fixtures_path import FIXTURES, needs_fixtures

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
    needs_fixtures,
]

RUNS = "runs"
# What ours does in its place; docs/compatibility.md has the reasons.
DIFFERENT = {
    "default rlimit without CAP_SYS_RESOURCE": RUNS,
    "bootstrap without config": 2,
    "localfs dir missing": RUNS,
    "config without mode": RUNS,
    "apisock in missing dir": 1,
}
# Of the machine that it was recorded on.
LEFT_OUT = {"singleton fscache"}


def recorded():
    """Return name, words and status of each start."""
    path = FIXTURES / "nydusd-api/cli-errors.txt"
    if not path.is_file():
        return []
    form = re.compile(r"^## (.+)\n\$ nydusd (.*)\n\[exit (\d+|runs)", re.MULTILINE)
    found = form.findall(path.read_text())
    return [(name, words.split(), status) for name, words, status in found]


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    top = tmp_path_factory.mktemp("starts")
    (top / "source").mkdir()
    for number in range(600):
        (top / f"source/{number}").write_bytes(b"%d" % number)
    return build_image(top / "source", top / "image")


def overwritten(data, offset, new):
    return data[:offset] + new + data[offset + len(new) :]


def make_files(home, image):
    """Make what the recorded command lines name."""
    boot = image.bootstrap.read_bytes()
    bootstraps = {
        "img/small-zstd.boot": boot,
        "empty.boot": b"",
        "trunc.boot": boot[: len(boot) // 2],
        "flip.boot": overwritten(boot, 1024, b"\0"),
        # Behind the tables of the front, up to the blob's.
        "flip2.boot": overwritten(boot, 16384, random.Random(1).randbytes(16384)),
        "flip3.boot": overwritten(boot, 1024 + 128, b"\x43"),
    }
    (home / "img").mkdir()
    for name, data in bootstraps.items():
        (home / name).write_bytes(data)
    (home / "img/blobs").symlink_to(image.blob_dir)
    (home / "mfile").touch()
    (home / "bad.json").write_text("{")
    (home / "empty.json").write_text("{}")
    (home / "v2.json").write_text('{"version": 2}')
    (home / "v3.json").write_text('{"version": 3}')
    write_config(home / "ok.json", image, work_dir=home / "cache")
    good = (home / "ok.json").read_text()
    missing = {"type": "localfs", "config": {"dir": "/nonexistent/blobs"}}
    write_config(home / "nobd.json", image, missing, work_dir=home / "cold")
    write_config(home / "nowd.json", image, work_dir=home / "not/there/yet")
    (home / "ftp.json").write_text(good.replace("localfs", "ftp"))
    (home / "nomode.json").write_text(good.replace(', "mode": "direct"', ""))
    (home / "unk.json").write_text(json.dumps({**json.loads(good), "zzz": {"a": 1}}))


@pytest.mark.parametrize(("name", "words", "status"), recorded(), ids=lambda value: str(value)[:40])
def test_start(serving, image, name, words, status):
    if name in LEFT_OUT:
        pytest.skip("depends on the machine")
    home = serving.directory
    top = serving.mountpoint("cm")
    make_files(home, image)
    places = {"<work>": str(home), "<img>": str(home / "img")}
    arguments = [re.sub("<work>|<img>", lambda found: places[found[0]], word) for word in words]
    expected = DIFFERENT.get(name, status)
    daemon = serving.nydusd(*arguments, cwd=home)
    if expected != RUNS:
        assert daemon.end() == int(expected), daemon.stderr
        assert re.search(r"^[Ee]rror: .", daemon.stderr, re.MULTILINE)
        assert not os.path.ismount(top)
        return
    log = home / "lf.log"
    wait_until(
        lambda: (
            "-> RUNNING" in daemon.stderr + (log.read_text() if log.exists() else "")
            or daemon.process.poll() is not None
        )
    )
    assert daemon.process.poll() is None, daemon.stderr
    assert name != "localfs dir missing" or "blobs are not there: " in daemon.stderr
    # Random inodes may be those of the names that are listed.
    subprocess.run(["ls", top], check="random" not in name, capture_output=True)
    daemon.send(signal.SIGTERM)
    assert daemon.end() == 0
    assert not os.path.ismount(top)


def test_differences_are_explained():
    """Each is a start that was recorded, and the documentation names what it is about."""
    names = {name for name, _, _ in recorded()}
    assert len(names) == 40
    assert names >= {*DIFFERENT, *LEFT_OUT}
    text = (Path(__file__).parents[2] / "docs/compatibility.md").read_text()
    for word in (
        "`--rlimit-nofile`",
        "neither `--config`",
        "`mode` may be missing",
        "API socket",
        "localfs",
    ):
        assert word in text
