"""A scripted engine: a machine's whole life without a CPU.

The "guest" is a Python function that runs on a vCPU thread and touches the bus as a guest would::

    def script(guest):
        guest.write32(0x1C0D0004, 1)
        guest.power_off()

    engine = ScriptedEngine(script)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

from qvmcore.api import CpuEntry, GuestConfig, GuestEnd, IntrSpec, Reason
from qvmcore.testing.fake_listening import FakeListening
from qvmcore.testing.fakes import FakeIrq

Script = Callable[["ScriptedGuest"], None]


class ScriptedGuest:
    """Implements :class:`qvmcore.engine.Guest`; the script sees it as its CPU."""

    fast_doorbells = False

    def __init__(self, config: GuestConfig, script: Script) -> None:
        self.config = config
        self.irqs: dict[int, FakeIrq] = {}
        #: The messages devices have sent: (address, data).
        self.messages: list[tuple[int, int]] = []
        self.listening = FakeListening()
        self.stopping = threading.Event()
        self.closed = False
        self.pauses = 0
        self._script = script
        self._thread: threading.Thread | None = None

    # -- what a script uses --------------------------------------------------------------------

    def read32(self, address: int) -> int:
        """A 4-byte load."""
        return self.config.bus.read(address, 4)

    def write32(self, address: int, value: int) -> None:
        """A 4-byte store."""
        self.config.bus.write(address, 4, value)

    def power_off(self) -> None:
        """PSCI SYSTEM_OFF."""
        self.config.on_end(GuestEnd(Reason.GUEST_SHUTDOWN, "the guest powered off"))

    def reset(self) -> None:
        """PSCI SYSTEM_RESET."""
        self.config.on_end(GuestEnd(Reason.GUEST_RESET, "the guest reset"))

    def wait(self, timeout: float = 30.0) -> None:
        """WFI until the VM stops the vCPU."""
        self.stopping.wait(timeout)

    # -- Guest ---------------------------------------------------------------------------------

    def irq_line(self, intr: IntrSpec) -> FakeIrq:
        """A counting line for each number."""
        return self.irqs.setdefault(intr.number, FakeIrq())

    def signal_msi(self, address: int, data: int) -> None:
        """Remember the message."""
        self.messages.append((address, data))

    def listen(self, fd: int, address: int, data: int) -> Callable[[], None] | None:
        """As the guest's :attr:`listening` has it, which listens to nothing by default."""
        return self.listening.listen(fd, address, data)

    def listen_level(self, intr: IntrSpec, fd: int, resample: int) -> Callable[[], None] | None:
        """Likewise; all lines are one."""
        return self.listening.listen_level(fd, resample)

    def start(self, entry: CpuEntry) -> None:
        """Run the script on its thread."""
        self._thread = threading.Thread(target=self._script, args=(self,), name="vcpu0", daemon=True)
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Set ``stopping`` and wait for the script to return."""
        self.stopping.set()
        if self._thread is None:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def pause(self, timeout: float) -> bool:
        """A script cannot be held; remembered in ``pauses``."""
        self.pauses += 1
        return True

    def resume(self) -> None:
        """Nothing to do."""

    def registers(self) -> Sequence[Mapping[str, int]]:
        """One vCPU with made-up values."""
        return ({"x0": 0x1234, "pc": 0x4000_0000},)

    def status(self) -> Mapping[str, object]:
        """Interrupt counts."""
        return {str(number): line.pulses for number, line in self.irqs.items()}

    def close(self) -> None:
        """Remember it."""
        self.closed = True


class ScriptedEngine:
    """Implements :class:`qvmcore.engine.Engine`; ``guest`` is the last guest it made."""

    name: ClassVar[str] = "scripted"
    native: ClassVar[bool] = False

    def __init__(self, script: Script) -> None:
        self._script = script
        self.guest: ScriptedGuest | None = None

    def unusable(self, arch: str) -> str:
        """Runs anything."""
        return ""

    def create_guest(self, config: GuestConfig) -> ScriptedGuest:
        """A guest that will run the script."""
        self.guest = ScriptedGuest(config, self._script)
        return self.guest
