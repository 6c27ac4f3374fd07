import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from erofs.__main__ import main

_GOLDEN = Path(__file__).resolve().parents[2] / "golden"


def test_check_of_a_sound_image(capsys):
    assert main(["check", str(_GOLDEN / "toc.boot"), "--blob", str(_GOLDEN / "toc.blob"),
                 "--data"]) == 0  # fmt: skip
    assert capsys.readouterr() == ("", "")


def test_check_of_a_broken_image(tmp_path, capsys):
    data = bytearray((_GOLDEN / "plain.boot").read_bytes())
    data[1408 + 64] = 1
    path = tmp_path / "boot"
    path.write_bytes(data)
    assert main(["check", str(path)]) == 1
    out = capsys.readouterr().out
    assert "error: offset 0x580: blocks of the device" in out


def test_dump_is_the_golden_dump(capsys):
    assert main(["dump", str(_GOLDEN / "nodata.boot")]) == 0
    assert capsys.readouterr().out == (_GOLDEN / "nodata.dump").read_text()


def test_dump_takes_what_strict_readers_refuse(tmp_path, capsys):
    data = bytearray((_GOLDEN / "nodata.boot").read_bytes())
    data[1024 + 4] = 1
    path = tmp_path / "boot"
    path.write_bytes(data)
    assert main(["dump", str(path)]) == 0
    captured = capsys.readouterr()
    assert "checksum=0x1" in captured.out
    assert "checksum of the superblock" in captured.err
    assert main(["check", str(path)]) == 1


@pytest.mark.parametrize(("content", "status"), [(b"no image", 1), (None, 2)])
def test_files_that_do_not_open(tmp_path, capsys, content, status):
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    assert main(["dump", str(path)]) == status
    error = capsys.readouterr().err
    assert error.startswith("erofs: ")
    assert error.count("\n") == 1
    assert str(path) in error


def test_blob_of_another_image(tmp_path, capsys):
    path = tmp_path / "boot"
    path.write_bytes(tiny.TinyImage().finish())
    assert main(["check", str(path), "--blob", str(_GOLDEN / "toc.blob")]) == 1
    assert "no blob of this name" in capsys.readouterr().err


def test_usage_error():
    with pytest.raises(SystemExit) as caught:
        main(["mount"])
    assert caught.value.code == 2


def test_a_closed_pipe_is_not_an_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "erofs", "dump", str(_GOLDEN / "plain.boot")]
    result = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, check=False, cwd=_GOLDEN.parents[1]
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, b"")
