"""Numbers and layouts of the virtio block device (virtio 1.4, 5.2). No behaviour."""

from __future__ import annotations

import struct

DEVICE_ID = 2

#: The unit of ``sector``, of the capacity and of every data length, bytes; whatever blk_size says.
SECTOR = 512

# Feature bits (5.2.3).
F_SEG_MAX = 1 << 2
F_RO = 1 << 5
F_BLK_SIZE = 1 << 6
F_FLUSH = 1 << 9
F_TOPOLOGY = 1 << 10
F_CONFIG_WCE = 1 << 11

# Request types (5.2.6).
T_IN = 0
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8

# Status bytes (5.2.6).
S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

#: le32 type, le32 reserved, le64 sector.
HEADER = struct.Struct("<IIQ")

#: Length of the answer to T_GET_ID, bytes.
ID_BYTES = 20

#: struct virtio_blk_config up to num_queues (5.2.4): capacity in sectors, size_max, seg_max,
#: geometry (cylinders, heads, sectors), blk_size, physical_block_exp, alignment_offset,
#: min_io_size, opt_io_size (both in blocks of blk_size), writeback, unused, num_queues.
CONFIG = struct.Struct("<QIIHBBIBBHIBBH")
CONFIG_WRITEBACK_OFFSET = 32
