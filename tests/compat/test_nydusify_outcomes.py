"""What the other recorded runs of the real nydusify ended with, and ours."""

from __future__ import annotations

import json

import pytest

from tests.compat.test_nydusify_fixtures import _known, _words
from tests.fakes.oci_registry import OciRegistry
from tests.fixtures_path import needs_fixtures
from tests.nydusify_images import HOST, Case, fill, nydusify

pytestmark = needs_fixtures

# The real tool's last line is ours, with the host put back.
SAME_MESSAGE = (
    "convert-backend-bad-type", "convert-chunk-dict-bad", "convert-source-archive",
    "fail-backend-no-config", "fail-batch-v5", "fail-bad-fs-version", "fail-cache-both",
    "fail-cache-records", "fail-missing-image", "fail-missing-repo", "fail-no-source",
    "fail-no-target", "fail-prefetch-both", "fail-target-and-suffix", "fail-unknown-flag",
)  # fmt: skip
# Exit 1 there and here; the real message is of a builder that is another program.
SAME_STATUS = (
    "convert-oci-ref-zstd", "fail-bad-batch-size", "fail-bad-chunk-size", "fail-bad-compressor",
    "fail-chunk-size-small", "fail-registry-down", "fail-target-registry-down",
    "convert-backend-oss-unreachable",
)  # fmt: skip
# Exit 0 there, an error here (docs/nydusify.md).
BETTER_REFUSED = (
    "convert-v5", "convert-v5-align", "edge-already-merged", "edge-already-nydus",
    "edge-digest-target", "edge-platform-not-there",
)  # fmt: skip
# Exit 1 there, done here.
BETTER_DONE = ("convert-build-cache-2", "convert-build-cache-3", "fail-no-builder")
STILL_DONE = (
    "convert-backend-localfs",
    "edge-bad-platform", "edge-bad-platform-syntax", "edge-oci-ref-v5", "edge-platform-and-all",
)  # fmt: skip


@pytest.fixture
def registry():
    with OciRegistry() as server:
        fill(server)
        yield server


def _do(case, registry, tmp_path):
    words = [
        str(word)
        .replace("../../be/localfs", str(tmp_path / "blobs"))
        .replace("localhost:5999", _closed())
        for word in _words(case, registry, tmp_path)
    ]
    if case.words[0] == "convert" and "--push-retry-delay" not in case.words:
        words += ["--push-retry-delay", "1ms"]
    return nydusify(*words, stdin=case.stdin)


def _closed():
    """Return an address where nobody listens."""
    with OciRegistry() as server:
        return server.host


def _prepare(case, registry, tmp_path):
    """Make the images that the run had from those before it."""
    text = " ".join(case.words)
    for tag, more in (("n-default", ()), ("n-merge", ("--merge-platform",))):
        if f"tiny:{tag}" in text:
            done = nydusify(
                "convert", "--source", f"{registry.host}/tiny:gz", "--target",
                f"{registry.host}/tiny:{tag}", "--plain-http", "--no-proof", "--work-dir",
                tmp_path / "work", *more,
            )  # fmt: skip
            assert done.status == 0, done.stderr


@pytest.mark.parametrize("name", SAME_MESSAGE)
def test_message(name, registry, tmp_path):
    case = Case(name)
    done = _do(case, registry, tmp_path)
    assert str(done.status) == case.status
    real = (case.folder / "stderr.txt").read_text().splitlines()[-1]
    wanted = json.loads(real.split("msg=", 1)[1])
    ours = done.last.replace(registry.host, HOST)
    # The verb that the converter puts before what its library says.
    assert ours == wanted.removeprefix("pull image: ")


@pytest.mark.parametrize("name", SAME_STATUS)
def test_failure(name, registry, tmp_path):
    case = Case(name)
    done = _do(case, registry, tmp_path)
    assert case.status == "1"
    assert done.status == 1
    assert "level=fatal" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", BETTER_REFUSED)
def test_refused_here(name, registry, tmp_path):
    case = Case(name)
    _prepare(case, registry, tmp_path)
    known = {key: dict(one.tags) for key, one in registry.repositories.items()}
    done = _do(case, registry, tmp_path)
    assert (case.status, done.status) == ("0", 1)
    assert {key: dict(one.tags) for key, one in registry.repositories.items() if one.tags} == {
        key: tags for key, tags in known.items() if tags
    }


@pytest.mark.parametrize("name", [*BETTER_DONE, *STILL_DONE])
def test_done_here(name, registry, tmp_path):
    case = Case(name)
    _prepare(case, registry, tmp_path)
    done = _do(case, registry, tmp_path)
    assert done.status == 0, done.stderr
    if name == "convert-backend-localfs":
        repo = registry.repository("be")
        manifest = json.loads(repo.manifests[repo.tags["n"]][1])
        assert _known(manifest, registry) == _known(case.document("manifest.json"), registry)
        config = repo.blobs[manifest["config"]["digest"]]
        assert config == (case.folder / "config.json").read_bytes()


def test_words_without_command():
    assert nydusify().status == 0
    done = nydusify("frobnicate")
    assert (done.status, done.stderr) == (3, "No help topic for 'frobnicate'\n")


def _manifest(registry, repo, tag):
    found = registry.repository(repo)
    return json.loads(found.manifests[found.tags[tag]][1])


def _default(registry, tmp_path, tag="n-default", *more):
    done = nydusify(
        "convert", "--source", f"{registry.host}/tiny:gz", "--target",
        f"{registry.host}/tiny:{tag}", "--plain-http", "--no-proof", "--work-dir",
        tmp_path / "work", *more,
    )  # fmt: skip
    assert done.status == 0, done.stderr


def test_optimized_image(registry, tmp_path):
    """The blob differs (docs/compatibility.md); everything that is said about it does not."""
    _default(registry, tmp_path)
    files = tmp_path / "pf.json"
    files.write_text('{"version":"v1","files":[{"path":"/bin/hello"},{"path":"/data/rand.bin"}]}')
    done = nydusify(
        "optimize", "--source", f"{registry.host}/tiny:n-default", "--target",
        f"{registry.host}/tiny:n-opt", "--prefetch-files", files, "--plain-http", "--work-dir",
        tmp_path / "work",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    ours, real = _manifest(registry, "tiny", "n-opt"), Case("optimize-default")
    wanted = real.document("manifest.json")
    assert [one["mediaType"] for one in ours["layers"]] == [
        one["mediaType"] for one in wanted["layers"]
    ]
    assert ours["layers"][:2] == wanted["layers"][:2]
    mark = "containerd.io/snapshot/nydus-separated-blob-with-prefetch-files"
    assert ours["layers"][-1]["annotations"].pop(mark) == ours["layers"][2]["digest"][7:]
    wanted["layers"][-1]["annotations"].pop(mark)
    assert ours["layers"][-1]["annotations"] == wanted["layers"][-1]["annotations"]
    config = json.loads(registry.repository("tiny").blobs[ours["config"]["digest"]])
    expected = real.document("config.json")
    assert config["history"] == expected["history"]
    assert len(config["rootfs"]["diff_ids"]) == len(expected["rootfs"]["diff_ids"])
    done = nydusify(
        "check", "--source", f"{registry.host}/tiny:gz", "--target", f"{registry.host}/tiny:n-opt",
        "--plain-http", "--work-dir", tmp_path / "check",
    )  # fmt: skip
    assert done.status == 0, done.stderr


def test_dictionary_image(registry, tmp_path):
    for tag, more in (("n-default", ()), ("n-none", ("--compressor", "none"))):
        _default(registry, tmp_path, tag, *more)
    done = nydusify(
        "chunkdict", "generate", "--sources",
        f"{registry.host}/tiny:n-default,{registry.host}/tiny:n-none", "--target",
        f"{registry.host}/dict:gen", "--plain-http", "--work-dir", tmp_path / "work",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    manifest = _manifest(registry, "dict", "gen")
    wanted = Case("chunkdict-generate").document("manifest.json")
    assert _known(manifest, registry)["layers"] == _known(wanted, registry)["layers"]
    assert list(manifest["annotations"]) == list(wanted["annotations"])


@pytest.mark.parametrize("tag", ["n-default", "n-merge", "n-zran"])
def test_reverse_conversion_ends(tag, registry, tmp_path):
    more = {"n-merge": ("--merge-platform",), "n-zran": ("--oci-ref",)}.get(tag, ())
    _default(registry, tmp_path, tag, *more)
    done = nydusify(
        "convert", "--reverse", "--source", f"{registry.host}/tiny:{tag}", "--target",
        f"{registry.host}/tiny:rev", "--plain-http", "--work-dir", tmp_path / "work",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    manifest = _manifest(registry, "tiny", "rev")
    wanted = Case("convert-reverse").document("manifest.json")
    assert [one["mediaType"] for one in manifest["layers"]] == [
        one["mediaType"] for one in wanted["layers"]
    ]
    config = json.loads(registry.repository("tiny").blobs[manifest["config"]["digest"]])
    assert config["history"] == Case("convert-reverse").document("config.json")["history"]
    assert config["rootfs"]["diff_ids"] == [
        one["annotations"]["containerd.io/uncompressed"] for one in manifest["layers"]
    ]
    if tag == "n-zran":
        source = _manifest(registry, "tiny", "gz")["layers"]
        assert [one["digest"] for one in manifest["layers"]] == [one["digest"] for one in source]
    # The result is an image like any other: it is converted to the same data again.
    done = nydusify(
        "check", "--source", f"{registry.host}/tiny:rev", "--target",
        f"{registry.host}/tiny:{tag}", "--plain-http", "--work-dir", tmp_path / "check",
    )  # fmt: skip
    assert done.status == 0, done.stderr
