"""Time helpers that mount an overlay, in turns; prints seconds by name as JSON.

Arguments: an empty directory, the number of rounds, and a JSON object of commands by name.
`{target}` and `{options}` in a command stand for what it mounts; one without them is a floor.
All mounts are in a namespace of this process.
"""

import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CLONE_NEWNS = 0x20000
MS_REC, MS_PRIVATE = 0x4000, 0x40000
MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)


def check(result):
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def measure(words, target):
    start = time.perf_counter()
    subprocess.run(words, check=True, stdin=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    if str(target) in words:
        check(_libc.umount2(os.fsencode(target), MNT_DETACH))
    return seconds


def main():
    top, rounds, commands = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    check(_libc.unshare(CLONE_NEWNS))
    check(_libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None))
    check(_libc.mount(b"tmpfs", os.fsencode(top), b"tmpfs", 0, None))
    names = [f"snapshots/{number}/fs" for number in range(1, 9)]
    for name in (*names, "upper", "work", "target"):
        (top / name).mkdir(parents=True)
    lower = ":".join(str(top / name) for name in names)
    # A container's options: eight layers, and the configuration for a VM runtime.
    options = f"workdir={top}/work,upperdir={top}/upper,lowerdir={lower}"
    options += f",extraoption={'A' * 1600},dev,suid"
    values = {"target": top / "target", "options": options}
    words = {
        name: [word.format(**values) for word in command] for name, command in commands.items()
    }
    seconds = {name: [] for name in words}
    for _ in range(rounds):
        for name, command in words.items():
            seconds[name].append(measure(command, values["target"]))
    json.dump(seconds, sys.stdout)


main()
