"""nydus-overlayfs under the real mount.fuse3, mount(8) and overlayfs (spec vm-runtimes 7.1).

The rows of the specification are in the names of the tests; H10 is in `make bench`.
"""

import base64
import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from capabilities import need_tool, requires
from mountspace import PATH, MountSpace

from overlayfs_helper.install import install_helper

pytestmark = [pytest.mark.root, requires("root", "overlay")]

CHECKOUT = Path(__file__).resolve().parents[2]
SECRET = "c2VjcmV0LXBhc3N3b3Jk"
RUNTIME_OPTIONS = (f"extraoption={SECRET}==", f"io.katacontainers.volume={SECRET}")

# The helper in a kernel without the new mount API, or with one that has no lowerdir+.
WITHOUT_NEW_API = """
import sys
sys.path.insert(0, {checkout!r})
from overlayfs_helper import cli, mounting
def refuse(number, *arguments):
    raise OSError({code}, "refused")
mounting._call = refuse
sys.exit(cli.main())
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The directory that `make install-helper` fills, with bin and sbin."""
    top = tmp_path_factory.mktemp("helper")
    assert install_helper(top, top / "sbin") == top / "bin/nydus-overlayfs"
    return top


@pytest.fixture
def space(installed, tmp_path):
    made = MountSpace(tmp_path, installed / "bin")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def recorder(space):
    """A program in PATH that writes its arguments down."""
    program, record = space.top / "recorder", space.top / "record"
    space.seen(program).write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {record}\n')
    space.seen(program).chmod(0o755)

    def recorded():
        return space.seen(record).read_text().split("\0")[:-1]

    space.programs = f"{space.top}:{space.programs}"
    return recorded


class Layers:
    """Lower, upper and work directories with a target; `words` are mount options."""

    def __init__(self, space, count=1, prefix="", names=None):
        self.names = names or [f"{prefix}{number}" for number in range(count)]
        self.target, self.upper, self.work = space.make("target", "upper", "work")
        self.lower = [space.make(name) for name in self.names]
        for number, path in enumerate(self.lower):
            space.seen(path / f"file{number}").touch()

    def words(self):
        lower = ":".join(str(path) for path in self.lower)
        return [f"workdir={self.work}", f"upperdir={self.upper}", f"lowerdir={lower}"]

    def options(self, *more):
        return ",".join([*self.words(), *more])


def files(space, target):
    return sorted(path.name for path in space.seen(target).iterdir())


def mounted(space):
    """Return the options of the one overlay, without those that name directories."""
    ((_, options),) = space.overlays()
    return [word for word in options if b"dir" not in word]


def assert_refused(space, done, *statuses, says=""):
    """One line that says why, without any secret, and nothing mounted."""
    text = done.stderr.decode()
    assert done.returncode in statuses, text
    assert len(text.splitlines()) == 1, text
    assert says in text
    assert SECRET not in text + done.stdout.decode()
    assert space.overlays() == []


@pytest.mark.parametrize(
    "call",
    [("mount.fuse3", "-t", "recorder"), ("mount.fuse", "-t", "recorder"),
     ("mount.fuse", "-t", "fuse.recorder"), ("mount.fuse3", "-t", "{top}/recorder")],
    ids=["h1-fuse3", "h2-fuse", "h2-fuse-type", "h2-absolute-path"],
)  # fmt: skip
def test_h1_h2_what_mount_fuse_passes(space, recorder, call):
    need_tool(call[0])
    words = [word.format(top=space.top) for word in call]
    options = ["-o", "workdir=/W", "-o", "upperdir=/U", "-o", "lowerdir=/L"]
    done = space.run(words[0], "overlay", "/T", *options, *words[1:])
    assert done.returncode == 0, done.stderr
    joined = "workdir=/W,upperdir=/U,lowerdir=/L,dev,suid"
    assert recorder() == ["overlay", "/T", "-o", joined]


@pytest.mark.parametrize("program", ["mount.fuse3", "mount.fuse"])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_h3_runtime_options_do_not_reach_the_kernel(space, program, place):
    need_tool(program)
    layers = Layers(space, 2)
    words = layers.words()
    words[place:place] = [*RUNTIME_OPTIONS, RUNTIME_OPTIONS[1]]
    options = [part for word in words for part in ("-o", word)]
    done = space.run(program, "overlay", layers.target, *options, "-t", "nydus-overlayfs")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    ((place, mounted_with),) = space.overlays()
    assert place == os.fsencode(layers.target)
    assert not [word for word in mounted_with if b"extraoption" in word or b"kata" in word]
    space.seen(layers.target / "new").write_text("written")
    assert space.seen(layers.upper / "new").read_text() == "written"
    assert files(space, layers.target) == ["file0", "file1", "new"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", b"rw,relatime"),
        ("ro", b"ro,relatime"),
        ("nosuid,nodev", b"rw,nosuid,nodev,relatime"),
        ("rw", b"rw,relatime"),
        ("ro,rw", b"rw,relatime"),
        ("rw,ro", b"ro,relatime"),
        ("dev,suid", b"rw,relatime"),
        ("nodev,dev,nosuid,noexec,noatime", b"rw,nosuid,noexec,noatime"),
    ],
)
@pytest.mark.parametrize("by_parts", [False, True], ids=["mount", "fsmount"])
def test_h4_the_last_word_of_a_flag_wins(space, words, expected, by_parts):
    prefix = "long" * 12
    layers = Layers(space, 100, prefix) if by_parts else Layers(space)
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", layers.options(words))
    assert done.returncode == 0, done.stderr
    assert mounted(space)[: expected.count(b",") + 1] == expected.split(b",")


def test_h4_mount_fuse_adds_no_restriction(space):
    need_tool("mount.fuse3")
    layers = Layers(space)
    words = ["-o", layers.options(), "-t", "nydus-overlayfs"]
    done = space.run("mount.fuse3", "overlay", layers.target, *words)
    assert done.returncode == 0, done.stderr
    assert mounted(space)[:2] == [b"rw", b"relatime"]


@pytest.mark.parametrize("count", [2, 50, 120, 300])
def test_h5_many_layers_with_a_long_common_prefix(space, count):
    layers = Layers(space, count, "io.containerd.snapshotter.v1.nydus/snapshots/" + "x" * 20)
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", layers.options())
    assert done.returncode == 0, done.stderr
    assert files(space, layers.target) == sorted(f"file{number}" for number in range(count))
    space.seen(layers.target / "file0").unlink()
    assert list(space.seen(layers.upper).iterdir()) == [space.seen(layers.upper / "file0")]


def old_kernel(space, layers, code=errno.EINVAL):
    program = WITHOUT_NEW_API.format(checkout=str(CHECKOUT), code=code)
    words = [sys.executable, "-I", "-c", program, "overlay"]
    return space.run(*words, layers.target, "-o", layers.options(*RUNTIME_OPTIONS))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS, errno.EPERM])
def test_h5_names_are_shortened_where_the_kernel_takes_one_page(space, code):
    layers = Layers(space, 120, "io.containerd.snapshotter.v1.nydus/snapshots/")
    done = old_kernel(space, layers, code)
    assert done.returncode == 0, done.stderr
    assert len(files(space, layers.target)) == 120


def test_h5_what_fits_nowhere_is_a_clear_error(space):
    layers = Layers(space, 120, "y" * 60)
    done = old_kernel(space, layers)
    assert_refused(space, done, 32, says="Linux 6.7 takes lower directories one by one")


def test_h5_more_layers_than_overlayfs_takes(space):
    layers = Layers(space, 501, "x" * 30)
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", layers.options())
    assert_refused(space, done, 32, says="500")


def test_h5_directories_with_names_longer_than_a_string(space):
    """fsconfig takes 255 bytes: longer names go through descriptors."""
    layers = Layers(space, 30, "/".join(["z" * 100] * 4))
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", layers.options())
    assert done.returncode == 0, done.stderr
    assert len(files(space, layers.target)) == 30


def test_h6_the_longest_options_that_reach_the_helper(space):
    need_tool("mount.fuse3")
    layers = Layers(space)
    options = layers.options("extraoption=")
    options += "A" * (125_000 - len(options))
    words = ["overlay", layers.target]
    done = space.run("mount.fuse3", *words, "-o", options, "-t", "nydus-overlayfs")
    assert done.returncode == 0, done.stderr
    assert len(space.overlays()) == 1


def test_h6_longer_options_fail_before_the_helper(space, recorder):
    need_tool("mount.fuse3")
    part = f"extraoption={'A' * 67_500}"
    words = ["overlay", "/T", "-o", part, "-o", part, "-t", "recorder"]
    done = space.run("mount.fuse3", *words)
    assert done.returncode == 1
    assert b"Argument list too long" in done.stderr
    assert not space.seen(space.top / "record").exists()
    with pytest.raises(OSError) as caught:
        space.run("mount.fuse3", "overlay", "/T", "-o", "A" * 135_000)
    assert caught.value.errno == errno.E2BIG


def test_h7_bad_calls_are_refused(space):
    layers = Layers(space)
    good = layers.options(*RUNTIME_OPTIONS)
    gone = good.replace(f"upperdir={layers.upper}", "upperdir=/nowhere/upper")
    calls = [
        (("nothing", layers.target, "-o", good), "source"),
        (("overlay", layers.target), "no options"),
        (("overlay", layers.target, "-o", ""), "no options"),
        (("overlay", layers.target, "-o", ",".join(RUNTIME_OPTIONS)), "lower directory"),
        (("overlay", layers.target, "-o", gone), "/nowhere/upper: No such file or directory"),
        (("overlay", layers.target, "-o", good + ",wrong=1"), "Invalid argument"),
        (("overlay", "/nowhere/target", "-o", good), "/nowhere/target"),
        (("overlay", layers.target, "-o", good + ",X-containerd.mkdir.path=/x"), "did not run"),
        (("overlay", layers.target, "-o", good + ",uidmap=0:1:2"), "uidmap"),
        (("overlay", layers.target, "-o", good, "-x"), "unknown switch"),
        (("overlay", "-o", good), "expected a source and a directory"),
    ]
    for words, text in calls:
        assert_refused(space, space.run("nydus-overlayfs", *words), 1, 32, says=text)


def test_h7_the_kernel_names_an_unknown_option_of_a_long_list(space):
    layers = Layers(space, 100, "w" * 50)
    options = layers.options("wrong=1", *RUNTIME_OPTIONS)
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", options)
    assert_refused(space, done, 32, says="wrong")


def test_h7_both_ways_of_a_long_list_are_told(space):
    layers = Layers(space, 120, "io.containerd.snapshotter.v1.nydus/snapshots/")
    options = layers.options("wrong=1", *RUNTIME_OPTIONS)
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", options)
    assert_refused(space, done, 32, says="log says why (one by one: Invalid argument (")
    assert b"wrong" in done.stderr


def test_h7_a_long_remount(space):
    layers = Layers(space, 120, "w" * 50)
    options = layers.options("remount", *RUNTIME_OPTIONS)
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", options)
    assert_refused(space, done, 1, says="too many to remount")


def test_h7_no_working_directory(space):
    """Only a relative directory needs one, and then it is an error like any other."""
    layers = Layers(space, 120, "io.containerd.snapshotter.v1.nydus/snapshots/")
    gone = space.make("gone")
    program = WITHOUT_NEW_API.format(checkout=str(CHECKOUT), code=errno.ENOSYS)
    call = [sys.executable, "-I", "-c", program, "overlay", "target", "-o", layers.options()]
    done = space.run("sh", "-c", 'cd "$0" && rmdir "$0" && exec "$@"', gone, *call)
    assert_refused(space, done, 2, says="No such file or directory")


def test_h7_ten_mebibytes_of_options(space):
    """More than the kernel passes to a program, so in the process itself."""
    layers = Layers(space)
    code = (
        f"import sys; sys.path.insert(0, {str(CHECKOUT)!r})\n"
        "from overlayfs_helper import main\n"
        "options = sys.argv[1] + ',extraoption=' + 'A' * (10 << 20)\n"
        f"sys.exit(main(['overlay', {str(layers.target)!r}, '-o', options]))\n"
    )
    done = space.run(sys.executable, "-I", "-c", code, layers.options())
    assert_refused(space, done, 1, says="bytes of options")


def install_for_mount(space, installed):
    """Put the helper where mount(8) and the shell look, in the namespace only."""
    for source, place in (("bin", "/usr/local/bin"), ("sbin", "/sbin")):
        real = os.path.realpath(place)
        words = ["-o", f"lowerdir={installed / source}:{real}", real]
        done = space.run("mount", "-t", "overlay", "overlay", *words)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["fuse.nydus-overlayfs", "nydus-overlayfs"])
def test_h8_mount_finds_the_helper(space, installed, kind):
    need_tool("mount.fuse3")
    layers = Layers(space)
    install_for_mount(space, installed)
    options = layers.options(*RUNTIME_OPTIONS, "x-systemd.automount", "nofail")
    words = ["-t", kind, "overlay", layers.target, "-o", options]
    done = space.run("/usr/bin/mount", *words, path=PATH)
    assert done.returncode == 0, done.stderr
    assert mounted(space)[:2] == [b"rw", b"relatime"]


@pytest.mark.parametrize(
    ("kind", "status"), [("fuse.nydus-overlayfs", 32), ("nydus-overlayfs", 32)]
)
def test_h8_the_exit_status_passes_through(space, installed, kind, status):
    need_tool("mount.fuse3")
    target = space.make("target")
    install_for_mount(space, installed)
    options = f"lowerdir=/nowhere,{RUNTIME_OPTIONS[0]}"
    words = ["-t", kind, "overlay", target, "-o", options]
    done = space.run("/usr/bin/mount", *words, path=PATH)
    assert_refused(space, done, status, says="/nowhere")


def test_h8_the_name_of_a_mount_helper_and_its_switches(space, installed):
    layers = Layers(space, 2)
    words = [layers.target, "-s", "-nv", "-o", layers.words()[2], "-oro", "-t", "fuse.x"]
    done = space.run(installed / "sbin/mount.nydus-overlayfs", "overlay", *words)
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert mounted(space)[:2] == [b"ro", b"relatime"]


@pytest.mark.parametrize("way", ["mount", "fsmount", "shortened"])
def test_h9_escaped_colons_commas_and_backslashes(space, way):
    awkward = ["a:b", "a,b", "a\\b", "a b", "a\\\\:,b"]
    count = 0 if way == "mount" else 70
    layers = Layers(space, names=[*awkward, *(f"{'v' * 50}:{n}" for n in range(count))])
    layers.upper, layers.work = space.make("u:p,\\r", "w:r,\\k")

    def escaped(path, characters):
        return re.sub(f"([{re.escape(characters)}])", r"\\\1", str(path))

    lower = ":".join(escaped(path, ":,\\") for path in layers.lower)
    dirs = [f"{key}={escaped(path, ',' + chr(92))}"
            for key, path in (("upperdir", layers.upper), ("workdir", layers.work))]  # fmt: skip
    options = ",".join([f"lowerdir={lower}", *dirs])
    layers.options = lambda *more: options
    if way == "shortened":
        assert len(options) > os.sysconf("SC_PAGESIZE")
        done = old_kernel(space, layers)
    else:
        done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", options)
    assert done.returncode == 0, done.stderr
    assert len(files(space, layers.target)) == len(layers.lower)
    space.seen(layers.target / "new").touch()
    assert space.seen(layers.upper / "new").exists()


def test_h11_fake_mounts_nothing(space):
    layers = Layers(space)
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-f", "-o", layers.options())
    assert (done.returncode, done.stderr) == (0, b"")
    assert space.overlays() == []


def test_h11_a_namespace_is_obeyed(space, installed):
    layers = Layers(space)
    words = ["overlay", layers.target, "-o", layers.options()]
    namespace = space.seen("/").parent / "ns/mnt"
    command = [installed / "bin/nydus-overlayfs", *words, "-N", namespace]
    done = subprocess.run(command, capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(space.overlays()) == 1
    assert str(layers.target) not in Path("/proc/self/mounts").read_text()


def test_h11_a_namespace_that_is_none(space):
    layers = Layers(space)
    for namespace in ("/nowhere", "/dev/null"):
        words = ["overlay", layers.target, "-o", layers.options(), "-N", namespace]
        assert_refused(space, space.run("nydus-overlayfs", *words), 32, says=namespace)


def test_data_only_layers_of_a_long_list(space):
    """Two colons in `lowerdir`: directories that only hold the content of files."""
    layers = Layers(space, 80, "q" * 60)
    lower = ":".join(map(str, layers.lower[:-1])) + f"::{layers.lower[-1]}"
    options = f"lowerdir={lower},metacopy=on"
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", options)
    assert done.returncode == 0, done.stderr
    assert "file79" not in files(space, layers.target)
    assert len(files(space, layers.target)) == 79


def test_options_that_are_an_extraoption(space):
    """The value is not looked at: an unreadable one must not stop a container."""
    layers = Layers(space)
    unreadable = base64.b64encode(b"no JSON").decode()[:-1]
    options = layers.options(f"extraoption={unreadable}")
    done = space.run("nydus-overlayfs", "overlay", layers.target, "-o", options)
    assert done.returncode == 0, done.stderr
