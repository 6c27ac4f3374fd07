"""What is tried for each word of the command line, and who gets a holder."""

import os

import pytest

from fscache.runtime import Runtime
from fscache.sharing import Domain, LazyUnsupported
from fscache.transport import Transport, candidates, wants_holder


@pytest.fixture
def user(monkeypatch, tmp_path):
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

    def open_domain(transport, work_dir, fetcher, link):
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
    def open_domain(transport, *_):
        raise LazyUnsupported(f"no {transport} at all")

    monkeypatch.setattr("fscache.runtime.open_domain", open_domain)
    user(0)
    with pytest.raises(
        LazyUnsupported,
        match="no fanotify at all; no cachefiles at all; no nbd at all; no fuse at all",
    ):
        runtime._domain(tmp_path, Transport.AUTO)
