"""Put `nydus-overlayfs` where containerd and mount(8) find it, so that it starts fast.

`python -m overlayfs_helper.install`, which is `make install-helper`. Three things are made: a
directory with the modules, compiled; a program of a few lines that names this directory and
its interpreter; a link to it for mount(8). The directory is named after its content and the
program is replaced last, so a helper that starts meanwhile is the old or the new one.
Nothing of this module is imported by the helper.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from overlayfs_helper.cli import installed_version

__all__ = ["InstallError", "install_helper", "main"]

PROGRAM = "nydus-overlayfs"
_PACKAGE = "overlayfs_helper"
_MODULES = ("__init__.py", "cli.py", "errors.py", "mounting.py", "options.py")
_SYSTEM_PYTHON = Path("/usr/bin/python3")
_CHECK = "import sys, ctypes; sys.exit(sys.version_info < (3, 11))"
# The kernel reads 256 bytes of the first line.
_FIRST_LINE_BYTES = 255
_KEPT = 2

# It ends without the interpreter's clean-up, which would take as long as the mount.
_SCRIPT = """\
#!{python} -IS
# nydus-overlayfs {version}, written by overlayfs_helper.install
import os
import sys

sys.path.append({library!r})

from overlayfs_helper.cli import main

os._exit(main(None, {version!r}))
"""


class InstallError(Exception):
    """Why the helper is not installed."""


def _usable(python: Path) -> bool:
    try:
        done = subprocess.run([python, "-I", "-S", "-c", _CHECK], check=False, timeout=60)
    except OSError:
        return False
    return done.returncode == 0


def _choose_python(wanted: Path | None) -> Path:
    """Return the interpreter for the first line: the system's outlives virtual environments."""
    base = Path(getattr(sys, "_base_executable", sys.executable))
    for candidate in (wanted,) if wanted else (_SYSTEM_PYTHON, base):
        path = candidate.absolute()
        if not _usable(path):
            continue
        line = f"#!{path} -IS"
        if " " in str(path) or len(os.fsencode(line)) > _FIRST_LINE_BYTES:
            raise InstallError(f"{path}: a program's first line cannot name this interpreter")
        return path
    raise InstallError(f"{wanted or _SYSTEM_PYTHON}: Python 3.11 or later with ctypes is needed")


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file that appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _relink(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    temporary.symlink_to(target)
    temporary.rename(path)


def _put_modules(top: Path, python: Path) -> str:
    """Put the modules into a directory below `top`; return its name."""
    sources = {name: Path(__file__).with_name(name).read_bytes() for name in _MODULES}
    digest = hashlib.sha256()
    for name, content in sources.items():
        digest.update(b"%s %d\n" % (name.encode(), len(content)) + content)
    final = top / digest.hexdigest()[:16]
    if final.is_dir():
        # Perhaps for another interpreter.
        _compile(final, python)
    else:
        top.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=top, prefix=".part-") as part:
            made = Path(part, final.name)
            for name, content in sources.items():
                _replace(made / _PACKAGE / name, content, 0o644)
            _compile(made, python)
            made.rename(final)
    return final.name


def _compile(directory: Path, python: Path) -> None:
    # The directory's name stands for its content: nothing has to be compared at each start.
    words = ["-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", str(directory)]
    done = subprocess.run(
        [python, "-I", *words], check=False, capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        raise InstallError(f"cannot compile the helper: {(done.stdout + done.stderr).strip()}")


def _forget_old(top: Path) -> None:
    """Remove all versions but the last ones; the one before may just be starting."""
    versions = sorted(top.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for version in versions[_KEPT:]:
        shutil.rmtree(version)


def install_helper(
    prefix: Path, mount_directory: Path, destination: Path = Path("/"), python: Path | None = None
) -> Path:
    """Install the helper and return the path of the program.

    Args:
        prefix: `bin` and `lib` below it are used.
        mount_directory: where mount(8) looks for helpers, `/sbin`.
        destination: is put before all paths, for packages; the installed files do not name it.
        python: absolute path of the interpreter; else the system's, or the running one.

    Raises:
        InstallError: no interpreter is good enough.
        OSError: a file cannot be written.
    """
    chosen = _choose_python(python)
    library = prefix / "lib" / PROGRAM
    top = destination / library.relative_to("/")
    version = _put_modules(top, chosen)
    text = _SCRIPT.format(
        python=chosen, version=installed_version(), library=str(library / version)
    )
    program = prefix / "bin" / PROGRAM
    placed = destination / program.relative_to("/")
    _replace(placed, text.encode(), 0o755)
    link = destination / mount_directory.relative_to("/") / f"mount.{PROGRAM}"
    _relink(link, str(program))
    (top / version).touch()
    _forget_old(top)
    return placed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m overlayfs_helper.install", description="Install nydus-overlayfs."
    )
    parser.add_argument("--prefix", type=Path, default=Path("/usr/local"), metavar="DIR")
    parser.add_argument(
        "--mount-dir", type=Path, default=Path("/sbin"), metavar="DIR",
        help="where mount(8) looks for helpers",
    )  # fmt: skip
    parser.add_argument(
        "--destdir", type=Path, default=Path("/"), metavar="DIR",
        help="put before all paths, for packages",
    )  # fmt: skip
    parser.add_argument("--python", type=Path, metavar="PATH", help="interpreter of the helper")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    # Whoever mounts in a namespace of its own has to be able to read it.
    os.umask(0o022)
    try:
        program = install_helper(
            arguments.prefix.absolute(),
            arguments.mount_dir.absolute(),
            arguments.destdir.absolute(),
            arguments.python,
        )
    except (InstallError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(program)
    return 0


if __name__ == "__main__":
    sys.exit(main())
