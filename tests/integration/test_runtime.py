"""Several images in one process: shared blobs, joining and leaving, users that outlive mounts."""

import io
import random
import subprocess
import sys
import tarfile
import threading
import time

import pytest

from builder import BuildOptions, MergeOptions, PrefetchPolicy, SourceType, build, merge
from erofs import FormatError
from fscache.backend import LocalFsConfig
from fscache.config import DaemonConfig
from fscache.image import ImageOptions
from fscache.runtime import Runtime
from fscache.settings import PrefetchConfig, RafsConfig
from tests.capabilities import requires

pytestmark = requires("root", "fanotify")

TIMEOUT = 60
RANDOM = random.Random(5)
FILES = {f"f{number}": RANDOM.randbytes(300_000) for number in range(6)}


def tar(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return io.BytesIO(buffer.getvalue())


@pytest.fixture
def images(tmp_path):
    """Two images on one blob: `all` has every file of it, `some` lacks f0 to f2."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    layers = {"low": tar(**FILES), "high": tar(**{".wh.f0": b"", ".wh.f1": b"", ".wh.f2": b""})}
    for name, data in layers.items():
        build(
            data,
            BuildOptions(
                source_type=SourceType.TAR, bootstrap=tmp_path / f"{name}.boot", blob_dir=blobs
            ),
        )
    (blob,) = blobs.iterdir()
    blob.rename(blobs / "low")
    merge([tmp_path / "low.boot"], MergeOptions(bootstrap=tmp_path / "all"))
    merge(
        [tmp_path / "low.boot", tmp_path / "high.boot"],
        MergeOptions(bootstrap=tmp_path / "some"),
    )
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.fixture
def runtime():
    runtime = Runtime()
    yield runtime
    closer = threading.Thread(target=runtime.close, daemon=True)
    closer.start()
    closer.join(TIMEOUT)
    assert not closer.is_alive(), "a mount did not end"


def mount(runtime, images, bootstrap, place, **settings):
    config = DaemonConfig(LocalFsConfig(dir=images / "blobs"), images / "cache", **settings)
    return runtime.mount(config, images / bootstrap, images / place, ImageOptions())


def read(path):
    """Read in another process: a thread of this one could stop its own daemon."""
    return subprocess.run(["cat", path], capture_output=True, check=True, timeout=TIMEOUT).stdout


def requests(image):
    return image.backend.metrics.as_dict()["read_count"]


def test_what_one_image_fetched_another_has(runtime, images):
    first = mount(runtime, images, "all", "a")
    second = mount(runtime, images, "some", "b")
    for name in ("f3", "f4"):
        assert read(images / "a" / name) == FILES[name]
    fetched = requests(first) + requests(second)
    for name in ("f3", "f4"):
        assert read(images / "b" / name) == FILES[name]
    assert requests(first) + requests(second) == fetched > 0


def test_image_that_knows_more_of_a_complete_blob(runtime, images):
    """The ignore mark of the complete blob has to go, or the new chunks would be zeros."""
    mount(runtime, images, "some", "b")
    for name in ("f3", "f4", "f5"):
        assert read(images / "b" / name) == FILES[name]
    (domain,) = runtime._domains.values()
    shared = domain._shared["low"]
    deadline = time.monotonic() + TIMEOUT
    while not shared.ignored:
        assert time.monotonic() < deadline, "the blob was never complete"
        time.sleep(0.05)
    mount(runtime, images, "all", "a")
    assert not shared.ignored
    for name, data in FILES.items():
        assert read(images / "a" / name) == data
        if name in ("f3", "f4", "f5"):
            assert read(images / "b" / name) == data


def test_an_image_that_leaves_does_not_take_the_blob_along(runtime, images):
    first = mount(runtime, images, "all", "a")
    mount(runtime, images, "some", "b")
    assert read(images / "a" / "f3") == FILES["f3"]
    runtime.unmount(first)
    assert not (images / "a" / "f3").exists()
    assert read(images / "b" / "f4") == FILES["f4"]
    again = mount(runtime, images, "all", "a")
    assert read(images / "a" / "f0") == FILES["f0"]
    assert requests(again) <= 1


def test_users_of_an_unmounted_image_are_served(runtime, images):
    image = mount(runtime, images, "all", "a")
    code = (
        "import sys; f = open(sys.argv[1], 'rb'); print('open', flush=True);"
        "sys.stdin.readline(); sys.stdout.buffer.write(f.read())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, images / "a" / "f1"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as reader:  # fmt: skip
        assert reader.stdout.readline() == b"open\n"
        runtime.unmount(image)
        assert not list((images / "a").iterdir())
        assert not image.is_gone
        out, _ = reader.communicate(b"go\n", timeout=TIMEOUT)
    assert out == FILES["f1"]


def wait_for(condition, what):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_prefetch_of_everything(runtime, images):
    config = RafsConfig(prefetch=PrefetchConfig(enable=True, threads=2, prefetch_all=True))
    image = mount(runtime, images, "all", "a", rafs=config)
    metrics = image.cache_metrics
    wait_for(lambda: metrics.as_dict()["data_all_ready"], "prefetch did not end")
    before = requests(image)
    for name, data in FILES.items():
        assert read(images / "a" / name) == data
    assert requests(image) == before
    assert metrics.as_dict()["prefetch_data_amount"] > 0


def test_prefetch_of_the_listed_files(runtime, images):
    merge(
        [images / "low.boot"],
        MergeOptions(
            bootstrap=images / "listed",
            prefetch_policy=PrefetchPolicy.FS,
            prefetch_patterns=[b"/f4", b"/f2"],
        ),
    )
    config = RafsConfig(prefetch=PrefetchConfig(enable=True, threads=1, prefetch_all=False))
    image = mount(runtime, images, "listed", "a", rafs=config)
    wait_for(lambda: image.cache_metrics.chunks_fetched == 2, "prefetch did not end")
    before = requests(image)
    for name in ("f4", "f2"):
        assert read(images / "a" / name) == FILES[name]
    assert requests(image) == before == 2
    assert read(images / "a" / "f0") == FILES["f0"]
    assert requests(image) == 3


def test_reads_are_counted(runtime, images):
    image = mount(runtime, images, "all", "a")
    assert read(images / "a" / "f1") == FILES["f1"]
    counted = image.cache_metrics.reads.as_dict()
    assert counted["data_read"] >= len(FILES["f1"])
    assert counted["fop_hits"][4] == sum(counted["block_count_read"]) > 0
    assert sum(counted["read_latency_dist"]) == counted["fop_hits"][4]
    assert not any(counted["fop_errors"])


def test_unmount_ends_a_slow_prefetch(runtime, images):
    config = RafsConfig(prefetch=PrefetchConfig(enable=True, bandwidth_limit=1, prefetch_all=True))
    image = mount(runtime, images, "all", "a", rafs=config)
    assert read(images / "a" / "f5") == FILES["f5"]
    started = time.monotonic()
    runtime.unmount(image)
    # At a byte a second it would take days.
    assert time.monotonic() - started < TIMEOUT


def test_mount_that_fails_leaves_nothing(runtime, images):
    (images / "bad").write_bytes(b"nothing")
    with pytest.raises(FormatError):
        mount(runtime, images, "bad", "a")
    good = mount(runtime, images, "all", "a")
    assert read(images / "a" / "f0") == FILES["f0"]
    runtime.unmount(good)
