"""A client that does whatever Hypothesis thinks of, in any order, to a real server."""

from __future__ import annotations

import os
import socket
import struct
from typing import ClassVar

import pytest
from hostile_kit import QUEUE_SIZE, QUEUES, Target
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from qvm_vhost_user.protocol import (
    ADDRESS,
    CONFIG,
    INFLIGHT,
    NEED_REPLY,
    NO_FD,
    SHAPES,
    STATE,
    TABLE,
    U64,
    VERSION,
    Request,
)
from qvm_vhost_user.testing import ALL_FEATURES, Client, Closed, Region
from qvm_vhost_user.testing_driver import USER

from qvmcore.testing.fakes import RAM

EXAMPLES = int(os.environ.get("QVM_HOSTILE_EXAMPLES", "60"))
STEPS = 30
GUEST = RAM[0].start
VERSION_1, PACKED, EVENT_IDX, INDIRECT = 1 << 32, 1 << 34, 1 << 29, 1 << 28

u32 = st.one_of(st.integers(0, 3), st.sampled_from((16, 128, 256, 0x8000, 0xFFFF, 0x10000, 0xFFFF_FFFF)))
u64 = st.one_of(
    st.integers(0, 3),
    st.sampled_from((1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1, (1 << 64) - 0x1000)),
    st.integers(0, RAM[0].size).map(lambda offset: GUEST + USER + offset),
    st.integers(0, RAM[0].size).map(lambda offset: GUEST + offset),
)
index = st.sampled_from((0, 0, 0, 0, 1, 1, 1, 1, 2, 0xFFFF_FFFF))
place = st.integers(0, 15).map(lambda page: GUEST + USER + page * 0x1000)


class HostileClient(RuleBasedStateMachine):
    """One connection after the other; answers are thrown away, so nothing waits for anything."""

    target: ClassVar[Target]

    @initialize(up=st.sampled_from(("nothing", "features", "memory", "split", "packed")))
    def begin(self, up: str) -> None:
        self.mark = len(self.target.serve.log)
        self.files: list[int] = [
            os.eventfd(0, os.EFD_NONBLOCK),
            os.eventfd(0),
            os.memfd_create("zero"),
            os.memfd_create("one"),
            os.open(os.devnull, os.O_RDWR),
            *os.pipe(),
            *(each.detach() for each in socket.socketpair()),
        ]
        os.ftruncate(self.files[3], 1 << 20)
        self.memory = self.target.memory
        self.client: Client | None = None
        self.come(up)

    # ---- comes and goes ----------------------------------------------------------------------------

    @rule(up=st.sampled_from(("nothing", "features", "memory", "split", "packed")))
    def come(self, up: str) -> None:
        """Connect anew, and perhaps get somewhere in good order first.

        Whether the server has closed the connection yet is a matter of time, so no rule depends on it.
        """
        self.go()
        self.up = up
        self.client = Client.connect(self.target.path(), 5.0)
        self.client.socket.setblocking(False)
        if up == "nothing":
            return
        self.say(Request.SET_OWNER)
        self.say(Request.SET_PROTOCOL_FEATURES, U64.pack(ALL_FEATURES))
        features = VERSION_1 | 1 << 30 | (PACKED if up == "packed" else 0)
        self.say(Request.SET_FEATURES, U64.pack(features))
        if up == "features":
            return
        region = self.target.region()
        self.say(Request.SET_MEM_TABLE, TABLE.pack(1, 0) + region.pack(), [region.fd])
        if up == "memory":
            return
        self.memory.write(GUEST, bytes(0x10000))
        for ring in range(QUEUES):
            self.start(ring, 0x8000_8000 if up == "packed" else 0, 128, GUEST + USER + ring * 0x4000)

    @rule()
    def go(self) -> None:
        """Close, when the server has come to the end of what was said."""
        if self.client is not None:
            try:
                self.client.socket.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the server went first
            self.client.socket.settimeout(10)
            assert self.client.closed(), "the server does not let the client go"
            self.client.close()
            self.client = None

    @rule()
    def vanish(self) -> None:
        """Close, whatever the server is at."""
        if self.client is not None:
            self.client.close()
            self.client = None

    # ---- messages --------------------------------------------------------------------------------

    @rule(ring=index, position=u32, size=u32, at=place)
    def start(self, ring: int, position: int, size: int, at: int) -> None:
        """A ring in good order, with numbers that may be bad."""
        self.say(Request.SET_VRING_NUM, STATE.pack(ring, size))
        self.say(Request.SET_VRING_BASE, STATE.pack(ring, position))
        self.say(Request.SET_VRING_ADDR, ADDRESS.pack(ring, 0, at, at + 0x2000, at + 0x1000, 0))
        self.say(Request.SET_VRING_CALL, U64.pack(ring), [self.files[0]])
        self.say(Request.SET_VRING_KICK, U64.pack(ring), [self.files[1]])
        self.say(Request.SET_VRING_ENABLE, STATE.pack(ring, 1))

    @rule(
        request=st.sampled_from((Request.SET_VRING_NUM, Request.SET_VRING_BASE, Request.SET_VRING_ENABLE)),
        ring=index,
        value=u32,
    )
    def set_a_ring(self, request: Request, ring: int, value: int) -> None:
        self.say(request, STATE.pack(ring, value))

    @rule(ring=index, places=st.tuples(u64, u64, u64), flags=st.sampled_from((0, 0, 1, 0xFFFF_FFFF)))
    def place_a_ring(self, ring: int, places: tuple[int, int, int], flags: int) -> None:
        self.say(Request.SET_VRING_ADDR, ADDRESS.pack(ring, flags, *places, 0))

    @rule(
        request=st.sampled_from((Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR)),
        ring=index,
        file=st.integers(0, 8),
        number=st.sampled_from((1, 1, 1, 1, 0, 2)),
        lie=st.booleans(),
    )
    def give_a_descriptor(self, request: Request, ring: int, file: int, number: int, lie: bool) -> None:
        none = NO_FD if (number == 0) != lie else 0
        self.say(request, U64.pack(ring | none), [self.files[file]] * number)

    @rule(ring=index)
    def stop_a_ring(self, ring: int) -> None:
        self.say(Request.GET_VRING_BASE, STATE.pack(ring, 0))

    @rule(request=st.sampled_from((Request.RESET_DEVICE, Request.RESET_OWNER, Request.SET_OWNER)))
    def reset(self, request: Request) -> None:
        self.say(request)

    @rule(status=st.one_of(st.sampled_from((0, 1, 3, 11, 15)), st.integers(0, 256)))
    def set_status(self, status: int) -> None:
        self.say(Request.SET_STATUS, U64.pack(status))

    @rule(
        features=st.one_of(
            st.sampled_from((VERSION_1, VERSION_1 | PACKED, VERSION_1 | EVENT_IDX | INDIRECT)), u64
        )
    )
    def set_features(self, features: int) -> None:
        self.say(Request.SET_FEATURES, U64.pack(features | 1 << 30))

    @rule(features=st.sampled_from((ALL_FEATURES, ALL_FEATURES, 0, 1 << 3, 1 << 12, 1 << 1)))
    def set_protocol_features(self, features: int) -> None:
        self.say(Request.SET_PROTOCOL_FEATURES, U64.pack(features))

    @rule(
        rows=st.lists(st.tuples(u64, u64, u64, u64, st.integers(0, 8)), max_size=9),
        number=st.one_of(st.none(), u32),
        slot=st.sampled_from((None, Request.ADD_MEM_REG, Request.REM_MEM_REG)),
    )
    def give_memory(
        self, rows: list[tuple[int, int, int, int, int]], number: int | None, slot: Request | None
    ) -> None:
        """Any table, any file."""
        regions = [Region(*row[:3], self.files[row[4]], row[3]) for row in rows]
        if slot is None:
            table = TABLE.pack(len(rows) if number is None else number, 0)
            packed = b"".join(region.pack() for region in regions)
            self.say(Request.SET_MEM_TABLE, table + packed, [region.fd for region in regions])
        for region in regions if slot is not None else ():
            self.say(slot or 0, U64.pack(0) + region.pack(), [region.fd])

    @rule(offset=st.sampled_from((0, 0x1000, 1 << 20, 3)), size=st.sampled_from((1 << 20, 1 << 22, 0x5000)))
    def exchange_memory(self, offset: int, size: int) -> None:
        """A table that can be, and holds other rings, or none."""
        region = self.target.region()._replace(size=size, offset=offset)
        self.say(Request.SET_MEM_TABLE, TABLE.pack(1, 0) + region.pack(), [region.fd])

    @rule(
        request=st.sampled_from((Request.GET_CONFIG, Request.SET_CONFIG)),
        offset=u32,
        size=u32,
        data=st.binary(max_size=260),
    )
    def configure(self, request: Request, offset: int, size: int, data: bytes) -> None:
        self.say(request, CONFIG.pack(offset, size, 0) + data)

    @rule(
        size=u64, offset=u64, queues=st.integers(0, 3), file=st.integers(0, 8), data=st.binary(max_size=200)
    )
    def give_an_in_flight_buffer(self, size: int, offset: int, queues: int, file: int, data: bytes) -> None:
        os.pwrite(self.files[3], data, 0)
        described = INFLIGHT.pack(min(size, 1 << 64), offset, queues, QUEUE_SIZE)
        self.say(Request.SET_INFLIGHT_FD, described, [self.files[file]])

    @rule(data=st.binary(max_size=0x1000), packed=st.booleans())
    def give_a_good_in_flight_buffer_full_of_anything(self, data: bytes, packed: bool) -> None:
        head = struct.pack("<QHHHH", 0, 1, QUEUE_SIZE, 0, 0)
        os.pwrite(self.files[3], head + data, 0)
        described = INFLIGHT.pack(0x8000, 0, QUEUES, QUEUE_SIZE)
        self.say(Request.SET_INFLIGHT_FD, described, [self.files[3]])

    @rule(file=st.integers(0, 8))
    def give_a_channel(self, file: int) -> None:
        self.say(Request.SET_BACKEND_REQ_FD, b"", [self.files[file]])

    @rule(
        request=st.one_of(st.sampled_from(list(Request)), u32),
        flags=st.one_of(st.just(VERSION), st.just(VERSION | NEED_REPLY), u32),
        payload=st.binary(max_size=300),
        size=st.one_of(st.none(), u32),
        number=st.sampled_from((0, 0, 0, 0, 0, 1, 1, 2, 8, 9, 100)),
    )
    def say_anything(self, request: int, flags: int, payload: bytes, size: int | None, number: int) -> None:
        self._send(request, payload, [self.files[0]] * number, flags, size)

    @rule(request=st.sampled_from(sorted(SHAPES)), data=st.data(), number=st.integers(0, 2))
    def say_what_has_the_right_shape(self, request: Request, data: st.DataObject, number: int) -> None:
        shape = SHAPES[request]
        payload = data.draw(st.binary(min_size=shape.least, max_size=shape.least))
        self.say(request, payload, [self.files[3]] * number)

    # ---- rings -------------------------------------------------------------------------------------

    @rule(at=st.integers(0, 15), data=st.binary(min_size=1, max_size=64), packed=st.booleans())
    def scribble(self, at: int, data: bytes, packed: bool) -> None:
        """Into the rings: the worker reads it while we write."""
        self.memory.write(GUEST + at * 0x1000, data)

    @rule(
        address=u64,
        length=u32,
        flags=st.sampled_from((0, 1, 2, 3, 4, 0x80, 0x82, 0x8080)),
        following=st.integers(0, 0xFFFF),
        ahead=st.integers(0, 200),
        ring=st.integers(0, 1),
    )
    def offer(self, address: int, length: int, flags: int, following: int, ahead: int, ring: int) -> None:
        """A descriptor of any kind, and an index that says it is there; then ring."""
        base = GUEST + ring * 0x4000
        self.memory.write(base, struct.pack("<QIHH", address, length, flags, following))
        self.memory.write(base + 0x1002, struct.pack("<H", ahead))
        os.eventfd_write(self.files[1], 1)

    # ---- what must hold ------------------------------------------------------------------------------

    def teardown(self) -> None:
        """After every run the server is as before."""
        if not hasattr(self, "files"):
            return
        self.go()
        for fd in self.files:
            os.close(fd)
        try:
            self.target.survived(self.mark)
        finally:
            self.target.revive()

    # ---- inside ----------------------------------------------------------------------------------------

    def say(self, request: int, payload: bytes = b"", fds: list[int] | None = None) -> None:
        """To be acknowledged where that is in force."""
        self._send(request, payload, fds or [], VERSION | NEED_REPLY, None)

    def _send(self, request: int, payload: bytes, fds: list[int], flags: int, size: int | None) -> None:
        if self.client is None:
            # The next one, which has got as far as this one had when it came.
            self.come(self.up)
        if self.client is None:
            return
        try:
            self.client.send(request, payload, fds, flags=flags, size=size)
            while answer := socket.recv_fds(self.client.socket, 4096, 8):
                for fd in answer[1]:
                    os.close(fd)
                if not answer[0]:
                    raise Closed
        except BlockingIOError:
            pass
        except (Closed, ConnectionError):
            self.client.close()
            self.client = None


@pytest.mark.timeout(1200)
def test_a_client_that_does_anything(target: Target) -> None:
    """QVM_HOSTILE_EXAMPLES says for how long."""
    machine = type("OnThisServer", (HostileClient,), {"target": target})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
