"""Images in a registry (OCI distribution 1.1): pulled here, pushed through `builder.oci.upload`.

Tokens, TLS and blob reads are those of the daemon's registry backend.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urlencode

from builder.oci import media
from builder.oci.errors import ImageError
from builder.oci.names import Reference
from builder.oci.place import Source, Verifier, read_document
from builder.oci.records import DOCUMENT_LIMIT, Descriptor, Index, check_digest, describe
from builder.oci.transfer import resumed_pieces
from builder.oci.upload import BlobUpload, Session
from erofs.errors import NydusError, error_context
from fscache.backend.answer import Answer
from fscache.backend.base import AuthError, BackendError, BlobReader, NotFound
from fscache.backend.distribution import RegistryClient
from fscache.backend.dockerauth import docker_credentials
from fscache.backend.hosts import with_hosts
from fscache.backend.mirrors import MirrorSender
from fscache.backend.ranges import status_error
from fscache.backend.redirects import redirect_target
from fscache.backend.registry import RegistryBackend
from fscache.backend.retry import RetryPolicy
from fscache.backend.sender import Body, Sender
from fscache.backend.session import SessionSender
from fscache.backend.settings import MirrorConfig, RegistryConfig

__all__ = ["RegistrySettings", "Repository"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_ACCEPT = ", ".join((*media.MANIFEST_TYPES, *media.INDEX_TYPES, "*/*"))
# One request with its body; a whole layer may be one body.
_REQUEST_SECONDS = 3600.0
_ANSWER_SECONDS = 60.0
_OK, _CREATED, _ACCEPTED = 200, 201, 202


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """How registries are asked.

    Args:
        insecure: accept any certificate, and plain HTTP where there is no TLS.
        plain_http: no TLS at all.
        docker_config: directory of Docker's `config.json`, None for anonymous access.
        mirrors: asked before the registry when images are read.
        hosts: containerd's folder of mirrors; not used beside `mirrors`.
        retry: how failed requests are repeated.
        chunk_bytes: of uploads whose digest is not known before, and the limit up to which
            a blob is sent at once.
    """

    insecure: bool = False
    plain_http: bool = False
    docker_config: Path | None = None
    mirrors: tuple[MirrorConfig, ...] = ()
    hosts: Path | None = None
    retry: RetryPolicy = field(
        default_factory=lambda: RetryPolicy(attempts=5, first_delay=0.5, deadline=600.0)
    )
    chunk_bytes: int = 8 << 20


class Repository:
    """One image's repository as `Source` and `Target`; safe to use from many threads.

    Args:
        reference: the image.
        settings: how to ask.
        push: whether it will be written to.
        mount_from: repositories of the same registry that blobs may be taken over from.

    Raises:
        BackendError: a host that is none, unreadable certificates.
        ConfigError: the file of the registry's mirrors is none.
    """

    attaches_first = False

    def __init__(
        self,
        reference: Reference,
        settings: RegistrySettings,
        *,
        push: bool = False,
        mount_from: Iterable[str] = (),
    ) -> None:
        self.reference = reference
        self._settings = settings
        self._stop = threading.Event()
        self._path = f"/v2/{quote(reference.repository)}"
        config = _config(reference, settings)
        self._has_credentials = config.credentials is not None
        direct: Sender = SessionSender(config)
        self._sender = direct
        if config.mirrors and not push:
            self._sender = MirrorSender(config.mirrors, config.host, direct, SessionSender)
        scopes = [f"repository:{name}:pull" for name in mount_from]
        self._client = RegistryClient(config, self._sender, "pull,push" if push else "pull", scopes)
        self._backend = RegistryBackend(config, self._sender, self._client)

    @property
    def name(self) -> str:
        """The reference as it was given."""
        return self.reference.text

    @property
    def scheme(self) -> str:
        """How the registry was spoken to last: http or https."""
        return self._client.scheme

    @property
    def insecure(self) -> bool:
        """Whether any certificate is accepted."""
        return self._settings.insecure

    def close(self) -> None:
        """Drop idle connections and end pauses."""
        self._stop.set()
        self._backend.close()

    def again(self, operation: Callable[[], _T]) -> _T:
        """Return what an operation returns, repeated while it fails for the moment."""
        return self._settings.retry.run(operation, self._stop)

    def request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: Body | None = None,
    ) -> Answer:
        """Send one request to the registry itself; raise `BackendError` without an answer."""
        deadline = time.monotonic() + _REQUEST_SECONDS
        return self._client.ask(method, path, headers or {}, deadline, body)[0]

    def request_at(
        self, location: str, method: str, headers: Mapping[str, str], body: Body | None = None
    ) -> Answer:
        """Send a request to an address that the registry gave; only itself sees a token."""
        own, slash, rest = location.partition("://")[2].partition("/")
        if own == self.reference.api_host:
            return self.request(method, slash + rest, headers, body)
        deadline = time.monotonic() + _REQUEST_SECONDS
        return self._sender.send(method, location, headers, deadline, body)

    # Reading.

    def resolve(self) -> Descriptor:
        """Return what the reference stands for; raise `NydusError` with the real tool's words."""
        path = f"{self._path}/manifests/{quote(self.reference.name, safe=':')}"
        try:
            return self.again(lambda: self._head(path))
        except NydusError as error:
            text = f'failed to resolve reference "{self.name}"'
            raise ImageError(f"pull image {self.name}: {text}: {self._reason(error)}") from error

    def _reason(self, error: NydusError) -> str:
        if isinstance(error, NotFound):
            return f"{self.name}: not found"
        if isinstance(error, AuthError) and not self._has_credentials:
            return (
                "pull access denied, repository does not exist or may require authorization:"
                " authorization failed: no basic auth credentials"
            )
        return str(error)

    def _head(self, path: str) -> Descriptor:
        with self.request("HEAD", path, {"Accept": _ACCEPT}) as answer:
            if answer.status != _OK:
                raise status_error(answer)
            digest = answer.headers.get("Docker-Content-Digest")
            size, kind = answer.length(), answer.headers.get("Content-Type", "")
        kind = kind.partition(";")[0].strip()
        if digest is None or size is None or not (media.is_manifest(kind) or media.is_index(kind)):
            data, kind = self._get_document(path, _ACCEPT)
            return describe(data, kind)
        return Descriptor(kind, check_digest(digest), size)

    def _get_document(self, path: str, accept: str) -> tuple[bytes, str]:
        with self.request("GET", path, {"Accept": accept}) as answer:
            if answer.status != _OK:
                raise status_error(answer)
            data = answer.read_all(DOCUMENT_LIMIT, time.monotonic() + _ANSWER_SECONDS)
            return data, answer.headers.get("Content-Type", "").partition(";")[0].strip()

    def document(self, descriptor: Descriptor) -> bytes:
        """Return an index, manifest or configuration, verified; raise `NydusError`."""
        kind = descriptor.media_type
        if not (media.is_manifest(kind) or media.is_index(kind)):
            return read_document(self, descriptor)
        path = f"{self._path}/manifests/{descriptor.digest}"
        with error_context(blob=descriptor.digest):
            data, _ = self.again(lambda: self._get_document(path, f"{kind}, */*"))
            verifier = Verifier(descriptor)
            verifier.update(data)
            verifier.finish()
        return data

    def pieces(self, descriptor: Descriptor) -> Generator[bytes]:
        """Yield a blob; a transfer that breaks off goes on where it was."""
        reader = self._backend.open(descriptor.hex)
        return resumed_pieces(reader, descriptor, self._settings.retry, self._stop)

    def open(self, blob_id: str) -> BlobReader:
        """Return a reader of ranges; raise `BackendError` for an id that is refused."""
        return self._backend.open(blob_id)

    def referrers(self, digest: str) -> list[Descriptor]:
        """Return what refers to a manifest, by the API or by the tag in its place."""
        data = self.again(lambda: self._find(f"{self._path}/referrers/{check_digest(digest)}"))
        if data is None:
            data = self.again(lambda: self._find(self._referrers_tag(digest)))
        return [] if data is None else list(Index.parse(data).manifests)

    def _find(self, path: str) -> bytes | None:
        try:
            return self._get_document(path, media.OCI_INDEX)[0]
        except NotFound:
            return None

    def _referrers_tag(self, digest: str) -> str:
        return f"{self._path}/manifests/{digest.replace(':', '-')}"

    # Writing.

    def has(self, descriptor: Descriptor) -> bool:
        """Tell whether a blob is there; raise `NydusError`."""
        path = f"{self._path}/blobs/{descriptor.digest}"

        def look() -> bool:
            answer = self.request("HEAD", path, {"Accept": f"{descriptor.media_type}, */*"})
            with answer:
                # Storage that the registry points to has it, if the registry says so.
                if answer.status in (_OK, 307, 302):
                    return True
                if answer.status == 404:
                    return False
                raise status_error(answer)

        return self.again(look)

    def begin(self) -> BlobUpload:
        """Begin a blob whose digest is not known; nothing is sent yet."""
        return BlobUpload(self, self._settings.chunk_bytes)

    def put(self, descriptor: Descriptor, data: Iterable[bytes]) -> None:
        """Store a blob of known digest unless it is there; raise `NydusError`."""
        if self.has(descriptor):
            logger.debug("blob %s is there", descriptor.digest)
            return
        upload = self.begin()
        try:
            for piece in data:
                upload.write(piece)
            found = upload.finish(descriptor.media_type, known_absent=True)
        except BaseException:
            upload.abort()
            raise
        if found.digest != descriptor.digest:
            raise ImageError("pushed another blob", expected=descriptor.digest, got=found.digest)

    def put_at_once(self, descriptor: Descriptor, body: Body) -> None:
        """Send a blob by one PUT; raise `NydusError`."""
        self.again(lambda: self._put_at_once(descriptor, body))

    def _put_at_once(self, descriptor: Descriptor, body: Body) -> None:
        with closing(self.open_session()) as session:
            session.put(descriptor.digest, body)

    def open_session(self) -> Session:
        """Begin an upload session at the registry; raise `BackendError`."""
        with self.request("POST", f"{self._path}/blobs/uploads/") as answer:
            if answer.status != _ACCEPTED:
                raise status_error(answer)
            return Session(self, _location(answer))

    def mount(self, descriptor: Descriptor, source: Source) -> bool:
        """Ask the registry to take a blob over from a repository that is its own, too."""
        if not isinstance(source, Repository):
            return False
        other = source.reference
        if other.host != self.reference.host or other.repository == self.reference.repository:
            return False
        query = urlencode({"mount": descriptor.digest, "from": other.repository}, safe=":/")
        return self.again(lambda: self._mount(f"{self._path}/blobs/uploads/?{query}"))

    def _mount(self, path: str) -> bool:
        with self.request("POST", path) as answer:
            if answer.status == _CREATED:
                return True
            if answer.status != _ACCEPTED:
                # It is only a way to save time: the blob is sent then.
                logger.debug("registry does not take the blob over: status %d", answer.status)
                return False
            session = Session(self, _location(answer))
        session.close()
        return False

    def publish(self, data: bytes, descriptor: Descriptor, *, named: bool = True) -> None:
        """Store a manifest or index unless that name stands for it already.

        A digest as the name makes the image nothing else than itself (spec tools 15.13).
        """
        name = descriptor.digest
        if named and self.reference.digest not in ("", descriptor.digest):
            raise ImageError(
                "target is a digest that the result does not have",
                expected=self.reference.digest, got=descriptor.digest,
            )  # fmt: skip
        if named and self.reference.tag:
            name = self.reference.tag
        path = f"{self._path}/manifests/{quote(name, safe=':')}"
        if self.again(lambda: self._stands_for(path, descriptor)):
            return
        self.again(lambda: self._put_manifest(path, data, descriptor.media_type))

    def _stands_for(self, path: str, descriptor: Descriptor) -> bool:
        with self.request("HEAD", path, {"Accept": f"{descriptor.media_type}, */*"}) as answer:
            if answer.status == 404:
                return False
            if answer.status != _OK:
                raise status_error(answer)
            return answer.headers.get("Docker-Content-Digest") == descriptor.digest

    def _put_manifest(self, path: str, data: bytes, media_type: str) -> bool:
        """Store a manifest; tell whether the registry keeps referrers itself."""
        with self.request("PUT", path, {"Content-Type": media_type}, data) as answer:
            if answer.status not in (_OK, _CREATED):
                raise _refusal(answer)
            return answer.headers.get("OCI-Subject") is not None

    def attach(self, manifest: bytes, descriptor: Descriptor, subject: Descriptor) -> None:
        """Store a manifest that refers to another one; a registry without referrers gets a tag."""
        path = f"{self._path}/manifests/{descriptor.digest}"
        if self.again(lambda: self._put_manifest(path, manifest, descriptor.media_type)):
            return
        tag = self._referrers_tag(subject.digest)
        data = self.again(lambda: self._find(tag))
        known = Index.parse(data).manifests if data is not None else ()
        if any(item.digest == descriptor.digest for item in known):
            return
        packed = Index(media.OCI_INDEX, (*known, descriptor)).pack()
        self.again(lambda: self._put_manifest(tag, packed, media.OCI_INDEX))


def _config(reference: Reference, settings: RegistrySettings) -> RegistryConfig:
    scheme = "http" if settings.plain_http else "" if reference.is_local else "https"
    credentials = None
    if settings.docker_config is not None:
        credentials = docker_credentials(settings.docker_config, reference.host)
    config = RegistryConfig(
        host=reference.api_host,
        repo=reference.repository,
        scheme=scheme,
        skip_verify=settings.insecure,
        credentials=credentials,
        timeout=_ANSWER_SECONDS,
        connect_timeout=10.0,
        transfer_timeout=_REQUEST_SECONDS,
        mirrors=settings.mirrors,
    )
    return config if settings.hosts is None else with_hosts(config, settings.hosts)


def _location(answer: Answer) -> str:
    return redirect_target(answer.headers.get("Location"), answer.url, "", "")


def _refusal(answer: Answer) -> BackendError:
    """Return the error of a manifest that a registry does not take."""
    error = status_error(answer)
    if 400 <= answer.status < 500 and answer.status not in (401, 403, 404, 408, 429):
        return BackendError("registry refuses the manifest", got=f"status {answer.status}")
    return error
