"""The device tree builder: what is written is what the library and dtc read back."""

from __future__ import annotations

import fdt
import pytest

from qvmcore.fdt import DeviceTree


def read_back(tree: DeviceTree) -> fdt.FDT:
    return fdt.parse_dtb(tree.to_dtb())


def test_properties_of_every_kind() -> None:
    tree = DeviceTree()
    node = tree.root.child("device@10")
    node.set_string("compatible", "a,b", "c,d")
    node.set_cells("cells", 1, 0xFFFFFFFF)
    node.set_cells64("reg", 0x1_0000_0000, 0x200)
    node.set_flag("flag")
    node.set_bytes("seed", b"\x01\x02\x03")
    back = read_back(tree).get_node("/device@10")
    assert back.get_property("compatible").data == ["a,b", "c,d"]
    assert back.get_property("cells").data == [1, 0xFFFFFFFF]
    assert back.get_property("reg").data == [1, 0, 0, 0x200]
    assert bytes(back.get_property("seed").data) == b"\x01\x02\x03"
    assert back.exist_property("flag")
    assert node.has("flag")
    assert not node.has("other")


def test_strings_may_hold_any_script_and_be_empty() -> None:
    tree = DeviceTree()
    tree.root.set_string("bootargs", "hostname=gäst")
    tree.root.set_string("empty", "")
    blob = tree.to_dtb()
    assert "hostname=gäst\0".encode() in blob
    with pytest.raises(ValueError, match="a NUL character cannot be in a string"):
        tree.root.set_string("bad", "a\0b")


def test_setting_twice_replaces() -> None:
    tree = DeviceTree()
    tree.root.set_cells("x", 1)
    tree.root.set_cells("x", 2)
    assert read_back(tree).get_property("x").data == [2]


def test_cells_are_32_bits() -> None:
    with pytest.raises(ValueError, match=r"/: x: a cell is 32 bits, not \['0x100000000'\]"):
        DeviceTree().root.set_cells("x", 1 << 32)


def test_phandles_are_given_once_and_found_by_path() -> None:
    tree = DeviceTree()
    clock = tree.root.child("clock")
    gpio = tree.root.child("gpio@0")
    assert gpio.reference("/clock") == 1
    assert gpio.phandle() == 2
    assert clock.phandle() == gpio.reference("/clock") == 1
    assert read_back(tree).get_node("/gpio@0").get_property("phandle").data == [2]
    with pytest.raises(KeyError, match="no device tree node /nothing"):
        gpio.reference("/nothing")


def test_children_and_siblings_are_made_once() -> None:
    tree = DeviceTree()
    node = tree.root.child("gpio@0")
    assert node.name == "gpio"
    assert node.child("a") is node.child("a")
    assert node.sibling("keys") is tree.root.child("keys")
    assert node.child("a").path == "/gpio@0/a"
