"""What people type to attach a served vdev to their VMM."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

#: What a QEMU needs for its memory to be shared with the device.
QEMU_MEMORY = "-object memory-backend-memfd,id=mem,size=...,share=on -machine memory-backend=mem"


def attach_lines(path: Path) -> Sequence[tuple[str, str]]:
    """VMMs, and what each one needs on its command line for the device behind the socket at ``path``."""
    place = str(path.absolute())
    device = json.dumps({"driver": "vfio-user-pci", "socket": {"type": "unix", "path": place}})
    quoted = f'"{place}"' if "," in place else place
    return [
        ("QEMU >= 10.1", f"{QEMU_MEMORY} -device {shlex.quote(device)}"),
        ("Cloud Hypervisor", f"--memory size=...,shared=on --user-device {shlex.quote(f'socket={quoted}')}"),
        ("User Mode Linux", "cannot attach a PCI device; serve virtio vdevs to it with --vhost-user"),
    ]
