"""Hypothesis strategies: what a guest may put into rings and registers, right and wrong."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import strategies as st

from qvmcore.virtio import pci_spec, spec
from qvmcore.virtio.pci import DEVICE, ISR, NOTIFY, STRUCTURES

#: Every register of 4.2.2, and some offsets that are none.
REGISTERS = tuple(sorted({
    *(value for name, value in vars(spec).items() if name.startswith("MMIO_") and "INT_" not in name
      and name not in ("MMIO_MAGIC", "MMIO_VERSION_2")),
    0x018, 0x02C, 0x054, 0x0C4, 0x0F8,
}))  # fmt: skip

#: 32-bit values at which register handling tends to break.
VALUES = (0, 1, 2, 3, 4, 7, 8, 15, 16, 63, 64, 65, 128, 255, 256, 0x7FFF, 0x8000, 0xFFFF, 0x10000,
          0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)  # fmt: skip


class Access(NamedTuple):
    """A guest's access to a window; ``value`` is None for a load."""

    offset: int
    size: int
    value: int | None


class Descriptor(NamedTuple):
    """One row of a descriptor table, as bad as it may be."""

    address: int
    length: int
    flags: int
    following: int


def accesses(window: int = 0x200) -> st.SearchStrategy[Access]:
    """Loads and stores of every size at registers, in the configuration and anywhere."""
    offsets = st.one_of(st.sampled_from(REGISTERS), st.integers(0, window - 1))
    sizes = st.sampled_from((4, 4, 4, 1, 2, 8))
    stores = st.one_of(st.sampled_from(VALUES), st.integers(0, 0xFFFFFFFF))
    return st.builds(Access, offsets, sizes, st.one_of(st.none(), stores)).map(_fitting)


def pci_accesses() -> st.SearchStrategy[Access]:
    """Loads and stores in the BAR of the virtio structures: fields as they should be, and anything."""
    fields = st.sampled_from(tuple(pci_spec.COMMON_CFG_FIELDS.items()))
    anywhere = st.tuples(
        st.one_of(
            st.sampled_from((ISR, ISR + 1, DEVICE, NOTIFY, NOTIFY + 1, NOTIFY + 2, NOTIFY + 4)),
            st.integers(0, pci_spec.COMMON_CFG_SIZE + 8),
            st.integers(0, STRUCTURES.size - 1),
        ),
        st.sampled_from((1, 2, 4, 8)),
    )
    values = st.one_of(st.none(), st.sampled_from(VALUES), st.integers(0, 0xFFFFFFFF))
    places = st.one_of(fields, fields, anywhere)
    return st.builds(lambda place, value: Access(place[0], place[1], value), places, values).map(_fitting)


def config_accesses() -> st.SearchStrategy[Access]:
    """Loads and stores in the configuration space of a PCI function."""
    offsets = st.one_of(st.integers(0, 0xFF), st.integers(0, 0xFFF))
    values = st.one_of(st.none(), st.sampled_from(VALUES), st.integers(0, 0xFFFFFFFF))
    return st.builds(Access, offsets, st.sampled_from((1, 2, 4)), values).map(_fitting)


def register_sequences(longest: int = 30) -> st.SearchStrategy[list[Access]]:
    """What a confused driver does to a device."""
    return st.lists(accesses(), max_size=longest)


def addresses(start: int, end: int) -> st.SearchStrategy[int]:
    """Guest-physical addresses: mostly inside [start, end), and at and beyond every edge."""
    edges = (0, 1, start - 1, start, end - 1, end, (1 << 32) - 1, 1 << 63, (1 << 64) - 16, (1 << 64) - 1)
    inside = st.integers(start, end - 1)
    return st.one_of(inside, inside, inside, st.sampled_from(edges))


def lengths() -> st.SearchStrategy[int]:
    """Buffer lengths: small ones, the sizes devices care about, and absurd ones."""
    return st.one_of(
        st.integers(0, 64),
        st.sampled_from((0, 1, 15, 16, 17, 20, 511, 512, 513, 4096, 0x7FFFFFFF, 0xFFFFFFF0, 0xFFFFFFFF)),
    )


def descriptors(start: int, end: int, entries: int) -> st.SearchStrategy[Descriptor]:
    """One descriptor for a table of ``entries``."""
    flags = st.one_of(st.integers(0, 3), st.integers(0, 7), st.integers(0, 0xFFFF))
    following = st.one_of(st.integers(0, entries - 1), st.integers(0, 0xFFFF))
    return st.builds(Descriptor, addresses(start, end), lengths(), flags, following)


@st.composite
def good_chains(draw: st.DrawFn, longest: int = 6) -> tuple[list[bytes], list[int]]:
    """A chain a good driver might build: readable pieces and the lengths of writable ones."""
    readable = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=longest))
    most = max(1, longest - len(readable))
    writable = draw(st.lists(st.integers(1, 40), min_size=not readable, max_size=most))
    return readable, writable


def _fitting(access: Access) -> Access:
    """Cut the value to the size of the access."""
    if access.value is None:
        return access
    return access._replace(value=access.value & (1 << 8 * access.size) - 1)
