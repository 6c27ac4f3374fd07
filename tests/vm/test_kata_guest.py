"""Disks with hash trees in a guest: rows V4 to V9 and V11 of spec vm-runtimes 7.4.

One boot of Debian's own kernel for all rows; V1 to V3 are in tests/integration/test_verity_tool.py.
"""

import hashlib
import random
import shlex
import subprocess
import tarfile
from pathlib import Path
from typing import NamedTuple

import pytest

from builder import BuildOptions, ExportOptions, SourceType, VerityOptions, build, export_block
from builder.backends import blob_directory
from builder.roothash import RootHashSigner
from kata import DmVerity
from kata.disk import make_disk
from kata.dmverityfile import DmVerityFile, read_layer_verity
from kata.erofsmounts import ErofsLayer, ErofsRootfs
from tests.capabilities import need_tool
from vmlab.machine import host_path
from vmlab.qemu import Disk, Hardware

KERNEL = "6.12-generic"
MODULES = "dm-verity erofs overlay virtio_pmem nd_pmem"
BLOCK = 4096
# Larger than the kernel's largest read of the hash tree, so that a leaf is only one file's.
SIZES = {"small": 100, "page": BLOCK, "large": 3 << 20, "other": 1 << 20}
DAX_BYTES = 2 << 20
# What device-mapper programs do without udev.
NO_UDEV = "export DM_DISABLE_UDEV=1"


class Exported(NamedTuple):
    """A disk with its tree, and where the content of files is on it."""

    path: Path
    verity: DmVerity
    sums: dict[str, str]

    def find(self, content):
        return self.path.read_bytes().index(content)


def content_of(name, size):
    return random.Random(name).randbytes(size)


def make_source(directory, prefix=""):
    directory.mkdir()
    names = {f"{prefix}{name}": size for name, size in SIZES.items()}
    for name, size in names.items():
        (directory / name).write_bytes(content_of(name, size))
    return {
        name: hashlib.sha256(content_of(name, size)).hexdigest() for name, size in names.items()
    }


def export(directory, name, verity, **options):
    """Build an image of files and export it with a tree."""
    sums = make_source(directory / f"{name}-source", options.pop("prefix", ""))
    blobs = directory / f"{name}-blobs"
    blobs.mkdir()
    boot, disk = directory / f"{name}.boot", directory / f"{name}.disk"
    source = directory / f"{name}-source"
    build(source, BuildOptions(bootstrap=boot, blob_dir=blobs))
    result = export_block(boot, disk, blob_directory(blobs), ExportOptions(verity=verity))
    return Exported(disk, DmVerity.from_tree(result.tree), sums)


def export_tarfs(directory):
    """Export a tar as it is, in blocks of 512 bytes."""
    sums = make_source(directory / "tarfs-source", "tar-")
    tar = directory / "layer.tar"
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in sums:
            archive.add(directory / "tarfs-source" / name, name)
    blobs = directory / "tarfs-blobs"
    blobs.mkdir()
    blob_id = hashlib.sha256(tar.read_bytes()).hexdigest()
    (blobs / blob_id).write_bytes(tar.read_bytes())
    boot, disk = directory / "tarfs.boot", directory / "tarfs.disk"
    options = BuildOptions(
        source_type=SourceType.TARFS, bootstrap=boot, blob_dir=blobs, blob_id=blob_id
    )
    build(tar, options)
    words = ExportOptions(verity=VerityOptions())
    result = export_block(boot, disk, blob_directory(blobs), words)
    return Exported(disk, DmVerity.from_tree(result.tree), sums)


def open_verity(name, verity, device):
    """Return commands that make /dev/mapper/NAME of the table of spec vm-runtimes 2.4."""
    return f'dmsetup create --readonly {name} --table "{verity.table(device)}"\n'


def flipped(path, target, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    target.write_bytes(data)
    return target


def layer(directory, name):
    """Make a layer as containerd's EROFS snapshotter has it, with its side file."""
    folder = directory / f"snapshots-{name}"
    folder.mkdir()
    form = VerityOptions(salt=bytes(32), superblock=True, uuid=name.encode().ljust(16, b"-"))
    made = export(directory, f"layer-{name}", form, prefix=f"{name}-")
    image = made.path.rename(folder / "layer.erofs")
    side = folder / ".dmverity"
    side.write_bytes(DmVerityFile(made.verity.root_hash, made.verity.hash_offset).pack())
    return ErofsLayer(str(image), str(side)), made.sums


class Disks:
    """All disks, and the names that the guest has for them."""

    def __init__(self, directory):
        self.good = good = export(directory, "good", VerityOptions())
        self.tarfs = export_tarfs(directory)
        self.broken_byte = good.find(content_of("large", SIZES["large"])) + (1 << 20) + 5
        # The leaf of that very block: leaves come last in the tree.
        leaves = good.path.stat().st_size - -(-good.verity.data_blocks // 128) * BLOCK
        self.broken_leaf = leaves + self.broken_byte // BLOCK // 128 * BLOCK + 7
        data = flipped(good.path, directory / "data.disk", self.broken_byte)
        tree = flipped(good.path, directory / "tree.disk", self.broken_leaf)
        self.files = {"good": good.path, "data": data, "tree": tree}
        self.merged = self._merged(directory)
        layers = [layer(directory, name) for name in ("upper", "lower")]
        self.layer_sums = [sums for _, sums in layers]
        (directory / "gpt").mkdir()
        self.rootfs = ErofsRootfs(tuple(found for found, _ in layers))
        self.gpt = make_disk(self.rootfs, directory / "gpt")
        self.pmem = directory / "pmem"
        size = good.verity.hash_offset
        self.pmem.write_bytes(
            good.path.read_bytes()[:size].ljust(-(-size // DAX_BYTES) * DAX_BYTES)
        )
        sources = {
            "good": Disk(str(good.path), serial="extension-x"),
            "data": Disk(str(data)),
            "tree": Disk(str(tree)),
            "tarfs": Disk(str(self.tarfs.path)),
            "merged": Disk(str(self.merged.path), format=self.merged.format),
            "gpt": Disk(str(self.gpt.path), format=self.gpt.format),
        }
        self.names = {name: f"vd{chr(ord('b') + at)}" for at, name in enumerate(sources)}
        self.hardware = Hardware(disks=tuple(sources.values()), pmem=(self.pmem,))

    def _merged(self, directory):
        """Put metadata and data into files of their own, which a VMDK joins."""
        whole = self.good.path.read_bytes()[: self.good.verity.hash_offset]
        place = self.good.find(content_of("large", SIZES["large"])) // BLOCK * BLOCK
        folder = directory / "merged"
        folder.mkdir()
        (folder / "fsmeta.erofs").write_bytes(whole[:place])
        (folder / "layer.erofs").write_bytes(whole[place:])
        image = ErofsLayer(str(folder / "fsmeta.erofs"), devices=(str(folder / "layer.erofs"),))
        return make_disk(ErofsRootfs((image,)), folder)

    def device(self, name):
        return f"/dev/{self.names[name]}"


@pytest.fixture(scope="module")
def disks(guests, tmp_path_factory):
    guests.need(KERNEL)
    for program in ("dmsetup", "veritysetup"):
        need_tool(program)
    return Disks(tmp_path_factory.mktemp("disks"))


@pytest.fixture(scope="module")
def shell(guests, disks):
    """Runs a script in the guest, from a working directory in its memory; returns its output."""
    with guests.boot(KERNEL, disks.hardware) as guest:

        def run(script, status=0):
            done = guest.run(["sh", "-ec", f"{NO_UDEV}\n{script}"], cwd=Path("/tmp"))
            assert done.status == status, (done, guest.console()[-3000:])
            return done.stdout.decode()

        run(
            f"for module in {MODULES}; do modprobe $module; done\n"
            + open_verity("good", disks.good.verity, disks.device("good"))
            + "mkdir good; mount -t erofs -o ro /dev/mapper/good good"
        )
        yield run


def check(place, sums):
    lines = "\n".join(f"{digest}  {place}/{name}" for name, digest in sums.items())
    return f"sha256sum --check --quiet <<'END'\n{lines}\nEND\n"


def test_v4_files_are_those_of_the_source(shell, disks):
    output = shell(check("good", disks.good.sums) + "blockdev --getro /dev/mapper/good")
    assert output == "1\n"


def read_broken(name):
    """Return commands that tell of each file whether it can be read."""
    return (
        f"mkdir {name}; mount -t erofs -o ro /dev/mapper/{name} {name}\n"
        f"for file in {name}/*; do "
        "if cat $file >/dev/null 2>error; then echo good ${file##*/}; "
        "else echo bad ${file##*/} $(cat error); fi; done\n"
        "dmesg\n"
    )


@pytest.mark.parametrize("part", ["data", "tree"])
def test_v5_a_flipped_byte_is_an_error_for_its_reader(shell, disks, part):
    output = shell(
        open_verity(part, disks.good.verity, disks.device(part)) + read_broken(part)
    ).splitlines()
    assert f"bad large cat: {part}/large: Input/output error" in output
    # The rest of the image can be used: all blocks of that leaf belong to this file.
    assert {"good small", "good page", "good other"} <= set(output)
    place = disks.broken_byte if part == "data" else disks.broken_leaf
    kind = "data block" if part == "data" else "metadata block"
    text = f"{kind} {place // BLOCK} is corrupted"
    assert [line for line in output if text in line], output[-20:]


def test_v5_veritysetup_refuses_the_same_disks(disks):
    words = shlex.split(disks.good.verity.export_line().removeprefix("dm-verity options: "))
    for part, is_good in (("good", True), ("data", False), ("tree", False)):
        disk = disks.files[part]
        done = subprocess.run(["veritysetup", "verify", disk, disk, *words], capture_output=True)
        assert (done.returncode == 0) == is_good, (part, done.stderr)


def test_v5_a_wrong_root_hash_opens_nothing(shell, disks):
    device = disks.device("good")
    wrong = "0" * 64
    table = disks.good.verity.table(device).replace(disks.good.verity.root_hash, wrong)
    script = f'dmsetup create --readonly wrong --table "{table}"; mkdir wrong\n'
    output = shell(script + "mount -t erofs -o ro /dev/mapper/wrong wrong || echo status $?")
    assert "status 32" in output


def test_the_kernel_reads_signed_root_hashes(shell, disks, tmp_path):
    """Its keyring is Debian's: it knows what it would need to verify ours, or that it is none."""
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    words = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=test"]
    subprocess.run([*words, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    root = disks.good.verity.root_hash
    good, broken = tmp_path / "good.p7s", tmp_path / "broken.p7s"
    good.write_bytes(RootHashSigner(key, certificate).sign(bytes.fromhex(root)))
    broken.write_bytes(b"x" * 100)
    # Its own device: that of the other tests is in use.
    device = shell(
        f"modprobe loop; losetup --find --show --read-only {disks.device('good')}"
    ).strip()
    options = disks.good.verity.export_line().removeprefix("dm-verity options: ")
    for signature, is_one in ((good, True), (broken, False)):
        output = shell(
            f"! veritysetup open {device} signed {device} {options} 2>&1"
            f" --root-hash-signature={host_path(signature)}"
        )
        assert ("Required key not available" in output) == is_one, output


def test_v6_an_overlay_on_top_is_written_to(shell, disks):
    output = shell(
        "mkdir top; mount -t tmpfs top top; mkdir top/upper top/work top/root\n"
        "mount -t overlay overlay -o lowerdir=good,upperdir=top/upper,workdir=top/work top/root\n"
        "echo more >> top/root/small; rm top/root/page; tail -c 5 top/root/small; ls top/root"
    )
    assert output == "more\nlarge\nother\nsmall\n"


def test_v7_a_serial_names_the_disk(shell, disks):
    name = disks.names["good"]
    assert shell(f"cat /sys/block/{name}/serial") == "extension-x"
    assert shell("grep -l extension-x /sys/block/vd*/serial") == f"/sys/block/{name}/serial\n"


def test_v8_persistent_memory_is_read_without_a_copy(shell, disks):
    output = shell(
        "mkdir pmem; mount -t erofs -o ro,dax=always /dev/pmem0 pmem\n"
        + check("pmem", disks.good.sums)
        + "grep ' /tmp/pmem ' /proc/mounts"
    )
    assert "dax=always" in output


def test_v9_a_vmdk_joins_metadata_and_data(shell, disks):
    shell(
        f"mkdir merged; mount -t erofs -o ro {disks.device('merged')} merged\n"
        + check("merged", disks.good.sums)
    )


def test_v9_layers_are_partitions_that_are_checked(shell, disks):
    """What kata-agent does with the storages of spec vm-runtimes 2.7."""
    script = f"partx -s {disks.device('gpt')} || true\n"
    for number, (found, sums) in enumerate(
        zip(disks.rootfs.layers, disks.layer_sums, strict=True), 1
    ):
        verity = read_layer_verity(Path(found.dmverity), Path(found.path))
        name = verity.device_name(number)
        script += open_verity(name, verity.parameters(), f"{disks.device('gpt')}{number}")
        script += f"mkdir lower{number}; mount -t erofs -o ro /dev/mapper/{name} lower{number}\n"
        script += check(f"lower{number}", sums)
    script += "mkdir both; mount -t overlay overlay -o ro,lowerdir=lower1:lower2 both; ls both"
    names = shell(script).split()
    assert set(names) >= {name for sums in disks.layer_sums for name in sums}


def test_v11_a_tar_in_blocks_of_512_bytes(shell, disks):
    verity = disks.tarfs.verity
    assert (verity.data_block_size, verity.hash_block_size) == (512, 4096)
    shell(
        open_verity("tarfs", verity, disks.device("tarfs"))
        + "mkdir tarfs; mount -t erofs -o ro /dev/mapper/tarfs tarfs\n"
        + check("tarfs", disks.tarfs.sums)
    )
