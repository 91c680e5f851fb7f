"""vdev ``quiesce``: no registers, no interrupts; it only says how physical devices are quiesced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec

from qvm_quiesce.softstop import script as register_script
from qvm_quiesce.subject import Policy
from qvmcore.api import HostError, Vdev

ALL = "all"


class QuiesceOptions(msgspec.Struct, frozen=True, rename="kebab", forbid_unknown_fields=True):
    """How, and which device; one table for each device, or one for all that have none of their own."""

    device: Annotated[
        str, msgspec.Meta(description='which one, e.g. "pci:0000:03:00.0", or all without an own table')
    ] = ALL
    soft_stop: Annotated[
        Literal["auto", "none", "virtio", "nvme", "ahci", "xhci", "e1000e", "script"],
        msgspec.Meta(description="how it is asked to stop, by its class's registers"),
    ] = "auto"
    script: Annotated[
        tuple[dict[str, Any], ...],
        msgspec.Meta(description="registers to write and to wait for: see the README of qvm-quiesce"),
    ] = ()
    reset: Annotated[
        Literal["auto", "none", "flr", "af-flr", "pm", "bus"],
        msgspec.Meta(description="which reset; auto: the gentlest that works"),
    ] = "auto"
    soft_stop_deadline: Annotated[
        float, msgspec.Meta(gt=0, le=60, description="seconds for the soft stop")
    ] = 0.5
    drain_deadline: Annotated[
        float, msgspec.Meta(gt=0, le=60, description="seconds for requests under way")
    ] = 0.7
    reset_deadline: Annotated[
        float, msgspec.Meta(gt=0, le=300, description="seconds until a reset device must answer")
    ] = 60.0
    watch: Annotated[
        float, msgspec.Meta(gt=0, le=60, description="seconds for which memory and interrupts are watched")
    ] = 0.05
    on_failure: Annotated[
        Literal["quarantine", "report"],
        msgspec.Meta(description="a device not proven quiet is kept from later VMs, or only reported"),
    ] = "quarantine"
    guard: Annotated[bool, msgspec.Meta(description="a process that quiesces when this one is killed")] = True
    guard_lost: Annotated[
        Literal["restart", "end"], msgspec.Meta(description="what happens when that process is killed")
    ] = "restart"


class QuiesceVdev(Vdev):
    """Holds the options; the work is :mod:`qvm_quiesce.session`'s."""

    vdev_type = "quiesce"
    summary = "stops physical devices before the VM's memory is given back"
    Options = QuiesceOptions
    options: QuiesceOptions

    @classmethod
    def claims(cls, options: QuiesceOptions) -> tuple[str, ...]:
        """Two tables for the same device contradict each other."""
        return (f"the quiesce of {_plain(options.device)}",)

    def on_configured(self) -> None:
        """Refuse a script that cannot run."""
        for number, entry in enumerate(self.options.script):
            wrong = register_script.problem(entry)
            if wrong:
                raise HostError(f"{self.ctx.name}: script[{number}]: {wrong}")
        if self.options.soft_stop == "script" and not self.options.script:
            raise HostError(f'{self.ctx.name}: soft-stop = "script" needs a script')

    @property
    def policy(self) -> Policy:
        """The options as the steps take them."""
        options = self.options
        return Policy(
            options.soft_stop,
            tuple(options.script),
            options.reset,
            options.soft_stop_deadline,
            options.drain_deadline,
            options.reset_deadline,
            options.watch,
            quarantine=options.on_failure == "quarantine",
        )

    def matches(self, device: str) -> bool:
        """Whether this table names the device."""
        return _plain(self.options.device) == _plain(device)

    def status(self) -> Mapping[str, object]:
        """Which device it is for."""
        return {"device": self.options.device, "guard": self.options.guard}


def _plain(device: str) -> str:
    """A device as it is compared: ``pci:0000:0A:00.0`` is ``0000:0a:00.0``."""
    return device.lower().removeprefix("pci:")
