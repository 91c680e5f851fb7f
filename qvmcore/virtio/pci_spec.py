"""Constants of virtio over PCI, named as in the standard (virtio 1.4, 4.1)."""

from __future__ import annotations

from typing import Final

# Identity, 4.1.2.1
VENDOR_ID: Final = 0x1AF4
DEVICE_ID_BASE: Final = 0x1040
#: Subsystem device ids of non-transitional devices start here (SHOULD, 4.1.2.1).
SUBSYSTEM_ID_BASE: Final = 0x40
REVISION: Final = 1

#: PCI class codes (class, subclass, interface) of the device types of chapter 5.
CLASS_CODES: Final = {
    1: 0x02_80_00,  # network: other network controller
    2: 0x01_80_00,  # block: other mass storage controller
    3: 0x07_80_00,  # console: other communication controller
    8: 0x01_80_00,  # SCSI host
    16: 0x03_80_00,  # GPU: other display controller
    18: 0x09_80_00,  # input: other input controller
    19: 0x02_80_00,  # socket
    25: 0x04_80_00,  # sound: other multimedia controller
    26: 0x01_80_00,  # file system
}
#: A device that fits no defined class (the entropy source).
CLASS_OTHER: Final = 0x00_FF_00

# cfg_type of struct virtio_pci_cap, 4.1.4
CAP_COMMON_CFG: Final = 1
CAP_NOTIFY_CFG: Final = 2
CAP_ISR_CFG: Final = 3
CAP_DEVICE_CFG: Final = 4
CAP_PCI_CFG: Final = 5
#: Bytes of struct virtio_pci_cap.
CAP_SIZE: Final = 16

# struct virtio_pci_common_cfg, 4.1.4.3
DEVICE_FEATURE_SELECT: Final = 0x00
DEVICE_FEATURE: Final = 0x04
DRIVER_FEATURE_SELECT: Final = 0x08
DRIVER_FEATURE: Final = 0x0C
CONFIG_MSIX_VECTOR: Final = 0x10
NUM_QUEUES: Final = 0x12
DEVICE_STATUS: Final = 0x14
CONFIG_GENERATION: Final = 0x15
QUEUE_SELECT: Final = 0x16
QUEUE_SIZE: Final = 0x18
QUEUE_MSIX_VECTOR: Final = 0x1A
QUEUE_ENABLE: Final = 0x1C
QUEUE_NOTIFY_OFF: Final = 0x1E
QUEUE_DESC: Final = 0x20
QUEUE_DRIVER: Final = 0x28
QUEUE_DEVICE: Final = 0x30
QUEUE_NOTIF_CONFIG_DATA: Final = 0x38
QUEUE_RESET: Final = 0x3A
ADMIN_QUEUE_INDEX: Final = 0x3C
ADMIN_QUEUE_NUM: Final = 0x3E
COMMON_CFG_SIZE: Final = 0x40

#: Width in bytes of each field; a 64-bit field is two of 32 bits (4.1.3).
COMMON_CFG_FIELDS: Final = {
    DEVICE_FEATURE_SELECT: 4,
    DEVICE_FEATURE: 4,
    DRIVER_FEATURE_SELECT: 4,
    DRIVER_FEATURE: 4,
    CONFIG_MSIX_VECTOR: 2,
    NUM_QUEUES: 2,
    DEVICE_STATUS: 1,
    CONFIG_GENERATION: 1,
    QUEUE_SELECT: 2,
    QUEUE_SIZE: 2,
    QUEUE_MSIX_VECTOR: 2,
    QUEUE_ENABLE: 2,
    QUEUE_NOTIFY_OFF: 2,
    QUEUE_DESC: 4,
    QUEUE_DESC + 4: 4,
    QUEUE_DRIVER: 4,
    QUEUE_DRIVER + 4: 4,
    QUEUE_DEVICE: 4,
    QUEUE_DEVICE + 4: 4,
    QUEUE_NOTIF_CONFIG_DATA: 2,
    QUEUE_RESET: 2,
    ADMIN_QUEUE_INDEX: 2,
    ADMIN_QUEUE_NUM: 2,
}

# ISR status, 4.1.4.5
ISR_QUEUE: Final = 1
ISR_CONFIG: Final = 2

#: An event that is mapped to no vector, 4.1.5.1.2.
MSI_NO_VECTOR: Final = 0xFFFF
#: The most MSI-X vectors a device may have, 4.1.5.1.2.
MSI_VECTORS_MAX: Final = 0x800
