"""The first process of a box (see `tests.real.box`); runs as a script, standard library only.

When its standard input ends it exits, and the kernel ends all other processes of the box.
"""

import fcntl
import signal
import socket
import struct
import subprocess
import sys

SIOCSIFFLAGS = 0x8914
IFF_UP = 1


def main() -> None:
    """Bring loopback up, put an empty /run in place, and wait for the end."""
    with socket.socket() as any_socket:
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/run"], check=True)
    # Orphans become our children and need no parent that waits for them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    sys.stdin.read()


main()
