"""A life of a vdev and its clients: reset, one client after another, virtio, what people are told."""

from __future__ import annotations

import json
import logging
import shlex
import socket
from pathlib import Path

import pytest
from qvm_vfio_user import VfioUser, qvm_servers
from qvm_vfio_user.testing import CONFIG_REGION, HEADER, MAP, Command, Refused

from plugins.vfio_user.tests.vfio_bench import (
    COMMAND,
    MEMORY_AND_MASTER,
    Event,
    FakeServed,
    Probe,
    open_fds,
    serving,
)
from qvmcore.api import PluginError
from qvmcore.testing.fakes import plug
from qvmcore.testing.samples import Echo


def test_DEVICE_RESET_resets_the_vdev_and_its_function() -> None:
    with serving() as bench:
        client = bench.ready()
        client.write(1, 0, 8, 0x1122334455667788)
        client.write(CONFIG_REGION, 0x10, 4, 0xFEB0_0000)
        client.reset()
        assert client.read(1, 0, 8) == 0
        assert client.read(CONFIG_REGION, COMMAND, 2) == 0
        assert client.read(CONFIG_REGION, 0x10, 4) == 0
        assert bench.vdev.resets == 1


def test_shutdown_of_the_socket_ends_the_session_without_an_error() -> None:
    with serving() as bench:
        bench.ready()
        bench.connection.shutdown(socket.SHUT_RDWR)
        assert bench.ended() is None


def test_a_client_that_only_asked_leaves_the_life_to_the_next_one() -> None:
    with serving() as bench:
        bench.client.version()
        bench.client.dma_map(0, 0x1000, None)
        bench.client.info()
        bench.client.close()
        assert bench.ended() is None and not bench.served.used
        client = bench.connect()
        with pytest.raises(Refused):
            client.request(Command.GET_INFO, bytes(16))
        bench.broken()
        bench.error = None
        client.close()
        client = bench.connect()
        client.version()
        client.dma_map(0, 0x1000, None)
        assert client.read(CONFIG_REGION, 0, 2) == 0x1C05


def test_refusals_are_said_once_for_each_command(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as bench, caplog.at_level(logging.INFO):
        bench.client.version()
        for _ in range(100):
            bench.client.ask(Command.DMA_MAP, MAP.pack(32, 3, 0, 0, 0))
            bench.client.ask(99)
        bench.client.info()
        said = [each.getMessage() for each in caplog.records]
        assert said == [
            "DMA_MAP refused (said once): argsz 32, flags 0x3, [0x0, +0x0)",
            "command 99 refused (said once): not a command of this server",
        ]


def test_a_virtio_device_is_enumerated_by_its_capabilities() -> None:
    with serving(Echo) as bench:
        client = bench.ready()
        assert client.read(CONFIG_REGION, 0, 2) == 0x1AF4
        at, found = client.read(CONFIG_REGION, 0x34, 1), []
        while at:
            found.append(client.read(CONFIG_REGION, at, 1))
            at = client.read(CONFIG_REGION, at + 1, 1)
        assert found == [0x11, 9, 9, 9, 9, 9]
        assert client.region(0).size == 0x4000


def test_nothing_stays_open_after_many_clients() -> None:
    before = open_fds()
    for _ in range(20):
        with serving() as bench, Event() as event:
            bench.client.version()
            bench.client.set_irqs(0x24, 2, fds=[event.fd])
            bench.share(0, 0x1000)
            # Refused by its header, so the rest of it may find the connection closed.
            socket.send_fds(bench.client.socket, [HEADER.pack(1, Command.DMA_MAP, 17, 0, 0)], [event.fd])
            bench.broken()
    assert open_fds() == before


def test_bind_refuses_a_vdev_that_is_no_function() -> None:
    with plug(Probe, {}, ram=()) as inner:
        served = FakeServed(inner)
        served.function = None
        with pytest.raises(PluginError, match="PCI functions only"):
            VfioUser().bind(served)


def test_the_server_is_offered_and_serves_every_class() -> None:
    (server,) = qvm_servers()
    assert (server.name, server.pci, server.refusal(Probe), server.refusal(Echo)) == (
        "vfio-user",
        True,
        "",
        "",
    )


@pytest.mark.parametrize("path", ["/run/q/disk.sock", "/run/a b/it's, new.sock"])
def test_attach_lines_are_what_a_shell_takes(path: str) -> None:
    with plug(Probe, {}, ram=()) as inner:
        lines = dict(VfioUser().attach_lines(inner.vdev, Path(path)))
    words = shlex.split(lines["QEMU >= 10.1"])
    assert words[:4] == [
        "-object",
        "memory-backend-memfd,id=mem,size=...,share=on",
        "-machine",
        "memory-backend=mem",
    ]
    assert json.loads(words[5]) == {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": path}}
    words = shlex.split(lines["Cloud Hypervisor"])
    assert words[:3] == ["--memory", "size=...,shared=on", "--user-device"]
    assert words[3] == (f'socket="{path}"' if "," in path else f"socket={path}")
    assert "--vhost-user" in lines["User Mode Linux"]


def test_attach_lines_have_an_absolute_path() -> None:
    with plug(Probe, {}, ram=()) as inner:
        lines = VfioUser().attach_lines(inner.vdev, Path("d/x.sock"))
    assert str(Path("d/x.sock").absolute()) in lines[0][1]


def test_bus_master_of_a_virtio_device_is_its_transports_business() -> None:
    with serving(Echo) as bench:
        bench.client.version()
        bench.share(0, 0x1000)
        assert len(bench.served.memory.regions) == 1
        bench.client.write(CONFIG_REGION, COMMAND, 2, MEMORY_AND_MASTER)
        bench.client.write(CONFIG_REGION, COMMAND, 2, 0)
        assert len(bench.served.memory.regions) == 1
