"""No recorded run of the real nydusify is forgotten; here are those without a test elsewhere."""

from __future__ import annotations

import base64
import json
import re
import ssl
import tarfile

import pytest

from tests.compat import test_nydusify_fixtures as images
from tests.compat import test_nydusify_outcomes as outcomes
from tests.compat import test_nydusify_replays as replays
from tests.fakes.oci_image import Image, layer, member
from tests.fakes.oci_registry import OciRegistry
from tests.fakes.registry import PASSWORD, USER, make_certificate
from tests.fixtures_path import needs_fixtures
from tests.nydusify_images import CASES, Case, fill, nydusify

pytestmark = needs_fixtures

CACHES = (
    "convert-build-cache-1", "convert-build-cache-same-repo-1",
    "convert-build-cache-same-repo-2", "convert-build-cache-same-repo-3-index",
    "convert-build-cache-same-repo-4-lz4", "convert-build-cache-tag",
    "convert-build-cache-version",
)  # fmt: skip
BIG = ("big-convert-gz", "big-convert-zran", "big-convert-zst")
REFUSED_LOGINS = ("fail-no-auth", "fail-wrong-auth")
CACHE_VERSION = "containerd.io/snapshot/nydus-cache-version"
# Not replayed, and why.
NOT_REPLAYED = {
    "big-check": "there are no blobs: its output is that of big-convert-gz, check-ok is the same",
}
# `tests/unit/builder/test_commit.py` has its rig.
ELSEWHERE = {"commit-help"}
# Folders that hold no run.
NO_RUN = {"blobs", "source"}


def _registry(**options):
    server = OciRegistry(**options)
    fill(server)
    return server


@pytest.fixture
def registry():
    with _registry() as server:
        yield server


def _run(case, registry, tmp_path, *more, **others):
    words = [re.sub(r"localhost:(5000|5003|5101)", registry.host, word) for word in case.words]
    words = [word.replace("../", f"{tmp_path}/") for word in words]
    if case.words[0] == "convert":
        more = (*more, "--push-retry-delay", "1ms")
    return nydusify(*words, *more, "--work-dir", tmp_path / "work", stdin=case.stdin, **others)


def _manifest(registry, repo, tag):
    found = registry.repository(repo)
    return json.loads(found.manifests[found.tags[tag]][1])


def _same_image(case, registry, repo, tag, prefix=""):
    """Compare one image, found under a name, with a recorded one."""
    found = registry.repository(repo)
    manifest = _manifest(registry, repo, tag)
    images._check_image(
        found, manifest, found.blobs[manifest["config"]["digest"]],
        case.document(f"{prefix}manifest.json"),
        (case.folder / f"{prefix}config.json").read_bytes(), registry,
    )  # fmt: skip


def test_every_recorded_run_is_looked_at():
    lists = [
        images.SINGLE, images.SEVERAL, ["convert-lz4", "convert-reverse", "convert-reverse-merge"],
        outcomes.SAME_MESSAGE, outcomes.SAME_STATUS, outcomes.BETTER_REFUSED,
        outcomes.BETTER_DONE, outcomes.STILL_DONE, ["optimize-default", "chunkdict-generate"],
        replays.COPIES, replays.CHECKED, replays.MOUNTS,
        ["copy-to-file", "copy-localfs-backend", "check-mismatch", "check-zran-other-repo",
         "check-wrong-source"],
        CACHES, BIG, REFUSED_LOGINS, NOT_REPLAYED, ELSEWHERE,
        ["build-dir", "convert-auth-ok", "convert-chunk-dict-local", "convert-source-archive-2",
         "convert-target-archive", "convert-tls-insecure", "convert-tls-not-insecure",
         "edge-no-args", "fail-fifo-with-nul-device-fields", "fail-unknown-command",
         "optimize-plain-http"],
    ]  # fmt: skip
    handled = {name for one in lists for name in one}
    assert handled == {path.name for path in CASES.iterdir() if path.is_dir()} - NO_RUN


@pytest.mark.parametrize("name", CACHES)
def test_image_beside_its_cache(name, registry, tmp_path):
    """Images are the recorded ones; what cache manifests say differs (docs/nydusify.md)."""
    case = Case(name)
    number = re.search(r"same-repo-(\d)", name)
    for before in range(1, int(number[1])) if number else ():
        (earlier,) = CASES.glob(f"convert-build-cache-same-repo-{before}*")
        assert _run(Case(earlier.name), registry, tmp_path, "--no-proof").status == 0
    done = _run(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 0), done.stderr
    repo, _, tag = case.words[case.words.index("--target") + 1].partition("/")[2].partition(":")
    if name.endswith("4-lz4"):
        # The real tool took blobs over that were compressed by something else.
        real = {one["digest"] for one in case.document(f"{tag}-manifest.json")["layers"]}
        lz4 = {one["digest"] for one in Case("convert-lz4").document("manifest.json")["layers"]}
        ours = {one["digest"] for one in _manifest(registry, repo, tag)["layers"][:-1]}
        assert ours <= lz4
        assert not ours & real
        return
    if name.endswith("3-index"):
        index, wanted = _manifest(registry, repo, tag), case.document(f"{tag}-index.json")
        assert [one["platform"] for one in index["manifests"]] == [
            one["platform"] for one in wanted["manifests"]
        ]
        return
    _same_image(case, registry, repo, tag, f"{tag}-")
    _compare_cache(case, registry, tag)


def _compare_cache(case, registry, tag):
    words = case.words
    names = {
        path.name.removesuffix("-manifest.json") for path in case.folder.glob("*-manifest.json")
    }
    (cache,) = names - {tag}
    named = re.search(rf"{images.HOST}/(\w+):{cache}\b", " ".join(words))
    target = words[words.index("--target") + 1].partition("/")[2].partition(":")[0]
    found = _manifest(registry, named[1] if named else target, cache)
    wanted = case.document(f"{cache}-manifest.json")
    assert found["config"] == wanted["config"]
    # The real tool forgets the version.
    assert wanted["annotations"][CACHE_VERSION] == ""
    assert found["annotations"][CACHE_VERSION] == ("v7" if "v7" in words else "v1")
    # In what order layers got ready is chance.
    known = {one["digest"]: one for one in found["layers"]}
    assert known.keys() == {one["digest"] for one in wanted["layers"]}
    for real in wanted["layers"]:
        ours = known[real["digest"]]
        assert (ours["mediaType"], ours["size"]) == (real["mediaType"], real["size"])
        assert real["annotations"].items() <= ours["annotations"].items()


@pytest.mark.parametrize("name", BIG)
def test_form_of_the_big_images(name, registry, tmp_path):
    """Their layers are not among the fixtures: three small ones stand for them."""
    case = Case(name)
    wanted = case.document("manifest.json")
    tars = [layer(member(f"file{number}", b"%d" % number)) for number in range(3)]
    Image(tars).add(registry.repository("debian"), case.words[2].rpartition(":")[2])
    done = _run(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 0), done.stderr
    tag = case.words[case.words.index("--target") + 1].rpartition(":")[2]
    found = _manifest(registry, "debian", tag)
    assert _form(found) == _form(wanted)
    config = json.loads(registry.repository("debian").blobs[found["config"]["digest"]])
    real = case.document("config.json")
    assert len(config["rootfs"]["diff_ids"]) == len(real["rootfs"]["diff_ids"])
    assert config["history"][-1] == real["history"][-1]


def _form(manifest):
    """Return a manifest without what depends on the content."""
    text = re.sub(r'"(digest|size)": [^,}]*', r'"\1": 0', json.dumps(manifest))
    text = re.sub(r"sha256:[0-9a-f]{64}", "", text)
    text = re.sub(r'(nydus-(?:builder-version|source-reference)": )"[^"]*"', r'\1""', text)
    return json.loads(text)


def test_order_of_a_push(registry, tmp_path):
    """Every blob is looked for and sent once, by POST and one PUT; the name comes last."""
    case = Case("convert-fresh-repo")
    done = _run(case, registry, tmp_path, "--no-proof")
    assert done.status == 0, done.stderr

    def writes(rows):
        verbs = [row.split()[:2] for row in rows if "/v2/fresh/" in row]
        kinds = [(verb, "manifest" if "/manifests/" in path else "blob") for verb, path in verbs]
        return [one for one in kinds if one[0] in ("POST", "PUT", "PATCH")]

    recorded = writes((case.folder / "http.txt").read_text().splitlines())
    ours = writes(registry.log)
    assert sorted(ours) == sorted(recorded)
    assert ours[-1] == recorded[-1] == ("PUT", "manifest")


def test_build_of_a_directory(tmp_path):
    """The real tool always fails here."""
    case = Case("build-dir")
    (tmp_path / "srcdir").mkdir()
    (tmp_path / "srcdir" / "file").write_bytes(b"content")
    words = [word.replace("../", f"{tmp_path}/") for word in case.words]
    words[words.index("out")] = str(tmp_path / "out")
    done = nydusify(*words)
    assert (case.status, done.status) == ("1", 0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "img.meta", "img.blob", "output.json",
    }  # fmt: skip


def _private(tmp_path, password):
    """Return a registry that wants a password, and an environment that has one."""
    server = _registry(auth="basic")
    server.repositories["private"] = server.repository("tiny")
    auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {server.host: {"auth": auth}}}))
    return server


def test_registry_with_a_password(tmp_path, monkeypatch):
    case = Case("convert-auth-ok")
    assert (case.folder / "cmd.txt").read_text().startswith("DOCKER_CONFIG=")
    with _private(tmp_path, PASSWORD) as registry:
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        done = _run(case, registry, tmp_path)
        assert (str(done.status), done.status) == (case.status, 0), done.stderr
        manifest = _manifest(registry, "tiny", "from-private")
        reference = manifest["annotations"].pop(images.REFERENCE)
        assert reference == f"{registry.host}/private:gz"
        wanted = case.document("manifest.json")
        assert wanted["annotations"].pop(images.REFERENCE) == "localhost:5101/private:gz"
        assert images._known(manifest, registry) == images._known(wanted, registry)
        assert PASSWORD not in done.stderr


@pytest.mark.parametrize("name", REFUSED_LOGINS)
def test_registry_that_refuses(name, tmp_path, monkeypatch):
    case = Case(name)
    with _private(tmp_path, "wrong") as registry:
        folder = tmp_path if name == "fail-wrong-auth" else tmp_path / "none"
        monkeypatch.setenv("DOCKER_CONFIG", str(folder))
        done = _run(case, registry, tmp_path)
        assert str(done.status) == case.status == "1"
        real = (case.folder / "stderr.txt").read_text().splitlines()[-1]
        wanted = json.loads(real.split("msg=", 1)[1]).removeprefix("pull image: ")
        ours = done.last.replace(registry.host, "localhost:5101")
        if name == "fail-no-auth":
            assert ours == wanted
        else:
            # The same up to the words for the refusal itself.
            assert ours.partition('gz": ')[0] == wanted.partition('gz": ')[0]
            assert "401" in ours
            assert "401" in wanted
        assert not [row for row in registry.log if row.startswith(("PUT", "POST", "PATCH"))]


def test_dictionary_from_a_file(registry, tmp_path):
    """The real tool takes the path for a reference."""
    case = Case("convert-chunk-dict-local")
    bootstrap = tmp_path / "boot" / "image.boot"
    bootstrap.parent.mkdir()
    real = Case("convert-default").document("manifest.json")["layers"][-1]["digest"]
    with tarfile.open(CASES / "blobs" / real.removeprefix("sha256:")) as tar:
        bootstrap.write_bytes(tar.extractfile("image/image.boot").read())
    # Its blobs have to be where the image goes.
    registry.repositories["dict"] = registry.repository("tiny")
    done = _run(case, registry, tmp_path)
    assert (case.status, done.status) == ("1", 0), done.stderr


def test_source_archive(registry, tmp_path):
    case = Case("convert-source-archive-2")
    done = nydusify(
        "copy", "--source", f"{registry.host}/tiny:gz", "--target", f"file://{tmp_path}/src.tar",
        "--plain-http",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    done = _run(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 0), done.stderr
    _same_image(case, registry, "tiny", "from-arch")


def test_target_archive(registry, tmp_path):
    """The recording has no image; it is that of convert-default, in the documented form."""
    case, same = Case("convert-target-archive"), Case("convert-default")
    done = _run(case, registry, tmp_path)
    assert (str(done.status), done.status) == (case.status, 0), done.stderr
    with tarfile.open(tmp_path / "x.tar") as tar:
        members = {one.name: one for one in tar}
        index = json.load(tar.extractfile("index.json"))
        docker = json.load(tar.extractfile("manifest.json"))
        (entry,) = (one for one in index["manifests"] if "artifactType" not in one)
        manifest = json.load(tar.extractfile(f"blobs/sha256/{entry['digest'][7:]}"))
    assert images._known(manifest, registry) == images._known(
        same.document("manifest.json"), registry
    )
    assert entry["annotations"] == {
        "io.containerd.image.name": f"{registry.host}/tiny:arch",
        "org.opencontainers.image.ref.name": "arch",
    }
    assert docker[0]["Config"] == f"blobs/sha256/{manifest['config']['digest'][7:]}"
    assert {one.mtime for one in members.values()} == {0}
    assert {one.mode for name, one in members.items() if "sha256/" in name and one.isfile()} == {
        0o444
    }
    # Nothing is asked of the target's registry, as recorded.
    assert not [row for row in registry.log if row.startswith(("PUT", "POST", "PATCH"))]


@pytest.mark.parametrize("name", ["convert-tls-insecure", "convert-tls-not-insecure"])
def test_registry_with_a_certificate_of_its_own(name, tmp_path):
    case = Case(name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(make_certificate(tmp_path))
    with _registry(tls=context) as registry:
        done = _run(case, registry, tmp_path)
        assert str(done.status) == case.status, done.stderr
        if done.status == 0:
            _same = images._known(_manifest(registry, "tiny", "n-tls"), registry)
            wanted = case.document("manifest.json")
            assert _same["layers"] == images._known(wanted, registry)["layers"]
            return
        # The same up to what the TLS library says.
        assert "failed to resolve reference" in done.last
        assert "certificate" in done.last
        assert not [row for row in registry.log if row.startswith(("PUT", "POST", "PATCH"))]


def test_without_words():
    done = nydusify(*Case("edge-no-args").words)
    real = (CASES / "edge-no-args" / "stdout.txt").read_text()
    assert done.status == 0
    ours = set(re.findall(r"^   ([a-z]+)(?:, [a-z]+)?  +\S", done.stdout, re.MULTILINE))
    theirs = set(re.findall(r"^   ([a-z]+)(?:, [a-z]+)?  +\S", real, re.MULTILINE))
    assert theirs - ours == {"help"}


def test_unknown_command():
    case = Case("fail-unknown-command")
    done = nydusify(*case.words)
    assert str(done.status) == case.status
    assert done.stderr == (case.folder / "stderr.txt").read_text()


def test_fifo_with_nul_device_fields(registry, tmp_path):
    """The real tool refuses what Python's tarfile writes."""
    case = Case("fail-fifo-with-nul-device-fields")
    info, _ = member("fifo", kind=tarfile.FIFOTYPE)
    Image([layer((info, b""))]).add(registry.repository("tiny"), "gz")
    words = [word.replace("registry.test:5000", registry.host) for word in case.words]
    done = nydusify(*words, "--work-dir", tmp_path / "work")
    assert (case.status, done.status) == ("1", 0), done.stderr


def test_optimizing_at_a_registry_without_tls(registry, tmp_path):
    """The real tool asks by https only."""
    case = Case("optimize-plain-http")
    done = nydusify(
        "convert", "--source", f"{registry.host}/tiny:gz", "--target",
        f"{registry.host}/tiny:n-default", "--no-proof", "--work-dir", tmp_path / "work",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    (tmp_path / "pf.json").write_text('{"version":"v1","files":[{"path":"/bin/hello"}]}')
    done = _run(case, registry, tmp_path)
    assert (case.status, done.status) == ("1", 0), done.stderr
    assert "n-opt2" in registry.repository("tiny").tags
