import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]
_MODULES = sorted(
    f"erofs.{path.stem}" for path in (_ROOT / "erofs").glob("*.py") if path.stem != "__init__"
)


def test_imports_without_any_third_party_package():
    # -I and -S: no site-packages, no environment, nothing but the standard library.
    code = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); import " + ", ".join(_MODULES)
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_a_missing_codec_is_an_error_that_names_the_package():
    code = (
        f"import sys; sys.path.insert(0, {str(_ROOT)!r})\n"
        "from erofs import CodecError, codec, digest, rafs\n"
        "for call in (lambda: codec.decompress(rafs.Compressor.ZSTD, b'', 1),\n"
        "             lambda: codec.decompress(rafs.Compressor.LZ4_BLOCK, b'', 1),\n"
        "             lambda: codec.compress(rafs.Compressor.LZ4_BLOCK, b'1'),\n"
        "             lambda: digest.digest(rafs.Digester.BLAKE3, b''),\n"
        "             lambda: digest.crc32c(b'')):\n"
        "    try:\n"
        "        call()\n"
        "    except CodecError as error:\n"
        "        print(error)\n"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert len(lines) == 5, result.stderr
    for line, package in zip(lines, ["zstandard", "lz4", "lz4", "blake3", "crc32c"], strict=True):
        assert package in line
        assert "not installed" in line
