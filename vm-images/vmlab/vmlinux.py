"""The kernel without its own unpacking: an emulated processor would spend seconds on that.

QEMU starts an ELF kernel with a PVH note at its 32-bit entry (Linux Documentation, x86 boot
protocol; `CONFIG_PVH`).
"""

from __future__ import annotations

import gzip
import lzma
import struct
import subprocess
from pathlib import Path

from vmlab.errors import LabError
from vmlab.processes import need

__all__ = ["unpack_kernel"]

# Setup header of a bzImage, offsets from the start of the file.
_SETUP_SECTORS = 0x1F1
_MAGIC = (0x202, b"HdrS")
_PAYLOAD = (0x248, struct.Struct("<II"))  # offset after the setup code, length
_SECTOR_BYTES = 512
# The length of the unpacked kernel follows the compressed bytes.
_SIZE = struct.Struct("<I")
_LIMIT_BYTES = 1 << 30


def _payload(image: bytes) -> tuple[bytes, int]:
    at, magic = _MAGIC
    if image[at : at + len(magic)] != magic:
        raise LabError("not a bzImage")
    offset, length = _PAYLOAD[1].unpack_from(image, _PAYLOAD[0])
    start = ((image[_SETUP_SECTORS] or 4) + 1) * _SECTOR_BYTES + offset
    payload = image[start : start + length]
    if len(payload) != length or length <= _SIZE.size:
        raise LabError(f"bzImage cut short: {len(payload)} of {length} bytes")
    (size,) = _SIZE.unpack(payload[-_SIZE.size :])
    return payload[: -_SIZE.size], size


def _filter(words: list[str], data: bytes) -> bytes:
    done = subprocess.run(words, input=data, capture_output=True, check=False)
    if done.returncode:
        raise LabError(f"{words[0]}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def _decompress(data: bytes) -> bytes:
    if data.startswith(b"\x28\xb5\x2f\xfd"):
        return _filter([need("zstd", "zstd"), "-dcq"], data)
    if data.startswith(b"\x02\x21\x4c\x18"):
        return _filter([need("lz4", "lz4"), "-dcq"], data)
    if data.startswith(b"\xfd7zXZ"):
        return lzma.decompress(data)
    if data.startswith(b"\x1f\x8b"):
        return gzip.decompress(data)
    raise LabError(f"kernel compressed by an unknown method: {data[:4].hex()}")


def unpack_kernel(image: Path, target: Path) -> None:
    """Write the ELF file that is packed in a bzImage.

    Raises:
        LabError: it is no bzImage, or a tool for its compression is missing.
    """
    payload, size = _payload(image.read_bytes())
    if size > _LIMIT_BYTES:
        raise LabError(f"bzImage announces a kernel of {size} bytes")
    kernel = _decompress(payload)
    if len(kernel) != size or not kernel.startswith(b"\x7fELF"):
        raise LabError(f"unpacked kernel: {len(kernel)} of {size} bytes, begins {kernel[:4].hex()}")
    target.write_bytes(kernel)
