"""``qvm serve --vfio-user`` as a VMM meets it: every device, clients that come and go, the end."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from qvm_vfio_user.testing import CONFIG_REGION, Command, Gone, Refused
from vfio_serving import DEVICES, NAMES, Guest, Serving, sector

from qvmcore.pci import spec as pci

for package in ("hello", "virtio_blk", "virtio_console", "virtio_entropy", "virtio_net", "pci_dummy"):
    pytest.importorskip(f"qvm_{package}", reason=f"the distribution of qvm_{package} is not installed")

IN, OUT, FLUSH, OK = 0, 1, 4, 0


def header(kind: int, number: int = 0) -> bytes:
    """struct virtio_blk_req up to the data."""
    return struct.pack("<IIQ", kind, 0, number)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    """The process; whatever a test did, no descriptor and no thread may be left in it."""
    with Serving(tmp_path) as serving:
        yield serving
        if serving.process.poll() is None:
            serving.settle()
            assert serving.stop() == 0
        assert list((tmp_path / "dir").iterdir()) == []


# ---- every device ----------------------------------------------------------------------------------------


def test_it_says_how_each_vmm_attaches_each_vdev(serving: Serving, tmp_path: Path) -> None:
    for name in NAMES:
        assert f"{name} (" in serving.out and f"{tmp_path}/dir/{name}.sock" in serving.out
    assert serving.out.count("-device vfio-user-pci") + serving.out.count("vfio-user-pci") >= len(NAMES)
    assert serving.out.count("memory-backend-memfd") >= 1 and "share=on" in serving.out
    assert serving.out.count("--user-device socket=") == len(NAMES)


def test_hello_has_its_registers_and_its_interrupt(serving: Serving) -> None:
    with Guest(serving, "hello0", posted=False) as guest:
        assert guest.remote is not None
        assert [guest.device.read(0, 2), guest.device.read(2, 2)] == [0x1C05, 0xFFFF]
        assert guest.remote.read(guest.base, 4) == int.from_bytes(b"helo", "little")
        guest.remote.write(guest.base + 4, 4, 0xCAFE)
        assert guest.irq.wait(1)
        assert [guest.remote.read(guest.base + at, 4) for at in (4, 8)] == [0xCAFE, 1]


def test_pci_dummy_has_its_identity(serving: Serving) -> None:
    with Guest(serving, "dummy0") as guest:
        assert guest.device.read(0, 2) == 0x1234 and guest.device.bars == {}


@pytest.mark.parametrize("posted", [False, True], ids=["synchronous", "posted"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("msix", [False, True], ids=["intx", "msix"])
def test_a_disk_reads_and_writes(
    serving: Serving, tmp_path: Path, posted: bool, packed: bool, msix: bool
) -> None:
    with Guest(serving, "disk0", posted=posted) as guest:
        driver = guest.driver()
        driver.packed = packed
        if msix:
            driver.use_msix(0xFEE0_0000)
        driver.reset()
        driver.negotiate()
        if msix:
            assert driver.map_queue(0, 0) == 0
        driver.setup_queues()
        driver.driver_ok()
        ring = driver.queues[0]
        for number in range(1, 20):
            before = guest.irq.count
            request = ring.submit([header(IN, number)], [512, 1])
            assert guest.irq.wait(before + 1), f"no interrupt for request {number}"
            assert guest.reap(ring) == [request]
            assert request.result() == sector(number) + bytes([OK])
            driver.interrupt_status()
        request = ring.submit([header(OUT, 7), b"seven" * 102 + b"77"], [1])
        guest.reap(ring)
        request = ring.submit([header(FLUSH)], [1])
        guest.reap(ring)
        assert request.result() == bytes([OK])
        assert (tmp_path / "disk.img").read_bytes()[7 * 512 : 7 * 512 + 5] == b"seven"


def test_a_console_an_entropy_source_and_a_card_work(serving: Serving, tmp_path: Path) -> None:
    """All at once, each for a client of its own."""
    with Guest(serving, "console0") as console, Guest(serving, "rng0") as rng, Guest(serving, "net0") as net:
        drivers = [guest.driver() for guest in (console, rng, net)]
        for driver in drivers:
            driver.start()
        said = drivers[0].queues[1].submit([b"hello, terminal"], [])
        random = drivers[1].queues[0].submit([], [32])
        sent = drivers[2].queues[1].submit([bytes(12), bytes(60)], [])
        assert console.reap(drivers[0].queues[1]) == [said]
        assert rng.reap(drivers[1].queues[0]) == [random] and random.result() != bytes(32)
        assert net.reap(drivers[2].queues[1]) == [sent]
        assert (tmp_path / "console.out").read_bytes() == b"hello, terminal"


# ---- clients that come and go --------------------------------------------------------------------------


def test_the_next_client_finds_a_new_vdev(serving: Serving) -> None:
    for _ in range(3):
        with Guest(serving, "hello0", posted=False) as guest:
            assert guest.remote is not None
            assert [guest.remote.read(guest.base + at, 4) for at in (4, 8)] == [0, 0]
            guest.remote.write(guest.base + 4, 4, 1)
    assert serving.log.count("hello0: client connected") == 3


def test_a_client_that_vanishes_in_the_middle_of_its_io_leaves_nothing(serving: Serving) -> None:
    for _ in range(5):
        with Guest(serving, "disk0") as guest:
            driver = guest.driver()
            driver.start()
            for number in range(40):
                driver.queues[0].submit([header(IN, number)], [512, 1])
            guest.vanish()
        serving.settle()
    serving.check_alive()


def test_a_second_client_is_turned_away_and_the_first_goes_on(serving: Serving) -> None:
    with Guest(serving, "disk0") as guest:
        driver = guest.driver()
        driver.start()
        for _ in range(3):
            with serving.client("disk0") as second, pytest.raises((Gone, ConnectionError)):
                second.version()
        request = driver.queues[0].submit([header(IN, 3)], [512, 1])
        assert guest.reap(driver.queues[0]) == [request]
    assert "disk0: a second client was turned away; one is connected already" in serving.log


def test_a_vdev_that_cannot_be_had_again_turns_clients_away_until_it_can(serving: Serving) -> None:
    """Its image was removed while its last client used it."""
    image = serving.folder / "disk.img"
    with Guest(serving, "disk0"):
        image.rename(serving.folder / "away")
    for _ in range(3):
        with serving.client("disk0") as client, pytest.raises(Gone):
            client.version()
    assert "disk0: cannot be served: cannot open" in serving.log
    serving.check_alive()
    image.with_name("away").rename(image)
    with Guest(serving, "disk0") as guest:
        driver = guest.driver()
        driver.start()
        request = driver.queues[0].submit([header(IN, 4)], [512, 1])
        assert guest.reap(driver.queues[0]) == [request] and request.result()[:512] == sector(4)


def test_a_reset_in_the_middle_of_io_leaves_a_working_disk(serving: Serving) -> None:
    with Guest(serving, "disk0") as guest:
        for _ in range(10):
            driver = guest.driver()
            driver.ram.release(guest.memory.regions[0].start)
            driver.start()
            for number in range(40):
                driver.queues[0].submit([header(IN, number)], [512, 1])
            guest.client.reset()
            assert guest.device.read(pci.COMMAND, 2) & pci.COMMAND_BUS_MASTER == 0
            before = bytes(guest.memory.regions[0].view)
            guest.client.info()
            assert guest.memory.regions[0].view == before, "the disk wrote to memory after the reset"
            guest.device.enumerate()
        driver = guest.driver()
        driver.start()
        request = driver.queues[0].submit([header(IN, 9)], [512, 1])
        assert guest.reap(driver.queues[0]) == [request] and request.result()[:512] == sector(9)


def test_6_2_2_without_bus_mastering_the_device_stays_out_of_memory(serving: Serving) -> None:
    with Guest(serving, "disk0", posted=False) as guest:
        driver = guest.driver()
        driver.start()
        guest.device.write(pci.COMMAND, pci.COMMAND_MEMORY, 2)
        before = bytes(guest.memory.regions[0].view)
        request = driver.queues[0].submit([header(IN, 5)], [512, 1])
        offered = bytes(guest.memory.regions[0].view)
        assert offered != before
        time.sleep(0.2)
        guest.client.info()
        assert guest.memory.regions[0].view == offered and not driver.queues[0].reap()
        guest.device.write(pci.COMMAND, pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER, 2)
        assert guest.reap(driver.queues[0]) == [request] and request.result()[:512] == sector(5)


def test_memory_that_is_unmapped_is_not_touched_until_it_is_back(serving: Serving) -> None:
    """A VMM may take memory away for a while with rings in it, without a word to its guest."""
    with Guest(serving, "disk0", posted=False) as guest:
        driver = guest.driver()
        driver.start()
        region = guest.memory.regions[0]
        guest.client.dma_unmap(region.start, region.size)
        request = driver.queues[0].submit([header(IN, 5)], [512, 1])
        before = bytes(region.view)
        time.sleep(0.2)
        guest.client.info()
        assert region.view == before
        guest.client.dma_map(region.start, region.size, region.fd)
        assert guest.reap(driver.queues[0]) == [request] and request.result()[:512] == sector(5)
        assert not driver.needs_reset


def test_firmware_maps_and_unmaps_while_a_disk_works(serving: Serving) -> None:
    """A PC's firmware changes the map of its first MiB a dozen times a boot."""
    with Guest(serving, "disk0") as guest, memfd(0x10_0000) as fd:
        driver = guest.driver()
        driver.start()
        for number in range(1, 60):
            request = driver.queues[0].submit([header(IN, number)], [512, 1])
            guest.client.dma_map(0, 0xA_0000, fd)
            guest.client.dma_map(0xC_0000, 0x4_0000, fd, 0xC_0000, flags=1)
            assert guest.reap(driver.queues[0]) == [request] and request.result()[:512] == sector(number)
            guest.client.dma_unmap(0, 0xA_0000)
            guest.client.dma_unmap(0xC_0000, 0x4_0000)
        assert not driver.needs_reset


class memfd:  # noqa: N801 - reads as a function
    """A file of ``size`` bytes in memory, as a descriptor."""

    def __init__(self, size: int) -> None:
        self.fd = os.memfd_create("test", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def test_a_client_that_does_not_share_its_memory_is_told_the_option(serving: Serving) -> None:
    with serving.client("disk0") as client:
        client.version()
        client.dma_map(0x8000_0000, 1 << 30, None)
        client.dma_map(0xFFFC_0000, 0x4_0000, None, flags=1)
        with pytest.raises((Refused, Gone)):
            client.read(CONFIG_REGION, 0, 4)
            client.read(CONFIG_REGION, 0, 4)
    serving.wait(lambda: "does not share its memory" in serving.log, "no message")
    line = next(line for line in serving.log.splitlines() if "does not share" in line)
    assert "disk0" in line and "memory-backend-memfd" in line and "share=on" in line


def test_roms_and_bars_without_a_descriptor_are_no_reason_to_leave(serving: Serving) -> None:
    """A real QEMU maps them beside its shared RAM."""
    with Guest(serving, "disk0") as guest:
        guest.client.dma_map(0xFFFC_0000, 0x4_0000, None, flags=1)
        guest.client.dma_map(0xFD00_0000, 0x100_0000, None)
        driver = guest.driver()
        driver.start()
        request = driver.queues[0].submit([header(IN, 5)], [512, 1])
        assert guest.reap(driver.queues[0]) == [request]


def test_an_old_client_without_capabilities_and_minor_0(serving: Serving) -> None:
    """Cloud Hypervisor says 0.1; older ones 0.0 and nothing else."""
    for payload in (struct.pack("<HH", 0, 0), struct.pack("<HH", 0, 1) + b"{}\0", struct.pack("<HH", 0, 9)):
        with serving.client("hello0") as client:
            answer = client.request(Command.VERSION, payload)
            assert len(answer) <= len(payload), "QEMU refuses an answer longer than its question"
            assert struct.unpack_from("<HH", answer) <= struct.unpack_from("<HH", payload)
            assert client.read(0, 0, 4) == int.from_bytes(b"helo", "little")


# ---- the end ---------------------------------------------------------------------------------------------


def test_sigterm_while_every_device_is_at_work(serving: Serving, tmp_path: Path) -> None:
    guests = [Guest(serving, name) for name in NAMES]
    for name, guest in zip(NAMES, guests, strict=True):
        if name in ("rng0", "disk0", "console0", "net0"):
            driver = guest.driver()
            driver.start()
            for ring in driver.queues:
                ring.submit([header(IN, 1)], [512, 1])
                ring.notify()
    assert serving.stop() == 0
    before = [bytes(guest.memory.regions[0].view) for guest in guests]
    time.sleep(0.1)
    assert before == [bytes(guest.memory.regions[0].view) for guest in guests]
    for guest in guests:
        with pytest.raises((Gone, BrokenPipeError)):
            guest.client.info()
        guest.close()
    assert "Traceback" not in serving.log and "not proven quiet" not in serving.log
    assert list((tmp_path / "dir").iterdir()) == []


def test_killed_and_started_again_at_the_same_sockets(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with Serving(tmp_path / "first") as first:
        first.stop(signal.SIGKILL)
    (tmp_path / "first" / "dir").rename(tmp_path / "second" / "dir")
    with Serving(tmp_path / "second") as second:
        second.check_alive()
        assert second.stop() == 0


def test_status_shows_clients_and_vdevs(serving: Serving, tmp_path: Path) -> None:
    with Guest(serving, "disk0") as guest:
        driver = guest.driver()
        driver.start()
        driver.queues[0].submit([header(IN, 1)], [512, 1])
        guest.reap(driver.queues[0])
        asked = subprocess.run(
            [sys.executable, "-m", "qvmcore", "status", "served", "--json"],
            env=os.environ | {"XDG_RUNTIME_DIR": str(tmp_path / "run")},
            capture_output=True,
            timeout=20,
        )
        report = json.loads(asked.stdout)
        assert report["state"] == "serving" and report["guest"]["status"]["clients"]["disk0"] is True
        disk = next(vdev for vdev in report["vdevs"] if vdev["name"] == "disk0")
        assert disk["fault"] == "" and "queues" in json.dumps(disk)


def test_a_file_with_one_device_that_cannot_be_served(tmp_path: Path) -> None:
    """pl011 is a part of a board: it has registers, so it is served; a button has none."""
    text = DEVICES + '\n[[vdev]]\ntype = "pl011"\nname = "uart0"\nhostdev = ">uart.out"\n'
    with Serving(tmp_path, text, (*NAMES, "uart0")) as serving:
        with Guest(serving, "uart0", posted=False) as guest:
            assert guest.remote is not None
            guest.remote.write(guest.base + 0x30, 4, 0x301)  # enabled, transmit
            guest.remote.write(guest.base, 4, ord("!"))
            serving.wait(lambda: (tmp_path / "uart.out").read_bytes() == b"!", "no output")
        assert serving.stop() == 0
