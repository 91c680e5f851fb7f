"""The machine's end of a guest's network: a file by TCP, there and back."""

from __future__ import annotations

import socket
import subprocess
import threading
from types import TracebackType

#: Seconds a guest has for its next call.
PATIENCE = 120


def set_up(interface: str, address: str) -> None:
    """Give a tap interface of this machine its address and switch it on."""
    for words in (("addr", "add", f"{address}/24", "dev", interface), ("link", "set", interface, "up")):
        subprocess.run(["busybox", "ip", *words], check=True)


class FileServer:
    """Sends ``data`` to the first caller, and takes as much from the second into ``received``."""

    def __init__(self, address: str, port: int, data: bytes) -> None:
        self.received = b""
        self._data = data
        self._listener = socket.create_server((address, port))
        self._listener.settimeout(PATIENCE)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.join(2 * PATIENCE)
        self._listener.close()

    def _serve(self) -> None:
        try:
            caller, _ = self._listener.accept()
            with caller:
                caller.sendall(self._data)
            caller, _ = self._listener.accept()
            with caller, caller.makefile("rb") as stream:
                self.received = stream.read(len(self._data))
        except OSError as error:
            print(f"FileServer: {error}")  # what is missing in `received` fails the test
