"""Not collected by itself: what test_relay.py expects to come back from a guest as it is here."""

import sys
import time
from pathlib import Path

import pytest


def test_that_passes():
    print("printed in the guest")


def test_that_fails():
    print("printed before it failed")
    assert sys.platform == "an operating system"


@pytest.fixture
def broken():
    raise RuntimeError("broken fixture")


def test_with_a_broken_fixture(broken):
    """Its setup is what fails."""


@pytest.mark.skip(reason="skipped for a reason")
def test_that_is_skipped():
    """Never run."""


@pytest.mark.xfail(reason="expected")
def test_that_fails_as_expected():
    raise AssertionError


def test_that_takes_the_guest_with_it():
    Path("/proc/sysrq-trigger").write_text("c")
    time.sleep(60)


def test_in_a_fresh_guest():
    assert float(Path("/proc/uptime").read_text().split()[0]) > 0
