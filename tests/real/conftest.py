"""Fixtures of the tests with real clients."""

import contextlib
import hashlib
import tarfile
import tempfile
from pathlib import Path

import pytest

from tests.capabilities import CI, need_tool
from tests.real.images import make_image
from tests.real.peers import PeersError, build_peers, peers_directory
from tests.real.rig import Rig
from tests.real.rootfs import make_layers

_TOOLS = ("unshare", "nsenter", "docker-registry", "skopeo", "runc")


@pytest.fixture(scope="session")
def peers():
    """The directory with containerd, ctr, the shim and the snapshotter."""
    for name in _TOOLS:
        need_tool(name)
    try:
        return build_peers()
    except PeersError as error:
        (pytest.fail if CI else pytest.skip)(str(error))


@pytest.fixture(scope="session")
def work():
    """A directory for layers and images, too large for the temporary directories of tests."""
    with tempfile.TemporaryDirectory(prefix="nydus-real-", dir="/var/tmp") as directory:
        yield Path(directory)


@pytest.fixture(scope="session")
def layers(peers, work):
    directory = work / "layers"
    directory.mkdir()
    return make_layers(directory)


def _image(work, name, tars):
    directory = work / name.replace(":", "-")
    directory.mkdir()
    return make_image(name, tars, directory)


@pytest.fixture(scope="session")
def image(work, layers):
    return _image(work, "tiny:n", layers.tars)


@pytest.fixture(scope="session")
def other_image(work, layers):
    """Another image on the same base layer: it has the same blob."""
    return _image(work, "other:n", layers.tars[:1])


@pytest.fixture(scope="session")
def debian_tar():
    """The root filesystem that `make demo` keeps."""
    cache = peers_directory().parent
    found = sorted(cache.glob("debian-*.tar"))
    if not found:
        pytest.skip(f"no debian-*.tar in {cache}, make demo makes it")
    return found[0]


@pytest.fixture(scope="session")
def debian_sums(debian_tar):
    """SHA-256 of all regular files with plain names, by absolute path."""
    with tarfile.open(debian_tar) as tar:
        return {
            f"/{member.name.removeprefix('./')}": hashlib.sha256(
                tar.extractfile(member).read()
            ).hexdigest()
            for member in tar
            if member.isreg() and "\\" not in member.name and "\n" not in member.name
        }


@pytest.fixture(scope="session")
def debian(peers, work, debian_tar):
    return _image(work, "debian:n", [debian_tar])


@pytest.fixture
def make_rig(peers):
    """Start rigs that are gone after the test; a failed test shows their logs."""
    with contextlib.ExitStack() as stack:

        def make(*args, **options):
            rig = Rig(peers, *args, **options)
            stack.callback(rig.close)
            stack.callback(lambda: print(rig.logs()))
            return rig

        yield make


@pytest.fixture(params=["dedicated", "shared"])
def mode(request):
    return request.param


@pytest.fixture
def rig(make_rig, mode):
    return make_rig(mode, "restart")
