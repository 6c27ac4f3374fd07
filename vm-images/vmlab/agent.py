"""The first process of a guest: runs the host's commands, one at a time.

It starts under an emulated processor, 30 times slower than the host: only small modules are
imported. When it ends, the kernel panics and the host is told.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import stat
import struct
import sys
import termios
from typing import Any

from vmlab import frames

__all__ = ["main"]

_PORTS = "/sys/class/virtio-ports"
_READ_BYTES = 1 << 16
_NO_TERMINAL = -1


def _open_port() -> int:
    for entry in os.listdir(_PORTS):
        with open(f"{_PORTS}/{entry}/name") as file:
            if file.read().strip() == frames.PORT_NAME:
                return os.open(f"/dev/{entry}", os.O_RDWR | os.O_CLOEXEC)
    raise OSError(f"no virtio-serial port is called {frames.PORT_NAME}")


def _make_nodes() -> None:
    """Make the device nodes whose opening loads a module; elsewhere systemd does that.

    Lines of `modules.devname` are like `dm_mod mapper/control c10:236`.
    """
    with open(f"/lib/modules/{os.uname().release}/modules.devname") as file:
        for line in file:
            if line.startswith("#"):
                continue
            _, name, numbers = line.split()
            major, minor = map(int, numbers[1:].split(":"))
            kind = stat.S_IFBLK if numbers[0] == "b" else stat.S_IFCHR
            path = f"/dev/{name}"
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if not os.path.exists(path):
                os.mknod(path, kind | 0o600, os.makedev(major, minor))


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _set_size(fd: int, size: Any) -> None:
    rows, columns = size
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))


def _become(request: Any, stdin: int, stdout: int, stderr: int) -> None:
    """Turn the forked child into the command; never return."""
    try:
        os.setsid()
        if request["tty"]:
            fcntl.ioctl(stdin, termios.TIOCSCTTY, 0)
        for number, fd in enumerate((stdin, stdout, stderr)):
            os.dup2(fd, number)
        # The interpreter ignores it, and a child would inherit that.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        os.chdir(request["cwd"])
        os.execvpe(request["argv"][0], request["argv"], request["env"])
    except OSError as error:
        os.write(2, f"{request['argv'][0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


class _Command:
    """One command with what it writes; `outputs` maps a descriptor to its kind of frame."""

    def __init__(self, request: Any) -> None:
        self.terminal = _NO_TERMINAL
        self.pending = b""
        if request["tty"]:
            self.terminal, inner = os.openpty()
            os.set_blocking(self.terminal, False)
            _set_size(self.terminal, request["tty"])
            self.outputs = {self.terminal: frames.STDOUT}
            child_ends = (inner, inner, inner)
        else:
            out, child_out = os.pipe()
            err, child_err = os.pipe()
            self.outputs = {out: frames.STDOUT, err: frames.STDERR}
            child_ends = (os.open("/dev/null", os.O_RDONLY), child_out, child_err)
        self.pid = os.fork()
        if self.pid == 0:
            _become(request, *child_ends)
        for fd in set(child_ends):
            os.close(fd)

    def write_pending(self) -> None:
        try:
            self.pending = self.pending[os.write(self.terminal, self.pending) :]
        except BlockingIOError:
            pass
        except OSError:  # the program closed its terminal
            self.pending = b""

    def close(self) -> None:
        for fd in self.outputs:
            os.close(fd)


class _Agent:
    """Waits for the port, the command's output and the end of children, in one thread."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.decoder = frames.Decoder()
        self.command: _Command | None = None
        # Orphans become children of the first process and have to be reaped at once: tests wait
        # for killed daemons to vanish.
        self.wakeup, writer = os.pipe()
        for fd in (self.wakeup, writer):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def send(self, kind: int, payload: Any = b"") -> None:
        _write_all(self.port, frames.pack(kind, payload))

    def serve(self) -> None:
        """Run commands until the port is closed."""
        while True:
            poller = select.poll()
            poller.register(self.port, select.POLLIN)
            poller.register(self.wakeup, select.POLLIN)
            if self.command is not None:
                for fd in self.command.outputs:
                    poller.register(fd, select.POLLIN)
                if self.command.terminal in self.command.outputs and self.command.pending:
                    poller.register(self.command.terminal, select.POLLIN | select.POLLOUT)
            for fd, events in poller.poll():
                self._handle(fd, events)

    def _handle(self, fd: int, events: int) -> None:
        if fd == self.port:
            for kind, payload in self.decoder.feed(os.read(self.port, _READ_BYTES)):
                self._obey(kind, payload)
        elif fd == self.wakeup:
            os.read(self.wakeup, _READ_BYTES)
            self._reap()
        elif self.command is not None and fd in self.command.outputs:
            if events & select.POLLOUT:
                self.command.write_pending()
            if events & ~select.POLLOUT:
                self._relay(self.command, fd)

    def _obey(self, kind: int, payload: Any) -> None:
        if kind == frames.RUN:
            self.command = _Command(payload)
        elif self.command is None or self.command.terminal == _NO_TERMINAL:
            return  # typed after the program ended
        elif kind == frames.STDIN:
            self.command.pending += payload
        elif kind == frames.RESIZE:
            _set_size(self.command.terminal, payload)

    def _relay(self, command: _Command, fd: int) -> bool:
        """Pass on what a command has written; return whether there may be more."""
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return False
        except OSError:  # a terminal without programs
            data = b""
        if data:
            self.send(command.outputs[fd], data)
            return True
        del command.outputs[fd]
        os.close(fd)
        return False

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self.command is not None and pid == self.command.pid:
                self._finish(self.command, os.waitstatus_to_exitcode(status))

    def _finish(self, command: _Command, status: int) -> None:
        """Pass on what is left in the pipes, but wait for no daemon that keeps them open."""
        for fd in list(command.outputs):
            os.set_blocking(fd, False)
            while self._relay(command, fd):
                pass
        command.close()
        self.command = None
        self.send(frames.EXIT, {"status": status})


def main() -> None:
    """Serve the host; the guest ends with this process."""
    _make_nodes()
    agent = _Agent(_open_port())
    agent.send(frames.READY, {"release": os.uname().release})
    agent.serve()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:  # noqa: BLE001 - the only one who can tell the console
        print(f"vmlab: {type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
