"""Registry, containerd and containerd-nydus-grpc, which starts our nydusd, in a box.

NYDUSD=path puts another nydusd in the place of ours.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.real.box import Box, BoxError, Program, wait_for
from tests.real.images import Image
from tests.real.settings import METRICS, REGISTRY, write_settings
from tests.real.unixhttp import ask

__all__ = ["Rig", "answers", "remove_cgroups", "write_nydusd"]

CHECKOUT = Path(__file__).resolve().parents[2]
CGROUPS = Path("/sys/fs/cgroup")
START_SECONDS = 90.0
REMOVE_SECONDS = 90.0
_HOLDER = "fscache.holder.process"
_WAITING = re.compile(r"^nydusd_waiting_reads (\d+)", re.MULTILINE)
_BLOB_ANSWER = re.compile(r'"GET /v2/\S+/blobs/sha256:(\S+) HTTP/1\.\d" 20[06] (\d+) .*"(\S*)"$')


def remove_cgroups(name: str) -> None:
    """Remove what runc has left of a name space; cgroups are seen by the whole machine."""
    for top in (*CGROUPS.glob(f"*/{name}"), *CGROUPS.glob(name)):
        for directory, _, _ in os.walk(top, topdown=False):
            Path(directory).rmdir()


def answers(path: Path) -> bool:
    """Tell whether somebody listens at a socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        with contextlib.suppress(OSError):
            probe.connect(str(path))
            return True
        return False


def write_nydusd(path: Path, *, commit: str = "", other: Path | str | None = None) -> None:
    """Write the program that the snapshotter starts; it becomes nydusd, with the same number.

    Args:
        path: of the new program.
        commit: what it says that it was made from, as another version would.
        other: a nydusd in place of ours; also NYDUSD in the environment.
    """
    other = other or os.environ.get("NYDUSD")
    if other:
        command = shlex.quote(str(Path(other).resolve(strict=True)))
        # What the original sets by default may be more than this machine permits.
        before = '[ "$1" != fuse ] || set -- "$@" --rlimit-nofile 0'
    else:
        command = f"{shlex.quote(sys.executable)} -m fscache"
        before = f"export PYTHONPATH={shlex.quote(str(CHECKOUT))}"
    lines = ["#!/bin/sh", before]
    if commit:
        change = f'sed "s/^Git Commit:.*/Git Commit: {commit}/"'
        lines.append(f'if [ "$1" = --version ]; then {command} "$@" | {change}; exit; fi')
    lines.append(f'exec {command} "$@"')
    path.write_text("\n".join([*lines, ""]))
    path.chmod(0o755)


class Rig:
    """The programs and what they make; `close` ends and removes all of it.

    Args:
        peers: directory with the programs of `tests.real.peers`.
        mode: `dedicated` or `shared`.
        recover_policy: `none`, `restart` or `failover`.
        prefetch: fetch everything in the background, as the recorded configuration says.
        environment: more variables for all programs.
        nydusd: a nydusd in place of ours.
    """

    def __init__(
        self,
        peers: Path,
        mode: str,
        recover_policy: str = "none",
        *,
        prefetch: bool = False,
        environment: Mapping[str, str] | None = None,
        nydusd: Path | None = None,
    ) -> None:
        self._peers = peers
        self._more = environment or {}
        self.mode = mode
        # Short, because of the sockets; on a disk, because of the kernel's marks. The name is
        # also containerd's name space, which has no underscores.
        self.root = Path("/var/tmp", f"nyr-{secrets.token_hex(4)}")
        self.root.mkdir(mode=0o700)
        self._box: Box | None = None
        try:
            write_settings(self.root, mode, recover_policy, prefetch=prefetch)
            write_nydusd(self.root / "nydusd", other=nydusd)
            (self.root / "tmp").mkdir()
            self._box = Box(self.root, self._environment())
            self._start()
        except BaseException:
            self.close()
            raise

    def _environment(self) -> dict[str, str]:
        """Nothing of the user: no proxies, no credentials, no configuration."""
        return {
            "PATH": f"{self._peers}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(self.root),
            "TMPDIR": str(self.root / "tmp"),
            "LANG": "C.UTF-8",
            "CONTAINERD_ADDRESS": str(self.root / "containerd.sock"),
            "CONTAINERD_NAMESPACE": self.root.name,
            "CONTAINERD_SNAPSHOTTER": "nydus",
            **self._more,
        }

    @property
    def box(self) -> Box:
        """Where everything runs."""
        if self._box is None:
            raise BoxError("the box is closed")
        return self._box

    def _start(self) -> None:
        self.registry = self.box.start(
            "registry", ["docker-registry", "serve", str(self.root / "registry.yml")]
        )
        self.start_snapshotter()
        self.containerd = self.box.start(
            "containerd", ["containerd", "--config", str(self.root / "containerd.toml")]
        )
        self._wait(self.containerd, lambda: answers(self.root / "containerd.sock"))
        self._wait(self.registry, lambda: "listening on" in self.registry.log_end())

    def _wait(self, program: Program, ready) -> None:
        def look() -> bool:
            program.check()
            return ready()

        try:
            wait_for(f"start of {program.name}", START_SECONDS, look)
        except BoxError as error:
            raise BoxError(f"{error}\n{program.log_end()}") from error

    def start_snapshotter(self) -> None:
        """Start it, and wait until it serves."""
        self.snapshotter = self.box.start(
            "snapshotter", ["containerd-nydus-grpc", "--config", str(self.root / "sn.toml")]
        )
        self._wait(self.snapshotter, lambda: answers(self.root / "grpc.sock"))

    def push(self, image: Image) -> str:
        """Push an OCI layout to the registry; return the reference."""
        reference = f"{REGISTRY}/{image.name}"
        self.box.run(
            "skopeo", "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false",
            f"oci:{image.layout}", f"docker://{reference}",
        )  # fmt: skip
        return reference

    def ctr(self, *words: object, seconds: float = 120.0) -> str:
        """Run ctr; on an error show what snapshotter and nydusd said."""
        try:
            return self.box.run("ctr", *words, seconds=seconds)
        except BoxError as error:
            raise BoxError(f"{error}\n--- snapshotter:\n{self.snapshotter.log_end()}") from error

    def pull(self, reference: str) -> None:
        """Pull an image, which for Nydus images means its bootstrap."""
        self.ctr("image", "pull", "--plain-http", reference)

    def run(self, reference: str, script: str) -> str:
        """Run a script in a container that is removed afterwards; return its output."""
        return self.ctr("run", "--rm", reference, "once", "sh", "-c", script)

    def remove(self, reference: str, container: str) -> None:
        """Remove a running container and its image."""
        self.ctr("task", "rm", "--force", container)
        self.ctr("container", "rm", container)
        self.ctr("image", "rm", "--sync", reference)

    def nydusds(self) -> set[int]:
        """Return the numbers of the nydusd processes that the snapshotter has started."""
        return {pid for pid, words in self.box.processes().items() if "--apisock" in words}

    def holders(self) -> set[int]:
        """Return the numbers of the processes that keep what successors of nydusd need."""
        return {
            pid
            for pid, words in self.box.processes().items()
            if any(_HOLDER in word for word in words)
        }

    def system(self, method: str, target: str, body: object = None) -> tuple[int, str]:
        """Ask the snapshotter's system controller; return status and text."""
        return ask(self.root / "system.sock", method, target, body)

    def daemon(self) -> dict[str, object]:
        """Return what the snapshotter says of its only daemon."""
        (daemon,) = json.loads(self.system("GET", "/api/v1/daemons")[1])
        return daemon

    def state(self) -> str:
        """Return the state of the snapshotter's only daemon, empty when it does not answer."""
        with contextlib.suppress(OSError):
            text = ask(Path(str(self.daemon()["api_socket"])), "GET", "/api/v1/daemon")[1]
            return str(json.loads(text)["state"])
        return ""

    def waiting_reads(self) -> int:
        """Return how many reads of the kernel wait for the snapshotter's only daemon."""
        text = ask(Path(str(self.daemon()["api_socket"])), "GET", "/metrics")[1]
        found = _WAITING.search(text)
        return int(found[1]) if found else 0

    def kill_daemon(self) -> None:
        """Kill the only nydusd, so that it can do nothing more."""
        (pid,) = self.nydusds()
        os.kill(pid, signal.SIGKILL)
        wait_for("end of nydusd", REMOVE_SECONDS, lambda: pid not in self.nydusds())

    def mounts(self) -> list[str]:
        """Return the lines of the mount table about what is below our directory."""
        return [line for line in self.box.mounts() if line.split()[1].startswith(f"{self.root}/")]

    def leftovers(self) -> list[str]:
        """Return what is there of daemons: processes, mounts, sockets, directories in the cache.

        Not the logs of holders that had something to say.
        """
        paths = [
            *self.box.top.glob("run/nydusd/*/lock"),
            *self.box.top.glob("run/nydusd/*/holder.sock"),
            *self.root.glob("sn/socket/*/*.sock"),
            *self.root.glob("sn/cache/serve-*"),
        ]
        return [
            *(f"nydusd {pid}" for pid in self.nydusds()),
            *(f"holder {pid}" for pid in self.holders()),
            *self.mounts(),
            *map(str, paths),
        ]

    def wait_until_clean(self) -> None:
        """Wait until nothing of any daemon is there."""
        try:
            wait_for("clean end", REMOVE_SECONDS, lambda: not self.leftovers())
        except BoxError as error:
            raise BoxError("\n".join([str(error), *self.leftovers()])) from error

    def logs(self) -> str:
        """Return the ends of all logs."""
        programs = (self.registry, self.containerd, self.snapshotter)
        texts = {program.name: program.log_end(20000) for program in programs}
        for path in self.box.top.glob("run/nydusd/*/log"):
            texts[str(path)] = path.read_text(errors="replace")
        return "\n".join(f"--- {name}:\n{text}" for name, text in texts.items())

    def prometheus(self) -> str:
        """Return what the snapshotter publishes about its daemons."""
        code = (
            "import urllib.request as request;"
            f"print(request.urlopen('http://{METRICS}/v1/metrics').read().decode())"
        )
        return self.box.run(sys.executable, "-I", "-c", code)

    def fetched(self, image: Image) -> int:
        """Return how many bytes of the image's blobs the registry has sent."""
        total = 0
        for line in self.registry.log.read_text(errors="replace").splitlines():
            answer = _BLOB_ANSWER.search(line)
            if answer and answer[1] in image.blobs:
                total += int(answer[2])
        return total

    def close(self) -> None:
        """End everything and remove the directory."""
        if self._box is not None:
            self._box.close()
            self._box = None
        remove_cgroups(self.root.name)
        shutil.rmtree(self.root)
