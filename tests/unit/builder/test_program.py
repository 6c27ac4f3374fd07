"""`nydus-image` as a process: it ends at once, but not before all it says has come through."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from builder.cli import main, program

CODE = "import sys; from builder.cli import main; sys.exit(main())"
NO_SUCH = ["check", "--bootstrap", "none"]


def _run(words, **options):
    return subprocess.run([sys.executable, "-c", CODE, *words], timeout=60, check=False, **options)


@pytest.mark.parametrize(
    ("words", "status", "out", "err"),
    [
        ([], 0, b"Usage: nydus-image", b""),
        (["create", "-V"], 2, b"", b"SOURCE"),
        (NO_SUCH, 1, b"", b"Error: none: No such file"),
    ],
)
def test_what_is_said_arrives_with_the_status(words, status, out, err, tmp_path):
    # Into files, which are buffered, unlike terminals.
    with (tmp_path / "out").open("wb") as stdout, (tmp_path / "err").open("wb") as stderr:
        done = _run(words, cwd=tmp_path, stdout=stdout, stderr=stderr)
    assert done.returncode == status
    said, wrong = (tmp_path / "out").read_bytes(), (tmp_path / "err").read_bytes()
    assert out in said
    assert bool(out) == bool(said)
    assert err in wrong
    assert bool(err) == bool(wrong)


def test_directory_of_the_log_is_made_as_by_the_real_tool(tmp_path):
    log = tmp_path / "logs" / "build"
    done = _run(["-L", str(log), "create", str(tmp_path), "-D", str(tmp_path)], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "successfully built" in log.with_suffix(".log").read_text()


def test_nobody_reads_what_is_said():
    ours, theirs = os.pipe()
    os.close(ours)
    try:
        done = _run([], stdout=theirs, stderr=subprocess.PIPE)
    finally:
        os.close(theirs)
    assert (done.returncode, done.stderr) == (1, b"")


def test_output_without_a_place(tmp_path):
    with open("/dev/full", "wb") as full:
        done = _run([], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"Error: No space left on device\n"


def test_interrupted_while_it_is_loaded(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "run", interrupted)
    assert main(["check"]) == 130
    assert capsys.readouterr().err == "Error: interrupted before anything was begun\n"
