"""``qvm quiesce``: devices by hand, what was recorded, and the end of a quarantine."""

from __future__ import annotations

import itertools
import os
import re
import select
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qvmcore.api import HostError, QvmError

if TYPE_CHECKING:
    from qvm_quiesce.hardware import Hardware

#: A platform device: its steps are those of its VM file's script.
_PLATFORM = re.compile(r"uio:uio\d+")
_ADDRESS = re.compile(r"(?:pci:)?([0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", re.IGNORECASE)
#: Exit code when a device is not proven quiet, as that of ``qvm run``.
NOT_QUIET = 8


@click.group()
def quiesce() -> None:
    """Quiesce physical devices by hand; see what was done at the ends of VMs."""


@quiesce.command()
@click.option(
    "--last", default=5, show_default=True, type=click.IntRange(0), help="How many records to show."
)
def status(last: int) -> None:
    """The quarantined devices, and the last records."""
    from qvm_quiesce import state as files

    root = _state()
    entries = files.quarantined(root)
    click.echo("Quarantined devices:" if entries else "Quarantined devices: none")
    for name, entry in entries.items():
        keeper = f"; its memory is held by process {entry['keeper']}" if _keeper(entry) else ""
        click.echo(f"  {name}  {entry['reason']} (VM {entry['vm'] or '?'}){keeper}")
    click.echo(f"Records in {root / 'evidence'}:")
    for path, body in itertools.islice(files.records(root), last):
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
    from qvm_quiesce.hardware import HardwareError
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
        for step in (*steps.STOP_DMA, *steps.MASK_AND_RESET, *steps.PROVE):
            text = (step.run.__doc__ or "").splitlines()[0]
            click.echo(f"  {step.name:16} within {step.deadline(subject.policy):5.1f} s  {text}")
    except HardwareError as error:
        raise HostError(str(error)) from error
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

    root = _state()
    entry = files.quarantined(root).get(_address(device))
    hardware = _held(entry) or _open(device)
    try:
        work = Quiesce("(by hand)", "command", [(hardware, attach(hardware), Policy())])
        work.stop_dma("qvm quiesce run")
        verdict = work.prove()
    except HardwareError as error:
        raise HostError(str(error)) from error
    finally:
        hardware.close()
    if entry is not None and verdict is Verdict.QUARANTINED:
        # Whoever holds its memory goes on doing so.
        work.evidence.keeper, work.evidence.keeper_started = entry["keeper"], entry["keeper_started"]
    try:
        path = files.keep(work.evidence, root)
    except OSError as error:
        raise HostError(f"cannot write the record: {error}") from error
    click.echo(text_table(work.evidence.devices))
    click.echo(f"{verdict.value}; record: {path}")
    if verdict is not Verdict.QUARANTINED and entry is not None:
        _dismiss_keeper(entry, root)
    ctx.exit(0 if verdict is Verdict.QUIESCED else NOT_QUIET)


@quiesce.command()
@click.argument("device")
def release(device: str) -> None:
    """End the quarantine of DEVICE without a proof: you know that it is quiet."""
    from qvm_quiesce import state as files

    name, root = device if _PLATFORM.fullmatch(device) else _address(device), _state()
    entries = files.quarantined(root)
    if name not in entries:
        raise QvmError(f"{name} is not quarantined", hint=f"quarantined: {', '.join(entries) or 'no device'}")
    try:
        files.release(name, root)
    except OSError as error:
        raise HostError(f"cannot release {name}: {error}") from error
    click.echo(f"{name}: released")
    _dismiss_keeper(entries[name], root)


def _state() -> Path:
    from qvm_quiesce import state as files

    try:
        return files.folder()
    except OSError as error:
        raise HostError(str(error)) from error


def _address(device: str) -> str:
    if _PLATFORM.fullmatch(device):
        raise QvmError(
            f"{device} is no PCI function: only the script in its VM file can stop it",
            hint=f"qvm quiesce release {device} when you know that it is quiet",
        )
    match = _ADDRESS.fullmatch(device)
    if match is None:
        raise QvmError(
            f"{device!r} is no PCI address", hint="write domain:bus:device.function, e.g. 0000:03:00.0"
        )
    return match[1].lower()


def _open(device: str) -> Hardware:
    """The device over VFIO. Raises QvmError with what to do."""
    from qvm_quiesce.hardware import HardwareError

    name = _address(device)
    try:
        from qvm_vfio.hardware import open_device
    except ImportError as error:
        raise QvmError("physical devices need VFIO", hint="pip install qvm-vfio") from error
    try:
        hardware: Hardware = open_device(name)
    except HardwareError as error:
        raise HostError(str(error)) from error
    return hardware


def _held(entry: dict[str, Any] | None) -> Hardware | None:
    """The device as its keeper holds it; None when nobody does, or does not give it to us."""
    from qvm_quiesce import keeper

    pid = _keeper(entry) if entry is not None else 0
    if entry is None or not pid:
        return None
    try:
        return keeper.ask(pid, entry["device"])
    except keeper.KeeperError as error:
        click.echo(f"process {pid} holds the memory of {entry['device']}: {error}", err=True)
        return None


def _keeper(entry: dict[str, Any]) -> int:
    """The process that holds the memory of a quarantined device; 0 when there is none any more."""
    from qvm_quiesce import state as files

    pid, began = entry["keeper"], entry["keeper_started"]
    return pid if pid and began and files.started(pid) == began else 0


def _dismiss_keeper(entry: dict[str, Any], root: Path) -> None:
    """End the process that holds the memory, unless it holds that of another device, too."""
    from qvm_quiesce import state as files

    try:
        pidfd = os.pidfd_open(entry["keeper"] or -1)
    except (OSError, ValueError):
        return
    try:
        # Looked at with the descriptor in hand: the number cannot become another process's now.
        pid = _keeper(entry)
        others = [name for name, each in files.quarantined(root).items() if pid and _keeper(each) == pid]
        if others:
            click.echo(f"process {pid} goes on holding the memory of {', '.join(others)}")
        elif pid and not _end(pidfd):
            click.echo(f"process {pid}, which holds its memory, cannot be ended", err=True)
    finally:
        os.close(pidfd)


def _end(pidfd: int) -> bool:
    """Ask it to end and wait. A guard that is just becoming a keeper may not listen at first."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    for _ in range(20):
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        except ProcessLookupError:
            return True
        except OSError:
            return False
        if poll.poll(100):
            return True
    return False
