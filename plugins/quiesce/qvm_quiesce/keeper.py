"""A keeper: what is left of a guard that holds the memory of devices which were not proven quiet.

The memory stays in the IOMMU, so the keeper has the device's group, and the kernel lets nobody else open it.
Whoever wants to quiesce the device after all asks the keeper, and gets copies of what it holds: the proof
then watches the very memory that the device may still write to.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from qvm_quiesce import state as files
from qvm_quiesce.hardware import Hardware, HardwareError

#: Seconds either side waits for the other.
PATIENCE = 2.0
_MESSAGE, _MOST_FDS = 1 << 16, 200
_CREDENTIALS = struct.Struct("3i")


class KeeperError(Exception):
    """The keeper does not give the device; the text says why."""


def serve(kept: Iterable[Hardware]) -> NoReturn:
    """Give each who may have it what is held of a device; until a signal ends this process."""
    by_name = {each.name: each for each in kept}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(_address(os.getpid()))
        listener.listen()
        while True:
            try:
                channel, _ = listener.accept()
            except OSError:
                time.sleep(0.1)  # whoever it was is gone, or this process has no descriptor left
                continue
            with channel:
                _answer(channel, by_name)


def _answer(channel: socket.socket, kept: dict[str, Hardware]) -> None:
    try:
        channel.settimeout(PATIENCE)
        name = channel.recv(_MESSAGE).decode()
        if _peer(channel)[1] not in (os.geteuid(), 0):
            return
        try:
            handover = kept[name].handover()
            answer, fds = handover._replace(fds=())._asdict(), handover.fds
        except HardwareError as error:
            answer, fds = {"error": str(error)}, ()
        socket.send_fds(channel, [json.dumps(answer).encode()], fds)
    except (OSError, ValueError, KeyError):
        pass  # the end of the channel says it


def ask(pid: int, device: str) -> Hardware:
    """The device ``device`` (its place on the host) that the keeper ``pid`` holds. Raises KeeperError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.settimeout(PATIENCE)
        try:
            _connect(channel, _address(pid))
            # The name is anybody's to take; the kernel's word for who answers is not.
            if _peer(channel)[0] != pid:
                raise KeeperError(f"not process {pid} answers for it")
            channel.send(device.encode())
            text, fds, _, _ = socket.recv_fds(channel, _MESSAGE, _MOST_FDS)
        except OSError as error:
            raise KeeperError(error.strerror or str(error)) from error
    return _adopt(text, fds)


def _connect(channel: socket.socket, address: str) -> None:
    """A guard that becomes a keeper gives its other devices back first, and listens a moment later."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            channel.connect(address)
            return
        except ConnectionRefusedError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)


def _adopt(text: bytes, fds: Sequence[int]) -> Hardware:
    try:
        answer: dict[str, Any] = json.loads(text or b"{}")
        if "adopt" not in answer:
            raise KeeperError(answer.get("error", "it does not hold this device for us"))
        module, name = answer["adopt"].split(":")
        if answer["path"] not in sys.path:
            sys.path.append(answer["path"])
        hardware: Hardware = getattr(importlib.import_module(module), name)(answer["values"], fds)
    except (KeeperError, HardwareError, ValueError, AttributeError, ImportError) as error:
        for fd in fds:
            try:
                os.close(fd)
            except OSError:
                continue  # closed by who failed
        raise error if isinstance(error, KeeperError) else KeeperError(str(error)) from error
    return hardware


def _address(pid: int) -> str:
    """An abstract name: it goes with the process, and with it only."""
    return f"\0qvm-keeper-{pid}-{files.started(pid)}"


def _peer(channel: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    data = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _ = _CREDENTIALS.unpack(data)
    return pid, uid
