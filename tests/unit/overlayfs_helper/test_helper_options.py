"""Arguments and options of nydus-overlayfs: no mount is made here."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overlayfs_helper import main
from overlayfs_helper.errors import HelperError, shown
from overlayfs_helper.options import (
    MAX_OPTIONS_BYTES,
    parse_arguments,
    parse_options,
    split_escaped,
)

LOWER = b"lowerdir=/a:/b"


def options_of(*words):
    return parse_arguments([b"overlay", b"/t", *words]).options


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((b"-o", b"a,b"), b"a,b"),
        ((b"-o", b"a", b"-o", b"b"), b"a,b"),
        ((b"-oa",), b"a"),
        ((b"-s", b"-f", b"-n", b"-v", b"-o", b"a", b"-t", b"fuse.x", b"-N", b"/n"), b"a"),
        ((b"-sfnv", b"-o", b"a"), b"a"),
        ((b"-o", b"", b"-o", b"a"), b",a"),
        ((b"-o", b"-t"), b"-t"),
    ],
)
def test_options_of_all_callers(words, expected):
    assert options_of(*words) == expected


def test_switches():
    call = parse_arguments([b"overlay", b"/t", b"-fv", b"-N", b"/proc/1/ns/mnt", b"-o", b"a"])
    assert (call.target, call.fake, call.verbose) == (b"/t", True, True)
    assert call.namespace == b"/proc/1/ns/mnt"
    plain = parse_arguments([b"overlay", b"/t", b"-o", b"a"])
    assert (plain.fake, plain.verbose, plain.namespace) == (False, False, None)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "got 0 arguments"),
        ([b"overlay"], "got 1 arguments"),
        ([b"overlay", b"/t", b"/more", b"-o", b"a"], "got 3 arguments"),
        ([b"none", b"/t", b"-o", b"a"], "got none"),
        ([b"overlay", b"", b"-o", b"a"], "directory is empty"),
        ([b"overlay", b"/t"], "no options"),
        ([b"overlay", b"/t", b"-o", b",,"], "no options"),
        ([b"overlay", b"/t", b"-o"], "-o needs a value"),
        ([b"overlay", b"/t", b"-x", b"-o", b"a"], "unknown switch -x"),
        ([b"overlay", b"/t", b"-", b"-o", b"a"], "unknown switch -"),
        ([b"overlay", b"/t", b"--bad\n", b"-o", b"a"], "unknown switch --bad\\n"),
    ],
)
def test_bad_calls(words, says):
    with pytest.raises(HelperError) as caught:
        parse_arguments(words)
    assert says in str(caught.value)
    assert caught.value.status == 1


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        (b"", 0),
        (b"defaults", 0),
        (b"ro", 1),
        (b"ro,rw", 0),
        (b"rw,ro", 1),
        (b"nosuid,nodev,noexec", 14),
        (b"nosuid,nodev,noexec,dev,suid,exec", 0),
        (b"sync", 16),
        (b"sync,async", 0),
        (b"remount", 32),
        (b"mand", 64),
        (b"mand,nomand", 0),
        (b"dirsync", 128),
        (b"nosymfollow", 256),
        (b"nosymfollow,symfollow", 0),
        (b"noatime,nodiratime", 0xC00),
        (b"noatime,nodiratime,atime,diratime", 0),
        (b"bind", 0x1000),
        (b"rbind", 0x5000),
        (b"relatime,strictatime,lazytime", 0x3200000),
        (b"relatime,norelatime,strictatime,nostrictatime,lazytime,nolazytime", 0),
    ],
)
def test_flag_table(text, flags):
    assert parse_options(LOWER + b"," + text) == (flags, [LOWER])


def test_what_is_dropped_and_what_stays():
    text = (
        b"extraoption=AA==,workdir=/w,,io.katacontainers.volume=AA==,user,x-a.b=c,X-d,_netdev,"
        b"nofail,comment=e,index=off,volatile,extraoption=,upperdir=/u,"
    )
    data = [b"workdir=/w", b"index=off", b"volatile", b"upperdir=/u", LOWER]
    assert parse_options(text + b"," + LOWER) == (0, data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"extraoption=c2VjcmV0", "no option names a lower directory"),
        (b"upperdir=/u,workdir=/w,dev,suid", "no option names a lower directory"),
        (LOWER + b",X-containerd.mkdir.path=/c2VjcmV0", "X-containerd.mkdir.path: an option for"),
        (LOWER + b",uidmap=c2VjcmV0", "uidmap: containerd"),
        (LOWER + b",gidmap=c2VjcmV0", "gidmap: containerd"),
        (LOWER + b",loop", "loop: an overlay"),
        (LOWER + b",extraoption=" + b"c2VjcmV0" * (MAX_OPTIONS_BYTES // 8), "bytes of options"),
    ],
)
def test_refused_options(text, says):
    with pytest.raises(HelperError) as caught:
        parse_options(text)
    assert says in str(caught.value)
    assert "c2VjcmV0" not in str(caught.value)
    assert caught.value.status == 1


def test_a_remount_needs_no_layers():
    assert parse_options(b"remount,ro") == (33, [])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        (b"a,b", [b"a", b"b"]),
        (b"a\\,b,c", [b"a\\,b", b"c"]),
        (b"a\\\\,b", [b"a\\\\", b"b"]),
        (b"a\\\\\\,b", [b"a\\\\\\,b"]),
        (b"a\\", [b"a\\"]),
        (b"\\,\\,", [b"\\,\\,"]),
        (b"", [b""]),
        (b",", [b"", b""]),
    ],
)
def test_only_plain_separators_split(text, pieces):
    assert split_escaped(text, b",") == pieces


@given(st.lists(st.binary(max_size=8), min_size=1))
def test_split_undoes_escape_and_join(names):
    escaped = [name.replace(b"\\", b"\\\\").replace(b",", b"\\,") for name in names]
    assert split_escaped(b",".join(escaped), b",") == escaped


@given(st.lists(st.binary(max_size=30)))
def test_any_call_is_decoded_or_refused(words):
    said = ""
    try:
        parse_options(parse_arguments([b"overlay", b"/t", *words]).options)
    except HelperError as error:
        said = str(error)
    assert "\n" not in said


def test_shown_is_one_short_line():
    assert shown(b"a\nb\xff") == "a\\nb\\xff"
    assert len(shown(b"a" * 10_000)) < 300


@pytest.mark.parametrize("word", ["--help", "-h", "--version", "-V"])
def test_help_and_version(word, capfd):
    assert main([word]) == 0
    out, err = capfd.readouterr()
    assert "nydus-overlayfs" in out
    assert err == ""


def test_a_refusal_is_one_line(capfd):
    assert main(["overlay", "/t\n", "-o", "extraoption=c2VjcmV0"]) == 1
    assert capfd.readouterr().err == "nydus-overlayfs: no option names a lower directory\n"


def test_verbose_shows_what_the_kernel_gets(capfd):
    words = ["overlay", "/t", "-fv", "-o", "lowerdir=/a:/b,extraoption=c2VjcmV0,ro"]
    assert main(words) == 0
    assert capfd.readouterr().err == "nydus-overlayfs: overlay on /t, flags 0x1, lowerdir=/a:/b\n"
