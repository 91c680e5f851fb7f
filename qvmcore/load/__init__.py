"""Loading a guest (floor 8): kernel, initrd and the tables that describe the machine, by architecture.

:mod:`~qvmcore.load.arm64` and :mod:`~qvmcore.load.x86` each have one function that a board calls; what
they share is in ``common`` (files into guest memory), ``kinds`` (what a file is), ``elf`` and
``decompress``.
"""

from __future__ import annotations

from collections.abc import Callable

from qvmcore.boards import Board, Placement
from qvmcore.engine import CpuEntry
from qvmcore.load.arm64 import load_arm64
from qvmcore.memory import GuestMemory
from qvmcore.types import LoadSpec


def load_guest(
    spec: LoadSpec, memory: GuestMemory, board: Board, build_fdt: Callable[[Placement], bytes]
) -> CpuEntry:
    """Old name of :func:`~qvmcore.load.arm64.load_arm64`; goes when no board calls it any more."""
    return load_arm64(spec, memory, build_fdt)
