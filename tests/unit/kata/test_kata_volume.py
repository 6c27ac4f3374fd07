"""Virtual volumes and extraoptions: golden texts (K1) and rules (K2) of spec vm-runtimes 2, 7.3."""

import base64
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kata import (
    DmVerity,
    KataVirtualVolume,
    Metadata,
    NydusExtraOptions,
    NydusImage,
    OptionError,
    Profile,
    VolumeType,
)
from kata.extraoption import detect_fs_version
from kata.guestpull import guest_pull_volume
from kata.option import EXTRA_OPTION, VOLUME_OPTION, decode_option, encode_option, go_json

EXTRA = NydusExtraOptions(
    "/srv/n/snapshots/9/fs/image/image.boot", '{"device":{}}', "/srv/n/snapshots/12", "v6"
)
EXTRA_TEXT = (
    "eyJzb3VyY2UiOiIvc3J2L24vc25hcHNob3RzLzkvZnMvaW1hZ2UvaW1hZ2UuYm9vdCIsImNvbmZpZyI6IntcImRldmljZ"
    "VwiOnt9fSIsInNuYXBzaG90ZGlyIjoiL3Nydi9uL3NuYXBzaG90cy8xMiIsImZzX3ZlcnNpb24iOiJ2NiJ9"
)
VERITY = DmVerity(
    root_hash="823d4c80eb7d242c0b2fd2bb72b7c5f84e3f333e4ecc8f4fbc8b624dd138f153",
    data_blocks=608,
    data_block_size=512,
    hash_block_size=4096,
    hash_offset=311296,
)
DISK = KataVirtualVolume(
    VolumeType.IMAGE_RAW_BLOCK,
    source="/srv/n/cache/ab.image.disk",
    fs_type="erofs",
    options=("ro",),
    dm_verity=VERITY,
)
DISK_TEXT = (
    "eyJ2b2x1bWVfdHlwZSI6ImltYWdlX3Jhd19ibG9jayIsInNvdXJjZSI6Ii9zcnYvbi9jYWNoZS9hYi5pbWFnZS5kaXNrI"
    "iwiZnNfdHlwZSI6ImVyb2ZzIiwib3B0aW9ucyI6WyJybyJdLCJkbV92ZXJpdHkiOnsiaGFzaHR5cGUiOiJzaGEyNTYiLC"
    "JoYXNoIjoiODIzZDRjODBlYjdkMjQyYzBiMmZkMmJiNzJiN2M1Zjg0ZTNmMzMzZTRlY2M4ZjRmYmM4YjYyNGRkMTM4ZjE"
    "1MyIsImJsb2NrbnVtIjo2MDgsImJsb2Nrc2l6ZSI6NTEyLCJoYXNoc2l6ZSI6NDA5Niwib2Zmc2V0IjozMTEyOTZ9fQ=="
)
BARE_PULL = KataVirtualVolume(VolumeType.IMAGE_GUEST_PULL)
BARE_PULL_TEXT = "eyJ2b2x1bWVfdHlwZSI6ImltYWdlX2d1ZXN0X3B1bGwifQ=="
EMPTY_PULL_TEXT = (
    "eyJ2b2x1bWVfdHlwZSI6ImltYWdlX2d1ZXN0X3B1bGwiLCJzb3VyY2UiOiJkdW1teS1pbWFnZS1yZWZlcmVuY2UiLCJpb"
    "WFnZV9wdWxsIjp7Im1ldGFkYXRhIjp7fX19"
)
LAYER_TEXT = (
    "eyJ2b2x1bWVfdHlwZSI6ImxheWVyX3Jhd19ibG9jayIsInNvdXJjZSI6Ii9zcnYvbi9jYWNoZS9hYi5sYXllci5kaXNrI"
    "iwiZnNfdHlwZSI6ImVyb2ZzIiwib3B0aW9ucyI6WyJybyJdfQ=="
)
LAYER = KataVirtualVolume(
    VolumeType.LAYER_RAW_BLOCK, "/srv/n/cache/ab.layer.disk", "erofs", ("ro",)
)
DIRECT = KataVirtualVolume(
    VolumeType.DIRECT_BLOCK, "/dev/sdb", "ext4", direct_volume=Metadata({"b": "2", "a": "1"})
)
NYDUS = KataVirtualVolume(
    VolumeType.IMAGE_NYDUS_FS, "/boot", "rafsv6", nydus_image=NydusImage("{}", "/snapshots/1")
)


def encoded(value):
    """Return an option as somebody else may write it."""
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.b64encode(text).decode()


def volume(**fields):
    return encoded({"volume_type": "image_raw_block", "source": "/d", "fs_type": "erofs", **fields})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (DISK, DISK_TEXT),
        (LAYER, LAYER_TEXT),
        (guest_pull_volume({}), EMPTY_PULL_TEXT),
    ],
    ids=["disk", "layer", "guest pull"],
)
def test_k1_golden_volumes(value, text):
    assert value.encode() == f"io.katacontainers.volume={text}"
    for profile in Profile:
        assert KataVirtualVolume.decode(text, profile) == value
        assert KataVirtualVolume.decode(f"{VOLUME_OPTION}{text}", profile) == value


def test_k1_golden_extraoption():
    assert EXTRA.encode() == f"extraoption={EXTRA_TEXT}"
    for profile in Profile:
        assert NydusExtraOptions.decode(EXTRA_TEXT, profile) == EXTRA
        assert NydusExtraOptions.decode(f"{EXTRA_OPTION}{EXTRA_TEXT}", profile) == EXTRA


def test_k1_what_kata_builds_itself_is_read_but_not_written():
    """Without `image_pull` Kata's Go runtime would crash."""
    assert BARE_PULL.encode(profiles=()) == f"io.katacontainers.volume={BARE_PULL_TEXT}"
    assert KataVirtualVolume.decode(BARE_PULL_TEXT, Profile.LENIENT) == BARE_PULL
    with pytest.raises(OptionError, match=r"image_pull\.metadata is missing"):
        BARE_PULL.encode()


def test_k1_key_order_unknown_keys_and_null_do_not_matter():
    fields = {**DISK.as_json(), "image_pull": None, "later": {"x": [1, 2.5]}}
    turned = dict(reversed(fields.items()))
    assert KataVirtualVolume.decode(encoded(turned)) == DISK
    extra = {"more": 1, **dict(reversed(EXTRA.as_json().items()))}
    assert NydusExtraOptions.decode(encoded(extra)) == EXTRA


def test_k1_keys_are_written_in_gos_order():
    keys = list(replace(DIRECT, options=("x",), dm_verity=VERITY).as_json())
    assert keys == ["volume_type", "source", "fs_type", "options", "direct_volume", "dm_verity"]
    assert go_json(DIRECT.as_json()["direct_volume"]) == '{"metadata":{"a":"1","b":"2"}}'


def test_k1_go_escapes():
    assert go_json({"a": '<&>\u2028\u2029"\\\n\tä\x01'}) == (
        '{"a":"\\u003c\\u0026\\u003e\\u2028\\u2029\\"\\\\\\n\\tä\\u0001"}'
    )


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-1],
        lambda text: text.rstrip("="),
        lambda text: text[:40] + "\n" + text[40:],
        lambda text: text + "\n",
        lambda text: " " + text,
        lambda text: text.replace("e", "-", 1),
        lambda text: text.replace("e", "_", 1),
        lambda text: text + "====",
        lambda text: text[:-3] + "R==",
        lambda text: "",
        lambda text: "ä" + text[2:],
    ],
    ids=["truncated", "no padding", "line break", "end of line", "blank", "minus", "underscore",
         "more padding", "bits beyond the end", "empty", "no ASCII"],
)  # fmt: skip
def test_k1_only_strict_base64_is_taken(spoil):
    text = spoil(DISK_TEXT)
    assert text != DISK_TEXT
    for profile in Profile:
        with pytest.raises(OptionError, match=r"base64|empty") as caught:
            KataVirtualVolume.decode(text, profile)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xff", "is not UTF-8"),
        (b"{", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b"{} {}", "is not JSON"),
        (b'{"a":NaN}', "a number that JSON does not have"),
        (b'{"a":' + b"9" * 30 + b"}", "a number is too large"),
        (b'{"volume_type":"direct_block","volume_type":"image_raw_block"}', "given twice"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"volume_type":7}', "volume_type is not a text"),
        (b"{}", "volume_type is missing"),
        (b'{"volume_type":"image_unknown"}', "volume_type is unknown: got 'image_unknown'"),
        (b'{"volume_type":"direct_block","options":["a",1]}', "options is not a list of texts"),
        (b'{"volume_type":"direct_block","dm_verity":[]}', "dm_verity is not an object"),
        (b'{"volume_type":"direct_block","direct_volume":{"metadata":{"a":1}}}', "of texts"),
        (b'{"volume_type":"image_nydus_fs","nydus_image":{"config":{}}}', "config is not a text"),
    ],
)
def test_k2_json_that_is_no_volume(data, says):
    for profile in Profile:
        with pytest.raises(OptionError) as caught:
            KataVirtualVolume.decode(encoded(data), profile)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)


def test_k2_a_volume_of_ten_mebibytes():
    with pytest.raises(OptionError, match="too long"):
        KataVirtualVolume.decode("A" * (10 << 20))
    with pytest.raises(OptionError, match="too long"):
        replace(NYDUS, nydus_image=NydusImage("x" * (10 << 20), "/s")).encode()


def test_k2_errors_show_no_content():
    secret = "c2VjcmV0"
    for data in (f'{{"config":"{secret}"', f'{{"source":"/a","config":{{"auth":"{secret}"}}}}'):
        with pytest.raises(OptionError) as caught:
            NydusExtraOptions.decode(encoded(data.encode()))
        assert secret not in str(caught.value)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None
    assert secret not in repr(replace(EXTRA, config=secret))
    assert secret not in repr(replace(NYDUS, nydus_image=NydusImage(secret, "/s")))


# What each profile takes: strict (kata-types), producer (snapshotter), lenient (Kata's Go).
RULES = [
    (DIRECT, "spl"),
    (replace(DIRECT, source=""), "l"),
    (replace(DIRECT, fs_type=""), "pl"),
    (replace(DIRECT, direct_volume=None), "sl"),
    (replace(DIRECT, direct_volume=Metadata(None)), "s"),
    (replace(DIRECT, direct_volume=Metadata({})), "spl"),
    (DISK, "spl"),
    (replace(DISK, source=""), "l"),
    (replace(DISK, fs_type=""), "pl"),
    (replace(DISK, dm_verity=None), "spl"),
    (replace(DISK, options=()), "spl"),
    (replace(DISK, dm_verity=replace(VERITY, data_block_size=1000, data_blocks=1)), "pl"),
    (replace(DISK, dm_verity=replace(VERITY, hash_offset=1)), ""),
    (LAYER, "spl"),
    (replace(LAYER, source=""), "l"),
    (NYDUS, "spl"),
    (replace(NYDUS, source=""), "l"),
    (replace(NYDUS, fs_type="rafsv5"), "spl"),
    (replace(NYDUS, fs_type="erofs"), "pl"),
    (replace(NYDUS, fs_type=""), "pl"),
    (replace(NYDUS, nydus_image=None), "l"),
    (replace(NYDUS, nydus_image=NydusImage()), ""),
    (replace(NYDUS, nydus_image=NydusImage("{}")), "pl"),
    (replace(NYDUS, nydus_image=NydusImage("", "/s")), "pl"),
    (replace(NYDUS, volume_type=VolumeType.LAYER_NYDUS_FS, fs_type="rafsv5"), "spl"),
    (replace(NYDUS, volume_type=VolumeType.IMAGE_NYDUS_BLOCK), "spl"),
    (replace(NYDUS, volume_type=VolumeType.LAYER_NYDUS_BLOCK, fs_type="rafsv5"), "pl"),
    (guest_pull_volume({"a": "b"}, "docker.io/x:y"), "spl"),
    (replace(guest_pull_volume({}), source=""), "pl"),
    (replace(guest_pull_volume({}), image_pull=None), "sl"),
    (replace(guest_pull_volume({}), image_pull=Metadata(None)), "s"),
    (BARE_PULL, "l"),
    # No profile says so, but nobody means it.
    (replace(DISK, source="disk"), ""),
    (replace(DISK, source="/a/../etc/shadow"), ""),
    (replace(DISK, source="/a\n"), ""),
    (replace(DISK, source="/a\0"), ""),
    (replace(DISK, source="//a"), ""),
    (replace(DISK, source="/" + "a" * 5000), ""),
    (replace(NYDUS, nydus_image=NydusImage("{}", "../s")), ""),
]


@pytest.mark.parametrize(("value", "profiles"), RULES)
def test_k2_rules_of_volumes(value, profiles):
    for profile in Profile:
        if profile.value[0] in profiles:
            value.check(profile)
            assert KataVirtualVolume.decode(value.encode((profile,)), profile) in (
                value,
                # An absent map is written as an empty one.
                replace(value, direct_volume=value.direct_volume and Metadata({})),
                replace(value, image_pull=value.image_pull and Metadata({})),
            )
        else:
            with pytest.raises(OptionError):
                value.check(profile)


def test_k2_a_volume_is_written_only_when_everybody_takes_it():
    for value, profiles in RULES:
        if profiles == "spl":
            value.encode()
        else:
            with pytest.raises(OptionError):
                value.encode()


# (field and value, profiles that take it); None leaves the field out.
EXTRA_RULES = [
    ({}, "spl"),
    ({"source": None}, ""),
    ({"source": ""}, ""),
    ({"source": "relative"}, ""),
    ({"source": "/a/../b"}, ""),
    ({"source": 7}, ""),
    ({"config": None}, ""),
    ({"config": ""}, ""),
    ({"config": "no JSON"}, "sl"),
    ({"snapshotdir": None}, ""),
    ({"snapshotdir": "/a/./b"}, ""),
    ({"fs_version": None}, "l"),
    ({"fs_version": "v7"}, "l"),
    ({"fs_version": "v5"}, "spl"),
    ({"unknown": "ignored"}, "spl"),
]


@pytest.mark.parametrize(("change", "profiles"), EXTRA_RULES)
def test_k2_rules_of_the_extraoption(change, profiles):
    fields = {**EXTRA.as_json(), **change}
    text = encoded({key: value for key, value in fields.items() if value is not None})
    for profile in Profile:
        if profile.value[0] in profiles:
            NydusExtraOptions.decode(text, profile)
        else:
            with pytest.raises(OptionError):
                NydusExtraOptions.decode(text, profile)


def test_k2_which_of_several_extraoptions_counts():
    other = replace(EXTRA, snapshot_dir="/srv/n/snapshots/13")
    options = ["ro", EXTRA.encode(), "lowerdir=/a", other.encode()]
    assert NydusExtraOptions.find(options, Profile.LENIENT) == other
    for profile in (Profile.STRICT, Profile.PRODUCER):
        with pytest.raises(OptionError, match="expected one, got 2"):
            NydusExtraOptions.find(options, profile)
    for profile in Profile:
        assert NydusExtraOptions.find(["ro"], profile) is None


def test_an_extraoption_as_a_volume():
    found = EXTRA.as_volume()
    found.check(Profile.STRICT)
    assert (found.volume_type, found.fs_type) == (VolumeType.IMAGE_NYDUS_FS, "rafsv6")
    assert found.nydus_image == NydusImage(EXTRA.config, EXTRA.snapshot_dir)
    assert replace(EXTRA, fs_version="rafsv5").as_volume().fs_type == "rafsv5"
    with pytest.raises(OptionError):
        replace(EXTRA, fs_version="v7").as_volume()


def test_versions_of_bootstraps(tmp_path):
    boot = tmp_path / "boot"
    boot.write_bytes(bytes.fromhex("5346415200050000"))
    assert detect_fs_version(boot) == "v5"
    v6 = bytes(1024) + bytes.fromhex("e2e1f5e0") + bytes(380)
    boot.write_bytes(v6)
    assert detect_fs_version(boot) == "v6"
    for data in (v6[:-1], b"", bytes(4096)):
        boot.write_bytes(data)
        with pytest.raises(OptionError, match="neither RAFS v5 nor v6"):
            detect_fs_version(boot)
    with pytest.raises(OptionError, match="No such file"):
        detect_fs_version(tmp_path / "nothing")


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=4))
def test_any_json_comes_back(value):
    assert decode_option(VOLUME_OPTION, encode_option(VOLUME_OPTION, value)) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_decoded_or_refused(data):
    for decode in (KataVirtualVolume.decode, NydusExtraOptions.decode):
        for text in (base64.b64encode(data).decode(), data.decode("latin-1")):
            with pytest.raises(OptionError):
                decode(text, Profile.LENIENT)


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(OptionError, match="not Unicode"):
        replace(LAYER, options=("\ud800",)).encode()
    lone = encoded(b'{"volume_type":"layer_raw_block","source":"/\\ud800","fs_type":"erofs"}')
    with pytest.raises(OptionError, match="Unicode"):
        KataVirtualVolume.decode(lone).encode()
