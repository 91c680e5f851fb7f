"""A device that is killed after any store: every chain comes back once, and is served again in order."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from qvm_vhost_user.inflight import QueueInflight, region_size

from qvmcore.memory import GuestMemory
from qvmcore.testing.packed_ring import PackedDriver
from qvmcore.testing.ring import GuestRam, Request, RingDriver, SplitDriver
from qvmcore.types import MemorySpec
from qvmcore.virtio import spec
from qvmcore.virtio.chain import Chain
from qvmcore.virtio.queue import Virtqueue
from qvmcore.virtio.queue_setup import QueueSetup

INDIRECT, EVENT_IDX = 1 << spec.VIRTIO_F_INDIRECT_DESC, 1 << spec.VIRTIO_F_EVENT_IDX
PACKED = 1 << spec.VIRTIO_F_RING_PACKED


class Killed(BaseException):
    """SIGKILL: nothing after this store happens."""


class Fuse:
    """Counts stores, and ends the device instead of one of them."""

    def __init__(self) -> None:
        self.left: deque[int] = deque()  # stores until the kill, for each life
        self.stores = 0

    def burn(self) -> None:
        if self.left and not self.left[0]:
            self.left.popleft()
            raise Killed
        if self.left:
            self.left[0] -= 1
        self.stores += 1


class Cells:
    """Cells of shared memory behind a fuse."""

    def __init__(self, cells: Any, fuse: Fuse) -> None:
        self._cells = cells
        self._fuse = fuse

    def __len__(self) -> int:
        return len(self._cells)

    def __getitem__(self, index: Any) -> Any:
        return self._cells[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        try:
            self._fuse.burn()
        except Killed:
            if isinstance(index, slice):
                # A copy is not one store: it may stop anywhere.
                half = len(value) // 2
                self._cells[:half] = value[:half]
            raise
        self._cells[index] = value

    def tobytes(self) -> bytes:
        return bytes(self._cells)


def fuse_cells(thing: Any, names: tuple[str, ...], fuse: Fuse) -> None:
    for name in names:
        setattr(thing, name, Cells(getattr(thing, name), fuse))


class Crashes(RuleBasedStateMachine):
    """A driver, its memory, and one device after another.

    The model: what the driver offered and did not get back yet, in order. That is what a new device has
    to be given, first to last, whatever the one before it was doing.
    """

    packed: bool

    @initialize(
        size=st.sampled_from((1, 2, 4, 8)),
        odd=st.integers(0, 1),
        features=st.sampled_from((0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX)),
        laps=st.integers(0, 20),
        eager=st.booleans(),
        first=st.lists(st.integers(0, 12), max_size=2),
    )
    def begin(self, size: int, odd: int, features: int, laps: int, eager: bool, first: list[int]) -> None:
        self.size = size + odd if self.packed else size
        self.features = features | (PACKED if self.packed else 0)
        self.memory = GuestMemory.allocate([MemorySpec(0x8000_0000, 1 << 20)])
        kind: Callable[..., RingDriver] = PackedDriver if self.packed else SplitDriver
        self.driver = kind(GuestRam(self.memory), self.size, self.features)
        self.area = memoryview(bytearray(region_size(self.size, packed=self.packed)))
        self.fuse = Fuse()
        self.serial = 0
        self.offered: list[tuple[Request, bytes]] = []  # and not given back
        self.batch: list[Request] = []
        self.fuse.left.extend(first)
        self.lives = 0
        self.eager = False
        self.waiting: deque[tuple[Request, bytes]] = deque()
        self.restart()
        self.eager = eager
        for _ in range(laps):
            self.offer(1, False)
            self.pop()
            self.push([0])
            self.reap()

    def restart(self) -> None:
        """The process is killed; its client gives the rings and the memory to the next one."""
        self.reap()
        if self.eager:
            # The driver goes on while there is no device, and offers over what it got back.
            while self.offer(2, False):
                pass
        setup = QueueSetup(self.size)
        while True:
            setup.desc, setup.driver, setup.device = self.driver.desc, self.driver.avail, self.driver.used
            setup.enable(self.memory, self.features)
            account: Any = QueueInflight(self.area, packed=self.packed, size=self.size)
            names = ("_bytes", "_halves", "_words", "_quads")[: 4 if self.packed else 3]
            fuse_cells(account.take.__self__, names, self.fuse)
            if self.packed:
                fuse_cells(setup._rings, ("flags",), self.fuse)
            # The client does not know where we were.
            calls = (lambda: None, self.broken, lambda: None)
            try:
                queue = setup.make(0, self.memory, self.features, *calls, position=0, inflight=account)
            except Killed:
                self.lives += 1
                continue
            break
        self.lives += 1
        ring = queue._ring  # type: ignore[attr-defined]
        names = ("_used_cells", "_device_event") if self.packed else ("_used", "_elements")
        fuse_cells(ring, names, self.fuse)
        self.queue: Virtqueue = queue
        self.held: list[tuple[Chain, Request, bytes]] = []
        self.row: list[tuple[Chain, Request, bytes]] = []  # those popped last, as far as they may be unpopped
        self.waiting = deque(self.offered)
        self.batch = []

    def broken(self, error: BaseException) -> None:
        raise AssertionError("the ring was refused") from error

    def reap(self) -> None:
        back = self.driver.reap()
        # All of a batch or none of it.
        assert sum(request in self.batch for request in back) in (0, len(self.batch))
        for request in back:
            (data,) = [data for each, data in self.offered if each is request]
            # It was served, and not only given back: by its own device, under its own name.
            assert request.result()[: len(data)] == data
            assert request.length == len(data)
            self.offered = [pair for pair in self.offered if pair[0] is not request]
        self.batch = []

    @rule(pieces=st.integers(1, 3), indirect=st.booleans())
    def offers(self, pieces: int, indirect: bool) -> None:
        self.offer(pieces, indirect)

    def offer(self, pieces: int, indirect: bool) -> bool:
        self.driver.indirect = indirect and bool(self.features & INDIRECT)
        pieces = min(pieces, self.size - 1)
        self.serial += 1
        data = self.serial.to_bytes(4, "little")
        try:
            # A chain of one descriptor has no room for both.
            if self.size == 1:
                request = self.driver.add([], [4])
            else:
                request = self.driver.add([data] + [b"."] * (pieces - 1), [4])
        except MemoryError:
            return False
        self.driver.kick()
        self.offered.append((request, data))
        self.waiting.append((request, data))
        return True

    @rule()
    def pop(self) -> None:
        try:
            chain = self.queue.pop()
            if not self.waiting:
                assert chain is None
                return
            assert chain is not None
            request, data = self.waiting.popleft()
            assert chain.head == request.head
            if request.readable:
                assert chain.read(4) == data
            self.held.append((chain, request, data))
            self.row.append(self.held[-1])
            assert self.queue.in_hand == len(self.held)
            self.queue.notify()
        except Killed:
            self.restart()

    @rule()
    def unpop(self) -> None:
        if not self.waiting:
            return
        try:
            chain = self.queue.pop()
            assert chain is not None
            self.queue.unpop(chain)
            self.row.clear()
        except Killed:
            self.restart()

    @rule(count=st.integers(0, 4))
    def unpop_all(self, count: int) -> None:
        items = self.row[len(self.row) - count :] if count <= len(self.row) else []
        if not items:
            return
        self.row.clear()
        self.held = [item for item in self.held if item not in items]
        self.waiting.extendleft((request, data) for _, request, data in reversed(items))
        try:
            self.queue.unpop_all([chain for chain, _, _ in items])
        except Killed:
            self.restart()

    @rule(picks=st.lists(st.integers(0, 20), min_size=1, max_size=4))
    def push(self, picks: list[int]) -> None:
        batch = [self.held.pop(pick % len(self.held)) for pick in picks if self.held]
        for item in batch:
            item[0].write(item[2])
            if item in self.row:
                del self.row[: self.row.index(item) + 1]
        try:
            if len(batch) == 1:
                self.queue.push(batch[0][0])
            elif batch:
                self.batch = [request for _, request, _ in batch]
                self.queue.push_together([(chain, 4) for chain, _, _ in batch])
            self.queue.notify()
        except Killed:
            self.restart()

    @rule(stores=st.lists(st.integers(0, 30), min_size=1, max_size=3))
    def arm(self, stores: list[int]) -> None:
        """The device is killed after so many stores, and those after it, too."""
        self.fuse.left.extend(stores)

    @rule()
    def kill(self) -> None:
        self.restart()

    @rule()
    def driver_reaps(self) -> None:
        self.reap()

    def teardown(self) -> None:
        if not hasattr(self, "driver"):
            return
        self.fuse.left.clear()
        while self.waiting:
            self.pop()
        while self.held:
            self.push([0])
        self.reap()
        assert not self.offered
        assert self.queue.in_hand == 0
        self.queue.notify()
        assert not self.queue.pending
        self.memory.close()


class SplitCrashes(Crashes):
    packed = False


class PackedCrashes(Crashes):
    packed = True


for machine in (SplitCrashes, PackedCrashes):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestSplitCrashes = SplitCrashes.TestCase
TestPackedCrashes = PackedCrashes.TestCase


def life(packed: bool, size: int, features: int, seed: int, kills: list[int]) -> tuple[Crashes, int]:
    """One driver that does what the seed says, with a device that is killed after so many stores each time.

    Everything comes back in the end; also says how many stores the device made when nothing is to end it.
    """
    machine = (PackedCrashes if packed else SplitCrashes)()
    machine.begin(size, 0, features, seed % 7, seed % 2 == 1, kills)
    dice = random.Random(seed)
    for _ in range(24):
        match dice.randrange(9):
            case 0 | 1 | 2:
                machine.offer(dice.randint(1, 3), dice.random() < 0.3)
            case 3 | 4:
                machine.pop()
            case 5:
                machine.unpop()
            case 6:
                machine.unpop_all(dice.randint(1, 3))
            case _:
                machine.push([dice.randrange(20) for _ in range(dice.randint(1, 4))])
        if dice.random() < 0.2:
            machine.driver_reaps()
    stores = machine.fuse.stores
    machine.teardown()
    return machine, stores


@pytest.mark.parametrize("features", [0, INDIRECT])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_killed_at_every_store(packed: bool, size: int, features: int) -> None:
    for seed in range(12):
        _, stores = life(packed, size, features, seed, [])
        assert stores > 10
        for kill in range(stores):
            machine, _ = life(packed, size, features, seed, [kill])
            assert machine.lives == 2, "the device was not killed"


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_killed_again_at_every_store_of_the_recovery(packed: bool) -> None:
    for seed in (1, 4, 9):
        twice = 0
        _, stores = life(packed, 4, INDIRECT, seed, [])
        for kill in range(stores):
            for again in range(8):
                machine, _ = life(packed, 4, INDIRECT, seed, [kill, again])
                # Near the end there may be too little left to do for a second kill.
                assert machine.lives in (2, 3)
                twice += machine.lives == 3
        assert twice > 4 * stores


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_killed_again_and_again_later(packed: bool) -> None:
    for seed in range(8):
        _, stores = life(packed, 8, INDIRECT, seed, [])
        for kill in range(stores):
            machine, _ = life(packed, 8, INDIRECT, seed, [kill, kill * 7 % 43, kill * 5 % 31, kill * 3 % 29])
            assert machine.lives > 1
