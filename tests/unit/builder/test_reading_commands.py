"""The command lines of `check`, `inspect` and `unpack`, where fixtures do not reach."""

import io
import json
import sys
import tarfile

import pytest

from builder.cli import main
from erofs import open_bootstrap
from tests.fakes.blob_server import BlobServer
from tests.fakes.built import built, member, tar_of

TAR = tar_of(member("d", "dir"), member("d/f", data=b"x" * 5000), member("g", data=b"y"))


@pytest.fixture
def boot(tmp_path):
    return built(tmp_path, TAR)


@pytest.fixture
def blob(boot):
    return next(path for path in boot.parent.iterdir() if len(path.name) == 64)


def leave(arguments):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    return raised.value.code


def test_check_data(boot, blob, capsys):
    assert main(["check", str(boot), "-D", str(boot.parent), "--data"]) == 0
    assert "metadata is valid" in capsys.readouterr().out
    data = bytearray(blob.read_bytes())
    data[3] ^= 1
    blob.write_bytes(data)
    assert main(["check", str(boot), "-D", str(boot.parent)]) == 0
    capsys.readouterr()
    assert main(["check", str(boot), "-D", str(boot.parent), "--data"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert errors
    assert all(line.startswith(f"Error: blob {blob.name}: ") for line in errors)
    assert "chunk 0" in err


def test_check_data_without_the_blob(boot, blob, capsys):
    blob.unlink()
    assert main(["check", str(boot), "-D", str(boot.parent), "--data"]) == 1
    assert f"Error: blob {blob.name}: no such blob\n" in capsys.readouterr().err


def test_check_data_needs_a_directory(boot, capsys):
    assert leave(["check", str(boot), "--data"]) == 2
    assert "--blob-dir" in capsys.readouterr().err
    assert main(["check", str(boot), "-D", str(boot.parent / "nope"), "--data"]) == 1


def test_check_tells_every_error(boot, tmp_path, capsys):
    data = bytearray(boot.read_bytes())
    with open_bootstrap(boot) as image:
        table = image.extended.chunk_table_offset
    # The first digest: the chunk table is no longer sorted.
    data[table] = 0xFF
    broken = tmp_path / "broken"
    broken.write_bytes(data)
    report = tmp_path / "report.json"
    assert main(["check", str(broken), "-J", str(report)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Error: " in err
    assert not report.exists()


def test_check_report_and_names_of_the_argument(boot, tmp_path, capsys):
    report = tmp_path / "report.json"
    assert main(["check", "-B", str(boot), "-J", str(report)]) == 0
    assert json.loads(report.read_text())["bootstrap"] == str(boot)
    for words in (["check"], ["inspect"], ["check", "-B", str(boot), str(boot)]):
        with pytest.raises(SystemExit) as raised:
            main(words)
        assert raised.value.code == 2
        assert "BOOTSTRAP" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_not_a_bootstrap(command, tmp_path, capsys):
    (tmp_path / "empty").touch()
    for path in (tmp_path / "empty", tmp_path, tmp_path / "nope"):
        assert main([command, str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        # A thread of another test may have logged something before.
        assert err.splitlines()[-1].startswith("Error: ")


def shell(boot, monkeypatch, stdin):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    return main(["inspect", str(boot)])


def test_end_of_input_ends_the_shell(boot, monkeypatch, capsys):
    assert shell(boot, monkeypatch, b"\n  \ncd d\nls") == 0
    out = capsys.readouterr().out
    assert out.count("Inspecting RAFS :> ") == 5
    assert '"f"' in out
    assert out.endswith("Inspecting RAFS :> \n")


def test_errors_do_not_end_the_shell(boot, monkeypatch, capsys):
    assert shell(boot, monkeypatch, b"icheck x\nstat \xff\nstat g\nexit\nls\n") == 0
    out, err = capsys.readouterr()
    assert "Error: Wrong INODE is specified. Is it a inode number?\n" in err
    assert "Error: entry \\xff: no such file here\n" in err
    assert 'Name:               "g"' in out
    assert '"d"' not in out


def test_interrupt_ends_the_shell(boot, monkeypatch, capsys):
    def interrupt(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert main(["inspect", str(boot)]) == 0
    assert capsys.readouterr().out == "\n"


def test_request_for_what_is_not_there_fails(boot, capsys):
    assert main(["inspect", str(boot), "-R", "stat nope"]) == 1
    assert main(["inspect", str(boot), "-R", "chunk x"]) == 1
    assert main(["inspect", str(boot), "-R", "leave"]) == 1
    assert "unsupported inspect request `leave`" in capsys.readouterr().err


@pytest.mark.parametrize("request_line", ["exit", "q", "", " "])
def test_request_to_leave_is_answered_as_by_the_real_tool(boot, capsys, request_line):
    assert main(["inspect", str(boot), "-R", request_line]) == 0
    assert capsys.readouterr().out == "null"


def test_unpack_over_http(boot, blob, tmp_path):
    config = tmp_path / "backend.json"
    with BlobServer({blob.name: blob.read_bytes()}) as server:
        config.write_text(json.dumps({"addr": server.address}))
        arguments = ["unpack", str(boot), "--backend-type", "http-proxy"]
        for extra in (["--backend-config", config.read_text()],
                      ["--backend-config-file", str(config)]):  # fmt: skip
            output = tmp_path / f"{len(extra[0])}.tar"
            assert main([*arguments, *extra, "--output", str(output)]) == 0
            with tarfile.open(output) as archive:
                assert archive.extractfile("d/f").read() == b"x" * 5000


def test_unpack_words(boot, blob, tmp_path, capsys):
    output = ["--output", str(tmp_path / "o.tar")]
    start = ["unpack", str(boot)]
    assert leave([*start, "-b", str(blob)]) == 2
    assert leave([*start, "-b", str(blob), "-D", str(tmp_path), *output]) == 2
    assert leave([*start, "--backend-type", "localfs", "--backend-config", "{}", *output]) == 2
    assert leave([*start, "--backend-type", "http-proxy", *output]) == 2
    assert main([*start, "--backend-type", "localdisk", "--backend-config", "{}", *output]) == 1
    assert "device_path: missing" in capsys.readouterr().err
    assert main([*start, "--backend-type", "http-proxy", "--backend-config", "{", *output]) == 1
    assert main([*start, *output]) == 1
    assert not (tmp_path / "o.tar").exists()


def test_unpack_to_standard_output(boot, blob, capfdbinary):
    assert main(["unpack", str(boot), "-b", str(blob), "--output", "-"]) == 0
    with tarfile.open(fileobj=io.BytesIO(capfdbinary.readouterr().out)) as archive:
        assert archive.getnames() == ["d", "g", "d/f"]
