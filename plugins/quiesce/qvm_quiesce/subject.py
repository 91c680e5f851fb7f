"""One device while it is being quiesced: its hardware, its attach record, its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qvm_quiesce import pci
from qvm_quiesce.attach import AttachRecord
from qvm_quiesce.clock import Clock
from qvm_quiesce.evidence import DeviceEvidence, StepEvidence
from qvm_quiesce.hardware import Hardware

#: A step yields how many seconds to wait before it goes on.
Steps = Iterator[float]


class StepFailed(Exception):
    """A step could not do its work; the text says what was seen."""


class Skip(Exception):
    """A step has nothing to do here; the text says why."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How one device is quiesced; all times in seconds. See the options of the vdev ``quiesce``."""

    soft_stop: str = "auto"
    #: Entries of a register script: see :mod:`qvm_quiesce.softstop.script`.
    script: tuple[Mapping[str, Any], ...] = ()
    reset: str = "auto"
    soft_stop_deadline: float = 0.5
    drain_deadline: float = 0.7
    reset_deadline: float = 60.0
    #: How long memory and interrupts must stay as they are.
    watch: float = 0.05
    #: At most so many bytes of memory are watched, pages spread over all of it.
    watch_bytes: int = 64 << 20
    #: Keep it from later VMs, and hold its memory, when it is not proven quiet.
    quarantine: bool = True


@dataclass(slots=True)
class Subject:
    """What the steps of one device share. Used by one thread at a time."""

    hardware: Hardware
    attached: AttachRecord
    policy: Policy
    clock: Clock
    evidence: DeviceEvidence
    #: It no longer answers: every read gives all ones.
    gone: bool = False
    #: Bus mastering was last seen off.
    mastering_off: bool = False
    #: The last step found it quiet.
    proven: bool = False
    unmapped: bool = False
    #: A platform device: its register script ended with the registers it waited for.
    stopped: bool = False
    #: Nothing went wrong, but nothing that was done can prove it quiet.
    unprovable: bool = False
    step: StepEvidence = field(default_factory=lambda: StepEvidence(""))

    def learn(self, other: Subject) -> None:
        """Take over what a step found out on a copy of this."""
        self.gone, self.mastering_off = other.gone, other.mastering_off
        self.proven, self.unmapped = other.proven, other.unmapped
        self.stopped, self.unprovable = other.stopped, other.unprovable

    @property
    def name(self) -> str:
        """The device's place on the host."""
        return self.hardware.name

    def read(self, what: str, offset: int, size: int) -> int:
        """A configuration read that goes into the evidence."""
        value = self.hardware.config_read(offset, size)
        self.saw(what, value, size)
        return value

    def write(self, what: str, offset: int, size: int, value: int) -> None:
        """A configuration write that goes into the evidence."""
        self.hardware.config_write(offset, size, value)
        self.step.wrote.append(f"{what}={value:#0{2 + 2 * size}x}")

    def saw(self, what: str, value: int, size: int) -> None:
        """Put something that was read into the evidence."""
        self.step.read.append(f"{what}={value:#0{2 + 2 * size}x}")

    def capability(self, number: int) -> int | None:
        """Where a capability is, by the attach record: the device's own word may be the guest's doing."""
        return self.attached.capabilities.get(number)

    def present(self) -> bool:
        """Whether it answers now."""
        return self.hardware.config_read(pci.VENDOR_ID, 2) == self.attached.vendor

    def wait_until(self, holds: Callable[[], bool], seconds: float, first: float = 0.001) -> Steps:
        """Wait, ever longer, until ``holds()``; raises StepFailed after ``seconds``."""
        end, pause = self.clock.now() + seconds, first
        while not holds():
            left = end - self.clock.now()
            if left <= 0:
                raise StepFailed(f"not within {seconds:g} s")
            yield min(pause, left)
            pause = min(pause * 2, 1.0)
