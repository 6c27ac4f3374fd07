import importlib.util
import io
import re
import shutil
from pathlib import Path

import pytest

from builder import (
    BuildOptions,
    ExportOptions,
    SourceType,
    VerityOptions,
    build,
    export_block,
)
from builder.backends import blob_directory
from erofs import open_bootstrap
from fscache.cache.chunkmap import merge_bits
from tests.fixtures_path import FIXTURES, needs_fixtures

_HERE = Path(__file__).resolve().parent


def _load():
    spec = importlib.util.spec_from_file_location("golden_make", _HERE / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_MAKE = _load()


@pytest.mark.parametrize("name", [*_MAKE.IMAGES, *_MAKE.BUILT])
def test_remaking_gives_the_golden_bytes(name):
    files = _MAKE.make(name)
    # The dump first: when bytes change, its difference names the field.
    dump = f"{name}.dump"
    assert files.pop(dump).decode() == (_HERE / dump).read_text()
    for file, content in files.items():
        assert content == (_HERE / file).read_bytes(), file


def _disk(folder):
    with open_bootstrap(_HERE / "plain.boot") as image:
        shutil.copy(_HERE / "plain.blob", folder / image.blobs[0].id)
    options = ExportOptions(verity=VerityOptions())
    return export_block(_HERE / "plain.boot", folder / "disk", blob_directory(folder), options).disk


def _table_in_a_cache(folder):
    build(
        io.BytesIO(_MAKE.layer()),
        BuildOptions(
            source_type=SourceType.TAR, bootstrap=folder / "boot", blob_cache_dir=folder,
            chunk_size=0x1000,
        ),
    )  # fmt: skip
    return next(folder.glob("*.blob.meta"))


def _chunk_map(folder):
    merge_bits(folder / "map", 5, [0, 3])
    return folder / "map"


def _v5(folder):
    return FIXTURES / "made-by-nydus-image" / "cases" / "tar-v5" / "boot"


_BYTES_OF = {
    "plain.disk": _disk,
    "layer.blob.meta": _table_in_a_cache,
    "plain.blob.data.chunk_map": _chunk_map,
    "tar-v5.boot": _v5,
}
_DOCS = _HERE.parents[1] / "docs" / "format"
_BLOCK = re.compile(r"^```text (\w+\.dump)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_BYTES = re.compile(r"^```hex (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_BYTES_LINE = re.compile(r"([0-9a-f]{8})\+([0-9a-f]+) ([0-9a-f]+) # .")


@pytest.mark.parametrize("page", sorted(path.name for path in _DOCS.glob("*.md")))
def test_dumps_in_the_manual_are_those_of_the_images(page):
    """In their order; lines may be left out."""
    text = (_DOCS / page).read_text("utf-8")
    blocks = _BLOCK.findall(text)
    assert blocks or _BYTES.search(text) or page == "README.md"
    for dump, lines in blocks:
        rest = iter((_HERE / dump).read_text().splitlines())
        missing = [line for line in lines.splitlines() if line not in rest]
        assert missing == [], (page, dump)
    names = set(re.findall(r"\]\(([a-z0-9-]+\.md)\)", text))
    assert {name for name in names if not (_DOCS / name).exists()} == set()


@pytest.mark.parametrize(
    ("page", "name"),
    [
        ("disk.md", "plain.disk"),
        ("cache.md", "layer.blob.meta"),
        ("cache.md", "plain.blob.data.chunk_map"),
        pytest.param("v5.md", "tar-v5.boot", marks=needs_fixtures),
    ],
)
def test_bytes_in_the_manual_are_those_of_the_files(page, name, tmp_path):
    (lines,) = [
        lines for found, lines in _BYTES.findall((_DOCS / page).read_text("utf-8")) if found == name
    ]
    content = _BYTES_OF[name](tmp_path).read_bytes()
    for line in lines.splitlines():
        match = _BYTES_LINE.match(line)
        assert match, line
        offset, length = int(match[1], 16), int(match[2], 16)
        assert content[offset : offset + length].hex() == match[3], line
