"""ACLs as text: the forms of GNU tar and libarchive, and what is none."""

import logging
import stat

import pytest

from builder.errors import TarError
from builder.taracl import UnknownNameError, parse_acl
from tests.unit.builder.test_tarstream import error_of, header, one, pax

# What setfacl made, and how GNU tar and bsdtar tell it.
ACCESS = bytes.fromhex(
    "0200000001000600ffffffff020004000000000002000700d204000004000400ffffffff080005002e160000"
    "10000700ffffffff20000400ffffffff"
)
GNU_ACCESS = (
    b"user::rw-\nuser:root:r--\nuser:1234:rwx\ngroup::r--\ngroup:5678:r-x\nmask::rwx\nother::r--\n"
)
BSD_ACCESS = (
    b"user::rw-,group::r--,other::r--,user:root:r--:0,user:1234:rwx,group:5678:r-x,mask::rwx"
)
DEFAULT = bytes.fromhex(
    "0200000001000700ffffffff020004006300000004000500ffffffff10000600ffffffff20000500ffffffff"
)
BSD_DEFAULT = b"user::rwx,user:99:r--,group::r-x,mask::rw-,other::r-x"


@pytest.mark.parametrize(
    "text",
    [
        GNU_ACCESS,
        BSD_ACCESS,
        b"u::rw-,g::r--,o:r--,user:someone:r--:0,u:x:rwx:1234,group:5678:r-x #effective:r-x,m:rwx",
    ],
)
def test_access(text):
    assert parse_acl(text) == (ACCESS, 0o674)


def test_default():
    assert parse_acl(BSD_DEFAULT) == (DEFAULT, 0o765)
    prefixed = b",".join(b"default:" + entry for entry in BSD_DEFAULT.split(b","))
    assert parse_acl(prefixed) == (DEFAULT, 0o765)


def test_what_a_mode_says():
    assert parse_acl(b"user::rw-,group::r--,other::---") == (None, 0o640)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"user::rw-",
        b"user::rw-,group::r--",
        b"user::rw-,group::r--,other::r--,user:5:r--",
        b"user::rw-,user::r--,group::r--,other::r--",
        b"user::rwz,group::r--,other::r--",
        b"user::rw,group::r--,other::r--",
        b"user::rw-,group::r--,other::r--,everyone@:r:allow",
        b"user::rw-,group::r--,other:me:r--",
        b"::,",
        b"\xff\xfe\n:::::",
    ],
)
def test_what_is_no_acl(text):
    with pytest.raises(TarError, match="ACL"):
        parse_acl(text)


@pytest.mark.parametrize("name", [b"lisa", b"4294967295", b"99999999999999", b"-1", b"\xff"])
def test_names_without_a_number(name):
    with pytest.raises(UnknownNameError):
        parse_acl(b"user::rw-,user:%s:r--,group::r--,mask::r--,other::r--" % name)


def test_of_members(caplog):
    file = one(pax((b"SCHILY.acl.access", BSD_ACCESS)) + header(mode=b"0104644\0"))
    assert file.xattrs == {b"system.posix_acl_access": ACCESS}
    # libarchive puts the rights of the group into the header, the kernel wants the mask.
    assert file.mode == 0o4674
    directory = one(pax((b"SCHILY.acl.default", BSD_DEFAULT)) + header(b"d/", b"5"))
    assert directory.xattrs == {b"system.posix_acl_default": DEFAULT}
    assert (directory.kind, directory.mode) == (stat.S_IFDIR, 0o644)
    both = (
        (b"SCHILY.acl.access", BSD_ACCESS),
        (b"SCHILY.xattr.system.posix_acl_access", b"as it is"),
    )
    assert one(pax(*both) + header()).xattrs == {b"system.posix_acl_access": b"as it is"}
    text = b"user::rw-,user:lisa:r--,group::r--,mask::r--,other::r--"
    with caplog.at_level(logging.WARNING):
        assert one(pax((b"SCHILY.acl.access", text)) + header(b"hers")).xattrs == {}
    assert "lisa" in caplog.text
    assert "hers" in caplog.text
    assert "ACL with an unknown entry" in error_of(pax((b"SCHILY.acl.access", b"x")) + header())
