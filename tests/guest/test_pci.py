"""PCI in a real Linux guest: what it finds is the seed's listing, and it uses what it finds."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]

#: The seed's own listing: address, ids, class, subsystem; by vdev type. ``{n}`` is the device number.
SEED = {
    "host bridge": "0000:00:00.0 1c05:0002 060000 0000:0000",
    "virtio-blk": "0000:00:{n:02x}.0 1af4:1042 018000 1c05:0042",
    "virtio-net": "0000:00:{n:02x}.0 1af4:1041 028000 1c05:0041",
    "shmem": "0000:00:{n:02x}.0 1c05:0001 058000 0000:0000",
    "virtio-console": "0000:00:{n:02x}.0 1af4:1043 078000 1c05:0043",
}
#: The seed's order, and the package that brings each type.
ORDER = {
    "virtio-blk": "qvm_virtio_blk",
    "virtio-net": "qvm_virtio_net",
    "shmem": "qvm_shmem",
    "virtio-console": "qvm_virtio_console",
}

CONSOLE = '[[vdev]]\ntype = "virtio-console"\nname = "console1"\nhostdev = "null"\n'

LIST = """
cd /sys/bus/pci/devices
for d in *; do
    set -- $(cat $d/vendor $d/device $d/class $d/subsystem_vendor $d/subsystem_device)
    echo "pci $d ${1#0x}:${2#0x} ${3#0x} ${4#0x}:${5#0x}"
done
"""


def blk(folder: Path, *keys: str) -> str:
    """A small disk on PCI."""
    path = folder / "pci.img"
    path.write_bytes(b"qvm on pci".ljust(1 << 20, b"\0"))
    return "\n".join(["[[vdev]]", 'type = "virtio-blk"', f'hostdev = "{path}"', *keys, ""])


def listed(text: str) -> list[str]:
    return [line.removeprefix("pci ") for line in text.splitlines() if line.startswith("pci 0000:")]


def test_the_guest_lists_what_the_seed_lists(start: Start, tmp_path: Path) -> None:
    tables = {
        "virtio-blk": blk(tmp_path),
        "virtio-net": '[[vdev]]\ntype = "virtio-net"\nnone = true\n',
        "shmem": f'[[vdev]]\ntype = "shmem"\ndirectory = "{tmp_path / "shm"}"\n',
        "virtio-console": CONSOLE,
    }
    kinds = [kind for kind, package in ORDER.items() if find_spec(package)]
    vm = start(LIST, vdevs="".join(tables[kind] for kind in kinds))
    assert vm.wait() == 0
    expected = [SEED["host bridge"], *(SEED[kind].format(n=n) for n, kind in enumerate(kinds, 1))]
    assert listed(vm.text) == expected


IRQS = """
modprobe virtio_pci 2>/dev/null
echo "data $(head -c 10 /dev/vda)"
echo 3 > /proc/sys/vm/drop_caches
dd if=/dev/vda of=/dev/null bs=64k count=4 2>/dev/null
grep -e virtio -e MSI /proc/interrupts
dmesg | grep -i 'GICv2m' | sed 's/^/log /'
"""


def test_msix_is_really_used(start: Start, tmp_path: Path) -> None:
    vm = start(IRQS, vdevs=blk(tmp_path))
    assert vm.wait() == 0
    assert "data qvm on pci" in vm.text
    assert re.search(r"log .*GICv2m: .*SPI\[112:239\]", vm.text)
    counts = re.findall(r"^ *\d+: +(\d+) +.*MSI.* +Edge +(virtio\d+-req\.0)$", vm.text, re.M)
    assert counts and int(counts[0][0]) > 0, vm.text


def test_without_msi_the_guest_uses_intx(start: Start, tmp_path: Path) -> None:
    vm = start(IRQS, vdevs=blk(tmp_path), cmdline="pci=nomsi")
    assert vm.wait() == 0
    assert "data qvm on pci" in vm.text
    counts = re.findall(r"^ *\d+: +(\d+) +GIC-0 +36 Level +virtio\d+$", vm.text, re.M)
    assert counts and int(counts[0]) > 0, vm.text


MOVE = r"""
d=/sys/bus/pci/devices/0000:00:01.0
word() { dd if=$d/config bs=4 skip=$1 count=1 2>/dev/null | hexdump -e '1/4 "%08x"'; }
put() { printf "$2" | dd of=$d/config bs=1 seek=$1 conv=notrunc 2>/dev/null; }
status() { devmem $(( $1 + 0x14 )) 8; }
echo 0000:00:01.0 > /sys/bus/pci/drivers/virtio-pci/unbind
base=$(sed -n 1p $d/resource | cut -d' ' -f1)
put 4 '\006'
echo "before $(word 5)$(word 4) $(status $base)"
put 20 '\201'
echo "moved $(word 5)$(word 4) $(status $base) $(status $(( base + 0x100000000 )))"
put 20 '\000'
put 16 '\000\000\000\100'
echo "ram $(word 5)$(word 4) $(status $base)"
put 16 '\000\000\000\000'
put 20 '\200'
echo "back $(status $base)"
echo 0000:00:01.0 > /sys/bus/pci/drivers/virtio-pci/bind
echo "data $(head -c 10 /dev/vda)"
"""


def test_a_guest_moves_a_bar_and_puts_it_over_ram(start: Start, tmp_path: Path) -> None:
    vm = start(MOVE, vdevs=blk(tmp_path))
    assert vm.wait() == 0
    # The device status reads ACKNOWLEDGE where the BAR decodes, and all ones where nothing does.
    assert "before 0000008000000004 0x01" in vm.text
    assert "moved 0000008100000004 0xFF 0x01" in vm.text
    assert "ram 0000000040000004 0xFF" in vm.text
    assert "back 0x01" in vm.text
    assert "data qvm on pci" in vm.text
    assert "00:01.0: not decoded (said once): virtio-blk-0 BAR 0 at 0x40000000 is outside" in vm.text


def test_fixed_places_and_a_filler_for_function_0(start: Start, tmp_path: Path) -> None:
    pytest.importorskip("qvm_pci_dummy", reason="qvm-pci-dummy is missing: pip install qvm-pci-dummy")
    dummy = '[[vdev]]\ntype = "pci-dummy"\nloc = "pci:0:5"\nvendor = 0x1234\nreg = ["0x40/4=0xcafe"]\n'
    script = (
        LIST + 'hexdump -s 64 -n 2 -e \'1/2 "reg %04x" "\\n"\' 0000:00:05.0/config\nhead -c 10 /dev/vda\n'
    )
    vm = start(script, vdevs=dummy + blk(tmp_path, 'loc = "pci:0:5.1"') + CONSOLE)
    assert vm.wait() == 0
    assert listed(vm.text) == [
        SEED["host bridge"],
        SEED["virtio-console"].format(n=1),
        "0000:00:05.0 1234:00ff ff0000 0000:0000",
        "0000:00:05.1 1af4:1042 018000 1c05:0042",
    ]
    assert "reg cafe" in vm.text
    assert "qvm on pci" in vm.text


def test_a_mixed_machine_has_both(start: Start, tmp_path: Path) -> None:
    mapped = blk(tmp_path, "loc = 0x1c0d0000", 'intr = "gic:41"')
    vm = start(LIST + "cat /proc/iomem; head -c 10 /dev/vda\n", vdevs=mapped + CONSOLE)
    assert vm.wait() == 0
    assert listed(vm.text) == [SEED["host bridge"], SEED["virtio-console"].format(n=1)]
    assert re.search(r"1c0d0000-1c0d01ff : .*virtio", vm.text), vm.text
    assert "qvm on pci" in vm.text


def test_no_pci_no_bus(start: Start) -> None:
    vm = start("ls /sys/bus/pci/devices | wc -l | sed 's/^/devices /'\n")
    assert vm.wait() == 0
    assert "devices 0" in vm.text
