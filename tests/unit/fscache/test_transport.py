"""What is tried for each word of the command line, and who gets a holder."""

import os
import threading
import time

import pytest

from fscache.mounts.mount import MountError
from fscache.runtime import Runtime
from fscache.sharing import Domain, LazyUnsupported
from fscache.transport import Transport, candidates, wants_holder


@pytest.fixture
def user(monkeypatch, tmp_path):
    monkeypatch.setenv("NYDUSD_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr("fscache.transport.unsafe_kernel", lambda release, version: "")

    def become(number, users="0 0 4294967295"):
        monkeypatch.setattr(os, "geteuid", lambda: number)
        (tmp_path / "uid_map").write_text(f"         {users}\n")
        monkeypatch.setattr("fscache.transport._UID_MAP", tmp_path / "uid_map")

    return become


def test_candidates(user):
    user(0)
    ways = (Transport.FANOTIFY, Transport.CACHEFILES, Transport.NBD, Transport.FUSE)
    assert candidates(Transport.AUTO) == ways
    assert wants_holder(Transport.AUTO)
    user(1000)
    assert candidates(Transport.AUTO) == (Transport.FUSE,)
    assert not wants_holder(Transport.AUTO)
    # Root of a container of this user.
    user(0, "0 1000 1")
    assert candidates(Transport.AUTO) == (Transport.FUSE,)
    for number in (0, 1000):
        user(number)
        for way in (*ways, Transport.EAGER):
            assert candidates(way) == (way,)
        assert wants_holder(Transport.FANOTIFY)
        assert wants_holder(Transport.CACHEFILES)
        assert wants_holder(Transport.NBD)
        assert not wants_holder(Transport.FUSE)
        assert not wants_holder(Transport.EAGER)


def test_nobody_is_led_to_cachefiles_that_are_unsafe(user, monkeypatch):
    monkeypatch.setattr("fscache.transport.unsafe_kernel", lambda release, version: "holes")
    user(0)
    assert Transport.CACHEFILES not in candidates(Transport.AUTO)
    assert candidates(Transport.CACHEFILES) == (Transport.CACHEFILES,)


@pytest.fixture
def runtime():
    runtime = Runtime()
    yield runtime
    runtime.close()


def test_the_next_one_is_tried_and_what_was_found_stays(user, runtime, tmp_path, monkeypatch):
    tried = []

    def open_domain(transport, work_dir, fetcher, link, *, proven=False):
        tried.append(transport)
        if transport is not Transport.FUSE:
            raise LazyUnsupported("no events")
        return Domain(work_dir, fetcher)

    monkeypatch.setattr("fscache.runtime.open_domain", open_domain)
    user(0)
    domain = runtime._domain(tmp_path, Transport.AUTO)
    assert tried == list(candidates(Transport.AUTO))
    assert runtime._domain(tmp_path, Transport.FUSE) is domain
    assert runtime._domain(tmp_path, Transport.AUTO) is domain
    # Another directory may be another story.
    assert runtime._domain(tmp_path / "other", Transport.AUTO) is not domain
    with pytest.raises(LazyUnsupported, match=r"not possible here: no events \(--transport eager"):
        runtime._domain(tmp_path, Transport.FANOTIFY)


def test_all_reasons_are_told(user, runtime, tmp_path, monkeypatch):
    def open_domain(transport, *_, **__):
        raise LazyUnsupported(f"no {transport} at all")

    monkeypatch.setattr("fscache.runtime.open_domain", open_domain)
    user(0)
    with pytest.raises(
        LazyUnsupported,
        match="no fanotify at all; no cachefiles at all; no nbd at all; no fuse at all",
    ):
        runtime._domain(tmp_path, Transport.AUTO)


@pytest.fixture
def machine(user, monkeypatch):
    """A machine on which `works` works; `tried` is what was opened, and whether it was proven."""

    class Machine:
        def __init__(self):
            self.works = {Transport.FANOTIFY}
            self.tried = []

        def open_domain(self, transport, work_dir, fetcher, link, *, proven=False):
            self.tried.append((transport, proven))
            if transport not in self.works:
                raise LazyUnsupported(f"no {transport}")
            return Domain(work_dir, fetcher)

        def find(self, work_dir, asked=Transport.AUTO):
            """Ask a new process."""
            self.tried.clear()
            runtime = Runtime()
            try:
                runtime._domain(work_dir, asked)
            finally:
                runtime.close()
            return list(self.tried)

    machine = Machine()
    monkeypatch.setattr("fscache.runtime.open_domain", machine.open_domain)
    user(0)
    return machine


def test_the_next_start_knows(machine, tmp_path, caplog):
    assert machine.find(tmp_path) == [(Transport.FANOTIFY, False)]
    assert machine.find(tmp_path / "other") == [(Transport.FANOTIFY, True)]
    assert machine.find(tmp_path, Transport.FANOTIFY) == [(Transport.FANOTIFY, True)]
    # What somebody asks for by name is not what `auto` has found.
    machine.works = {Transport.FUSE}
    assert machine.find(tmp_path, Transport.FUSE) == [(Transport.FUSE, False)]


def test_what_no_longer_works_is_tried_again(machine, tmp_path):
    machine.find(tmp_path)
    machine.works = {Transport.FUSE}
    everything = [(way, False) for way in candidates(Transport.AUTO)]
    assert machine.find(tmp_path) == [(Transport.FANOTIFY, True), *everything]
    assert machine.find(tmp_path) == [(Transport.FUSE, True)]


def test_a_lesser_way_is_not_for_ever(machine, tmp_path, monkeypatch):
    machine.works = {Transport.FUSE}
    machine.find(tmp_path)
    assert machine.find(tmp_path) == [(Transport.FUSE, True)]
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 700)
    machine.works = {Transport.FANOTIFY}
    assert machine.find(tmp_path) == [(Transport.FANOTIFY, False)]
    monkeypatch.setattr("time.time", lambda: now + 1e6)
    assert machine.find(tmp_path) == [(Transport.FANOTIFY, True)]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{",
        b'{"transport": "tin cans", "when": 1}',
        b'{"transport": "fuse"}',
        bytes(2000),
    ],
)  # fmt: skip
def test_verdicts_that_are_none(machine, tmp_path, content):
    machine.find(tmp_path)
    (place,) = (tmp_path / "run").glob("transport-*")
    place.write_bytes(content)
    assert machine.find(tmp_path) == [(Transport.FANOTIFY, False)]


def test_another_boot_is_another_machine(machine, tmp_path, monkeypatch):
    machine.find(tmp_path)
    (tmp_path / "boot_id").write_text("another\n")
    monkeypatch.setattr("fscache.verdict._BOOT_ID", tmp_path / "boot_id")
    assert machine.find(tmp_path) == [(Transport.FANOTIFY, False)]


def test_without_a_place_for_verdicts(machine, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("NYDUSD_RUN_DIR", str(tmp_path / "file"))
    for _ in range(2):
        assert machine.find(tmp_path) == [(Transport.FANOTIFY, False)]


class Leaving:
    """An image whose mount is gone at once; noted as long as it is open."""

    is_kept, is_gone, key, bootstrap_fd = True, True, "key", 7

    def __init__(self):
        self.is_open = True

    @property
    def record(self):
        assert self.is_open
        return self

    def to_dict(self):
        return {}

    def unmount(self):
        # Time for the reaper to come by.
        time.sleep(0.05)

    def close(self):
        self.is_open = False


class Link:
    def __init__(self):
        self.notes = []

    def keep(self, key, values, descriptors):
        self.notes.append("kept")

    def drop(self, key):
        self.notes.append("dropped")


def test_unmounted_image_is_noted_before_it_is_closed():
    """Else the note would be of another file, and stay for ever."""
    link, image = Link(), Leaving()
    runtime = Runtime(link)
    runtime._images.append(image)
    reap = threading.Thread(target=lambda: [runtime._reap() for _ in range(10_000)])
    reap.start()
    runtime.unmount(image)
    reap.join()
    assert link.notes == ["kept", "dropped"]
    assert not image.is_open
    runtime.close()


def test_refused_unmount_is_told_at_once(caplog):
    """A stop goes on to wait for users, of whom there may be none."""
    image = Leaving()
    runtime = Runtime()
    runtime._images.append(image)

    def refused():
        raise MountError("cannot unmount: fusermount3: failed to open /etc/mtab")

    image.unmount = refused
    with pytest.raises(MountError):
        runtime.unmount(image)
    assert "failed to open /etc/mtab" in caplog.text
    runtime.close()
