"""The commands of `nydusify` against a registry in this process."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import tarfile

import pytest

from builder.merge import MergeOptions
from builder.oci import media
from builder.overlay import apply_layer
from builder.source.options import WhiteoutSpec
from tests.fakes.oci_image import CONFIG, LOWER, UPPER, Image, add_index, layer, member
from tests.fakes.oci_registry import Fault, OciRegistry
from tests.fakes.registry import PASSWORD, USER
from tests.nydusify_images import nydusify

merging = sys.modules[MergeOptions.__module__]
IN_TOTO = "application/vnd.in-toto+json"


@pytest.fixture
def registry():
    with OciRegistry() as server:
        Image().add(server.repository("app"), "v1")
        yield server


@pytest.fixture
def run(registry, tmp_path):
    """Run a command; references are `:repo:tag`, and places below the test's folder `@name`."""

    def command(*words, **more):
        words = [
            f"{registry.host}/{word[1:]}" if word.startswith(":")
            else str(tmp_path / word[1:]) if word.startswith("@") else word
            for word in words
        ]  # fmt: skip
        if words[0] in ("convert", "check"):
            words += ["--work-dir", str(tmp_path / "work"), "--plain-http"]
        elif words[0] == "copy":
            words += ["--plain-http"]
        return nydusify(*words, **more)

    return command


def _manifest(registry, repo, tag):
    found = registry.repository(repo)
    return json.loads(found.manifests[found.tags[tag]][1])


def _convert(run, *words, target=":out:n"):
    return run(
        "convert", "--source", ":app:v1", "--target", target, "--push-retry-delay", "10ms", *words
    )


def test_converted_image_is_published_with_its_proof(registry, run, tmp_path):
    done = _convert(run)
    assert done.status == 0, done.stderr
    manifest = _manifest(registry, "out", "n")
    assert [one["mediaType"] for one in manifest["layers"]][:2] == [media.NYDUS_BLOB] * 2
    repo = registry.repository("out")
    tag = repo.tags["n"].replace(":", "-")
    (entry,) = json.loads(repo.manifests[repo.tags[tag]][1])["manifests"]
    referrer = json.loads(repo.manifests[entry["digest"]][1])
    assert referrer["subject"]["digest"] == repo.tags["n"]
    statement = json.loads(repo.blobs[referrer["layers"][0]["digest"]])
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert f"sha256:{statement['subject'][0]['digest']['sha256']}" == repo.tags["n"]
    source = registry.repository("app").tags["v1"]
    assert f"sha256:{statement['predicate']['source']['digest']['sha256']}" == source
    assert statement["predicate"]["tree"]["entries"] == 10
    assert entry["artifactType"] == IN_TOTO
    assert not list((tmp_path / "work").iterdir())


def test_proof_is_the_same_every_time(registry, run, tmp_path):
    for name in ("one", "two"):
        assert _convert(run, "--proof", f"@{name}").status == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert len(registry.repository("out").manifests) == 1


def test_no_proof_reads_the_source_once(registry, run):
    assert _convert(run, "--no-proof").status == 0
    layers = [line for line in registry.log if line.startswith("GET /v2/app/blobs")]
    assert len(layers) == len(set(layers))
    assert len(registry.repository("out").manifests) == 1


def test_difference_is_named_and_nothing_published(registry, run, monkeypatch):
    def forgets_whiteouts(lower, upper, spec=None, undescribed=()):
        return apply_layer(lower, upper, WhiteoutSpec.NONE, undescribed)

    monkeypatch.setattr(merging, "apply_layer", forgets_whiteouts)
    done = _convert(run)
    assert done.status == 1
    assert "file not match in target image" in done.last
    assert "path: /dir/.wh..wh..opq" in done.last
    assert registry.repository("out").tags == {}
    assert _convert(run, "--no-proof").status == 0


def test_directories_that_are_not_described_keep_their_attributes(registry, run, monkeypatch):
    """The real tool gives /etc of the lower layer mode 0755 and owner 0."""
    assert _convert(run).status == 0

    def overrides(lower, upper, spec=None, undescribed=()):
        return apply_layer(lower, upper, spec)

    monkeypatch.setattr(merging, "apply_layer", overrides)
    done = _convert(run, target=":out:other")
    assert done.status == 1
    assert "path: /etc, " in done.last


def test_times_with_fractions_are_equal_as_headers_have_them(registry, run):
    """Python rounds the seconds of the header, which are those that images keep."""
    tar = layer(*(member(f"f{part}", b"x", mtime=1_700_000_000 + part / 10) for part in range(10)))
    Image([tar]).add(registry.repository("app"), "times")
    done = run("convert", "--source", ":app:times", "--target", ":out:n")
    assert done.status == 0, done.stderr


def test_damaged_result_is_not_published(registry, run):
    registry.faults.append(Fault("GET", "/v2/out/blobs", "damage", count=1, skip=2))
    done = _convert(run)
    assert done.status == 1
    assert registry.repository("out").tags == {}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("PUT", "uploads", 400, count=99), Fault("POST", "uploads", 403, count=99),
        Fault("GET", "/v2/app/blobs", "damage", count=99),
        Fault("GET", "/v2/app/blobs", 500, count=99), Fault("HEAD", "/v2/out/blobs", 401, count=99),
    ],
)  # fmt: skip
def test_failure_leaves_no_tag(registry, run, tmp_path, fault):
    registry.faults.append(fault)
    done = _convert(run)
    assert done.status == 1
    assert registry.repository("out").tags == {}
    assert not list((tmp_path / "work").iterdir())


def test_faults_of_a_moment_are_overcome(registry, run):
    registry.faults += [
        Fault("GET", "/v2/app/blobs", "truncate", count=2), Fault("PUT", "uploads", "reset"),
        Fault("HEAD", "manifests", 503), Fault("POST", "uploads", 429),
        Fault("PUT", "manifests", "lose"),
    ]  # fmt: skip
    done = _convert(run)
    assert done.status == 0, done.stderr


def test_platform_that_is_not_there_is_an_error(registry, run):
    add_index(registry.repository("app"), "many", Image(), Image(architecture="arm64"))
    done = run(
        "convert", "--source", ":app:many", "--target", ":out:n", "--platform", "linux/s390x"
    )
    assert done.status == 1
    assert "no image for platform linux/s390x" in done.last
    assert registry.repository("out").manifests == {}


def test_nydus_image_is_not_converted_again(registry, run):
    assert _convert(run).status == 0
    assert _convert(run, "--merge-platform", target=":out:m").status == 0
    for tag in ("n", "m"):
        done = run("convert", "--source", f":out:{tag}", "--target", ":again:n")
        assert done.status == 1
        assert "Nydus image already" in done.last
    assert registry.repository("again").manifests == {}


def test_zran_of_another_repository_can_be_read(registry, run):
    done = _convert(run, "--oci-ref")
    assert done.status == 0, done.stderr
    out, app = registry.repository("out"), registry.repository("app")
    refs = [
        one["annotations"][media.LAYER_REF]
        for one in _manifest(registry, "out", "n")["layers"]
        if media.LAYER_REF in one["annotations"]
    ]
    assert len(refs) == 2
    assert all(out.blobs[one] == app.blobs[one] for one in refs)
    assert run("check", "--source", ":app:v1", "--target", ":out:n").status == 0


def test_layers_in_the_cache_are_not_read_again(registry, run):
    words = ("--build-cache", ":cache:c", "--no-proof")
    assert _convert(run, *words).status == 0
    first = _manifest(registry, "out", "n")
    registry.log.clear()
    assert _convert(run, *words, target=":other:n").status == 0
    reads = [line for line in registry.log if line.startswith("GET /v2/app/blobs")]
    assert len(reads) == 1, "only the configuration"
    assert _manifest(registry, "other", "n")["layers"] == first["layers"]
    # Options and versions make other layers.
    for more in (("--compressor", "none"), ("--build-cache-version", "v2")):
        registry.log.clear()
        assert _convert(run, *words, *more, target=":third:n").status == 0
        reads = [line for line in registry.log if line.startswith("GET /v2/app/blobs")]
        assert len(reads) == 3
    records = _manifest(registry, "cache", "c")
    assert records["annotations"][media.CACHE_VERSION] == "v2"


def test_records_of_the_cache_are_limited(registry, run):
    words = ("--build-cache", ":cache:c", "--build-cache-max-records", "1", "--no-proof")
    assert _convert(run, *words).status == 0
    assert len(_manifest(registry, "cache", "c")["layers"]) == 1


def test_conversion_that_was_killed_goes_on_with_its_layers(registry, run):
    words = ("--build-cache-dir", "@records", "--push-retry-count", "1")
    registry.faults.append(Fault("PUT", "manifests", "reset", count=1))
    assert _convert(run, *words, "--no-proof").status == 1
    assert registry.repository("out").tags == {}
    registry.log.clear()
    assert _convert(run, *words, "--no-proof").status == 0
    assert len([one for one in registry.log if one.startswith("GET /v2/app/blobs")]) == 1
    registry.repository("out").blobs.clear()
    assert _convert(run, *words).status == 0, "blobs that are gone are made again"


def test_a_broken_record_is_told(run, tmp_path):
    words = ("--build-cache-dir", "@records", "--no-proof")
    assert _convert(run, *words).status == 0
    path = tmp_path / "records" / "layers.json"
    records = json.loads(path.read_text())
    for record in records.values():
        record["annotations"][media.CACHE_UNDESCRIBED] = "é"
    path.write_text(json.dumps(records))
    done = _convert(run, *words)
    assert done.status == 1
    assert "record of the cache is broken" in done.stderr


def test_secrets_are_nowhere(registry, run, tmp_path, monkeypatch):
    registry.auth = "bearer"
    auth = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    docker = tmp_path / "docker"
    docker.mkdir()
    (docker / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(docker))
    monkeypatch.setenv("DEBUG_LOG_LEVEL", "true")
    words = ("--build-cache", ":cache:c", "--build-cache-dir", "@records", "--log-file", "@log")
    outcomes = [_convert(run, *words[:4]), run("copy", "--source", ":out:n", "--target", ":cp:n")]
    registry.faults.append(Fault("PUT", "uploads", 403, count=99))
    outcomes.append(_convert(run, "--compressor", "none", target=":bad:n"))
    assert [one.status for one in outcomes] == [0, 0, 1], [one.stderr for one in outcomes]
    registry.password = "changed"
    registry.revoke_tokens()
    outcomes.append(_convert(run))
    assert outcomes[-1].status == 1
    texts = [one.stdout + one.stderr for one in outcomes]
    for repo in registry.repositories.values():
        texts += [data.decode() for _, data in repo.manifests.values()]
        texts += [data.decode("latin-1") for data in repo.blobs.values()]
    for path in tmp_path.rglob("*"):
        if path.is_file() and docker not in path.parents:
            texts.append(path.read_bytes().decode("latin-1"))
    for secret in (PASSWORD, auth, "t0k3n-"):
        assert not any(secret in text for text in texts)


@pytest.mark.parametrize("place", ["oci", "file"])
def test_folders_and_archives(registry, run, tmp_path, place):
    target = f"oci:{tmp_path}/out:n" if place == "oci" else f"file://{tmp_path}/out.tar"
    done = _convert(run, target=target)
    assert done.status == 0, done.stderr
    assert run("check", "--source", ":app:v1", "--target", target).status == 0
    assert run("copy", "--source", target, "--target", ":back:n").status == 0
    assert _convert(run).status == 0
    back, out = registry.repository("back"), registry.repository("out")
    assert back.tags["n"] == out.tags["n"]
    if place == "file":
        with tarfile.open(tmp_path / "out.tar") as tar:
            names = tar.getnames()
            assert all(one.mtime == 0 for one in tar)
        assert {"oci-layout", "index.json", "manifest.json"} < set(names)
        assert os.listdir(tmp_path) != []
        assert not [path for path in tmp_path.iterdir() if path.name.startswith(".out")]


def test_docker_archive_is_read(registry, run, tmp_path):
    config = registry.repository("app").blobs[_manifest(registry, "app", "v1")["config"]["digest"]]
    path = tmp_path / "docker.tar"
    with tarfile.open(path, "w") as tar:
        listing = [{"Config": "c.json", "RepoTags": ["app:v1"], "Layers": ["a/layer.tar", "b.tar"]}]
        for name, data in (
            ("c.json", config), ("a/layer.tar", LOWER), ("b.tar", UPPER),
            ("manifest.json", json.dumps(listing).encode()),
        ):  # fmt: skip
            info, content = member(name, data)
            tar.addfile(info, io.BytesIO(content))
    done = _convert(run, "--source-archive", "@docker.tar", "--oci")
    assert done.status == 0, done.stderr
    archived = _manifest(registry, "out", "n")
    assert _convert(run, target=":out:plain").status == 0
    assert archived["layers"] == _manifest(registry, "out", "plain")["layers"]
    assert archived["config"]["mediaType"] == CONFIG


@pytest.mark.parametrize("data", [b"", b"no tar" * 200, None])
def test_archive_that_is_none(run, tmp_path, data):
    path = tmp_path / "x.tar"
    path.write_bytes(layer(member("x", b"y")) if data is None else data)
    done = run("convert", "--source", "a", "--source-archive", "@x.tar", "--target", ":out:n")
    assert done.status == 1
    assert str(path) in done.last


def test_copy_keeps_every_byte(registry, run):
    add_index(registry.repository("app"), "many", Image(), Image(architecture="arm64"))
    done = run("copy", "--source", ":app:many", "--target", ":cp:n", "--all-platforms")
    assert done.status == 0, done.stderr
    assert registry.repository("cp").tags["n"] == registry.repository("app").tags["many"]
    done = run("copy", "--source", ":app:many", "--target", ":cp:one", "--platform", "linux/arm64")
    assert _manifest(registry, "cp", "one")["schemaVersion"] == 2
    assert run(
        "copy", "--source", ":app:many", "--target", ":cp:no", "--platform", "linux/s390x"
    ).status == 1  # fmt: skip
    # Blobs of the registry's other repository were not sent.
    assert not [line for line in registry.log if line.startswith("PUT /v2/cp/blobs")]


def test_mirrors_of_containerds_folder(registry, run, tmp_path, monkeypatch):
    """Sources are read from a mirror; a tag is resolved there only if it may be."""
    with OciRegistry() as mirror:
        Image().add(mirror.repository("app"))
        folder = tmp_path / "certs.d" / "_default"
        folder.mkdir(parents=True)
        for capabilities, resolved in (('["pull", "resolve"]', True), ('["pull"]', False)):
            (folder / "hosts.toml").write_text(
                f'[host."{mirror.address}"]\ncapabilities = {capabilities}'
            )
            mirror.paths.clear()
            done = run("copy", "--source", ":app:v1", "--target", "oci:" + str(tmp_path / "o"),
                       "--hosts-dir", "@certs.d")  # fmt: skip
            assert done.status == 0, done.stderr
            assert any(path.endswith("manifests/v1") for path in mirror.paths) == resolved
            assert any("/blobs/sha256:" in path for path in mirror.paths) or not resolved
        monkeypatch.setenv("NYDUS_HOSTS_DIR", str(folder.parent))
        mirror.paths.clear()
        assert _convert(run, "--no-proof").status == 0
        assert any("/blobs/sha256:" in path for path in mirror.paths)
        # Nothing is pushed to a mirror.
        assert not [row for row in mirror.log if not row.startswith(("GET", "HEAD"))]


def test_identity_token_of_docker(run, tmp_path, monkeypatch):
    with OciRegistry(auth="bearer") as private:
        Image().add(private.repository("app"), "v1")
        auths = {private.host: {"auth": "", "identitytoken": private.identity_token}}
        (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        source = f"{private.host}/app:v1"
        done = run("convert", "--source", source, "--target", f"{private.host}/out:n")
        assert done.status == 0, done.stderr
        assert "n" in private.repository("out").tags
        assert private.identity_token not in done.stderr + done.stdout
        assert {request[0] for request in private.token_requests} == {"POST"}


def test_check_finds_what_differs(registry, run):
    assert _convert(run).status == 0
    assert run("check", "--source", ":app:v1", "--target", ":out:n").status == 0
    changed = layer(member("etc/conf", b"two\n"), member("etc/.wh.gone"))
    Image([LOWER, changed]).add(registry.repository("app"), "content")
    Image(run={"Cmd": ["/bin/false"]}).add(registry.repository("app"), "config")
    done = run("check", "--source", ":app:content", "--target", ":out:n")
    assert done.status == 1
    assert done.last.startswith(
        "validate filesystem failed: file not match in target image:\n\t[source] path: /dir/a, "
    )
    assert "\n\t[target] nothing" in done.last
    done = run("check", "--source", ":app:config", "--target", ":out:n")
    assert done.last == (
        "validate manifest failed: validate image config: source image config should be equal"
        " with target image config"
    )
    done = run("check", "--target", ":app:v1")
    assert done.status == 0
    assert "plain OCI image" in done.stderr


def test_check_finds_a_missing_blob(registry, run):
    assert _convert(run).status == 0
    blob = _manifest(registry, "out", "n")["layers"][0]["digest"]
    del registry.repository("out").blobs[blob]
    done = run("check", "--source", ":app:v1", "--target", ":out:n")
    assert done.status == 1
    assert "no such blob" in done.last


def test_data_in_a_folder(registry, run, tmp_path):
    config = json.dumps({"dir": str(tmp_path / "blobs")})
    done = _convert(run, "--backend-type", "localfs", "--backend-config", config)
    assert done.status == 0, done.stderr
    assert len(_manifest(registry, "out", "n")["layers"]) == 1
    assert len(list((tmp_path / "blobs").iterdir())) == 2
    done = run(
        "check", "--source", ":app:v1", "--target", ":out:n", "--target-backend-type", "localfs",
        "--target-backend-config", config,
    )  # fmt: skip
    assert done.status == 0, done.stderr


def test_list_is_converted_and_resumed(registry, run, tmp_path):
    app = registry.repository("app")
    for number in range(4):
        Image(run={"Cmd": [str(number)]}).add(app, f"t{number}")
    rows = [f"{registry.host}/app:t{number} {registry.host}/out:t{number}" for number in range(4)]
    rows += ["# a comment", "", f"{registry.host}/app:none {registry.host}/out:none", rows[0]]
    (tmp_path / "list").write_text("\n".join(rows))
    words = ("convert", "--source-file", "@list", "--report", "@report", "--no-proof")
    registry.faults.append(Fault("PUT", "manifests/t2", 400, count=1))
    done = run(*words, "--push-retry-delay", "1ms")
    assert done.status == 1
    assert "2 of 5 images failed" in done.last
    found = [json.loads(row) for row in (tmp_path / "report").read_text().splitlines()]
    assert sorted(one["status"] for one in found) == ["done"] * 3 + ["failed"] * 2
    # As a crash would leave it.
    with (tmp_path / "report").open("a") as file:
        file.write('{"source": "half')
    registry.log.clear()
    app.tags["none"] = app.tags["t0"]
    done = run(*words)
    assert done.status == 0, done.stderr
    assert registry.repository("out").tags.keys() == {"t0", "t1", "t2", "t3", "none"}
    published = [one for one in registry.log if one.startswith("PUT /v2/out/manifests")]
    assert len(published) == 2


@pytest.mark.parametrize("text", ["a b c", "a"])
def test_list_that_is_none(run, tmp_path, text):
    (tmp_path / "list").write_text(text)
    done = run("convert", "--source-file", "@list")
    assert done.status == 1
    assert "line 1 is not SOURCE TARGET" in done.last


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--source-file", "@file"), "list of images is not UTF-8"),
        (
            ("--source", ":app:v1", "--target", ":out:n", "--backend-type", "oss",
             "--backend-config-file", "@file"),
            "backend configuration is not a JSON object",
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_text(run, tmp_path, words, text):
    (tmp_path / "file").write_bytes(b"\xff\xfe")
    done = run("convert", *words)
    assert done.status == 1
    assert text in done.last


def test_list_over_a_cluster(registry, run, tmp_path):
    """Dask's local cluster; the extra is not among what tests need."""
    pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    (tmp_path / "list").write_text(f"{registry.host}/app:v1 {registry.host}/out:n")
    done = run("convert", "--source-file", "@list", "--cluster", "local", "--no-proof")
    assert done.status == 0, done.stderr
    assert "n" in registry.repository("out").tags


def test_build(run, tmp_path):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"content")
    for command in ("build", "pack"):
        done = run(command, "--source-dir", "@tree", "--output-dir", "@out", "--name", command)
        assert done.status == 0, done.stderr
        assert (tmp_path / "out" / f"{command}.meta").stat().st_size
        assert (tmp_path / "out" / f"{command}.blob").stat().st_size
        report = json.loads((tmp_path / "out" / "output.json").read_text())
        assert report["fs_version"] == "6"
