"""A power cut of the host: what the guest was told is durable is there (5.2.6.2, stable writes)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qvm_virtio_blk import device as device_module
from qvm_virtio_blk import spec
from qvm_virtio_blk.backend import MemoryBackend
from qvm_virtio_blk.device import VirtioBlk
from qvm_virtio_blk.testing import FLUSH, OK, WRITE_ZEROES, Start, header, segment

from qvmcore.testing.fakes import plug

SECTORS = 16


class Cache(MemoryBackend):
    """A disk with a volatile cache: ``stable`` is what a power cut leaves of it."""

    def __init__(self) -> None:
        super().__init__(SECTORS * 512)
        self.stable = bytearray(self.size)

    def write(self, offset: int, length: int, views: Sequence[memoryview], *, durable: bool = False) -> None:
        super().write(offset, length, views)
        if durable:
            self.stable[offset : offset + length] = b"".join(views)

    def flush(self) -> None:
        self.stable[:] = bytes(self._view)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["write", "write", "zero", "flush", "through", "back"]), st.integers(0, SECTORS - 1)
    ),
    max_size=25,
)


@pytest.mark.parametrize("without", [0, spec.F_CONFIG_WCE, spec.F_FLUSH, spec.F_FLUSH | spec.F_CONFIG_WCE])
@given(steps=STEPS)
@settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
def test_5_2_6_2_stable_writes_survive_a_power_cut(
    start: Start, without: int, steps: list[tuple[str, int]]
) -> None:
    cache = Cache()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_module, "open_disk", lambda *_: cache)
        with plug(VirtioBlk, hostdev="fake") as device:
            guest = start(device, ~without)
            content = bytearray(cache.size)
            # The three conditions of 5.2.6.2: no way to flush, write-through all the time, or a flush.
            through = bool(without & spec.F_FLUSH)
            for number, (what, sector) in enumerate(steps):
                place = slice(sector * 512, sector * 512 + 512)
                if what == "write":
                    content[place] = bytes([number + 1]) * 512
                    assert guest.write(sector, bytes(content[place])) == OK
                elif what == "zero":
                    content[place] = bytes(512)
                    assert guest.ranges(WRITE_ZEROES, segment(sector, 1, number % 2)) == OK
                elif what == "flush":
                    assert guest.io([header(FLUSH)], [1])[0] == OK
                    assert cache.stable == content
                elif not without & spec.F_CONFIG_WCE:
                    through = what == "through"
                    guest.driver.write_config(32, 1, not through)
                if through and what in ("write", "zero"):
                    assert cache.stable[place] == content[place]
