"""Statistics, optimizing, compacting, dictionaries and parents beside the real tool's.

Most of these the real tool gets wrong; what can be the same is compared, and that ours is
right is shown (docs/compatibility.md).
"""

import json
import subprocess

import pytest

from builder import BuildOptions, SourceType, build, unpack
from builder.backends import blob_directory
from builder.bootstrap import open_any_bootstrap
from builder.build import write_bootstrap_file
from builder.datacheck import check_data
from builder.dictgenerate import DICTIONARY_NAME
from erofs import check_image, open_bootstrap, reader
from erofs.rafs import BlobFeatures, Compressor
from tests.compat.test_made_by_nydus_image import (
    MADE,
    commands,
    expected_files,
    replay,
    workplace,
)
from tests.fixtures_path import needs_fixtures

__all__ = ["workplace"]
pytestmark = needs_fixtures


def run(folder, workplace, *lines):
    """Run lines of a shell in a folder; return what the last one printed."""
    path = f"{workplace / 'bin'}:/usr/bin:/bin:/usr/sbin:/sbin"
    for line in lines:
        result = subprocess.run(
            ["bash", "-c", line], cwd=folder, env={"PATH": path}, capture_output=True, text=True
        )
        assert result.returncode == 0, (line, result.stderr)
    return result


def new_folder(workplace, name):
    folder = workplace / "cases" / name
    folder.mkdir(parents=True)
    return folder


def tree_of(bootstrap, blobs, output):
    """Return the tar of an image, read through all its blobs."""
    unpack(bootstrap, output, blob_directory(blobs))
    return output.read_bytes()


def assert_sound(bootstrap, blobs):
    """Assert that the image and everything in its blobs is as it should be."""
    with open_any_bootstrap(bootstrap) as image:
        assert list(check_image(image)) == []
        ids = [blob.id for blob in image.blobs]
        findings = check_data(image, ids, blob_directory(blobs), bootstrap)
        assert [str(f) for _, f in findings if f.severity == "error"] == []


def test_statistics(workplace):
    folder, _ = replay("stat", workplace)
    for name in ("stat.json", "stat2.json", "stat3.json"):
        assert (folder / name).read_bytes() == (MADE / "cases/stat" / name).read_bytes(), name


@pytest.fixture
def lenient(monkeypatch):
    """Open what the real tool writes and strict readers refuse."""
    monkeypatch.setattr(reader, "restrict_blob", lambda *_: None)


OPTIMIZED_FIELDS = {
    "ci_compressor", "ci_offset", "ci_compressed_size", "ci_uncompressed_size",
    "compressed_size",
}  # fmt: skip


def optimized(case, workplace):
    folder = new_folder(workplace, f"{case}-better")
    run(folder, workplace, *(line for line, _ in commands(case)[:4]))
    return folder


@pytest.mark.parametrize("case", ["optimize", "optimize-none"])
def test_optimized_blobs_are_the_same_and_can_be_read(case, workplace, tmp_path, lenient):
    folder = optimized(case, workplace)
    expected = expected_files(case)
    for name, data in expected.items():
        if name != "opt.boot":
            assert (folder / name).read_bytes() == data, f"{name} differs"
    ours, theirs = (folder / "opt.boot").read_bytes(), expected["opt.boot"]
    with open_bootstrap(ours) as image, open_bootstrap(theirs) as wrong:
        assert image.chunk_infos == wrong.chunk_infos
        assert image.blobs[0] == wrong.blobs[0]
        pairs = zip(image.blobs[1]._fields, image.blobs[1], wrong.blobs[1], strict=True)
        different = {name for name, new, old in pairs if new != old}
        assert different <= OPTIMIZED_FIELDS
        table = image.extended.blob_table_offset
    places = [place for place in range(len(ours)) if ours[place] != theirs[place]]
    assert all(table + 256 <= place < table + 512 for place in places)
    (blob,) = (folder / "opt").iterdir()
    blob.rename(folder / blob.name)
    assert_sound(folder / "opt.boot", folder)
    before = tree_of(folder / "boot", folder, tmp_path / "before")
    assert tree_of(folder / "opt.boot", folder, tmp_path / "after") == before


def test_optimized_blob_of_an_image_with_contents_has_none(workplace, lenient):
    """The real tool says that there are a ToC and digests in the new blob, and writes none."""
    folder = optimized("optimize-toc", workplace)
    (blob,) = (folder / "opt").iterdir()
    theirs = next(data for name, data in expected_files("optimize-toc").items() if "opt/" in name)
    ours = blob.read_bytes()
    assert len(ours) == len(theirs)
    data_size = theirs.index(b"image.blob")
    assert ours[:data_size] == theirs[:data_size]
    blob.rename(folder / blob.name)
    with open_bootstrap(folder / "opt.boot") as image:
        assert not image.blobs[1].features & (BlobFeatures.HAS_TOC | BlobFeatures.HAS_TAR_HEADER)
    assert_sound(folder / "opt.boot", folder)


@pytest.mark.root
@pytest.mark.parametrize("case", ["compact", "compact-merge-small", "compact-nothing"])
def test_compacted_images(case, workplace, tmp_path):
    """The real tool never compacts, and leaves an empty file."""
    folder = new_folder(workplace, case)
    run(folder, workplace, *(line for line, _ in commands(case)[:3]))
    for name, data in expected_files(case).items():
        if len(name) == 64 or name in ("p1.boot", "p2.boot"):
            assert (folder / name).read_bytes() == data, f"{name} differs"
    compacted = folder / ("p2.bootstrap.compact" if case == "compact-nothing" else "compacted.boot")
    assert_sound(compacted, folder)
    with open_bootstrap(folder / "p2.boot") as before, open_bootstrap(compacted) as after:
        assert len(before.blobs) == 2
        assert len(after.blobs) == 1
        assert after.blobs[0].chunk_count == len(after.chunk_infos)
        assert after.blobs[0].compressed_size < sum(b.compressed_size for b in before.blobs)
        ids = [blob.id for blob in after.blobs]
    tree = tree_of(folder / "p2.boot", folder, tmp_path / "before")
    assert tree_of(compacted, folder, tmp_path / "after") == tree
    if case != "compact-nothing":
        assert json.loads((folder / "out.json").read_text())["blobs"] == ids


def places_of(image):
    """Return what a dictionary says of chunks, but for its own numbers."""
    return {
        (chunk.digest, image.blobs[chunk.blob_index].id, *chunk[3:7], chunk.crc32c)
        for chunk in image.chunk_infos
    }


@pytest.mark.parametrize(
    "case", ["chunkdict-generate", "chunkdict-generate-12", "chunkdict-generate-versions"]
)
def test_dictionaries_have_the_same_chunks(case, workplace):
    folder, _ = replay(case, workplace)
    expected = expected_files(case)
    ours = open_bootstrap(folder / "dict.boot")
    theirs = open_bootstrap(expected["dict.boot"])
    assert places_of(ours) == places_of(theirs)
    assert [blob.id for blob in ours.blobs] == [blob.id for blob in theirs.blobs]
    report, real = (
        json.loads((place / "out.json").read_text()) for place in (folder, MADE / "cases" / case)
    )
    assert report["blobs"] == real["blobs"]
    assert report.keys() == real.keys()
    # Theirs calls the file by a name with a slash, and lists every chunk once a version.
    assert list(check_image(ours)) == []
    assert ours.lookup(b"/" + DICTIONARY_NAME).is_regular
    assert all(blob.chunk_count == len(ours.chunk_infos) for blob in ours.blobs)
    for blob in ours.blobs:
        assert blob.features & BlobFeatures.IS_CHUNKDICT_GENERATED


def test_images_on_a_dictionary_of_the_real_tool(workplace, tmp_path):
    case = "chunkdict-generate-versions"
    expected = expected_files(case)
    write_bootstrap_file(expected["dict.boot"], tmp_path / "dict.boot", None)
    options = BuildOptions(
        source_type=SourceType.TAR, compressor=Compressor.NONE, bootstrap=tmp_path / "use.boot",
        blob_dir=tmp_path, chunk_dict=tmp_path / "dict.boot",
    )  # fmt: skip
    build(workplace / "inputs" / "l3.tar", options)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    made.pop("dict.boot")
    assert made == {n: d for n, d in expected.items() if n != "dict.boot"}


def test_tars_on_a_parent(workplace, tmp_path):
    """The real tool gives their chunks to the wrong blob, and fails with the third layer."""
    folder = new_folder(workplace, "parent-bootstrap")
    lines = [line for line, _ in commands("parent-bootstrap")]
    run(folder, workplace, *lines)
    report = json.loads((folder / "out.json").read_text())
    with open_bootstrap(folder / "l12.boot") as image:
        assert report["blobs"] == [blob.id for blob in image.blobs]
        assert len(image.blobs) == 2
    for name in ("l12.boot", "l123.boot"):
        assert_sound(folder / name, folder)
    alone = [
        "nydus-image create --type tar-rafs --compressor none"
        f" -B {n}.boot -D . ../../inputs/{n}.tar"
        for n in ("l2", "l3")
    ]
    ids = "--original-blob-ids $(for n in l1 l2 l3; do nydus-image inspect $n.boot -R blobs |"
    ids += " cut -d'\"' -f4; done | paste -sd,)"
    run(
        folder, workplace, *alone, f"nydus-image merge -B merged.boot {ids} l1.boot l2.boot l3.boot"
    )
    merged = tree_of(folder / "merged.boot", folder, tmp_path / "merged")
    assert tree_of(folder / "l123.boot", folder, tmp_path / "parents") == merged
