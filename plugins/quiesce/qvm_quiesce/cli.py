"""``qvm quiesce``: devices by hand, what was recorded, and the end of a quarantine."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qvmcore.api import HostError, QvmError

if TYPE_CHECKING:
    from qvm_quiesce.hardware import Hardware

_ADDRESS = re.compile(r"(?:pci:)?([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", re.IGNORECASE)
#: Exit code when a device is not proven quiet, as that of ``qvm run``.
NOT_QUIET = 8


@click.group()
def quiesce() -> None:
    """Quiesce physical devices by hand; see what was done at the ends of VMs."""


@quiesce.command()
@click.option("--last", default=5, show_default=True, help="How many records to show.")
def status(last: int) -> None:
    """The quarantined devices, and the last records."""
    from qvm_quiesce import state as files

    entries = files.quarantined()
    click.echo("Quarantined devices:" if entries else "Quarantined devices: none")
    for name, entry in entries.items():
        keeper = f"; its memory is held by process {entry['keeper']}" if _keeper(entry) else ""
        click.echo(f"  {name}  {entry['reason']} (VM {entry.get('vm') or '?'}){keeper}")
    click.echo(f"Records in {files.folder() / 'evidence'}:")
    for number, (path, body) in enumerate(files.records()):
        if number >= last:
            break
        if body is None:
            click.echo(f"  {path.name}  DAMAGED: its checksum does not fit")
            continue
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(body["began"]))
        devices = ", ".join(each["device"] for each in body["devices"])
        click.echo(f"  {when}  {body['verdict']:11}  VM {body['vm']}, by the {body['by']}: {devices}")


@quiesce.command()
@click.argument("device")
def plan(device: str) -> None:
    """What would be done to DEVICE (such as 0000:03:00.0), without doing it."""
    from qvm_quiesce import pci, softstop, steps
    from qvm_quiesce.attach import AttachRecord
    from qvm_quiesce.clock import RealClock
    from qvm_quiesce.evidence import DeviceEvidence
    from qvm_quiesce.subject import Policy, Subject

    hardware = _open(device)
    try:
        words = (hardware.config_read(at, 4) for at in range(0, pci.HEADER_SIZE, 4))
        config = b"".join(word.to_bytes(4, "little") for word in words)
        record = AttachRecord(
            hardware.name, int.from_bytes(config[:2], "little"), int.from_bytes(config[2:4], "little"),
            int.from_bytes(config[9:12], "little"), config, resets=tuple(hardware.resets),
        )  # fmt: skip
        subject = Subject(hardware, record, Policy(), RealClock(), DeviceEvidence("", ""))
        click.echo(f"{hardware.name}: {record.identity}")
        click.echo(
            f"  resets: {', '.join(record.resets) or 'none: it cannot be proven quiet in every state'}"
        )
        click.echo(f"  soft stop: {softstop.kind_of(subject) or 'none for this class'}")
        for step in (*steps.STOP_DMA, *steps.MASK_AND_PROVE):
            text = (step.run.__doc__ or "").splitlines()[0]
            click.echo(f"  {step.name:16} within {step.deadline(subject):5.1f} s  {text}")
    finally:
        hardware.close()


@quiesce.command()
@click.argument("device")
@click.pass_context
def run(ctx: click.Context, device: str) -> None:
    """Quiesce DEVICE now. When it is proven quiet, its quarantine ends."""
    from qvm_quiesce import state as files
    from qvm_quiesce.attach import attach
    from qvm_quiesce.evidence import Verdict, text_table
    from qvm_quiesce.hardware import HardwareError
    from qvm_quiesce.runner import Quiesce
    from qvm_quiesce.subject import Policy

    entry = files.quarantined().get(_address(device))
    hardware = _open(device)
    try:
        work = Quiesce("(by hand)", "command", [(hardware, attach(hardware), Policy())])
        work.stop_dma("qvm quiesce run")
        verdict = work.prove()
    except HardwareError as error:
        raise HostError(str(error)) from error
    finally:
        hardware.close()
    try:
        path = files.keep(work.evidence)
    except OSError as error:
        raise HostError(f"cannot write the record: {error}") from error
    click.echo(text_table(work.evidence.devices))
    click.echo(f"{verdict.value}; record: {path}")
    if verdict is not Verdict.QUARANTINED and entry is not None:
        _dismiss_keeper(entry)
    ctx.exit(0 if verdict is Verdict.QUIESCED else NOT_QUIET)


@quiesce.command()
@click.argument("device")
def release(device: str) -> None:
    """End the quarantine of DEVICE without a proof: you know that it is quiet."""
    from qvm_quiesce import state as files

    name = _address(device)
    entry = files.quarantined().get(name)
    if entry is None:
        known = ", ".join(files.quarantined()) or "no device"
        raise QvmError(f"{name} is not quarantined", hint=f"quarantined: {known}")
    files.release(name)
    _dismiss_keeper(entry)
    click.echo(f"{name}: released")


def _address(device: str) -> str:
    match = _ADDRESS.fullmatch(device)
    if match is None:
        raise QvmError(
            f"{device!r} is no PCI address", hint="write domain:bus:device.function, e.g. 0000:03:00.0"
        )
    return match[1].lower()


def _open(device: str) -> Hardware:
    """The device over VFIO. Raises QvmError with what to do."""
    name = _address(device)
    try:
        from qvm_vfio.hardware import open_device
    except ImportError as error:
        raise QvmError("physical devices need VFIO", hint="pip install qvm-vfio") from error
    hardware: Hardware = open_device(name)
    return hardware


def _keeper(entry: dict[str, Any]) -> int:
    """The process that holds the memory of a quarantined device; 0 when there is none any more."""
    pid = entry.get("keeper")
    if not isinstance(pid, int) or pid <= 0:
        return 0
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return 0
    return pid if b"guard_main" in words else 0


def _dismiss_keeper(entry: dict[str, Any]) -> None:
    pid = _keeper(entry)
    if pid:
        try:
            os.kill(pid, signal.SIGTERM)
        except OSError as error:
            click.echo(f"process {pid}, which holds its memory, cannot be ended: {error.strerror}", err=True)
