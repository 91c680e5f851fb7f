"""What a hostile guest may do to shared memory: nothing beyond its own windows."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from qvm_shmem import spec
from qvm_shmem.device import Shmem
from shmem_guest import Guest

from qvmcore.testing.fakes import plug

#: Around the registers, the edges of regions and of the aperture.
NEAR_EDGES = st.builds(
    lambda page, near: max(0, page * spec.PAGE + near),
    st.sampled_from([0, 1, 2, 3, 4, 5, 4096]),
    st.integers(-9, 20),
)
VALUES = st.one_of(st.sampled_from([0, 1, 2, 3, 0xFFFF, 0xFFFFFFFF]), st.integers(0, (1 << 64) - 1))
ACCESSES = st.lists(
    st.tuples(
        st.sampled_from([0, 1]),
        st.one_of(st.integers(0, 0x50), NEAR_EDGES),
        st.sampled_from([1, 2, 4, 8]),
        st.one_of(st.none(), VALUES),
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(ACCESSES)
def test_any_accesses_leave_a_working_device(accesses: list[tuple[int, int, int, int | None]]) -> None:
    with tempfile.TemporaryDirectory() as folder, plug(Shmem, {"directory": folder}) as device:
        guest = Guest(device)
        guest.attach(b"a", 2)
        for window, offset, size, value in accesses:
            address = (device.ctx.address(window) or 0) + offset
            if value is None:
                assert 0 <= guest.load(address, size) < 1 << 8 * size
            else:
                guest.store(address, value & ((1 << 8 * size) - 1), size)
        device.settle()
        assert not device.ctx.faults
        device.vdev.on_reset()
        assert sorted(path.name for path in Path(folder).iterdir()) == [".lock"]
        control = guest.attach(b"again")
        guest.store(control + spec.PAGE, 5)
        assert guest.load(control + spec.PAGE) == 5


def test_accesses_across_every_edge(tmp_path: Path) -> None:
    with plug(Shmem, {"directory": str(tmp_path)}) as device:
        guest = Guest(device)
        first, second = guest.attach(b"a"), guest.attach(b"b")
        for edge in (first, first + spec.PAGE, second, second + spec.PAGE, second + 2 * spec.PAGE):
            for offset in range(-8, 9):
                for size in (2, 4, 8):
                    guest.store(edge + offset, (1 << 8 * size) - 1, size)
                    guest.load(edge + offset, size)
        assert not device.ctx.faults
        assert guest.load(first + spec.CONTROL_IDX) == 0, "a control page is no memory"
