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


@pytest.fixture(scope="session")
def guests():
    """A function that boots a kernel, or skips; what it returns is a context manager."""

    def start(name, *hardware):
        defect = boot_defect(KERNELS[name])
        if defect is not None:
            (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(defect)
        return boot(find(KERNELS[name]), KERNELS[name], *hardware)

    return start
