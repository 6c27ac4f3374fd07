"""Large and deep trees, mounted by the kernel and compared entry by entry; most take minutes."""

import io
import subprocess
import tarfile

import pytest
from capabilities import requires
from judges import expected_tar
from serving import build_image

from builder import SourceType
from tests.integration.test_kernel_modes import judge, referring

pytestmark = [
    pytest.mark.root,
    pytest.mark.fanotify,
    pytest.mark.erofs_mount,
    requires("root", "erofs_mount", "fanotify"),
]

COUNT = 100_000
LEVELS = 64


def tar_of(path, names, content):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        directories = set()
        for number, name in enumerate(names):
            parent = name.rpartition("/")[0]
            if parent and parent not in directories:
                directories.add(parent)
                info = tarfile.TarInfo(parent)
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            info = tarfile.TarInfo(name)
            data = content(number)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", [SourceType.TAR, SourceType.TARFS])
def test_paths_of_64_levels(serving, kind):
    """As deep as paths of 4096 bytes can be with names of 60."""
    names = []
    path = ""
    for level in range(LEVELS):
        path += f"{level:02d}{'d' * 58}/"
        names.append(f"{path}file")
    tar = tar_of(serving.directory / "deep.tar", names, lambda number: b"%d" % number * 400)
    if kind is SourceType.TARFS:
        image = referring(tar, serving.directory / "image", kind)
    else:
        image = build_image(tar, serving.directory / "image")
    expected = expected_tar(tar, serving.directory / "expected")
    judge(serving, image, expected)
    assert max(name.count(b"/") for name in expected) == LEVELS + 1


LARGE = {
    "many small files": [f"{n % 100}/{n // 100 % 10}/file {n}" for n in range(COUNT)],
    "one directory": [f"directory/{n:x} {'n' * (n % 30)}" for n in range(COUNT)],
}


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", LARGE)
@pytest.mark.parametrize("kind", [SourceType.TAR, SourceType.TARFS])
def test_large_trees(serving, case, kind):
    serving.patience = 600
    tar = tar_of(
        serving.directory / "large.tar", LARGE[case], lambda number: b"%07d\n" % number * 128
    )
    if kind is SourceType.TARFS:
        image = referring(tar, serving.directory / "image", kind)
    else:
        image = build_image(tar, serving.directory / "image")
    expected = expected_tar(tar, serving.directory / "expected")
    # Python would take a minute for it.
    subprocess.run(["rm", "-rf", serving.directory / "expected"], check=True)
    assert len(expected) > COUNT
    judge(serving, image, expected)
