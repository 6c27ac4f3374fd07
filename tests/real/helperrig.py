"""containerd with a snapshotter whose overlays go through nydus-overlayfs, in a box."""

from __future__ import annotations

import hashlib
import io
import json
import secrets
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

from overlayfs_helper.install import install_helper
from tests.real.box import Box, BoxError, Program, wait_for
from tests.real.rig import START_SECONDS, answers, remove_cgroups
from tests.real.settings import architecture

__all__ = ["IMAGE", "HelperRig", "pack_image"]

IMAGE = "localhost/helped:1"
_CONTAINERD = """\
version = 2
root = "{root}/containerd"
state = "{root}/state"
imports = []
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri",
    "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{root}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{root}/opt"
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/{architecture}"
  snapshotter = "helped"
[proxy_plugins.helped]
  type = "snapshot"
  address = "{root}/helped.sock"
"""
# Stands in PATH before the helper: which arguments came from containerd.
_RECORDER = """\
#!/bin/sh
printf '%s\\n' "$*" >> {root}/calls
exec {program} "$@"
"""


def pack_image(target: Path, tars: Sequence[Path]) -> None:
    """Write an OCI image of these layers, the lowest first, as a tar for `ctr image import`."""
    with tarfile.open(target, "w") as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        def blob(content: bytes, kind: str) -> dict[str, object]:
            digest = hashlib.sha256(content).hexdigest()
            add(f"blobs/sha256/{digest}", content)
            media_type = f"application/vnd.oci.image.{kind}"
            return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

        layers = [blob(tar.read_bytes(), "layer.v1.tar") for tar in tars]
        config = {
            "architecture": architecture(),
            "os": "linux",
            "config": {"Env": ["PATH=/bin:/usr/bin"]},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
        }
        manifest = {
            "schemaVersion": 2,
            "config": blob(json.dumps(config).encode(), "config.v1+json"),
            "layers": layers,
        }
        entry = blob(json.dumps(manifest).encode(), "manifest.v1+json")
        entry["annotations"] = {"io.containerd.image.name": IMAGE}
        add("index.json", json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
        add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')


class HelperRig:
    """The programs and what they make; `close` ends and removes all of it.

    Args:
        snapshotter: path of helpersnapshotter.
        programs: directory of containerd, ctr and the shim.
        options: what every overlay gets in addition.
    """

    def __init__(self, snapshotter: Path, programs: Path, options: Sequence[str]) -> None:
        # Short, because of the sockets; also containerd's name space.
        self.root = Path("/var/tmp", f"nyh-{secrets.token_hex(4)}")
        self.root.mkdir(mode=0o700)
        self._box: Box | None = None
        try:
            self._write_settings(options)
            self._box = Box(self.root, self._environment(programs))
            words = [
                snapshotter,
                self.root / "sn",
                self.root / "helped.sock",
                self.root / "options",
            ]
            self._start("snapshotter", words, self.root / "helped.sock")
            words = [programs / "containerd", "--config", self.root / "containerd.toml"]
            self._start("containerd", words, self.root / "containerd.sock")
        except BaseException:
            self.close()
            raise

    def _write_settings(self, options: Sequence[str]) -> None:
        values = {"root": self.root, "architecture": architecture()}
        (self.root / "containerd.toml").write_text(_CONTAINERD.format_map(values))
        (self.root / "options").write_text("\n".join(options))
        program = install_helper(self.root / "usr", self.root / "sbin")
        (self.root / "bin").mkdir()
        recorder = self.root / "bin/nydus-overlayfs"
        recorder.write_text(_RECORDER.format(root=self.root, program=program))
        recorder.chmod(0o755)
        (self.root / "tmp").mkdir()

    def _environment(self, programs: Path) -> dict[str, str]:
        standard = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return {
            "PATH": f"{self.root}/bin:{programs}:{standard}",
            "HOME": str(self.root),
            "TMPDIR": str(self.root / "tmp"),
            "LANG": "C.UTF-8",
            "CONTAINERD_ADDRESS": str(self.root / "containerd.sock"),
            "CONTAINERD_NAMESPACE": self.root.name,
            "CONTAINERD_SNAPSHOTTER": "helped",
        }

    @property
    def box(self) -> Box:
        """Where everything runs."""
        if self._box is None:
            raise BoxError("the box is closed")
        return self._box

    def _start(self, name: str, words: Sequence[object], socket: Path) -> Program:
        program = self.box.start(name, [str(word) for word in words])

        def ready() -> bool:
            program.check()
            return answers(socket)

        wait_for(f"start of {name}", START_SECONDS, ready)
        return program

    def ctr(self, *words: object) -> str:
        """Run ctr and return what it prints."""
        return self.box.run("ctr", *words)

    def calls(self) -> list[str]:
        """Return the arguments of all calls of the helper."""
        return (self.root / "calls").read_text().splitlines()

    def logs(self) -> str:
        """Return the ends of all logs."""
        return "\n".join(
            f"--- {path.name}:\n{path.read_text()[-9000:]}" for path in self.root.glob("*.log")
        )

    def close(self) -> None:
        """End everything and remove the directory."""
        if self._box is not None:
            self._box.close()
            self._box = None
        remove_cgroups(self.root.name)
        shutil.rmtree(self.root)
