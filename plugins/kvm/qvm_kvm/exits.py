"""Why KVM_RUN returned: names for counters, and words for what a guest cannot go on from."""

from __future__ import annotations

EXIT_IO = 2
EXIT_IRQ_WINDOW_OPEN = 7
EXIT_MMIO = 6
EXIT_SHUTDOWN = 8
EXIT_FAIL_ENTRY = 9
EXIT_INTR = 10
EXIT_INTERNAL_ERROR = 17
EXIT_SYSTEM_EVENT = 24

NAMES = {
    0: "unknown",
    1: "exception",
    EXIT_IO: "io",
    3: "hypercall",
    4: "debug",
    5: "hlt",
    EXIT_MMIO: "mmio",
    EXIT_IRQ_WINDOW_OPEN: "irq-window-open",
    EXIT_SHUTDOWN: "shutdown",
    EXIT_FAIL_ENTRY: "fail-entry",
    EXIT_INTR: "intr",
    11: "set-tpr",
    12: "tpr-access",
    EXIT_INTERNAL_ERROR: "internal-error",
    EXIT_SYSTEM_EVENT: "system-event",
    26: "ioapic-eoi",
    28: "arm-nisv",
    29: "rdmsr",
    30: "wrmsr",
    33: "bus-lock",
    39: "memory-fault",
}

SYSTEM_SHUTDOWN = 1
SYSTEM_RESET = 2
SYSTEM_CRASH = 3

SUBERRORS = {
    1: "instruction emulation failed",
    2: "an exception while another was being raised",
    3: "an exit while an interrupt was being delivered",
    4: "an exit of a kind KVM does not know",
}

EMULATION = 1
#: Flag of an emulation error: the instruction's bytes follow.
EMULATION_HAS_BYTES = 1


def name(reason: int) -> str:
    """``mmio``; a number KVM added later is ``exit-77``."""
    return NAMES.get(reason, f"exit-{reason}")


def suberror(number: int) -> str:
    """What an internal error of KVM means."""
    return SUBERRORS.get(number, f"suberror {number}")
