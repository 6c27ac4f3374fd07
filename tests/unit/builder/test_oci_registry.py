"""Images in a registry that misbehaves: what recovers, and what fails as documented."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import ssl

import pytest

from builder.oci import media
from builder.oci.errors import ImageError
from builder.oci.names import parse_reference
from builder.oci.records import Descriptor, Index, Manifest, describe
from builder.oci.registry import RegistrySettings, Repository
from builder.oci.upload import UploadLost
from erofs.errors import IntegrityError, NydusError
from fscache.backend.retry import RetryPolicy
from fscache.backend.settings import MirrorConfig
from tests.fakes.oci_registry import Fault, OciRegistry
from tests.fakes.registry import PASSWORD, USER, at_once, make_certificate

PATIENT = RetryPolicy(attempts=4, first_delay=0.01, deadline=60.0)
CHUNK = 1 << 16


@pytest.fixture
def registry():
    with OciRegistry() as server:
        yield server


def _settings(**more):
    return RegistrySettings(**{"plain_http": True, "retry": PATIENT, "chunk_bytes": CHUNK, **more})


def _open(registry, name="repo:tag", push=False, **more):
    reference = parse_reference(f"{registry.host}/{name}")
    return Repository(reference, _settings(**more), push=push)


def _blob(size=300_000):
    return os.urandom(size)


def _push(place, data):
    upload = place.begin()
    for start in range(0, len(data), 10_000):
        upload.write(data[start : start + 10_000])
    return upload.finish(media.NYDUS_BLOB)


def _pull(place, descriptor):
    return b"".join(place.pieces(descriptor))


def _docker(tmp_path, registry, user=USER, password=PASSWORD):
    auth = base64.b64encode(f"{user}:{password}".encode()).decode()
    config = {"auths": {registry.host: {"auth": auth}}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def test_small_blob_is_sent_at_once(registry):
    data = _blob(1000)
    found = _push(_open(registry, push=True), data)
    assert registry.repository("repo").blobs[found.digest] == data
    assert [line.split()[0] for line in registry.log] == ["HEAD", "POST", "PUT"]


def test_blob_that_is_there_is_not_sent(registry):
    data = _blob(1000)
    registry.repository("repo").add_blob(data)
    _push(_open(registry, push=True), data)
    assert [line.split()[0] for line in registry.log] == ["HEAD"]


def test_large_blob_is_sent_in_pieces(registry):
    data = _blob()
    found = _push(_open(registry, push=True), data)
    assert found == Descriptor(
        media.NYDUS_BLOB, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data)
    )
    assert registry.repository("repo").blobs[found.digest] == data
    verbs = [line.split()[0] for line in registry.log]
    assert verbs == ["POST", *["PATCH"] * 5, "PUT"]


@pytest.mark.parametrize("what", ["reset", "lose", 503, 429])
def test_piece_that_fails_is_resumed(registry, what):
    registry.faults.append(Fault("PATCH", "uploads", what, count=2, skip=1))
    data = _blob()
    found = _push(_open(registry, push=True), data)
    assert registry.repository("repo").blobs[found.digest] == data


def test_piece_of_which_half_came_goes_on_there(registry):
    place = _open(registry, push=True)
    data = _blob()
    upload = place.begin()
    upload.write(data[:100_000])
    upload._land()
    registry.keeps_half[next(iter(registry.sessions))] = True
    registry.faults.append(Fault("PATCH", "uploads", "lose"))
    upload.write(data[100_000:])
    found = upload.finish(media.NYDUS_BLOB)
    assert registry.repository("repo").blobs[found.digest] == data


@pytest.mark.parametrize("what", ["lose", "reset", 500])
def test_end_of_an_upload_is_repeated(registry, what):
    registry.faults.append(Fault("PUT", "uploads", what))
    data = _blob()
    found = _push(_open(registry, push=True), data)
    assert registry.repository("repo").blobs[found.digest] == data


def test_upload_that_is_forgotten_is_an_error_of_its_own(registry):
    registry.faults.append(Fault("PATCH", "uploads", 404, skip=2))
    upload = _open(registry, push=True).begin()
    upload.write(_blob(CHUNK * 3))
    with pytest.raises(UploadLost):
        upload.write(_blob(CHUNK * 3))
    upload.abort()
    assert not registry.sessions
    assert not registry.repository("repo").blobs


def test_retry_after_is_kept(registry):
    data = _blob(1000)
    digest = registry.repository("repo").add_blob(data)
    registry.faults.append(Fault("GET", "blobs", 429, headers={"Retry-After": "1"}))
    place = _open(registry)
    waited = []
    place._stop.wait = lambda seconds: waited.append(seconds)
    assert _pull(place, Descriptor(media.OCI_LAYER, digest, len(data))) == data
    assert waited
    assert waited[0] >= 1


@pytest.mark.parametrize("what", ["truncate", "reset", 503, 429])
def test_transfer_that_breaks_off_goes_on(registry, what):
    data = _blob()
    digest = registry.repository("repo").add_blob(data)
    registry.faults.append(Fault("GET", "blobs", what, count=2))
    assert _pull(_open(registry), Descriptor(media.OCI_LAYER, digest, len(data))) == data


def test_registry_without_ranges_is_read_again_from_the_beginning(registry):
    data = _blob()
    digest = registry.repository("repo").add_blob(data)
    registry.faults += [
        Fault("GET", "blobs", "truncate"),
        Fault("GET", "blobs", "ignore-range", count=3),
    ]
    assert _pull(_open(registry), Descriptor(media.OCI_LAYER, digest, len(data))) == data


def test_slow_registry_is_waited_for(registry):
    data = _blob(2000)
    digest = registry.repository("repo").add_blob(data)
    registry.drip = 100
    assert _pull(_open(registry), Descriptor(media.OCI_LAYER, digest, len(data))) == data


def test_wrong_content_is_refused(registry):
    data = _blob(1000)
    digest = registry.repository("repo").add_blob(data)
    registry.faults.append(Fault("GET", "blobs", "damage"))
    with pytest.raises(IntegrityError, match="another digest"):
        _pull(_open(registry), Descriptor(media.OCI_LAYER, digest, len(data)))


def test_longer_content_is_refused(registry):
    data = _blob(1000)
    digest = registry.repository("repo").add_blob(data)
    with pytest.raises(IntegrityError, match="longer"):
        _pull(_open(registry), Descriptor(media.OCI_LAYER, digest, len(data) - 1))


def test_wrong_manifest_is_refused(registry):
    repo = registry.repository("repo")
    repo.add_manifest(b'{"schemaVersion":2}', media.OCI_MANIFEST, "tag")
    registry.faults.append(Fault("GET", "manifests", "damage"))
    place = _open(registry)
    with pytest.raises(IntegrityError):
        place.document(place.resolve())


def test_token_that_ends_in_the_middle_is_renewed(registry, tmp_path):
    registry.auth = "bearer"
    place = _open(registry, push=True, docker_config=_docker(tmp_path, registry))
    data = _blob()
    upload = place.begin()
    upload.write(data[:150_000])
    upload._land()
    registry.revoke_tokens()
    upload.write(data[150_000:])
    found = upload.finish(media.NYDUS_BLOB)
    registry.revoke_tokens()
    assert _pull(place, found) == data
    assert len(registry.token_requests) >= 3


def test_basic_authentication(registry, tmp_path):
    registry.auth = "basic"
    data = _blob(1000)
    place = _open(registry, push=True, docker_config=_docker(tmp_path, registry))
    assert _pull(place, _push(place, data)) == data


def test_netrc_does_not_replace_our_token(registry, tmp_path, monkeypatch):
    registry.auth = "bearer"
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(netrc))
    place = _open(registry, push=True, docker_config=_docker(tmp_path, registry))
    _push(place, _blob(1000))
    sent = list(filter(None, registry.authorizations))
    assert sent
    assert all(word.startswith("Bearer") for word in sent)


@pytest.mark.parametrize("password", [None, "wr0ng-p4ss"])
def test_refusal_says_which_kind_and_no_secret(registry, tmp_path, password, caplog):
    registry.auth = "bearer"
    docker = None if password is None else _docker(tmp_path, registry, password=password)
    with caplog.at_level(logging.DEBUG), pytest.raises(NydusError) as failure:
        _open(registry, docker_config=docker).resolve()
    text = str(failure.value)
    assert ("no basic auth credentials" in text) == (password is None)
    assert "failed to resolve reference" in text
    for secret in (PASSWORD, "wr0ng-p4ss"):
        assert secret not in text + caplog.text


def test_missing_image_and_dead_registry_say_so(registry):
    with pytest.raises(ImageError, match=r"repo:tag: not found"):
        _open(registry).resolve()
    registry.stop()
    with pytest.raises(ImageError, match="Connection refused"):
        _open(registry).resolve()


def test_blob_of_the_same_registry_is_mounted(registry):
    data = _blob(1000)
    digest = registry.repository("other").add_blob(data)
    descriptor = Descriptor(media.OCI_LAYER, digest, len(data))
    source = _open(registry, "other:tag")
    target = _open(registry, push=True)
    assert target.mount(descriptor, source)
    assert registry.repository("repo").blobs[digest] == data
    registry.mounts = False
    missing = Descriptor(media.OCI_LAYER, f"sha256:{'0' * 64}", 3)
    assert not target.mount(missing, source)
    assert not registry.sessions


@pytest.mark.parametrize("has_api", [True, False])
def test_referrers(registry, has_api):
    registry.has_referrers = has_api
    target = _open(registry, push=True)
    config = describe(b"{}", media.OCI_EMPTY)
    target.put(config, [b"{}"])
    subject_data = Manifest(media.OCI_MANIFEST, config, ()).pack()
    subject = describe(subject_data, media.OCI_MANIFEST)
    target.publish(subject_data, subject)
    assert target.referrers(subject.digest) == []
    wanted = []
    for number in range(2):
        data = Manifest(
            media.OCI_MANIFEST, config, (), {"n": str(number)}, subject, "application/x"
        ).pack()
        wanted.append(describe(data, media.OCI_MANIFEST).digest)
        for _ in range(2):
            target.attach(data, describe(data, media.OCI_MANIFEST), subject)
    assert sorted(one.digest for one in target.referrers(subject.digest)) == sorted(wanted)
    tag = subject.digest.replace(":", "-")
    assert (tag in registry.repository("repo").tags) != has_api


def test_manifest_that_stands_there_is_not_put_again(registry):
    target = _open(registry, push=True)
    data = Index(media.OCI_INDEX, ()).pack()
    for _ in range(2):
        target.publish(data, describe(data, media.OCI_INDEX))
    assert [line.split()[0] for line in registry.log] == ["HEAD", "PUT", "HEAD"]


def test_digest_as_target_is_itself_or_nothing(registry):
    data = Index(media.OCI_INDEX, ()).pack()
    descriptor = describe(data, media.OCI_INDEX)
    _open(registry, f"repo@{descriptor.digest}", push=True).publish(data, descriptor)
    assert registry.repository("repo").manifests.keys() == {descriptor.digest}
    with pytest.raises(ImageError, match="digest that the result does not have"):
        _open(registry, f"repo@sha256:{'0' * 64}", push=True).publish(data, descriptor)


def test_upload_address_elsewhere_gets_no_token(registry, tmp_path):
    """What a registry points to is asked without the registry's credentials."""
    registry.auth = "basic"
    with OciRegistry() as other:
        other.sessions["s"] = bytearray()
        place = _open(registry, push=True, docker_config=_docker(tmp_path, registry))
        answer = place.request_at(f"{other.address}/v2/repo/blobs/uploads/s", "GET", {})
        answer.close()
        assert other.authorizations == [None]


@pytest.fixture
def tls_registry(tmp_path):
    certificate = make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with OciRegistry(tls=context) as server:
        yield server, certificate


def _digest_of(place):
    data = _blob(1000)
    return place, _push(place, data), data


def test_certificates_are_checked(tls_registry, monkeypatch, caplog):
    registry, certificate = tls_registry
    with pytest.raises(ImageError, match=r"certificate of .* is not valid"):
        _open(registry, plain_http=False).resolve()
    place, found, data = _digest_of(_open(registry, push=True, plain_http=False, insecure=True))
    assert _pull(place, found) == data
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    place, found, data = _digest_of(_open(registry, push=True, plain_http=False))
    assert _pull(place, found) == data


def test_registry_of_this_machine_without_tls_is_found_out_once(registry):
    place = _open(registry, push=True, plain_http=False)
    results = at_once(8, lambda number: _push(place, b"%d" % number * 100))
    assert all(isinstance(one, Descriptor) for one in results), results
    assert place.scheme == "http"


def test_mirror_is_asked_first(registry):
    data = _blob(1000)
    digest = registry.repository("repo").add_blob(data)
    descriptor = Descriptor(media.OCI_LAYER, digest, len(data))
    with OciRegistry() as mirror:
        mirror.repository("repo").add_blob(data)
        mirrors = (MirrorConfig(host=mirror.address),)
        assert _pull(_open(registry, mirrors=mirrors), descriptor) == data
        assert not [line for line in registry.log if line.startswith("GET")]
        mirror.repository("repo").blobs.clear()
        assert _pull(_open(registry, mirrors=mirrors), descriptor) == data
        assert [line for line in registry.log if line.startswith("GET")]


def test_proxy_of_the_environment(registry, monkeypatch):
    """What a proxy gets is an address in full."""
    monkeypatch.setenv("HTTP_PROXY", registry.address)
    monkeypatch.setenv("NO_PROXY", "")
    data = _blob(1000)
    registry.repository("repo").add_blob(data)
    reference = parse_reference("registry.example:5000/repo:tag")
    place = Repository(reference, _settings())
    with pytest.raises(ImageError):
        place.resolve()
    assert any(path.startswith("http://registry.example:5000/v2/") for path in registry.paths)
