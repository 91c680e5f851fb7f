"""How other VMMs attach a device: command lines to copy, for each VMM that has a front end for its type.

A front end is needed for each type of device, and not every VMM has each. Where there is none, a sentence
says so. The lines have everything vhost-user needs; kernel, firmware and disk of the guest are the user's.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

#: Memory in the examples; any size will do, it only has to be said twice to QEMU.
MEMORY: Final = "512M"

NET, BLOCK, ENTROPY = 1, 2, 4

_QEMU = (
    f"qemu-system-x86_64 -m {MEMORY} -object memory-backend-memfd,id=mem,size={MEMORY},share=on "
    "-machine memory-backend=mem"
)
_CLOUD = f"cloud-hypervisor --memory size={MEMORY},shared=on"


def attach_lines(
    device_id: int, queue_sizes: Sequence[int], name: str, path: Path, config: bytes
) -> Sequence[tuple[str, str]]:
    """VMM and command line, for a device of that virtio ID and configuration with a socket at ``path``."""
    # A network card's configuration begins with its address, which VMMs do not ask for.
    mac = "" if device_id != NET else ",mac=" + config[:6].hex(":")
    return (
        ("QEMU", _qemu(device_id, queue_sizes, name, path, mac)),
        _cloud(device_id, queue_sizes, path, mac),
        (
            "User Mode Linux",
            f"linux.uml mem={MEMORY} " + shlex.quote(f"virtio_uml.device={path}:{device_id}"),
        ),
    )


def _data_queues(device_id: int, queue_sizes: Sequence[int]) -> int:
    """Queues a front end hands on: the one that controls a network card is answered by the VMM."""
    return len(queue_sizes) - len(queue_sizes) % 2 if device_id == NET else len(queue_sizes)


def _qemu(device_id: int, queue_sizes: Sequence[int], name: str, path: Path, mac: str) -> str:
    # Legacy drivers, of which OVMF's is one, take QEMU's transitional devices, and what they say is refused.
    queues = _data_queues(device_id, queue_sizes)
    if device_id == NET:
        several = f",queues={queues // 2}" if queues > 2 else ""
        device = f"-netdev vhost-user,id={name}-net,chardev={name}{several} "
        device += f"-device virtio-net-pci,netdev={name}-net,disable-legacy=on{mac}"
        device += ",mq=on" if several else ""
    elif device_id == BLOCK:
        device = f"-device vhost-user-blk-pci,chardev={name},num-queues={queues},disable-legacy=on"
    elif device_id == ENTROPY:
        device = f"-device vhost-user-rng-pci,chardev={name}"
    else:
        return f"has no vhost-user front end for virtio devices of type {device_id}; try --vfio-user"
    # A comma in a value is written twice.
    chardev = shlex.quote(f"socket,id={name},path=" + str(path).replace(",", ",,"))
    return f"{_QEMU} -chardev {chardev} {device}"


def _cloud(device_id: int, queue_sizes: Sequence[int], path: Path, mac: str) -> tuple[str, str]:
    # A value with a comma is put between quotation marks.
    socket = f'socket="{path}"' if "," in str(path) else f"socket={path}"
    if device_id in (NET, BLOCK):
        option = "--net" if device_id == NET else "--disk"
        queues = _data_queues(device_id, queue_sizes)
        value = f"vhost_user=true,{socket},num_queues={queues},queue_size={max(queue_sizes)}{mac}"
        return "Cloud Hypervisor", f"{_CLOUD} {option} {shlex.quote(value)}"
    sizes = ",".join(str(size) for size in queue_sizes)
    value = shlex.quote(f"{socket},virtio_id={device_id},queue_sizes=[{sizes}]")
    return "Cloud Hypervisor, from 52 on", f"{_CLOUD} --generic-vhost-user {value}"
