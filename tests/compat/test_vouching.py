"""Signed root hashes and their OCI referrers; OpenSSL judges the signatures."""

import hashlib
import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from builder.cli import main
from builder.errors import BuildError
from builder.oci.errors import ImageError
from builder.oci.layout import LayoutSource, LayoutTarget
from builder.oci.names import parse_reference
from builder.oci.records import Index, Manifest, describe
from builder.oci.registry import RegistrySettings, Repository
from builder.referrer import ARTIFACT_TYPE, ROOT_HASH, add_verity_referrer
from builder.roothash import RootHashSigner
from erofs.errors import UnsupportedFeature
from erofs.verity import HashTree, TreeFormat
from tests.capabilities import need_tool
from tests.fakes.oci_registry import OciRegistry

ROOT = hashlib.sha256(b"root").digest()
TREE = HashTree(TreeFormat(4096), 300, 300 * 4096, ROOT)
MANIFEST = "application/vnd.oci.image.manifest.v1+json"


def openssl(*words, status=0):
    done = subprocess.run(
        [need_tool("openssl"), *map(str, words)], capture_output=True, timeout=60, check=False
    )
    assert (done.returncode == 0) == (status == 0), done.stderr
    return done


def make_key(directory, name, *algorithm):
    key, cert = directory / f"{name}.key", directory / f"{name}.crt"
    words = ["req", "-x509", "-nodes", "-subj", f"/CN={name}", "-keyout", key, "-out", cert]
    openssl(*words, *algorithm)
    return key, cert


@pytest.fixture(scope="module", params=["rsa", "ec"])
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("keys")
    algorithm = {
        "rsa": ("-newkey", "rsa:2048"),
        "ec": ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
    }
    return make_key(directory, request.param, *algorithm[request.param])


def verify(signature, text, certificate, directory, status=0):
    """Verify as the kernel does: with a certificate that it has, over the hex text."""
    (directory / "content").write_bytes(text)
    (directory / "sig").write_bytes(signature)
    openssl(
        "smime", "-verify", "-inform", "der", "-in", directory / "sig", "-binary",
        "-content", directory / "content", "-certfile", certificate, "-nointern", "-noverify",
        status=status,
    )  # fmt: skip


def test_openssl_verifies_the_signature(pair, tmp_path):
    key, certificate = pair
    signature = RootHashSigner(key, certificate).sign(ROOT)
    verify(signature, ROOT.hex().encode(), certificate, tmp_path)
    verify(signature, ROOT.hex().upper().encode(), certificate, tmp_path, status=1)
    _, other = make_key(tmp_path, "other", "-newkey", "rsa:2048")
    verify(signature, ROOT.hex().encode(), other, tmp_path, status=1)


def test_it_has_neither_content_nor_certificate_nor_attributes(pair, tmp_path):
    """The kernel refuses authenticated attributes of such signatures."""
    key, certificate = pair
    (tmp_path / "sig").write_bytes(RootHashSigner(key, certificate).sign(ROOT))
    shown = openssl("cms", "-cmsout", "-print", "-inform", "der", "-in", tmp_path / "sig")
    lines = [line.strip() for line in shown.stdout.decode().splitlines()]
    assert "eContent: <ABSENT>" in lines
    assert lines[lines.index("certificates:") + 1] == "<ABSENT>"
    assert lines[lines.index("signedAttrs:") + 1] == "<ABSENT>"


def test_an_rsa_signature_is_always_the_same(tmp_path):
    signer = RootHashSigner(*make_key(tmp_path, "k", "-newkey", "rsa:2048"))
    assert signer.sign(ROOT) == signer.sign(ROOT)


def test_keys_that_cannot_be(tmp_path):
    key, certificate = make_key(tmp_path, "one", "-newkey", "rsa:2048")
    _, stranger = make_key(tmp_path, "two", "-newkey", "rsa:2048")
    edwards, _ = make_key(tmp_path, "ed", "-newkey", "ed25519")
    locked = tmp_path / "locked"
    openssl("pkcs8", "-topk8", "-in", key, "-out", locked, "-passout", "pass:x")
    cases = [
        (tmp_path / "nowhere", certificate, "No such file or directory"),
        (certificate, certificate, "is no private key in PEM"),
        (key, key, "is no certificate in PEM"),
        (key, stranger, "not that of the key"),
        (edwards, certificate, "expected RSA or elliptic curve"),
        (locked, certificate, "passphrase"),
    ]
    for one, other, text in cases:
        with pytest.raises(BuildError, match=text) as caught:
            RootHashSigner(one, other)
        assert "PRIVATE" not in str(caught.value)


IMAGE = Manifest(MANIFEST, describe(b"{}", "application/vnd.oci.image.config.v1+json"), ()).pack()


@pytest.fixture
def layout(tmp_path):
    """A layout with one image, which has a name."""
    target = LayoutTarget(tmp_path / "layout", "latest")
    target.publish(IMAGE, describe(IMAGE, MANIFEST))
    return tmp_path / "layout"


def content(layout, descriptor):
    return LayoutSource(layout).document(descriptor)


def listed(layout):
    return Index.parse((layout / "index.json").read_bytes()).manifests


def test_a_referrer_carries_root_hash_and_signature(layout):
    subject = LayoutSource(layout, "latest").resolve()
    referrer = add_verity_referrer(LayoutTarget(layout), subject, TREE, b"signature")
    manifest = Manifest.parse(content(layout, referrer), MANIFEST)
    assert manifest.subject == subject.plain()
    assert manifest.artifact_type == ARTIFACT_TYPE
    assert content(layout, manifest.config) == b"{}"
    verity, signature = manifest.layers
    assert json.loads(content(layout, verity)) == TREE.as_json()
    assert content(layout, signature) == b"signature"
    assert signature.media_type == "application/pkcs7-signature"
    assert manifest.annotations == {ROOT_HASH: ROOT.hex()}
    # It is listed, and nobody takes it for the image.
    assert listed(layout)[-1] == referrer
    assert LayoutSource(layout).resolve() == subject


@pytest.mark.parametrize("lists", [True, False], ids=["referrers-api", "tag"])
def test_a_referrer_in_a_registry(lists):
    with OciRegistry() as registry:
        registry.has_referrers = lists
        stored = registry.repository("team/app")
        subject = replace(
            describe(IMAGE, MANIFEST), digest=stored.add_manifest(IMAGE, MANIFEST, "v1")
        )
        reference = parse_reference(f"{registry.host}/team/app:v1")
        place = Repository(reference, RegistrySettings(plain_http=True), push=True)
        referrer = add_verity_referrer(place, subject, TREE, b"signature")
        manifest = Manifest.parse(place.document(referrer), MANIFEST)
        place.close()
    assert manifest.subject == subject.plain()
    assert [layer.media_type for layer in manifest.layers][-1] == "application/pkcs7-signature"


def test_the_same_referrer_twice_is_one(layout):
    subject = LayoutSource(layout).resolve()
    first = add_verity_referrer(LayoutTarget(layout), subject, TREE)
    before = (layout / "index.json").read_bytes()
    assert add_verity_referrer(LayoutTarget(layout), subject, TREE) == first
    assert (layout / "index.json").read_bytes() == before
    # Without a signature there is none.
    assert len(Manifest.parse(content(layout, first), MANIFEST).layers) == 1


def test_a_subject_that_is_no_image(layout):
    with pytest.raises(UnsupportedFeature, match="subject that is no image"):
        add_verity_referrer(LayoutTarget(layout), describe(b"", "text/plain"), TREE)


def test_other_images_of_a_layout(layout):
    other = Manifest(MANIFEST, describe(b"1", "application/x"), ()).pack()
    LayoutTarget(layout, "other").publish(other, describe(other, MANIFEST))
    with pytest.raises(ImageError, match="exactly one image is not in the layout: got 2 images"):
        LayoutSource(layout).resolve()
    assert LayoutSource(layout, "other").resolve().digest == describe(other, MANIFEST).digest


def test_the_command_line(layout, tmp_path, capsys):
    source, blobs = tmp_path / "source", tmp_path / "blobs"
    source.mkdir()
    blobs.mkdir()
    (source / "file").write_bytes(b"content" * 1000)
    boot, report = tmp_path / "image.boot", tmp_path / "report.json"
    assert main(["create", "-B", str(boot), "-D", str(blobs), str(source)]) == 0
    key, certificate = make_key(tmp_path, "k", "-newkey", "rsa:2048")
    words = ["export", "--block", "-B", str(boot), "-D", str(blobs), "-O", str(tmp_path / "disk")]
    signing = ["--signing-key", str(key), "--signing-cert", str(certificate)]
    vouching = [*signing, "--referrer", f"{layout}@latest", "-J", str(report)]
    assert main([*words, "--verity", *vouching]) == 0
    root = capsys.readouterr().out.split()[-1]
    said = json.loads(report.read_text())
    assert said["signature"] == str(tmp_path / "disk.p7s")
    signature = Path(said["signature"]).read_bytes()
    verify(signature, root.encode(), certificate, tmp_path)
    referrer = listed(layout)[-1]
    assert (referrer.digest, referrer.annotations) == (said["referrer"], {ROOT_HASH: root})
    for wrong in (signing, ["--verity", *signing[:2]], ["--verity", "--signature", "x"],
                  ["--referrer", "x"]):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            main([*words, *wrong])
        assert caught.value.code == 2
    # What cannot be done is found out before the disk is written.
    (tmp_path / "disk").unlink()
    assert main([*words, "--verity", "--referrer", f"{layout}@v9"]) == 1
    assert main([*words, "--verity", "--signing-key", "x", "--signing-cert", "y"]) == 1
    assert not (tmp_path / "disk").exists()
