"""Frozen values shared by every floor (floor 0). No behaviour beyond checking and printing."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Reason(enum.Enum):
    """Why a VM ends, with QNX's exit codes.

    ``POWER_CUT``: the guest was asked to power off and was cut by a second signal or the time-out,
    or nothing in it listens to the button.
    """

    GUEST_SHUTDOWN = ("guest-shutdown", 0)
    GUEST_RESET = ("guest-reset", 0)
    GUEST_CRASH = ("guest-crash", 7)
    POWER_CUT = ("power-cut", 3)
    SIGQUIT = ("sigquit", 3)
    WATCHDOG = ("watchdog", 4)
    UNSUPPORTED_ACCESS = ("unsupported-access", 5)
    VDEV_FATAL = ("vdev-fatal", 6)
    NOT_QUIET = ("not-quiet", 8)
    HOST_ERROR = ("host-error", 96)

    def __init__(self, label: str, exit_code: int) -> None:
        self.label = label
        self.exit_code = exit_code

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, slots=True)
class GuestEnd:
    """How a guest ended: the reason, a sentence for people, and the exit code.

    ``code`` is the exit code of the qvm process; vdevs may choose 32 to 63 (QNX's custom causes).
    """

    reason: Reason
    message: str = ""
    code: int = -1

    def __post_init__(self) -> None:
        if self.code < 0:
            object.__setattr__(self, "code", self.reason.exit_code)


@dataclass(frozen=True, slots=True)
class Doorbell:
    """A register whose write only wakes a worker, so an engine may bypass ``mmio_write``.

    ``offset`` and ``size`` are bytes within the window; ``datamatch`` is the written value, or
    ``None`` for any value.
    """

    offset: int
    size: int = 4
    datamatch: int | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """One guest-visible register range: ``size`` bytes, accesses of the sizes in ``access`` only.

    An access of another size, or one that leaves the window, never reaches the vdev.
    """

    size: int
    access: frozenset[int] = frozenset({1, 2, 4, 8})

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ValueError(f"window size must be positive, not {self.size}")
        if not self.access or not self.access <= {1, 2, 4, 8}:
            raise ValueError(f"access sizes are 1, 2, 4 and 8, not {sorted(self.access)}")


@dataclass(frozen=True, slots=True)
class DirectPart:
    """A part of a window that is memory of this process: ``size`` bytes at ``offset``, whole pages.

    An engine that can maps it into the guest, whose accesses of it then come to nobody here. Whoever owns
    the memory can take it away at any time by mapping something else over it.
    """

    offset: int
    size: int
    host_address: int


class MmioHandler(NamedTuple):
    """What a window is bound to at freeze.

    ``read(offset, size) -> value`` and ``write(offset, size, value)``; offset in bytes from the
    start of the window, value unsigned little-endian. Both run on a vCPU thread. ``doorbells`` are
    registers with the eventfd each one signals: an engine that can will signal it without a call of
    ``write``. ``direct`` are parts that an engine may map into the guest instead of calling ``read`` and
    ``write``, which have to work all the same. A handler that wraps another one and leaves these out sees
    every access.
    """

    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]
    doorbells: tuple[tuple[Doorbell, int], ...] = ()
    direct: tuple[DirectPart, ...] = ()


class Trigger(enum.Enum):
    """How an interrupt line signals."""

    LEVEL = "level"
    EDGE = "edge"


_INTR = re.compile(r"(?P<controller>[A-Za-z_][\w-]*):(?P<number>0[xX][0-9a-fA-F]+|\d+)")


@dataclass(frozen=True, slots=True)
class IntrSpec:
    """An interrupt by controller name and number, written ``gic:41``.

    For a GIC the number is the INTID, as in QNX: ``gic:41`` is SPI 9.
    """

    controller: str
    number: int

    @classmethod
    def parse(cls, text: str) -> IntrSpec:
        """``"gic:41"`` -> ``IntrSpec("gic", 41)``. Raises ValueError with what was expected."""
        match = _INTR.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"expected CONTROLLER:NUMBER such as 'gic:41', not {text!r}")
        return cls(match["controller"], int(match["number"], 0))

    def __str__(self) -> str:
        return f"{self.controller}:{self.number}"


_PCI = re.compile(r"pci:(?P<bus>\w+):(?P<device>\w+)(?:\.(?P<function>\w+))?")


@dataclass(frozen=True, slots=True, order=True)
class PciAddress:
    """A place on PCI bus 0, written ``pci:0:5`` or ``pci:0:5.1`` (numbers as in the VM file)."""

    device: int
    function: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.device <= 31:
            raise ValueError(f"device {self.device}: a PCI bus has devices 0 to 31")
        if not 0 <= self.function <= 7:
            raise ValueError(f"function {self.function}: a PCI device has functions 0 to 7")

    @classmethod
    def parse(cls, text: str) -> PciAddress:
        """``"pci:0:5.1"`` -> ``PciAddress(5, 1)``. Raises ValueError with what was expected."""
        match = _PCI.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"expected pci:0:DEVICE or pci:0:DEVICE.FUNCTION, not {text!r}")
        try:
            bus, device = int(match["bus"], 0), int(match["device"], 0)
            function = int(match["function"] or "0", 0)
        except ValueError:
            raise ValueError(f"expected numbers such as pci:0:5.1, not {text!r}") from None
        if bus != 0:
            raise ValueError(f"bus {bus}: there is only PCI bus 0")
        return cls(device, function)

    @property
    def loc(self) -> str:
        """As a VM file writes it: ``pci:0:5`` or ``pci:0:5.1``."""
        return f"pci:0:{self.device}" + (f".{self.function}" if self.function else "")

    def __str__(self) -> str:
        """As lspci writes it, hexadecimal: ``00:05.1``."""
        return f"00:{self.device:02x}.{self.function}"


@dataclass(frozen=True, slots=True)
class PciId:
    """Who a PCI function says it is: 16-bit IDs, 8-bit revision. Subsystem 0:0 = none."""

    vendor: int
    device: int
    subsystem_vendor: int = 0
    subsystem: int = 0
    revision: int = 0

    def __post_init__(self) -> None:
        for name in ("vendor", "device", "subsystem_vendor", "subsystem"):
            if not 0 <= getattr(self, name) <= 0xFFFF:
                raise ValueError(f"{name} {getattr(self, name):#x}: expected 16 bits")
        if not 0 <= self.revision <= 0xFF:
            raise ValueError(f"revision {self.revision:#x}: expected 8 bits")


@dataclass(frozen=True, slots=True)
class Source:
    """Where in the user's files a table or key was written; ``line`` is 1-based, 0 if unknown."""

    file: str
    line: int = 0


@dataclass(frozen=True, slots=True)
class MemorySpec:
    """A range of guest memory in bytes. ``rom`` refuses guest writes."""

    start: int
    size: int
    rom: bool = False

    @property
    def end(self) -> int:
        """First address behind the range."""
        return self.start + self.size


@dataclass(frozen=True, slots=True)
class LoadSpec:
    """What is placed into guest memory before the start: paths, and the kernel command line.

    ``format`` is ``auto`` (recognised by its content), ``linux``, ``elf`` or ``raw``; ``address``
    is where a raw file goes, in bytes, None for the start of RAM (not on x86, which needs one);
    ``mode`` is how an x86 CPU starts a raw file: ``real16``, ``protected32`` or ``long64``, empty
    for what its address suggests.
    """

    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    format: str = "auto"
    address: int | None = None
    mode: str = ""


@dataclass(frozen=True, slots=True)
class VdevSpec:
    """One ``[[vdev]]`` table: the common keys, and the vdev's own options.

    ``options`` is the validated instance of the vdev class's ``Options`` struct. ``loc`` is a
    guest-physical address in bytes, or a port number when ``space`` is ``io``; ``implicit`` marks a
    vdev the board adds itself. A relative ``hostdev`` starts at ``base_dir``, the directory of the
    file that names it.
    """

    type: str
    name: str
    options: Any = None
    loc: int | None = None
    intr: IntrSpec | None = None
    on_fault: str = "isolate"
    implicit: bool = False
    source: Source = Source("<builtin>")
    key_sources: Mapping[str, Source] = field(default_factory=dict)
    label: str = ""
    base_dir: Path = Path()
    #: Its place on PCI bus 0; None for a vdev with an address of its own.
    pci: PciAddress | None = None
    #: What ``loc`` counts in: ``mem`` or ``io``.
    space: str = "mem"

    @property
    def where(self) -> str:
        """How errors name this table, e.g. ``vdev[1] (virtio-blk)``."""
        return self.label or f"vdev {self.name} ({self.type})"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """A whole VM as composed from its files, checked and complete, before anything is opened."""

    name: str
    board: str
    engine: str
    cpus: int
    memory: tuple[MemorySpec, ...]
    load: LoadSpec
    vdevs: tuple[VdevSpec, ...]
    unsupported: str = "ignore"
    shutdown_timeout: float = 10.0
    #: Where guest dumps go; None: of a crash there is none, and one asked for goes to the current directory.
    dump_dir: Path | None = None
    source: Source = Source("<builtin>")
    base_dir: Path = Path()
    #: Whether the machine has a PCI bus.
    pci: bool = False
    #: Refuse to start unless every physical device has somebody who quiesces it.
    require_quiesce: bool = False
