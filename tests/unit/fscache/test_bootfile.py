"""Bootstraps that came inside of a blob: taken out, shared, replaced when they are not right."""

import hashlib
import os
import threading

import pytest
from fakes.built import built, member, tar_of

from builder.bootstrap import inlined_bootstrap
from erofs import BadMagic, CodecError, FormatError, IntegrityError, open_bootstrap
from erofs.framing import SECTION_BOOTSTRAP, read_toc
from erofs.view import View
from fscache.cache.bootfile import mountable_bootstrap, mounted_path
from fscache.cache.cachefile import CacheError
from fscache.cache.plan import PlanError, read_plan

TAR = tar_of(member("a", data=b"a" * 5000), member("b", data=b"b" * 100))


@pytest.fixture(params=[False, True], ids=["framed", "toc"])
def blob(request, tmp_path):
    folder = tmp_path / "blobs"
    folder.mkdir()
    return built(folder, TAR, inline_bootstrap=True, toc=request.param)


def test_a_bootstrap_by_itself_is_mounted_as_it_is(tmp_path):
    boot = built(tmp_path, TAR)
    assert mountable_bootstrap(boot, tmp_path / "cache") == boot
    assert mounted_path(boot, tmp_path / "cache") == boot
    assert not (tmp_path / "cache").exists()


def test_taken_out_of_a_blob(blob, tmp_path):
    data = inlined_bootstrap(blob)
    name = f"{hashlib.sha256(data).hexdigest()}.image.boot"
    cache = tmp_path / "some" / "cache"
    assert mounted_path(blob, cache) == cache / name
    assert not cache.exists()
    place = mountable_bootstrap(blob, cache)
    assert place == cache / name
    assert place.read_bytes() == data
    assert place.stat().st_mode & 0o777 == 0o600
    assert os.listdir(cache) == [name]
    with open_bootstrap(place) as image:
        assert image.lookup(b"/a").size == 5000
    # The id of the blob is the name of its file, wherever the bootstrap lies.
    (plan,) = read_plan(place, blob).blobs
    assert plan.entry.id == blob.name.split(".")[0]


def test_used_again_when_equal_and_replaced_when_not(blob, tmp_path):
    place = mountable_bootstrap(blob, tmp_path)
    inode, data = place.stat().st_ino, place.read_bytes()
    assert mountable_bootstrap(blob, tmp_path) == place
    assert place.stat().st_ino == inode
    for wrong in (data[:-1], data + b"x", b"", data[:-1] + b"x"):
        place.write_bytes(wrong)
        with place.open("rb") as held:
            mountable_bootstrap(blob, tmp_path)
            # Who has the old file open goes on with it.
            assert held.read() == wrong
        assert place.read_bytes() == data
    place.unlink()
    place.symlink_to("/etc/hostname")
    mountable_bootstrap(blob, tmp_path)
    assert not place.is_symlink()
    assert place.read_bytes() == data
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_many_at_once(blob, tmp_path):
    places = []
    threads = [
        threading.Thread(target=lambda: places.append(mountable_bootstrap(blob, tmp_path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(places) == 8
    assert len(set(places)) == 1
    assert places[0].read_bytes() == inlined_bootstrap(blob)


def test_what_has_no_bootstrap(tmp_path):
    for number, content in enumerate((b"", b"x" * 5000, bytes(1 << 16))):
        path = tmp_path / str(number)
        path.write_bytes(content)
        with pytest.raises(BadMagic, match="not an EROFS image"):
            mountable_bootstrap(path, tmp_path / "cache")
    with pytest.raises(PlanError, match="cannot be opened"):
        mountable_bootstrap(tmp_path / "nothing", tmp_path / "cache")
    with pytest.raises(PlanError, match="cannot be opened"):
        mountable_bootstrap(tmp_path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_broken_bootstraps_are_not_taken(tmp_path):
    blob = built(tmp_path, TAR, inline_bootstrap=True, toc=True)
    data = bytearray(blob.read_bytes())
    entry = read_toc(View(data)).find(SECTION_BOOTSTRAP)
    digest = len(data) - 512 - 128 + 24
    for offset in (entry.offset, entry.offset + entry.compressed_size // 2, digest):
        broken = bytearray(data)
        broken[offset] ^= 0xFF
        blob.write_bytes(broken)
        with pytest.raises((FormatError, CodecError, IntegrityError)):
            mountable_bootstrap(blob, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_no_place_for_it(blob, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CacheError, match="cannot keep the bootstrap"):
        mountable_bootstrap(blob, tmp_path / "file" / "cache")
