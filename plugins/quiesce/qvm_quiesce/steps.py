"""The steps of a quiesce, in order. Each is idempotent, and none trusts what the guest left behind.

A step is a generator over a :class:`~qvm_quiesce.subject.Subject`: it yields how long to wait, raises
StepFailed or Skip, and puts what it wrote and read into the evidence. A failed step never keeps the
later, stronger ones from running.

The order matters: bus mastering goes off before any reset (a reset alone may bring it back: the kernel
restores the configuration it saved), decoding of addresses goes off after the guest can no longer
reach the device (an access nobody answers may bring the host down), and memory is taken away only after
the device was seen quiet (taken away earlier, its writes become faults, or hit whoever gets the pages).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from qvm_quiesce import pci, reset, softstop
from qvm_quiesce.softstop import script
from qvm_quiesce.subject import Policy, Skip, StepFailed, Steps, Subject

_PAGE = 4096
#: Sleeps between looks at Transactions Pending: the times Linux waits.
_DRAIN_PAUSE = 0.1
#: Seconds a function may be silent in a reset (PCI Express 6.6.2: 100 ms, and some need more).
_SILENT = 0.25
#: Name, capability, register in it, mask bit, enable bit.
_MESSAGES = (
    ("msix", pci.CAP_MSIX, pci.MSIX_CONTROL, pci.MSIX_MASK, pci.MSIX_ENABLE),
    ("msi", pci.CAP_MSI, pci.MSI_CONTROL, 0, pci.MSI_ENABLE),
)


def revoke(subject: Subject) -> Steps:
    """Nothing of the guest reaches the device any more."""
    subject.hardware.revoke()
    yield from ()


def bus_master_off(subject: Subject) -> Steps:
    """Clear Bus Master Enable and read it back: no DMA, and no MSI, which is DMA too."""
    _pci_only(subject)
    command = subject.read("command", pci.COMMAND, 2)
    if command == pci.ABSENT:
        # It may be in a reset that a VM began which is dead now.
        end = subject.clock.now() + _SILENT
        while not subject.present() and subject.clock.now() < end:
            yield _SILENT / 10
        _present(subject)
        command = subject.read("command", pci.COMMAND, 2)
    subject.write("command", pci.COMMAND, 2, command & ~pci.COMMAND_BUS_MASTER)
    now = subject.read("command", pci.COMMAND, 2)
    subject.mastering_off = not now & pci.COMMAND_BUS_MASTER
    if not subject.mastering_off:
        raise StepFailed(f"bus mastering stays on: command reads {now:#06x}")


def mask_interrupts(subject: Subject) -> Steps:
    """INTx off, MSI-X masked and off, MSI off, and nobody connected to any of them."""
    if subject.attached.platform:
        subject.hardware.drop_interrupts()
        return
    try:
        _present(subject)
        left = []
        # A function without an INTx pin may have the bit wired to 0 (SR-IOV 1.1, 3.4.1.3).
        if subject.attached.config[pci.INTERRUPT_PIN]:
            command = subject.read("command", pci.COMMAND, 2)
            subject.write("command", pci.COMMAND, 2, command | pci.COMMAND_INTX_DISABLE)
            if not subject.read("command", pci.COMMAND, 2) & pci.COMMAND_INTX_DISABLE:
                left.append("INTx")
        left += _messages_off(subject)
    finally:
        # The host's own part, whether the device answers or not.
        subject.hardware.drop_interrupts()
    if left:
        raise StepFailed(f"still enabled: {', '.join(left)}")
    yield from ()


def _messages_off(subject: Subject) -> list[str]:
    """Turn MSI-X and MSI off where they are on; the names of those that stay on."""
    left = []
    for name, capability, register, mask, enable in _MESSAGES:
        at = subject.capability(capability)
        if at is None:
            continue
        value = subject.read(name, at + register, 2)
        if mask:
            subject.write(name, at + register, 2, value | mask)
        if value & enable:
            subject.write(name, at + register, 2, (value | mask) & ~enable)
            if subject.read(name, at + register, 2) & enable:
                left.append(name)
    return left


def decode_off(subject: Subject) -> Steps:
    """The device answers at no address any more."""
    _pci_only(subject)
    _present(subject)
    command = subject.read("command", pci.COMMAND, 2)
    subject.write("command", pci.COMMAND, 2, command & ~(pci.COMMAND_DECODE | pci.COMMAND_BUS_MASTER))
    now = subject.read("command", pci.COMMAND, 2)
    if now & pci.COMMAND_DECODE:
        raise StepFailed(f"it still decodes addresses: command reads {now:#06x}")
    yield from ()


def drain(subject: Subject) -> Steps:
    """Wait until no request of the device is under way (Transactions Pending)."""
    _pci_only(subject)
    _present(subject)
    express, af = subject.capability(pci.CAP_EXPRESS), subject.capability(pci.CAP_AF)
    if express is not None:
        at, size, bit = express + pci.EXPRESS_DEVICE_STATUS, 2, pci.EXPRESS_PENDING
    elif af is not None and subject.hardware.config_read(af + pci.AF_CAPABILITIES, 1) & pci.AF_HAS_PENDING:
        at, size, bit = af + pci.AF_STATUS, 1, pci.AF_PENDING
    else:
        raise Skip("a device of conventional PCI does not tell")
    yield from subject.wait_until(
        lambda: not subject.read("pending", at, size) & bit, subject.policy.drain_deadline, _DRAIN_PAUSE
    )


def wake(subject: Subject) -> Steps:
    """Power state D0, and no address translation services, before a reset."""
    _pci_only(subject)
    _present(subject)
    for name, capability, register, enable in (
        ("ats", pci.EXT_ATS, pci.ATS_CONTROL, pci.ATS_ENABLE),
        ("pri", pci.EXT_PRI, pci.PRI_CONTROL, pci.PRI_ENABLE),
    ):
        at = subject.attached.extended.get(capability)
        if at is not None:
            value = subject.read(name, at + register, 2)
            subject.write(name, at + register, 2, value & ~enable)
    at = subject.capability(pci.CAP_PM)
    if at is None:
        raise Skip("no power management")
    state = subject.read("power", at + pci.PM_CONTROL, 2)
    if state & pci.PM_STATE:
        subject.write("power", at + pci.PM_CONTROL, 2, state & ~pci.PM_STATE)
        yield reset.D3_WAIT
        if subject.read("power", at + pci.PM_CONTROL, 2) & pci.PM_STATE:
            raise StepFailed("it does not leave its low-power state")
        # What it comes back with is its own affair.
        yield from bus_master_off(subject)


def verify(subject: Subject) -> Steps:
    """It answers, everything is off, and for a while no interrupt comes and no memory changes."""
    if subject.attached.platform:
        yield from _watch(subject)
        _platform_proof(subject)
        return
    _present(subject)
    command = subject.read("command", pci.COMMAND, 2)
    if command & pci.COMMAND_BUS_MASTER:
        # A reset may have brought it back: that is why it is looked at last.
        subject.write("command", pci.COMMAND, 2, command & ~pci.COMMAND_BUS_MASTER)
        command = subject.read("command", pci.COMMAND, 2)
    subject.mastering_off = not command & pci.COMMAND_BUS_MASTER
    if not subject.mastering_off:
        raise StepFailed(f"bus mastering is on: command reads {command:#06x}")
    left = _messages_off(subject)
    if left:
        raise StepFailed(f"still enabled: {', '.join(left)}")
    express = subject.capability(pci.CAP_EXPRESS)
    if express is not None:
        status = subject.read("pending", express + pci.EXPRESS_DEVICE_STATUS, 2)
        if status & pci.EXPRESS_PENDING:
            raise StepFailed("a request of the device is still under way")
    yield from _watch(subject)
    subject.proven = True
    subject.step.detail = f"no write and no interrupt for {subject.policy.watch * 1000:g} ms"


def _watch(subject: Subject) -> Steps:
    memory, interrupts = _digest(subject), subject.hardware.interrupts()
    yield subject.policy.watch
    late = subject.hardware.interrupts() - interrupts
    if late:
        raise StepFailed(f"{late} interrupts came after they were turned off")
    if _digest(subject) != memory:
        raise StepFailed("memory of the guest changed after bus mastering was turned off")


def _platform_proof(subject: Subject) -> None:
    """Its script is the only thing that can tell. No memory of ours is mapped for it."""
    if not script.proves(subject.policy):
        subject.unprovable = True
        what = "its script waits for no register" if subject.policy.script else "it has no register script"
        raise StepFailed(f"a platform device that cannot be proven quiet: {what}")
    if not subject.stopped:
        raise StepFailed("its script did not end as it should")
    subject.proven = True
    subject.step.detail = f"its script ended, and no interrupt for {subject.policy.watch * 1000:g} ms"


def unmap(subject: Subject) -> Steps:
    """Take the memory away from the device, which is safe only now."""
    if not subject.proven:
        raise Skip("not proven quiet: its memory stays where the device may write to it")
    subject.hardware.unmap_dma()
    subject.unmapped = True
    yield from ()


def restore(subject: Subject) -> Steps:
    """Back to the configuration it was attached with, bus mastering off; never to the guest's."""
    _pci_only(subject)
    _present(subject)
    record = subject.attached.config
    left = []
    for offset in range(pci.BAR0, pci.HEADER_SIZE, 4):
        value = int.from_bytes(record[offset : offset + 4], "little")
        if subject.hardware.config_read(offset, 4) != value:
            subject.write(f"config+{offset:#x}", offset, 4, value)
            if subject.hardware.config_read(offset, 4) != value:
                left.append(f"config+{offset:#x}")
    subject.write("command", pci.COMMAND, 2, subject.attached.command & ~pci.COMMAND_BUS_MASTER)
    if subject.read("command", pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER:
        subject.mastering_off = subject.proven = False
        raise StepFailed("bus mastering came back")
    if left:
        raise StepFailed(f"not what it was when it was attached: {', '.join(left)}")
    yield from ()


#: Seconds for a few register accesses: microseconds, but the host may be busy with the end of a large VM.
_REGISTERS = 2.0


def _seconds(value: float) -> Callable[[Policy], float]:
    return lambda _policy: value


def _never(_subject: Subject) -> bool:
    return False


def _always(_subject: Subject) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Step:
    """A step with the seconds after which it is abandoned.

    ``even_if_lost``: whether it is tried on a device that an earlier step never came back from. It
    proves nothing any more; but it may still be what keeps the device from memory.
    """

    name: str
    run: Callable[[Subject], Steps]
    deadline: Callable[[Policy], float]
    even_if_lost: Callable[[Subject], bool] = _never


#: What a guard does when the VM has only begun to die; all of STOP_DMA follows when it is dead.
CUT = Step("cut", bus_master_off, _seconds(_REGISTERS))
#: Before any other thing: the dangerous part ends here.
STOP_DMA: tuple[Step, ...] = (
    Step("revoke", revoke, _seconds(1.0)),
    Step("soft-stop", softstop.soft_stop, lambda policy: policy.soft_stop_deadline + 0.5),
    Step("bus-master-off", bus_master_off, _seconds(_REGISTERS), _always),
)
#: Then interrupts and the reset.
MASK_AND_RESET: tuple[Step, ...] = (
    Step("mask-interrupts", mask_interrupts, _seconds(_REGISTERS), _always),
    Step("decode-off", decode_off, _seconds(_REGISTERS)),
    Step("drain", drain, lambda policy: policy.drain_deadline + 0.5),
    Step("wake", wake, _seconds(_REGISTERS)),
    # It is the last means against a device whose bus mastering could not be cleared.
    Step("reset", reset.reset, lambda policy: policy.reset_deadline + 5.0, lambda s: not s.mastering_off),
)
#: Then, when nobody else writes to the guest's memory, the proof and what may only follow it.
PROVE: tuple[Step, ...] = (
    Step("verify", verify, lambda policy: policy.watch + 10.0),
    Step("unmap", unmap, _seconds(1.0)),
    Step("restore", restore, _seconds(_REGISTERS)),
)


def _pci_only(subject: Subject) -> None:
    if subject.attached.platform:
        raise Skip("a platform device")


def _present(subject: Subject) -> None:
    if not subject.present():
        subject.gone = True
        raise StepFailed("the device does not answer: its configuration space reads all ones")


def _digest(subject: Subject) -> int:
    """A checksum of the memory the device could write to, or of pages spread evenly over it."""
    digest, left = 0, subject.policy.watch_bytes
    views = subject.hardware.memory()
    total = sum(view.nbytes for view in views)
    if total <= left:
        for view in views:
            digest = zlib.crc32(view, digest)
        return digest
    stride = -(-total // max(1, left // _PAGE)) // _PAGE * _PAGE + _PAGE
    for view in views:
        for start in range(0, view.nbytes, stride):
            digest = zlib.crc32(view[start : start + _PAGE], digest)
    return digest


__all__ = ["CUT", "MASK_AND_RESET", "PROVE", "STOP_DMA", "Step"]
