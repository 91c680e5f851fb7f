"""The guard process: waits for the end of a VM process and quiesces its devices if nobody else did.

It imports no more than it needs and holds: the devices' descriptors, a pidfd of the VM, one socket. It
ends when it is told ``done``. When the VM is gone without that it acts at once, bus mastering first.
Whatever it cannot prove quiet it quarantines; and if it fails itself, it closes the descriptors, because
the kernel only does its own part when nobody holds them.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from qvm_quiesce import keeper
from qvm_quiesce import state as files
from qvm_quiesce.attach import AttachRecord
from qvm_quiesce.evidence import Verdict
from qvm_quiesce.hardware import Hardware
from qvm_quiesce.lifeline import Listener
from qvm_quiesce.runner import Quiesce
from qvm_quiesce.subject import Policy

#: Never killed for want of memory before the VM is: -1000 would need privilege, which it may not have.
_OOM_SCORES = ("-1000", "-900", "0")
_IGNORED = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGUSR1,
    signal.SIGUSR2, signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF, signal.SIGXFSZ, signal.SIGIO,
)  # fmt: skip

#: Why a guard acts.
GONE = "the VM process is gone"
#: Seconds between two looks whether a VM that was killed lingers.
LINGER_PERIOD = 1.0
#: Seconds after which a thread that computes lets another one run.
SWITCH_INTERVAL = 0.0005
_SIGKILL_BIT = 1 << signal.SIGKILL - 1

Guarded = tuple[Hardware, AttachRecord, Policy]


def main(fd: int) -> None:
    """Run until the VM is done or gone. Never raises; the exit status says how it went."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    # The thread that started this may have blocked some: a keeper has to hear SIGTERM.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.chdir("/")
    # Threads that wait for devices take turns quickly, as in the VM.
    sys.setswitchinterval(SWITCH_INTERVAL)
    _stay_alive()
    channel = socket.socket(fileno=fd)
    try:
        brief, fds = _receive(channel)
        devices = _adopt(brief["devices"], fds[2:])
        quiesce = Quiesce(brief["vm"], "guard", devices)
        bell = _lifeline(fds[1])
    except Exception as error:
        channel.send(f"{type(error).__name__}: {error}".encode()[:4000])
        sys.exit(1)
    try:
        channel.send(b"watching")
    except OSError:
        pass  # The VM is gone already: that is seen next.
    hardware = [each for each, _, _ in devices]
    keep = _wait(channel, fds[0], bell, brief["pid"], quiesce)
    if keep is None:
        keep = _act(quiesce, devices, Path(brief["state"]))
    keep &= {each.name for each in hardware}
    _give_back(brief["vm"], hardware, keep)
    channel.close()
    if keep:
        _keep_memory([each for each in hardware if each.name in keep])


def _give_back(vm: str, hardware: list[Hardware], keep: set[str]) -> None:
    """Close every device, one's trouble being nobody else's. Of those to ``keep`` the memory stays.

    The kernel does its own part when the last descriptor is closed: it may help, and harms nothing.
    """
    for each in hardware:
        try:
            if each.name in keep:
                each.surrender()
            else:
                each.close()
        except Exception as error:
            _say(vm, f"{each.name} cannot be given back: {error}")


def _act(quiesce: Quiesce, devices: list[Guarded], state: Path) -> set[str]:
    """Quiesce, record it, and say which devices' memory has to be kept."""
    evidence = quiesce.evidence
    try:
        quiesce.stop_dma(GONE, at_once=True)
        quiesce.prove()
    except Exception as error:
        # Nothing is proven, so all of them count as quarantined; the kernel still does its own part.
        _say(evidence.vm, f"{type(error).__name__}: {error}")
    wanted = {each.name for each, _, policy in devices if policy.quarantine}
    bad = {device.device for device in evidence.devices if device.verdict is Verdict.QUARANTINED}
    keep = wanted & bad
    if keep:
        evidence.keeper, evidence.keeper_started = os.getpid(), files.started(os.getpid())
    try:
        files.keep(evidence, state, keep)
    except Exception as error:
        _say(evidence.vm, f"cannot write the evidence: {error}")
    for device in evidence.devices:
        if device.verdict is not Verdict.QUIESCED:
            _say(evidence.vm, f"{device.device}: {device.verdict.value}: {device.reason}")
    return keep


def _say(vm: str, text: str) -> None:
    try:
        os.write(2, f"qvm guard: {vm}: {text}\n".encode(errors="replace"))
    except OSError:
        pass  # The terminal went with the VM; the record says the same.


def _keep_memory(kept: list[Hardware]) -> None:
    """Live on, with nothing but the memory, until somebody releases the devices (SIGTERM)."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Whoever reads what the VM prints must not wait for this process.
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    try:
        keeper.serve(kept)
    except OSError:
        # Nobody can ask for it then; it is held all the same.
        while True:
            signal.pause()


def _lifeline(fd: int) -> int:
    """A descriptor that is readable when the VM process has begun to die."""
    listener, bell = Listener(fd), os.eventfd(0, os.EFD_CLOEXEC)

    def listen() -> None:
        if listener.wait():
            os.eventfd_write(bell, 1)

    threading.Thread(target=listen, name="lifeline", daemon=True).start()
    return bell


def _wait(channel: socket.socket, pidfd: int, bell: int, pid: int, quiesce: Quiesce) -> set[str] | None:
    """What the VM says must be kept when its plan has run; None when it is gone without a word.

    When it begins to die bus mastering goes off at once. The rest waits until none of its threads can be
    inside an access any more: such a one might undo it.
    """
    poll = select.poll()
    for fd in (channel.fileno(), pidfd, bell):
        poll.register(fd, select.POLLIN)
    dying = False
    while True:
        ready = {fd for fd, _ in poll.poll(LINGER_PERIOD * 1000)}
        if channel.fileno() in ready:
            try:
                return set(json.loads(channel.recv(1 << 20))["keep"])
            except (OSError, ValueError, KeyError, TypeError):
                return None
        if bell in ready:
            poll.unregister(bell)
            dying = True
            quiesce.cut(GONE)
        elif pidfd in ready or (not ready and (dying or _lingers(pid))):
            return None


def _lingers(pid: int) -> bool:
    """Whether a process is dead but for a thread that cannot die: it sits in an uninterruptible call, or
    the kernel writes a core dump, which takes as long as its memory is large.

    Neither its socket nor its pidfd tell, and its devices go on. Its main thread has ended, or has a
    SIGKILL that it cannot take (every fatal signal becomes one for the other threads).
    """
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(fd, 4096).decode(errors="replace")
        finally:
            os.close(fd)
        values = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
        if values["State"].split()[0] in ("Z", "X") or values.get("CoreDumping", "").strip() == "1":
            return True
        return bool(int(values["SigPnd"], 16) & _SIGKILL_BIT)
    except (OSError, ValueError, KeyError, IndexError):
        return False  # Then it is gone altogether, which the pidfd tells.


def _receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The briefing and the descriptors."""
    size = int.from_bytes(channel.recv(4), "little")
    text = b""
    while len(text) < size:
        part = channel.recv(65536)
        if not part:
            raise EOFError("the VM ended before it said what to guard")
        text += part
    brief = json.loads(text)
    fds: list[int] = []
    while len(fds) < brief["fds"]:
        data, more, flags, _ = socket.recv_fds(channel, 16, 253)
        if not data:
            raise EOFError("the VM ended before it handed its devices over")
        if flags & socket.MSG_CTRUNC:
            raise OSError("too many open files: see ulimit -n")
        fds += more
    return brief, fds


def _adopt(entries: list[dict[str, Any]], fds: list[int]) -> list[Guarded]:
    devices = []
    for entry in entries:
        module, name = entry["adopt"].split(":")
        own, fds = fds[: entry["fds"]], fds[entry["fds"] :]
        hardware: Hardware = getattr(importlib.import_module(module), name)(entry["values"], own)
        policy = Policy(**{**entry["policy"], "script": tuple(entry["policy"]["script"])})
        devices.append((hardware, AttachRecord.from_json(entry["attached"]), policy))
    return devices


def _stay_alive() -> None:
    for score in _OOM_SCORES:
        try:
            fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            try:
                os.write(fd, score.encode())
            finally:
                os.close(fd)
            return
        except OSError:
            continue
