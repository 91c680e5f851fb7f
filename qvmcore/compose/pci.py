"""Places on PCI bus 0 (floor 8): vdevs without a ``loc`` take device numbers in file order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qvmcore.boards import Board
from qvmcore.compose.sources import Problems
from qvmcore.pci.host import HOST_BRIDGE_ADDRESS
from qvmcore.pci.vdev import PciVdev
from qvmcore.types import PciAddress, Source, VdevSpec
from qvmcore.vdev import Vdev
from qvmcore.virtio.device import VirtioVdev

_DEVICES = range(1, 32)


def can_be_pci(cls: type[Vdev]) -> bool:
    """Whether a vdev of this class can be a PCI function."""
    return issubclass(cls, PciVdev | VirtioVdev)


def assign_pci(
    board: Board, vdevs: Sequence[VdevSpec], classes: Mapping[str, type[Vdev]], problems: Problems
) -> list[VdevSpec]:
    """The vdevs, each that has no place of its own at the first free device number."""
    taken: dict[PciAddress, VdevSpec] = {}
    for spec in vdevs:
        if spec.pci is not None and _fixed(spec, spec.pci, board, classes[spec.type], taken, problems):
            taken[spec.pci] = spec
    used = {address.device for address in taken}
    free = iter([device for device in _DEVICES if device not in used])
    placed = []
    for spec in vdevs:
        automatic = spec.pci is None and spec.loc is None and can_be_pci(classes[spec.type])
        if automatic and board.pci is not None and not _wrote_loc(spec):
            device = next(free, None)
            if device is None:
                text = f"no PCI device number is left: a bus has {len(_DEVICES)} besides the host bridge"
                hint = 'put several functions into one device: loc = "pci:0:1.1"'
                problems.add(spec.source, spec.where, text, hint)
            else:
                spec = replace(spec, pci=PciAddress(device))
        placed.append(spec)
    _check_function_zero(placed, problems)
    _check_one_line(placed, problems)
    return placed


def _wrote_loc(spec: VdevSpec) -> bool:
    """The file has a ``loc``, but a wrong one: reported already."""
    return "loc" in spec.key_sources


def _at(spec: VdevSpec, key: str) -> Source:
    return spec.key_sources.get(key, spec.source)


def _fixed(
    spec: VdevSpec,
    address: PciAddress,
    board: Board,
    cls: type[Vdev],
    taken: Mapping[PciAddress, VdevSpec],
    problems: Problems,
) -> bool:
    """Whether ``loc = "pci:..."`` is possible; says why not."""
    text = hint = ""
    earlier = taken.get(address)
    if board.pci is None:
        text, hint = f"{board.name} has no PCI bus", "write an address"
    elif not can_be_pci(cls):
        text = f"{address.loc} is a PCI address, and a {spec.type} is not a PCI device"
        hint = f"write an address such as loc = {board.vdev_space.start:#x}"
    elif address == HOST_BRIDGE_ADDRESS:
        text, hint = f"{address.loc} is the host bridge", "take a device number from 1 to 31"
    elif earlier is not None:
        text = (
            f"{address.loc} is already used by {earlier.name} ({earlier.source.file}:{earlier.source.line})"
        )
    if text:
        problems.add(_at(spec, "loc"), spec.where, f"loc: {text}", hint)
    return not text


def _check_function_zero(vdevs: Sequence[VdevSpec], problems: Problems) -> None:
    """A guest looks at functions 1 to 7 only where there is a function 0 (PCI 3.0, 3.2.2.3.4)."""
    present = {HOST_BRIDGE_ADDRESS, *(spec.pci for spec in vdevs)}
    told: set[int] = set()
    for spec in vdevs:
        place = spec.pci
        if place is not None and PciAddress(place.device) not in present and place.device not in told:
            told.add(place.device)
            text = f"loc: {place.loc}: device {place.device} has no function 0, so a guest would not find it"
            hint = f'add a filler: type = "pci-dummy" with loc = "pci:0:{place.device}"'
            problems.add(_at(spec, "loc"), spec.where, text, hint)


def _check_one_line(vdevs: Sequence[VdevSpec], problems: Problems) -> None:
    """The functions of a device share one interrupt pin, so they cannot have different lines."""
    chosen: dict[int, VdevSpec] = {}
    for spec in vdevs:
        if spec.pci is None or spec.intr is None:
            continue
        other = chosen.setdefault(spec.pci.device, spec)
        if other is not spec:
            text = f"intr: the functions of PCI device {spec.pci.device} share one interrupt"
            hint = f"remove intr here; {other.name} has {other.intr}"
            problems.add(_at(spec, "intr"), spec.where, text, hint)
