"""dm-verity parameters in all spellings (spec vm-runtimes 2.4) and their rules (K2)."""

from dataclasses import replace

import pytest

from erofs.verity import HashTree, TreeFormat
from kata import DmVerity, OptionError, Profile, parse_verity
from kata.option import Fields

ROOT = "823d4c80eb7d242c0b2fd2bb72b7c5f84e3f333e4ecc8f4fbc8b624dd138f153"
VERITY = DmVerity(ROOT, 608, 512, 4096, 311296)
LABEL = f"608,311296,sha256:{ROOT}"
LINE = (
    'dm-verity options: --no-superblock --format=1 -s "" --hash=sha256 --data-block-size=512'
    f" --hash-block-size=4096 --data-blocks 608 --hash-offset 311296 {ROOT}"
)
JSON = (
    f'{{"hashtype":"sha256","hash":"{ROOT}","blocknum":608,"blocksize":512,"hashsize":4096,'
    '"offset":311296}'
)
BASE64 = (
    "eyJoYXNodHlwZSI6InNoYTI1NiIsImhhc2giOiI4MjNkNGM4MGViN2QyNDJjMGIyZmQyYmI3MmI3YzVmODRlM2YzMzNlN"
    "GVjYzhmNGZiYzhiNjI0ZGQxMzhmMTUzIiwiYmxvY2tudW0iOjYwOCwiYmxvY2tzaXplIjo1MTIsImhhc2hzaXplIjo0MD"
    "k2LCJvZmZzZXQiOjMxMTI5Nn0="
)


@pytest.mark.parametrize("text", [JSON, f" {JSON}\n", BASE64, LABEL, LINE, f"{LINE}\n"])
def test_every_spelling_is_the_same(text):
    # The label and the line say that there is no superblock; the JSON says nothing.
    assert replace(parse_verity(text), no_superblock=None) == VERITY


def test_spellings_are_written():
    assert VERITY.json_text() == JSON
    assert VERITY.label() == LABEL
    assert parse_verity(LABEL).label() == LABEL
    assert VERITY.export_line() == LINE
    salted = replace(VERITY, salt="00ff", no_superblock=False)
    assert "--no-superblock" not in salted.export_line()
    assert parse_verity(salted.export_line()) == salted
    assert salted.json_text() == JSON[:-1] + ',"salt":"00ff","no_superblock":false}'
    assert parse_verity(salted.json_text()) == salted


@pytest.mark.parametrize(
    "change",
    [{"salt": "00"}, {"data_block_size": 4096}, {"hash_block_size": 512}, {"no_superblock": False}],
)
def test_a_label_has_no_room_for_more(change):
    with pytest.raises(OptionError, match="a verity label"):
        replace(VERITY, **change).label()


def test_tables_of_the_kernel():
    table = f"0 608 verity 1 /dev/vda /dev/vda 512 4096 608 76 sha256 {ROOT} -"
    assert VERITY.table("/dev/vda") == table
    big = DmVerity(ROOT, 129, 4096, 4096, 528384, "SHA256", "00ff", no_superblock=False)
    assert big.table("/dev/vdb") == (
        f"0 1032 verity 1 /dev/vdb /dev/vdb 4096 4096 129 130 sha256 {ROOT} 00ff"
    )
    for device in ("", "/dev/a b", "/dev/a\n"):
        with pytest.raises(OptionError, match="device name"):
            VERITY.table(device)


def test_from_a_tree():
    form = TreeFormat(512)
    tree = HashTree(form, 608, 311296, bytes.fromhex(ROOT))
    found = DmVerity.from_tree(tree)
    assert found == replace(VERITY, no_superblock=True)
    assert found.export_line() == f"dm-verity options: {tree.options()}"
    tree = tree._replace(format=TreeFormat(4096, salt=bytes(32), superblock=True))
    assert DmVerity.from_tree(tree._replace(hash_offset=2490368)).no_superblock is False


# What is changed, and which profiles take it (strict, producer, lenient).
RULES = [
    ({}, "spl"),
    ({"algorithm": "SHA256"}, "spl"),
    ({"algorithm": "md5"}, ""),
    ({"algorithm": "sha1"}, ""),
    ({"algorithm": "sha1", "root_hash": "a" * 40}, "spl"),
    ({"root_hash": "a" * 63}, ""),
    ({"root_hash": "a" * 65}, ""),
    ({"root_hash": "g" * 64}, ""),
    ({"root_hash": ROOT.upper()}, "spl"),
    ({"root_hash": "a" * 63 + "\n"}, ""),
    ({"data_blocks": 0}, ""),
    ({"data_blocks": -1}, ""),
    ({"data_blocks": 1 << 32, "hash_offset": 1 << 41}, ""),
    ({"data_blocks": (1 << 32) - 1, "hash_offset": 1 << 41}, "spl"),
    ({"data_block_size": 256}, ""),
    ({"data_block_size": 1 << 20, "data_blocks": 1, "hash_offset": 1 << 20}, ""),
    ({"data_block_size": 524288, "data_blocks": 1, "hash_offset": 524288}, "spl"),
    ({"data_block_size": 513, "data_blocks": 1}, "pl"),
    ({"hash_block_size": 256}, ""),
    ({"hash_block_size": 1 << 20, "hash_offset": 1 << 20}, ""),
    ({"hash_block_size": 12288, "hash_offset": 12288 * 26}, "pl"),
    ({"hash_offset": 311297}, ""),
    ({"hash_offset": 307200}, ""),
    ({"hash_offset": 1 << 63}, ""),
    ({"hash_offset": 315392}, "spl"),
    ({"salt": "00" * 256}, "spl"),
    ({"salt": "00" * 257}, ""),
    ({"salt": "0"}, ""),
    ({"salt": "-"}, ""),
    ({"version": 0}, "spl"),
    ({"version": 2}, ""),
]


@pytest.mark.parametrize(("change", "profiles"), RULES)
def test_k2_rules_of_verity(change, profiles):
    verity = replace(VERITY, **change)
    for profile in Profile:
        if profile.value[0] in profiles:
            verity.check(profile)
            assert DmVerity.from_fields(Fields(verity.as_json())) == verity
        else:
            with pytest.raises(OptionError, match="dm_verity"):
                verity.check(profile)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        BASE64[:-4],
        BASE64[:-1],
        BASE64 + "\n",
        JSON[:-1],
        LABEL.replace("sha256", "sha512"),
        LABEL[:-1],
        LABEL + "0",
        LABEL.replace("608", "0"),
        LABEL.replace("608", "-1"),
        LABEL.replace("608", "٦"),
        LINE.replace("--format=1", "--format=2"),
        LINE + "\nmore",
        JSON.replace("608", "true"),
        JSON.replace("608", "608.0"),
        JSON.replace("608", '"608"'),
        JSON.replace('"hash":', '"hush":'),
        "{" * 10,
        "A" * (10 << 20),
    ],
)
def test_texts_that_are_none(text):
    with pytest.raises(OptionError) as caught:
        parse_verity(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
