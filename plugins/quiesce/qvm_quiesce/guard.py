"""The VM's side of the guard process: started before the guest, told when the plan has run.

The guard gets the devices' descriptors over a socket (SCM_RIGHTS). While the socket is open it waits;
when the VM process is gone without having said that its plan has run, however it went, the guard runs
the same steps. See :mod:`qvm_quiesce.guard_main`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qvm_quiesce.attach import AttachRecord
from qvm_quiesce.hardware import Handover, Hardware
from qvm_quiesce.lifeline import Lifeline, LifelineError
from qvm_quiesce.subject import Policy

#: Descriptors that fit into one message (SCM_MAX_FD of Linux is 253).
_FDS_PER_MESSAGE = 200
#: Seconds the guard has to say that it watches. It takes hundredths of one where the host is not busy: only
#: one that hangs may be given up.
START_TIMEOUT = 30.0
#: Milliseconds between two looks whether it is still wanted.
_LOOK = 100
# Behind the standard library: nothing that was installed beside this may take the place of a part of it.
_BOOT = "import sys; sys.path += {paths!r}; from qvm_quiesce.guard_main import main; main({fd})"

Device = tuple[Hardware, AttachRecord, Policy]


class GuardError(Exception):
    """The guard did not start; the text says why."""


class Guard:
    """A running guard. Any thread. ``state`` is where it keeps evidence and quarantine."""

    def __init__(self, process: subprocess.Popen[bytes], channel: socket.socket, lifeline: Lifeline) -> None:
        self._process = process
        self._channel = channel
        self._lifeline = lifeline
        self._lock = threading.Lock()
        self._over = False

    @classmethod
    def start(
        cls,
        vm: str,
        devices: Sequence[Device],
        state: Path,
        unwanted: Callable[[], bool] = lambda: False,
    ) -> Guard:
        """Start one and wait until it watches. Raises GuardError, HardwareError or OSError.

        Keep the object: when it goes, its socket closes, and the guard takes the VM for dead. It is not
        waited for any more when it is ``unwanted()``, which is asked several times a second.
        """
        handovers = [hardware.handover() for hardware, _, _ in devices]
        try:
            lifeline = Lifeline()
        except LifelineError as error:
            raise GuardError(f"its lifeline cannot be made: {error}") from error
        try:
            return cls._start(vm, devices, state, handovers, lifeline, unwanted)
        except BaseException:
            lifeline.release()
            raise

    @classmethod
    def _start(
        cls,
        vm: str,
        devices: Sequence[Device],
        state: Path,
        handovers: list[Handover],
        lifeline: Lifeline,
        unwanted: Callable[[], bool],
    ) -> Guard:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        paths = sorted({str(Path(__file__).parents[1]), *(each.path for each in handovers)})
        # Isolated and without site: a guard is small, and nothing of the environment steers it.
        boot = _BOOT.format(paths=paths, fd=theirs.fileno())
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", boot],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # A session of its own: what the terminal sends to the VM does not reach it.
                start_new_session=True,
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        guard = cls(process, ours, lifeline)
        try:
            ours.settimeout(START_TIMEOUT)
            guard._brief(vm, devices, [each._asdict() for each in handovers], state)
            _wait_for_answer(ours, unwanted)
            answer = ours.recv(4096)
            if answer != b"watching":
                raise GuardError(
                    f"the guard process did not start: {answer.decode(errors='replace') or 'it ended'}"
                )
            ours.settimeout(None)
        except BaseException:
            process.kill()
            process.wait()
            ours.close()
            raise
        return guard

    def _brief(
        self, vm: str, devices: Sequence[Device], handovers: list[dict[str, Any]], state: Path
    ) -> None:
        entries, fds = [], [os.pidfd_open(os.getpid()), self._lifeline.fd]
        for (_, attached, policy), handover in zip(devices, handovers, strict=True):
            own = handover.pop("fds")
            entry = {**handover, "attached": attached.to_json(), "policy": asdict(policy), "fds": len(own)}
            entries.append(entry)
            fds += own
        brief = {"vm": vm, "pid": os.getpid(), "state": str(state), "devices": entries, "fds": len(fds)}
        text = json.dumps(brief).encode()
        try:
            self._channel.send(len(text).to_bytes(4, "little"))
            for start in range(0, len(text), 32768):
                self._channel.send(text[start : start + 32768])
            for start in range(0, len(fds), _FDS_PER_MESSAGE):
                socket.send_fds(self._channel, [b"fds"], fds[start : start + _FDS_PER_MESSAGE])
        finally:
            os.close(fds[0])

    @property
    def running(self) -> bool:
        """Whether nobody has noticed that it ended."""
        with self._lock:
            return not self._over

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def watch(self, lost: Callable[[int], None]) -> None:
        """Call ``lost(exit status)`` from a thread when the guard ends before :meth:`dismiss`."""

        def wait() -> None:
            status = self._process.wait()
            with self._lock:
                over, self._over = self._over, True
                if not over:
                    self._channel.close()
            if not over:
                self._lifeline.release()
                lost(status)

        threading.Thread(target=wait, name="guard-watch", daemon=True).start()

    def dismiss(self, keep: Sequence[str] = ()) -> None:
        """The plan has run and its record is written. Idempotent.

        ``keep``: devices that were not proven quiet; the guard goes on holding their memory.
        """
        with self._lock:
            if self._over:
                return
            self._over = True
        try:
            self._channel.send(json.dumps({"keep": list(keep)}).encode())
        except OSError:
            # It is gone already; there is nothing it could do wrong.
            pass
        self._channel.close()
        self._lifeline.release()
        if keep:
            return
        try:
            self._process.wait(2.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _wait_for_answer(channel: socket.socket, unwanted: Callable[[], bool]) -> None:
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    deadline = time.monotonic() + START_TIMEOUT
    while not poll.poll(_LOOK):
        if unwanted():
            raise GuardError("the guard process that was being started is not wanted any more")
        if time.monotonic() >= deadline:
            raise GuardError(f"the guard process did not start within {START_TIMEOUT:g} s")
