"""Tests with virtual machines: of the lab itself, and below `guest/` those that run inside."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from relay import INSIDE, GuestPlugin, HostPlugin

from vmlab.booting import boot, boot_defect
from vmlab.catalogue import KERNELS
from vmlab.store import find


def pytest_configure(config):
    config.pluginmanager.register(GuestPlugin() if INSIDE else HostPlugin(), "vm-relay")


class Guests:
    """Boots kernels of the cache; a test that needs one that is not there is skipped."""

    def need(self, name):
        defect = boot_defect(KERNELS[name])
        if defect is not None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(defect)

    def boot(self, name, *hardware):
        self.need(name)
        return boot(find(KERNELS[name]), KERNELS[name], *hardware)


@pytest.fixture(scope="session")
def guests():
    """What boots virtual machines: `with guests.boot("ondemand") as guest: guest.run([...])`."""
    return Guests()
