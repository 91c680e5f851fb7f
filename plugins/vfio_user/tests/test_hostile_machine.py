"""A hostile VMM with a hostile guest, as a Hypothesis state machine against a real ``qvm serve``.

It mixes what QEMU does (a version, memory, enumeration, a driver at work) with any message, lies about
sizes, descriptors of any kind, cut messages and hasty leaves. Whatever it does:

* each message that wants an answer gets one, or the connection ends;
* the process lives, and no descriptor, thread or mapping of a client that has gone is left in it;
* nothing it sends makes a vdev fail, and the next client finds each device as new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ClassVar

import pytest
from hostile import Bad, messages, numbers, opened
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from qvm_vfio_user.testing import INFO, NO_REPLY, Client, Command, Gone, Refused
from remote_function import RemoteFunction
from vfio_serving import DEVICES, Guest, Serving

from qvmcore.memory import GuestMemory
from qvmcore.pci import spec as pci
from qvmcore.testing.driver import GuestRam
from qvmcore.testing.fakes import BASE, RAM, FakeIrq
from qvmcore.testing.pci_driver import PciDriver
from qvmcore.testing.strategies import Access, config_accesses, pci_accesses

for package in ("hello", "virtio_blk", "virtio_console", "virtio_entropy", "virtio_net", "pci_dummy"):
    pytest.importorskip(f"qvm_{package}", reason=f"the distribution of qvm_{package} is not installed")

VIRTIO = ("rng0", "disk0", "console0", "net0")


@pytest.fixture(scope="module", autouse=True)
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One process for every run: nothing of one may be seen by the next."""
    with Serving(tmp_path_factory.mktemp("machine"), DEVICES) as serving:
        HostileClient.serving = serving
        yield
        serving.settle()
        assert serving.stop() == 0


def while_connected(step: Callable[..., None]) -> Any:
    """A rule for a client that is connected; when the server shuts the door, it is not any more.

    No preconditions: when exactly a client sees the door shut is a matter of time, and what Hypothesis
    draws must not be.
    """

    @wraps(step)
    def guarded(self: HostileClient, **drawn: Any) -> None:
        try:
            if self.client is not None:
                step(self, **drawn)
        except Gone:
            self.leave()

    return guarded


class HostileClient(RuleBasedStateMachine):
    """One client at a time, of one device."""

    serving: ClassVar[Serving]
    client: Client | None = None
    remote: RemoteFunction | None = None
    driver: PciDriver | None = None
    memory: GuestMemory | None = None

    @initialize(name=st.sampled_from(("hello0", "dummy0", *VIRTIO)), good=st.booleans())
    def begin(self, name: str, good: bool) -> None:
        """Choose a device; perhaps begin as QEMU does."""
        self.name = name
        self.connect(version=True)
        if good:
            self.attach()

    @rule(version=st.booleans())
    def connect(self, version: bool) -> None:
        """A new client, with or without the first message."""
        if self.client is not None:
            return
        client = self.client = self.serving.client(self.name)
        self.clean = version
        try:
            if version:
                client.version()
        except Gone as error:
            raise AssertionError(f"it does not take a client: {self.serving.log[-2000:]}") from error

    @rule()
    def attach(self) -> None:
        """Memory, interrupts, enumeration, a driver that works: so far nothing bad was sent."""
        if self.client is None or self.remote is not None or not self.clean:
            return
        self.memory = GuestMemory.allocate(RAM)
        self.remote = RemoteFunction(self.client, FakeIrq(), posted=True, aperture=BASE)
        self.remote.share(self.memory.regions)
        self.remote.device.enumerate()
        if self.name in VIRTIO:
            self.driver = PciDriver(self.remote, self.remote.device, GuestRam(self.memory))
            self.driver.start()
        self.clean = False

    @rule(bad=messages())
    @while_connected
    def say(self, bad: Bad) -> None:
        """Any message: the answer is its own, or there is none because none was wanted."""
        assert self.client is not None
        self.clean = False
        with opened(bad.fds) as fds:
            self.client.send(bad.bytes(), fds)
        if bad.flags & NO_REPLY:
            self.sync()
        else:
            reply = self.client.receive()
            assert (reply.id, reply.command) == (7, bad.command)

    def sync(self) -> None:
        """The next answer is that of the next question; a client without shared memory gets a refusal."""
        assert self.client is not None
        self.client.ask(Command.GET_INFO, INFO.pack(16, 0, 0, 0))

    @rule(bads=st.lists(messages(), min_size=2, max_size=6))
    @while_connected
    def say_much_at_once(self, bads: list[Bad]) -> None:
        """Several messages in one write; those that came with descriptors have none now."""
        assert self.client is not None
        self.clean = False
        self.client.send(b"".join(bad.bytes() for bad in bads))
        for bad in bads:
            if not bad.flags & NO_REPLY:
                assert self.client.receive().command == bad.command
        self.sync()

    @rule(bad=messages(), size=numbers(32))
    @while_connected
    def lie_about_the_size_and_leave(self, bad: Bad, size: int) -> None:
        """The server waits for more, or sees another message where none begins."""
        assert self.client is not None
        with opened(bad.fds) as fds:
            self.client.send(bad._replace(size=size).bytes(), fds)
        self.leave()

    @rule(bad=messages(), cut=st.integers(1, 60))
    @while_connected
    def leave_in_the_middle(self, bad: Bad, cut: int) -> None:
        """Cut anywhere, with descriptors on the first byte."""
        assert self.client is not None
        with opened(bad.fds) as fds:
            self.client.send(bad.bytes()[:cut], fds)
        self.leave()

    @rule()
    def leave(self) -> None:
        """Drop the connection, whatever is under way."""
        if self.client is not None:
            self.client.close()
        if self.remote is not None:
            self.remote.close()
        if self.memory is not None:
            self.memory.close()
        self.client = self.remote = self.memory = self.driver = None

    @rule(index=st.integers(0, 2), size=st.sampled_from((1, 16, 17, 512, 4096)))
    @while_connected
    def work(self, index: int, size: int) -> None:
        """Offer a chain and notify; what becomes of it depends on what was done to the device before."""
        if self.driver is None or self.memory is None:
            return
        if index < len(self.driver.queues) and self.driver.ram.mark() < self.memory.regions[0].end - 0x8000:
            ring = self.driver.queues[index]
            if ring.free >= 2:
                ring.submit([bytes(size)], [size])
                ring.notify()

    @rule(away=st.booleans())
    @while_connected
    def move_memory(self, away: bool) -> None:
        """Take the guest's memory away, or bring it back."""
        if self.client is None or self.memory is None:
            return
        region = self.memory.regions[0]
        try:
            if away:
                self.client.dma_unmap(region.start, region.size)
            else:
                self.client.dma_map(region.start, region.size, region.fd)
        except Refused:
            pass  # it is so already, or another map is in the way

    @rule(access=pci_accesses())
    @while_connected
    def touch_a_register(self, access: Access) -> None:
        """Any load or store in BAR 0, rings wherever the guest likes."""
        if self.remote is None:
            return
        if access.value is None:
            self.remote.read(BASE + access.offset, access.size)
        else:
            self.remote.write(BASE + access.offset, access.size, access.value)

    @rule(access=config_accesses())
    @while_connected
    def touch_configuration_space(self, access: Access) -> None:
        """BARs, Command, MSI-X, the window into the BAR."""
        if self.remote is None:
            return
        if access.value is None:
            self.remote.device.read(access.offset, access.size)
        else:
            self.remote.device.write(access.offset, access.value, access.size)

    @rule(master=st.booleans())
    @while_connected
    def switch_bus_mastering(self, master: bool) -> None:
        """In the middle of whatever is under way."""
        if self.remote is None:
            return
        self.remote.device.write(pci.COMMAND, pci.COMMAND_MEMORY | master * pci.COMMAND_BUS_MASTER, 2)

    @rule()
    @while_connected
    def reset(self) -> None:
        """A device reset, perhaps as the first message."""
        assert self.client is not None
        try:
            self.client.reset()
        except Refused:
            assert self.clean is False

    @invariant()
    def the_process_lives(self) -> None:
        """Whatever was sent."""
        assert self.serving.process.poll() is None, self.serving.log[-3000:]

    def teardown(self) -> None:
        """Everybody has gone: nothing is left, and the next guest has a working device."""
        self.leave()
        self.serving.settle()
        with Guest(self.serving, self.name, posted=False) as guest:
            if self.name in VIRTIO:
                driver = guest.driver()
                driver.start()
                ring = driver.queues[1 if len(driver.queues) > 1 else 0]
                request = ring.submit([bytes(72)], [] if len(driver.queues) > 1 else [32])
                assert guest.reap(ring) == [request]
        self.serving.check_alive()
        self.serving.settle()


HostileClient.TestCase.settings = settings(
    max_examples=50, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHostileClient = HostileClient.TestCase
