"""VM files: what composes, and every mistake with its exact message."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qvmcore.compose import checks, compose
from qvmcore.errors import ConfigError
from qvmcore.types import IntrSpec, MachineSpec, MemorySpec
from tests.unit.vmfiles import BASE, DISK, FakeHost, write_files

MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work inside the folder of the VM files, so that messages name them shortly."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def good(folder: Path, text: str, *overrides: str, **more: str) -> MachineSpec:
    write_files(folder, {"vm.toml": text, **{name.replace("__", "."): t for name, t in more.items()}})
    return compose(["vm.toml"], overrides, FakeHost())


def errors(folder: Path, text: str, *overrides: str, **more: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        good(folder, text, *overrides, **more)
    return [str(problem) for problem in caught.value.diagnostics]


def test_a_whole_machine(folder: Path) -> None:
    spec = good(folder, BASE + 'cmdline = "console=hvc0"\n' + DISK + '[[vdev]]\ntype = "silent"\n')
    assert (spec.name, spec.board, spec.engine, spec.cpus) == ("vm", "arm64-virt", "auto", 1)
    assert spec.memory == (MemorySpec(0x40000000, 64 * MIB),)
    assert spec.load.kernel == folder / "Image"
    assert spec.load.cmdline == "console=hvc0"
    assert [v.name for v in spec.vdevs] == ["uart0", "gpio0", "disk0", "silent-0"]
    disk = spec.vdevs[2]
    assert (disk.loc, disk.intr, disk.implicit) == (0x1C0D0000, IntrSpec("gic", 41), False)
    assert disk.options.hostdev == folder / "disk.img"
    assert disk.where == "vdev[0] (disk)"
    assert (disk.source.file, disk.source.line, disk.key_sources["hostdev"].line) == ("vm.toml", 7, 12)
    assert spec.vdevs[0].implicit
    assert (spec.unsupported, spec.shutdown_timeout) == ("ignore", 10.0)


def test_loc_as_qnx_writes_it(folder: Path) -> None:
    for spelling in ('"0x1c0d0000"', '"mem:0x1c0d0000"', "470614016"):
        assert good(folder, BASE + DISK.replace("0x1c0d0000", spelling)).vdevs[2].loc == 0x1C0D0000


def test_mode_of_a_raw_kernel(folder: Path) -> None:
    assert good(folder, BASE).load.mode == ""
    assert good(folder, BASE + 'mode = "protected32"\n').load.mode == "protected32"
    assert errors(folder, BASE + 'mode = "real"\n') == [
        "vm.toml:6: load: mode: expected 'real16', 'protected32' or 'long64', not 'real'; "
        "did you mean 'real16'?"
    ]


def test_default_names_count_by_type(folder: Path) -> None:
    text = BASE + '[[vdev]]\ntype = "silent"\n' * 2
    assert [v.name for v in good(folder, text).vdevs[2:]] == ["silent-0", "silent-1"]


def test_listing_an_implicit_vdev_changes_only_its_keys(folder: Path) -> None:
    for table in ('type = "pl011"\non_fault = "shutdown"', 'name = "uart0"\non-fault = "shutdown"'):
        spec = good(folder, BASE + "[[vdev]]\n" + table)
        assert [v.name for v in spec.vdevs] == ["gpio0", "uart0"]
        uart = spec.vdevs[1]
        assert (uart.type, uart.loc, uart.intr) == ("pl011", 0x09000000, IntrSpec("gic", 33))
        assert (uart.on_fault, uart.implicit) == ("shutdown", False)


def test_a_second_vdev_of_an_implicit_type_needs_its_own_place(folder: Path) -> None:
    two = '[[vdev]]\ntype = "pl011"\n' * 2
    assert errors(folder, BASE + two) == [
        "vm.toml:8: vdev[1] (pl011): missing key 'loc': this vdev is not a PCI device, so it needs "
        "an address; write loc = 0x1c0d0000",
        "vm.toml:8: vdev[1] (pl011): missing key 'intr': this vdev needs an interrupt; "
        'write intr = "gic:41"',
    ]


def test_ram_and_rom_ranges(folder: Path) -> None:
    text = BASE.replace('ram = "64M"\n', "") + (
        '[[ram]]\nstart = 0x40000000\nsize = "16M"\n[[ram]]\nsize = "1M"\n[[rom]]\nstart = 0\nsize = 4096\n'
    )
    assert good(folder, text).memory == (
        MemorySpec(0, 4096, rom=True), MemorySpec(0x40000000, 16 * MIB), MemorySpec(0x41000000, MIB),
    )  # fmt: skip


# -- include -------------------------------------------------------------------------------------


def test_include_merges_tables_appends_arrays_and_the_later_text_wins(folder: Path) -> None:
    main = 'include = ["sub/base.toml"]\n[system]\nram = "32M"\n[[vdev]]\ntype = "silent"\n'
    base = '[system]\nboard = "arm64-virt"\nram = "64M"\ncpus = 2\n[load]\nkernel = "Image"\n' + DISK
    (folder / "sub").mkdir()
    (folder / "sub" / "Image").touch()
    write_files(folder, {"vm.toml": main, "sub/base.toml": base})
    spec = compose(["vm.toml"], [], FakeHost())
    assert (spec.memory[0].size, spec.cpus) == (32 * MIB, 2)
    assert [v.name for v in spec.vdevs] == ["uart0", "gpio0", "disk0", "silent-0"]
    assert spec.load.kernel == folder / "sub" / "Image"
    assert spec.vdevs[2].options.hostdev == folder / "sub" / "disk.img"
    assert spec.vdevs[2].base_dir == folder / "sub"


def test_a_vdev_of_the_same_name_overrides_keys_with_paths_of_its_own_file(folder: Path) -> None:
    top = 'include = "sub/base.toml"\n[[vdev]]\nname = "disk0"\nhostdev = "b.img"\n'
    write_files(folder, {"vm.toml": top, "sub/base.toml": BASE.replace('"Image"', '"../Image"') + DISK})
    disk = compose(["vm.toml"], [], FakeHost()).vdevs[2]
    assert (disk.loc, disk.options.hostdev, disk.base_dir) == (0x1C0D0000, folder / "b.img", folder)


def test_files_on_the_command_line_merge_in_order(folder: Path) -> None:
    write_files(folder, {"vm.toml": BASE + DISK, "site.toml": '[system]\ncpus = 4\nram = "1M"\n'})
    spec = compose(["vm.toml", "site.toml"], [], FakeHost())
    assert (spec.name, spec.cpus, spec.memory[0].size) == ("vm", 4, MIB)


def test_a_file_reached_twice_is_read_once(folder: Path) -> None:
    spec = good(
        folder, 'include = ["a.toml", "b.toml"]\n',
        a__toml='include = ["c.toml"]\n', b__toml='include = ["c.toml"]\n',
        c__toml=BASE + '[[vdev]]\ntype = "silent"\n',
    )  # fmt: skip
    assert [v.type for v in spec.vdevs].count("silent") == 1


def test_cyclic_include_shows_the_chain(folder: Path) -> None:
    found = errors(folder, 'include = ["a.toml"]\n' + BASE, a__toml='\ninclude = ["vm.toml"]\n')
    assert found == ["a.toml:2: include: cyclic include: vm.toml -> a.toml -> vm.toml"]


def test_include_of_a_missing_file_and_of_nonsense(folder: Path) -> None:
    found = errors(folder, 'include = ["no.toml"]\n' + BASE)
    assert found == ["vm.toml:1: include: cannot read no.toml: No such file or directory"]
    found = errors(folder, "include = [5]\n" + BASE)
    assert found == ['vm.toml:1: include: expected a list of files such as ["base.toml"]']


def test_an_error_in_an_included_file_names_that_file(folder: Path) -> None:
    found = errors(folder, 'include = ["a.toml"]\n' + BASE, a__toml="[system]\n\nrma = 1\n")
    assert found == ["a.toml:3: system: unknown key 'rma'; did you mean 'ram'?"]


# -- command line --------------------------------------------------------------------------------


def test_overrides(folder: Path) -> None:
    spec = good(
        folder, BASE + DISK, "system.ram=1G", "load.cmdline=a=b c", "vdev.disk0.read-only=yes",
        "vdev.0.block_size=4K", "vdev.uart0.on_fault=shutdown", "system.shutdown_timeout=2.5",
    )  # fmt: skip
    assert spec.memory[0].size == 1 << 30
    assert spec.load.cmdline == "a=b c"
    disk = next(v for v in spec.vdevs if v.name == "disk0")
    assert (disk.options.read_only, disk.options.block_size) == (True, 4096)
    assert next(v for v in spec.vdevs if v.name == "uart0").on_fault == "shutdown"
    assert spec.shutdown_timeout == 2.5


def test_paths_of_overrides_start_where_the_user_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(folder, {"sub/vm.toml": BASE.replace("Image", "../Image") + DISK})
    disk = compose(["sub/vm.toml"], ["vdev.disk0.hostdev=x.img"], FakeHost()).vdevs[2]
    assert (disk.options.hostdev, disk.base_dir) == (folder / "x.img", folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ram=1G", "expected SECTION.KEY=VALUE; for example --set system.ram=1G"),
        ("system.ram", "expected SECTION.KEY=VALUE; for example --set system.ram=1G"),
        ("vdev.disk0=1", "expected vdev.NAME.KEY=VALUE; for example --set vdev.0.hostdev=disk.img"),
        ("system.ram=lots", "system: ram: expected a size such as 64K, 16M or 1G, not 'lots'"),
        ("system.rma=1", "system: unknown key 'rma'; did you mean 'ram'?"),
        ("sistem.ram=1", "unknown table 'sistem'; did you mean 'system'?"),
        ("vdev.disk1.x=1", "there is no vdev 'disk1'; did you mean 'disk0'?"),
        ("vdev.7.x=1", "there is no vdev '7'; there are: disk0"),
        ("vdev.disk0.hotdev=1", "vdev[0] (disk): unknown key 'hotdev'; did you mean 'hostdev'?"),
        ("vdev.disk0.loc=x", "vdev[0] (disk): loc: expected an address such as 0x1c0d0000, not 'x'"),
    ],
)
def test_wrong_overrides(folder: Path, override: str, message: str) -> None:
    assert f"command line: --set {override}: {message}" in errors(folder, BASE + DISK, override)


# -- mistakes ------------------------------------------------------------------------------------


def replaced(old: str, new: str) -> str:
    text = BASE + DISK
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (replaced('"arm64-virt"', '"arm64-vrt"'),
         "vm.toml:2: system: unknown board 'arm64-vrt'; did you mean 'arm64-virt'?"),
        (replaced('"disk"', '"nic"'),
         "vm.toml:7: vdev[0] (nic): unknown vdev type 'nic'; it comes with qvm-x: pip install qvm-x"),
        (replaced('type = "disk"\n', ""), "vm.toml:6: vdev[0]: missing key 'type'; qvm vdev lists the types"),
        (replaced("hostdev", "hostdew"),
         "vm.toml:11: vdev[0] (disk): unknown key 'hostdew'; did you mean 'hostdev'?"),
        (replaced("intr =", "inter ="),
         "vm.toml:10: vdev[0] (disk): unknown key 'inter'; did you mean 'intr'?"),
        (BASE + DISK + 'read-only = "yes"\n',
         "vm.toml:12: vdev[0] (disk): read-only: expected true or false, not 'yes'"),
        (replaced('ram = "64M"', "ram = 0"),
         "vm.toml:3: ram: the size is 0; write for example ram = \"512M\""),
        (replaced('ram = "64M"', "ram = 5000"),
         "vm.toml:3: ram: [0x40000000, +0x1388) does not begin and end on a page (4096 bytes)"),
        (replaced('ram = "64M"\n', ""), 'vm.toml:1: system: the machine has no memory; write ram = "512M"'),
        (replaced('ram = "64M"', 'ram = "64M"\ncpus = 9'),
         "vm.toml:4: system: cpus: expected at most 8 on arm64-virt, not 9"),
        (replaced('ram = "64M"', 'ram = "64M"\ncpus = 0'),
         "vm.toml:4: system: cpus: expected a whole number of at least 1, not 0"),
        (replaced('ram = "64M"', 'ram = "64M"\nengine = "emulate"'),
         "vm.toml:4: system: unknown engine 'emulate'; did you mean 'emulated'?"),
        (replaced('ram = "64M"', 'ram = "64M"\nengine = "kvm"'),
         "vm.toml:4: system: engine 'kvm' cannot be used: no API v1"),
        (replaced('ram = "64M"', 'ram = "64M"\nname = "../x"'),
         "vm.toml:4: system: name: expected at most 64 letters, digits and _ : + -, not '../x'"),
        (replaced('board = "arm64-virt"\n', ""),
         "vm.toml:1: system: missing key 'board'; known boards: arm64-virt, x86_64-pc"),
        (replaced("Image", "gone"),
         "vm.toml:5: load: kernel: cannot read {folder}/gone: No such file or directory"),
        (replaced("Image", "."), "vm.toml:5: load: kernel: {folder} is a directory, not a file"),
        (replaced('kernel = "Image"\n', ""),
         "vm.toml:4: load: missing key 'kernel'; write kernel = \"Image\" under [load]"),
        (replaced("0x1c0d0000", "0x40001000"),
         "vm.toml:9: vdev[0] (disk): loc: [0x40001000, 0x40001200) is on RAM [0x40000000, 0x44000000)"),
        (replaced("0x1c0d0000", "0x9000800"),
         "vm.toml:9: vdev[0] (disk): loc: [0x9000800, 0x9000a00) overlaps the board's uart0 "
         "[0x9000000, 0x9001000)"),
        (replaced("0x1c0d0000", "0x8010000"),
         "vm.toml:9: vdev[0] (disk): loc: [0x8010000, 0x8010200) overlaps the interrupt controller gic "
         "[0x8010000, 0x8020000)"),
        (replaced("0x1c0d0000", "0x1c0d0001"),
         "vm.toml:9: vdev[0] (disk): loc: 0x1c0d0001 is not a multiple of 8"),
        (replaced("0x1c0d0000", "0x10000000000"),
         "vm.toml:9: vdev[0] (disk): loc: 0x10000000000 is behind the address space of arm64-virt; "
         "addresses end at 0x10000000000"),
        (replaced("0x1c0d0000", '"pci:0:5"'),
         "vm.toml:9: vdev[0] (disk): loc: pci:0:5 is a PCI address, and a disk is not a PCI device; "
         "write an address such as loc = 0x1c0d0000"),
        (replaced("loc = 0x1c0d0000\n", ""),
         "vm.toml:6: vdev[0] (disk): missing key 'loc': this vdev is not a PCI device, so it needs "
         "an address; write loc = 0x1c0d0000"),
        (replaced('intr = "gic:41"\n', ""),
         "vm.toml:6: vdev[0] (disk): missing key 'intr': this vdev needs an interrupt; "
         'write intr = "gic:41"'),
        (replaced("gic:41", "gic:33"),
         "vm.toml:10: vdev[0] (disk): intr: gic:33 is already used by the board's uart0"),
        (replaced("gic:41", "gic:300"),
         "vm.toml:10: vdev[0] (disk): intr: gic:300 is out of range; gic has 32 to 287 for vdevs"),
        (replaced("gic:41", "pic:41"),
         "vm.toml:10: vdev[0] (disk): intr: there is no interrupt controller 'pic'; did you mean 'gic'?"),
        (replaced("gic:41", "41"),
         "vm.toml:10: vdev[0] (disk): intr: expected CONTROLLER:NUMBER such as 'gic:41', not '41'"),
        (BASE + '[[vdev]]\ntype = "silent"\nloc = 0\n',
         "vm.toml:8: vdev[0] (silent): loc: this vdev has no registers; remove loc"),
        (BASE + '[[vdev]]\ntype = "silent"\nintr = "gic:50"\n',
         "vm.toml:8: vdev[0] (silent): intr: this vdev has no interrupt; remove intr"),
        (BASE + '[[vdev]]\ntype = "net"\nloc = 0x1c0d0000\nintr = "gic:287"\n',
         "vm.toml:9: vdev[0] (net): intr: gic:287 is out of range (the vdev needs 2); "
         "gic has 32 to 287 for vdevs"),
        (BASE + "[vdev]\ntype = 'silent'\n", "vm.toml:6: vdev: expected an array of tables: write [[vdev]]"),
        ("system = 5\n", "vm.toml:1: system: expected a table: write [system]"),
        (BASE + "[safety]\nrequire-quiesc = true\n",
         "vm.toml:7: safety: unknown key 'require-quiesc'; did you mean 'require-quiesce'?"),
        (BASE + "[pass]\nloc = 1\n",
         'vm.toml:6: [pass]: what is passed through is a vdev here; write a [[vdev]] with type = "pass"'),
        (BASE + "[lod]\n", "vm.toml:6: unknown table 'lod'; did you mean 'load'?"),
        ('ram = "1M"\n' + BASE, "vm.toml:1: ram: expected an array of tables: write [[ram]]; "
         'or write ram = "512M" under [system]'),
        ("cpus = 2\n" + BASE,
         "vm.toml:1: unknown key 'cpus' outside of any table; write it under [system]"),
        (BASE + "[[vdev]\n",
         "vm.toml:6: TOML syntax: Expected ']]' at the end of an array declaration (column 7)"),
        (BASE + '[[vdev]]\ntype = "silent"\nname = "a b"\n',
         "vm.toml:8: vdev[0] (silent): name: expected at most 64 letters, digits and _ : + -, not 'a b'"),
        (BASE + '[[vdev]]\ntype = "silent"\non-fault = "explode"\n',
         "vm.toml:8: vdev[0] (silent): on-fault: expected 'isolate' or 'shutdown', not 'explode'"),
    ],
)  # fmt: skip
def test_one_mistake_one_message(folder: Path, text: str, expected: str) -> None:
    found = errors(folder, text)
    assert expected.replace("{folder}", str(folder)) in found


def test_overlap_of_two_vdevs_blames_the_later_and_names_the_place_of_the_other(folder: Path) -> None:
    second = DISK.replace("disk0", "disk1").replace("0x1c0d0000", "0x1c0d0100").replace("gic:41", "gic:42")
    assert errors(folder, BASE + DISK + second) == [
        "vm.toml:15: vdev[1] (disk): loc: [0x1c0d0100, 0x1c0d0300) overlaps disk0 (vm.toml:6) "
        "[0x1c0d0000, 0x1c0d0200)"
    ]


def test_the_same_interrupt_twice(folder: Path) -> None:
    second = DISK.replace("disk0", "disk1").replace("0x1c0d0000", "0x1c0e0000")
    assert errors(folder, BASE + DISK + second) == [
        "vm.toml:16: vdev[1] (disk): intr: gic:41 is already used by disk0 (vm.toml:6)"
    ]


def test_the_same_name_twice(folder: Path) -> None:
    second = DISK.replace("0x1c0d0000", "0x1c0e0000").replace("gic:41", "gic:42")
    assert errors(folder, BASE + DISK + second) == [
        "vm.toml:14: vdev[1] (disk): name 'disk0' is already used at vm.toml:6"
    ]


def test_ram_over_the_controller(folder: Path) -> None:
    text = BASE + "[[ram]]\nstart = 0x8000000\nsize = 0x1000\n"
    assert errors(folder, text) == [
        "vm.toml:6: ram: [0x8000000, 0x8001000) overlaps the interrupt controller gic [0x8000000, 0x8010000)"
    ]


def test_ram_over_ram(folder: Path) -> None:
    text = BASE + "[[ram]]\nstart = 0x40000000\nsize = 0x1000\n"
    assert len(errors(folder, text)) == 1


def test_more_memory_than_the_host_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "host_memory", lambda: 32 * MIB)
    assert errors(folder, BASE) == ["vm.toml:3: ram: 64M of guest memory is more than this host has (32M)"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody who may not read the file")
def test_unreadable_kernel(folder: Path) -> None:
    write_files(folder, {"vm.toml": BASE})
    (folder / "Image").chmod(0)
    for part in (folder, *list(folder.parents)[:-2]):
        part.chmod(part.stat().st_mode | 0o055)
    os.seteuid(65534)
    try:
        with pytest.raises(ConfigError) as caught:
            compose(["vm.toml"], [], FakeHost())
    finally:
        os.seteuid(0)
    assert str(caught.value) == f"vm.toml:5: load: kernel: cannot read {folder}/Image: Permission denied"


def test_missing_vm_file(folder: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["no.toml"], [], FakeHost())
    assert str(caught.value.diagnostics[0]) == "no.toml: cannot read the VM file: No such file or directory"


def test_everything_wrong_is_reported_at_once_in_the_order_of_lines(folder: Path) -> None:
    text = """\
[system]
board = "arm64-vrt"
rm = 1
cpus = "four"
[load]
kernel = "nope"
[[vdev]]
type = "nic"
[[vdev]]
type = "disk"
hostdv = "x"
[safty]
"""
    found = errors(folder, text)
    assert [line.split(":")[1] for line in found] == ["1", "2", "3", "4", "6", "8", "9", "11", "12"]


STDIO = '[[vdev]]\ntype = "pl011"\nhostdev = "stdio"\n'
SECOND = '[[vdev]]\ntype = "pl011"\nname = "second"\nloc = 0x1c0d0000\nintr = "gic:41"\nhostdev = "stdio"\n'


def test_the_boards_uart_has_the_terminal_unless_a_listed_vdev_claims_it(folder: Path) -> None:
    uart = good(folder, BASE).vdevs[0]
    assert (uart.name, uart.implicit, uart.options.hostdev) == ("uart0", True, "stdio")
    named = good(folder, BASE + '[[vdev]]\ntype = "pl011"\nname = "uart0"\n' + SECOND)
    assert [vdev.options.hostdev for vdev in named.vdevs if vdev.type == "pl011"] == ["null", "stdio"]


def test_a_terminal_claimed_twice_is_an_error_that_names_the_other(folder: Path) -> None:
    assert "vm.toml:9: vdev[1] (pl011): standard input is already used by vdev[0] (pl011)" in errors(
        folder, BASE + STDIO + SECOND
    )


@pytest.mark.parametrize(
    ("loc", "message"),
    [
        ("io:0x3f8", "loc: io:0x3f8 is an I/O port, and arm64-virt has none"),
        ("io:x", "loc: expected a whole number, not 'x'"),
    ],
)
def test_a_port_on_a_board_without_ports(folder: Path, loc: str, message: str) -> None:
    text = (
        BASE + f'[[vdev]]\ntype = "disk"\nname = "d"\nhostdev = "disk.img"\nloc = "{loc}"\nintr = "gic:41"\n'
    )
    found = errors(folder, text)
    assert any(message in problem for problem in found), found
