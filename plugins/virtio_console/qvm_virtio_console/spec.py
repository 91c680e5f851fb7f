"""Numbers and layouts of the virtio console device (virtio 1.4, 5.3). No behaviour."""

from __future__ import annotations

import struct

DEVICE_ID = 3

# Queues of a device with one port (5.3.2), named from the guest's side.
RECEIVEQ = 0
TRANSMITQ = 1

# Feature bits (5.3.3).
F_SIZE = 1 << 0
F_EMERG_WRITE = 1 << 2

#: struct virtio_console_config (5.3.4): cols, rows, max_nr_ports, emerg_wr.
CONFIG = struct.Struct("<HHII")
CONFIG_EMERG_WR_OFFSET = 8
