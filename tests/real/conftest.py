"""Fixtures of the tests with real clients."""

import contextlib
import tempfile
from pathlib import Path

import pytest

from tests.capabilities import CI, need_tool
from tests.real.images import make_image
from tests.real.peers import PeersError, build_peers
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
