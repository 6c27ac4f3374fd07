import subprocess
from pathlib import Path

import pytest

from vmlab import kvm, qemu
from vmlab.qemu import Disk, Hardware, SharedTree, machine_command
from vmlab.store import StoredKernel


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    monkeypatch.setattr(qemu, "need", lambda *_: "/qemu")


def words(hardware=None, accelerator="tcg", share=None):
    found = machine_command(
        hardware or Hardware(),
        accelerator,
        kernel=Path("/k"),
        directory=Path("/d"),
        share=share,
        port=7,
    )
    return list(zip(found, [*found[1:], ""], strict=True))


def test_the_root_is_shared_read_only_over_9p_without_a_daemon():
    ((_, share),) = (pair for pair in words() if pair[0] == "-virtfs")
    assert "readonly=on" in share.split(",")


def test_virtiofsd_gets_the_memory():
    pairs = words(Hardware(memory_mib=300), share=Path("/d/share,sock"))
    assert ("-chardev", "socket,id=share,path=/d/share,,sock") in pairs
    assert ("-object", "memory-backend-memfd,id=memory,size=300M,share=on") in pairs
    assert not [pair for pair in pairs if pair[0] == "-virtfs"]


def test_disks_are_read_only_and_their_names_are_no_options():
    disks = (Disk.parse("/a,b=c,serial=x,y"), Disk.parse("nbd+unix:///?socket=/s"))
    drives = [value for name, value in words(Hardware(disks=disks)) if name == "-drive"]
    assert drives[1].startswith("file=/a,,b=c,format=raw,")
    assert drives[2].startswith("file=nbd+unix:///?socket=/s,format=raw,")
    assert all("read-only=on" in drive.split(",") for drive in drives[1:])
    devices = [value for name, value in words(Hardware(disks=disks)) if name == "-device"]
    assert "virtio-blk-pci,drive=disk0,serial=x,,y" in devices
    assert "virtio-blk-pci,drive=disk1" in devices


def test_disks_of_other_formats():
    pairs = words(Hardware(disks=(Disk("/a.vmdk", format="vmdk"),)))
    drives = [value for name, value in pairs if name == "-drive"]
    assert drives[1].startswith("file=/a.vmdk,format=vmdk,")


def test_trees_that_others_serve_need_the_memory_too():
    tree = SharedTree("kataShared", Path("/s,t"))
    pairs = words(Hardware(memory_mib=300, shares=(tree,)))
    assert ("-object", "memory-backend-memfd,id=memory,size=300M,share=on") in pairs
    assert ("-chardev", "socket,id=share0,path=/s,,t") in pairs
    assert ("-device", "vhost-user-fs-pci,chardev=share0,tag=kataShared") in pairs
    assert [pair for pair in pairs if pair[0] == "-virtfs"]


def test_persistent_memory(tmp_path):
    file = tmp_path / "pmem"
    file.write_bytes(bytes(2 << 20))
    pairs = words(Hardware(memory_mib=300, pmem=(file,)))
    assert ("-m", "300M,slots=1,maxmem=1326M") in pairs
    backend = f"memory-backend-file,id=mem0,share=on,mem-path={file},size={2 << 20}"
    assert ("-object", backend) in pairs
    assert ("-device", "virtio-pmem-pci,memdev=mem0") in pairs


def test_kernel_arguments_come_last():
    ((_, line),) = (
        pair for pair in words(Hardware(kernel_arguments=("loglevel=8",))) if pair[0] == "-append"
    )
    assert line.endswith(" loglevel=8")


class FakeKvm:
    """A machine whose /dev/kvm opens, and a QEMU that writes a console and ends."""

    def __init__(self, tmp_path, monkeypatch):
        self.console = b""
        self.stderr = ""
        self.runs = 0
        (tmp_path / "boot_id").write_text("boot-1\n")
        self.cpuinfo = tmp_path / "cpuinfo"
        self.cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu svm sse\n")
        monkeypatch.setattr(kvm, "_CPUINFO", self.cpuinfo)
        monkeypatch.setattr(kvm, "_DEVICE", Path("/dev/null"))
        monkeypatch.setattr(kvm, "_BOOT_ID", tmp_path / "boot_id")
        monkeypatch.setattr(kvm, "kernels_directory", lambda: tmp_path)
        monkeypatch.setattr(kvm.subprocess, "run", self.run)
        self.boot_id = tmp_path / "boot_id"
        self.stored = StoredKernel(tmp_path / "entry", "6.12", "1")

    def run(self, command, *, timeout, **_):
        self.runs += 1
        if self.console is None:
            raise subprocess.TimeoutExpired(command, timeout)
        serial = command[command.index("-serial") + 1]
        Path(serial.removeprefix("file:")).write_bytes(self.console)
        return subprocess.CompletedProcess(command, 1, "", self.stderr)

    def defect(self):
        kvm.kvm_defect.cache_clear()
        return kvm.kvm_defect(self.stored)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    yield FakeKvm(tmp_path, monkeypatch)
    kvm.kvm_defect.cache_clear()


def test_kvm_works_when_a_kernel_misses_its_root(fake):
    fake.console = b"Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)"
    assert fake.defect() is None
    assert fake.defect() is None
    assert fake.runs == 1  # remembered
    fake.boot_id.write_text("boot-2\n")
    assert fake.defect() is None
    assert fake.runs == 2


def test_kvm_that_fails_is_tried_again(fake):
    fake.stderr = "warning\nfailed to set MSR\n"
    assert fake.defect() == "a kernel did not boot with it: failed to set MSR"
    fake.console = None
    assert fake.defect() == "a kernel did not boot with it in 15 s"
    assert fake.runs == 2


def test_kvm_without_a_device(fake, monkeypatch, tmp_path):
    monkeypatch.setattr(kvm, "_DEVICE", tmp_path / "kvm")
    assert fake.defect() == f"{tmp_path}/kvm: No such file or directory"
    assert fake.runs == 0


@pytest.mark.parametrize("text", ["flags\t\t: fpu sse hypervisor\n", "model name : vmx\n", ""])
def test_kvm_of_a_processor_without_virtualization_is_not_tried(fake, text):
    fake.cpuinfo.write_text(text)
    assert fake.defect() == "this processor has no virtualization (vmx, svm)"
    assert fake.runs == 0
