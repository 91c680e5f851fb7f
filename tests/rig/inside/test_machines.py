"""Machines of other shapes: memory beyond the devices, no message interrupts, engine = "auto"."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path

from tests.rig.inside import linux
from tests.rig.inside.conftest import Start


def test_memory_goes_on_above_4_gib(start: Start) -> None:
    """3 GiB below the devices, 2 above them; the machine itself has less and gives what is touched."""
    vm = start("grep MemTotal /proc/meminfo; grep 'System RAM' /proc/iomem", cpus=2, ram="5G")
    assert vm.wait() == 0, vm.text
    found = re.search(r"MemTotal: +(\d+) kB", vm.text)
    assert found is not None
    assert int(found[1]) > 4.8 * (1 << 20), vm.text
    assert "100000000-17fffffff : System RAM" in vm.text
    assert "-bfffffff : System RAM" in vm.text


def test_pci_interrupts_by_lines(start: Start, tmp_path: Path) -> None:
    """A kernel without message interrupts: INTA to INTD as the _PRT tells, level at the I/O APIC."""
    data = random.Random(1).randbytes(4 << 20)
    vdevs = ""
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(data)
        vdevs += linux.vdev("virtio-blk", name, hostdev=str(tmp_path / name))
    script = "for d in vda vdb; do echo $d: $(dd if=/dev/$d bs=64k | md5sum); done; cat /proc/interrupts"
    vm = start(script, vdevs, cmdline="pci=nomsi")
    assert vm.wait() == 0, vm.text
    for disk in ("vda", "vdb"):
        assert f"{disk}: {hashlib.md5(data).hexdigest()}" in vm.text
    assert "PCI-MSI" not in vm.text
    raised = re.findall(r"^ *(2[0-3]): +(\d+) +IO-APIC +\1-fasteoi +virtio\d", vm.text, re.MULTILINE)
    assert len({line for line, _ in raised}) == 2, vm.text
    assert all(int(count) > 0 for _, count in raised)


def test_auto_takes_kvm_and_says_so(start: Start) -> None:
    vm = start("uname -m", engine="auto")
    assert vm.wait() == 0, vm.text
    assert "qvm: engine: kvm, native\n" in vm.text
    assert "x86_64" in vm.text
