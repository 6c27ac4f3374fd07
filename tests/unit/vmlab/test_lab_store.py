import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vmlab import booting, debian, share, store
from vmlab.catalogue import KERNELS, find_kernel
from vmlab.debian import KernelPackage, find_kernel_package
from vmlab.errors import LabError

KERNEL = KERNELS["6.12"]
META = """\
Package: linux-image-6.12-cloud-amd64
Version: 6.12.9-1
Depends: linux-image-6.12.9+deb12-cloud-amd64 (= 6.12.9-1), other

Package: linux-image-6.12-cloud-amd64
Version: 6.12.8-1
Depends: linux-image-6.12.8+deb12-cloud-amd64 (= 6.12.8-1)
"""
OTHER_SERIES = """\
Package: linux-image-cloud-amd64
Version: 6.1.1-1
Depends: linux-image-6.1.0-1-cloud-amd64 (= 6.1.1-1)
"""


@pytest.fixture
def apt(monkeypatch):
    """What `apt-cache show` prints by package, and the commands that were run."""
    known, commands = {}, []

    def run(words, **_):
        commands.append(words[1:])
        if words[1] == "update":
            return ""
        if words[2] not in known:
            raise LabError("no packages found")
        return known[words[2]]

    monkeypatch.setattr(debian, "run", run)
    monkeypatch.setattr(debian, "need", lambda program, _: program)
    monkeypatch.setattr(debian.os, "geteuid", lambda: 0)
    return known, commands


def test_the_newest_version_of_the_first_metapackage_that_fits(apt):
    known, commands = apt
    known["linux-image-cloud-amd64"] = OTHER_SERIES
    names = ("missing", "linux-image-cloud-amd64", "linux-image-6.12-cloud-amd64")
    with pytest.raises(LabError, match=r"apt knows no Linux 6\.12 as missing or linux-image"):
        find_kernel_package(names, "6.12")
    assert ["update"] in commands
    known["linux-image-6.12-cloud-amd64"] = META
    found = find_kernel_package(names, "6.12")
    assert found == ("linux-image-6.12.9+deb12-cloud-amd64", "6.12.9-1")
    assert found.release == "6.12.9+deb12-cloud-amd64"


def test_6_1_is_not_6_12(apt):
    known, _ = apt
    known["linux-image-6.12-cloud-amd64"] = META
    with pytest.raises(LabError, match=r"apt knows no Linux 6\.1 "):
        find_kernel_package(("linux-image-6.12-cloud-amd64",), "6.1")


class FakeDebian:
    """Debian with one kernel, and what preparing it does."""

    def __init__(self, monkeypatch, directory):
        self.version = "6.12.9-1"
        self.made = 0
        self.fails = False
        monkeypatch.setenv("XDG_CACHE_HOME", str(directory))
        monkeypatch.setattr(store, "find_kernel_package", self.find)
        monkeypatch.setattr(store, "_prepare", self.prepare)

    def find(self, *_):
        return KernelPackage("linux-image-6.12.9", self.version)

    def prepare(self, kernel, package, directory, say):
        say("working")
        entry = directory / "entry"
        entry.mkdir()
        (entry / "vmlinux").write_bytes(b"kernel")
        if self.fails:
            raise LabError("no compiler")
        self.made += 1
        record = {"release": package.release, "version": package.version}
        (entry / "kernel.json").write_text(json.dumps(record))
        return entry


@pytest.fixture
def fake(monkeypatch, tmp_path):
    return FakeDebian(monkeypatch, tmp_path)


def test_a_kernel_is_made_once_for_each_version(fake, tmp_path):
    said = []
    assert store.find(KERNEL) is None
    first = store.fetch(KERNEL, said.append)
    assert (first.release, first.version) == ("6.12.9", "6.12.9-1")
    assert first.directory.parent == tmp_path / "nydus-erofs" / "kernels"
    assert store.fetch(KERNEL, said.append) == first == store.find(KERNEL)
    assert (fake.made, said) == (1, ["working"])
    fake.version = "6.12.10-1"
    second = store.fetch(KERNEL, said.append)
    os.utime(first.directory / "kernel.json", (0, 0))
    assert store.find(KERNEL) == second != first
    assert store.size_bytes(first.directory) == 6 + (first.directory / "kernel.json").stat().st_size


def test_a_failure_leaves_nothing_and_neither_does_a_kill(fake):
    fake.fails = True
    with pytest.raises(LabError, match="no compiler"):
        store.fetch(KERNEL, print)
    left = store.kernels_directory()
    assert [path.name for path in left.iterdir()] == [".lock"]
    (left / ".making-killed").mkdir()
    fake.fails = False
    entry = store.fetch(KERNEL, print).directory
    assert sorted(path.name for path in left.iterdir()) == [".lock", entry.name]


def test_another_recipe_is_another_kernel(fake, monkeypatch):
    rebuilt = KERNELS["ondemand"]
    store.fetch(rebuilt, print)
    assert store.find(rebuilt)
    monkeypatch.setitem(store.RECIPES, "erofs", store.RECIPES["erofs"]._replace(options=()))
    assert store.find(rebuilt) is None


def test_two_processes_prepare_one_after_the_other(fake):
    """While another one holds the lock, this one says that it waits."""
    directory = store.kernels_directory()
    directory.mkdir(parents=True)
    code = (
        "import fcntl, sys, pathlib\n"
        "file = open(sys.argv[1], 'w'); fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()\n"
    )
    words = [sys.executable, "-c", code, directory / ".lock"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"locked\n"

        def say(text):
            if text.startswith("waiting for another process"):
                assert fake.made == 0
                other.stdin.close()

        store.fetch(KERNEL, say)
    assert fake.made == 1


def test_unknown_kernels_are_told_with_the_known_ones():
    with pytest.raises(LabError, match=r"'2\.4'; known: ondemand, 6\.12, 6\.12-generic, 6\.1"):
        find_kernel("2.4")


def test_what_is_missing_is_told(fake, monkeypatch):
    monkeypatch.setattr(booting, "busybox", lambda: b"")
    monkeypatch.setattr(booting, "need", lambda program, package: program)
    monkeypatch.setattr(share, "need", lambda program, package: program)
    monkeypatch.setattr(share.os, "geteuid", lambda: 0)
    assert booting.boot_defect(KERNEL) == "kernel 6.12 is not cached: vm-images/run --fetch 6.12"
    store.fetch(KERNEL, print)
    assert booting.boot_defect(KERNEL) is None
    monkeypatch.setattr(share.os, "geteuid", lambda: 1000)
    assert "needs root; kernel 6.12-generic does not" in booting.boot_defect(KERNEL)
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setattr("vmlab.processes._EXTRA_DIRECTORIES", (Path("/nonexistent"),))
    assert "apt-get install qemu-system-x86" in booting.boot_defect(KERNEL)
