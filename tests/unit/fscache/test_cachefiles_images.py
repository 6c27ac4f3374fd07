"""Registered images behind a fake device: names, sharing, dropping, and taking over."""

import errno
import json
import os
import time

import pytest
from fakes.built import built, member, tar_of
from fakes.cachefiles_device import FakeKernel

from builder.build import BuildOptions, SourceType, build
from erofs.errors import FormatError, NydusError
from erofs.reader import open_bootstrap
from fscache.blobentry import parse_blob_entry
from fscache.blobs import BlobRegistry, RegistryError
from fscache.cachefiles import image as image_module
from fscache.cachefiles import images as images_module
from fscache.cachefiles.cache import KernelCache
from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.images import KernelImages
from fscache.holder.link import HeldRecord

CONTENT = {"one": b"one" * 3000, "two": os.urandom(20_000)}


def wait_until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


class Link:
    """Keeps what a holder would."""

    def __init__(self):
        self.kept = {}

    def keep(self, key, values, descriptors=()):
        self.drop(key)
        values = json.loads(json.dumps(values))
        self.kept[key] = HeldRecord(key, values, list(map(os.dup, descriptors)))

    def drop(self, key):
        for fd in self.kept.pop(key).descriptors if key in self.kept else []:
            os.close(fd)


class Rig:
    def __init__(self, directory):
        self.directory = directory
        self.link = Link()
        for name, data in CONTENT.items():
            built(directory, tar_of(member(name, data=data)), name=name)
        (directory / "one again").write_bytes((directory / "one").read_bytes())
        (directory / "kernel").mkdir(exist_ok=True)
        self.start()

    def start(self):
        self.kernel = FakeKernel(self.directory / "kernel")
        self.registry = BlobRegistry()
        self.cache = KernelCache(self.kernel.device, self.directory, 2)
        self.images = KernelImages(self.cache, self.registry, {}, self.link)
        self.cache.start()

    def end(self):
        self.cache.close(5, leave=True)
        self.images.close()
        self.kernel.close()

    def entry(self, name, domain="", image="one", **config):
        config = {
            "backend_type": "localfs",
            "backend_config": {"dir": str(self.directory)},
            "cache_type": "fscache",
            "cache_config": {"work_dir": str(self.directory / "work")},
            "metadata_path": str(self.directory / image),
            **config,
        }
        (self.directory / "work").mkdir(exist_ok=True)
        return {"type": "bootstrap", "id": name, "domain_id": domain, "config": config}

    def add(self, *args, **config):
        self.images.add(parse_blob_entry(self.entry(*args, **config)))

    def blob(self, image="one"):
        with open_bootstrap(self.directory / image) as bootstrap:
            return bootstrap.blobs[0].id

    def listed(self, domain):
        return [item["id"] for item in self.registry.as_list(domain, "")]

    def stored(self, image="one"):
        """Return what a blob holds, uncompressed."""
        data = CONTENT[image.split()[0]]
        return data + bytes(-len(data) % 4096)

    def reads(self, scope, image="one"):
        opened, size = self.kernel.open(scope, self.blob(image))
        assert size == len(self.stored(image)), size
        assert self.kernel.read(opened, 0, size) == self.stored(image)
        return opened


@pytest.fixture
def rig(tmp_path, monkeypatch):
    monkeypatch.setattr(image_module, "_SYSFS", tmp_path / "sysfs")
    monkeypatch.setattr(images_module, "_REAP_SECONDS", 0.02)
    (tmp_path / "sysfs").mkdir()
    rig = Rig(tmp_path)
    yield rig
    rig.end()
    for key in list(rig.link.kept):
        rig.link.drop(key)


def test_bootstrap_and_blob_of_an_entry(rig):
    rig.add("img", "dom")
    opened, size = rig.kernel.open("dom", "img")
    bootstrap = (rig.directory / "one").read_bytes()
    assert size == -(-len(bootstrap) // 4096) * 4096
    wait_until(lambda: opened.has(0, size))
    assert opened.data()[: len(bootstrap)] == bootstrap
    rig.reads("dom")


def test_without_a_domain_the_scope_is_the_fsid(rig):
    rig.add("img")
    rig.reads("img")
    assert rig.kernel.open("", "img")[1] == -errno.ENOENT


@pytest.mark.parametrize(
    ("words", "config", "error", "text"),
    [
        (("a,b", "d"), {}, CachefilesError, "id cannot be a name"),
        (("a", "d e"), {}, CachefilesError, "domain_id cannot be a name"),
        (("a", "d", "absent"), {}, RegistryError, "metadata_path is no file"),
        (("a",), {"cache_config": {"work_dir": "/nope"}}, RegistryError, "work_dir is no"),
        (("a", "d", "junk"), {}, FormatError, "not an EROFS image"),
    ],
)
def test_entries_that_cannot_be_served(rig, words, config, error, text):
    (rig.directory / "junk").write_bytes(bytes(8192))
    with pytest.raises(error, match=text):
        rig.add(*words, **config)
    assert rig.listed("d") == []
    assert rig.link.kept == {}
    rig.add("a", "d")


def test_other_block_sizes_are_refused(rig):
    tar = rig.directory / "layer.tar"
    tar.write_bytes(tar_of(member("x", data=b"x" * 600)))
    build(
        tar,
        BuildOptions(
            source_type=SourceType.TARFS, bootstrap=rig.directory / "tarfs", blob_dir=rig.directory
        ),
    )
    with pytest.raises(NydusError, match="other block sizes cannot be mounted through cachefiles"):
        rig.add("img", "d", "tarfs")


def test_names_are_taken_once(rig):
    rig.add("img", "d")
    with pytest.raises(RegistryError, match="already exists"):
        rig.add("img", "d", "two")
    rig.add("d")
    # The kernel could not tell this one from an entry without a domain.
    with pytest.raises(CachefilesError, match="in use by another entry"):
        rig.add("d", "d")
    assert rig.listed("d") == ["img", rig.blob()]
    rig.reads("d")


def test_dropped_entry_is_served_as_long_as_it_is_open(rig, monkeypatch):
    rig.add("img", "d")
    boot, _ = rig.kernel.open("d", "img")
    blob = rig.reads("d")
    rig.images.remove("d", "img")
    assert rig.listed("d") == []
    (kept,) = rig.link.kept.values()
    assert kept.values["leaving"] is True
    # Opened again after a pause.
    rig.kernel.withdraw(blob)
    blob = rig.reads("d")
    # A registration with other content has to wait.
    monkeypatch.setattr(images_module, "_UNMOUNT_SECONDS", 0.1)
    with pytest.raises(CachefilesError, match="in use by a mount of another image"):
        rig.add("img", "d", "two")
    monkeypatch.undo()
    for opened in (blob, boot):
        rig.kernel.withdraw(opened)
    rig.add("img", "d", "two")
    rig.reads("d", "two")
    rig.images.remove("d", "img")


def test_dropped_entry_is_served_as_long_as_it_is_mounted(rig):
    rig.add("img", "d")
    mounted = rig.directory / "sysfs/d,img"
    mounted.mkdir()
    assert rig.images.any_mounted
    rig.images.remove("d", "")
    # Twice, so that the reaper has come by in between.
    for _ in range(2):
        rig.kernel.withdraw(rig.reads("d"))
        time.sleep(0.1)
    mounted.rmdir()
    wait_until(lambda: not rig.link.kept)
    assert not rig.images.any_mounted


def test_dropped_and_registered_again_while_it_is_mounted(rig):
    rig.add("img", "d")
    opened = rig.reads("d")
    rig.images.remove("d", "img")
    rig.add("img", "d", "one again")
    assert rig.listed("d") == ["img", rig.blob()]
    assert rig.kernel.read(opened, 0, 4096) == rig.stored()[:4096]
    (kept,) = rig.link.kept.values()
    assert kept.values["leaving"] is False


def test_entries_of_a_domain_share_a_blob(rig):
    rig.add("a", "d")
    other = rig.directory / "other work"
    other.mkdir()
    rig.add("b", "d", "one again", cache_config={"work_dir": str(other)})
    opened = rig.reads("d")
    rig.images.remove("d", "a")
    wait_until(lambda: len(rig.link.kept) == 1)
    for path in (rig.directory / "work").iterdir():
        path.unlink()
    again = rig.reads("d")
    assert again.object_id != opened.object_id
    assert [path.name for path in other.glob("*.data")] == [f"{rig.blob()}.blob.data"]


def test_successor_serves_what_was_kept(rig):
    rig.add("img", "d")
    rig.add("gone", "d", "two")
    mounted = rig.directory / "sysfs/d,gone"
    mounted.mkdir()
    rig.images.remove("d", "gone")
    kept = dict(rig.link.kept)
    rig.link.kept = {}
    rig.end()
    # The bootstraps may be gone meanwhile.
    for name in CONTENT:
        (rig.directory / name).rename(rig.directory / f"{name} elsewhere")
    rig.start()
    for held in kept.values():
        rig.images.adopt(held)
    assert rig.listed("d") == ["img", rig.blob("one again")]
    assert {key: held.values for key, held in rig.link.kept.items()} == {
        key: held.values for key, held in kept.items()
    }
    rig.reads("d", "one again")
    rig.kernel.withdraw(rig.reads("d", "two elsewhere"))
    mounted.rmdir()
    wait_until(lambda: len(rig.link.kept) == 1)
    # Clients repeat themselves after a restart; once.
    with pytest.raises(NydusError):
        rig.add("img", "d", "two elsewhere")
    rig.add("img", "d", "one again")
    with pytest.raises(RegistryError, match="already exists"):
        rig.add("img", "d", "one again")
    assert rig.listed("d") == ["img", rig.blob("one again")]
    rig.reads("d", "one again")
    for held in kept.values():
        for fd in held.descriptors:
            os.close(fd)


def test_prefetch_begins_with_the_mount(rig):
    prefetch = {"enable": True, "threads_count": 2, "merging_size": 4096, "prefetch_all": True}
    rig.add("img", "d", prefetch_config=prefetch)
    blob, size = rig.kernel.open("d", rig.blob())
    assert not blob.has(0, 4096)
    rig.kernel.open("d", "img")
    wait_until(lambda: blob.has(0, size))
    assert blob.data() == rig.stored()


def test_environment_is_used(rig):
    rig.images._services = rig.images._services._replace(environment={"NYDUS_HEADER_X": "a\nb"})
    registry = {"host": "h", "repo": "r"}
    with pytest.raises(NydusError, match="NYDUS_HEADER_X"):
        rig.add("img", "d", backend_type="registry", backend_config=registry)
