import gzip
import lzma
import struct

import pytest

from vmlab.errors import LabError
from vmlab.vmlinux import unpack_kernel

KERNEL = b"\x7fELF" + b"kernel" * 1000
KERNEL_BYTES = len(KERNEL)
SETUP_SECTORS = 3


def image(payload, size=KERNEL_BYTES, sectors=SETUP_SECTORS):
    """A bzImage with the fields of its header that matter."""
    data = bytearray(((sectors or 4) + 1) * 512)
    data[0x1F1] = sectors
    data[0x202:0x206] = b"HdrS"
    code = b"code" * 10
    payload += struct.pack("<I", size)
    struct.pack_into("<II", data, 0x248, len(code), len(payload))
    return bytes(data) + code + payload + b"signature"


@pytest.fixture
def unpack(tmp_path):
    def unpack(data):
        (tmp_path / "image").write_bytes(data)
        unpack_kernel(tmp_path / "image", tmp_path / "vmlinux")
        return (tmp_path / "vmlinux").read_bytes()

    return unpack


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
@pytest.mark.parametrize("sectors", [0, SETUP_SECTORS])
def test_the_kernel_comes_out(unpack, compress, sectors):
    assert unpack(image(compress(KERNEL), sectors=sectors)) == KERNEL


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"MZ" + bytes(1000), "not a bzImage"),
        (image(gzip.compress(KERNEL))[:-30], "cut short"),
        (image(b"LZO?" + bytes(100)), "unknown method: 4c5a4f3f"),
        (image(gzip.compress(KERNEL), size=5), "of 5 bytes"),
        (image(gzip.compress(b"text"), size=4), "begins 74657874"),
        (image(gzip.compress(KERNEL), size=1 << 31), "announces a kernel of 2147483648 bytes"),
    ],
)
def test_what_is_no_kernel(unpack, tmp_path, data, message):
    with pytest.raises(LabError, match=message):
        unpack(data)
    assert not (tmp_path / "vmlinux").exists()
