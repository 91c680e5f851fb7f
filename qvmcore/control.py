"""The control socket of a running VM (floor 8): who connects gets one status report as JSON, no more.

Nothing is ever read from a client. Clients are served one after the other by one thread, each within
a bounded time, so neither a slow nor a busy one can disturb the VM. The directory of the socket lets
in its owner and root only.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from qvmcore import rundir
from qvmcore.errors import HostError, nearest
from qvmcore.events import EventFd
from qvmcore.rundir import RunDirectory, RunningVm

log = logging.getLogger("qvm")

#: Seconds a client has to take its answer.
SEND_PATIENCE = 1.0
#: Seconds between two answers: someone who asks in a loop must not eat the time of the guest.
PAUSE = 0.02
#: Seconds the end of the VM waits for the thread.
STOP_PATIENCE = 0.5
#: Seconds a client waits for an answer, and the bytes it takes at most.
ASK_PATIENCE = 5.0
ANSWER_LIMIT = 16 << 20
_BACKLOG = 16


class ControlServer:
    """The run directory and the socket of a VM while the context lasts.

    ``report()`` gives JSON-able values; it is called on the server's thread and must be bounded. When
    there can be no run directory, that is a warning: the VM runs without.
    """

    def __init__(self, name: str, report: Callable[[str], object]) -> None:
        self._wanted = name
        self._report = report
        self._directory: RunDirectory | None = None
        self._listener: socket.socket | None = None
        self._wake: EventFd | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> ControlServer:
        try:
            self._open()
        except (HostError, OSError) as error:
            self._close()
            log.warning("'qvm status' will not find this VM: %s", error)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._wake is not None:
            self._wake.signal()
        if self._thread is not None:
            self._thread.join(STOP_PATIENCE)
        self._close()

    def _open(self) -> None:
        self._directory = directory = RunDirectory.create(self._wanted)
        if directory.name != self._wanted:
            log.info("this VM is %s for 'qvm status'", directory.name)
        self._listener = listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(_address(directory.fd))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
        self._wake = EventFd()
        self._thread = threading.Thread(
            target=self._serve, args=(directory.name, listener, self._wake.fd), name="control", daemon=True
        )
        self._thread.start()

    def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        if self._directory is not None:
            self._directory.close()
        if self._wake is not None:
            self._wake.close()

    def _serve(self, name: str, listener: socket.socket, wake: int) -> None:
        poll = select.poll()
        poll.register(listener, select.POLLIN)
        poll.register(wake, select.POLLIN)
        while not self._stop.is_set():
            poll.poll()
            if self._stop.is_set():
                return
            try:
                client, _ = listener.accept()
            except OSError:
                pass  # it has gone, or the process has no descriptor left; the pause keeps us calm
            else:
                with client:
                    self._answer(name, client)
            self._stop.wait(PAUSE)

    def _answer(self, name: str, client: socket.socket) -> None:
        try:
            data = json.dumps(self._report(name)).encode() + b"\n"
            client.settimeout(SEND_PATIENCE)  # of all the sending together
            client.sendall(data)
        except OSError:
            log.debug("control: a client did not take its answer")
        except Exception:
            log.exception("control: cannot report the status")


def ask(vm: RunningVm) -> dict[str, Any]:
    """The status report of a running VM. Raises HostError when it gives none."""
    deadline = time.monotonic() + ASK_PATIENCE
    try:
        data = _fetch(vm, deadline)
        report = json.loads(data)
    except TimeoutError as error:
        raise HostError(f"{vm.name} does not answer within {ASK_PATIENCE:g} s") from error
    except OSError as error:
        raise HostError.from_os("ask", vm.name, error, hint="it may be starting or ending") from error
    except ValueError as error:
        raise HostError(f"{vm.name} gives an answer that is no status report") from error
    if not isinstance(report, dict):
        raise HostError(f"{vm.name} gives an answer that is no status report")
    return report


def find(name: str) -> RunningVm:
    """The running VM called ``name``, or with that process number. Raises HostError."""
    vms = rundir.running()
    for vm in vms:
        if vm.name == name:
            return vm
    for vm in vms:
        if vm.pid and name == str(vm.pid):
            return vm
    names = [vm.name for vm in vms]
    hint = nearest(name, names) or (f"running: {', '.join(names)}" if names else "none is running")
    raise HostError(f"no running VM is called {name!r} (in {rundir.base()})", hint=hint)


def _fetch(vm: RunningVm, deadline: float) -> bytes:
    directory = os.open(vm.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            _connect(client, _address(directory), deadline)
            data = bytearray()
            while True:
                client.settimeout(max(0.001, deadline - time.monotonic()))
                chunk = client.recv(1 << 16)
                if not chunk:
                    return bytes(data)
                data += chunk
                if len(data) > ANSWER_LIMIT:
                    raise ValueError("too long")
    finally:
        os.close(directory)


def _connect(client: socket.socket, address: str, deadline: float) -> None:
    client.settimeout(0)
    while True:
        try:
            client.connect(address)
        except BlockingIOError:
            # More clients are waiting than the socket lets wait.
            if time.monotonic() >= deadline:
                raise TimeoutError from None
            time.sleep(0.01)
        else:
            return


def _address(directory: int) -> str:
    """The socket in an open directory, in a way that cannot be too long for the address of a socket."""
    return f"/proc/self/fd/{directory}/{rundir.SOCKET}"
