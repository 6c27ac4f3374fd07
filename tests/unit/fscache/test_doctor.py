"""`nydusd doctor` on machines that we do not have: facts in, verdicts and remedies out."""

import errno
import json
from pathlib import Path

import pytest

from fscache.doctor.checks import Verdict
from fscache.doctor.facts import CAP_SYS_ADMIN, CAP_SYS_RESOURCE, Facts, parse_config
from fscache.doctor.report import diagnose
from fscache.probe import Finding

CONFIG = {
    "CONFIG_EROFS_FS": "m",
    "CONFIG_EROFS_FS_BACKED_BY_FILE": "y",
    "CONFIG_FANOTIFY_ACCESS_PERMISSIONS": "y",
    "CONFIG_BLK_DEV_NBD": "m",
    "CONFIG_OVERLAY_FS": "m",
}
GOOD = Facts(
    release="6.18.44-x",
    machine="x86_64",
    config=CONFIG,
    capabilities=CAP_SYS_ADMIN | CAP_SYS_RESOURCE,
    in_user_namespace=False,
    work_dir=Path("/cache"),
    filesystem="ext4",
    writable=True,
    free_bytes=10**10,
    findings={
        name: Finding(name, True, f"{name} works")
        for name in ("erofs", "privilege", "file-backed", "fanotify", "self-test")
    },
    devices=dict.fromkeys(
        ("/dev/cachefiles", "/dev/fuse", "/dev/nbd0", "/dev/ublk-control"), errno.ENOENT
    ),
    filesystems={"erofs": 0, "overlay": 0},
    fscache_mounts=False,
    fuse="no FUSE",
    loop="",
    sysfs=True,
    open_files=(1024, 524288),
    sysctls={
        "fs/fanotify/max_user_groups": 128,
        "fs/fanotify/watchdog_timeout": 60,
        "fs/nr_open": 1048576,
        "kernel/hung_task_timeout_secs": 120,
    },
)


def without(*names, **changes):
    """Return facts of a machine where some of the findings failed."""
    findings = dict(GOOD.findings)
    for name in (*names, "self-test"):
        findings[name] = Finding(name, False, f"{name} is missing")
    return GOOD._replace(findings=findings, **changes)


def row(facts, name):
    (found,) = (row for row in diagnose(facts).rows if row.name == name)
    return found


def remedies(facts):
    return {row.name: row.remedy for row in diagnose(facts).rows if row.remedy}


def test_where_everything_works():
    report = diagnose(GOOD)
    assert report.lazy
    assert report.chosen.name == "fanotify on plain files"
    wanted = {row.name for row in report.rows if row.verdict is Verdict.NO}
    assert wanted == {"cachefiles on demand", "ublk", "NBD", "FUSE"}
    assert remedies(GOOD) == {
        "cachefiles on demand": "CONFIG_EROFS_FS_ONDEMAND=y in the kernel's configuration",
        "ublk": "CONFIG_BLK_DEV_UBLK=y in the kernel's configuration",
        "NBD": "modprobe nbd",
        "FUSE": "CONFIG_FUSE_FS=y in the kernel's configuration",
    }
    assert all(row.found and row.meaning for row in report.rows)


def test_every_row_that_says_no_has_a_line_that_helps():
    nothing = without(
        "erofs", "privilege", "file-backed", "fanotify",
        release="5.10.0", config=None, capabilities=0, filesystem="tmpfs", writable=False,
        loop="no", sysfs=False, filesystems={"erofs": errno.ENODEV, "overlay": errno.ENODEV},
        open_files=(1024, 4096), fscache_mounts=None,
        sysctls={"kernel/hung_task_timeout_secs": 30, "fs/fanotify/watchdog_timeout": 0},
    )  # fmt: skip
    report = diagnose(nothing)
    assert report.chosen is None
    assert not report.lazy
    assert "no image can be mounted here" in report.as_text()
    for found in report.rows:
        # Without EROFS the directory of sysfs says nothing.
        assert found.name == "sysfs" or (found.verdict is not Verdict.YES and found.remedy)


def test_debian_12_reads_whole_images_only():
    facts = without("fanotify", release="6.12.88+deb12-amd64")
    report = diagnose(facts)
    assert report.chosen.name == "plain files, complete (--eager)"
    assert not report.lazy
    assert report.reason == (
        "better ones are not there, first of all: pre-content events (fanotify is missing)"
    )
    assert row(facts, "kernel").verdict is Verdict.NOTE
    assert row(facts, "pre-content events").remedy == "Linux 6.14 or later"


def test_fuse_reads_lazily_where_the_kernel_does_not():
    devices = {**GOOD.devices, "/dev/fuse": 0}
    facts = without("fanotify", release="6.12.88+deb12-amd64", devices=devices, fuse="")
    report = diagnose(facts)
    assert report.lazy
    assert report.chosen.name == "FUSE"
    assert row(facts, "FUSE").verdict is Verdict.YES
    facts = facts._replace(fuse="libfuse 3 is not installed")
    assert not diagnose(facts).lazy
    assert row(facts, "FUSE").remedy == "apt install fuse3"
    assert row(facts, "FUSE").found == "libfuse 3 is not installed"


def test_before_file_backed_mounts_loop_devices_are_left():
    facts = without("file-backed", "fanotify", release="6.6.9")
    assert diagnose(facts).chosen.name == "loop devices, complete (--eager)"
    assert row(facts, "EROFS from files").remedy == "Linux 6.12 or later"


@pytest.mark.parametrize("code", [0, errno.EBUSY])
def test_cachefiles_of_a_kernel_that_has_it(code):
    devices = {**GOOD.devices, "/dev/cachefiles": code}
    facts = without("fanotify", release="6.6.60", devices=devices, fscache_mounts=True)
    found = row(facts, "cachefiles on demand")
    assert found.verdict is (Verdict.NOTE if code else Verdict.YES)
    assert ("cachefilesd" in found.remedy) == bool(code)
    report = diagnose(facts)
    assert report.lazy == (not code)
    assert (report.chosen.name == "cachefiles") == (not code)
    # The kernel's cache lies below the cache directory.
    assert not diagnose(facts._replace(filesystem="tmpfs")).lazy


def test_cachefiles_that_are_unsafe_are_not_chosen():
    devices = {**GOOD.devices, "/dev/cachefiles": 0}
    facts = without("fanotify", release="6.6.9", devices=devices, fscache_mounts=True)
    found = row(facts, "cachefiles on demand")
    assert found.verdict is Verdict.NOTE
    assert "CVE-2024-40899" in found.remedy
    assert not diagnose(facts).lazy


@pytest.mark.parametrize(("release", "chosen"), [("6.12.88", True), ("6.1.0-40-amd64", False)])
def test_nbd_where_flat_images_are_mounted(release, chosen):
    devices = {**GOOD.devices, "/dev/nbd0": 0}
    report = diagnose(without("fanotify", "file-backed", release=release, devices=devices))
    assert (report.chosen.name == "NBD") is chosen
    assert report.lazy is chosen


def test_what_no_version_uses_is_told_all_the_same():
    devices = {**GOOD.devices, "/dev/ublk-control": 0}
    text = diagnose(GOOD._replace(devices=devices)).as_text()
    assert "would allow, but this version does not use: ublk" in text


def test_cachefiles_that_are_gone_for_good():
    assert (
        "not in this kernel" in row(GOOD._replace(release="7.2.0"), "cachefiles on demand").remedy
    )


def test_no_privilege():
    facts = without("privilege", "file-backed", "fanotify", capabilities=0)
    assert row(facts, "privilege").remedy == "run as root; in a container with --privileged"
    assert row(facts, "EROFS from files").remedy == "see above"
    assert row(facts, "pre-content events").remedy == "see above"
    assert diagnose(facts).chosen is None


def test_root_of_a_user_namespace():
    facts = without("privilege", "file-backed", "fanotify", in_user_namespace=True)
    assert "outside of the user namespace" in row(facts, "privilege").remedy


@pytest.mark.parametrize("filesystem", ["tmpfs", "overlayfs"])
def test_directory_on_a_file_system_that_does_not_do(filesystem):
    facts = without("file-backed", "fanotify", filesystem=filesystem)
    found = row(facts, "cache directory")
    assert (found.verdict, "ext4, xfs or btrfs" in found.remedy) == (Verdict.NOTE, True)
    assert row(facts, "EROFS from files").remedy == "see above"


def test_directory_that_cannot_be_written():
    facts = without("file-backed", "fanotify", writable=False)
    assert row(facts, "cache directory").verdict is Verdict.NO
    assert row(facts, "EROFS from files").remedy == "see above"


@pytest.mark.parametrize(
    ("names", "option", "check"),
    [
        (("erofs", "file-backed", "fanotify"), "CONFIG_EROFS_FS", "EROFS"),
        (("file-backed", "fanotify"), "CONFIG_EROFS_FS_BACKED_BY_FILE", "EROFS from files"),
        (("fanotify",), "CONFIG_FANOTIFY_ACCESS_PERMISSIONS", "pre-content events"),
    ],
)
def test_options_that_are_not_set(names, option, check):
    facts = without(*names, config={**CONFIG, option: "n"})
    assert row(facts, check).remedy == f"{option}=y in the kernel's configuration"


def test_modules_that_are_not_loaded():
    facts = without("erofs", "file-backed", "fanotify", filesystems={"erofs": 0, "overlay": 19})
    assert row(facts, "EROFS").remedy == "modprobe erofs"
    assert row(facts, "overlayfs").remedy == "modprobe overlay"
    assert row(facts._replace(config=None), "EROFS").remedy.startswith("modprobe erofs (a kernel")


def test_hidden_devices():
    config = {**CONFIG, "CONFIG_FUSE_FS": "y"}
    assert "hidden from this container" in row(GOOD._replace(config=config), "FUSE").remedy
    devices = {**GOOD.devices, "/dev/fuse": errno.EPERM}
    assert row(GOOD._replace(devices=devices), "FUSE").remedy == "allow the device /dev/fuse"


def test_a_self_test_that_fails_alone():
    assert "--eager needs no events" in row(without(), "lazy read, tried").remedy
    assert diagnose(without()).chosen.name == "plain files, complete (--eager)"


def test_no_sysfs_no_lazy_reading():
    facts = GOOD._replace(sysfs=False)
    assert row(facts, "sysfs").remedy == "mount -t sysfs sysfs /sys"
    report = diagnose(facts)
    assert not report.lazy
    assert "sysfs" in report.reason


@pytest.mark.parametrize(
    ("changes", "verdict", "text"),
    [
        ({}, Verdict.YES, "can be raised to 1048576"),
        ({"capabilities": CAP_SYS_ADMIN}, Verdict.YES, "can be raised to 524288"),
        (
            {"capabilities": CAP_SYS_ADMIN, "open_files": (1024, 4096)},
            Verdict.NOTE,
            "can be raised to 4096",
        ),
    ],
)
def test_open_files(changes, verdict, text):
    found = row(GOOD._replace(**changes), "open files")
    assert found.verdict is verdict
    assert text in found.found


def test_limits():
    sysctls = {
        "fs/fanotify/max_user_groups": 4,
        "fs/fanotify/watchdog_timeout": 0,
        "kernel/hung_task_timeout_secs": 60,
    }
    lines = remedies(GOOD._replace(sysctls=sysctls))
    assert lines["fanotify groups"] == "sysctl fs.fanotify.max_user_groups=1024"
    assert lines["fanotify watchdog"] == "sysctl fs.fanotify.watchdog_timeout=120"
    assert lines["hung task limit"] == "sysctl kernel.hung_task_timeout_secs=120"


def test_json_has_everything():
    value = json.loads(json.dumps(diagnose(GOOD).as_dict()))
    assert value["lazy"] is True
    assert value["chosen"] == "fanotify on plain files"
    assert value["checks"][0] == {
        "name": "privilege",
        "verdict": "yes",
        "found": "CAP_SYS_ADMIN",
        "meaning": "needed to mount, and for pre-content events",
        "remedy": "",
    }
    assert {way["name"] for way in value["transports"] if way["lazy"]} >= {"cachefiles", "FUSE"}


def test_kernel_configurations():
    text = '#\n# Linux\nCONFIG_A=y\nCONFIG_B=m\n# CONFIG_C is not set\nCONFIG_D="x"\nCONFIG_E=\n'
    assert parse_config(text) == {
        "CONFIG_A": "y",
        "CONFIG_B": "m",
        "CONFIG_C": "n",
        "CONFIG_D": '"x"',
        "CONFIG_E": "n",
    }
