"""`kata bundle`: one folder for microVM platforms, from images in layouts and folders.

Judges: veritysetup, the kernel's EROFS, QEMU, skopeo.
"""

import gzip
import hashlib
import io
import json
import shlex
import shutil
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from builder import BuildOptions, MergeOptions, SourceType, build, merge
from builder.oci.layout import LayoutSource, LayoutTarget
from builder.oci.media import OCI_INDEX
from builder.oci.records import Index, Manifest, Platform, describe
from kata import KataVirtualVolume, parse_verity
from kata.cli import main
from tests.capabilities import need_tool, requires
from tests.fakes.oci_registry import OciRegistry

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar"
NYDUS = "containerd.io/snapshot/nydus-"
NAMES = {
    "image.disk", "verity.txt", "verity.json", "volume.json", "volume.option", "kernel.cmdline",
    "qemu.args", "cloud-hypervisor.args", "firecracker.json", "sbom.json",
}  # fmt: skip
LOWER = {"etc/hostname": b"lower", "usr/gone": b"x" * 5000, "usr/kept": bytes(range(256)) * 40}
UPPER = {"etc/hostname": b"upper", "usr/.wh.gone": b"", "new": b"n" * 70_000}
WHOLE = {"/etc/hostname": b"upper", "/usr/kept": LOWER["usr/kept"], "/new": UPPER["new"]}


def tar_of(files):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


class Oci:
    """An OCI layout that is being filled."""

    def __init__(self, path):
        self.target = LayoutTarget(path)
        (path / "index.json").write_text('{"schemaVersion":2,"manifests":[]}')

    def put(self, data, media_type, **annotations):
        descriptor = describe(data, media_type)
        self.target.put(descriptor, [data])
        return replace(descriptor, annotations=annotations)

    def image(self, layers):
        return Manifest(MANIFEST, self.put(b'{"os":"linux"}', CONFIG), tuple(layers)).pack()

    def plain(self):
        packed = gzip.compress(tar_of(UPPER), mtime=0)
        return self.image([self.put(tar_of(LOWER), LAYER), self.put(packed, f"{LAYER}+gzip")])

    def publish(self, manifest, *, named=True, media_type=MANIFEST):
        descriptor = describe(manifest, media_type)
        self.target.publish(manifest, descriptor, named=named)
        return descriptor


def plain_layout(path):
    oci = Oci(path)
    oci.publish(oci.plain())
    return path


def built(directory):
    """Build and merge both layers; return the bootstrap and the directory of blobs."""
    blobs = directory / "built-blobs"
    blobs.mkdir(parents=True)
    boots = []
    for number, files in enumerate((LOWER, UPPER)):
        tar = directory / f"{number}.tar"
        tar.write_bytes(tar_of(files))
        boots.append(directory / f"{number}.boot")
        options = BuildOptions(source_type=SourceType.TAR, bootstrap=boots[-1], blob_dir=blobs)
        build(tar, options)
    target = directory / "merged.boot"
    merge(boots, MergeOptions(bootstrap=target, keep_ids=True))
    return target, blobs


def nydus_layout(path):
    boot, blobs = built(path.parent / "nydus")
    oci = Oci(path)
    layers = [
        oci.put(blob.read_bytes(), "application/vnd.oci.image.layer.nydus.blob.v1",
                **{f"{NYDUS}blob": "true"})
        for blob in sorted(blobs.iterdir())
    ]  # fmt: skip
    packed = gzip.compress(tar_of({"image/image.boot": boot.read_bytes()}), mtime=0)
    layers.append(oci.put(packed, f"{LAYER}+gzip", **{f"{NYDUS}bootstrap": "true"}))
    oci.publish(oci.image(layers))
    return path


def folder(path):
    boot, blobs = built(path.parent / "folder-parts")
    path.mkdir()
    shutil.copy(boot, path / "image.boot")
    shutil.copytree(blobs, path / "blobs")
    return path


def indexed_layout(path):
    oci = Oci(path)
    other = oci.image([oci.put(tar_of({"other": b""}), LAYER)])
    entries = [
        replace(oci.publish(manifest, named=False), platform=Platform(architecture, "linux"))
        for manifest, architecture in ((other, "arm64"), (oci.plain(), "amd64"))
    ]
    oci.publish(Index(OCI_INDEX, tuple(entries)).pack(), media_type=OCI_INDEX)
    return path


SOURCES = [plain_layout, nydus_layout, folder, indexed_layout]


@pytest.fixture(params=SOURCES, ids=lambda make: make.__name__)
def source(request, tmp_path):
    return request.param(tmp_path / "source")


def make(source, output, *words):
    assert main(["bundle", str(source), "-o", str(output), *words]) == 0
    return output


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_bundle_is_complete_and_right(source, tmp_path, capsys):
    bundle = make(source, tmp_path / "out")
    root = capsys.readouterr().out.strip()
    assert {path.name for path in bundle.iterdir()} == NAMES
    disk = bundle / "image.disk"
    line = (bundle / "verity.txt").read_text()
    verity = parse_verity(line.rstrip("\n"))
    assert verity.root_hash == root
    words = shlex.split(line.removeprefix("dm-verity options: "))
    subprocess.run([need_tool("veritysetup"), "verify", disk, disk, *words], check=True)
    place = f"/var/lib/kata/bundles/{root}/image.disk"
    option = (bundle / "volume.option").read_text().rstrip("\n")
    volume = KataVirtualVolume.decode(option)
    assert (volume.source, volume.fs_type, volume.dm_verity) == (place, "erofs", verity)
    assert json.loads((bundle / "volume.json").read_text()) == volume.as_json()
    assert verity.table("/dev/vda") in (bundle / "kernel.cmdline").read_text()
    drives = json.loads((bundle / "firecracker.json").read_text())["drives"]
    assert [drive["path_on_host"] for drive in drives] == [place]
    for name in ("qemu.args", "cloud-hypervisor.args"):
        assert place in (bundle / name).read_text()


def test_the_bill_of_materials_has_all_inputs(source, tmp_path):
    bundle = make(source, tmp_path / "out")
    bill = json.loads((bundle / "sbom.json").read_text())
    made = bill["metadata"]["component"]["hashes"][0]["content"]
    assert made == hashlib.sha256((bundle / "image.disk").read_bytes()).hexdigest()
    listed = {item["hashes"][0]["content"] for item in bill["components"]}
    stored = {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in source.rglob("*")
        if path.is_file() and path.name not in ("oci-layout", "index.json")
    }
    # Of an index there is one image, the others are no inputs.
    assert listed == stored or (listed < stored and len(stored) - len(listed) == 2)
    assert bill["dependencies"] == [{"ref": made, "dependsOn": sorted(listed)}]


def test_the_same_image_gives_the_same_bytes(source, tmp_path):
    first = make(source, tmp_path / "one")
    moved = tmp_path / "elsewhere"
    source.rename(moved)
    second = make(moved, tmp_path / "deeper-name-of-another-length")
    assert content(first) == content(second)


@pytest.mark.root
@requires("root", "erofs_mount", "loop")
def test_the_kernel_reads_the_files(source, tmp_path):
    bundle = make(source, tmp_path / "out")
    (tmp_path / "mnt").mkdir()
    script = 'mount -t erofs -o ro,loop "$0" "$1" && tar -C "$1" -c .'
    words = ["unshare", "--mount", "sh", "-c", script, bundle / "image.disk", tmp_path / "mnt"]
    done = subprocess.run(words, capture_output=True, check=True, timeout=60)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        found = {
            member.name.removeprefix("."): tar.extractfile(member).read()
            for member in tar
            if member.isreg()
        }
    assert found == WHOLE


def test_a_place_of_its_own(tmp_path):
    bundle = make(plain_layout(tmp_path / "l"), tmp_path / "out", "--place", "/srv/images/web")
    place = "/srv/images/web/image.disk"
    assert json.loads((bundle / "volume.json").read_text())["source"] == place
    assert f"file={place},format=raw" in (bundle / "qemu.args").read_text()


@pytest.mark.parametrize("make_layout", [plain_layout, nydus_layout])
def test_an_image_of_a_registry(make_layout, tmp_path, capsys):
    layout = make_layout(tmp_path / "l")
    source = LayoutSource(layout)
    manifest = source.resolve()
    with OciRegistry() as registry:
        repository = registry.repository("team/app")
        for blob in (layout / "blobs/sha256").iterdir():
            repository.add_blob(blob.read_bytes())
        repository.add_manifest(source.document(manifest), MANIFEST, "v1")
        name = f"{registry.host}/team/app:v1"
        pulled = tmp_path / "pulled"
        assert main(["bundle", name, "-o", str(pulled)]) == 0
        line = refuse(capsys, f"{registry.host}/team/app:v2", "-o", tmp_path / "out")
        assert "v2" in line
    assert content(pulled) == content(make(layout, tmp_path / "local"))


def refuse(capsys, *words):
    assert main(["bundle", *map(str, words)]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    return line


def test_what_cannot_be_is_one_line(tmp_path, capsys):
    layout, out = plain_layout(tmp_path / "l"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert "no image is in the folder" in refuse(capsys, tmp_path / "empty", "-o", out)
    assert "is no folder" in refuse(capsys, tmp_path / "nowhere", "-o", out)
    assert "image v9 is not in the layout" in refuse(capsys, layout, "-o", out, "--reference", "v9")
    assert "place of the bundle" in refuse(capsys, layout, "-o", out, "--place", "relative")
    assert "place of the bundle" in refuse(capsys, layout, "-o", out, "--place", "/a,b")
    assert "is there already" in refuse(capsys, layout, "-o", tmp_path / "empty")
    assert "No such file" in refuse(capsys, layout, "-o", tmp_path / "no/where")
    index = indexed_layout(tmp_path / "i")
    words = ["--platform", "linux/riscv64"]
    assert "no image for: got linux/riscv64" in refuse(capsys, index, "-o", out, *words)
    # Nothing is left of any of them.
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_a_changed_layer_is_found(tmp_path, capsys):
    layout = plain_layout(tmp_path / "l")
    largest = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[600] ^= 1
    largest.write_bytes(data)
    assert "content has another digest" in refuse(capsys, layout, "-o", tmp_path / "out")


def test_layers_of_other_kinds(tmp_path, capsys):
    oci = Oci(tmp_path / "l")
    layer = oci.put(b"x", "application/vnd.oci.image.layer.v1.tar+gzip+encrypted")
    oci.publish(oci.image([layer]))
    line = refuse(capsys, tmp_path / "l", "-o", tmp_path / "out")
    assert "media type of a layer: got application/vnd.oci.image.layer.v1.tar+gzip+enc" in line
    oci = Oci(tmp_path / "n")
    wrong = gzip.compress(tar_of({"../image.boot": b"x"}), mtime=0)
    layer = oci.put(wrong, f"{LAYER}+gzip", **{f"{NYDUS}bootstrap": "true"})
    oci.publish(oci.image([layer]))
    line = refuse(capsys, tmp_path / "n", "-o", tmp_path / "out")
    assert "layer has no bootstrap" in line


def test_skopeo_layouts(tmp_path):
    """A layout by another tool, where there is one."""
    skopeo = need_tool("skopeo")
    layout = plain_layout(tmp_path / "l")
    words = ["copy", "--quiet", f"oci:{layout}", f"oci:{tmp_path}/copied:v1"]
    subprocess.run([skopeo, *words], check=True, capture_output=True)
    one = make(layout, tmp_path / "one")
    two = make(tmp_path / "copied", tmp_path / "two", "--reference", "v1")
    assert (one / "image.disk").read_bytes() == (two / "image.disk").read_bytes()


def test_qemu_takes_the_drive(tmp_path):
    qemu = need_tool("qemu-system-x86_64")
    out = tmp_path / "out"
    bundle = make(plain_layout(tmp_path / "l"), out, "--place", str(out))
    words = (Path(bundle) / "qemu.args").read_text().splitlines()
    machine = ["-S", "-display", "none", "-nodefaults", "-qmp", "stdio", "-accel", "tcg"]
    with subprocess.Popen([qemu, *machine, *words], stdin=-1, stdout=-1, stderr=-1) as process:
        greeting = process.stdout.readline()
        process.kill()
        assert b"QMP" in greeting, process.stderr.read()
