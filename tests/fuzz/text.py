"""Targets for what people write: VM files, options, numbers, interrupts, host devices."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal

import tomli
from msgspec import Struct

from qvmcore.compose import compose
from qvmcore.errors import ConfigError, HostError
from qvmcore.options import (
    Address,
    CommandLineText,
    HostPath,
    Size,
    convert_options,
    format_size,
    parse_address,
    parse_bool,
    parse_number,
    parse_size,
)
from qvmcore.plugins import PluginHost
from qvmcore.toml_source import Place, locate
from qvmcore.types import IntrSpec, MachineSpec, PciAddress
from tests.fuzz.bytesource import ByteSource

#: What VM files are made of; a byte of the input chooses one. An empty one stands for a free character.
WORDS = (
    "", "\n", " = ", ".", "[", "]", "[[", "]]", "{", "}", ",", '"', "'", '"""', "'''", "\\", "#", "-", "_",
    "[system]\n", "[load]\n", "[[vdev]]\n", "[[ram]]\n", "[[rom]]\n", "[[vdev.x]]\n", "[vdev]\n",
    'name = "a"\n', 'board = "arm64-virt"\n', 'ram = "64M"\n', "cpus = 1\n", 'engine = "auto"\n',
    'kernel = "Image"\n', 'initrd = "Image"\n', 'cmdline = "x"\n', 'format = "raw"\n', "address = 0\n",
    'type = "virtio-blk"\n', 'type = "virtio-console"\n', 'type = "virtio-entropy"\n', 'type = "pl011"\n',
    'type = "virtio-blk "\n', "loc = 0x1c0d0000\n", "loc = 0x1c0e0000\n", "loc = 0x40000000\n",
    'loc = "pci:0:5"\n', 'loc = "pci:0:5.1"\n', 'intr = "gic:41"\n', 'intr = "gic:42"\n',
    'intr = "gic:9999"\n',
    'hostdev = "Image"\n', 'hostdev = "<Image"\n', 'hostdev = "memory:1M"\n', 'hostdev = "null"\n',
    'hostdev = "stdio"\n', "readonly = true\n", 'serial = "x"\n', 'on-fault = "shutdown"\n', 'on_fault = 3\n',
    'include = ["base.toml"]\n', 'include = ["fuzz.toml"]\n', "include = 7\n", "start = 0\n", 'size = "1M"\n',
    "name", "type", "loc", "intr", "hostdev", "vdev", "system", "load", "ram", "pass", "safety",
    "0x", "0d", "0", "1", "-1", "64", "1e9", "inf", "nan", "true", "false", "1979-05-27", "07:32:00",
    "0xffffffffffffffff", "99999999999999999999", '"gic:"', '"mem:0x1"', '"\\u00e9"', "\t", "\r\n", "\ufeff",
)  # fmt: skip

SETS = (
    "system.ram=1G", "vdev.0.loc=0", "vdev.a.hostdev=x", "vdev.pl011.hostdev=null", "vdev.0.type=pl061",
    "load.cmdline", "=", ".", "vdev=3", "vdev..x=1", "system.board=", "ram.0.size=0", "vdev.0.name=a",
)  # fmt: skip


class Everything(Struct, frozen=True, forbid_unknown_fields=True):
    """One option of every kind there is."""

    flag: bool = False
    count: int = 0
    ratio: float = 0.0
    text: str = ""
    mode: Literal["a", "b"] = "a"
    size: Size | None = None
    address: Address | None = None
    line: IntrSpec | None = None
    path: HostPath | None = None
    names: tuple[str, ...] = ()
    table: dict[str, int] = {}


@cache
def _folder() -> tuple[tempfile.TemporaryDirectory[str], Path]:
    """A folder with what VM files name; gone with the process."""
    keep = tempfile.TemporaryDirectory(prefix="qvm-fuzz-")
    folder = Path(keep.name)
    (folder / "Image").write_bytes(bytes(4096))
    (folder / "base.toml").write_text('[system]\nname = "base"\n[[vdev]]\nname = "a"\nloc = 0x1c0d0000\n')
    return keep, folder


@cache
def _host() -> PluginHost:
    return PluginHost()


def toml(data: bytes) -> None:
    """The locator walks every text that tomli accepts, and gives every place of it a line."""
    text = data.decode("utf-8", "replace").replace("\r\n", "\n")
    try:
        parsed = tomli.loads(text)
    except (tomli.TOMLDecodeError, RecursionError):
        return
    lines = locate(text)
    count = text.count("\n") + 1
    assert all(1 <= line <= count for line in lines.values())
    missing = [place for place in _places(parsed, ()) if place not in lines]
    assert not missing, f"no line for {missing}"


def _places(value: object, place: Place) -> list[Place]:
    """Every key and every array element of parsed TOML."""
    if isinstance(value, Mapping):
        inner = [((*place, key), item) for key, item in value.items()]
    elif isinstance(value, list):
        inner = [((*place, index), item) for index, item in enumerate(value)]
    else:
        return []
    return [each for at, item in inner for each in (at, *_places(item, at))]


def vm_file(data: bytes) -> None:
    """Any VM file with any overrides is a machine, or a ConfigError that names lines of the file."""
    source = ByteSource(data)
    overrides = [source.pick(SETS) for _ in range(source.byte() & 1)]
    head = (
        '[system]\nboard = "arm64-virt"\nram = "64M"\n[load]\nkernel = "Image"\n' if source.byte() & 1 else ""
    )
    text = head
    while source:
        text += source.pick(WORDS) or chr(source.byte())
    path = _folder()[1] / "fuzz.toml"
    path.write_bytes(text.encode())
    try:
        spec = compose([path], overrides, _host())
    except ConfigError as error:
        assert error.diagnostics
        for item in error.diagnostics:
            assert item.message
            assert item.file != str(path) or item.line <= text.count("\n") + 1
            assert "Error" not in item.message.split(":")[0], f"a raw exception: {item}"
    else:
        assert isinstance(spec, MachineSpec)


def options(data: bytes) -> None:
    """Any value for any option is converted or told as a problem; all spellings, all kinds."""
    source = ByteSource(data)
    names = [*Everything.__struct_fields__, "flga", "", "on-fault"]
    table = {source.pick(names): _value(source, 2) for _ in range(source.byte() % 6)}
    converted, problems = convert_options(Everything, table, Path("/base"))
    assert (converted is None) == bool(problems)
    assert all(problem.message for problem in problems)


def _value(source: ByteSource, depth: int) -> object:
    kind = source.byte() % (9 if depth else 7)
    if kind == 7:
        return [_value(source, depth - 1) for _ in range(source.byte() % 4)]
    if kind == 8:
        return {_text(source): _value(source, depth - 1) for _ in range(source.byte() % 4)}
    simple: tuple[Callable[[], object], ...] = (
        lambda: bool(source.byte() & 1),
        lambda: source.value(8),
        lambda: -source.value(8),
        lambda: source.pick((0.0, 1.5, float("inf"), float("nan"), -1e300)),
        lambda: _text(source),
        lambda: CommandLineText(_text(source)),
        lambda: source.pick(("16M", "0x1000", "gic:41", "a", "on", "no", "mem:0x10", "0d5", "~", "..")),
    )
    return simple[kind]()


def _text(source: ByteSource) -> str:
    return source.take(source.byte() % 12).decode("utf-8", "replace")


def units(data: bytes) -> None:
    """A number, size, address, truth value, interrupt or PCI place is parsed, or a ValueError says why."""
    text = data.decode("utf-8", "replace")
    for parse in (parse_number, parse_size, parse_address):
        number = _parsed(parse, text)
        assert number is None or number >= 0
    size = _parsed(parse_size, text)
    if size is not None:
        assert size < 1 << 64
        assert format_size(size)
    _parsed(parse_bool, text)
    line = _parsed(IntrSpec.parse, text)
    assert line is None or IntrSpec.parse(str(line)) == line
    place = _parsed(PciAddress.parse, text)
    assert place is None or PciAddress.parse(place.loc) == place


def hostdevs(data: bytes) -> None:
    """What stands behind a console, a disk or a card: parsed, or an error with what is legal."""
    from qvm_chardev import parse_spec
    from qvm_virtio_blk.options import parse_hostdev
    from qvm_virtio_net.link import link_path
    from qvm_virtio_net.options import NetOptions

    text = data.decode("utf-8", "replace")
    spec = _parsed(parse_spec, text)
    assert spec is None or spec.reads or spec.writes
    disk = _parsed(parse_hostdev, text)
    assert disk is None or disk.memory % 512 == 0
    if "/" in text and _parsed(lambda peer: NetOptions(peer=peer), text) is not None:
        try:
            assert link_path(text, Path("/base")).is_absolute()
        except HostError as error:
            assert str(error)


def _parsed(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except ValueError as error:
        assert str(error)
        assert not isinstance(error, UnicodeError)
        return None
