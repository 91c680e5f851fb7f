"""Numbers and layouts of the virtio console device (virtio 1.4, 5.3). No behaviour."""

from __future__ import annotations

import enum
import struct

DEVICE_ID = 3

# Queues (5.3.2), named from the guest's side; further ports follow in pairs.
RECEIVEQ = 0
TRANSMITQ = 1
CONTROL_RECEIVEQ = 2
CONTROL_TRANSMITQ = 3

# Feature bits (5.3.3).
F_SIZE = 1 << 0
F_MULTIPORT = 1 << 1
F_EMERG_WRITE = 1 << 2

#: struct virtio_console_config (5.3.4): cols, rows, max_nr_ports, emerg_wr.
CONFIG = struct.Struct("<HHII")
CONFIG_EMERG_WR_OFFSET = 8

#: struct virtio_console_control (5.3.6.2): port, event, value.
CONTROL = struct.Struct("<IHH")
#: struct virtio_console_resize: columns, rows.
RESIZE = struct.Struct("<HH")


class Event(enum.IntEnum):
    """The kinds of control messages (5.3.6.2)."""

    DEVICE_READY = 0
    DEVICE_ADD = 1
    DEVICE_REMOVE = 2
    PORT_READY = 3
    CONSOLE_PORT = 4
    RESIZE = 5
    PORT_OPEN = 6
    PORT_NAME = 7


def receiveq(port: int) -> int:
    """The queue that carries input to ``port``; output is the queue behind it."""
    return 2 * port + 2 if port else RECEIVEQ


def port_of(queue: int) -> int:
    """The port a data queue belongs to."""
    return queue // 2 - 1 if queue > CONTROL_TRANSMITQ else 0
