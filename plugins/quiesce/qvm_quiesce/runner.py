"""Runs steps over all devices at once, one step after the other, and writes the evidence.

Each device has a thread of its own per step, so a device that hangs inside the kernel holds up neither
the others nor itself for longer than the step's deadline: its thread is left behind and the device is
no longer trusted. With a simulated clock (:class:`qvm_quiesce.simulated.FakeClock`) no thread is used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence

from qvm_quiesce import steps as all_steps
from qvm_quiesce.attach import AttachRecord
from qvm_quiesce.clock import Clock, RealClock
from qvm_quiesce.evidence import DeviceEvidence, Evidence, StepEvidence, Verdict
from qvm_quiesce.hardware import Hardware, HardwareError
from qvm_quiesce.steps import Step
from qvm_quiesce.subject import Policy, Skip, StepFailed, Subject


class Quiesce:
    """The quiesce of the devices of one VM. :meth:`stop_dma`, then :meth:`prove`; both only once.

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

    def stop_dma(self, cause: str, *, at_once: bool = False) -> None:
        """No device writes to memory any more. Idempotent: a step is never run twice.

        ``at_once``: bus mastering goes off before anything else, the soft stop included: nobody is
        left who could care for what the devices were doing.
        """
        if not self.evidence.began:
            self.evidence.cause, self.evidence.began = cause, time.time()
            self._zero = self._clock.now()
        order = all_steps.STOP_DMA
        self._run(order[-1:] + order[:-1] if at_once else order)

    def prove(self) -> Verdict:
        """Interrupts off, reset, proof, and the verdict. Idempotent."""
        self._run(all_steps.MASK_AND_PROVE)
        for subject in self._subjects:
            self._judge(subject)
        return self.evidence.verdict

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
            if subject.name in self._lost:
                evidence.verdict, evidence.detail = "skipped", "an earlier step never came back"
                continue
            subject.step = evidence
            work = _Work(subject, step, evidence, self._clock)
            if self._clock.threads:
                work.start()
                works.append(work)
            else:
                work.run()
        for work in works:
            if not work.join():
                self._lost.add(work.subject.name)

    def _judge(self, subject: Subject) -> None:
        device = subject.evidence
        bad = [step for step in device.steps if step.verdict in ("failed", "late")]
        if subject.name in self._lost:
            device.verdict, device.reason = Verdict.QUARANTINED, "the host did not come back from an access"
        elif not subject.proven or not subject.unmapped:
            verify = next((s for s in device.steps if s.step == "verify"), None)
            why = (verify.detail if verify else "") or (bad[-1].detail if bad else "not verified")
            device.verdict, device.reason = Verdict.QUARANTINED, why
        elif bad:
            names = ", ".join(step.step for step in bad)
            device.verdict, device.reason = Verdict.DEGRADED, f"proven quiet, but not by the book: {names}"
        else:
            device.verdict, device.reason = Verdict.QUIESCED, ""


class _Work:
    """One step on one device."""

    def __init__(self, subject: Subject, step: Step, evidence: StepEvidence, clock: Clock) -> None:
        self.subject = subject
        self._step = step
        self._evidence = evidence
        self._clock = clock
        self._deadline = step.deadline(subject)
        self._began = clock.now()
        self._thread: threading.Thread | None = None
        self._abandoned = False

    def start(self) -> None:
        """On a thread of its own."""
        name = f"quiesce-{self.subject.name}-{self._step.name}"
        self._thread = threading.Thread(target=self.run, name=name, daemon=True)
        self._thread.start()

    def join(self) -> bool:
        """Wait for the deadline; False when the thread is still inside an access then."""
        assert self._thread is not None
        # The generator looks at the deadline itself; the rest is for the access it may sit in.
        self._thread.join(max(0.0, self._began + self._deadline + 0.25 - self._clock.now()))
        if not self._thread.is_alive():
            return True
        self._abandoned = True
        self._finish("late", f"an access did not come back within {self._deadline:g} s")
        return False

    def run(self) -> None:
        """The step to its end, its failure or its deadline."""
        verdict, detail = "ok", ""
        try:
            for pause in self._step.run(self.subject):
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
        if not self._abandoned:
            self._finish(verdict, detail)

    def _finish(self, verdict: str, detail: str) -> None:
        self._evidence.verdict = verdict
        self._evidence.seconds = self._clock.now() - self._began
        self._evidence.detail = detail or self._evidence.detail
