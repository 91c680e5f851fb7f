"""Which modules a guest gets, and in which order."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_debian import RELEASE, kernel_files, make_deb
from qvm_guests.debs import DebArchive
from qvm_guests.modules import ModuleTree, dependency_tables

from qvmcore.api import HostError


def test_closure_has_dependencies_first(kernel_deb: Path) -> None:
    with DebArchive(kernel_deb) as deb:
        tree = ModuleTree.of(deb)
        closure = tree.closure(["virtio_blk", "virtio-rng", "gpio_pl061", "gpio_keys", "virtio_blk"])
    names = [module.name for module in closure.modules]
    assert tree.release == RELEASE
    assert names == ["virtio_helper", "virtio", "virtio_ring", "virtio_blk", "virtio_rng"]
    assert closure.builtin == ("gpio_pl061",)
    assert closure.absent == ("gpio_keys",)


def test_tables_are_what_modprobe_reads(kernel_deb: Path) -> None:
    with DebArchive(kernel_deb) as deb:
        tables = dependency_tables(ModuleTree.of(deb).closure(["virtio_blk", "ext4"]))
    drivers = "kernel/drivers"
    assert f"{drivers}/virtio_blk.ko: {drivers}/virtio_ring.ko {drivers}/virtio.ko\n" in tables["modules.dep"]
    assert f"{drivers}/virtio.ko:\n" in tables["modules.dep"]
    assert tables["modules.alias"] == "alias virtio:d00000002v* virtio_blk\n"


def test_a_module_asked_for_by_name_must_exist(kernel_deb: Path) -> None:
    with (
        DebArchive(kernel_deb) as deb,
        pytest.raises(HostError, match=r"no module 'virtio_bulk'.*virtio_blk"),
    ):
        ModuleTree.of(deb).closure([], required=["virtio-bulk"])


def test_not_a_kernel(tmp_path: Path) -> None:
    with (
        DebArchive(make_deb(tmp_path / "x.deb", {"./bin/x": b""})) as deb,
        pytest.raises(HostError, match=r"no kernel"),
    ):
        ModuleTree.of(deb)


def test_harmed_module(tmp_path: Path) -> None:
    files = kernel_files()
    files[f"./lib/modules/{RELEASE}/kernel/drivers/virtio.ko"] = b"rubbish"
    with DebArchive(make_deb(tmp_path / "x.deb", files)) as deb, pytest.raises(HostError, match=r"virtio.ko"):
        ModuleTree.of(deb).closure(["virtio"])


@pytest.mark.parametrize("name", ["../../etc/passwd", "./a/../../b", "/etc/passwd"])
def test_a_path_that_leads_outside_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(HostError, match=r"not sound"), DebArchive(make_deb(tmp_path / "x.deb", {name: b"x"})):
        pass


def test_not_a_package(tmp_path: Path) -> None:
    path = tmp_path / "x.deb"
    path.write_bytes(b"not a package")
    with pytest.raises(HostError, match=r"cannot read the package .*x\.deb"), DebArchive(path):
        pass
