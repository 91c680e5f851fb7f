"""What a guest sees of a physical function, and what reaches that function."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from qvm_pass.device import Pass
from qvm_quiesce import pci
from qvm_vfio import structs
from qvm_vfio.fake import FakeFunction, FakeKernel
from qvm_vfio.sysfs import PciFunction

from qvmcore.api import ConfigError, DirectPart, HostError, MemorySpec
from qvmcore.testing.fakes import Plugged, plug
from qvmcore.testing.pci_driver import PciDevice

NAME = "0000:03:00.0"
MASTER, MEMORY = pci.COMMAND_BUS_MASTER, pci.COMMAND_MEMORY
MSIX_AT = 0x40
#: Where the vector table's BAR is: the lowest number that the device has no BAR for, or only an I/O BAR.
TABLE_BAR = 2


def host_of(plugged: Plugged[Pass]) -> FakeKernel:
    kernel = plugged.vdev.kernel
    assert isinstance(kernel, FakeKernel)
    return kernel


def device_of(plugged: Plugged[Pass]) -> PciDevice:
    assert plugged.device is not None
    return plugged.device


def program(plugged: Plugged[Pass], vector: int, message: int, *, masked: bool = False) -> None:
    """The guest writes an entry of the vector table."""
    base = device_of(plugged).bars[TABLE_BAR][0] + 16 * vector
    for at, value in ((0, 0xFEE0_0000), (4, 0), (8, message), (12, int(masked))):
        plugged.bus.write(base + at, 4, value)


def enable_msix(plugged: Plugged[Pass], on: bool = True) -> None:
    device_of(plugged).write(MSIX_AT + 2, pci.MSIX_ENABLE * on, 2)


# -- identity, BARs, capabilities ----------------------------------------------------------------------


def test_the_guest_finds_the_device_by_its_numbers(passed: Any) -> None:
    device = device_of(passed())
    assert device.read(0x00) == 0x1234_8086
    assert device.read(0x08) == 0x0108_0203
    assert device.read(0x2C) == 0x5678_8086


def test_memory_bars_keep_number_size_and_kind(passed: Any) -> None:
    function = FakeFunction(bars={0: (0x4000, 0x4), 2: (0x20, 0x1), 3: (0x10_0000, 0xC), 5: (0x1000, 0x0)})
    plugged = passed(function)
    device = device_of(plugged)
    sizes = {number: size for number, (_, size) in device.bars.items()}
    assert sizes == {0: 0x4000, 2: 0x1000, 3: 0x10_0000, 5: 0x1000}
    assert device.read(0x10) & 0xF == 0x4
    assert device.read(0x1C) & 0xF == 0xC
    assert "I/O BAR 2" in plugged.vdev.status()["hidden"]


def test_what_is_not_known_to_be_safe_is_not_there(passed: Any) -> None:
    """VPD, and all of the extended space: SR-IOV, ATS, PRI, PASID."""
    plugged = passed()
    device = device_of(plugged)
    kinds = [kind for _, kind in device.capabilities()]
    assert kinds == [pci.CAP_MSIX, pci.CAP_PM, pci.CAP_MSI, pci.CAP_EXPRESS]
    assert all(device.read(at) == 0 for at in range(0x100, 0x1000, 4))
    assert plugged.vdev.status()["hidden"] == ["I/O BAR 2", "VPD", "SR-IOV"]


def test_a_vendor_s_capability_is_shown_read_only(passed: Any) -> None:
    function = FakeFunction()
    original = function.config

    def with_vendor() -> bytes:
        space = bytearray(original())
        space[0xB0:0xB8] = bytes((0x09, 0, 8, 1, 2, 3, 4, 5))
        return bytes(space)

    function.config = with_vendor  # type: ignore[method-assign]
    device = device_of(passed(function))
    (at,) = [at for at, kind in device.capabilities() if kind == 0x09]
    device.write(at + 4, 0xFFFF_FFFF)
    assert bytes(device.read(at + n, 1) for n in range(2, 8)) == bytes((8, 1, 2, 3, 4, 5))


#: Whose writes have consequences, each with a test of its own: command, MSI-X control, MSI control, FLR.
CONSEQUENT = {pci.COMMAND, MSIX_AT, 0x54, 0x74}


def test_a_capability_is_not_shown_because_it_looks_like_a_vendor_s(passed: Any) -> None:
    function = FakeFunction()
    original = function.config

    def with_length() -> bytes:
        space = bytearray(original())
        space[0xB2] = space[0x4A] = 8
        return bytes(space)

    function.config = with_length  # type: ignore[method-assign]
    kinds = [kind for _, kind in device_of(passed(function)).capabilities()]
    assert kinds == [pci.CAP_MSIX, pci.CAP_PM, pci.CAP_MSI, pci.CAP_EXPRESS]


@pytest.mark.parametrize("offset", sorted(set(range(0, 0x100, 4)) - CONSEQUENT))
def test_no_write_of_the_guest_to_configuration_space_reaches_more_than_the_command(
    passed: Any, offset: int
) -> None:
    plugged = passed()
    kernel = host_of(plugged)
    before = [kernel.config(NAME, at, 4) for at in range(0, 0x100, 4)]
    device_of(plugged).write(offset, 0xFFFF_FFFF)
    assert [kernel.config(NAME, at, 4) for at in range(0, 0x100, 4)] == before


def test_the_device_answers_in_its_registers(passed: Any) -> None:
    plugged = passed()
    kernel, base = host_of(plugged), device_of(plugged).bars[0][0]
    kernel.poke(NAME, 0, 0x1C, b"\x78\x56\x34\x12")
    assert plugged.bus.read(base + 0x1C, 4) == 0x1234_5678
    for size in (1, 2, 4, 8):
        plugged.bus.write(base + 0x40, size, 0x8877_6655_4433_2211 & (1 << 8 * size) - 1)
        assert plugged.bus.read(base + 0x40, size) == 0x8877_6655_4433_2211 & (1 << 8 * size) - 1


def test_a_device_that_fails_reads_as_all_ones_and_lives_on(passed: Any) -> None:
    plugged = passed()
    kernel, base = host_of(plugged), device_of(plugged).bars[0][0]
    kernel.poke(NAME, structs.CONFIG_REGION, pci.COMMAND, b"\0\0")
    assert plugged.bus.read(base, 4) == 0xFFFF_FFFF
    plugged.bus.write(base, 4, 1)
    assert plugged.vdev.status()["failures"] == 2
    assert not plugged.ctx.faults


# -- registers mapped into the guest --------------------------------------------------------------------


def parts_of(plugged: Plugged[Pass]) -> tuple[DirectPart, ...]:
    """What the bus offers an engine of BAR 0."""
    (mapped,) = [each for each in plugged.bus if each.base == device_of(plugged).bars[0][0]]
    return mapped.handler.direct


def test_whole_pages_without_the_vector_table_may_be_mapped(passed: Any) -> None:
    """Its table is in the first page."""
    plugged = passed()
    (part,) = parts_of(plugged)
    assert (part.offset, part.size) == (0x1000, 0x3000)
    assert plugged.vdev.status()["direct"] == 0x3000
    plugged.bus.read(device_of(plugged).bars[0][0] + 0xFFC, 4)
    assert plugged.vdev.status()["direct"] == 0x3000
    plugged.bus.write(device_of(plugged).bars[0][0] + 0x1010, 4, 0xCAFE)
    assert ctypes.string_at(part.host_address + 0x10, 4) == b"\xfe\xca\0\0"
    assert plugged.vdev.status()["direct"] == 0, "an engine that maps it does not bring such an access here"


def test_mapped_registers_are_covered_when_the_device_is_taken_away(passed: Any) -> None:
    """Also from a guest that could not be stopped."""
    plugged = passed()
    (part,) = parts_of(plugged)
    page = (ctypes.c_char * 16).from_address(part.host_address)
    reader, writer = os.pipe()
    assert os.write(writer, page) == 16
    (hardware,) = plugged.vdev.hardware()
    hardware.revoke()
    hardware.revoke()
    with pytest.raises(OSError, match="Bad address"):
        os.write(writer, page)
    for fd in (reader, writer):
        os.close(fd)


def test_nothing_is_mapped_where_the_user_does_not_want_it(passed: Any) -> None:
    assert parts_of(passed(direct=False)) == ()


def test_registers_are_covered_even_if_the_interrupts_cannot_be_ended(passed: Any) -> None:
    plugged = passed()
    (part,) = parts_of(plugged)
    (hardware,) = plugged.vdev.hardware()

    def fail() -> None:
        raise RuntimeError("KVM is broken")

    hardware.on_revoke = fail
    with pytest.raises(RuntimeError):
        hardware.revoke()
    with pytest.raises(OSError, match="Bad address"):
        os.preadv(hardware.device.fd, [(ctypes.c_char * 16).from_address(part.host_address)], 0)


@pytest.mark.parametrize("vectors", [0, 4])
def test_a_mapped_device_has_its_intx(passed: Any, vectors: int) -> None:
    plugged = passed(FakeFunction(vectors=vectors))
    assert parts_of(plugged)
    assert device_of(plugged).read(0x3D, 1) == 1
    assert host_of(plugged).kind == structs.INTX


# -- DMA -------------------------------------------------------------------------------------------------


def test_bus_mastering_is_off_until_the_guest_switches_it_on(passed: Any) -> None:
    plugged = passed()
    kernel, device = host_of(plugged), device_of(plugged)
    address = plugged.memory.regions[0].start + 0x2000
    device.write(pci.COMMAND, MEMORY, 2)
    assert kernel.config(NAME, pci.COMMAND, 2) == MEMORY
    assert not kernel.dma(NAME, address, b"early")
    device.write(pci.COMMAND, MEMORY | MASTER, 2)
    assert kernel.config(NAME, pci.COMMAND, 2) == MEMORY | MASTER
    assert kernel.dma(NAME, address, b"hello")
    assert plugged.memory.read(address, 5) == b"hello"
    device.write(pci.COMMAND, 0, 2)
    assert not kernel.dma(NAME, address, b"later")
    assert kernel.config(NAME, pci.COMMAND, 2) == MEMORY, "the physical decoding stays, the BAR left the bus"


def test_all_of_the_guest_s_memory_is_mapped_where_the_guest_has_it(passed: Any) -> None:
    plugged = passed(start=False)
    kernel = host_of(plugged)
    assert not kernel.mappings, "not before the start"
    plugged.vdev.on_starting()
    region = plugged.memory.regions[0]
    assert kernel.mappings == {region.start: (region.size, region.host_address)}
    assert not kernel.dma(NAME, region.end, b"outside")


def test_rom_is_not_the_device_s(host: Any) -> None:
    kernel = host()
    specs = (MemorySpec(0x8000_0000, 1 << 20), MemorySpec(0x9000_0000, 1 << 16, rom=True))
    with plug(Pass, {"device": NAME}, ram=specs) as plugged:
        assert list(kernel.mappings) == [0x8000_0000]
        (hardware,) = plugged.vdev.hardware()
        assert [view.nbytes for view in hardware.memory()] == [1 << 20]


def test_memory_is_looked_at_by_several_threads_at_the_same_time(passed: Any) -> None:
    """Each device is proven quiet on a thread of its own. With a GIL this holds anyway."""
    plugged = passed(start=False)
    (hardware,) = plugged.vdev.hardware()
    together = threading.Barrier(2)
    views: list[memoryview] = []

    def look() -> None:
        together.wait()
        (view,) = hardware.memory()
        views.append(view)
        for start in range(60_000):
            view[start : start + 16]

    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(look) for _ in range(2)]:
            done.result()
    assert [view.nbytes for view in views] == [plugged.memory.regions[0].size] * 2
    threads_meet = not getattr(sys, "_is_gil_enabled", lambda: True)()
    assert (views[0] is not views[1]) == threads_meet, "one for each, where threads meet"


def test_the_end_gives_everything_back(passed: Any) -> None:
    plugged = passed()
    enable_msix(plugged)
    kernel = host_of(plugged)
    assert kernel.open_fds
    plugged.terminate()
    assert not kernel.open_fds
    plugged.vdev.on_terminate(None)


# -- interrupts ------------------------------------------------------------------------------------------


def test_msix_of_the_device_arrives_as_the_guest_programmed_it(passed: Any) -> None:
    plugged = passed()
    kernel = host_of(plugged)
    for vector in range(4):
        program(plugged, vector, 0x40 + vector)
    assert not kernel.fire(structs.MSIX, 2), "the guest has not switched it on"
    enable_msix(plugged)
    assert kernel.fire(structs.MSIX, 2)
    plugged.settle()
    assert plugged.pci is not None
    assert plugged.pci.messages == [(0xFEE0_0000, 0x42)]
    enable_msix(plugged, False)
    assert not kernel.fire(structs.MSIX, 2)


def test_a_masked_vector_stays_pending(passed: Any) -> None:
    plugged = passed()
    program(plugged, 1, 0x41, masked=True)
    enable_msix(plugged)
    host_of(plugged).fire(structs.MSIX, 1)
    plugged.settle()
    assert plugged.pci is not None
    assert plugged.pci.messages == []
    program(plugged, 1, 0x51)
    plugged.settle()
    assert plugged.pci.messages == [(0xFEE0_0000, 0x51)]


@pytest.mark.parametrize(("option", "expected"), [(32, 4), (2, 2)])
def test_the_number_of_vectors_is_the_device_s_up_to_the_option(
    passed: Any, option: int, expected: int
) -> None:
    plugged = passed(vectors=option)
    assert (device_of(plugged).read(MSIX_AT + 2, 2) & 0x7FF) + 1 == expected
    enable_msix(plugged)
    assert len(host_of(plugged).eventfds) == expected


def test_intx_holds_its_level_until_the_guest_looks_at_the_device(passed: Any) -> None:
    plugged = passed(FakeFunction(vectors=0), direct=False)
    kernel, base = host_of(plugged), device_of(plugged).bars[0][0]
    assert kernel.fire(structs.INTX)
    plugged.settle()
    assert plugged.irq.level
    assert not kernel.fire(structs.INTX), "masked in the kernel"
    plugged.bus.read(base, 4)
    assert not plugged.irq.level
    assert kernel.fire(structs.INTX), "it still wants something"
    plugged.settle()
    assert plugged.irq.level


def test_intx_and_msix_replace_each_other(passed: Any) -> None:
    plugged = passed(direct=False)
    kernel = host_of(plugged)
    assert kernel.kind == structs.INTX
    enable_msix(plugged)
    assert kernel.kind == structs.MSIX
    enable_msix(plugged, False)
    assert kernel.kind == structs.INTX


def test_a_host_out_of_interrupts_is_a_warning_and_no_end(passed: Any) -> None:
    plugged = passed()
    host_of(plugged).errors["DEVICE_SET_IRQS"] = errno.ENOSPC
    enable_msix(plugged)
    assert plugged.vdev.status()["failures"] == 1
    assert not plugged.ctx.faults


# -- the guest's reset -----------------------------------------------------------------------------------


def flr(plugged: Plugged[Pass]) -> None:
    device = device_of(plugged)
    at = {kind: at for at, kind in device.capabilities()}[pci.CAP_EXPRESS]
    device.write(at + pci.EXPRESS_DEVICE_CONTROL, pci.EXPRESS_START_FLR, 2)


def test_a_function_level_reset_of_the_guest_stops_dma_first(passed: Any) -> None:
    plugged = passed()
    kernel, device = host_of(plugged), device_of(plugged)
    enable_msix(plugged)
    kernel.poke(NAME, 0, 0x14, b"\1")
    assert kernel.config(NAME, pci.COMMAND, 2) & MASTER
    flr(plugged)
    assert kernel.calls.count("DEVICE_RESET") == 1
    assert device.read(pci.COMMAND, 2) == 0
    assert not device.read(MSIX_AT + 2, 2) & pci.MSIX_ENABLE
    assert kernel.config(NAME, pci.COMMAND, 2) == MEMORY
    device.write(pci.COMMAND, MEMORY | MASTER, 2)
    assert plugged.bus.read(device.bars[0][0] + 0x14, 1) == 0
    assert plugged.vdev.status()["resets"] == 1


def test_a_device_without_a_reset_does_not_offer_one(passed: Any) -> None:
    other = FakeFunction("0000:03:00.1", group=8, driver="nvme")
    plugged = passed(FakeFunction(resets=""), other)
    device = device_of(plugged)
    at = {kind: at for at, kind in device.capabilities()}[pci.CAP_EXPRESS]
    assert not device.read(at + pci.EXPRESS_DEVICE_CAPABILITIES) & pci.EXPRESS_FLR
    flr(plugged)
    assert "DEVICE_RESET" not in host_of(plugged).calls


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "write one of device and hostdev"),
        ({"device": "pci:0000:03:00.0", "hostdev": "pci:0000:03:00.0"}, "write one of"),
        ({"device": "0000:03"}, "no PCI address"),
        ({"device": "../../../etc/passwd"}, "no PCI address"),
        ({"device": "pci:0000:03:00.0", "vectors": 0}, "vectors"),
    ],
)
def test_options_that_name_no_device(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plug(Pass, options)


def test_two_vdevs_cannot_have_the_same_device() -> None:
    first = Pass.Options(device="pci:0000:03:00.0")
    second = Pass.Options(hostdev="0000:03:00.0")
    assert Pass.claims(first) == Pass.claims(second)


def test_a_device_of_the_host_is_refused_with_the_way_to_get_it(passed: Any) -> None:
    with pytest.raises(HostError, match="belongs to the host's driver nvme") as caught:
        passed(FakeFunction(driver="nvme"))
    assert "qvm_vfio bind 0000:03:00.0" in caught.value.hint
    assert PciFunction(Pass.kernel, NAME).driver == "nvme"


def test_a_group_that_is_not_all_ours_is_refused_by_name(passed: Any) -> None:
    with pytest.raises(HostError, match=r"0000:03:00\.1 \(snd_hda_intel\)"):
        passed(FakeFunction(), FakeFunction("0000:03:00.1", driver="snd_hda_intel"))


def test_memory_that_cannot_be_pinned_is_refused_before_the_start(host: Any) -> None:
    kernel = host()
    kernel.errors["IOMMU_MAP_DMA"] = errno.ENOMEM
    with pytest.raises(HostError, match="for DMA") as caught:
        plug(Pass, device=f"pci:{NAME}")
    assert "ulimit -l" in caught.value.hint
    assert not kernel.open_fds


def test_nothing_reaches_a_device_that_was_taken_away(passed: Any) -> None:
    plugged = passed()
    kernel, device = host_of(plugged), device_of(plugged)
    base = device.bars[0][0]
    (hardware,) = plugged.vdev.hardware()
    hardware.revoke()
    hardware.config_write(pci.COMMAND, 2, MEMORY)
    plugged.bus.write(base + 0x40, 4, 0xBAD)
    assert plugged.bus.read(base + 0x40, 4) == 0xFFFF_FFFF
    device.write(pci.COMMAND, 0, 2)
    device.write(pci.COMMAND, MEMORY | MASTER, 2)
    enable_msix(plugged)
    flr(plugged)
    assert kernel.config(NAME, pci.COMMAND, 2) == MEMORY
    assert os.pread(kernel.device_fd(NAME), 4, 0x40) == bytes(4)
    assert "DEVICE_RESET" not in kernel.calls
