"""Two Linux guests share memory and notify each other, from their shells (plugins/shmem/README.md)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "plugins" / "shmem" / "README.md"

MMIO = """
[[vdev]]
type = "shmem"
name = "shmem0"
loc = 0x1c100000
intr = "gic:43"
directory = "regions"
"""
PCI = """
[[vdev]]
type = "shmem"
name = "shmem0"
loc = "pci:0:1"
directory = "regions"
"""

#: ``attach`` leaves the control page in $control. INTID 43, or INTB of device 1 (36), is $line.
FIND_MMIO = """
factory=0x1c100000 line=43
"""
FIND_PCI = """
cd /sys/bus/pci/devices/0000:00:01.0
echo id $(cat vendor device class)
echo 1 >enable
set -- $(sed -n 1p resource); factory=$1
line=36
"""
COMMON = """
r() { devmem $(($1 + $2)) 32; }
w() { devmem $(($1 + $2)) 32 $3; }
pending() { echo $(( $(devmem $((0x08000200 + line / 32 * 4)) 32) >> line % 32 & 1 )); }
attach() {
  w $factory 0x1c 0x2d717271; w $factory 0x20 0x30; w $factory 0x18 1
  echo status $(r $factory 0x14)
  control=$(devmem $((factory + 8)) 64)
}
"""
#: Waits for the other's word, answers, and looks who has rung.
FIRST = """
attach
w $control 0x1000 0x11111111
echo ready
until [ $(pending) = 1 ]; do :; done
echo rung $(r $control 0) pending $(pending)
echo word $(r $control 0x1004)
w $control 0x1008 0x33333333
w $control 0x8 0xffffffff
until [ $(pending) = 1 ]; do :; done
"""
SECOND = """
attach
echo word $(r $control 0x1000) idx $(r $control 4)
w $control 0x1004 0x22222222
w $control 0x8 1
until [ $(pending) = 1 ]; do :; done
echo rung $(r $control 0) pending $(pending)
echo word $(r $control 0x1008)
w $control 0x8 1
"""


def _share(start: Callable[..., Any], files: Path, vdevs: str, find: str) -> tuple[Any, Any]:
    first = start(find + COMMON + FIRST, vdevs=vdevs)
    first.expect("ready")
    second = start(find + COMMON + SECOND, vdevs=vdevs)
    assert second.wait() == 0
    assert first.wait() == 0
    assert "status 0x00000000\n" in first.text and "status 0x00000000\n" in second.text
    assert "word 0x11111111 idx 0x00000001" in second.text
    assert "rung 0x00030002 pending 0\nword 0x22222222" in first.text
    assert "rung 0x00030001 pending 0\nword 0x33333333" in second.text
    assert [path.name for path in (files / "regions").iterdir()] == [".lock"], "the last one cleaned up"
    return first, second


def test_two_guests_share_memory_at_an_address(start: Callable[..., Any], files: Path) -> None:
    _share(start, files, MMIO, FIND_MMIO)


def test_two_guests_share_memory_through_a_pci_bar(start: Callable[..., Any], files: Path) -> None:
    first, _ = _share(start, files, PCI, FIND_PCI)
    assert "id 0x1c05 0x0001 0x058000" in first.text


def test_the_shell_commands_of_readme(start: Callable[..., Any], files: Path) -> None:
    shown = re.findall(r"```sh\n(.*?)```", README.read_text(), re.DOTALL)
    vm = start("".join(shown) + "\necho shared $(devmem $((control + 0x1000)) 32)", vdevs=PCI)
    assert vm.wait() == 0
    assert "\n0x00000000\n" in vm.text
    assert "shared 0x0000CAFE" in vm.text
