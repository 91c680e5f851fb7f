"""A QEMU machine that has nothing but its firmware and one disk of ours, by vhost-user."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.foreign.qemu import MEMORY, SHARED, SYSTEM_QEMU, Machine
from tests.foreign.qemu_serve import Serve

DISK = '[[vdev]]\ntype = "virtio-blk"\nname = "disk0"\nhostdev = "disk.img"\n'


@contextmanager
def booting(folder: Path, options: Sequence[str]) -> Iterator[Machine]:
    """A machine with ``options`` that boots from ``disk.img`` in ``folder``.

    OVMF would use a transitional device by its legacy interface, which the server's end cannot be.
    """
    with ExitStack() as stack:
        server = Serve(folder, DISK, "vhost-user")
        stack.callback(server.close)
        machine = Machine(
            [
                SYSTEM_QEMU, "-accel", "tcg", "-m", MEMORY, *SHARED, *options,
                "-chardev", f"socket,id=disk,path={server.socket('disk0')}",
                "-device", "vhost-user-blk-pci,chardev=disk,num-queues=1,disable-legacy=on",
            ]
        )  # fmt: skip
        stack.callback(machine.close)
        yield machine
