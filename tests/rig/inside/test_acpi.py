"""What an unmodified Debian kernel makes of the board's ACPI tables: its log has no complaint about them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.rig.inside import linux
from tests.rig.inside.conftest import Start, finish, run_qvm

#: What the kernel says of tables that are wrong, and of two that claim the same.
COMPLAINTS = (
    r"ACPI (BIOS )?(Error|Warning|Exception)|\[Firmware (Bug|Warn|Info)\]|could not be reserved"
    r"|no GSI|can.t find IRQ|AE_[A-Z]|Invalid bus_irq|conflicts with|can.t claim|no compatible bridge"
)
#: With PCI or without; a disk on PCI, and a disk and a console by direct mapping.
MACHINES = {
    "pci": linux.vdev("virtio-entropy", "rng-pci")
    + linux.vdev("virtio-entropy", "rng-mmio", loc=0xC000_0000, intr="ioapic:10"),
    "no-pci": linux.vdev("virtio-entropy", "rng-mmio", loc=0xC000_0000, intr="ioapic:10"),
}


def told(guest: linux.Shell, pattern: str) -> str:
    """The lines of the kernel's log with the pattern (of grep -E). The whole log would be 25,000 exits."""
    return guest.run(f"grep -iE '{pattern}' /log; true")


@pytest.fixture(scope="module", params=sorted(MACHINES))
def guest(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[linux.Shell]:
    """A guest with two CPUs at its shell. ``with_pci`` of it says which machine it is."""
    path = tmp_path_factory.mktemp("acpi") / f"{request.param}.toml"
    vm = run_qvm(linux.machine(path, MACHINES[request.param], cpus=2))
    try:
        shell = linux.Shell(vm)
        shell.run("mkdir -p /sys /proc; dmesg > /log")
        yield shell
    finally:
        finish(vm)


def test_the_kernel_finds_the_tables_and_no_fault_in_them(guest: linux.Shell) -> None:
    log = told(guest, "ACPI: ")
    for name in ("RSDP 0x00000000000E0000", "FACP", "DSDT", "FACS", "APIC"):
        assert f"ACPI: {name}" in log, log
    assert "ACPI: Interpreter enabled" in log
    assert "ACPI: PM: (supports S0 S5)" in log
    assert "ACPI: Using IOAPIC for interrupt routing" in log
    assert told(guest, COMPLAINTS) == ""


def test_every_device_of_the_dsdt_is_there_once(guest: linux.Shell) -> None:
    found = sorted(guest.run("ls /sys/bus/acpi/devices").split())
    wanted = ["ACPI0007:00", "ACPI0007:01", "LNRO0005:00", "LNXPWRBN:00", "LNXSYBUS:00", "LNXSYSTM:00"]
    wanted += ["PNP0501:00", "PNP0B00:00", "PNP0C02:00"]
    has_pci = "PNP0A08:00" in found
    # Linux has a second bus of its own, for thermal zones.
    assert set(found) == {*wanted, "LNXSYBUS:01"} | ({"PNP0A08:00"} if has_pci else set())


def test_com1_is_ttys0_and_the_clock_is_rtc0(guest: linux.Shell) -> None:
    log = told(guest, "ttyS0|rtc_cmos")
    assert re.search(r"00:0\d: ttyS0 at I/O 0x3f8 \(irq = 4, base_baud = 115200\)", log), log
    assert re.search(r"rtc_cmos 00:0\d: registered as rtc0", log), log


def test_interrupts_are_the_lines_of_the_tables(guest: linux.Shell) -> None:
    shown = guest.run("cat /proc/interrupts")
    assert re.search(r"^ *9:.* IO-APIC +9-fasteoi +acpi$", shown, re.MULTILINE), shown
    assert re.search(r"^ *10:.* IO-APIC +10-fasteoi +virtio\d$", shown, re.MULTILINE), shown
    assert re.search(r"^ *4:.* IO-APIC +4-fasteoi +ttyS0$", shown, re.MULTILINE), shown


def test_configuration_space_is_reserved_and_used(guest: linux.Shell) -> None:
    log = told(guest, "MMCONFIG|_OSC|root bus resource")
    ports = guest.run("grep -E 'ACPI|MMCONFIG' /proc/iomem /proc/ioports")
    assert re.search(r"0600-0603 : ACPI PM1a_EVT_BLK", ports), ports
    assert re.search(r"0604-0605 : ACPI PM1a_CNT_BLK", ports), ports
    if "PNP0A08:00" not in guest.run("ls /sys/bus/acpi/devices"):
        assert "MMCONFIG" not in log
        return
    assert re.search(r"MMCONFIG at \[mem 0xf0000000-0xf00fffff\] reserved", log), log
    assert re.search(r"f0000000-f00fffff : PCI MMCONFIG 0000 \[bus 00-00\]", ports), ports
    assert re.search(r"_OSC: OS now controls \[.*PCIeCapability", log), log
    assert "root bus resource [bus 00]" in log
    assert "root bus resource [mem 0xd0000000-0xefffffff window]" in log
    assert "root bus resource [mem 0x4000000000-0x7fffffffff window]" in log


def test_pins_of_pci_devices_are_routed_to_their_lines(start: Start) -> None:
    """Without MSI, by _PRT: device 1 is on the automatic line, device 2 on one of its own below 16."""
    script = """
        for n in 0 1; do echo virtio_rng.$n > /sys/class/misc/hw_random/rng_current
            dd if=/dev/hwrng of=/dev/null bs=16 count=4 2> /dev/null || echo no bytes from $n; done
        cat /proc/interrupts"""
    vdevs = linux.vdev("virtio-entropy", "one", loc="pci:0:1")
    vdevs += linux.vdev("virtio-entropy", "two", loc="pci:0:2", intr="ioapic:11")
    vm = start(script, vdevs, cmdline="pci=nomsi")
    assert vm.wait() == 0, vm.text
    assert "no bytes" not in vm.text
    for number, name in ((21, "virtio0"), (11, "virtio1")):
        match = re.search(rf"^ *\d+: +(\d+) +IO-APIC +{number}-fasteoi +{name}\r?$", vm.text, re.MULTILINE)
        assert match, vm.text
        assert int(match[1]) > 0, vm.text
