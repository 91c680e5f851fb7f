"""One life of a vdev that is served to somebody else's VMM (floor 8).

It is what a VM is to a vdev of ``qvm run``: created, configured, started; at the end its own termination
plan runs, with what plugins add to it, and the client's memory is unmapped only when the plan says that
nobody can be in it any more.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

from qvmcore.bind import DefaultBindings
from qvmcore.bind_pci import bind_function, make_function
from qvmcore.errors import for_people
from qvmcore.memory import GuestMemory
from qvmcore.pci.function import PciFunction
from qvmcore.pci.interrupts import PciInterrupts
from qvmcore.pci.vdev import PciVdev, interrupts_of
from qvmcore.plugins import PluginHost
from qvmcore.server import Server, Session
from qvmcore.slot import VdevSlot
from qvmcore.termination import Phase, TerminationPlan
from qvmcore.types import GuestEnd, MachineSpec, MmioHandler, PciAddress, Reason, VdevSpec
from qvmcore.vdev import Vdev
from qvmcore.virtio.device import VirtioVdev

log = logging.getLogger("qvm")

#: What configuration hooks are told about a function whose place the client decides.
_SOMEWHERE = PciAddress(1)


class ServedLife:
    """A :class:`~qvmcore.server.Served`. ``asked(end)`` is called, on any thread, when the vdev wants an end.

    ``qvm_termination_callbacks`` gets this object as its machine. It has begun when it is made.
    """

    def __init__(
        self,
        spec: MachineSpec,
        vdev: VdevSpec,
        host: PluginHost,
        bindings: DefaultBindings,
        server: Server,
        asked: Callable[[GuestEnd], None],
        poll: float = 0.0,
    ) -> None:
        self.spec = spec
        self.poll = poll
        self.plan = TerminationPlan()
        self.used = False
        self._memory = GuestMemory()
        self._host = host
        self._bindings = bindings
        self._function: PciFunction | None = None
        self._config: MmioHandler | None = None
        cls = host.vdev_class(vdev.type).for_options(vdev.options)
        self.slot = VdevSlot(vdev, cls, self.plan, asked, self._no_button, spec.name, poll)
        self.slots = (self.slot,)
        self.slot.adopt(host.create_vdev(vdev, cls, self.slot))
        self.session = self._begin(server)

    def _begin(self, server: Server) -> Session:
        slot, vdev = self.slot, self.slot.vdev
        try:
            if server.pci:
                self._bind_irqs()
            slot.configure(self._memory)
            for callback in self._host.termination_callbacks(self):
                self.plan.add(callback)
            if server.pci:
                self._function = make_function(slot, self._bindings)
                self._config = bind_function(slot, self._function, self._host, slot.spec.pci or _SOMEWHERE)
            session = server.bind(self)
            vdev.on_starting()
        except BaseException:
            self.end(GuestEnd(Reason.HOST_ERROR, "not started"))
            raise
        return session

    def _bind_irqs(self) -> None:
        slot = self.slot
        if isinstance(slot.vdev, VirtioVdev):
            return
        if issubclass(slot.cls, PciVdev):
            interrupts = interrupts_of(slot.cls)
        else:
            interrupts = PciInterrupts(slot.cls.irqs, intx=slot.cls.irqs > 0)
        self._bindings.interrupts[id(slot.vdev)] = interrupts
        for index in range(slot.cls.irqs):
            slot.lines[index] = interrupts.line(index)

    # ---- Served ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """See Served."""
        return self.slot.name

    @property
    def vdev(self) -> Vdev:
        """See Served."""
        return self.slot.vdev

    @property
    def memory(self) -> GuestMemory:
        """See Served."""
        return self._memory

    @property
    def log(self) -> logging.LoggerAdapter[logging.Logger]:
        """See Served."""
        return self.slot.log

    @property
    def function(self) -> PciFunction | None:
        """See Served."""
        return self._function

    @property
    def config(self) -> MmioHandler | None:
        """See Served."""
        return self._config

    def fault(self, error: BaseException) -> None:
        """See Served."""
        self.slot.fault(error)

    def reset(self) -> None:
        """See Served."""
        try:
            with self.slot.serial():
                self.slot.vdev.on_reset()
        except Exception as error:
            # As everywhere: what leaves a vdev is its own fault, and ends in its slot.
            self.slot.fault(error)
        if self._function is not None:
            self._function.reset()

    # ---- the end -------------------------------------------------------------------------------------

    def end(self, end: GuestEnd) -> bool:
        """Run the termination plan, then unmap the client's memory; whether all is quiet. Idempotent.

        When something may still be inside the memory it stays mapped until the process ends.
        """
        steps = self.plan.run(end)
        bad = [step for step in steps if step.verdict != "ok"]
        quiet = not any(step.phase <= Phase.STOP_WORKERS or step.quiets for step in bad)
        if quiet:
            self._unmap()
            self._bindings.forget(self.slot.vdev)
        return quiet

    def _unmap(self) -> None:
        """The client may be a guest of many gigabytes: nothing of it stays, in a cycle of garbage neither."""
        if not self._memory.close():
            gc.collect()
            if not self._memory.close():
                self.log.warning("something of the vdev still holds its client's memory")

    def _no_button(self) -> None:
        self.log.warning("pressed the power button: that of another VMM cannot be reached from here")


def begin_life(
    spec: MachineSpec,
    vdev: VdevSpec,
    host: PluginHost,
    bindings: DefaultBindings,
    server: Server,
    asked: Callable[[GuestEnd], None],
    poll: float = 0.0,
) -> ServedLife | None:
    """A new life, or None, with the reason in the log, when the vdev cannot be had now."""
    try:
        return ServedLife(spec, vdev, host, bindings, server, asked, poll)
    except Exception as error:
        text = for_people(error)
        log.error("%s: cannot be served%s", vdev.name, f": {text}" if text else "", exc_info=not text)
    return None
