"""The lab itself: what a command gives back, how a guest ends, and that nothing is left."""

import contextlib
import hashlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.capabilities import need_tool
from vmlab.catalogue import KERNELS
from vmlab.errors import GuestDied
from vmlab.machine import host_path
from vmlab.processes import CHECKOUT

RUN = CHECKOUT / "vm-images" / "run"
KERNEL = "6.12"
LIMIT = 240


@pytest.fixture(scope="module")
def guest(guests):
    with guests.boot(KERNEL) as guest:
        yield guest


def shell(guest, script, **options):
    return guest.run(["sh", "-c", script], **options)


def test_status_and_both_outputs(guest):
    done = shell(guest, "echo out; echo err >&2; exit 3")
    assert done == (3, b"out\n", b"err\n")
    assert shell(guest, "kill -9 $$").status == -signal.SIGKILL


def test_a_program_that_is_not_there(guest):
    done = guest.run(["no-such-program"])
    assert done.status == 127
    assert b"no-such-program: No such file" in done.stderr


def test_it_runs_where_we_are_and_as_it_is_told(guest, monkeypatch):
    monkeypatch.chdir(CHECKOUT / "docs")
    assert shell(guest, "pwd").stdout.decode().strip() == str(CHECKOUT / "docs")
    done = shell(guest, 'pwd; echo "$NAME"', cwd=Path("/"), env={"NAME": "two words"})
    assert done.stdout == b"/\ntwo words\n"


def test_large_outputs_arrive_whole(guest):
    script = (
        "import sys, os\n"
        "for stream in (sys.stdout, sys.stderr): stream.buffer.write(bytes(range(251)) * 9001)\n"
    )
    done = guest.run([sys.executable, "-S", "-c", script])
    assert done.status == 0
    expected = hashlib.sha256(bytes(range(251)) * 9001).digest()
    for output in (done.stdout, done.stderr):
        assert hashlib.sha256(output).digest() == expected


def test_output_comes_while_the_command_runs(guest):
    pieces = []
    done = shell(guest, "echo first; sleep 3; echo second", stdout=pieces.append)
    assert done == (0, b"", b"")
    assert pieces == [b"first\n", b"second\n"]


def test_a_process_that_stays_holds_nobody_up_and_is_reaped(guest):
    pid = int(shell(guest, "sleep 1000 & echo $!").stdout)
    assert shell(guest, f"kill {pid}").status == 0
    gone = f"while [ -d /proc/{pid} ]; do sleep 0.1; done"
    assert shell(guest, gone, seconds=LIMIT).status == 0


def test_files_of_the_host_below_its_tmp(guest, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"data")
    assert guest.run(["cat", host_path(file)]).stdout == b"data"


def test_a_guest_whose_machine_is_killed(guests):
    with guests.boot(KERNEL) as guest:
        guest.kill()
        with pytest.raises(GuestDied, match="QEMU ended with status -9"):
            shell(guest, "true")


def processes_of(directory):
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            line = (process / "cmdline").read_bytes()
            if os.fsencode(directory) in line:
                found.append(line)
    return found


class Program:
    """The command line in a directory of its own, which has to be empty afterwards."""

    def __init__(self, directory):
        self.directory = directory
        self.environment = {**os.environ, "TMPDIR": str(directory)}

    def start(self, *words, **options):
        return subprocess.Popen([RUN, *map(str, words)], env=self.environment, **options)

    def run(self, *words):
        process = self.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        out, err = process.communicate(timeout=LIMIT)
        return process.returncode, out, err

    def assert_nothing_left(self):
        assert list(self.directory.iterdir()) == []
        assert processes_of(self.directory) == []


@pytest.fixture
def program(guests, tmp_path):
    guests.need(KERNEL)
    directory = tmp_path / "t"
    directory.mkdir()
    program = Program(directory)
    yield program
    program.assert_nothing_left()


def test_the_command_line(program, tmp_path):
    disk = tmp_path / "disk,with comma"
    disk.write_bytes(b"x" * (1 << 20))
    digest = hashlib.sha256(disk.read_bytes()).hexdigest()
    script = (
        "cat /proc/cmdline /sys/block/vdb/serial; sha256sum </dev/vdb; echo $NAME; nproc;"
        " echo err >&2; exit 3"
    )
    status, out, err = program.run(
        "--cpus", 1, "--env", "NAME=value", "--kernel-arg", "lab.test=1",
        "--disk", f"{disk},serial=extension-x", KERNEL, "--", "sh", "-c", script,
    )  # fmt: skip
    assert status == 3, err
    assert "lab.test=1" in out
    assert out.splitlines()[1:] == [f"extension-x{digest}  -", "value", "1"]
    assert err.endswith("err\n")
    assert f"booting Linux {KERNEL}." in err


def test_a_disk_from_an_nbd_server(program, tmp_path):
    image = tmp_path / "image"
    image.write_bytes(b"served" + bytes(4090))
    socket = tmp_path / "nbd"
    words = [need_tool("qemu-nbd"), "--read-only", "--format=raw", f"--socket={socket}", image]
    with subprocess.Popen(words) as server:
        status, out, err = program.run(
            "--disk", f"nbd+unix:///?socket={socket}", KERNEL, "--", "head", "-c6", "/dev/vdb"
        )
        server.kill()
    assert (status, out) == (0, "served"), err


def test_a_panic_is_told(program):
    status, _, err = program.run("--quiet", KERNEL, "--", "sh", "-c", "echo c >/proc/sysrq-trigger")
    assert status == 125
    assert err.startswith("vm-images: kernel panic in the guest: sysrq triggered crash")
    assert "sysrq: Trigger a crash" in err


def test_a_timeout_is_told(program):
    status, _, err = program.run("--quiet", "--timeout", 1, KERNEL, "--", "sleep", 1000)
    assert status == 124
    assert err.startswith("vm-images: sleep 1000 took longer than 1 s")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_the_guest(program, number, status):
    words = ["--quiet", KERNEL, "--", "sh", "-c", "echo up; sleep 1000"]
    with program.start(*words, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(number)
        assert process.wait(LIMIT) == status


def test_a_killed_lab_takes_its_guest_along(guests, tmp_path):
    guests.need(KERNEL)
    program = Program(tmp_path)
    words = ["--quiet", KERNEL, "--", "sh", "-c", "echo up; sleep 1000"]
    with program.start(*words, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"up\n"
        process.kill()
    deadline = time.monotonic() + LIMIT
    while processes_of(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(tmp_path) == []


class Terminal:
    """A terminal with the interactive shell in it."""

    def __init__(self, program):
        self.fd, inner = pty.openpty()
        self.process = program.start("--quiet", "--shell", KERNEL, stdin=inner, stdout=inner)
        os.close(inner)
        self.seen = b""

    def expect(self, text):
        deadline = time.monotonic() + LIMIT
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(deadline - time.monotonic(), 0))
            assert ready, self.seen
            self.seen += os.read(self.fd, 4096)
        self.seen = self.seen.split(text, 1)[1]

    def type(self, keys):
        os.write(self.fd, keys)


def test_the_interactive_shell(program):
    terminal = Terminal(program)
    terminal.expect(b"(6.12) ")
    terminal.type(b"echo $((6 * 7)); tty; exit 5\r")
    terminal.expect(b"42\r\n/dev/pts/0\r\n")
    assert terminal.process.wait(LIMIT) == 5
    os.close(terminal.fd)


def test_leaving_a_guest_that_does_not_listen(program):
    terminal = Terminal(program)
    terminal.expect(b"(6.12) ")
    terminal.type(b"\x1d")
    assert terminal.process.wait(LIMIT) == 125
    os.close(terminal.fd)


def test_list_and_wrong_usage():
    def run(*words):
        return subprocess.run([RUN, *words], capture_output=True, text=True, check=False)

    listed = run("--list")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()[::2]][: len(KERNELS)] == list(
        KERNELS
    )
    unknown = run("2.4", "--", "true")
    assert unknown.returncode == 125
    assert "no kernel is called '2.4'; known: ondemand, 6.12" in unknown.stderr
    assert run(KERNEL).returncode == 2
    assert run("--", "true").returncode == 2
