"""Places on PCI bus 0 as a VM file gives them, and every mistake there."""

from __future__ import annotations

from pathlib import Path

import pytest

from qvmcore import boards
from qvmcore.compose import compose
from qvmcore.errors import ConfigError
from qvmcore.layout import layout, pci_routes
from qvmcore.pci.vdev import PciVdev
from qvmcore.types import MachineSpec, PciId, Window
from qvmcore.vdev import Vdev
from qvmcore.virtio.device import VirtioVdev
from tests.unit.vmfiles import BASE, CLASSES, FakeHost, write_files


class Card(PciVdev):
    vdev_type = "card"
    pci_id = PciId(0x1234, 1)
    pci_class = 0xFF0000
    windows = (Window(0x1000),)
    irqs = 2


class Filler(PciVdev):
    vdev_type = "filler"
    pci_id = PciId(0x1234, 2)
    pci_class = 0xFF0000


class Ring(VirtioVdev):
    vdev_type = "ring"
    device_id = 4
    queue_sizes = (8,)


class Host(FakeHost):
    def vdev_class(self, vdev_type: str) -> type[Vdev]:
        own: dict[str, type[Vdev]] = {cls.vdev_type: cls for cls in (Card, Filler, Ring)}
        return own[vdev_type] if vdev_type in own else super().vdev_class(vdev_type)


def vdev(kind: str, *keys: str) -> str:
    return "\n".join(["[[vdev]]", f'type = "{kind}"', *keys, ""])


def composed(folder: Path, *tables: str, base: str = BASE) -> MachineSpec:
    return compose([write_files(folder, {"vm.toml": base + "".join(tables)})], (), Host())


def errors(folder: Path, *tables: str, base: str = BASE) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        composed(folder, *tables, base=base)
    return [str(each).replace(f"{folder}/", "") for each in caught.value.diagnostics]


def places(spec: MachineSpec) -> list[str]:
    return [str(each.pci) if each.pci else f"{each.loc:#x}" for each in spec.vdevs if not each.implicit]


def test_functions_take_slots_in_file_order_around_the_fixed_ones(tmp_path: Path) -> None:
    spec = composed(
        tmp_path,
        vdev("ring"), vdev("card", 'loc = "pci:0:2"'), vdev("ring", "loc = 0x1c0d0000", 'intr = "gic:41"'),
        vdev("card"), vdev("filler", 'loc = "pci:0:0x1f"'), vdev("card", 'loc = "pci:0:2.1"'), vdev("ring"),
    )  # fmt: skip
    assert places(spec) == ["00:01.0", "00:02.0", "0x1c0d0000", "00:03.0", "00:1f.0", "00:02.1", "00:04.0"]
    assert spec.pci


def test_a_bus_is_there_when_somebody_is_on_it_or_when_asked(tmp_path: Path) -> None:
    assert not composed(tmp_path).pci
    assert composed(tmp_path, base=BASE.replace("[load]", "pci = true\n[load]")).pci


def test_31_devices_and_not_one_more(tmp_path: Path) -> None:
    assert places(composed(tmp_path, *[vdev("ring")] * 31))[-1] == "00:1f.0"
    assert errors(tmp_path, *[vdev("ring")] * 32) == [
        "vm.toml:68: vdev[31] (ring): no PCI device number is left: a bus has 31 besides the host bridge; "
        'put several functions into one device: loc = "pci:0:1.1"'
    ]


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ([vdev("card", 'loc = "pci:0:3"'), vdev("ring", 'loc = "pci:0:3.0"')],
         "vm.toml:11: vdev[1] (ring): loc: pci:0:3 is already used by card-0 (vm.toml:6)"),
        ([vdev("card", 'loc = "pci:0:0"')],
         "vm.toml:8: vdev[0] (card): loc: pci:0:0 is the host bridge; take a device number from 1 to 31"),
        ([vdev("card", 'loc = "pci:0:3.2"'), vdev("card", 'loc = "pci:0:3.1"')],
         "vm.toml:8: vdev[0] (card): loc: pci:0:3.2: device 3 has no function 0, so a guest would not "
         'find it; add a filler: type = "pci-dummy" with loc = "pci:0:3"'),
        ([vdev("card", 'loc = "pci:1:3"')], "vm.toml:8: vdev[0] (card): loc: bus 1: there is only PCI bus 0"),
        ([vdev("card", 'loc = "pci:0:32"')],
         "vm.toml:8: vdev[0] (card): loc: device 32: a PCI bus has devices 0 to 31"),
        ([vdev("card", 'loc = "pci:0"')],
         "vm.toml:8: vdev[0] (card): loc: expected pci:0:DEVICE or pci:0:DEVICE.FUNCTION, not 'pci:0'"),
        ([vdev("pl011", 'loc = "pci:0:3"', 'name = "u"')],
         "vm.toml:8: vdev[0] (pl011): loc: pci:0:3 is a PCI address, and a pl011 is not a PCI device; "
         "write an address such as loc = 0x1c0d0000"),
        ([vdev("card", "loc = true")],
         "vm.toml:8: vdev[0] (card): loc: expected an address such as 0x1c0d0000, not true"),
        ([vdev("filler", "loc = 0x1c0d0000")],
         "vm.toml:8: vdev[0] (filler): loc: this vdev has no registers; remove loc"),
        ([vdev("filler", 'intr = "gic:41"')],
         "vm.toml:8: vdev[0] (filler): intr: this vdev has no interrupt; remove intr"),
        ([vdev("card"), vdev("ring", "loc = 0x20000000", 'intr = "gic:41"')],
         "vm.toml:10: vdev[1] (ring): loc: [0x20000000, 0x20000200) overlaps PCI's window for 32-bit BARs "
         "[0x20000000, 0x3f000000)"),
        ([vdev("card"), vdev("ring", "loc = 0x10000000", 'intr = "gic:41"')],
         "vm.toml:10: vdev[1] (ring): loc: [0x10000000, 0x10000200) overlaps PCI's window for configuration "
         "[0x10000000, 0x10100000)"),
        ([vdev("card"), vdev("ring", "loc = 0x8020000", 'intr = "gic:41"')],
         "vm.toml:10: vdev[1] (ring): loc: [0x8020000, 0x8020200) overlaps the interrupt controller "
         "gic MSI frame [0x8020000, 0x8021000)"),
        ([vdev("card"), vdev("ring", "loc = 0x1c0d0000", 'intr = "gic:120"')],
         "vm.toml:11: vdev[1] (ring): intr: gic:120 belongs to PCI's message interrupts; gic:112 to gic:239 "
         'are taken; write intr = "gic:41"'),
        ([vdev("card"), vdev("ring", "loc = 0x1c0d0000", 'intr = "gic:36"')],
         "vm.toml:11: vdev[1] (ring): intr: gic:36 is the PCI interrupt of card-0"),
        ([vdev("ring", "loc = 0x1c0d0000", 'intr = "gic:36"'), vdev("card")],
         "vm.toml:9: vdev[0] (ring): intr: gic:36 is the PCI interrupt of card-0"),
        ([vdev("card", 'intr = "gic:50"', 'loc = "pci:0:1"'),
          vdev("ring", 'intr = "gic:51"', 'loc = "pci:0:1.1"')],
         "vm.toml:12: vdev[1] (ring): intr: the functions of PCI device 1 share one interrupt; "
         "remove intr here; card-0 has gic:50"),
        ([vdev("card", 'intr = "gic:50"'), vdev("ring", 'intr = "gic:50"')],
         "vm.toml:11: vdev[1] (ring): intr: gic:50 is already used by card-0 (vm.toml:6)"),
        (["[[ram]]\nstart = 0x30000000\nsize = 4096\n", vdev("card")],
         "vm.toml:6: ram: [0x30000000, 0x30001000) overlaps PCI's window for 32-bit BARs "
         "[0x20000000, 0x3f000000)"),
    ],
)  # fmt: skip
def test_one_mistake_one_message(tmp_path: Path, tables: list[str], expected: str) -> None:
    assert errors(tmp_path, *tables) == [expected]


def test_places_of_pci_are_free_without_a_bus(tmp_path: Path) -> None:
    spec = composed(tmp_path, vdev("ring", "loc = 0x20000000", 'intr = "gic:120"'))
    assert places(spec) == ["0x20000000"]
    assert "card" not in CLASSES


def test_intr_chooses_the_line_of_a_device(tmp_path: Path) -> None:
    tables = vdev("card", 'intr = "gic:50"'), vdev("ring"), vdev("card", 'loc = "pci:0:6"'), vdev("filler")
    spec = composed(tmp_path, *tables)
    board = boards.get("arm64-virt")
    assert board.pci is not None
    routes = {device: str(intr) for device, intr in pci_routes(board.pci, spec.vdevs).items()}
    assert routes == {1: "gic:50", 2: "gic:37", 3: "gic:38", 6: "gic:37"}
    rows = layout(spec, board, {"card": Card, "ring": Ring, "filler": Filler}).interrupts
    assert [(str(row.intr), row.owner, row.trigger) for row in rows] == [
        ("gic:37", "ring-0, card-1", "level"), ("gic:50", "card-0", "level"),
    ]  # fmt: skip
