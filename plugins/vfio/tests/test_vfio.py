"""Taking functions over, and what people are told when they cannot have one."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from qvm_quiesce import pci
from qvm_vfio import space, structs, sysfs
from qvm_vfio.__main__ import main
from qvm_vfio.errors import VfioError
from qvm_vfio.fake import FakeFunction, FakeKernel
from qvm_vfio.hardware import Ram, VfioHardware, adopt, open_device

NAME = "0000:03:00.0"
Host = Callable[..., FakeKernel]


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """``host(function, ...)``: a host with these functions, by default one."""
    made: list[FakeKernel] = []

    def make(*functions: FakeFunction) -> FakeKernel:
        made.append(FakeKernel(tmp_path / f"host{len(made)}", functions or (FakeFunction(),)))
        return made[-1]

    yield make
    for kernel in made:
        kernel.close_all()


@pytest.fixture
def ram() -> Iterator[Ram]:
    """One page at 16 MiB for the device."""
    import ctypes
    import mmap

    fd = os.memfd_create("ram")
    os.ftruncate(fd, 4096)
    memory = mmap.mmap(fd, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    yield Ram(16 << 20, 4096, fd, address, lambda: memoryview(memory))
    os.close(fd)


@pytest.mark.parametrize("text", ["pci:0000:03:00.0", "0000:03:00.0", "03:00.0", "PCI:0000:03:00.0".lower()])
def test_an_address_can_be_written_in_short(text: str) -> None:
    assert sysfs.address(text) == NAME


@pytest.mark.parametrize("text", ["", "3:0", "0000:03:00.8", "../../etc", "0000:03:00.0/x", "gic:41"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(VfioError, match="no PCI address"):
        sysfs.address(text)


# -- what people are told --------------------------------------------------------------------------


def test_no_such_function(host: Host) -> None:
    with pytest.raises(VfioError, match=r"no PCI function 0000:04:00\.0 .*lspci"):
        open_device("0000:04:00.0", host())


def test_no_iommu(host: Host) -> None:
    kernel = host()
    (kernel.sys / "bus/pci/devices" / NAME / "iommu_group").unlink()
    with pytest.raises(VfioError, match=r"in no IOMMU group.*intel_iommu=on"):
        open_device(NAME, kernel)


def test_a_group_without_an_iommu_behind_it_is_none(host: Host) -> None:
    """The kernel's unsafe no-IOMMU mode makes groups that protect nothing."""
    kernel = host()
    (kernel.sys / "kernel/iommu_groups/7/name").write_text("vfio-noiommu\n")
    with pytest.raises(VfioError, match="in no IOMMU group"):
        open_device(NAME, kernel)


@pytest.mark.parametrize(("driver", "said"), [("nvme", "belongs to the host's driver nvme"), ("", "has no")])
def test_a_driver_of_the_host_is_never_taken_away_silently(host: Host, driver: str, said: str) -> None:
    kernel = host(FakeFunction(driver=driver))
    with pytest.raises(VfioError, match=rf"{said}.*modprobe vfio-pci && sudo .* bind 0000:03:00\.0"):
        open_device(NAME, kernel)
    assert sysfs.PciFunction(kernel, NAME).driver == driver
    assert kernel.calls == []


def test_a_group_with_a_function_of_the_host_is_refused_by_name(host: Host) -> None:
    kernel = host(
        FakeFunction(),
        FakeFunction("0000:03:00.1", driver="snd_hda_intel"),
        FakeFunction("0000:03:00.2", driver=""),
        FakeFunction("0000:03:00.3"),
        FakeFunction("0000:00:01.0", driver="pcieport", class_code=0x060400),
        FakeFunction("0000:09:00.0", driver="nvme", group=8),
    )
    with pytest.raises(VfioError) as caught:
        open_device(NAME, kernel)
    assert "0000:03:00.1 (snd_hda_intel), 0000:03:00.2 (no driver)" in str(caught.value)
    assert not any(name in str(caught.value) for name in ("03:00.3", "00:01.0", "09:00.0"))


def test_a_group_that_is_not_viable(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's own look at the group, should it disagree with ours."""
    kernel = host(FakeFunction(), FakeFunction("0000:03:00.1", driver="nvme"))
    monkeypatch.setattr(sysfs.PciFunction, "check", lambda self: 7)
    with pytest.raises(VfioError, match="group 7 is not viable"):
        open_device(NAME, kernel)
    assert not kernel.open_fds


@pytest.mark.parametrize(
    ("file", "number", "said"),
    [
        ("vfio", errno.ENOENT, r"no VFIO.*modprobe -a vfio-pci"),
        ("vfio", errno.ENODEV, r"no VFIO"),
        ("vfio", errno.EACCES, r"no permission to open .*dev/vfio/vfio"),
        ("7", errno.EACCES, r"no permission to open .*dev/vfio/7; sudo chown"),
        ("7", errno.EPERM, r"no permission"),
        ("7", errno.ENOENT, r"there is no .*dev/vfio/7"),
        ("7", errno.EMFILE, r"ulimit -n"),
        ("SET_IOMMU", errno.ENODEV, r"the IOMMU cannot be used"),
        ("GROUP_GET_DEVICE_FD", errno.EINVAL, r"0000:03:00\.0 cannot be opened"),
        ("DEVICE_GET_INFO", errno.ENOTTY, r"is not a VFIO device"),
    ],
)
def test_every_failure_says_what_to_do_and_leaves_nothing_open(
    host: Host, file: str, number: int, said: str
) -> None:
    kernel = host()
    kernel.errors[file] = number
    with pytest.raises(VfioError, match=said):
        open_device(NAME, kernel)
    assert not kernel.open_fds


def test_a_group_in_use_names_the_process(host: Host) -> None:
    kernel = host()
    kernel.errors["7"] = errno.EBUSY
    holder = kernel.proc / "4711/fd"
    holder.mkdir(parents=True)
    (holder / "5").symlink_to(kernel.dev / "7")
    with pytest.raises(VfioError, match="group 7 is in use by process 4711"):
        open_device(NAME, kernel)


def test_locked_memory_is_named_when_mapping_fails(host: Host, ram: Ram) -> None:
    kernel = host()
    hardware = open_device(NAME, kernel)
    hardware.give_memory([ram])
    kernel.errors["IOMMU_MAP_DMA"] = errno.ENOMEM
    with pytest.raises(VfioError, match="ulimit -l"):
        hardware.map_dma()
    hardware.close()


def test_memory_is_mapped_whole_or_not_at_all(host: Host, ram: Ram) -> None:
    kernel = host()
    hardware = open_device(NAME, kernel)
    hardware.give_memory([ram, ram])
    with pytest.raises(VfioError, match="cannot map"):
        hardware.map_dma()
    assert not kernel.mappings
    hardware.close()


def test_another_version_of_vfio(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = host()
    monkeypatch.setattr(kernel, "_get_api_version", lambda fd, argument: 1)
    with pytest.raises(VfioError, match="has version 1, not 0"):
        open_device(NAME, kernel)
    assert not kernel.open_fds


# -- the command ---------------------------------------------------------------------------------------


def test_bind_and_unbind_on_request(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = host(FakeFunction(driver="nvme"))
    assert main(["bind", "03:00.0"], kernel) == 0
    assert sysfs.PciFunction(kernel, NAME).driver == "vfio-pci"
    assert capsys.readouterr().out == "0000:03:00.0: vfio-pci, IOMMU group 7\n"
    assert main(["list"], kernel) == 0
    assert "driver vfio-pci  resets flr,bus" in capsys.readouterr().out
    assert main(["unbind", NAME], kernel) == 0
    assert sysfs.PciFunction(kernel, NAME).driver == ""


def test_bind_without_the_right_to(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = host(FakeFunction(driver="nvme"))
    kernel.errors["driver_override"] = errno.EACCES
    assert main(["bind", NAME], kernel) == 1
    assert "cannot bind 0000:03:00.0" in capsys.readouterr().err
    assert main(["rebind"], kernel) == 2


# -- the function ----------------------------------------------------------------------------------------


@pytest.fixture
def hardware(host: Host) -> Iterator[VfioHardware]:
    opened = open_device(NAME, host())
    yield opened
    opened.close()


def kernel_of(hardware: VfioHardware) -> FakeKernel:
    kernel = hardware._kernel
    assert isinstance(kernel, FakeKernel)
    return kernel


def test_registers_in_all_sizes(hardware: VfioHardware) -> None:
    hardware.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    for size in (1, 2, 4, 8):
        value = 0x8877_6655_4433_2211 & (1 << 8 * size) - 1
        hardware.bar_write(0, 8 * size, size, value)
        assert hardware.bar_read(0, 8 * size, size) == value
    assert hardware.config_read(pci.VENDOR_ID, 4) == 0x1234_8086


@pytest.mark.parametrize(
    ("bar", "offset", "size"), [(0, 0x4000, 1), (0, 0x3FFD, 4), (0, -1, 1), (0, 0, 3), (1, 0, 4), (7, 0, 4)]
)
def test_an_access_outside_is_an_error_of_ours(
    hardware: VfioHardware, bar: int, offset: int, size: int
) -> None:
    with pytest.raises(VfioError, match=r"no .* bytes at|no BAR"):
        hardware.bar_read(bar, offset, size)
    with pytest.raises(VfioError, match=r"no .* bytes at|no BAR"):
        hardware.bar_write(bar, offset, size, 0)


def test_a_bar_that_is_not_decoded_is_an_error_and_no_signal(hardware: VfioHardware) -> None:
    with pytest.raises(VfioError, match="read of region 0"):
        hardware.bar_read(0, 0, 4)


def test_a_bar_as_memory(hardware: VfioHardware) -> None:
    hardware.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY)
    hardware.bar_write(0, 0x10, 4, 0xCAFE)
    with hardware.device.map_region(0) as memory:
        assert memory[0x10:0x14] == b"\xfe\xca\0\0"
    with pytest.raises(VfioError, match="cannot be mapped"):
        hardware.device.map_region(5)


@pytest.mark.parametrize(
    ("table", "pending", "expected"),
    [
        (0x0000, 0x0000, [(0x1000, 0x3000)]),
        (0x2000, 0x3000, [(0, 0x2000)]),
        (0x1000, 0x3000, [(0, 0x1000), (0x2000, 0x1000)]),
        (0x3800, 0x0FF8, [(0x1000, 0x2000)]),
        (0x1003, 0x2003, [(0, 0x4000)]),
        (0x9000_0000, 0x0000, [(0x1000, 0x3000)]),
    ],
    ids=["together", "at the end", "apart", "in the middle of pages", "in another BAR", "behind the BAR"],
)
def test_what_a_guest_may_reach_by_itself_leaves_msix_out(
    hardware: VfioHardware, table: int, pending: int, expected: list[tuple[int, int]]
) -> None:
    kernel = kernel_of(hardware)
    kernel.poke(
        NAME, structs.CONFIG_REGION, 0x64, table.to_bytes(4, "little") + pending.to_bytes(4, "little")
    )
    assert [(offset, size) for offset, size, _ in hardware.direct(0)] == expected


def test_a_bar_smaller_than_a_page_or_not_mappable_is_not_mapped(host: Host) -> None:
    kernel = host(FakeFunction(bars={0: (0x800, 0), 1: (0x1000, 0)}))
    hardware = open_device(NAME, kernel)
    assert hardware.direct(0) == []
    hardware.device.regions[1] = hardware.device.regions[1]._replace(flags=0)
    assert hardware.direct(1) == []
    hardware.close()


def test_interrupts_come_to_eventfds_and_are_counted(hardware: VfioHardware) -> None:
    kernel = kernel_of(hardware)
    fds = hardware.connect(structs.MSIX, 3)
    assert kernel.fire(structs.MSIX, 2)
    assert [hardware.take(fd) for fd in fds] == [0, 0, 1]
    kernel.fire(structs.MSIX, 0)
    assert hardware.interrupts() == 2, "counted though nobody has taken it"
    assert hardware.take(fds[0]) == 1
    hardware.drop_interrupts()
    assert not kernel.fire(structs.MSIX, 0)
    hardware.drop_interrupts()
    assert hardware.interrupts() == 2


def test_only_one_kind_of_interrupt_at_a_time(hardware: VfioHardware) -> None:
    kernel = kernel_of(hardware)
    hardware.connect(structs.INTX, 1)
    hardware.connect(structs.MSIX, 1)
    assert not kernel.fire(structs.INTX)
    assert kernel.fire(structs.MSIX)
    with pytest.raises(VfioError, match="has 4 interrupts of kind 2, not 5"):
        hardware.connect(structs.MSIX, 5)


def test_a_host_with_too_few_interrupts_says_how_many(
    hardware: VfioHardware, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel answers with the number it could have given."""
    monkeypatch.setattr(kernel_of(hardware), "_device_set_irqs", lambda fd, body: 2)
    with pytest.raises(VfioError, match="has 2 interrupts left, 4 are needed"):
        hardware.connect(structs.MSIX, 4)


def test_conventional_pci_has_no_extended_space(hardware: VfioHardware) -> None:
    """The kernel's region ends behind 256 bytes; on the bus nobody answers there."""
    region = hardware.device.regions[structs.CONFIG_REGION]
    hardware.device.regions[structs.CONFIG_REGION] = region._replace(size=256)
    assert hardware.config_read(0x100, 4) == 0xFFFF_FFFF
    assert pci.extended_capabilities(hardware.config_read) == {}
    with pytest.raises(VfioError, match="no 4 bytes"):
        hardware.config_read(0xFE, 4)


def test_intx_comes_again_only_after_it_was_unmasked(hardware: VfioHardware) -> None:
    kernel = kernel_of(hardware)
    hardware.connect(structs.INTX, 1)
    assert kernel.fire(structs.INTX)
    assert not kernel.fire(structs.INTX)
    hardware.device.unmask_intx()
    assert kernel.fire(structs.INTX)


def test_msix_goes_off_by_its_register_though_vfio_drops_such_writes(hardware: VfioHardware) -> None:
    kernel = kernel_of(hardware)
    at = 0x60 + pci.MSIX_CONTROL
    hardware.connect(structs.MSIX, 1)
    assert hardware.config_read(at, 2) & pci.MSIX_ENABLE
    hardware.config_write(at, 2, 0)
    assert not hardware.config_read(at, 2) & pci.MSIX_ENABLE
    assert not kernel.fire(structs.MSIX)


def test_dma_reaches_the_memory_until_it_is_unmapped(hardware: VfioHardware, ram: Ram) -> None:
    kernel = kernel_of(hardware)
    hardware.give_memory([ram])
    hardware.map_dma()
    assert not kernel.dma(NAME, ram.iova, b"early"), "bus mastering is off"
    hardware.config_write(pci.COMMAND, 2, pci.COMMAND_BUS_MASTER)
    assert kernel.dma(NAME, ram.iova, b"canary")
    assert bytes(hardware.memory()[0][:6]) == b"canary"
    hardware.unmap_dma()
    assert not kernel.dma(NAME, ram.iova, b"late")
    hardware.unmap_dma()
    assert kernel.calls.count("IOMMU_UNMAP_DMA") == 1


def test_views_of_the_memory_are_taken_by_the_thread_that_asks(hardware: VfioHardware, ram: Ram) -> None:
    """Without a GIL a view is for the thread that took it."""
    takers: list[int] = []

    def view() -> memoryview:
        takers.append(threading.get_ident())
        return ram.view()

    hardware.give_memory([ram._replace(view=view)])
    hardware.map_dma()
    assert takers == []
    other = threading.Thread(target=hardware.memory)
    other.start()
    other.join()
    hardware.memory()
    assert takers == [other.ident, threading.get_ident()]


@pytest.mark.parametrize(
    ("kernel_says", "offered"),
    [
        ("flr bus", ["flr", "bus"]),
        ("af_flr pm bus", ["af-flr", "pm", "bus"]),
        ("device_specific", ["flr", "bus"]),
        ("pm", ["pm", "bus"]),
        ("", ["bus"]),
    ],
)
def test_the_resets_are_those_of_the_kernel_and_a_bus_that_is_ours(
    host: Host, kernel_says: str, offered: list[str]
) -> None:
    hardware = open_device(NAME, host(FakeFunction(resets=kernel_says)))
    assert hardware.resets == offered
    hardware.close()


def test_no_bus_reset_that_hits_a_function_of_somebody_else(host: Host) -> None:
    kernel = host(FakeFunction(), FakeFunction("0000:03:00.1", group=8, driver="nvme"))
    hardware = open_device(NAME, kernel)
    assert hardware.resets == ["flr"]
    with pytest.raises(VfioError, match="cannot be reset by bus"):
        hardware.reset("bus")
    assert "DEVICE_PCI_HOT_RESET" not in kernel.calls
    hardware.close()


@pytest.mark.parametrize(("method", "call"), [("flr", "DEVICE_RESET"), ("bus", "DEVICE_PCI_HOT_RESET")])
def test_a_reset_keeps_the_command_register_so_it_comes_last(
    hardware: VfioHardware, method: str, call: str
) -> None:
    hardware.config_write(pci.COMMAND, 2, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER)
    hardware.bar_write(0, 0x14, 4, 1)
    hardware.reset(method)
    assert kernel_of(hardware).calls[-1] == call
    assert hardware.bar_read(0, 0x14, 4) == 0
    assert hardware.config_read(pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER, "as the kernel does it"


def test_pm_goes_to_d3hot_and_back(host: Host) -> None:
    kernel = host(FakeFunction(resets="flr pm"))
    hardware = open_device(NAME, kernel)
    seen: list[int] = []
    original = hardware.device.config_write

    def watched(offset: int, size: int, value: int) -> None:
        seen.append(value & pci.PM_STATE)
        original(offset, size, value)

    hardware.device.config_write = watched  # type: ignore[method-assign]
    hardware.reset("pm")
    assert seen == [pci.PM_D3HOT, 0]
    hardware.close()


def test_surrender_keeps_the_memory_mapped_and_close_gives_all_back(
    host: Host, ram: Ram, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = host()
    hardware = open_device(NAME, kernel)
    hardware.give_memory([ram])
    hardware.map_dma()
    hardware.surrender()
    assert kernel.mappings
    with pytest.raises(VfioError, match="given back"):
        hardware.config_read(0, 4)
    handover = hardware.handover()
    monkeypatch.setattr(space, "_open", {})  # as in another process
    again = adopt(handover.values, [os.dup(fd) for fd in handover.fds], kernel)
    assert again.config_read(0, 2) == 0x8086, "opened anew, from the group that is held"
    again.unmap_dma()
    assert not kernel.mappings
    again.close()
    hardware.close()
    with pytest.raises(VfioError, match="nobody can take it over"):
        hardware.handover()
    hardware.close()
    assert not kernel.open_fds
