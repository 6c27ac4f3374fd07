"""The images that the real nydusify converted, in a registry of our own, and its outcomes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from builder.nydusify.cli import main
from tests.fakes.oci_registry import OciRegistry
from tests.fixtures_path import FIXTURES

CASES = FIXTURES / "made-by-nydusify"
HOST = "localhost:5000"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"


def fill(registry: OciRegistry) -> None:
    """Put the source images and every saved blob into repository `tiny`."""
    tiny = registry.repository("tiny")
    for path in (CASES / "blobs").iterdir():
        tiny.add_blob(path.read_bytes())
    for folder in (CASES / "source").iterdir():
        tag = folder.name.removeprefix("tiny-")
        for path in folder.iterdir():
            data = path.read_bytes()
            value = json.loads(data)
            if "manifests" in value:
                tiny.add_manifest(data, value.get("mediaType", OCI_INDEX), tag)
            elif "layers" in value:
                tiny.add_manifest(data, value["mediaType"], "" if tag == "index" else tag)
            else:
                tiny.add_blob(data)


@dataclass
class Outcome:
    """What a command line left behind."""

    status: int
    stdout: str
    stderr: str

    @property
    def last(self) -> str:
        """The message of the last line of the log."""
        lines = [line for line in self.stderr.splitlines() if line.startswith("time=")]
        match = re.search(r'msg=("(?:[^"\\]|\\.)*"|\S+)', lines[-1]) if lines else None
        return "" if match is None else json.loads(match[1]) if match[1][0] == '"' else match[1]


def nydusify(
    *words: object, stdin: bytes = b"", environment: dict[str, str] | None = None
) -> Outcome:
    """Run the command line in this process, with logging put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    out, err = io.StringIO(), io.StringIO()
    old = sys.stdin, sys.stderr
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin))
    sys.stderr = err
    try:
        with contextlib.redirect_stdout(out):
            status = main([str(word) for word in words])
    finally:
        sys.stdin, sys.stderr = old
        for handler in set(root.handlers) - set(handlers):
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)
    return Outcome(status, out.getvalue(), err.getvalue())


def recorded_images() -> dict[str, Path]:
    """Return the references that the real tool wrote, and the folders that hold the images."""
    found = {}
    for folder in sorted(CASES.glob("convert-*")):
        words = Case(folder.name).words
        if "--target" in words and (folder / "dump.json").exists():
            documents = [*folder.glob("manifest.json"), *folder.glob("index.json")]
            if documents:
                found[words[words.index("--target") + 1].partition("/")[2]] = folder
    return found


def store(registry: OciRegistry, reference: str, folder: Path) -> None:
    """Put a recorded image under its name into a registry that has what `fill` brings."""
    name, _, tag = reference.partition(":")
    repository = registry.repository(name)
    repository.blobs.update(registry.repository("tiny").blobs)
    for path in folder.glob("*config.json"):
        repository.add_blob(path.read_bytes())
    for path in folder.glob("*manifest.json"):
        data = path.read_bytes()
        top = path.name == "manifest.json"
        repository.add_manifest(data, json.loads(data)["mediaType"], tag if top else "")
    for path in folder.glob("index.json"):
        repository.add_manifest(path.read_bytes(), OCI_INDEX, tag)


@dataclass
class Case:
    """A recorded run of the real tool."""

    name: str

    @property
    def folder(self) -> Path:
        return CASES / self.name

    @property
    def words(self) -> list[str]:
        """The words after the program's name."""
        line = (self.folder / "cmd.txt").read_text().splitlines()[0]
        found = shlex.split(line)
        return found[found.index("nydusify") + 1 :]

    @property
    def stdin(self) -> bytes:
        """What was typed."""
        text = (self.folder / "cmd.txt").read_text()
        match = re.search(r"\nstdin:\n(.*)\nexit status", text, re.DOTALL)
        return match[1].encode() if match else b""

    @property
    def status(self) -> str:
        """The exit status, or `timeout`."""
        text = (self.folder / "cmd.txt").read_text()
        return re.search(r"exit status: (\w+)", text)[1]

    def document(self, name: str) -> dict:
        """A recorded document."""
        return json.loads((self.folder / name).read_text())
