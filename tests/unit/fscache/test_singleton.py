"""The registry of blobs, and what a daemon without mounts answers."""

import errno
import json
import time

import pytest
from fakes.built import built, member, tar_of

from erofs.errors import FormatError
from erofs.reader import open_bootstrap
from fscache.api.message import Request
from fscache.api.routes import answer
from fscache.blobentry import parse_blob_entry, parse_blob_list
from fscache.blobs import BlobRegistry, RegistryError
from fscache.cachefiles import device, service
from fscache.cachefiles.errors import CachefilesError
from fscache.config import ConfigError
from fscache.lifecycle import StateError
from fscache.singleton import SingletonDaemon, SingletonOptions
from fscache.supervisor import SupervisorError

# Of a backend that needs a password, which must not be told.
SECRET = "dTpzZWNyZXQ="


@pytest.fixture
def images(tmp_path):
    """Two bootstraps with one blob each, a third with the blob of the first."""
    for name in ("one", "two"):
        built(tmp_path, tar_of(member(name, data=name.encode() * 100)), name=name)
    (tmp_path / "one again").write_bytes((tmp_path / "one").read_bytes())
    return tmp_path


def entry(images, name, domain="", image="one", **config):
    config = {
        "id": name,
        "backend_type": "registry",
        "backend_config": {"host": "h", "repo": "r", "auth": SECRET},
        "cache_type": "fscache",
        "cache_config": {"work_dir": str(images)},
        "metadata_path": str(images / image),
        **config,
    }
    return {"type": "bootstrap", "id": name, "domain_id": domain, "config": config}


def blob_id(path):
    with open_bootstrap(path) as image:
        return image.blobs[0].id


def counts(registry, domain):
    return {item["id"]: item.get("ref_count", "bootstrap") for item in registry.as_list(domain, "")}


def add(registry, *args, **more):
    registry.add(parse_blob_entry(entry(*args, **more)))


def test_data_blobs_are_counted_by_domain(images):
    registry = BlobRegistry()
    one, two = blob_id(images / "one"), blob_id(images / "two")
    add(registry, images, "a", "d")
    add(registry, images, "b", "d", "one again")
    add(registry, images, "c", "d", "two")
    add(registry, images, "a", "other")
    add(registry, images, "a")
    assert counts(registry, "d") == {
        "a": "bootstrap", "b": "bootstrap", "c": "bootstrap", one: 2, two: 1,
    }  # fmt: skip
    assert counts(registry, "other") == counts(registry, "") == {"a": "bootstrap", one: 1}
    assert [item["id"] for item in registry.as_list("d", one)] == [one]
    registry.remove("d", "a")
    registry.remove("d", "c")
    assert counts(registry, "d") == {"b": "bootstrap", one: 1}
    registry.remove("other", "")
    assert counts(registry, "other") == {}
    for name in ("", "absent"):
        registry.remove("absent", name)
    assert counts(registry, "") == {"a": "bootstrap", one: 1}


def test_names_are_taken_once(images):
    registry = BlobRegistry()
    add(registry, images, "a", "d")
    for name in ("a", blob_id(images / "one")):
        with pytest.raises(RegistryError, match="already exists"):
            add(registry, images, name, "d", "two")
    assert counts(registry, "d") == {"a": "bootstrap", blob_id(images / "one"): 1}
    registry.remove("d", "a")
    add(registry, images, blob_id(images / "two"), "d")
    with pytest.raises(RegistryError, match="name of a bootstrap"):
        add(registry, images, "c", "d", "two")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"metadata_path": ""}, RegistryError, "metadata_path is no file"),
        ({"metadata_path": "/"}, RegistryError, "metadata_path is no file"),
        ({"metadata_path": "/etc/passwd"}, FormatError, "not an EROFS image"),
        ({"cache_config": {"work_dir": "/nope"}}, RegistryError, "work_dir is no directory"),
    ],
)
def test_paths_have_to_be_there(images, change, error, text):
    registry = BlobRegistry()
    with pytest.raises(error, match=text):
        add(registry, images, "a", **change)
    assert registry.as_list("", "") == []


class Api:
    def __init__(self):
        self.daemon = SingletonDaemon(SingletonOptions())
        self.daemon.start()

    def __call__(self, method, target, body=None):
        body = b"" if body is None else json.dumps(body).encode()
        got = answer(self.daemon, Request.parse(method, target, body))
        json.dumps(got.body)
        return int(got.status), got.body


@pytest.fixture
def api():
    return Api()


def test_blobs_over_the_api(api, images):
    assert api("PUT", "/api/v2/blobs", entry(images, "a", "d")) == (204, None)
    status, blobs = api("GET", "/api/v2/blobs?domain_id=d")
    assert (status, len(blobs)) == (200, 2)
    assert SECRET not in repr(blobs)
    assert api("GET", "/api/v2/blobs?domain_id=d&blob_id=a")[1] == [
        {
            "type": "bootstrap",
            "id": "a",
            "domain_id": "d",
            "metadata_path": str(images / "one"),
            "blobs": [blob_id(images / "one")],
        }
    ]
    assert api("DELETE", "/api/v2/blobs?domain_id=d&blob_id=a") == (204, None)
    assert api("GET", "/api/v2/blobs?domain_id=d") == (200, [])


def test_nothing_that_needs_a_mount(api):
    for method in ("POST", "PUT", "DELETE"):
        assert api(method, "/api/v1/mount?mountpoint=/a")[0] == 501
        assert api(method, "/api/v1/mount")[0] == 400
    assert api("PUT", "/api/v1/config", {"registry_auth": SECRET})[0] == 501
    assert api("GET", "/api/v1/config") == (200, {})
    assert api("PATCH", "/api/v2/blobs")[0] == 400
    assert api("GET", "/api/v1/nope")[0] == 404
    assert api("PUT", "/api/v1/daemon/exit") == (204, None)
    api.daemon.wait()


def test_errors_of_an_entry_show_no_secret(api, images):
    for change in ({"backend_type": "ftp"}, {"cache_type": "zzz"}, {"prefetch_config": 7}):
        status, body = api("PUT", "/api/v2/blobs", entry(images, "a", **change))
        assert status == 400
        assert SECRET not in body["message"]


def test_list_in_a_configuration(images, caplog):
    blobs = [entry(images, "a"), entry(images, "b", "", "two")]
    daemon = SingletonDaemon(SingletonOptions(blobs=parse_blob_list(json.dumps({"blobs": blobs}))))
    daemon.start()
    assert {"a", "b"} < counts(daemon.blobs, "").keys()
    daemon.stop()
    assert parse_blob_list("{}") == ()
    with pytest.raises(ConfigError, match="blobs: expected a list"):
        parse_blob_list('{"blobs": {}}')
    with pytest.raises(ConfigError, match="expected an object, got a list"):
        parse_blob_list("[]")
    with pytest.raises(ConfigError, match=r"^blobs\[0\]\.type: missing"):
        parse_blob_list('{"blobs": [{}]}')
    assert parse_blob_list('{"blobz": []}') == ()
    assert "configuration: unknown key blobz" in caplog.text


@pytest.fixture
def cachefiles(tmp_path, monkeypatch):
    """A device that is not there, and a holder of our own."""
    monkeypatch.setenv("NYDUSD_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(service, "DEVICE", tmp_path / "device")
    monkeypatch.setattr(service, "_DEVICE_SECONDS", 0.0)
    return SingletonDaemon(SingletonOptions(fscache=tmp_path))


def holders_end(tmp_path):
    end = time.monotonic() + 60
    while list((tmp_path / "run").glob("*/holder.sock")):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_no_cachefiles_is_told_with_what_there_is_instead(cachefiles, tmp_path):
    with pytest.raises(CachefilesError, match=r"not available on this kernel.*nydusd fuse"):
        cachefiles.start()
    holders_end(tmp_path)
    with pytest.raises(CachefilesError, match="needs a directory"):
        SingletonDaemon(SingletonOptions(fscache=tmp_path / "no")).start()
    holders_end(tmp_path)


def test_cachefiles_of_others_and_without_on_demand_mode(cachefiles, tmp_path, monkeypatch):
    # What every write refuses with EINVAL, as such a kernel refuses the bind.
    (tmp_path / "device").symlink_to("/proc/self/attr/current")
    with pytest.raises(CachefilesError, match="the kernel refuses 'dir'"):
        cachefiles.start()
    holders_end(tmp_path)

    def busy(path, flags):
        raise OSError(errno.EBUSY, "busy", path)

    monkeypatch.setattr(device.os, "open", busy)
    with pytest.raises(CachefilesError, match="another process has it: cachefilesd"):
        device.Device.open(tmp_path)
    assert device.is_kept(tmp_path)


def test_nothing_is_registered_before_it_is_served(cachefiles, images):
    with pytest.raises(StateError, match="the daemon is INIT"):
        cachefiles.add(parse_blob_entry(entry(images, "a")))
    with pytest.raises(StateError):
        cachefiles.start_taken_over()
    with pytest.raises(SupervisorError):
        cachefiles.take_over()
    with pytest.raises(StateError, match="without --fscache"):
        SingletonDaemon(SingletonOptions()).take_over()


def test_culling_without_a_cache(api):
    assert api("DELETE", "/api/v2/blobs?blob_id=x")[0] == 501
    for path in ("start", "fuse/takeover"):
        status, body = api("PUT", f"/api/v1/daemon/{path}")
        assert (status, "UnexpectedEvent" in body["message"]) == (400, True)
