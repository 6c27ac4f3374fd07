import pytest

from builder.bootstrap import blob_ids
from builder.inspect import Answer, InspectError, Inspector
from builder.prefetch import PrefetchPolicy
from erofs import open_bootstrap
from tests.fakes.built import built, member, tar_of


@pytest.fixture
def image(tmp_path):
    path = built(
        tmp_path,
        tar_of(
            member("d", "dir", mtime=3),
            member("d/e", "dir"),
            member("d/e/f", data=b"x" * 5000, mtime=-1),
            member("d/e/with space", data=b"y"),
            member("p", "fifo"),
            member("s", "symlink", linkname="d"),
            member("z", "link", linkname="d/e/f", mtime=-1),
        ),
        prefetch_policy=PrefetchPolicy.FS,
        prefetch_patterns=[b"/d/e", b"/z"],
    )
    with open_bootstrap(path) as opened:
        yield opened


@pytest.fixture
def inspector(image, tmp_path):
    return Inspector(image, blob_ids(image, tmp_path / "boot"))


def ask(inspector, command, argument=b""):
    answer = inspector.execute(command, argument)
    assert answer is not None
    return answer


def names(answer):
    return [line.split()[-1].strip('"') for line in answer.text.splitlines()]


def test_walking_around(inspector):
    assert names(ask(inspector, b"ls")) == ["d", "p", "s", "z"]
    assert [line[0] for line in ask(inspector, b"ls").text.splitlines()] == ["d", " ", "l", "-"]
    for name in (b"d", b".", b"e"):
        assert ask(inspector, b"cd", name) == Answer()
    assert names(ask(inspector, b"ls")) == ["f", "space"]
    for _ in range(5):
        ask(inspector, b"cd", b"..")
    assert names(ask(inspector, b"ls")) == ["d", "p", "s", "z"]


def test_cd_to_what_is_no_directory(inspector):
    assert ask(inspector, b"cd", b"nope").text == "nope is \n"
    assert ask(inspector, b"cd", b"s").text == "s is not a directory\n"
    assert names(ask(inspector, b"ls")) == ["d", "p", "s", "z"]


def test_stat(inspector, image):
    nids = {path: inode.nid for path, inode in image.walk()}
    ask(inspector, b"cd", b"d")
    ask(inspector, b"cd", b"e")
    text = ask(inspector, b"stat", b"f").text
    assert f"Inode Number:       {nids[b'/d/e/f']}\n" in text
    assert f"Parent:             {nids[b'/d/e']}\n" in text
    assert f"Mtime:              {2**64 - 1}\n" in text
    assert "Nlink:              2\n" in text
    assert "        1 ->\n        file offset: 4096, chunk index: 1\n" in text
    assert 'Name:               "with space"\n' in ask(inspector, b"stat", b"with space").text
    here, above = ask(inspector, b"stat", b"."), ask(inspector, b"stat", b"..")
    assert f'{nids[b"/d/e"]}\nName:               "e"\n' in here.text
    assert f"Parent:             {nids[b'/d']}\n" in here.text
    assert f'{nids[b"/d"]}\nName:               "d"\n' in above.text
    with pytest.raises(InspectError, match="no such file"):
        ask(inspector, b"stat", b"nope")


def test_stat_of_the_root(inspector, image):
    text = ask(inspector, b"stat", b".").text
    assert text == ask(inspector, b"stat", b"..").text
    assert 'Name:               "/"\n' in text
    assert f"Parent:             {image.root.nid}\n" in text


def test_prefetch_tells_every_path(inspector, image):
    nids = {path: inode.nid for path, inode in image.walk()}
    answer = ask(inspector, b"prefetch")
    assert answer.value == [
        {"inode": nids[b"/d/e"], "path": ["/d/e/"]},
        {"inode": nids[b"/z"], "path": ["/d/e/f", "/z"]},
    ]
    assert answer.text.splitlines() == [
        "Total Prefetching Files: 2",
        f'Inode Number:{nids[b"/d/e"]:10} | Path: "/d/e/" ',
        f'Inode Number:{nids[b"/z"]:10} | Path: "/d/e/f /z" ',
    ]


def test_chunk_names_every_file(inspector, image):
    offset = next(image.file_chunks(image.lookup(b"/z"))).compressed_offset
    lines = ask(inspector, b"chunk", b"%d" % offset).text.splitlines()
    files = [line.split() for line in lines if line.startswith("File: ")]
    assert files == [
        ["File:", "f", "Parent", "Path:", "/d/e/"],
        ["File:", "z", "Parent", "Path:", "/"],
    ]
    assert ask(inspector, b"chunk", b"99999") == Answer()


def test_icheck_tells_every_path_with_its_parent(inspector, image):
    nids = {path: inode.nid for path, inode in image.walk()}
    text = ask(inspector, b"icheck", b"%d" % nids[b"/z"]).text
    assert text.startswith("/d/e/f\n\nInode Number:")
    assert "\n/z\n\nInode Number:" in text
    assert f"Parent:             {nids[b'/d/e']}\n" in text
    assert f"Parent:             {image.root.nid}\n" in text
    assert ask(inspector, b"icheck", b"%d" % image.root.nid).text == "/\n"
    with pytest.raises(InspectError, match="no inode of this number"):
        ask(inspector, b"icheck", b"1")


@pytest.mark.parametrize("command", [b"icheck", b"chunk"])
@pytest.mark.parametrize("argument", [b"x", b"-1", b"1 2", b"9" * 5000, "²".encode()])
def test_arguments_that_are_no_numbers(inspector, command, argument):
    with pytest.raises(InspectError, match="Wrong"):
        ask(inspector, command, argument)


@pytest.mark.parametrize(
    ("command", "argument"),
    [(b"bogus", b""), (b"stat", b""), (b"cd", b""), (b"ls", b"x"), (b"stats", b"x"), (b"", b"")],
)
def test_unknown_commands_and_forms(inspector, command, argument):
    assert inspector.execute(command, argument) is None
