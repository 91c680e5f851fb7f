"""The evidence: what was written, what was read back, how long it took, what follows from it."""

from __future__ import annotations

import enum
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


class Verdict(enum.Enum):
    """Of one device, or of all: the worst counts."""

    QUIESCED = "QUIESCED"
    #: Proven quiet, though a step on the way failed or was late.
    DEGRADED = "DEGRADED"
    #: Not proven quiet: nobody may have it, and its memory is not given back.
    QUARANTINED = "QUARANTINED"

    @property
    def rank(self) -> int:
        """Higher is worse."""
        return list(Verdict).index(self)


@dataclass(slots=True)
class StepEvidence:
    """One step on one device. ``verdict``: ok, skipped, failed or late; ``seconds`` it took, and after
    how many seconds of the whole quiesce it began (``at``)."""

    step: str
    verdict: str = "ok"
    at: float = 0.0
    seconds: float = 0.0
    wrote: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    detail: str = ""


@dataclass(slots=True)
class DeviceEvidence:
    """Everything that was done to one device."""

    device: str
    identity: str
    verdict: Verdict = Verdict.QUARANTINED
    reason: str = ""
    steps: list[StepEvidence] = field(default_factory=list)


@dataclass(slots=True)
class Evidence:
    """The record of one quiesce: ``by`` is who did it (vm, guard, command), ``cause`` why, ``began`` when,
    in seconds of Unix time. ``keeper`` is the process that holds the memory of quarantined devices, and
    ``keeper_started`` when that began, in clock ticks since boot: a number of a process is used again."""

    vm: str
    by: str
    cause: str
    began: float = 0.0
    keeper: int = 0
    keeper_started: int = 0
    devices: list[DeviceEvidence] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst of all devices."""
        return max((each.verdict for each in self.devices), key=lambda v: v.rank, default=Verdict.QUIESCED)

    def to_json(self) -> dict[str, Any]:
        """JSON-able values with a checksum over the rest, so that a damaged file shows."""
        body: dict[str, Any] = {
            "version": 1,
            "vm": self.vm,
            "by": self.by,
            "cause": self.cause,
            "began": self.began,
            "keeper": self.keeper,
            "keeper_started": self.keeper_started,
            "verdict": self.verdict.value,
            "devices": [{**asdict(each), "verdict": each.verdict.value} for each in self.devices],
        }
        return {**body, "sha256": checksum(body)}


def checksum(body: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON text of ``body`` without its own ``sha256``."""
    plain = {key: value for key, value in body.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def table(devices: Iterable[DeviceEvidence]) -> list[Sequence[str]]:
    """Rows for people: device, step, verdict, milliseconds, what was seen."""
    rows: list[Sequence[str]] = []
    for device in devices:
        for step in device.steps:
            seen = step.detail or "; ".join([*step.wrote, *step.read])
            rows.append((device.device, step.step, step.verdict, f"{step.seconds * 1000:.1f}", seen))
        rows.append((device.device, "", device.verdict.value, "", device.reason))
    return rows


def text_table(devices: Iterable[DeviceEvidence]) -> str:
    """The rows of :func:`table` as text, a line each."""
    rows = [("device", "step", "verdict", "ms", "seen"), *table(devices)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ("  ".join([*(row[n].ljust(widths[n]) for n in range(4)), row[4]]).rstrip() for row in rows)
    return "\n".join(lines)
