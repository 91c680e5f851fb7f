"""The one module plugin authors import (floor 6). Everything here is public and versioned.

``API_VERSION`` is (major, minor). The major is part of the entry-point group name
(``qvm.vdev.v1``); a vdev that needs a newer minor says so with its class attribute ``api``.
"""

from qvmcore.bus import AddressSpace, Mapped
from qvmcore.engine import Controller, CpuEntry, Engine, Guest, GuestConfig, MsiFrame
from qvmcore.errors import (
    BadDescriptorChain,
    ClientError,
    ConfigError,
    EngineError,
    GuestError,
    GuestMemoryError,
    HostError,
    NotQuiet,
    PluginError,
    QvmError,
    nearest,
)
from qvmcore.events import EventFd, Worker
from qvmcore.hookspecs import hookimpl
from qvmcore.irq import IrqLine, NullIrq
from qvmcore.memory import GuestMemory, MemoryRegion
from qvmcore.options import Address, HostPath, Size
from qvmcore.pci.bar import Bar
from qvmcore.pci.capability import Capability, ConfigWindow
from qvmcore.pci.function import FunctionPort, PciFunction
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.pci.sources import Way
from qvmcore.pci.vdev import BarWindow, PciVdev
from qvmcore.server import Served, Server, Session
from qvmcore.termination import Phase, TerminationCallback
from qvmcore.types import (
    DirectPart,
    Doorbell,
    GuestEnd,
    IntrSpec,
    MemorySpec,
    MmioHandler,
    PciAddress,
    PciId,
    Reason,
    Trigger,
    VdevSpec,
    Window,
)
from qvmcore.vdev import FdtNode, NoOptions, Vdev, VdevContext
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.device import VirtioVdev
from qvmcore.virtio.inflight import Descriptor, Inflight, Taken
from qvmcore.virtio.queue import Virtqueue

API_VERSION = (1, 0)

__all__ = [
    "API_VERSION",
    "Address",
    "AddressSpace",
    "BadDescriptorChain",
    "Bar",
    "BarWindow",
    "Capability",
    "Chain",
    "ClientError",
    "ConfigError",
    "ConfigWindow",
    "Controller",
    "CpuEntry",
    "Descriptor",
    "DirectPart",
    "Doorbell",
    "Engine",
    "EngineError",
    "EventFd",
    "FdtNode",
    "FunctionPort",
    "Guest",
    "GuestConfig",
    "GuestEnd",
    "GuestError",
    "GuestMemory",
    "GuestMemoryError",
    "HostError",
    "HostPath",
    "Inflight",
    "IntrSpec",
    "IrqLine",
    "Mapped",
    "MemoryRegion",
    "MemorySpec",
    "MmioHandler",
    "MsiFrame",
    "NoOptions",
    "NotQuiet",
    "NullIrq",
    "PciAddress",
    "PciFunction",
    "PciId",
    "PciInterrupts",
    "PciVdev",
    "Phase",
    "PluginError",
    "QvmError",
    "Reason",
    "Served",
    "Server",
    "Session",
    "Size",
    "Taken",
    "TerminationCallback",
    "Trigger",
    "Vdev",
    "VdevContext",
    "VdevSpec",
    "VirtioVdev",
    "Virtqueue",
    "Way",
    "Window",
    "Worker",
    "hookimpl",
    "nearest",
]
