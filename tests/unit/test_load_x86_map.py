"""The memory map, and finding room: for any RAM and anything taken. The real kernel of Debian."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qvmcore.acpi import AcpiTables
from qvmcore.errors import QvmError
from qvmcore.load.room import Room
from qvmcore.load.x86 import load_pc
from qvmcore.load.x86_boot import memory_map
from qvmcore.memory import GuestMemory
from qvmcore.types import LoadSpec, MemorySpec
from tests.unit.x86_files import MIB, bzimage, elf32, elf64, elf_note

PAGE = 4096


def build(runs: list[tuple[int, int, bool]]) -> list[MemorySpec]:
    """Regions from (gap, pages, rom), in address order and apart or touching."""
    at, specs = 0, []
    for gap, pages, rom in runs:
        at += gap * PAGE
        specs.append(MemorySpec(at, pages * PAGE, rom))
        at += pages * PAGE
    return specs


REGIONS = st.lists(
    st.tuples(st.integers(0, 300), st.integers(1, 300), st.booleans()), min_size=1, max_size=5
).map(build)
RANGES = st.lists(
    st.tuples(st.integers(0, 3 * MIB), st.integers(0, 3 * MIB) | st.integers(0, 64 << 10)), max_size=8
)


@settings(max_examples=200, deadline=None)
@given(REGIONS, RANGES)
def test_the_map_covers_memory_exactly_and_nothing_twice(
    specs: list[MemorySpec], reserved: list[tuple[int, int]]
) -> None:
    memory = GuestMemory.allocate(specs)
    entries = memory_map(memory, reserved)
    memory.close()
    pages: dict[int, int] = {}
    for before, entry in itertools.pairwise(entries):
        assert before.start + before.size <= entry.start
        assert before.start + before.size < entry.start or before.kind != entry.kind, "two that are one"
    for start, size, kind in entries:
        assert size > 0 and start % PAGE == size % PAGE == 0
        pages |= dict.fromkeys(range(start, start + size, PAGE), kind)
    expected = {}
    for spec in specs:
        for page in range(spec.start, spec.end, PAGE):
            hit = any(size and start < page + PAGE and page < start + size for start, size in reserved)
            expected[page] = 2 if spec.rom or hit or 0xA0000 <= page < MIB else 1
    assert pages == expected


def test_a_map_with_too_many_ranges_is_refused() -> None:
    memory = GuestMemory.allocate([MemorySpec(0, 2 * MIB)])
    holes = [(2 * index * PAGE, 1) for index in range(128)]
    assert len(memory_map(memory, holes[:60])) == 122
    with pytest.raises(QvmError, match=r"^the memory map has \d+ ranges; a guest takes at most 128$"):
        memory_map(memory, [(MIB + start, size) for start, size in holes] + holes)
    memory.close()


@settings(max_examples=200, deadline=None)
@given(
    REGIONS, RANGES, st.integers(1, 2 * MIB), st.integers(0, 2 * MIB), st.integers(0, 6 * MIB),
    st.sampled_from([1, PAGE, 2 * MIB])
)  # fmt: skip
def test_room_found_is_free_aligned_and_the_outermost(
    specs: list[MemorySpec],
    ranges: list[tuple[int, int]],
    size: int,
    first: int,
    below: int,
    step: int,
) -> None:
    memory = GuestMemory.allocate(specs)
    room = Room(memory)
    taken = []
    for index, (start, length) in enumerate(ranges):
        try:
            room.take(f"thing {index}", [(start, length)])
        except QvmError as error:
            inside = any(spec.start <= start and start + length <= spec.end for spec in specs)
            assert not inside or " overlap; " in str(error)
        else:
            taken.append((start, length))
    memory.close()

    def fits(at: int) -> bool:
        return (
            first <= at and at + size <= below and at % step == 0
            and any(not s.rom and s.start <= at and at + size <= s.end for s in specs)
            and all(not length or at + size <= start or start + length <= at for start, length in taken)
        )  # fmt: skip

    low, high = room.lowest(size, first, below, step), room.highest(size, first, below, step)
    assert (low is None) == (high is None)
    if low is None or high is None:
        assert not any(map(fits, range(0, 6 * MIB, max(step, PAGE))))
        return
    assert fits(low) and fits(high) and low <= high
    assert not any(map(fits, range(0, low, max(step, PAGE))))
    assert not any(map(fits, range(high + step, 6 * MIB, step if step > 1 else 4099)))


def test_room_does_not_depend_on_the_order_of_what_was_taken() -> None:
    memory = GuestMemory.allocate([MemorySpec(0, 16 * PAGE)])
    room = Room(memory)
    room.take("high", [(8 * PAGE, 4 * PAGE)])
    room.take("low", [(2 * PAGE, 4 * PAGE)])
    assert room.lowest(3 * PAGE, 0, 16 * PAGE, PAGE) == 12 * PAGE
    assert room.highest(2 * PAGE, 0, 12 * PAGE, PAGE) == 6 * PAGE
    memory.close()


GOOD = [bzimage(), elf64(), elf32(), elf64(note=elf_note(struct.pack("<I", MIB)))]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(
    st.binary(max_size=200)
    | st.builds(lambda data, at, change: data[:at] + change + data[at + len(change):],
                st.sampled_from(GOOD), st.integers(0, 0x2A0), st.binary(min_size=1, max_size=8))
)  # fmt: skip
def test_any_file_is_loaded_or_refused_in_words(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "kernel").write_bytes(data)
    memory = GuestMemory.allocate([MemorySpec(0, 32 * MIB)])
    try:
        entry = load_pc(LoadSpec(tmp_path / "kernel"), memory, AcpiTables(0xE0000, ((0xE0000, b"R"),)))
    except QvmError as error:
        assert str(error)
    else:
        assert memory.contains(entry.pc, 1)
    finally:
        memory.close()


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest ``debian-amd64`` from packages that are in the cache; no network."""
    guests = pytest.importorskip("qvm_guests", reason="qvm-guests is not installed")
    from qvm_guests import build
    from qvm_guests.cache import GuestCache
    from qvm_guests.progress import Progress
    from qvm_guests.recipes import find

    assert guests
    if not GuestCache("debian-amd64").verified(lambda _: None):
        pytest.skip("the packages of debian-amd64 are not in the cache; `qvm guest build debian-amd64 DIR`")
    folder = tmp_path_factory.mktemp("debian-amd64")
    build.build(find("debian-amd64"), folder, Progress())
    return folder


def test_the_kernel_of_debian_field_by_field(debian: Path) -> None:
    memory = GuestMemory.allocate([MemorySpec(0, 256 * MIB)])
    acpi = AcpiTables(0xE0000, ((0xE0000, b"RSD PTR "),))
    spec = LoadSpec(debian / "vmlinuz", debian / "initramfs.cpio.gz", "console=ttyS0")
    entry = load_pc(spec, memory, acpi)
    kernel, initrd = spec.kernel.read_bytes(), spec.initrd.read_bytes()  # type: ignore[union-attr]
    (preferred,) = struct.unpack_from("<Q", kernel, 0x258)
    assert entry.mode == "long64" and entry.pc == preferred + 0x200
    offset, size = (kernel[0x1F1] + 1) * 512, struct.unpack_from("<I", kernel, 0x1F4)[0] * 16
    assert memory.read(preferred, size) == kernel[offset : offset + size]
    params = memory.read(entry.registers["rsi"], PAGE)
    end = 0x202 + kernel[0x201]
    own = {0x1FA, 0x1FB, 0x210, *range(0x214, 0x220), *range(0x228, 0x22C)}
    for at in set(range(0x1F1, end)) - own:
        assert params[at] == kernel[at], f"field at {at:#x}"
    assert params[0x210] == 0xFF
    (cmdline,) = struct.unpack_from("<I", params, 0x228)
    assert memory.read(cmdline, 14) == b"console=ttyS0\0"
    image, length = struct.unpack_from("<II", params, 0x218)
    assert length == len(initrd) and memory.read(image, length) == initrd
    assert image == (256 * MIB - length) // PAGE * PAGE
    (init_size,) = struct.unpack_from("<I", kernel, 0x260)
    assert image >= preferred + init_size
    assert struct.unpack_from("<Q", params, 0x70) == (0xE0000,)
    assert params[0x1E8] == 3
    table = list(struct.iter_unpack("<QQI", params[0x2D0 : 0x2D0 + 60]))
    assert table == [(0, 0xA0000, 1), (0xA0000, 0x60000, 2), (MIB, 255 * MIB, 1)]
    memory.close()
