"""ACPI tables (floor 8): how an x86 guest is told what its machine has (ACPI 6.3).

``aml`` and ``resources`` encode, ``dsdt`` describes the devices, ``tables`` has the tables of fixed
form, ``image`` builds all of them for a machine and gives each its address.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AcpiTables:
    """The tables of a machine: (guest-physical address, content) of each, none touching another.

    ``rsdp_address`` is where the root pointer is, which is one of the blobs. A loader writes them
    all to guest memory and passes the address on; they must stay there while the guest runs.
    """

    rsdp_address: int
    blobs: tuple[tuple[int, bytes], ...]

    def named(self) -> dict[str, tuple[int, bytes]]:
        """Each blob by its signature in small letters: ``rsdp``, ``xsdt``, ``facp``, ``dsdt`` ..."""
        names = {self.rsdp_address: "rsdp"}
        return {names.get(at) or blob[:4].decode().lower(): (at, blob) for at, blob in self.blobs}
