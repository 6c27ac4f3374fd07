"""Bytes of the cachefiles protocol, names in its cache, and what each kernel is told."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fscache.cachefiles.errors import CachefilesError
from fscache.cachefiles.names import (
    cached_file,
    check_name,
    cookie_hash,
    scope_of,
    volume_hash,
    volume_key,
)
from fscache.cachefiles.protocol import (
    CREAD,
    NO_OBJECT,
    BadMessage,
    Close,
    Open,
    Read,
    command,
    copen,
    parse_message,
)
from fscache.cachefiles.support import dead_mounts, unsafe_kernel
from fscache.mounts.mountinfo import parse_mountinfo
from fscache.protocol import ProtocolError

# Of spec ondemand 1.6, the first one as a kernel sent it.
SAMPLES = [
    (
        "00000000 00000000 31000000 01000000 0c000000 05000000 04000000 00000000"
        + b"erofs,boot1\0boot1".hex(),
        Open(0, 1, 4, b"erofs,boot1", b"boot1"),
    ),
    (
        "01000000 02000000 20000000 01000000 0010000000000000 0000010000000000",
        Read(1, 1, 4096, 65536),
    ),
    ("02000000 01000000 10000000 01000000", Close(2, 1)),
    ("02000000 01000000 10000000 ffffffff", Close(2, NO_OBJECT)),
]
OPEN = Open(9, 1, 77, b"erofs,d", b"c")
OPEN_ALONE = OPEN._replace(volume_key=b"", cookie_key=b"")
U32 = st.integers(0, (1 << 32) - 1)


@pytest.mark.parametrize(("text", "message"), SAMPLES)
def test_samples(text, message):
    raw = bytes.fromhex(text)
    assert parse_message(raw) == message
    assert message.pack() == raw


@given(U32, U32, st.integers(0, 1 << 20), st.binary(max_size=200), st.binary(max_size=252))
def test_open_there_and_back(msg_id, object_id, fd, volume, cookie):
    message = Open(msg_id, object_id, fd, b"erofs," + volume.rstrip(b"\0"), cookie)
    assert parse_message(message.pack()) == message


@given(st.binary(max_size=80))
def test_any_bytes_parse_or_are_refused(raw):
    try:
        message = parse_message(raw)
    except BadMessage:
        return
    # Flags, and further zeros at the end of a volume key, are not kept.
    assert parse_message(message.pack()) == message


@given(st.sampled_from([message for _, message in SAMPLES]), st.integers(0, 60), st.binary())
def test_wrong_lengths_are_refused(message, cut, more):
    raw = message.pack()
    for wrong in (raw[: max(0, len(raw) - 1 - cut)], raw + b"x" + more):
        with pytest.raises(BadMessage):
            parse_message(wrong)


@pytest.mark.parametrize(
    ("spoil", "text", "refusable"),
    [
        (lambda raw: raw + b"x", "wrong length", OPEN_ALONE),
        (lambda raw: raw[:39] + b"x" + raw[40:], "without its end", OPEN_ALONE),
        (
            lambda raw: raw[:24] + b"\xff" * 4 + raw[28:],
            "without a desc",
            OPEN_ALONE._replace(fd=-1),
        ),
        (lambda raw: raw[:30], "truncated OPEN", OPEN_ALONE._replace(fd=-1)),
        (lambda raw: raw[:4] + b"\2" + raw[5:], "wrong length", Read(9, 1, 0, 0)),
        (lambda raw: raw[:4] + b"\1" + raw[5:], "wrong length", None),
        (lambda raw: raw[:4] + b"\3" + raw[5:], "unknown opcode", None),
        (lambda raw: raw[:15], "truncated message", None),
    ],
)
def test_what_can_be_refused_of_a_bad_message(spoil, text, refusable):
    with pytest.raises(BadMessage, match=text) as failure:
        parse_message(spoil(OPEN.pack()))
    assert failure.value.refusable == refusable


def test_commands():
    assert CREAD == 0x40049801
    assert command("restore") == b"restore"
    assert command("dir", b"/a b") == b"dir /a b"
    assert copen(0, 8192) == b"copen 0,8192"
    assert copen(4_000_000_000, -2) == b"copen 4000000000,-2"
    assert copen(1, (1 << 63) - 1)
    for wrong in (b"/a\n", b"/a\0", b"x" * 4092):
        with pytest.raises(ProtocolError):
            command("dir", wrong)
    for wrong in (-4096, 1 << 63):
        with pytest.raises(ProtocolError):
            copen(1, wrong)


@pytest.mark.parametrize(
    ("scope", "name", "hashes", "place"),
    [
        ("boot1", "boot1", (0x9B8B569A, 0xA2D6012C), "Ierofs,boot1/@2c/Dboot1"),
        ("boot1", "blob1", (0x9B8B569A, 0xA5707976), "Ierofs,boot1/@76/Dblob1"),
        ("dom0", "boot1", (0x4D680E2F, 0x6F329838), "Ierofs,dom0/@38/Dboot1"),
        ("dom0", "blob1", (0x4D680E2F, 0xDBE96226), "Ierofs,dom0/@26/Dblob1"),
        ("dom0", "boot1b", (0x4D680E2F, 0xAFA54D92), "Ierofs,dom0/@92/Dboot1b"),
    ],
)
def test_hashes_that_a_kernel_made(tmp_path, scope, name, hashes, place):
    key = volume_key(scope)
    assert (volume_hash(key), cookie_hash(key, name.encode())) == hashes
    assert cached_file(tmp_path, scope, name) == tmp_path / "cache" / place


def test_volumes():
    assert scope_of(volume_key("dom0")) == "dom0"
    assert scope_of(b"afs,x") is None


@pytest.mark.parametrize(
    "name", ["", "a b", "a,b", "a/b", "ä", "a\n", "x" * 249, "\udcff", ".", "..", "a\0b"]
)
def test_names_that_the_kernel_would_not_keep_as_they_are(name):
    with pytest.raises(CachefilesError, match="fsid cannot be a name"):
        check_name("fsid", name)


@pytest.mark.parametrize("name", ["a", "x" * 248, "sha256:abc", "~!#", "..."])
def test_names_that_can_be(name):
    assert check_name("fsid", name) == name


@pytest.mark.parametrize(
    ("release", "version", "safe"),
    [
        ("6.12.117-cloud", "#1 SMP PREEMPT_DYNAMIC", True),
        ("6.18.44", "#1", True),
        ("7.0.1", "#1", True),
        ("6.11.0", "#1", True),
        ("6.6.51", "#1", True),
        ("6.6.119-rt", "#1", True),
        ("6.6.50", "#1", False),
        ("6.10.14", "#1", False),
        ("6.1.0-28-amd64", "#1 SMP PREEMPT_DYNAMIC Debian 6.1.119-1 (2024-11-22)", False),
        ("6.12.0-1-amd64", "#1 SMP Debian 6.12.9-1 (2025-01-10)", True),
        ("5.19.0", "#1 SMP 2025-06-11.12", False),
        ("strange", "", True),
    ],
)
def test_kernels_with_known_holes(release, version, safe):
    assert (unsafe_kernel(release, version) == "") is safe


def test_debians_stable_release_is_told():
    warning = unsafe_kernel("6.1.0-28-amd64", "#1 SMP Debian 6.1.119-1 (2024-11-22)")
    assert warning.startswith("Linux 6.1.119: ")


def test_dead_mounts():
    lines = [
        "22 1 0:21 / /sys rw - sysfs sysfs rw",
        "90 1 0:50 / /mnt/a\\040b ro,relatime shared:1 - erofs none ro,fsid=x,user_xattr",
        "91 1 0:51 / /mnt/c ro - erofs none ro,user_xattr,domain_id=d,fsid=y",
        "92 1 0:52 / /mnt/d ro - erofs /boot ro,user_xattr",
    ]
    found = parse_mountinfo("\n".join(lines).encode())
    assert dead_mounts(found) == ["/mnt/a b", "/mnt/c"]
