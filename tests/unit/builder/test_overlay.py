"""Laying trees over each other: whiteouts of each kind, type changes, order."""

import stat

import pytest

from builder.overlay import apply_layer
from builder.source.options import WhiteoutSpec
from erofs import Node


def tree(**names):
    root = Node.directory()
    for name, value in names.items():
        root.entries[name.encode()] = value
    return root


def file(size=0):
    return Node(stat.S_IFREG | 0o644, size=size)


def names(node):
    return {
        name.decode(): names(child) if child.is_dir else child.size
        for name, child in node.entries.items()
    }


def mark(root, name):
    root.entries[name.encode()] = file()
    return root


def test_upper_replaces_and_adds():
    lower = tree(a=file(1), b=file(2), d=tree(x=file(3)))
    upper = tree(b=file(20), c=file(30), d=tree(y=file(4)))
    assert names(apply_layer(lower, upper)) == {
        "a": 1, "b": 20, "c": 30, "d": {"x": 3, "y": 4},
    }  # fmt: skip


def test_upper_attributes_win():
    lower, upper = tree(d=Node.directory(0o700)), tree(d=Node.directory(0o711))
    upper.mtime = 5
    merged = apply_layer(lower, upper)
    assert merged.mtime == 5
    assert stat.S_IMODE(merged.entries[b"d"].mode) == 0o711


def test_oci_whiteouts_of_files_directories_and_nothing():
    lower = tree(f=file(1), d=tree(x=file(1)), kept=file(9))
    upper = tree()
    for name in (".wh.f", ".wh.d", ".wh.absent"):
        mark(upper, name)
    assert names(apply_layer(lower, upper)) == {"kept": 9}


def test_whiteout_and_new_entry_of_the_same_name():
    lower = tree(d=tree(old=file(1)))
    upper = mark(tree(d=tree(new=file(2))), ".wh.d")
    assert names(apply_layer(lower, upper)) == {"d": {"new": 2}}


def test_opaque_directory():
    lower = tree(d=tree(old=file(1), sub=tree(x=file(1))))
    upper = tree(d=mark(tree(new=file(2)), ".wh..wh..opq"))
    assert names(apply_layer(lower, upper)) == {"d": {"new": 2}}


def test_type_changes():
    lower = tree(to_file=tree(x=file(1)), to_dir=file(1))
    upper = tree(to_file=file(7), to_dir=tree(y=file(8)))
    assert names(apply_layer(lower, upper)) == {"to_file": 7, "to_dir": {"y": 8}}


def test_whiteouts_inside_new_directories_disappear():
    upper = tree(new=mark(mark(tree(f=file(1)), ".wh.gone"), ".wh..wh..opq"))
    assert names(apply_layer(tree(), upper)) == {"new": {"f": 1}}


def test_marks_in_the_lowest_layer_stay():
    lower = mark(tree(f=file(1)), ".wh.seen")
    assert names(apply_layer(lower, tree())) == {"f": 1, ".wh.seen": 0}


def test_none_keeps_everything():
    upper = mark(tree(), ".wh.f")
    merged = apply_layer(tree(f=file(1)), upper, WhiteoutSpec.NONE)
    assert names(merged) == {"f": 1, ".wh.f": 0}


def test_overlayfs_marks():
    lower = tree(f=file(1), d=tree(old=file(2)), e=tree(old=file(2)))
    opaque = tree(new=file(3))
    opaque.xattrs = {b"trusted.overlay.opaque": b"y"}
    upper = tree(f=Node(stat.S_IFCHR, rdev=0), d=opaque, e=tree())
    merged = apply_layer(lower, upper, WhiteoutSpec.OVERLAYFS)
    assert names(merged) == {"d": {"new": 3}, "e": {"old": 2}}
    assert merged.entries[b"d"].xattrs == {}


@pytest.mark.parametrize("depth", [5000])
def test_depth_is_no_limit(depth):
    lower, upper = Node.directory(), Node.directory()
    for root in (lower, upper):
        node = root
        for _ in range(depth):
            node.entries[b"d"] = node = Node.directory()
    merged = apply_layer(lower, upper)
    for _ in range(depth):
        merged = merged.entries[b"d"]
    assert not merged.entries
