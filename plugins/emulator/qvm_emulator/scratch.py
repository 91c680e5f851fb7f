"""Memory and wiring for the short-lived guests of the self-test and of probes."""

from __future__ import annotations

from qvm_emulator.cpu import Wiring
from qvm_emulator.timer import TimerChannel
from qvmcore.api import GuestMemory, MemorySpec


def scratch_memory(start: int, size: int) -> GuestMemory:
    """``size`` zeroed bytes of guest memory at ``start``."""
    return GuestMemory.allocate([MemorySpec(start, size)])


def scratch_wiring(memory: GuestMemory) -> Wiring:
    """A CPU connected to ``memory`` and to nothing else."""

    def ignore() -> None:
        """No alarm."""

    def drop(_level: bool) -> None:
        """No interrupt controller."""

    def read(_address: int, size: int) -> int:
        return (1 << 8 * size) - 1

    def write(_address: int, _size: int, _value: int) -> None:
        """Nothing is there."""

    def hypercall(_function: int, _argument: int) -> int:
        return 0

    def failed(error: BaseException) -> None:
        raise error

    return Wiring(
        memory=memory,
        windows=(),
        bus_read=read,
        bus_write=write,
        hypercall=hypercall,
        virtual_timer=TimerChannel(drop, ignore),
        physical_timer=TimerChannel(drop, ignore),
        failed=failed,
    )
