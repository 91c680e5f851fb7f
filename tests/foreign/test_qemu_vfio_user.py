"""QEMU 11's vfio-user client with Linux' drivers: every kind of vdev as a PCI function, in one guest."""

from __future__ import annotations

import random
import re
import shlex
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.foreign.qemu import Linux, Machine
from tests.foreign.qemu11 import obtained
from tests.foreign.qemu_scripts import (
    CARDS,
    TWO_HOSTS,
    copy,
    ext4,
    in_the_image,
    known_sum,
    ping,
    sound,
    write_and_flush,
)
from tests.foreign.qemu_serve import Serve

pytestmark = pytest.mark.guest

DEVICES = f"""
[[vdev]]
type = "hello"
name = "hello0"

[[vdev]]
type = "virtio-blk"
name = "disk0"
hostdev = "disk.img"
{CARDS}
[[vdev]]
type = "virtio-console"
name = "console0"
hostdev = "unix:console"

[[vdev]]
type = "virtio-entropy"
name = "dice"
source = "random.bin"
max_bytes = 64
"""
NAMES = ("hello0", "disk0", "left", "right", "console0", "dice")
#: Vendor and device, class, of each, in that order.
FUNCTIONS = [
    "1c05:ffff ff0000",
    "1af4:1042 018000",
    "1af4:1041 028000",
    "1af4:1041 028000",
    "1af4:1043 078000",
    "1af4:1044 00ff00",
]
RANDOM = random.Random(5).randbytes(1 << 20)

LIST = """
for d in /sys/bus/pci/devices/*; do
    set -- $(cat $d/vendor $d/device $d/class)
    case $1 in 0x1af4|0x1c05) echo "${1#0x}:${2#0x} ${3#0x}";; esac
done
"""
#: The window of hello is BAR 0: its address as Linux has it, for devmem.
HELLO = """
for d in /sys/bus/pci/devices/*; do
    [ $(cat $d/vendor)$(cat $d/device) = 0x1c050xffff ] && break
done
echo 1 > $d/enable
bar0=$(head -n 1 $d/resource | cut -d' ' -f1)
"""


def attached(server: Serve, names: Sequence[str] = NAMES) -> list[str]:
    """QEMU's options for the devices, from the lines that `qvm serve` printed."""
    options: list[str] = []
    for name in names:
        words = shlex.split(server.line(name, "QEMU >= 10.1"))
        options += words[words.index("-device") :]
    return options


def started(server: Serve, *, append: str = "", cpus: int = 1) -> Linux:
    newer = obtained()
    return Linux(
        attached(server), append=append, cpus=cpus, qemu=newer.command, environment=newer.environment
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    obtained()
    folder = tmp_path_factory.mktemp("vfio-user")
    ext4(folder)
    (folder / "random.bin").write_bytes(RANDOM)
    serve = Serve(folder, DEVICES, "vfio-user")
    yield serve
    serve.close()


@pytest.fixture(scope="module")
def linux(server: Serve) -> Iterator[Linux]:
    guest = started(server)
    try:
        guest.run("mount -t ext4 /dev/vda /mnt")
        guest.run(TWO_HOSTS)
        yield guest
    finally:
        guest.close()


def test_linux_lists_the_functions(linux: Linux) -> None:
    assert linux.run(LIST).splitlines() == FUNCTIONS


def test_linux_reads_and_writes_the_registers_of_a_plain_vdev(linux: Linux) -> None:
    said = linux.run(
        HELLO
        + """
        devmem $bar0 32
        devmem $((bar0 + 4)) 32 0xcafe; devmem $((bar0 + 4)) 32
        devmem $((bar0 + 4)) 32 0xbeef; devmem $((bar0 + 8)) 32
        """
    )
    assert said.split() == ["0x6F6C6568", "0x0000CAFE", "0x00000002"]


#: Gives vector 0 of hello the message of the entropy device's vector 0, whose count Linux shows: that of
#: configuration changes, of which that device has none.
BORROW_VECTOR = """
word() { dd if=$1/config bs=1 skip=$2 count=$3 2>&- | hexdump -ve "1/$3 \\"%0$(($3 * 2))x\\""; }
put() { printf $3 | dd of=$1/config bs=1 seek=$2 conv=notrunc 2>&-; }
table() {
    at=$((0x$(word $1 52 1)))
    while [ $((0x$(word $1 $at 1))) != 17 ]; do at=$((0x$(word $1 $((at + 1)) 1))); done
    place=$((0x$(word $1 $((at + 4)) 4)))
    bar=$(sed -n $(((place & 7) + 1))p $1/resource | cut -d' ' -f1)
    table=$((bar + (place & ~7)))
}
count() { sed -n 's/^ *[0-9]*: *\\([0-9]*\\) .*virtio4-config$/\\1/p' /proc/interrupts; }
table $(readlink -f /sys/bus/virtio/devices/virtio4/..); lender=$table
table $d
put $d 4 '\\006'
put $d $((at + 3)) '\\200'
for word in 0 4 8 12; do devmem $((table + word)) 32 $(devmem $((lender + word)) 32); done
"""


def test_the_interrupt_of_a_plain_vdev_comes_as_an_msix_message(linux: Linux) -> None:
    said = linux.run(HELLO + BORROW_VECTOR + "count; devmem $((bar0 + 4)) 32 1; sleep 0.2; count")
    before, after = (int(word) for word in said.split())
    assert after == before + 1


def test_linux_mounts_the_disk_and_reads_a_file_right(linux: Linux) -> None:
    known_sum(linux)


def test_what_linux_has_flushed_is_in_the_image(linux: Linux, server: Serve) -> None:
    write_and_flush(linux, server.folder / "disk.img")


def test_two_cards_on_one_cable_reach_each_other(linux: Linux) -> None:
    ping(linux)
    copy(linux)


def test_the_console_carries_text_both_ways(linux: Linux, server: Serve) -> None:
    with socket.socket(socket.AF_UNIX) as console:
        console.settimeout(60)
        console.connect(str(server.folder / "console"))
        number = linux.begin("""
            exec 0<>/dev/hvc0
            stty raw -echo
            echo ready >&0
            read line
            echo "got $line"
            echo "$line, hello host" >&0
        """)
        with console.makefile("rwb", buffering=0) as stream:
            assert stream.readline() == b"ready\n"
            stream.write(b"hello guest\n")
            assert linux.end(number) == "got hello guest"
            assert stream.readline() == b"hello guest, hello host\n"


def test_random_numbers_come_from_the_source_and_each_only_once(linux: Linux) -> None:
    said = linux.run("""
        for n in 1 2 3 4; do head -c 64 /dev/hwrng | hexdump -ve '1/1 "%02x"'; echo; done
    """)
    places = [RANDOM.find(bytes.fromhex(line)) for line in said.splitlines()]
    assert len(places) == 4 and min(places) >= 0 and places == sorted(set(places)), places


def test_every_queue_has_an_msix_vector_of_its_own(linux: Linux) -> None:
    said = linux.run("grep MSI /proc/interrupts")
    counts = {
        name: int(count) for count, name in re.findall(r"^ *\d+: +(\d+) .*edge +(virtio\S+)$", said, re.M)
    }
    assert {"virtio0-req.0", "virtio1-input.0", "virtio1-output.0", "virtio2-input.0"} <= set(counts), said
    assert counts["virtio0-req.0"] > 0 and counts["virtio2-input.0"] > 0, said


def test_a_driver_unbound_and_bound_again_finds_the_disk_as_it_was(linux: Linux) -> None:
    linux.run("""
        umount /mnt
        d=$(readlink -f /sys/block/vda/device/..); name=${d##*/}
        cd /sys/bus/pci/drivers/virtio-pci
        echo $name > unbind
        [ ! -e /sys/block/vda ] || exit 1
        echo $name > bind
        until [ -b /dev/vda ]; do sleep 0.05; done
        mount -t ext4 /dev/vda /mnt
    """)
    known_sum(linux)


def test_the_guest_reboots_on_the_same_connections(linux: Linux) -> None:
    linux.run("umount /mnt")
    linux.restart()
    assert linux.run(HELLO + "devmem $bar0 32") == "0x6F6C6568"
    linux.run("mount -t ext4 /dev/vda /mnt")
    known_sum(linux)
    linux.run(TWO_HOSTS)
    ping(linux)
    assert linux.run(LIST).splitlines() == FUNCTIONS


def test_after_a_client_killed_with_9_the_next_one_uses_the_devices_by_intx(
    linux: Linux, server: Serve
) -> None:
    """One guest dies in the midst of its writes; the next has no MSI."""
    linux.begin("while :; do cat /mnt/known > /mnt/never; sync; done")
    linux.kill()
    guest = started(server, append="pci=nomsi", cpus=2)
    try:
        assert guest.run(LIST).splitlines() == FUNCTIONS
        guest.run("mount -t ext4 /dev/vda /mnt")
        known_sum(guest)
        write_and_flush(guest, server.folder / "disk.img")
        guest.run(TWO_HOSTS)
        ping(guest)
        copy(guest)
        said = guest.run("umount /mnt; cat /proc/interrupts")
        assert "MSI" not in said and re.search(r"IO-APIC .*virtio0", said), said
    finally:
        guest.close()
    sound(server.folder / "disk.img")
    assert len(in_the_image(server.folder / "disk.img", "written")) == 3000000


def test_a_client_without_shared_memory_is_refused_and_told_the_option(tmp_path: Path) -> None:
    newer = obtained()
    server = Serve(tmp_path, '[[vdev]]\ntype = "hello"\nname = "hello0"\n', "vfio-user")
    machine = None
    try:
        words = [*newer.command, "-accel", "tcg", "-machine", "q35", "-m", "64M"]
        machine = Machine([*words, *attached(server, ["hello0"])], newer.environment)
        server.said("share=on")
        assert "memory-backend-memfd" in server.log
    finally:
        if machine is not None:
            machine.close()
        server.close()
    assert "Traceback" not in server.log


def test_the_server_had_nothing_to_complain_of(server: Serve) -> None:
    assert server.alive()
    assert "Traceback" not in server.log and "error" not in server.log, server.log
    assert server.stop() == 0
