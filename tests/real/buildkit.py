"""BuildKit with our `nydus-image` as its builder, in the box of a rig.

Exports go to the rig's registry. Every call of the builder is noted, with its arguments.
"""

from __future__ import annotations

import json
import shlex
import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

from tests.real.box import BoxError, wait_for
from tests.real.rig import CHECKOUT, START_SECONDS, Rig, answers
from tests.real.settings import REGISTRY

__all__ = ["BuildKit"]

BUILD_SECONDS = 240.0
_OUTPUT = (
    "type=image", "push=true", "compression=nydus", "force-compression=true",
    "oci-mediatypes=true", "registry.insecure=true",
)  # fmt: skip
_SETTINGS = """\
root = '{root}/buildkit'
[grpc]
  address = ['unix://{root}/buildkit.sock']
[worker.oci]
  enabled = true
  gc = false
  snapshotter = 'native'
  noProcessSandbox = false
  networkMode = 'host'
[worker.containerd]
  enabled = false
[registry.'{registry}']
  http = true
  insecure = true
"""
_BUILDER = """\
#!/bin/sh
printf '%s\\n' "$*" >> {calls}
exec env PYTHONPATH={checkout} {python} -m builder.cli "$@"
"""


class BuildKit:
    """buildkitd with its OCI worker; it ends with the box.

    Args:
        rig: whose box and registry are used, and whose containerd pulls what was pushed.
    """

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self._root = rig.root
        self._calls = rig.root / "builder.calls"
        self._calls.touch()
        (rig.root / "nydus-work").mkdir()
        self._write_builder(rig.root / "nydus-image-here")
        settings = rig.root / "buildkitd.toml"
        settings.write_text(_SETTINGS.format(root=rig.root, registry=REGISTRY))
        variables = {
            "NYDUS_BUILDER": rig.root / "nydus-image-here",
            "NYDUS_WORKDIR": rig.root / "nydus-work",
        }
        named = [f"{name}={value}" for name, value in variables.items()]
        self.program = rig.box.start(
            "buildkitd", ["env", *named, "buildkitd", "--config", str(settings)]
        )

        def ready() -> bool:
            self.program.check()
            return answers(rig.root / "buildkit.sock")

        wait_for("start of buildkitd", START_SECONDS, ready)

    def _write_builder(self, path: Path) -> None:
        words = {"calls": self._calls, "checkout": CHECKOUT, "python": sys.executable}
        quoted = {name: shlex.quote(str(word)) for name, word in words.items()}
        path.write_text(_BUILDER.format_map(quoted))
        path.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of each call of the builder so far."""
        return [line.split() for line in self._calls.read_text().splitlines()]

    def leftovers(self) -> list[str]:
        """Return what builds have left in their working directory."""
        return sorted(path.name for path in (self._root / "nydus-work").iterdir())

    def export(self, name: str, dockerfile: str, files: Mapping[str, bytes | Path]) -> str:
        """Build from a context of some files, and push; return the reference.

        Raises:
            BoxError: it fails; with the ends of both logs.
        """
        context = self._root / f"context-{name.replace(':', '-')}"
        context.mkdir()
        (context / "Dockerfile").write_text(dockerfile)
        for path, content in files.items():
            target = context / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy(content, target)
            else:
                target.write_bytes(content)
        reference = f"{REGISTRY}/{name}"
        try:
            self._rig.box.run(
                "buildctl", f"--addr=unix://{self._root}/buildkit.sock", "build",
                "--progress=plain", "--frontend=dockerfile.v0", f"--local=context={context}",
                f"--local=dockerfile={context}", f"--output=name={reference}," + ",".join(_OUTPUT),
                seconds=BUILD_SECONDS,
            )  # fmt: skip
        except BoxError as error:
            raise BoxError(f"{error}\n--- buildkitd:\n{self.program.log_end()}") from error
        return reference

    def export_together(
        self, builds: Mapping[str, tuple[str, Mapping[str, bytes | Path]]]
    ) -> dict[str, str]:
        """Export several at once; return the references by name; raise the first error."""
        references: dict[str, str] = {}
        errors: list[BaseException] = []

        def run(name: str) -> None:
            try:
                references[name] = self.export(name, *builds[name])
            except BoxError as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(name,)) for name in builds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in errors:
            raise error
        return references

    def manifest(self, name: str) -> dict[str, object]:
        """Return the manifest that was pushed."""
        text = self._rig.box.run(
            "skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{REGISTRY}/{name}"
        )
        manifest: dict[str, object] = json.loads(text)
        return manifest
