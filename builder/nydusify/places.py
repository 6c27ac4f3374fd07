"""Places of images as command lines name them: registry references, folders, archives."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from builder.oci.archive import ArchiveSource, ArchiveTarget
from builder.oci.errors import ImageError
from builder.oci.layout import LayoutSource, LayoutTarget
from builder.oci.names import Reference, parse_reference
from builder.oci.place import Source, Target
from builder.oci.registry import RegistrySettings, Repository
from fscache.backend.hosts import HOSTS_VARIABLE
from fscache.backend.retry import RetryPolicy
from fscache.backend.settings import MirrorConfig

__all__ = ["Places", "seconds"]

FILE = "file://"
LAYOUT = "oci:"
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """Return the seconds of a time like `5s` or `1m30s`; raise `ImageError`."""
    pieces = re.findall(r"(\d+(?:\.\d*)?)(ns|us|µs|ms|s|m|h)", text)
    if not pieces or "".join(number + unit for number, unit in pieces) != text:
        raise ImageError("no time", expected="5s, 1m30s", got=ascii(text)[:40])
    return sum(float(number) * _UNITS[unit] for number, unit in pieces)


def docker_config(environment: Mapping[str, str]) -> Path | None:
    """Return the directory of Docker's configuration."""
    named = environment.get("DOCKER_CONFIG", "")
    if named:
        return Path(named)
    home = environment.get("HOME", "")
    return Path(home) / ".docker" if home else None


@dataclass(slots=True)
class Places:
    """Opens places, and closes them all at the end.

    Args:
        environment: with Docker's configuration.
        stack: closes what was opened.
        plain_http: no TLS at all.
        retry_count: tries of a request.
        retry_delay: pause between them in seconds.
        mirrors: addresses asked before a source's registry.
        hosts: containerd's folder of mirrors, empty for that of the environment.
    """

    environment: Mapping[str, str]
    stack: ExitStack
    plain_http: bool = False
    retry_count: int = 5
    retry_delay: float = 0.5
    mirrors: tuple[str, ...] = ()
    hosts: str = ""

    @property
    def retry(self) -> RetryPolicy:
        """How failed requests are repeated."""
        return RetryPolicy(
            attempts=max(1, self.retry_count),
            first_delay=self.retry_delay,
            factor=1.5,
            max_delay=max(30.0, self.retry_delay),
            deadline=600.0,
        )

    def settings(self, insecure: bool, chunk_bytes: int = 0) -> RegistrySettings:
        """Return how registries are asked."""
        usual = RegistrySettings()
        hosts = self.hosts or self.environment.get(HOSTS_VARIABLE, "")
        return RegistrySettings(
            insecure=insecure,
            plain_http=self.plain_http,
            docker_config=docker_config(self.environment),
            hosts=Path(hosts) if hosts else None,
            mirrors=tuple(MirrorConfig(host=mirror) for mirror in self.mirrors),
            retry=self.retry,
            chunk_bytes=chunk_bytes or usual.chunk_bytes,
        )

    def source(self, text: str, insecure: bool, archive: str = "") -> Source:
        """Open an image to read; raise `NydusError`.

        Args:
            text: a reference, `file:///path.tar`, or `oci:/folder[:tag]`; with an archive only
                what the image is called.
            insecure: accept any certificate.
            archive: path of an archive to read instead.
        """
        if archive or text.startswith(FILE):
            path = Path(archive or text.removeprefix(FILE))
            source: Source = (
                LayoutSource(path, shown=text) if path.is_dir() else ArchiveSource(path, shown=text)
            )
        elif text.startswith(LAYOUT):
            folder, tag = _split_layout(text)
            source = LayoutSource(folder, tag, text)
        else:
            source = Repository(parse_reference(text), self.settings(insecure))
        self.stack.callback(source.close)
        return source

    def target(
        self,
        text: str,
        insecure: bool,
        archive: str = "",
        source: Source | None = None,
        chunk_bytes: int = 0,
    ) -> Target:
        """Open a place for an image; raise `NydusError`.

        Args:
            text: as for `source`.
            insecure: accept any certificate.
            archive: path of an archive to write instead.
            source: whose blobs may be taken over.
            chunk_bytes: length of pieces of uploads, 0 for the usual.
        """
        target: Target
        if archive or text.startswith(FILE):
            path = Path(archive or text.removeprefix(FILE))
            name = "" if text.startswith(FILE) else text
            target = ArchiveTarget(path, name or "latest", _tag(name))
        elif text.startswith(LAYOUT):
            folder, tag = _split_layout(text)
            target = LayoutTarget(folder, tag, shown=text)
        else:
            reference = parse_reference(text)
            target = Repository(
                reference,
                self.settings(insecure, chunk_bytes),
                push=True,
                mount_from=_mountable(source, reference),
            )
        self.stack.callback(target.close)
        return target


def _split_layout(text: str) -> tuple[Path, str]:
    rest = text.removeprefix(LAYOUT)
    folder, colon, tag = rest.rpartition(":")
    if not colon or "/" in tag:
        return Path(rest), ""
    return Path(folder), tag


def _tag(name: str) -> str:
    if not name:
        return "latest"
    reference = parse_reference(name)
    return reference.tag or reference.digest


def _mountable(source: Source | None, target: Reference) -> list[str]:
    if not isinstance(source, Repository) or source.reference.host != target.host:
        return []
    other = source.reference.repository
    return [] if other == target.repository else [other]
