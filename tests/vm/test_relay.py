"""What tests in a guest do is what this machine's pytest tells of them."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from relay import GUEST_TESTS

from vmlab.processes import CHECKOUT


def outcomes(report):
    """Return (outcome, text) by the name of the test from a JUnit report."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child for child in case if child.tag != "properties"]
        kind = kinds[0] if kinds else None
        text = "" if kind is None else kind.get("message", "") + (kind.text or "")
        found[case.get("name").split("[")[0]] = ("passed" if kind is None else kind.tag, text)
    return found


def test_outcomes_come_back(guests, tmp_path):
    guests.need("ondemand")
    report = tmp_path / "report.xml"
    probe = GUEST_TESTS / "relay_probe.py"
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", probe]
    done = subprocess.run(
        [*words, f"--junitxml={report}"], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stdout
    found = outcomes(report)
    assert found["test_that_passes"] == ("passed", "")
    assert found["test_in_a_fresh_guest"] == ("passed", "")
    kind, text = found["test_that_fails"]
    assert kind == "failure"
    assert "assert 'linux' == 'an operating system'" in text
    assert "printed before it failed" in done.stdout
    kind, text = found["test_with_a_broken_fixture"]
    assert kind == "error"
    assert "broken fixture" in text
    assert found["test_that_is_skipped"][0] == "skipped"
    assert found["test_that_fails_as_expected"][0] == "skipped"
    kind, text = found["test_that_takes_the_guest_with_it"]
    assert kind == "failure"
    assert "kernel panic in the guest: sysrq triggered crash" in text
