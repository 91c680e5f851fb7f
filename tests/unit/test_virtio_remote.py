"""Queues started and stopped by messages, at positions, in memory that changes (RemoteDriver)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from qvmcore.errors import GuestError, HostError
from qvmcore.memory import GuestMemory, MemoryRegion
from qvmcore.options import convert_options
from qvmcore.testing.fakes import FakeContext
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, RingDriver, SplitDriver
from qvmcore.testing.samples import Echo
from qvmcore.virtio import life, spec

BASE, SIZE = 0x4000_0000, 1 << 20
VERSION_1 = 1 << spec.VIRTIO_F_VERSION_1
PACKED = 1 << spec.VIRTIO_F_RING_PACKED


class Calls:
    """A transport that counts."""

    def __init__(self) -> None:
        self.queues: list[int] = []
        self.configs = 0

    def interrupt_queue(self, index: int) -> None:
        self.queues.append(index)

    def interrupt_config(self) -> None:
        self.configs += 1

    def reset(self) -> None: ...


class Remote:
    """An Echo, the memory of its client, and rings in it."""

    kind: type[Echo] = Echo

    def __init__(self, features: int) -> None:
        self.features = features
        self.fd = os.memfd_create("client")
        os.ftruncate(self.fd, SIZE)
        self.memory = GuestMemory([self.region()])
        self.guest = GuestMemory([self.region()])  # that of the driver, which nobody takes away
        self.ctx = FakeContext("echo", self.memory, 1)
        self.ctx.threads_allowed = True
        options, _ = convert_options(self.kind.Options, {}, Path())
        self.vdev = self.kind(self.ctx, options)
        self.vdev.on_configured()
        self.calls = Calls()
        self.state = self.vdev.virtio
        self.state.attach(self.calls, fast_doorbells=True, withheld=1 << spec.VIRTIO_F_RING_RESET)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        ring = PackedDriver if features & PACKED else SplitDriver
        self.ring: RingDriver = ring(GuestRam(self.guest), 16, features, self.ring_the_bell)

    def region(self) -> MemoryRegion:
        return MemoryRegion.adopt(BASE, SIZE, os.dup(self.fd))

    def ring_the_bell(self) -> None:
        os.eventfd_write(self.kick, 1)

    def start(self, position: int | None = None) -> None:
        ring = self.ring
        self.state.start_queue(
            0, ring.size, ring.desc, ring.avail, ring.used, position=position, kick=self.kick
        )

    def roundtrip(self, text: bytes = b"ping") -> None:
        request = self.ring.submit([text], [8])
        until(lambda: request in self.ring.reap())
        assert request.result()[: len(text)] == text

    def close(self) -> None:
        self.vdev.gate.set()
        assert self.ctx.stop_worker()
        os.close(self.kick)
        os.close(self.fd)
        self.memory.close()
        self.guest.close()


def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("never happened")


@pytest.fixture(params=[VERSION_1, VERSION_1 | PACKED], ids=["split", "packed"])
def remote(request: pytest.FixtureRequest) -> Iterator[Remote]:
    each = Remote(request.param)
    each.state.negotiate(each.features)
    yield each
    each.close()


def test_the_first_queue_activates_and_is_served_by_the_clients_descriptor(remote: Remote) -> None:
    assert remote.vdev.lives == []
    remote.start()
    assert remote.vdev.lives == ["active"]
    remote.roundtrip()
    assert remote.calls.queues


@pytest.mark.parametrize("size", [2, 256, 1024])
def test_a_client_chooses_the_size_of_a_queue(remote: Remote, size: int) -> None:
    """It is not told what the device would offer, 64 here."""
    ram = GuestRam(remote.memory)
    remote.ring = type(remote.ring)(ram, size, remote.features, remote.ring_the_bell)
    remote.start()
    for number in range(2 * size + 1):
        remote.roundtrip(b"%d" % number)


def test_a_queue_larger_than_any_is_refused(remote: Remote) -> None:
    ring = remote.ring
    with pytest.raises(GuestError, match="queue 0: size 2048 is not"):
        remote.state.start_queue(0, 2048, ring.desc, ring.avail, ring.used)


def test_a_stopped_queue_goes_on_where_it_was(remote: Remote) -> None:
    remote.start()
    for number in range(21):
        remote.roundtrip(b"%d" % number)
    position = remote.state.stop_queue(0, 1)
    request = remote.ring.submit([b"late"], [8])
    time.sleep(0.05)
    assert not remote.ring.reap()
    remote.start(position)
    until(lambda: request in remote.ring.reap())
    remote.roundtrip()
    assert remote.vdev.lives == ["active", "queue 0 reset"]


def test_a_stopped_queue_has_given_back_what_it_had_in_hand(remote: Remote) -> None:
    remote.start()
    remote.vdev.gate.clear()
    request = remote.ring.submit([b"slow"], [8])
    assert remote.vdev.entered.wait(5)
    threading.Timer(0.05, remote.vdev.gate.set).start()
    remote.state.stop_queue(0, 5)
    assert request in remote.ring.reap()


def test_a_queue_that_does_not_run_has_no_position(remote: Remote) -> None:
    assert remote.state.stop_queue(0, 1) is None
    assert remote.state.stop_queue(99, 1) is None


def test_a_hung_worker_loses_the_device_and_says_so(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(life, "QUIESCE_TIMEOUT", 0.05)
    remote.start()
    remote.vdev.gate.clear()
    remote.ring.submit([b"slow"], [8])
    assert remote.vdev.entered.wait(5)
    with pytest.raises(HostError, match="the worker still runs"):
        remote.state.stop_queue(0, 0.05)
    assert remote.state.status & spec.DEVICE_NEEDS_RESET
    assert remote.ctx.faults
    with pytest.raises(GuestError, match="the device hangs"):
        remote.state.negotiate(VERSION_1 | 1)


def test_the_same_features_again_keep_the_device_as_it_is(remote: Remote) -> None:
    remote.start()
    remote.state.write_config(8, 1, 7)
    position = remote.state.stop_queue(0, 1)
    remote.state.negotiate(remote.features)
    remote.start(position)
    assert remote.state.config.read(8, 1) == 7
    remote.roundtrip()


def test_other_features_reset_it(remote: Remote) -> None:
    remote.start()
    remote.state.write_config(8, 1, 7)
    remote.state.stop_queue(0, 1)
    remote.state.negotiate(VERSION_1 | 1)
    assert remote.vdev.lives[-1] == "inactive"
    assert remote.state.config.read(8, 1) == 0


@pytest.mark.parametrize(
    ("features", "reason"),
    [
        (VERSION_1 | 1 << 50, "were not offered"),
        (1, "VIRTIO_F_VERSION_1 was not accepted"),
        (VERSION_1 | 1 << spec.VIRTIO_F_RING_RESET, "were not offered"),
    ],
)
def test_impossible_features_are_refused_with_the_reason(remote: Remote, features: int, reason: str) -> None:
    with pytest.raises(GuestError, match=reason):
        remote.state.negotiate(features)
    with pytest.raises(GuestError, match="no features were negotiated"):
        remote.start()


def test_a_queue_outside_of_memory_is_refused_and_may_be_tried_again(remote: Remote) -> None:
    good = remote.ring.desc
    remote.ring.desc = BASE + SIZE
    with pytest.raises(GuestError, match="queue 0"):
        remote.start()
    remote.ring.desc = good
    remote.start()
    remote.roundtrip()
    with pytest.raises(GuestError, match="it runs already"):
        remote.start()
    with pytest.raises(GuestError, match="it has no such queue"):
        remote.state.start_queue(7, 16, good, good, good)


def test_memory_changes_under_a_running_queue(remote: Remote) -> None:
    remote.start()
    stop = threading.Event()
    changes = 0

    def change() -> None:
        nonlocal changes
        while not stop.is_set():
            (old,), fresh = remote.memory.regions, remote.region()
            remote.state.remap(partial(remote.memory.replace, [fresh]))
            old.close()
            changes += 1
            time.sleep(0.0005)  # without a GIL the worker would never find its memory in place

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for number in range(300):
            remote.roundtrip(b"%d" % number)
    finally:
        stop.set()
        thread.join()
    assert changes > 2
    remote.roundtrip()


def test_memory_without_the_rings_needs_a_reset(remote: Remote) -> None:
    remote.start()
    old = remote.memory.regions
    remote.state.remap(lambda: remote.memory.replace([]))
    assert remote.state.status & spec.DEVICE_NEEDS_RESET
    remote.memory.replace(old)
    remote.state.reset()
    remote.state.negotiate(remote.features)


def test_memory_that_goes_in_parts_is_waited_for(remote: Remote) -> None:
    """QEMU takes all RAM away and gives it back in pieces, while queues run."""
    remote.start()
    remote.roundtrip()
    regions = remote.memory.regions
    remote.state.remap(partial(remote.memory.replace, []), in_parts=True)
    assert remote.state.status & spec.DRIVER_OK and not remote.state.status & spec.DEVICE_NEEDS_RESET
    assert remote.state.queue(0) is None
    os.eventfd_write(remote.kick, 1)
    # The bus has its own reasons; it does not give back what is not there.
    remote.state.hold(True)
    remote.state.hold(False)
    remote.ctx.settle(5)
    assert remote.state.queue(0) is None
    remote.state.remap(partial(remote.memory.replace, regions), in_parts=True)
    assert remote.state.queue(0) is not None
    remote.roundtrip()


def test_a_notification_while_memory_is_away_is_not_lost(remote: Remote) -> None:
    remote.start()
    regions = remote.memory.regions
    remote.state.hold(True)
    request = remote.ring.submit([b"ping"], [8])
    remote.state.remap(partial(remote.memory.replace, []), in_parts=True)
    remote.state.hold(False)
    remote.ctx.settle(5)
    remote.state.remap(partial(remote.memory.replace, regions), in_parts=True)
    until(lambda: request in remote.ring.reap())


def test_memory_that_comes_back_while_the_bus_holds_the_device_is_not_used(remote: Remote) -> None:
    remote.start()
    regions = remote.memory.regions
    remote.state.remap(partial(remote.memory.replace, []), in_parts=True)
    remote.state.hold(True)
    remote.state.remap(partial(remote.memory.replace, regions), in_parts=True)
    assert remote.state.queue(0) is None
    remote.state.hold(False)
    assert remote.state.queue(0) is not None
    remote.roundtrip()


def test_a_reset_ends_the_wait_for_memory(remote: Remote) -> None:
    remote.start()
    regions = remote.memory.regions
    remote.state.remap(partial(remote.memory.replace, []), in_parts=True)
    remote.state.reset()
    remote.memory.replace(regions)
    remote.state.negotiate(remote.features)
    remote.start()
    remote.roundtrip()


def test_memory_changed_with_a_chain_in_hand_for_too_long_needs_a_reset(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chain is held by somebody else than the worker."""
    monkeypatch.setattr(life, "QUIESCE_TIMEOUT", 0.05)
    held = []
    monkeypatch.setattr(remote.vdev, "handle_queue", lambda index, queue: held.append(queue.pop()))
    remote.start()
    remote.ring.submit([b"kept"], [8])
    until(lambda: any(held))
    changed = []
    remote.state.remap(lambda: changed.append(True))
    assert changed
    assert remote.state.status & spec.DEVICE_NEEDS_RESET


def test_nothing_is_read_from_the_clients_descriptor_and_the_worker_rests(remote: Remote) -> None:
    remote.start()
    for number in range(5):
        remote.roundtrip(b"%d" % number)
    assert os.eventfd_read(remote.kick) >= 5
    remote.ring_the_bell()
    remote.ctx.settle(5)
    calls = []
    original = remote.vdev.handle_queue
    remote.vdev.handle_queue = lambda *each: (calls.append(each), original(*each))[1]  # type: ignore[method-assign]
    time.sleep(0.05)
    assert not calls
