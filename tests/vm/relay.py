"""Tests below `guest/` run in a virtual machine; this machine's pytest shows them as its own.

Here their items are collected as any others, so that selection works. Those of one kernel then go
to one pytest in one guest, which sends a report of each phase back as a line of its output. In the
guest, where NYDUS_VM_KERNEL is set, they just run.
"""

import json
import os
from pathlib import Path

import pytest

from vmlab.booting import boot, boot_defect
from vmlab.catalogue import KERNELS
from vmlab.errors import LabError
from vmlab.frames import EXIT, STDOUT
from vmlab.processes import CHECKOUT
from vmlab.store import find

GUEST_TESTS = Path(__file__).resolve().parent / "guest"
INSIDE = os.environ.get("NYDUS_VM_KERNEL")
REPORTING = "NYDUS_VM_REPORTS"
MARK = "vm-report:"
# Nothing that would only be imported: that takes seconds in an emulated processor.
PYTEST = (
    ".venv/bin/python", "-m", "pytest", "-q", "--no-header", "--confcutdir=tests/vm",
    "-p", "no:cacheprovider", "-p", "pytest_timeout",
    # What was selected here by marks is named there.
    "-m", "",
)  # fmt: skip
ENVIRONMENT = {REPORTING: "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
# One test in a processor that is emulated, and everything of one kernel.
TEST_SECONDS = 300
KERNEL_SECONDS = 1800


def is_guest_test(item):
    return item.path.is_relative_to(GUEST_TESTS)


def kernel_of(item):
    return item.callspec.params["kernel"]


class Session:
    """The tests of one kernel, in a guest that is booted anew when one of them has killed it."""

    def __init__(self, config, kernel, items):
        self.config = config
        self.kernel = KERNELS[kernel]
        self.waiting = [item.nodeid for item in items]
        self.guest = None
        self.reports = iter(())
        self.text = []

    def close(self):
        if self.guest is not None:
            self.guest.close()
            self.guest = None

    def _start(self):
        self.close()
        self.text = []
        self.guest = boot(find(self.kernel), self.kernel)
        words = [*PYTEST, f"--timeout={TEST_SECONDS}", *self.waiting]
        self.guest.send_run(words, ENVIRONMENT, CHECKOUT, None)
        self.reports = self._receive()

    def _receive(self):
        """Yield the reports as they come; all other output is kept for the case of need."""
        rest = b""
        for kind, payload in self.guest.receive(KERNEL_SECONDS, "the tests in the guest"):
            if kind == EXIT:
                return
            if kind != STDOUT:
                self.text.append(payload.decode(errors="replace"))
                continue
            *lines, rest = (rest + payload).split(b"\n")
            for line in lines:
                text, mark, report = line.decode(errors="replace").partition(MARK)
                self.text.append(text if mark else text + "\n")
                if mark:
                    data = json.loads(report)
                    hook = self.config.hook
                    yield hook.pytest_report_from_serializable(config=self.config, data=data)

    def reports_of(self, item):
        """Yield the reports of one test; when it takes the guest with it, one that says so."""
        try:
            if self.guest is None:
                self._start()
            for report in self.reports:
                if report.nodeid == item.nodeid:
                    yield report
                    if report.when == "teardown":
                        self.waiting.remove(item.nodeid)
                        return
            reason = "pytest in the guest ended without it:\n" + "".join(self.text)
        except LabError as error:
            reason = str(error)
        self.close()
        self.waiting.remove(item.nodeid)
        yield failure(item, reason)


def failure(item, reason):
    return pytest.TestReport(
        item.nodeid, item.location, dict(item.keywords), "failed", reason, "call"
    )


class HostPlugin:
    """On the host: sends the tests of `guest/` away."""

    def __init__(self):
        self.sessions = {}

    # After others have left out what was not selected: a guest runs all that it is given.
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config, items):
        groups = {}
        for item in filter(is_guest_test, items):
            groups.setdefault(kernel_of(item), []).append(item)
            item.add_marker(pytest.mark.timeout(0))
        for kernel, group in groups.items():
            defect = boot_defect(KERNELS[kernel])
            if defect is None:
                self.sessions[kernel] = Session(config, kernel, group)
            elif os.environ.get("CI") != "true":
                for item in group:
                    item.add_marker(pytest.mark.skip(reason=defect))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item):
        if not is_guest_test(item) or item.get_closest_marker("skip"):
            return None
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        session = self.sessions.get(kernel_of(item))
        if session is None:
            reports = [failure(item, boot_defect(KERNELS[kernel_of(item)]))]
        else:
            reports = session.reports_of(item)
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(self):
        for session in self.sessions.values():
            session.close()


class GuestPlugin:
    """In the guest: leaves out what is for other kernels, and sends reports if they are wanted."""

    def pytest_collection_modifyitems(self, config, items):
        others = [item for item in items if is_guest_test(item) and kernel_of(item) != INSIDE]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        if not os.environ.get(REPORTING):
            return
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        terminal.write_line(MARK + json.dumps(data))
        terminal.flush()
