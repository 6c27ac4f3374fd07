from pathlib import Path

import pytest
import tiny
from undump import rebuild, undump

from erofs import FormatError, dump_blob, dump_image, open_bootstrap, open_image
from erofs.rafs import Compressor
from erofs.view import View

_GOLDEN = Path(__file__).resolve().parents[2] / "golden"


@pytest.mark.parametrize("name", ["nodata", "plain", "toc"])
def test_a_dump_can_be_turned_back(name):
    data = (_GOLDEN / f"{name}.boot").read_bytes()
    lines = list(dump_image(open_bootstrap(data)))
    assert rebuild(lines, bytes(len(data))) == data
    assert not any("error" in line or "unknown" in line for line in lines)
    assert rebuild(list(dump_image(open_image(data))), bytes(len(data))) == data


@pytest.mark.parametrize("name", ["plain", "toc"])
def test_a_dump_of_a_blob_can_be_turned_back(name):
    data = (_GOLDEN / f"{name}.blob").read_bytes()
    lines = list(dump_blob(View(data)))
    assert rebuild(lines, data) == data
    hidden = [length for length, part in undump(lines)[1] if part is None]
    assert len(hidden) == (6 if name == "toc" else 5)
    assert not any("error" in line or "unknown" in line for line in lines)


def _flips(data, step):
    """Yield positions: all that are not zero, and some that are."""
    for position, byte in enumerate(data):
        if byte or position % step == 0:
            yield position


def _dump_or_error(dump, data):
    try:
        return list(dump(data))
    except FormatError as error:
        return str(error)


@pytest.mark.parametrize(
    ("name", "step", "dump"),
    [
        ("nodata.boot", 1, lambda data: dump_image(open_bootstrap(data))),
        ("plain.blob", 64, lambda data: dump_blob(View(data))),
        ("toc.blob", 8, lambda data: dump_blob(View(data))),
    ],
)
def test_flipping_a_byte_changes_the_dump(name, step, dump):
    original = (_GOLDEN / name).read_bytes()
    before = list(dump(original))
    data = bytearray(original)
    for position in _flips(original, step):
        data[position] ^= 0xFF
        assert _dump_or_error(dump, bytes(data)) != before, hex(position)
        data[position] ^= 0xFF


@pytest.mark.parametrize("bit", [0, 7])
def test_flipping_a_bit_of_metadata_changes_the_dump_and_loses_nothing(bit):
    original = (_GOLDEN / "plain.boot").read_bytes()
    data = bytearray(original)
    for position in _flips(original, 4096):
        if position % 37 != bit:
            continue
        data[position] ^= 1 << bit
        image = bytes(data)
        data[position] ^= 1 << bit
        try:
            lines = list(dump_image(open_bootstrap(image)))
        except FormatError:
            continue
        assert rebuild(lines, original) == image, hex(position)


def test_records_show_what_parsers_drop():
    image = tiny.everything(compressor=Compressor.ZSTD, toc=True)
    image.finish()
    data = bytearray(image.blob)
    data[-513] = 0xAA  # in the reserved end of the last ToC entry
    lines = list(dump_blob(View(bytes(data)), image.entry))
    assert sum("raw=" in line for line in lines) == 1
    assert rebuild(lines, bytes(data)) == bytes(data)


def test_overlaps_are_reported_and_shown_once():
    data = bytearray(tiny.everything().finish())
    image = open_bootstrap(bytes(data))
    # The target of /link is taken from the block of /many.
    link, many = image.lookup(b"/long link"), image.lookup(b"/many")
    data[link.offset + 16] = many.union
    lines = list(dump_image(open_bootstrap(bytes(data))))
    assert any("overlap: fd2 bytes of target" in line for line in lines)
    assert rebuild(lines, bytes(len(data))) == bytes(data)


def test_broken_structures_become_remarks():
    data = bytearray(tiny.everything().finish())
    inode = open_bootstrap(bytes(data)).lookup(b"/small")
    data[inode.offset] = 0x0B
    lines = list(dump_image(open_bootstrap(bytes(data))))
    assert sum("+0 error '/" in line and "compressed EROFS inode" in line for line in lines) == 1
    assert rebuild(lines, bytes(len(data))) == bytes(data)


def test_a_record_of_zeros():
    data = bytearray(tiny.everything().finish())
    start = open_bootstrap(bytes(data)).lookup(b"/dir").body_offset
    data[start + 12 : start + 24] = bytes(12)
    lines = list(dump_image(open_bootstrap(bytes(data))))
    assert any(line.startswith(f"{start + 12:08x}+c dirent #") for line in lines)
    assert rebuild(lines, bytes(len(data))) == bytes(data)


def test_names_that_are_far_too_long_are_not_repeated():
    data = bytearray(tiny.everything().finish())
    image = open_bootstrap(bytes(data))
    block = image.lookup(b"/many").union * 4096
    count = image.view.data[block + 8] // 12
    for number in range(1, count):
        data[block + 12 * number + 8 : block + 12 * number + 10] = bytes(2)
    lines = list(dump_image(open_bootstrap(bytes(data))))
    assert sum("without a possible name" in line for line in lines) >= count - 1
    assert rebuild(lines, bytes(len(data))) == bytes(data)


@pytest.mark.parametrize("blob", [b"", b"x", bytes(4096), b"\xab" * 10_000])
def test_files_that_are_no_blob(blob):
    lines = list(dump_blob(View(blob)))
    assert undump(lines)[0] == len(blob)
    assert rebuild(lines, blob) == blob
