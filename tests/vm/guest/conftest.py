"""Which kernels a test is for: `pytest.mark.kernel("6.1", ...)`; without it, `ondemand`."""

import subprocess

import pytest


def pytest_generate_tests(metafunc):
    mark = metafunc.definition.get_closest_marker("kernel")
    names = mark.args if mark else ("ondemand",)
    metafunc.parametrize("kernel", names, indirect=True, scope="session")


@pytest.fixture(autouse=True)
def kernel(request):
    """The name of the kernel that this runs under."""
    return request.param


@pytest.fixture
def mounted(tmp_path):
    """A function that mounts something, with mount(8)'s words, until the test is over."""
    places = []

    def mount(*words):
        place = tmp_path / f"mount{len(places)}"
        place.mkdir()
        subprocess.run(["mount", *map(str, words), str(place)], check=True)
        places.append(place)
        return place

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", str(place)], check=True)
