"""`kata volume make|show|check`: what is printed, and one line for everything that is wrong."""

import base64
import io
import json
import signal
import subprocess
import sys

import pytest

from kata import KataVirtualVolume, NydusExtraOptions, Profile
from kata.cli import main
from kata.show import masked

SECRET = "c2VjcmV0"
CONFIG = json.dumps(
    {
        "device": {
            "backend": {
                "type": "registry",
                "config": {
                    "host": "localhost",
                    "repo": "a",
                    "auth": SECRET,
                    "registry_token": SECRET,
                    "proxy": {
                        "url": f"http://user:{SECRET}@proxy:1/x",
                        "ping_url": f"http://p/?{SECRET}",
                    },
                    "mirrors": [{"host": f"http://m:{SECRET}@h", "headers": {"A": SECRET}}],
                },
            },
        },
        "retry": 5,
    }
)
# A bundle that is in the making when a signal comes.
ENDED = """
import os, sys, time
import kata.bundle
from kata.cli import main

def make_bundle(*words):
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)

kata.bundle.make_bundle = make_bundle
sys.exit(main(["bundle", ".", "-o", "x"]))
"""
ROOT = "823d4c80eb7d242c0b2fd2bb72b7c5f84e3f333e4ecc8f4fbc8b624dd138f153"


@pytest.fixture
def feed(monkeypatch):
    def set_input(text):
        data = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))

    return set_input


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(CONFIG)
    return str(path)


def run(*words):
    return main(["volume", *words])


def made(capsys, *words):
    assert run("make", *words) == 0, capsys.readouterr().err
    out, err = capsys.readouterr()
    assert err == ""
    return out.strip()


def assert_one_line(capsys, status):
    out, err = capsys.readouterr()
    assert status == 1
    assert out == ""
    assert err.startswith("Error: ")
    assert len(err.splitlines()) == 1
    assert SECRET not in err
    return err


def test_make_a_disk(capsys, tmp_path):
    label = f"608,311296,sha256:{ROOT}"
    (tmp_path / "label").write_text(label + "\n")
    for verity in (label, f"@{tmp_path}/label"):
        option = made(capsys, "image_raw_block", "--source", "/d.disk", "--verity", verity)
        volume = KataVirtualVolume.decode(option)
        assert (volume.fs_type, volume.options) == ("erofs", ("ro",))
        assert volume.dm_verity.root_hash == ROOT


def test_make_the_other_types(capsys, config):
    option = made(capsys, "image_guest_pull", "--source", "docker.io/x", "--metadata", "a=b=c")
    assert KataVirtualVolume.decode(option).image_pull.values == {"a": "b=c"}
    option = made(
        capsys, "direct_block", "--source", "/dev/sdb", "--fs-type", "ext4", "--option", "ro",
        "--option", "noatime", "--metadata", "a=1",
    )  # fmt: skip
    volume = KataVirtualVolume.decode(option)
    assert (volume.options, volume.direct_volume.values) == (("ro", "noatime"), {"a": "1"})
    words = ["--source", "/boot", "--fs-type", "rafsv6", "--config", config]
    option = made(capsys, "image_nydus_fs", *words, "--snapshot-dir", "/s")
    assert KataVirtualVolume.decode(option).nydus_image.config == CONFIG


def test_make_an_extraoption(capsys, tmp_path, config, feed):
    boot = tmp_path / "boot"
    boot.write_bytes(bytes(1024) + bytes.fromhex("e2e1f5e0") + bytes(380))
    words = ["extraoption", "--source", str(boot), "--snapshot-dir", "/s"]
    option = made(capsys, *words, "--config", config)
    assert NydusExtraOptions.decode(option, Profile.STRICT) == NydusExtraOptions(
        str(boot), CONFIG, "/s", "v6"
    )
    feed(CONFIG)
    assert made(capsys, *words, "--config", "-", "--fs-version", "v6") == option


@pytest.mark.parametrize(
    "words",
    [
        ("image_raw_block",),
        ("image_raw_block", "--source", "relative"),
        ("image_raw_block", "--source", "/a/../../etc/shadow"),
        ("image_raw_block", "--source", "/a", "--verity", "nonsense"),
        ("image_raw_block", "--source", "/a", "--verity", f"608,311296,sha256:{ROOT[:-2]}"),
        ("image_raw_block", "--source", "/a", "--verity", "@/nowhere"),
        ("image_nydus_fs", "--source", "/a", "--fs-type", "rafsv6"),
        ("image_guest_pull", "--metadata", "novalue"),
        ("direct_block", "--source", "/a", "--metadata", "=x"),
        ("extraoption", "--source", "/a"),
        ("extraoption", "--source", "/nowhere", "--config", "/dev/null", "--snapshot-dir", "/s"),
        ("extraoption", "--source", "/a", "--config", "/nowhere", "--snapshot-dir", "/s",
         "--fs-version", "v6"),
        ("extraoption", "--source", "/a", "--config", "/dev/null", "--snapshot-dir", "/s",
         "--fs-version", "v6"),
        ("extraoption", "--source", "/a", "--config", "/dev/zero", "--snapshot-dir", "/s",
         "--fs-version", "v6"),
    ],
)  # fmt: skip
def test_make_what_cannot_be(capsys, words):
    assert_one_line(capsys, run("make", *words))


@pytest.mark.parametrize("words", [(), ("make",), ("make", "unknown_type"), ("show",), ("check",)])
def test_usage(capsys, words):
    with pytest.raises(SystemExit) as caught:
        run(*words)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.fixture
def option():
    return NydusExtraOptions("/boot", CONFIG, "/s").encode()


def test_show_hides_secrets(capsys, feed, option):
    feed(f"lowerdir=/a,{option},dev,suid\n")
    assert run("show", "-") == 0
    out = capsys.readouterr().out
    assert SECRET not in out
    (shown,) = json.loads(out)
    backend = shown["value"]["config"]["device"]["backend"]["config"]
    assert (backend["host"], backend["repo"], backend["auth"]) == ("localhost", "a", "***")
    assert backend["proxy"] == {"url": "http://***proxy:1/x", "ping_url": "http://p/***"}
    assert backend["mirrors"] == [{"host": "http://***h", "headers": {"A": "***"}}]
    assert shown["value"]["config"]["retry"] == 5


def test_show_reveals_when_told(capsys, feed, option):
    feed(option)
    assert run("show", "--reveal", "-") == 0
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["value"]["config"] == CONFIG


def test_masks_of_labels_and_of_what_is_no_json():
    label = "containerd.io/snapshot/pullsecret"
    value = {"options": [f"{label}={SECRET}", "ro"], "image_pull": {"metadata": {label: SECRET}}}
    assert SECRET not in json.dumps(masked(value))
    assert masked({"config": f"auth: {SECRET}"}) == {"config": "***"}
    assert masked({"passwords": [SECRET, {"x": SECRET, "y": 7}]}) == {
        "passwords": ["***", {"x": "***", "y": "***"}]
    }
    deep = {"a": SECRET}
    for _ in range(200):
        deep = {"a": deep}
    assert SECRET not in json.dumps(masked(deep))


def test_check_counts(capsys, feed, option):
    layer = "eyJ2b2x1bWVfdHlwZSI6ImltYWdlX2d1ZXN0X3B1bGwifQ=="
    text = json.dumps([{"Type": "x", "Options": [option, f"io.katacontainers.volume={layer}"]}])
    feed(text)
    assert run("check", "--profile", "lenient", "-") == 0
    assert capsys.readouterr().out == "2 right\n"
    feed(text)
    assert "option 2 of 2: image_guest_pull: source is empty" in assert_one_line(
        capsys, run("check", "-")
    )


UNKNOWN = base64.b64encode(b'{"volume_type":"image_magic","source":"/a"}').decode()
SHORT = base64.b64encode(
    b'{"volume_type":"image_raw_block","source":"/a","fs_type":"erofs","dm_verity":{"hashtype":'
    b'"sha256","hash":"ab","blocknum":1,"blocksize":4096,"hashsize":4096,"offset":4096}}'
).decode()
CLIMBING = base64.b64encode(
    b'{"volume_type":"image_raw_block","source":"/a/../b","fs_type":"erofs"}'
).decode()


@pytest.mark.parametrize("command", ["show", "check"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "neither"),
        ("lowerdir=/a", "neither"),
        ("extraoption=", "is empty"),
        (f"extraoption={SECRET}", "is not"),
        (f"io.katacontainers.volume={UNKNOWN[:-5]}", "base64"),
        (f"io.katacontainers.volume={UNKNOWN}", "volume_type is unknown"),
        (f"io.katacontainers.volume={SHORT}", "dm_verity.hash: expected 64 hex digits"),
        (f"io.katacontainers.volume={CLIMBING}", "source is not a plain path"),
        ("extraoption=" + "A" * (10 << 20), "too long"),
        ("extraoption=" + "A" * (2 << 20), "too long"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_what_cannot_be_used_is_one_line(capsys, feed, command, text, says):
    feed(text)
    assert says in assert_one_line(capsys, run(command, "-"))


def test_files(capsys, tmp_path, option):
    (tmp_path / "mounts").write_text(option)
    assert run("check", str(tmp_path / "mounts")) == 0
    capsys.readouterr()
    assert "No such file" in assert_one_line(capsys, run("check", str(tmp_path / "none")))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_bundle_that_is_ended(number, tmp_path):
    words = [sys.executable, "-c", ENDED, str(int(number))]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, timeout=60, check=False)
    assert done.returncode == 128 + number
    assert (done.stdout, done.stderr) == (b"", b"Error: interrupted, nothing was left behind\n")
