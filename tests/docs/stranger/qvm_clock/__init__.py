"""vdev 'stranger-clock': the time of the host, asked for by requests as those of a virtio clock.

Request: le16 command, le16 clock. Answer: u8 status, 7 bytes of zeros, le64 value.
"""

import struct
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated

from msgspec import Meta, Struct

from qvmcore.api import Chain, Vdev, VirtioVdev, Virtqueue, hookimpl

REQUEST, ANSWER = struct.Struct("<HH"), struct.Struct("<B7xQ")
READ, COUNT = 1, 0x1000
OK, UNKNOWN_COMMAND, NO_CLOCK, MALFORMED = 0, 2, 3, 4
CLOCKS: tuple[Callable[[], int], ...] = (time.time_ns, time.monotonic_ns)


class ClockOptions(Struct, frozen=True, forbid_unknown_fields=True):
    offset: Annotated[int, Meta(ge=0, le=10**9, description="seconds the guest is ahead")] = 0


class Clock(VirtioVdev):
    vdev_type = "stranger-clock"
    summary = "the time of the host"
    Options = ClockOptions
    device_id = 17
    queue_sizes = (16,)
    served = 0

    def handle_queue(self, index: int, queue: Virtqueue) -> None:
        for chain in queue:
            chain.write(ANSWER.pack(*self._answer(chain)))
            self.served += 1
            queue.push(chain)

    def _answer(self, chain: Chain) -> tuple[int, int]:
        if chain.readable != REQUEST.size:
            return MALFORMED, 0
        command, clock = REQUEST.unpack(chain.read(REQUEST.size))
        if command == COUNT:
            return OK, len(CLOCKS)
        if command != READ:
            return UNKNOWN_COMMAND, 0
        if clock >= len(CLOCKS):
            return NO_CLOCK, 0
        return OK, CLOCKS[clock]() + self.options.offset * 10**9

    def status(self) -> Mapping[str, object]:
        return {**super().status(), "served": self.served}


@hookimpl
def qvm_vdev_types() -> Iterable[type[Vdev]]:
    return [Clock]
