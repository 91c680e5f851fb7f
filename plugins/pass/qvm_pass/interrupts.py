"""The interrupts of a physical function on their way to the guest: VFIO signals an eventfd for each.

The engine listens to that eventfd where it can (KVM), so no thread of ours has a part in it; else the vdev's
worker watches it. Which kind is connected, INTx, MSI or MSI-X, is the guest's choice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from qvm_quiesce import pci
from qvm_quiesce.hardware import HardwareError
from qvm_vfio import structs
from qvm_vfio.hardware import VfioHardware

from qvm_pass.msi import Messages
from qvmcore.api import PciFunction, VdevContext, Way

_NAMES = {structs.INTX: "INTx", structs.MSI: "MSI", structs.MSIX: "MSI-X"}
#: Seconds until a line may come again whose end we do not see, because registers are mapped.
_COMES_AGAIN = 0.002


class Interrupts:
    """Runs under the slot's lock, except :meth:`silence` and :meth:`status`, which any thread may call.

    ``mapped()``: whether the guest may reach registers without us. ``failed`` is told what the device
    refused.
    """

    def __init__(
        self,
        ctx: VdevContext,
        hardware: VfioHardware,
        function: PciFunction,
        failed: Callable[[HardwareError], None],
        mapped: Callable[[], bool],
    ) -> None:
        self._ctx = ctx
        self._hardware = hardware
        self._function = function
        self._failed = failed
        self._mapped = mapped
        self._messages = 0
        self._connected: tuple[int, int] | None = None
        self._ways: dict[int, Way] = {}
        #: We hold the line high, and the kernel has it masked.
        self._high = False
        self._started = False
        function.interrupts.on_msix = lambda enabled: self._choose()
        function.interrupts.asks = self._asks
        hardware.on_revoke = self.silence

    def start(self) -> None:
        """INTx from now on, until the guest has chosen something else. Raises HardwareError."""
        self._started = True
        self._switch()

    def msi(self, messages: Messages) -> None:
        """The guest wrote registers of MSI (a vCPU's thread, with the function's lock held)."""
        self._function.interrupts.set_msi(messages)
        self._messages = len(messages)
        self._choose()

    @property
    def pending(self) -> int:
        """The pending bits of MSI."""
        return self._function.interrupts.pending

    def silence(self) -> None:
        """No interrupt reaches the guest any more, whatever anybody does."""
        self._function.interrupts.silence()

    def status(self) -> Mapping[str, object]:
        """The kind that is connected, and how many of it go which way."""
        ways = list(self._ways.values())
        kind = self._connected
        return {
            "kind": _NAMES[kind[0]] if kind is not None else "none",
            "straight": ways.count(Way.STRAIGHT),
            "watched": ways.count(Way.WATCHED),
        }

    # -- which kind ------------------------------------------------------------------------------------

    def _wanted(self) -> tuple[int, int] | None:
        interrupts = self._function.interrupts
        if interrupts.msix_enabled:
            return structs.MSIX, interrupts.vectors
        if self._messages:
            return structs.MSI, self._messages
        return (structs.INTX, 1) if interrupts.intx else None

    def _choose(self) -> None:
        if self._started and not self._hardware.revoked:
            try:
                self._switch()
            except HardwareError as error:
                self._failed(error)

    def _switch(self) -> None:
        wanted, hardware = self._wanted(), self._hardware
        if wanted == self._connected:
            return
        interrupts = self._function.interrupts
        interrupts.unfollow()
        self._lower()
        old, self._connected = self._connected, None
        self._ways = {}
        if old is not None:
            hardware.disconnect(old[0])
        if wanted is None:
            return
        kind, count = wanted
        fds = hardware.connect(kind, count)
        self._connected = wanted
        if kind == structs.INTX:
            interrupts.follow_intx(fds[0], hardware.resample(), partial(self._line_turned, fds[0]))
            return
        for vector, fd in enumerate(fds):
            interrupts.follow(vector, fd, partial(self._turned, vector, fd))

    # -- messages --------------------------------------------------------------------------------------

    def _turned(self, vector: int, fd: int, way: Way) -> None:
        self._ways[fd] = way
        if way is Way.WATCHED:
            self._ctx.worker.watch(fd, partial(self._message, vector, fd))
        else:
            self._ctx.worker.unwatch(fd)

    def _message(self, vector: int, fd: int) -> None:
        """The device signalled a vector (worker thread)."""
        if self._hardware.take(fd):
            self._function.interrupts.signal(vector)

    # -- INTx ------------------------------------------------------------------------------------------

    def _line_turned(self, fd: int, way: Way) -> None:
        self._ways[fd] = way
        if way is Way.WATCHED:
            self._ctx.worker.watch(fd, partial(self._raise, fd))
        else:
            self._ctx.worker.unwatch(fd)
        if way is not Way.HELD and not self._high:
            # It may have come, and been masked by the kernel, to somebody who did not get to its end.
            self._unmask()

    def _raise(self, fd: int) -> None:
        """The device's line is high, and masked in the kernel until we unmask it (worker thread)."""
        if not self._hardware.take(fd):
            return
        if self._mapped():
            # Held, it would interrupt for ever a guest that has served it long ago.
            self._ctx.irq().pulse()
            self._ctx.worker.call_later(_COMES_AGAIN, self._again)
        else:
            self._high = True
            self._ctx.irq().set(True)

    def _again(self) -> None:
        if self._connected == (structs.INTX, 1) and not self._hardware.revoked:
            self._unmask()

    def look(self) -> None:
        """An access may have been the one that quietens the device. If not, its line comes again."""
        if self._high:
            self._lower()
            self._unmask()

    def _lower(self) -> None:
        if self._high:
            self._high = False
            self._ctx.irq().set(False)

    def _unmask(self) -> None:
        try:
            self._hardware.device.unmask_intx()
        except HardwareError as error:
            self._failed(error)

    def _asks(self) -> bool:
        """The device's own Interrupt Status bit: the line may go past us."""
        try:
            return bool(self._hardware.config_read(pci.STATUS, 2) & pci.STATUS_INTERRUPT)
        except HardwareError:
            return False
