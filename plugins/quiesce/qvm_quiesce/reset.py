"""The reset of a device that can no longer master the bus: a ladder from the gentlest to the widest.

Times are those of PCI Express (6.6.2: a function level reset ends within 100 ms, but the function may
ask for more) and of Linux (60 s until a device counts as lost).
"""

from __future__ import annotations

from qvm_quiesce import pci
from qvm_quiesce.hardware import HardwareError
from qvm_quiesce.subject import Skip, StepFailed, Steps, Subject

D3_WAIT = 0.01
_RESET_WAIT = 0.1
#: Devices that are not ready after the standard 100 ms though they say they are: (vendor, device).
_SLOW = {
    (0x8086, 0x0953): 0.25,  # Intel P3700
    (0x8086, 0x0A54): 0.25,  # Intel P4510
    (0x025E, 0xF1AC): 0.25,  # Solidigm P44 Pro
}
#: The order of ``reset = "auto"``.
LADDER = ("flr", "af-flr", "pm", "bus")


def reset(subject: Subject) -> Steps:
    """Reset by the first method that works, then wait until the device answers again."""
    policy, offered = subject.policy, subject.hardware.resets
    if subject.attached.platform:
        raise Skip("a platform device")
    if policy.reset == "none":
        raise Skip("the policy says so")
    wanted = LADDER if policy.reset == "auto" else (policy.reset,)
    methods = [method for method in wanted if method in offered]
    if not methods:
        raise StepFailed(f"no reset: the device offers {', '.join(offered) or 'none'}")
    failures: list[str] = []
    deadline = subject.clock.now() + policy.reset_deadline
    for method in methods:
        try:
            yield from _one(subject, method, deadline)
        except (HardwareError, StepFailed) as error:
            failures.append(f"{method}: {error}")
            continue
        subject.step.detail = "; ".join([*failures, f"reset by {method}"])
        return
    raise StepFailed("; ".join(failures))


def _one(subject: Subject, method: str, deadline: float) -> Steps:
    subject.hardware.reset(method)
    subject.step.wrote.append(f"reset={method}")
    attached = subject.attached
    yield _SLOW.get((attached.vendor, attached.product), _RESET_WAIT)
    yield from subject.wait_until(lambda: _ready(subject), max(0.0, deadline - subject.clock.now()), 0.01)
    subject.gone = False
    # The kernel gives back the configuration from before the reset, or the device its own idea of it.
    command = subject.read("command", pci.COMMAND, 2)
    if command & pci.COMMAND_BUS_MASTER:
        subject.write("command", pci.COMMAND, 2, command & ~pci.COMMAND_BUS_MASTER)
        if subject.read("command", pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER:
            subject.mastering_off = False
            raise StepFailed("bus mastering came back with the reset and stays on")


def _ready(subject: Subject) -> bool:
    vendor = subject.hardware.config_read(pci.VENDOR_ID, 2)
    if vendor in (pci.ABSENT, pci.NOT_READY):
        return False
    if vendor != subject.attached.vendor:
        raise StepFailed(f"another device answers: vendor {vendor:04x}")
    return True
