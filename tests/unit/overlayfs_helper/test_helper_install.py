"""What `make install-helper` makes, and that it starts with few imports."""

import subprocess
import sys
from pathlib import Path

import pytest

from overlayfs_helper import install
from overlayfs_helper.install import InstallError, install_helper, main

_ROOT = Path(__file__).resolve().parents[3]


def run(*words):
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_helper_imports_nothing_beside_ctypes():
    def modules(statement):
        code = f"import sys; sys.path.append({str(_ROOT)!r}); {statement}; print(*sys.modules)"
        status, out, err = run(sys.executable, "-I", "-S", "-c", code)
        assert status == 0, err
        return set(out.split())

    added = modules("import overlayfs_helper.mounting") - modules("import ctypes, errno")
    names = {"cli", "errors", "mounting", "options"}
    assert added == {"overlayfs_helper", *(f"overlayfs_helper.{name}" for name in names)}


def test_an_installed_helper_runs(tmp_path):
    program = install_helper(tmp_path / "usr", tmp_path / "sbin", python=Path(sys.executable))
    assert program == tmp_path / "usr/bin/nydus-overlayfs"
    assert program.read_text().splitlines()[0] == f"#!{sys.executable} -IS"
    link = tmp_path / "sbin/mount.nydus-overlayfs"
    assert link.readlink() == program
    for path in (program, link):
        assert run(path, "--version")[1].startswith("nydus-overlayfs version ")
        status, out, err = run(path, "overlay", "/t", "-o", "dev,suid")
        assert (status, out) == (1, "")
        assert err == "nydus-overlayfs: no option names a lower directory\n"
    (library,) = (tmp_path / "usr/lib/nydus-overlayfs").iterdir()
    assert len(list(library.glob("overlayfs_helper/__pycache__/*.pyc"))) == 5


def test_a_package_does_not_name_its_build_directory(tmp_path):
    program = install_helper(Path("/usr"), Path("/sbin"), destination=tmp_path)
    assert program == tmp_path / "usr/bin/nydus-overlayfs"
    assert str(tmp_path) not in program.read_text()
    assert (tmp_path / "sbin/mount.nydus-overlayfs").readlink() == Path("/usr/bin/nydus-overlayfs")


def test_installing_again_replaces_and_forgets(tmp_path, monkeypatch):
    original = Path(install.__file__)
    texts = set()
    for number in range(4):
        source = tmp_path / f"source{number}"
        source.mkdir()
        for name in install._MODULES:
            content = original.with_name(name).read_text()
            (source / name).write_text(f"{content}# {number}\n")
        monkeypatch.setattr(install, "__file__", str(source / "install.py"))
        program = install_helper(tmp_path / "usr", tmp_path / "sbin")
        texts.add(program.read_text())
        assert run(program, "--version")[0] == 0
    assert len(texts) == 4
    # The version before may be starting at this moment.
    assert len(list((tmp_path / "usr/lib/nydus-overlayfs").iterdir())) == 2
    assert install_helper(tmp_path / "usr", tmp_path / "sbin") == program
    assert program.read_text() in texts
    assert not list((tmp_path / "usr").rglob(".*"))


def test_an_interpreter_that_does_not_do(tmp_path):
    with pytest.raises(InstallError, match=r"Python 3\.11"):
        install_helper(tmp_path, tmp_path, python=Path("/bin/false"))
    spaced = tmp_path / "with blank"
    spaced.mkdir()
    (spaced / "python3").symlink_to(sys.executable)
    with pytest.raises(InstallError, match="first line"):
        install_helper(tmp_path, tmp_path, python=spaced / "python3")
    assert not (tmp_path / "bin").exists()


def test_command_line(tmp_path, capsys):
    assert main(["--destdir", str(tmp_path), "--python", "/nowhere"]) == 1
    assert capsys.readouterr().err.startswith("Error: /nowhere: Python 3.11")
    assert main(["--destdir", str(tmp_path), "--prefix", "/opt/x"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/opt/x/bin/nydus-overlayfs\n"
    assert (tmp_path / "sbin/mount.nydus-overlayfs").is_symlink()
