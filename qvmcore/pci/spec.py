"""Numbers of PCI Local Bus 3.0 and PCI Express Base (floor 4): the type 0 header, MSI-X, ECAM."""

from __future__ import annotations

#: Bytes of configuration space of one function: conventional, and as an ECAM shows it.
CONFIG_SIZE = 256
EXTENDED_SIZE = 4096

VENDOR_ID, DEVICE_ID, COMMAND, STATUS = 0x00, 0x02, 0x04, 0x06
REVISION_ID, CLASS_CODE = 0x08, 0x09
CACHE_LINE_SIZE, HEADER_TYPE = 0x0C, 0x0E
BAR0, BAR_COUNT = 0x10, 6
SUBSYSTEM_VENDOR_ID, SUBSYSTEM_ID = 0x2C, 0x2E
CAPABILITIES_POINTER = 0x34
INTERRUPT_LINE, INTERRUPT_PIN = 0x3C, 0x3D
#: First byte behind the header, where capabilities and private registers live.
HEADER_END = 0x40

COMMAND_MEMORY = 1 << 1
COMMAND_BUS_MASTER = 1 << 2
COMMAND_INTX_DISABLE = 1 << 10
STATUS_INTERRUPT = 1 << 3
STATUS_CAPABILITIES = 1 << 4
HEADER_MULTIFUNCTION = 0x80

BAR_64BIT = 0x4
BAR_PREFETCHABLE = 0x8
#: Low bits of a memory BAR that are flags, not address.
BAR_FLAGS = 0xF

CAP_VENDOR = 0x09
CAP_MSIX = 0x11

MSIX_ENTRY_SIZE = 16
MSIX_ENABLE = 1 << 15
MSIX_FUNCTION_MASK = 1 << 14
MSIX_MAX_VECTORS = 2048

#: An ECAM address is bus << 20 | device << 15 | function << 12 | register.
ECAM_BUS_SHIFT, ECAM_DEVICE_SHIFT, ECAM_FUNCTION_SHIFT = 20, 15, 12
DEVICES, FUNCTIONS = 32, 8
