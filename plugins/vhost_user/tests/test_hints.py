"""The command lines that `qvm serve` prints: they are meant to be copied."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from qvm_vhost_user.hints import BLOCK, ENTROPY, NET, attach_lines
from qvm_vhost_user.server import VhostUserServer
from qvm_virtio_entropy import VirtioEntropy
from session_kit import ServedVdev

from qvmcore.api import Vdev

CONSOLE = 3
CONFIG = bytes.fromhex("021c05000001 0001 0100")
MAC = "mac=02:1c:05:00:00:01"
SOCKET = Path("/run/qvm/dev.sock")
SHARED = "-m 512M -object memory-backend-memfd,id=mem,size=512M,share=on -machine memory-backend=mem"


def lines(device_id: int, *sizes: int, path: Path = SOCKET) -> dict[str, str]:
    return dict(attach_lines(device_id, sizes, "dev", path, CONFIG))


@pytest.mark.parametrize(
    ("device_id", "sizes", "qemu"),
    [
        (BLOCK, (512,), "-device vhost-user-blk-pci,chardev=dev,num-queues=1,disable-legacy=on"),
        (BLOCK, (512, 512), "-device vhost-user-blk-pci,chardev=dev,num-queues=2,disable-legacy=on"),
        (ENTROPY, (64,), "-device vhost-user-rng-pci,chardev=dev"),
        (
            NET,
            (256, 256, 64),
            "-netdev vhost-user,id=dev-net,chardev=dev "
            "-device virtio-net-pci,netdev=dev-net,disable-legacy=on," + MAC,
        ),
        (
            NET,
            (256,) * 4 + (64,),
            "-netdev vhost-user,id=dev-net,chardev=dev,queues=2 "
            "-device virtio-net-pci,netdev=dev-net,disable-legacy=on," + MAC + ",mq=on",
        ),
    ],
)
def test_qemu_has_shared_memory_a_socket_and_a_front_end(
    device_id: int, sizes: tuple[int, ...], qemu: str
) -> None:
    chardev = "-chardev socket,id=dev,path=/run/qvm/dev.sock"
    assert lines(device_id, *sizes)["QEMU"] == f"qemu-system-x86_64 {SHARED} {chardev} {qemu}"


def test_qemu_has_none_for_a_console_and_the_line_says_so() -> None:
    assert lines(CONSOLE, 64, 64)["QEMU"].startswith(
        "has no vhost-user front end for virtio devices of type 3"
    )


def test_cloud_hypervisor_has_shared_memory_and_an_option_by_type() -> None:
    memory = "cloud-hypervisor --memory size=512M,shared=on"
    common = "vhost_user=true,socket=/run/qvm/dev.sock"
    assert lines(BLOCK, 128)["Cloud Hypervisor"] == f"{memory} --disk {common},num_queues=1,queue_size=128"
    net = lines(NET, 256, 256, 64)["Cloud Hypervisor"]
    assert net == f"{memory} --net {common},num_queues=2,queue_size=256,{MAC}"
    console = lines(CONSOLE, 64, 32)["Cloud Hypervisor, from 52 on"]
    assert shlex.split(console)[-2:] == [
        "--generic-vhost-user",
        "socket=/run/qvm/dev.sock,virtio_id=3,queue_sizes=[64,32]",
    ]


def test_user_mode_linux_has_an_argument_with_socket_and_type() -> None:
    assert lines(CONSOLE, 64)["User Mode Linux"] == "linux.uml mem=512M virtio_uml.device=/run/qvm/dev.sock:3"


def test_a_path_with_blanks_and_commas_survives_a_shell_and_each_option_parser() -> None:
    odd = lines(BLOCK, 64, path=Path("/run/my vm,1/dev.sock"))
    assert "socket,id=dev,path=/run/my vm,,1/dev.sock" in shlex.split(odd["QEMU"])
    assert shlex.split(odd["Cloud Hypervisor"])[-1].startswith(
        'vhost_user=true,socket="/run/my vm,1/dev.sock",'
    )
    assert "virtio_uml.device=/run/my vm,1/dev.sock:2" in shlex.split(odd["User Mode Linux"])


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="no qemu-system-x86_64 here")
@pytest.mark.parametrize("device_id", [NET, BLOCK, ENTROPY])
def test_qemu_itself_understands_the_line(device_id: int, tmp_path: Path) -> None:
    """Up to the socket, which is not there."""
    line = lines(device_id, 64, 64, path=tmp_path / "none.sock")["QEMU"]
    ran = subprocess.run(
        [*shlex.split(line), "-display", "none", "-nodefaults"], capture_output=True, text=True, timeout=60
    )
    assert ran.returncode == 1
    assert "Failed to connect to" in ran.stderr and ran.stderr.count("qemu-system") == 1, ran.stderr


def test_the_server_serves_virtio_devices_only() -> None:
    server = VhostUserServer()
    assert (server.name, server.pci) == ("vhost-user", False)
    assert server.refusal(VirtioEntropy) == ""
    assert "virtio devices only" in server.refusal(Vdev)
    with ServedVdev(VirtioEntropy) as served:
        assert [vmm for vmm, _ in server.attach_lines(served.vdev, SOCKET)] == [
            "QEMU",
            "Cloud Hypervisor, from 52 on",
            "User Mode Linux",
        ]
