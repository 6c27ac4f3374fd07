"""References to images, and platforms as people write them."""

from __future__ import annotations

import platform as machine
import re
from dataclasses import dataclass

from builder.oci.errors import ImageError
from builder.oci.records import Platform, check_digest

__all__ = ["Reference", "host_platform", "matches", "parse_platforms", "parse_reference"]

DOCKER_HUB = "docker.io"
_DOCKER_HUB_API = "registry-1.docker.io"
_DEFAULT_TAG = "latest"
_HOST = re.compile(
    r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?::\d{1,5})?"
)
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_PLATFORM_PART = re.compile(r"[A-Za-z0-9_.-]+")
_ARCHITECTURES = {
    "x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "i686": "386",
    "armhf": "arm", "armv7l": "arm",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Reference:
    """Where an image is: `host/repository:tag` or `host/repository@digest`.

    `text` is what was given.
    """

    text: str
    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    @property
    def api_host(self) -> str:
        """The host that answers for the registry."""
        return _DOCKER_HUB_API if self.host == DOCKER_HUB else self.host

    @property
    def is_local(self) -> bool:
        """Whether the registry is on this machine, where plain HTTP is usual."""
        name = self.host.rpartition(":")[0] if ":" in self.host else self.host
        return name in ("localhost", "127.0.0.1", "[::1]") or name.startswith("127.")

    @property
    def name(self) -> str:
        """What manifests are asked for by."""
        return self.digest or self.tag

    @property
    def repository_text(self) -> str:
        """Host and repository."""
        return f"{self.host}/{self.repository}"

    def __str__(self) -> str:
        if self.digest:
            return f"{self.repository_text}@{self.digest}"
        return f"{self.repository_text}:{self.tag}"

    def with_tag(self, tag: str) -> Reference:
        """Return another image of the same repository; raise `ImageError`."""
        return parse_reference(f"{self.repository_text}:{tag}")


def parse_reference(text: str) -> Reference:
    """Split a reference; `docker.io`, `library/` and `:latest` are implied; raise `ImageError`."""
    rest, at, digest = text.partition("@")
    if at:
        check_digest(digest)
    host, slash, path = rest.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, path = DOCKER_HUB, rest
    if host == "index.docker.io":
        host = DOCKER_HUB
    repository, colon, tag = path.partition(":")
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    if not _HOST.fullmatch(host):
        raise ImageError("invalid reference: no host", got=ascii(text)[:200])
    if not all(_REPOSITORY.fullmatch(part) for part in repository.split("/")):
        raise ImageError("invalid reference: no repository", got=ascii(text)[:200])
    if colon and not _TAG.fullmatch(tag):
        raise ImageError("invalid reference: no tag", got=ascii(text)[:200])
    if not tag and not digest:
        tag = _DEFAULT_TAG
    return Reference(text, host, repository, tag, digest)


def host_platform() -> Platform:
    """Return what this machine is."""
    name = machine.machine()
    return Platform(_ARCHITECTURES.get(name, name), "linux")


def parse_platforms(text: str) -> list[Platform]:
    """Return the platforms of a comma list, `os/architecture[/variant]`; raise `ImageError`."""
    return [_platform(item.strip()) for item in text.split(",")]


def _platform(text: str) -> Platform:
    parts = text.split("/")
    if not 1 <= len(parts) <= 3 or not all(_PLATFORM_PART.fullmatch(part) for part in parts):
        raise ImageError("invalid platform", expected="os/architecture[/variant]", got=ascii(text))
    if len(parts) == 1:
        parts = ["linux", parts[0]]
    architecture = _ARCHITECTURES.get(parts[1].lower(), parts[1].lower())
    variant = parts[2].lower() if len(parts) == 3 else ""
    return Platform(architecture, parts[0].lower(), variant=variant)


def _variant(platform: Platform) -> str:
    """Return the variant; without one it is the usual of the architecture."""
    usual = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
    return platform.variant or usual.get(platform.architecture, "")


def matches(wanted: Platform, found: Platform | None) -> bool:
    """Tell whether an image for `found` is what `wanted` asks for."""
    return (
        found is not None
        and (found.os, found.architecture) == (wanted.os, wanted.architecture)
        and _variant(found) == _variant(wanted)
    )
