"""The command line of the lab: `vm-images/run` (docs/vm-lab.md)."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

from vmlab.booting import BOOT_SECONDS, boot
from vmlab.catalogue import KERNELS, Kernel, find_kernel
from vmlab.errors import GuestTimeout, LabError
from vmlab.kvm import kvm_defect
from vmlab.machine import Guest
from vmlab.qemu import Disk, Hardware
from vmlab.store import StoredKernel, fetch, find, size_bytes
from vmlab.terminal import interact

__all__ = ["main"]

# As timeout(1) and other programs that start programs have them.
STATUS_TIMEOUT = 124
STATUS_LAB = 125
STATUS_INTERRUPTED = 130
_DEFAULTS = Hardware()
_SHELL = ("/bin/bash", "--noprofile", "--norc", "-i")


class _Progress:
    """Says on standard error what is going on: on a terminal one line with a running clock."""

    def __init__(self, quiet: bool) -> None:
        self._terminal = sys.stderr.isatty()
        self._quiet = quiet
        self._text = ""
        self._start = 0.0
        self._done = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def _draw(self) -> None:
        line = f"vm-images: {self._text} … {time.monotonic() - self._start:.0f} s"
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()

    def _tick(self) -> None:
        while not self._done.wait(1):
            self._draw()

    def say(self, text: str) -> None:
        """Begin a step."""
        if self._quiet:
            return
        if not self._terminal:
            print(f"vm-images: {text}", file=sys.stderr, flush=True)
            return
        self._text, self._start = text, time.monotonic()
        self._draw()
        if not self._clock.is_alive():
            self._clock.start()

    def end(self) -> None:
        """Give the line to others; nothing can be said after that."""
        if self._clock.is_alive():
            self._done.set()
            self._clock.join()
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[_Progress]:
    progress = _Progress(quiet)
    try:
        yield progress
    finally:
        progress.end()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vm-images/run",
        usage="%(prog)s [options] KERNEL -- COMMAND…\n"
        "       %(prog)s [options] --shell KERNEL\n"
        "       %(prog)s --list | --fetch KERNEL…",
        description="Run a command under another kernel, with this machine's root (read-only below"
        " a layer in memory) and an empty ext4 at /scratch. Its status is this program's;"
        f" {STATUS_LAB}: the guest could not be started or died, {STATUS_TIMEOUT}: timeout.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("kernels", nargs="*", metavar="KERNEL", help="one of: " + ", ".join(KERNELS))
    add("--list", action="store_true", help="what is cached, and how to get the rest")
    add("--fetch", action="store_true", help="get or renew kernels; from Debian, through apt")
    add("--shell", action="store_true", help="interactive; Ctrl-] kills the guest")
    add("--memory", type=int, default=_DEFAULTS.memory_mib, metavar="MIB", help="(%(default)s)")
    add("--cpus", type=int, default=_DEFAULTS.cpus, metavar="N", help="(%(default)s)")
    add("--scratch", type=int, default=_DEFAULTS.scratch_mib, metavar="MIB", help="(%(default)s)")
    add("--timeout", type=float, metavar="S", help="for the command; the guest is killed (none)")
    add("--kernel-arg", action="append", default=[], metavar="ARG", help="for its command line")
    add("--disk", action="append", default=[], metavar="FILE|nbd:…[,serial=TEXT]",
        help="raw image or NBD server, read-only at /dev/vdb and on")  # fmt: skip
    add("--env", action="append", default=[], metavar="NAME[=VALUE]", help="for the command")
    add("--accel", choices=("auto", "kvm", "tcg"), default="auto", help="(%(default)s)")
    add("--console", action="store_true", help="show the kernel's messages at the end")
    add("--quiet", action="store_true", help="no progress")
    return parser


def _list() -> None:
    cached = None
    for kernel in KERNELS.values():
        stored = find(kernel)
        cached = cached or stored
        state = f"not cached; vm-images/run --fetch {kernel.name}"
        if stored:
            state = f"{stored.version}, {size_bytes(stored.directory) >> 20} MiB"
        print(f"{kernel.name:13} {kernel.purpose}\n{'':13} {state}")
    if cached:
        defect = kvm_defect(cached)
        print("KVM: " + (f"no, {defect}" if defect else "yes"))


def _fetch(kernel: Kernel, progress: _Progress) -> StoredKernel:
    return fetch(kernel, lambda text: progress.say(f"{kernel.name}: {text}"))


def _fetch_all(kernels: Sequence[Kernel], quiet: bool) -> int:
    """Get what can be got; Debian releases do not have the same kernels."""
    status = 0
    for kernel in kernels:
        try:
            with _progress(quiet) as progress:
                stored = _fetch(kernel, progress)
        except LabError as error:
            print(f"vm-images: {kernel.name}: {error}", file=sys.stderr, flush=True)
            status = STATUS_LAB
        else:
            print(f"{kernel.name}: {stored.version} in {stored.directory}", flush=True)
    return status


def _environment(words: Sequence[str]) -> dict[str, str]:
    pairs = (word.partition("=") for word in words)
    return {name: value if equals else os.environ.get(name, "") for name, equals, value in pairs}


def _hardware(options: argparse.Namespace) -> Hardware:
    return Hardware(
        memory_mib=options.memory,
        cpus=options.cpus,
        scratch_mib=options.scratch,
        disks=tuple(map(Disk.parse, options.disk)),
        accelerator=options.accel,
        kernel_arguments=tuple(options.kernel_arg),
    )


def _write(stream: int, data: bytes) -> None:
    while data:
        data = data[os.write(stream, data) :]


def _command(guest: Guest, options: argparse.Namespace, command: Sequence[str]) -> int:
    env = _environment(options.env)
    if options.shell:
        return interact(guest, command or _SHELL, {"PS1": f"({guest.kernel}) \\w \\$ ", **env})
    return guest.run(
        command,
        env=env,
        seconds=options.timeout,
        stdout=lambda data: _write(1, data),
        stderr=lambda data: _write(2, data),
    ).status


def _boot(options: argparse.Namespace) -> Guest:
    kernel = find_kernel(options.kernels[0])
    with _progress(options.quiet) as progress:
        stored = find(kernel) or _fetch(kernel, progress)
        progress.say(f"booting Linux {stored.release}")
        return boot(stored, kernel, _hardware(options), BOOT_SECONDS)


def _run(options: argparse.Namespace, command: Sequence[str]) -> int:
    with _boot(options) as guest:
        try:
            status = _command(guest, options, command)
        finally:
            if options.console:
                _write(2, guest.console().encode())
    return 128 - status if status < 0 else status


def _work(argv: Sequence[str]) -> int:
    words = list(argv)
    cut = words.index("--") if "--" in words else len(words)
    command = words[cut + 1 :]
    parser = _parser()
    options = parser.parse_args(words[:cut])
    if options.list:
        _list()
        return 0
    if options.fetch:
        return _fetch_all([find_kernel(name) for name in options.kernels or KERNELS], options.quiet)
    if len(options.kernels) != 1 or not (command or options.shell):
        parser.error("one KERNEL, and a COMMAND behind -- or --shell, are needed")
    return _run(options, command)


def _terminated(*_: object) -> NoReturn:
    sys.exit(128 + signal.SIGTERM)


def main() -> int:
    """Run the command line; return the status to exit with."""
    signal.signal(signal.SIGTERM, _terminated)
    try:
        return _work(sys.argv[1:])
    except KeyboardInterrupt:
        return STATUS_INTERRUPTED
    except GuestTimeout as error:
        print(f"vm-images: {error}", file=sys.stderr)
        return STATUS_TIMEOUT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except (LabError, OSError) as error:
        print(f"vm-images: {error}", file=sys.stderr)
        return STATUS_LAB
