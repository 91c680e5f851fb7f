"""An unmodified Debian kernel with every vdev by PCI and by direct mapping, in one boot with two CPUs."""

from __future__ import annotations

import hashlib
import json
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig.inside import linux, net
from tests.rig.inside.conftest import finish, run_qvm

TRANSPORTS = ("pci", "mmio")
#: In the paths of sysfs.
BUS = {"pci": "pci0000:00", "mmio": "LNRO0005"}
HELLO = 0xC000_8000
#: hello is on this input of the I/O APIC; the vector is one that Linux has given to nobody.
HELLO_INPUT, HELLO_VECTOR = 12, 0xD1
IOAPIC = 0xFEC0_0000

#: Direct mapping: kind of vdev -> loc and intr.
PLACES: dict[str, dict[str, Any]] = {
    "virtio-blk": {"loc": 0xC000_0000, "intr": "ioapic:16"},
    "virtio-net": {"loc": 0xC000_1000, "intr": "ioapic:17"},
    "virtio-console": {"loc": 0xC000_2000, "intr": "ioapic:18"},
}


def both(kind: str, name: str, **options: str) -> str:
    """One vdev on PCI and one by direct mapping; ``{}`` in an option is the transport."""
    text = ""
    for transport in TRANSPORTS:
        place = PLACES[kind] if transport == "mmio" else {}
        filled = {key: value.format(transport) for key, value in options.items()}
        text += linux.vdev(kind, f"{name}-{transport}", **place, **filled)
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the disks and the files of the consoles are."""
    return tmp_path_factory.mktemp("linux")


@pytest.fixture(scope="module")
def guest(folder: Path) -> Iterator[linux.Shell]:
    """The booted guest, at its shell; ``/tools`` has the machine's own programs."""
    for transport in TRANSPORTS:
        linux.ext4(folder / f"{transport}.img")
    vdevs = linux.vdev("virtio-blk", "tools", hostdev=f"<{linux.TOOLS}")
    vdevs += both("virtio-blk", "disk", hostdev=f"{folder}/{{}}.img")
    vdevs += both("virtio-net", "net", tap="rig-{}")
    vdevs += both("virtio-console", "console", hostdev=f"unix:{folder}/{{}}.sock")
    vdevs += linux.vdev("hello", "hello0", loc=HELLO, intr=f"ioapic:{HELLO_INPUT}")
    # hello's input of the I/O APIC is set up by hand, which the kernel calls an exclusive region.
    path = linux.machine(folder / "linux.toml", vdevs, cmdline="iomem=relaxed", cpus=2, ram="384M")
    vm = run_qvm(path)
    try:
        shell = linux.Shell(vm)
        shell.run(f"mkdir /tools; mount -t ext4 -o ro {shell.disk('tools')} /tools")
        shell.run(
            "for d in dev proc sys; do mount --bind /$d /tools/$d; done; mount -t tmpfs tmpfs /tools/tmp"
        )
        yield shell
    finally:
        finish(vm)


def test_both_cpus_are_up_and_work(guest: linux.Shell) -> None:
    assert guest.run("grep -c ^processor /proc/cpuinfo").strip() == "2"
    said = guest.run("for n in 1 2; do taskset $n sh -c 'cut -d\" \" -f39 /proc/self/stat'; done")
    assert said.split() == ["0", "1"]


def test_the_clock_is_that_of_the_host(guest: linux.Shell) -> None:
    """From the RTC: within the time a slow machine takes to boot."""
    assert abs(int(guest.run("date +%s")) - time.time()) < 60


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_vdev_is_found_and_has_its_interrupt(guest: linux.Shell, transport: str) -> None:
    links = guest.links("/sys/bus/virtio/devices/*")
    # Disk, card and console; on PCI the tools as well.
    assert len([line for line in links if BUS[transport] in line]) == (4 if transport == "pci" else 3), links
    shown = guest.run("cat /proc/interrupts")
    kind = r"PCI-MSI.* virtio\d-" if transport == "pci" else r"IO-APIC +1[678]-fasteoi +virtio\d"
    assert re.search(kind, shown), shown


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_fio_verifies_what_it_wrote(guest: linux.Shell, transport: str) -> None:
    """Random writes, 16 in flight, then read back with the checksum of each block."""
    said = guest.run(
        f"chroot /tools /usr/bin/fio --name=verify --filename={guest.disk(f'disk-{transport}')} --bs=4k"
        " --rw=randwrite --size=8M --offset=48M --direct=1 --ioengine=libaio --iodepth=16 --thread"
        " --do_verify=1 --verify=crc32c --verify_fatal=1 --output-format=json"
    )
    job = json.loads(said[said.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["total_ios"] == job["read"]["total_ios"] == 2048


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_ext4_file_system_keeps_its_files(guest: linux.Shell, folder: Path, transport: str) -> None:
    """Written, unmounted, and read after the caches were dropped; fsck has nothing to mend."""
    mount = f"mount -t ext4 {guest.disk(f'disk-{transport}')} /mnt"
    guest.run(mount)
    guest.run("dd if=/dev/urandom of=/mnt/big bs=64k count=64")
    first = guest.run("stat -c %s /mnt/big; md5sum < /mnt/big")
    assert first.startswith(f"{4 << 20}\n")
    guest.run("mkdir /mnt/many; for n in $(seq 60); do echo $n > /mnt/many/$n; done; rm /mnt/many/*7")
    guest.run("umount /mnt && echo 3 > /proc/sys/vm/drop_caches")
    linux.fsck(folder / f"{transport}.img")
    guest.run(mount)
    assert guest.run("stat -c %s /mnt/big; md5sum < /mnt/big") == first
    assert guest.run("cat /mnt/many/* | wc -l").strip() == "54"
    guest.run("umount /mnt")


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_the_network_carries_a_file_both_ways(guest: linux.Shell, transport: str) -> None:
    """Over a tap interface of the machine: ping, and 2 MiB by TCP each way."""
    subnet = f"10.0.{10 + TRANSPORTS.index(transport)}"
    net.set_up(f"rig-{transport}", f"{subnet}.1")
    links = guest.links("/sys/class/net/eth*")
    (card,) = [Path(link).name for link in links if BUS[transport] in link]
    guest.run(f"ip addr add {subnet}.2/24 dev {card} && ip link set {card} up")
    assert " 0% packet loss" in guest.run(f"ping -c 3 {subnet}.1")
    data = random.Random(transport).randbytes(2 << 20)
    with net.FileServer(f"{subnet}.1", 9000, data) as server:
        said = guest.run(f"nc {subnet}.1 9000 </dev/null > /tmp/file; md5sum < /tmp/file")
        guest.run(f"nc {subnet}.1 9000 < /tmp/file; rm /tmp/file")
    assert hashlib.md5(data).hexdigest() in said
    assert server.received == data


def test_consoles_carry_lines_both_ways(guest: linux.Shell, folder: Path) -> None:
    sockets = {}
    for transport in TRANSPORTS:
        sockets[transport] = socket.socket(socket.AF_UNIX)
        sockets[transport].connect(f"{folder}/{transport}.sock")
        sockets[transport].settimeout(60)
    guest.run("for n in 0 1; do stty -F /dev/hvc$n -echo; echo hvc$n > /dev/hvc$n; done")
    names = {}
    for transport in TRANSPORTS:
        with sockets[transport] as line, line.makefile("rb") as stream:
            names[transport] = stream.readline().decode().strip()
            line.sendall(f"to {names[transport]}\n".encode())
            assert guest.run(f"read text < /dev/{names[transport]}; echo $text").strip() == (
                f"to {names[transport]}"
            )
    assert set(names.values()) == {"hvc0", "hvc1"}


def test_hello_is_driven_by_the_guest(guest: linux.Shell) -> None:
    """Its registers, and its interrupt: each write gives one at the vector we choose."""

    def read(offset: int) -> int:
        return int(guest.run(f"devmem {HELLO + offset:#x} 32"), 16)

    assert read(0) == 0x6F6C6568
    for register, value in ((1, 0), (0, HELLO_VECTOR)):
        guest.run(
            f"devmem {IOAPIC:#x} 32 {0x10 + 2 * HELLO_INPUT + register}; devmem {IOAPIC + 16:#x} 32 {value}"
        )
    before = read(8)
    guest.run(f"dmesg -c > /dev/null; devmem {HELLO + 4:#x} 32 0xcafe")
    assert read(4) == 0xCAFE
    assert read(8) == before + 1
    # Linux tells of an interrupt nobody asked for, with the CPU and the vector.
    assert f"0.{HELLO_VECTOR} No irq handler for vector" in guest.run("dmesg")
    # A size that the register does not have reads as nothing.
    assert int(guest.run(f"devmem {HELLO:#x} 8"), 16) == 0xFF


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_request_enters_no_python_on_the_cpu_s_thread(guest: linux.Shell, transport: str) -> None:
    """300 reads: doorbells go to eventfds. What is left is the interrupt's status of virtio-mmio."""

    device = guest.disk(f"disk-{transport}")
    at = guest.run(f"basename $(readlink -f /sys/block/{Path(device).name}/device)").strip()
    raised, before = interrupts(guest, at), guest.status()
    guest.run(f"dd if={device} of=/dev/null bs=4k count=300 iflag=direct")
    after, raised = guest.status(), interrupts(guest, at) - raised
    assert requests(after, f"disk-{transport}") - requests(before, f"disk-{transport}") >= 300
    assert raised >= 300
    counters = after["guest"]["status"]
    assert counters["doorbells"] > 0
    assert (counters["doorbells_refused"], counters["msi_slow"], counters["msi_refused"]) == (0, 0, 0)
    exits = counters["exits"].get("mmio", 0) - before["guest"]["status"]["exits"].get("mmio", 0)
    # By direct mapping a driver asks why it was interrupted, and acknowledges that. So do the drivers of
    # the guest's other devices there, when a frame or a key comes meanwhile.
    own = 0 if transport == "pci" else 2 * raised
    assert own <= exits <= own + 8


def interrupts(guest: linux.Shell, device: str) -> int:
    """How many a virtio device's queue has raised, on both CPUs."""
    shown = guest.run("cat /proc/interrupts")
    (counts,) = re.findall(rf"^ *\d+: +(\d+) +(\d+) .* {device}(?:-req\.0)?$", shown, re.MULTILINE)
    return sum(map(int, counts))


def requests(report: dict[str, Any], name: str) -> int:
    """Requests that a disk has served."""
    (status,) = [vdev["status"] for vdev in report["vdevs"] if vdev["name"] == name]
    return int(status["reads"])


def test_status_tells_of_the_vm(guest: linux.Shell) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "qvmcore", "status", str(guest.vm.process.pid), "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["engine"], report["cpus"], report["state"]) == ("kvm", 2, "running")
    assert not [vdev for vdev in report["vdevs"] if vdev["fault"] or vdev["problem"]]


def test_the_guest_powers_off_and_its_disks_are_clean(guest: linux.Shell, folder: Path) -> None:
    guest.vm.type("poweroff\n")
    assert guest.vm.wait() == 0, guest.vm.text
    assert "ended: guest-shutdown" in guest.vm.text
    assert "Traceback" not in guest.vm.text
    for transport in TRANSPORTS:
        linux.fsck(folder / f"{transport}.img")
