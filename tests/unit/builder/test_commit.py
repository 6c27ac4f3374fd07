"""`nydusify commit` against a registry and a containerd in this process."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from builder.convert.upperdir import mounted_layer, open_beneath, upper_layer
from builder.errors import BuildError
from builder.nydusify.protowire import pack_texts, parse_message
from builder.oci import media
from erofs.errors import FormatError
from tests.fakes.containerd import PAUSED, FakeContainer, FakeContainerd
from tests.fakes.oci_image import Image, add_index
from tests.fakes.oci_registry import Fault, OciRegistry
from tests.fixtures_path import needs_fixtures
from tests.leftovers import no_open_file_left
from tests.nydusify_images import Case, nydusify

REPOSITORY = Path(__file__).resolve().parents[3]
PAUSE, RESUME = "tasks.v1.Tasks/Pause", "tasks.v1.Tasks/Resume"
WAIT_SECONDS = 60


@pytest.fixture
def registry(tmp_path):
    """A registry with a Nydus image `app:n`."""
    with OciRegistry() as server:
        Image().add(server.repository("app"), "v1")
        done = nydusify(
            "convert", "--source", f"{server.host}/app:v1", "--target", f"{server.host}/app:n",
            "--plain-http", "--no-proof", "--work-dir", tmp_path / "w",
        )  # fmt: skip
        assert done.status == 0, done.stderr
        yield server


@pytest.fixture
def upper(tmp_path):
    """An upper directory with a new file and a directory that hides what is below."""
    top = tmp_path / "upper"
    (top / "etc").mkdir(parents=True)
    (top / "etc/new").write_text("new\n")
    (top / "dir").mkdir()
    (top / "dir/own").write_text("own\n")
    os.setxattr(top / "dir", "user.overlay.opaque", b"y")
    return top


@pytest.fixture
def container(registry, upper):
    return FakeContainer("web.1", f"{registry.host}/app:n", str(upper))


@pytest.fixture
def containerd(tmp_path_factory, container, upper):
    others = [FakeContainer(name, "x", str(upper)) for name in ("web", "webx1", "twin1", "twin2")]
    path = tmp_path_factory.mktemp("s") / "s"
    server = FakeContainerd(path, [container, *others])
    server.path = path
    yield server
    server.close()


@pytest.fixture
def commit(registry, tmp_path):
    def run(*words, target="out:c"):
        return nydusify(
            "commit", "--target", f"{registry.host}/{target}", "--plain-http", "--work-dir",
            tmp_path / "work", *words,
        )  # fmt: skip

    return run


@pytest.fixture
def commit_container(commit, containerd):
    def run(name, *words, **more):
        words = ("--container", name, "--containerd-address", containerd.path, "-n", "k8s", *words)
        return commit(*words, **more)

    return run


def _manifest(registry, repo="out", tag="c"):
    found = registry.repository(repo)
    return json.loads(found.manifests[found.tags[tag]][1])


def _tree(registry, tmp_path, reference="out:c"):
    """Return the contents of an image, as `convert --reverse` writes them."""
    done = nydusify(
        "convert", "--reverse", "--source", f"{registry.host}/{reference}", "--plain-http",
        "--target", f"oci:{tmp_path}/back:n", "--work-dir", tmp_path / "w",
    )  # fmt: skip
    assert done.status == 0, done.stderr
    blobs = tmp_path / "back/blobs/sha256"
    found = {}
    for path in blobs.iterdir():
        if path.read_bytes()[:2] == b"\x1f\x8b":
            with tarfile.open(path) as tar:
                for one in tar:
                    content = tar.extractfile(one) if one.isreg() else None
                    found[one.name.strip("./")] = b"" if content is None else content.read()
    return found


def test_upper_directory_becomes_a_layer(registry, commit, upper, tmp_path):
    done = commit("--upper", upper, "--source", f"{registry.host}/app:n")
    assert done.status == 0, done.stderr
    old, new = _manifest(registry, "app", "n"), _manifest(registry)
    assert new["layers"][:2] == old["layers"][:2]
    added, boot = new["layers"][2:]
    assert added["mediaType"] == media.NYDUS_BLOB
    assert added["annotations"] == {media.BLOB: "true", media.UNCOMPRESSED: added["digest"]}
    assert boot["annotations"] == {
        **old["layers"][-1]["annotations"], media.COMMIT_BLOBS: added["digest"],
    }  # fmt: skip
    # It is not what the image was converted from any more.
    assert media.SOURCE_DIGEST not in new["annotations"]
    config = json.loads(registry.repository("out").blobs[new["config"]["digest"]])
    assert config["rootfs"]["diff_ids"][:3] == [one["digest"] for one in new["layers"][:3]]
    assert [one.get("comment") for one in config["history"]][-2:] == [
        "Nydus Commit upper", "Nydus Bootstrap Layer",
    ]  # fmt: skip
    tree = _tree(registry, tmp_path)
    assert (tree["etc/new"], tree["dir/own"], tree["etc/conf"]) == (b"new\n", b"own\n", b"two\n")
    assert [name for name in tree if name.startswith("dir/")] == ["dir/own"]
    check = ("check", "--target", f"{registry.host}/out:c", "--work-dir", tmp_path / "o")
    assert nydusify(*check, "--plain-http").status == 0


def test_commits_are_counted_and_limited(registry, commit, upper):
    source = f"{registry.host}/app:n"
    for number in range(2):
        done = commit("--upper", upper, "--source", source, "--maximum-times", "2")
        assert done.status == 0, done.stderr
        source = f"{registry.host}/out:c"
        (upper / f"more{number}").write_text(str(number))
    assert "detected committed layers: 1" in done.stderr
    layers = _manifest(registry)["layers"]
    digests = [one["digest"] for one in layers[2:4]]
    assert layers[-1]["annotations"][media.COMMIT_BLOBS] == ",".join(digests)
    done = commit("--upper", upper, "--source", source, "--maximum-times", "2", target="out:d")
    assert done.status == 1
    assert done.last == "reached maximum committed times 2"
    assert "d" not in registry.repository("out").tags


@pytest.mark.parametrize("words", [("--oci-ref",), ("--merge-platform",), ("--batch-size", "4096")])
def test_images_of_every_kind_can_be_built_on(registry, commit, upper, tmp_path, words):
    base = f"{registry.host}/kinds:n"
    add_index(registry.repository("app"), "many", Image())
    done = nydusify(
        "convert", "--source", f"{registry.host}/app:many", "--target", base, "--plain-http",
        "--no-proof", "--work-dir", tmp_path / "w", *words,
    )  # fmt: skip
    assert done.status == 0, done.stderr
    done = commit("--upper", upper, "--source", base)
    assert done.status == 0, done.stderr
    assert _manifest(registry)["config"]["mediaType"] == media.OCI_CONFIG
    check = ("check", "--target", f"{registry.host}/out:c", "--work-dir", tmp_path / "o")
    assert nydusify(*check, "--plain-http").status == 0
    if "--oci-ref" not in words:
        assert _tree(registry, tmp_path)["etc/new"] == b"new\n"


def test_container_is_paused_while_it_is_read(registry, commit_container, containerd, container):
    container.digest = registry.repository("app").tags["n"]
    diff_ids = json.loads(
        registry.repository("app").blobs[_manifest(registry, "app", "n")["config"]["digest"]]
    )["rootfs"]["diff_ids"]
    chain = diff_ids[0]
    for one in diff_ids[1:]:
        chain = f"sha256:{hashlib.sha256(f'{chain} {one}'.encode()).hexdigest()}"
    container.parent = chain
    # The name may have got another image since.
    Image().add(registry.repository("app"), "n")
    done = commit_container("web.1")
    assert done.status == 0, done.stderr
    assert containerd.calls == ["pause", "resume"]
    assert containerd.namespaces == {"k8s"}
    assert "resolved container ID to full ID: web.1" in done.stderr
    container.digest = ""
    done = commit_container("web.1", target="out:d")
    assert done.status == 1
    assert containerd.calls == ["pause", "resume"]


def test_container_of_an_older_image_is_refused(registry, commit_container, container, containerd):
    container.parent = f"sha256:{'0' * 64}"
    done = commit_container("web.1")
    assert done.status == 1
    assert "does not run from" in done.last
    assert containerd.calls == []
    assert registry.repository("out").tags == {}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("web", "inspect container"), ("nothing", "no container found with ID : nothing"),
        ("twin", "ambiguous container ID  'twin' matches multiple containers"),
        ("x/..", "no container found with ID : x/.."), ("0" * 64, "inspect container: not found"),
    ],
)  # fmt: skip
def test_ids_of_containers(commit_container, containerd, text, words):
    containerd.containers["web"].upper = ""
    done = commit_container(text)
    assert done.status == 1
    assert words in done.last


def test_failure_resumes(registry, commit_container, containerd, upper):
    (upper / ".wh.name").write_text("")
    done = commit_container("web.1")
    assert done.status == 1
    assert "name is kept for deletions" in done.last
    assert containerd.calls == ["pause", "resume"]
    assert registry.repository("out").tags == {}


def test_failures_of_containerd(commit_container, containerd):
    containerd.fails = {PAUSE}
    assert "no tasks.v1.Tasks/Pause today" in commit_container("web.1").last
    containerd.fails = {RESUME}
    done = commit_container("web.1")
    assert done.status == 1
    assert "container web.1 is still paused: ctr -n k8s task resume web.1" in done.stderr


def test_container_that_does_not_run_stays_so(registry, commit_container, containerd, container):
    container.pid = 0
    assert commit_container("web.1").status == 0
    container.pid, container.status = os.getpid(), PAUSED
    assert commit_container("web.1").status == 0
    assert containerd.calls == []
    container.pid = 0
    done = commit_container("web.1", "--with-path", "/data")
    assert "is not running" in done.last


def test_failed_push_leaves_no_tag(registry, commit_container, containerd):
    registry.faults.append(Fault("PUT", "/v2/out/manifests", 400, count=9))
    assert commit_container("web.1").status == 1
    assert registry.repository("out").tags == {}
    assert containerd.calls == ["pause", "resume"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_resumes(registry, containerd, upper, tmp_path, number):
    with (upper / "endless").open("wb") as file:
        file.truncate(1 << 42)
    process = subprocess.Popen(
        [sys.executable, "-m", "builder.nydusify", "commit", "--container", "web.1",
         "--containerd-address", containerd.path, "--target", f"{registry.host}/out:c",
         "--plain-http", "--work-dir", tmp_path / "work"],
        cwd=REPOSITORY, stderr=subprocess.PIPE,
    )  # fmt: skip
    end = time.monotonic() + WAIT_SECONDS
    while not containerd.calls:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 128 + number, errors
    assert containerd.calls == ["pause", "resume"]
    assert not list((tmp_path / "work").iterdir())


def test_mounts_are_committed_with_the_container(registry, commit_container, container, tmp_path):
    """The process whose view is taken is our own: any directory may be the mount."""
    data = tmp_path / "data"
    (data / "skip").mkdir(parents=True)
    (data / "file").write_text("mounted")
    (data / "skip/not").write_text("not")
    done = commit_container(
        "web.1", "--with-mount-path", f"{data}, !{data}/skip/", "--with-path", "!/etc"
    )
    assert done.status == 0, done.stderr
    layers = _manifest(registry)["layers"]
    mount, upper = (one["digest"] for one in layers[2:4])
    assert layers[-1]["annotations"][media.COMMIT_BLOBS] == f"{mount},{upper}"
    tree = _tree(registry, tmp_path)
    inside = str(data).strip("/")
    assert tree[f"{inside}/file"] == b"mounted"
    assert f"{inside}/skip" not in tree
    assert tree["dir/own"] == b"own\n"
    assert "etc/new" not in tree
    container.image = f"{registry.host}/out:c"
    # One commit, whatever the number of its blobs.
    assert commit_container("web.1", "--maximum-times", "2").status == 0
    done = commit_container("web.1", "--maximum-times", "2")
    assert done.last == "reached maximum committed times 2"


@needs_fixtures
def test_message_of_the_real_tool(tmp_path):
    case = Case("commit-help")
    done = nydusify(*case.words, "--work-dir", tmp_path)
    real = (case.folder / "stderr.txt").read_text().splitlines()[-1]
    wanted = json.loads(real.split("msg=", 1)[1])
    assert str(done.status) == case.status
    # There it is a timeout, after ten seconds.
    assert done.last == wanted.replace("timeout", "No such file or directory")


def test_words(tmp_path):
    for words, last in (
        ((), 'Required flags "container, target" not set'),
        (("--target", "x"), 'Required flag "container" not set'),
        (("--upper", "u", "--target", "x"), 'Required flag "source" not set'),
        (("--container", "c", "--upper", "u"), "--upper conflicts with --container"),
        (("--container", "c", "--source", "u"), "--source goes with --upper"),
        (("--container", "c", "--target", f"x@sha256:{'0' * 64}"), "parse target image name: "),
        (("--container", "c", "--target", "x", "--with-path", "data"), "--with-path should be"),
        (("--upper", "u", "--source", "s", "--target", "x", "--with-path", "/d"), "--with-path"),
    ):
        done = nydusify("commit", *words, "--work-dir", tmp_path / "work")
        assert done.status == 1
        assert not (tmp_path / "work").exists()
        assert done.last.startswith(last)


def test_image_that_is_no_nydus_image_is_refused(registry, commit, upper):
    done = commit("--upper", upper, "--source", f"{registry.host}/app:v1")
    assert done.status == 1
    assert done.last == f"pull base bootstrap: not a nydus image: {registry.host}/app:v1"


def _members(pieces):
    with tarfile.open(fileobj=io.BytesIO(b"".join(pieces))) as tar:
        return {one.name: one for one in tar}


@pytest.fixture
def opened(upper):
    descriptor = os.open(upper, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_marks_of_overlayfs_become_those_of_layers(upper, opened):
    os.setxattr(upper / "etc", "user.overlay.origin", b"x")
    os.setxattr(upper / "etc", "user.overlay.overlay.opaque", b"y")
    os.setxattr(upper / "etc/new", "user.a=b", bytes(range(256)))
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(upper / "s"))
        members = _members(upper_layer(opened))
    assert sorted(members) == [
        ".", ".wh.s", "dir", "dir/.wh..wh..opq", "dir/own", "etc", "etc/new",
    ]  # fmt: skip
    kept = [key for key in members["etc"].pax_headers if "xattr" in key]
    assert kept == ["LIBARCHIVE.xattr.user.overlay.overlay.opaque"]
    assert "LIBARCHIVE.xattr.user.a%3Db" in members["etc/new"].pax_headers


@contextlib.contextmanager
def _open(path):
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("mark", ["redirect", "metacopy"])
def test_what_overlayfs_has_by_reference_comes_from_the_view(upper, opened, tmp_path, mark):
    place = "dir" if mark == "redirect" else "dir/own"
    os.removexattr(upper / "dir", "user.overlay.opaque")
    os.setxattr(upper / place, f"user.overlay.{mark}", b"x")
    with pytest.raises(BuildError, match="only the container's own view has its content"):
        b"".join(upper_layer(opened))
    view = tmp_path / "view"
    (view / "dir/sub").mkdir(parents=True)
    (view / "dir/own").write_text("of the view")
    with _open(view) as descriptor:
        members = _members(upper_layer(opened, (), descriptor))
    assert members["dir/own"].size == len("of the view")
    assert ("dir/.wh..wh..opq" in members) == (mark == "redirect")
    assert ("dir/sub" in members) == (mark == "redirect")


def test_no_symlink_is_followed(tmp_path):
    (tmp_path / "real/inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    with _open(tmp_path) as descriptor:
        os.close(open_beneath(descriptor, b"/real/inner"))
        for path in (b"/link/inner", b"/link", b"/real/../real", b"/nothing"):
            with pytest.raises(BuildError):
                open_beneath(descriptor, path)
        members = _members(mounted_layer(descriptor, b"/link"))
    assert members["link"].issym()


def test_descriptors_are_closed_when_a_walk_ends_early(upper, opened):
    with no_open_file_left():
        pieces = upper_layer(opened)
        next(pieces)
        pieces.close()
        (upper / "etc/.wh.x").write_text("")
        with pytest.raises(BuildError):
            b"".join(upper_layer(opened))


def test_messages_that_are_broken():
    data = pack_texts([(1, "a" * 200), (40, "b")])
    fields = parse_message(data + b"\x10\x96\x01" + b"\x1d" + bytes(4))
    assert (fields.text(1), fields.text(40), fields.number(2)) == ("a" * 200, "b", 150)
    assert (fields.text(7), fields.number(7), fields.message(7).all(1)) == ("", 0, [])
    for broken in (data[:-1], b"\x0a\x05ab", b"\xff" * 11, b"\x0b", b"\x08"):
        with pytest.raises(FormatError):
            parse_message(broken)
    for wrong in (lambda: fields.number(1), lambda: fields.text(2)):
        with pytest.raises(FormatError):
            wrong()
