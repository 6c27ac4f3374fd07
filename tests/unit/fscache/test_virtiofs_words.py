"""`nydusd virtiofs` without privilege: its words, and what it needs of the system."""

import shutil
import socket

import pytest

from fscache.cli import nydusd as cli
from fscache.cli.virtiofs import TREE
from fscache.entry import NodeOptions
from fscache.virtiofs import VirtiofsDaemon, VirtiofsError, enter_private_tree, find_virtiofsd


def options_of(monkeypatch, *words):
    """Return what the command line makes of words, without starting anything."""
    seen = []

    def serve(arguments):
        seen.append((arguments.options(arguments), arguments.sock))
        return 0

    monkeypatch.setattr(cli, "_serve", serve)
    assert cli.main(["virtiofs", "--rlimit-nofile", "0", *map(str, words)]) == 0
    return seen[0]


@pytest.mark.parametrize(
    "words",
    [
        ("virtiofs", "--log-level", "info", "--apisock", "a", "--sock", "s"),
        ("virtiofs", "--hybrid-mode", "--log-level", "debug", "--apisock", "a", "--sock", "s"),
        ("virtiofs", "--sock", "s", "--thread-pool-size=1", "--announce-submounts"),
    ],
    ids=["kata-go", "kata-rs", "virtiofsd-words"],
)
def test_command_lines_of_the_runtimes(monkeypatch, words):
    options, sock = options_of(monkeypatch, *words[1:])
    assert str(sock) == "s"
    assert options.mountpoint == TREE
    # The guest writes, and sees what the runtime mounts later; nobody waits for a successor.
    assert (options.writable, options.follow, options.holder) == (True, True, False)


def test_words_that_fuse_has_too(monkeypatch, tmp_path):
    options, _ = options_of(
        monkeypatch, "--sock", "s", "-B", "boot", "-D", tmp_path, "-m", "/a/b", "--eager"
    )
    assert (str(options.bootstrap), options.virtual, str(options.transport)) == (
        "boot", "/a/b", "eager"
    )  # fmt: skip


def test_without_a_socket(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["virtiofs"])
    assert caught.value.code == 2
    assert "--sock" in capsys.readouterr().err


def test_programs_that_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(VirtiofsError, match="virtiofsd is not installed"):
        find_virtiofsd()
    daemon = VirtiofsDaemon(NodeOptions(tmp_path), tmp_path / "s")
    with pytest.raises(VirtiofsError, match="setpriv is not installed"):
        daemon.start()
    assert not (tmp_path / "s").exists()


def test_a_socket_that_somebody_serves(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: "/bin/false")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "s"))
        other.listen()
        daemon = VirtiofsDaemon(NodeOptions(tmp_path), tmp_path / "s")
        with pytest.raises(VirtiofsError, match="another process serves this socket"):
            daemon.start()
    # It is the other's.
    assert (tmp_path / "s").exists()


def test_a_tree_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(VirtiofsError, match="no mount namespace of its own"):
        enter_private_tree(tmp_path / "file/tree")
