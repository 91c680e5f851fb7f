"""Runs steps over all devices at once, one step after the other, and writes the evidence.

Each device has a thread of its own per step, so a device that hangs inside the kernel holds up neither
the others nor itself for longer than the step's deadline: its thread is left behind, on a leash that is
cut, and the device is no longer trusted. What makes it less dangerous is still tried, on new threads.
With a simulated clock (:class:`qvm_quiesce.simulated.FakeClock`) no thread is used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import cast

from qvm_quiesce import steps as all_steps
from qvm_quiesce.attach import AttachRecord
from qvm_quiesce.clock import Clock, RealClock
from qvm_quiesce.evidence import DeviceEvidence, Evidence, StepEvidence, Verdict
from qvm_quiesce.hardware import Hardware, HardwareError
from qvm_quiesce.leash import Leash
from qvm_quiesce.steps import Step
from qvm_quiesce.subject import Policy, Skip, StepFailed, Subject

CUT = all_steps.CUT.name
#: Seconds beyond a step's deadline for the access its thread may sit in.
GRACE = 0.25


def bound(steps: Sequence[Step], policies: Iterable[Policy]) -> float:
    """Seconds after which these steps are over, whatever the devices do: every step waits for all."""
    policies = list(policies)
    return sum(max((step.deadline(each) for each in policies), default=0.0) + GRACE for step in steps)


class Quiesce:
    """The quiesce of the devices of one VM: :meth:`stop_dma`, :meth:`mask`, :meth:`prove`; each only once.

    ``vm``, ``by`` and ``cause`` go into the evidence. Made before the devices are at work: it opens and
    changes nothing.
    """

    def __init__(
        self,
        vm: str,
        by: str,
        devices: Iterable[tuple[Hardware, AttachRecord, Policy]],
        clock: Clock | None = None,
    ) -> None:
        self.evidence = Evidence(vm, by, "")
        self._clock = clock or RealClock()
        self._zero = 0.0
        self._subjects = []
        for hardware, attached, policy in devices:
            record = DeviceEvidence(hardware.name, attached.identity)
            self.evidence.devices.append(record)
            self._subjects.append(Subject(hardware, attached, policy, self._clock, record))
        self._lock = threading.Lock()
        self._done: set[str] = set()
        #: Devices with a thread that never came back: nothing they do can be believed.
        self._lost: set[str] = set()

    def cut(self, cause: str) -> None:
        """Bus mastering off, now; before :meth:`stop_dma`, which does it again with everything else.

        For a guard whose VM has only begun to die: one of its threads may still undo this. Idempotent.
        """
        self._begin(cause)
        self._run((all_steps.CUT,))

    def stop_dma(self, cause: str, *, at_once: bool = False) -> None:
        """No device writes to memory any more. Idempotent: a step is never run twice.

        ``at_once``: bus mastering goes off before anything else, the soft stop included: nobody is
        left who could care for what the devices were doing.
        """
        self._begin(cause)
        order = all_steps.STOP_DMA
        self._run(order[-1:] + order[:-1] if at_once else order)

    def mask(self) -> None:
        """No device interrupts any more, and each is reset. Idempotent."""
        self._run(all_steps.MASK_AND_RESET)

    def prove(self) -> Verdict:
        """The proof, and the verdict; only when nobody else writes to the guest's memory. Idempotent."""
        self.mask()
        self._run(all_steps.PROVE)
        for subject in self._subjects:
            self._judge(subject)
        return self.evidence.verdict

    def _begin(self, cause: str) -> None:
        if not self.evidence.began:
            self.evidence.cause, self.evidence.began = cause, time.time()
            self._zero = self._clock.now()

    def _run(self, steps: Sequence[Step]) -> None:
        with self._lock:
            for step in steps:
                if step.name not in self._done:
                    self._done.add(step.name)
                    self._all(step)

    def _all(self, step: Step) -> None:
        works = []
        for subject in self._subjects:
            evidence = StepEvidence(step.name, at=self._clock.now() - self._zero)
            subject.evidence.steps.append(evidence)
            if subject.name in self._lost and not step.even_if_lost(subject):
                evidence.verdict, evidence.detail = "skipped", "an earlier step never came back"
                continue
            works.append(_Work(subject, step, evidence, self._clock))
        # Those without a thread of their own, by a simulated clock or want of threads, run here, last.
        started = [work.start() if self._clock.threads else False for work in works]
        for work, has_thread in zip(works, started, strict=True):
            if not has_thread:
                work.run()
        for work, has_thread in zip(works, started, strict=True):
            if has_thread and not work.join():
                self._lost.add(work.subject.name)

    def _judge(self, subject: Subject) -> None:
        device = subject.evidence
        # What was tried too early, while the VM died, is judged by what came of it later.
        bad = [each for each in device.steps if each.verdict in ("failed", "late") and each.step != CUT]
        if subject.name in self._lost:
            device.verdict, device.reason = Verdict.QUARANTINED, "the host did not come back from an access"
        elif subject.unprovable and [step.step for step in bad] == ["verify"]:
            # Not quarantined: no memory of ours is its, and nothing shows that it does any harm.
            device.verdict, device.reason = Verdict.DEGRADED, bad[0].detail
        elif not subject.proven or not subject.unmapped:
            # What the proof says counts more than what went wrong before it.
            last = [step for step in bad if step.step in ("verify", "restore", "unmap")] or bad[-1:]
            device.verdict = Verdict.QUARANTINED
            device.reason = (last[0].detail if last else "") or "not verified"
        elif bad:
            names = ", ".join(step.step for step in bad)
            device.verdict, device.reason = Verdict.DEGRADED, f"proven quiet, but not by the book: {names}"
        else:
            device.verdict, device.reason = Verdict.QUIESCED, ""


class _Work:
    """One step on one device. It works on copies, which only count when it comes back in time."""

    def __init__(self, subject: Subject, step: Step, evidence: StepEvidence, clock: Clock) -> None:
        self.subject = subject
        self._step = step
        self._evidence = evidence
        self._clock = clock
        self._deadline = step.deadline(subject.policy)
        self._began = clock.now()
        self._leash = Leash(subject.hardware)
        own = StepEvidence(step.name)
        self._view = replace(subject, hardware=cast(Hardware, self._leash), step=own)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._over = False

    def start(self) -> bool:
        """On a thread of its own; False when the host gives none."""
        name = f"quiesce-{self.subject.name}-{self._step.name}"
        thread = threading.Thread(target=self.run, name=name, daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return False
        self._thread = thread
        return True

    def join(self) -> bool:
        """Wait for the deadline; False when the thread is still inside an access then."""
        assert self._thread is not None
        # The generator looks at the deadline itself; the rest is for the access it may sit in.
        self._thread.join(max(0.0, self._began + self._deadline + GRACE - self._clock.now()))
        late = f"an access did not come back within {self._deadline:g} s"
        return not self._finish("late", late, abandoned=True)

    def run(self) -> None:
        """The step to its end, its failure or its deadline."""
        verdict, detail = "ok", ""
        try:
            for pause in self._step.run(self._view):
                if self._clock.now() + pause - self._began > self._deadline:
                    verdict, detail = "late", f"not done within {self._deadline:g} s"
                    break
                self._clock.sleep(pause)
        except Skip as why:
            verdict, detail = "skipped", str(why)
        except (StepFailed, HardwareError) as error:
            verdict, detail = "failed", str(error)
        except Exception as error:
            # A fault of ours, or of a soft stop's: this step failed, the stronger ones still run.
            verdict, detail = "failed", f"{type(error).__name__}: {error}"
        self._finish(verdict, detail)

    def _finish(self, verdict: str, detail: str, *, abandoned: bool = False) -> bool:
        """Write down how it ended; whether this was the first word on that."""
        with self._lock:
            if self._over:
                return False
            self._over = True
        own, evidence = self._view.step, self._evidence
        self._leash.cut()
        evidence.verdict, evidence.detail = verdict, detail or own.detail
        evidence.seconds = self._clock.now() - self._began
        evidence.wrote, evidence.read = list(own.wrote), list(own.read)
        if not abandoned:
            self.subject.learn(self._view)
        return True
